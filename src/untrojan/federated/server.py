"""The server: federated averaging, and NONE on activations that clients report.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017
(FederatedAveraging, all clients in every round); Wang et al., "Training with More Confidence", NeurIPS 2022,
section 5.4, where NONE "requires the participants to use their data to test the global model and upload the
activation values". The paper leaves the rest open. Here, after ``rounds`` rounds each client sends, image by
image, its channels' largest outputs and its class probabilities, and no image; the server analyses all of
them as one set and, since attackers' triggers differ, each client's for themselves; resets the channels that
answer to the images so found, and tells each client which of its images to drop. An attacker won't: who has
many such images is left out from then on. Averaging goes on with batch norm's statistics frozen, for NONE's
``epochs`` rounds at its learning rate.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from untrojan.defenses.training.none import NONE
from untrojan.errors import UntrojanError
from untrojan.federated.client import DROPPED, LAYER, PROBABILITIES
from untrojan.federated.messages import (
    Introduction,
    Order,
    Package,
    Reported,
    Trained,
    check,
    exchanged,
    package,
    read,
    specification_of,
    take_weights,
)
from untrojan.federated.state import load_state, save_state
from untrojan.federated.transport import Transport
from untrojan.models.channels import channel_activations
from untrojan.models.classifier import Classifier
from untrojan.models.registry import build
from untrojan.progress import task
from untrojan.registry import options_of
from untrojan.training.recipe import Recipe

T = TypeVar("T")
Measure = Callable[[Classifier], dict[str, float]]
"""What is measured of the global model after every round, by name."""
TRAINING, RESET, AFTER = "training", "reset", "after defence"


@dataclass(frozen=True)
class Federation:
    """Settings of one federated training."""

    architecture: str
    rounds: Annotated[int, Ge(1)]
    """Before the defence."""
    recipe: Recipe
    """An honest client's local training in one round."""
    defense: NONE | None = None
    """``epochs`` counts rounds here, ``learning_rate`` is the clients' own in those."""
    weighting: Literal["equal", "images"] = "equal"
    """What a client's update counts: alike, as in DBA, or by its images, as in FederatedAveraging. By images
    a client weighs what it says it has."""
    seed: int = 0
    expelled_at: Annotated[float, Gt(0)] = 0.1
    """A client at least this share of whose images is dropped trains no more; above 1, nobody is expelled."""

    def steps(self) -> list[str]:
        """What happens, round by round."""
        after = [RESET, *[AFTER] * self.defense.epochs] * self.defense.rounds if self.defense else []
        return [TRAINING] * self.rounds + after


@dataclass(frozen=True, eq=False)
class FederatedReport:
    """What came of it."""

    model: Classifier
    history: list[dict[str, Any]]
    """An entry a round: ``round``, ``phase``, what was measured, ``clients``, ``excluded``, ``loss``."""
    excluded: list[dict[str, Any]]
    """``round``, ``client`` and ``reason`` wherever a client's answer could not be used."""
    defense: list[dict[str, Any]] = field(default_factory=list)
    """What each of NONE's analyses found."""

    def before(self) -> dict[str, Any]:
        """``round`` and what was measured at the end of plain training."""
        return _measured([row for row in self.history if row["phase"] == TRAINING][-1])

    def after(self) -> dict[str, Any] | None:
        """The same at the very end; None where there was no defence."""
        return None if self.history[-1]["phase"] == TRAINING else _measured(self.history[-1])


def weighted_mean(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """FedAvg: sum of w_i state_i over sum of w_i, entry by entry, in float64.

    Entries keep their types; whole numbers, such as batch norm's counters, are rounded.
    """
    mean = {}
    for name, first in states[0].items():
        total = torch.zeros(first.shape, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            total += state[name].double() * weight
        total /= sum(weights)
        mean[name] = (total if first.is_floating_point() else total.round()).to(first.dtype)
    return mean


@dataclass(frozen=True)
class _Member:
    name: str
    images: int


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row.get(key) for key in ("round", "benign_accuracy", "attack_success")}


class Server:
    """One federated training, from its first round or from where it was.

    Answers that can't be used (a client that is gone, refuses, sends other tensors than were asked for or
    values that are not finite) leave that client out of that round. Raises UntrojanError where no client is
    left in a round, and where ``state`` is another training's.
    """

    def __init__(
        self,
        federation: Federation,
        class_names: tuple[str, ...],
        image_shape: tuple[int, int, int],
        transport: Transport,
        *,
        measure: Measure | None = None,
        state: Path | None = None,
        notify: Callable[[str], None] | None = None,
        device: str = "cpu",
    ) -> None:
        """``state`` is where the global weights are kept after each round; ``notify`` hears, in a line each,
        of clients that are left out."""
        self.federation, self.transport, self.state = federation, transport, state
        self.class_names, self.image_shape = class_names, image_shape
        self.measure, self.notify = measure or (lambda _: {}), notify or (lambda _: None)
        channels = image_shape[0]
        self.model = build(
            federation.architecture,
            num_classes=len(class_names),
            image_shape=image_shape,
            mean=torch.zeros(channels),
            std=torch.ones(channels),
            precision=federation.recipe.precision,
            seed=federation.seed,
        ).to(device)
        self.members: dict[int, _Member] = {}
        self.dropped: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self.excluded: list[dict[str, Any]] = []
        self.found: list[dict[str, Any]] = []

    def run(self) -> FederatedReport:
        """All rounds that are still to come."""
        self._restore()
        steps = self.federation.steps()
        with task("federated training", len(steps), "rounds", done=len(self.history)) as bar:
            while len(self.history) < len(steps):
                phase, started, before = steps[len(self.history)], time.monotonic(), len(self.excluded)
                self._gather()
                facts = self._analyse() if phase == RESET else self._average(phase == AFTER)
                self.model.eval()
                self.history.append(
                    {
                        "round": self._round,
                        "phase": phase,
                        **self.measure(self.model),
                        **facts,
                        "excluded": len(self.excluded) - before,
                        "seconds": round(time.monotonic() - started, 2),
                    }
                )
                self._save()
                bar.advance()
        model = copy.deepcopy(self.model).cpu().eval()
        return FederatedReport(model, self.history, self.excluded, self.found)

    @property
    def _round(self) -> int:
        return len(self.history) + 1

    def _gather(self) -> None:
        """Learn who is there: known clients that are gone are named, new ones introduce themselves."""
        online = list(self.transport.nodes())
        for node in self.members.keys() - set(online):
            self._exclude(self.members.pop(node).name, "not connected")
        new = {node: self._order("introduce") for node in online if node not in self.members}
        for node, reply in sorted(self.transport.ask(new).items()) if new else ():
            try:
                said = read(Introduction, _arrived(reply, f"node {node}"), f"node {node}")
                if said.name in {member.name for member in self.members.values()}:
                    raise UntrojanError(f"node {node}: another client has its name, {said.name}")
                self.members[node] = _Member(said.name, said.images)
            except UntrojanError as error:
                self._exclude(f"node {node}", str(error))
        if not self.members:
            self._nobody()

    def _average(self, after_defense: bool) -> dict[str, Any]:
        expected = specification_of(exchanged(self.model))

        def usable(received: Package, member: _Member) -> tuple[Trained, dict[str, Tensor]]:
            said = read(Trained, received, member.name)
            if said.images > member.images:
                raise UntrojanError(f"{member.name}: it has {member.images} images, not {said.images}")
            check(received.tensors, expected, member.name)
            return said, received.tensors

        answers = self._ask("train", usable, after_defense)
        by_images = self.federation.weighting == "images"
        weights = [said.images if by_images else 1 for said, _ in answers.values()]
        mean = weighted_mean([tensors for _, tensors in answers.values()], weights)
        take_weights(self.model, mean, "the mean of all clients")
        loss = sum(said.loss for said, _ in answers.values()) / len(answers)
        return {"clients": len(answers), "loss": loss}

    def _analyse(self) -> dict[str, Any]:
        method = self.federation.defense
        if method is None:
            raise UntrojanError("there is no defence to analyse for")
        nothing = torch.zeros((1, *self.image_shape), dtype=torch.uint8)
        layers, _ = channel_activations(self.model, nothing)

        def usable(received: Package, member: _Member) -> dict[str, Tensor]:
            count = read(Reported, received, member.name).images
            if count != member.images:
                raise UntrojanError(f"{member.name}: it has {member.images} images and reports {count}")
            shapes = {LAYER + path: (count, values.shape[1]) for path, values in layers.items()}
            shapes[PROBABILITIES] = (count, len(self.class_names))
            check(received.tensors, {k: (torch.float32, shape) for k, shape in shapes.items()}, member.name)
            chances = received.tensors[PROBABILITIES]
            if float(chances.min()) < 0 or float((chances.sum(1) - 1).abs().max()) > 1e-3:
                raise UntrojanError(f"{member.name}: its probabilities are none")
            return received.tensors

        answers = self._ask("report", usable)
        pooled = {path: torch.cat([each[LAYER + path] for each in answers.values()]) for path in layers}
        chances = torch.cat([each[PROBABILITIES] for each in answers.values()])
        analysis = method.judge(pooled, chances)
        counts = [len(each[PROBABILITIES]) for each in answers.values()]
        parts = {}
        for (name, each), rows in zip(answers.items(), method.dropped(analysis).split(counts), strict=True):
            own = method.judge({path: each[LAYER + path] for path in layers}, each[PROBABILITIES])
            # A later look sees a model that has forgotten some of it: what was dropped stays dropped.
            before = self.dropped.get(name, torch.zeros(0, dtype=torch.int64))
            # A client may have come back with fewer images.
            before = before[before < len(rows)]
            parts[name] = (rows | method.dropped(own)).index_fill(0, before, True)
        self.dropped = {name: part.nonzero().flatten() for name, part in parts.items() if bool(part.any())}
        compromised = method.compromised(pooled, chances, torch.cat(list(parts.values())))
        method.reset(self.model, nothing.float().to(self.model.device), compromised)
        self.found.append(
            {
                "compromised": {path: each.tolist() for path, each in compromised.items()},
                "separation": analysis.separation,
                "suspects": int(analysis.suspects.sum()),
                "images": len(chances),
                "dropped": {name: int(part.sum()) for name, part in parts.items()},
                "expelled": sorted(self._expelled()),
            }
        )
        return {"clients": len(answers), "loss": None}

    def _ask(
        self,
        what: Literal["train", "report"],
        usable: Callable[[Package, _Member], T],
        after_defense: bool = False,
    ) -> dict[str, T]:
        """By client, in the order of their names, what could be used of their answers."""
        weights = exchanged(self.model)
        packages = {}
        expelled = self._expelled() if what == "train" else set()
        for node, member in self.members.items():
            if member.name in expelled:
                self._exclude(member.name, f"{len(self.dropped[member.name])} of its images look like poison")
                continue
            rows = self.dropped.get(member.name) if what == "train" else None
            packages[node] = self._order(what, after_defense, weights if rows is None else {
                **weights, DROPPED: rows
            })  # fmt: skip
        replies, answers = self.transport.ask(packages), {}
        asked = [(node, member) for node, member in self.members.items() if node in packages]
        for node, member in sorted(asked, key=lambda item: item[1].name):
            try:
                reply = _arrived(replies.get(node, "no answer"), member.name)
                answers[member.name] = usable(reply, member)
            except UntrojanError as error:
                self._exclude(member.name, str(error))
        if not answers:
            self._nobody()
        return answers

    def _expelled(self) -> set[str]:
        """Clients with too many dropped images; none where that would be all of them."""
        shares = {
            member.name: len(self.dropped.get(member.name, ())) / member.images
            for member in self.members.values()
        }
        found = {name for name, share in shares.items() if share >= self.federation.expelled_at}
        return found if len(found) < len(shares) else set()

    def _order(
        self,
        what: Literal["introduce", "train", "report"],
        after_defense: bool = False,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Package:
        method, recipe = self.federation.defense, self.federation.recipe
        if after_defense and method is not None:
            recipe = replace(recipe, learning_rate=method.learning_rate, schedule="constant", milestones=())
        order = Order(
            what, self._round, self.federation.architecture, self.class_names, self.image_shape, recipe,
            after_defense, "max" if method is None else method.reduction,
        )  # fmt: skip
        return package(order, tensors)

    def _exclude(self, client: str, reason: str) -> None:
        reason = reason.removeprefix(f"{client}: ")
        self.excluded.append({"round": self._round, "client": client, "reason": reason})
        self.notify(f"round {self._round}: without {client} ({reason})")

    def _nobody(self) -> None:
        told = [each for each in self.excluded if each["round"] == self._round]
        first = f" ({told[-1]['client']}: {told[-1]['reason']})" if told else ""
        raise UntrojanError(f"round {self._round}: no client gave an answer that can be used{first}")

    def _identity(self) -> str:
        facts = [options_of(self.federation), list(self.class_names), list(self.image_shape)]
        return json.dumps(facts, sort_keys=True)

    def _save(self) -> None:
        if self.state is None:
            return
        record = {"history": self.history, "excluded": self.excluded, "defense": self.found}
        save_state(self.state, self._identity(), exchanged(self.model), self.dropped, record)

    def _restore(self) -> None:
        if self.state is None or not self.state.exists():
            return
        weights, self.dropped, record = load_state(self.state, self._identity())
        take_weights(self.model, weights, str(self.state))
        self.model.eval()
        self.history, self.excluded = record["history"], record["excluded"]
        self.found = record["defense"]


def _arrived(reply: Package | str, who: str) -> Package:
    if isinstance(reply, str):
        raise UntrojanError(f"{who}: {reply}")
    return reply
