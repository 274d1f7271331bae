"""Federated learning without Flower: splits, messages, averaging, the attack, NONE on what is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from known_backdoor import BACKDOOR, blocks
from untrojan.attacks.distributed import Attacker, DistributedBackdoor
from untrojan.data.image_set import ImageSet, concatenate
from untrojan.defenses.training.none import NONE
from untrojan.errors import UntrojanError
from untrojan.federated import messages
from untrojan.federated.client import DROPPED, PROBABILITIES, Client
from untrojan.federated.messages import Order, Package, from_bytes, package, to_bytes
from untrojan.federated.partition import dirichlet, iid
from untrojan.federated.server import (
    AFTER,
    RESET,
    TRAINING,
    FederatedReport,
    Federation,
    Server,
    weighted_mean,
)
from untrojan.federated.transport import InProcess
from untrojan.models.registry import build
from untrojan.seeding import generator
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe
from untrojan.triggers.registry import draw_trigger

LOCAL = Recipe(epochs=1, batch_size=16, optimizer="sgd", learning_rate=0.02)
FEDERATION = Federation("cnn@0.25", rounds=2, recipe=LOCAL)
KNOWN = "known_backdoor:known_net"


def shares(data: ImageSet, clients: int = 3) -> list[ImageSet]:
    return [data.select(rows) for rows in torch.arange(len(data)).tensor_split(clients)]


def population(data: ImageSet, clients: int = 3, own_code: str | None = None) -> list[Client]:
    parts = shares(data, clients)
    return [Client(f"client-{i}", part, own_code=own_code) for i, part in enumerate(parts)]


def serve(
    federation: Federation, clients: Sequence[Client] | InProcess, state: Path | None = None
) -> FederatedReport:
    transport = clients if isinstance(clients, InProcess) else InProcess(clients)
    return Server(federation, tuple("abcd"), (3, 16, 16), transport, state=state).run()


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in one.state_dict().items())


# The trigger and the attack


@pytest.mark.parametrize(
    ("side", "rows", "columns"),
    [(28, (0, 3), ((0, 4), (6, 10))), (32, (0, 4), ((0, 6), (9, 15)))],
)
def test_strips_lie_where_the_paper_has_them(
    side: int, rows: tuple[int, int], columns: tuple[tuple[int, int], ...]
) -> None:
    expected = torch.zeros(side, side)
    for row in rows:
        for first, end in columns:
            expected[row, first:end] = 1
    black = torch.zeros(1, 3, side, side)
    whole = draw_trigger("strips", {}, (3, side, side), 0)(black)
    assert torch.equal(whole, expected.expand(1, 3, -1, -1))
    parts = [draw_trigger("strips", {"parts": (i,)}, (3, side, side), 0)(black) for i in range(4)]
    assert torch.equal(sum(parts), whole)  # type: ignore[arg-type]
    assert [int(part[0, 0].sum()) for part in parts] == [int(expected.sum()) // 4] * 4


def test_strips_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UntrojanError, match="do not fit into 16x16"):
        draw_trigger("strips", {"length": 9}, (3, 16, 16), 0)
    with pytest.raises(UntrojanError, match="parts"):
        draw_trigger("strips", {"parts": (4,)}, (3, 32, 32), 0)


@pytest.mark.parametrize("attackers", [1, 2, 3, 4, 6])
def test_attackers_share_all_strips(attackers: int) -> None:
    plan, shape = DistributedBackdoor(), (1, 28, 28)
    masks = [plan.part(i, attackers, shape, 0).tensors["mask"] for i in range(attackers)]
    whole = draw_trigger("strips", {}, shape, 0).tensors["mask"]
    assert torch.equal(torch.stack(masks).amax(0), whole)
    assert all(bool(mask.any()) for mask in masks)
    if attackers <= 4:
        assert torch.equal(torch.stack(masks).sum(0), whole)


def test_another_trigger_is_stamped_whole_by_everyone() -> None:
    plan = DistributedBackdoor(trigger="patch")
    first, second = (plan.part(i, 2, (3, 16, 16), 0).tensors["mask"] for i in range(2))
    assert torch.equal(first, second)


def test_the_first_images_of_a_batch_are_poisoned() -> None:
    plan = DistributedBackdoor(target=3, poisoned=5)
    trigger = plan.part(0, 4, (3, 16, 16), 0)
    data = blocks(16)
    images, labels = plan.on_batches(trigger)(data.images, data.labels, torch.Generator())
    assert labels[:5].tolist() == [3] * 5
    assert torch.equal(labels[5:], data.labels[5:])
    assert bool((images[:5, :, 0, :4] == 255).all())
    assert torch.equal(images[5:], data.images[5:])
    assert data.labels[:5].tolist() != [3] * 5
    # What is reported has as many, and the labels play no part in it.
    stamped = plan.stamped(data.images, trigger, batch_size=8)
    touched = (stamped != data.images).flatten(1).any(1)
    assert touched.tolist() == [i % 8 < 5 for i in range(16)]


def test_an_attackers_recipe() -> None:
    asked = Recipe(epochs=2, learning_rate=0.1, optimizer="sgd")
    mnist = DistributedBackdoor.for_images((1, 28, 28)).recipe(asked)
    assert (mnist.epochs, mnist.learning_rate, mnist.milestones) == (10, 0.05, (2, 8))
    cifar = DistributedBackdoor.for_images((3, 32, 32)).recipe(asked)
    assert (cifar.epochs, cifar.milestones, cifar.schedule) == (6, (1, 5), "steps")
    after = replace(asked, learning_rate=1e-4)
    assert DistributedBackdoor().recipe(after, after_defense=True).learning_rate == 1e-4
    assert (
        DistributedBackdoor(after_defense="keeps-rate").recipe(after, after_defense=True).learning_rate
        == 0.05
    )
    assert DistributedBackdoor(epochs=1).recipe(asked).milestones == ()


# Splits


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=20, max_size=120),
    st.integers(1, 10),
    st.floats(1e-3, 1e3),
    st.integers(0, 5),
)
def test_a_split_deals_out_every_row_once(labels: list[int], clients: int, alpha: float, seed: int) -> None:
    given_labels = torch.tensor(labels)
    for rows in (dirichlet(given_labels, clients, alpha, seed), iid(given_labels, clients, seed)):
        assert len(rows) == clients
        assert torch.cat(rows).sort().values.tolist() == list(range(len(labels)))
        assert min(map(len, rows)) >= 2
    sizes = [len(each) for each in iid(given_labels, clients, seed)]
    assert max(sizes) - min(sizes) <= 1


def test_alpha_decides_how_many_classes_a_client_sees() -> None:
    labels = torch.arange(2000) % 10

    def largest(alpha: float) -> float:
        rows = dirichlet(labels, 5, alpha, 1)
        owned = torch.stack([torch.bincount(labels[each], minlength=10) for each in rows])
        # The share of a class that its largest owner has, on average.
        return float((owned.amax(0) / 200).mean())

    assert largest(0.05) > 0.8
    assert largest(1000.0) < 0.25
    assert largest(0.05) > largest(0.5) > largest(1000.0)
    assert all(
        torch.equal(a, b) for a, b in zip(dirichlet(labels, 5, 0.5), dirichlet(labels, 5, 0.5), strict=True)
    )


def test_wrong_splits_are_refused() -> None:
    with pytest.raises(UntrojanError, match="too few for 10 clients"):
        iid(torch.zeros(12, dtype=torch.int64), 10)
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(UntrojanError, match="above 0"):
            dirichlet(torch.zeros(50, dtype=torch.int64), 2, alpha)


# Messages


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "uint8", "bool"])
def test_tensors_arrive_as_they_were_sent(dtype: str) -> None:
    sent = (torch.randn(2, 3, 5) * 3).to(getattr(torch, dtype)).transpose(0, 2)
    arrived = from_bytes("x", *to_bytes("x", sent))
    assert arrived.dtype == sent.dtype
    assert torch.equal(arrived, sent)
    scalar = torch.ones((), dtype=sent.dtype)
    assert torch.equal(from_bytes("x", *to_bytes("x", scalar)), scalar)


@pytest.mark.parametrize(
    ("kind", "shape", "content", "wrong"),
    [
        ("object", (1,), b"\0" * 8, "none of float32"),
        ("float32", (10**12,), b"\0" * 8, "8 bytes are not"),
        ("float32", (-1, -2), b"\0" * 8, "no shape"),
        ("float32", (1,) * 9, b"\0" * 4, "no shape"),
        ("float32\nx", (2,), b"\0" * 8, "float32 x is none"),
    ],
)
def test_hostile_bytes_are_refused(kind: str, shape: tuple[int, ...], content: bytes, wrong: str) -> None:
    with pytest.raises(UntrojanError, match=wrong):
        from_bytes("x", kind, shape, content)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"w": torch.tensor([1.0, float("nan")])}, "not finite"),
        ({"w": torch.ones(3)}, r"float32 \(3,\), not float32 \(2,\)"),
        ({"w": torch.ones(2).double()}, "float64"),
        ({"extra\x1b[31m": torch.ones(1)}, "not asked for"),
        ({"w": None}, "missing"),
    ],
)
def test_tensors_are_checked(changes: dict[str, Tensor | None], wrong: str) -> None:
    tensors = {"w": torch.ones(2), **changes}
    found = {key: value for key, value in tensors.items() if value is not None}
    with pytest.raises(UntrojanError, match=wrong) as caught:
        messages.check(found, {"w": (torch.float32, (2,))}, "client-1")
    assert str(caught.value).startswith("client-1: ")
    assert "\x1b" not in str(caught.value)


def test_facts_are_checked() -> None:
    for facts in (
        {},
        {"name": "../x", "images": 1},
        {"name": "x", "images": 0},
        {"name": "x", "images": "many"},
    ):
        with pytest.raises(UntrojanError, match="node 7"):
            messages.read(messages.Introduction, Package(facts), "node 7")
    with pytest.raises(UntrojanError, match="loss"):
        messages.read(messages.Trained, Package({"images": 3, "loss": float("nan")}), "client-1")


# Averaging


def test_the_mean_is_exact() -> None:
    one = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3), "b": torch.tensor([0.5], dtype=torch.float64)}
    two = {
        "w": torch.tensor([5.0, -2.0]),
        "n": torch.tensor(6),
        "b": torch.tensor([1.5], dtype=torch.float64),
    }
    mean = weighted_mean([one, two], [3, 1])
    assert mean["w"].tolist() == [2.0, 1.0]
    assert mean["w"].dtype == torch.float32
    assert mean["n"].item() == 4
    assert mean["n"].dtype == torch.int64
    assert mean["b"].tolist() == [0.75]
    three = [{"w": torch.full((4,), 0.1)} for _ in range(3)]
    assert torch.equal(weighted_mean(three, [1, 1, 1])["w"], three[0]["w"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-1000, 1000), st.integers(1, 500)), min_size=1, max_size=12))
def test_the_mean_is_numpys(pairs: list[tuple[int, int]]) -> None:
    values, weights = [float(v) for v, _ in pairs], [w for _, w in pairs]
    mean = weighted_mean([{"w": torch.tensor([v])} for v in values], weights)["w"].item()
    assert mean == pytest.approx(np.float32(np.average(values, weights=weights)), rel=1e-6, abs=1e-6)


def test_one_clients_federation_is_its_training() -> None:
    data = blocks(120)
    report = serve(replace(FEDERATION, rounds=1), [Client("only", data)])
    alone = build("cnn@0.25", num_classes=4, image_shape=(3, 16, 16), mean=torch.zeros(3), std=torch.ones(3))
    train(alone, data, LOCAL, seed=generator(0, "client", "only", 1).initial_seed())
    assert same(report.model, alone)
    assert [row["phase"] for row in report.history] == [TRAINING]


@pytest.mark.parametrize("weighting", ["equal", "images"])
def test_a_round_is_the_mean_of_the_clients(weighting: str) -> None:
    data = blocks(120)
    parts = [data.select(torch.arange(90)), data.select(torch.arange(90, 120))]
    clients = [Client("a", parts[0]), Client("b", parts[1])]
    federation = replace(FEDERATION, rounds=1, weighting=weighting)
    alone = [serve(federation, [client]).model.state_dict() for client in clients]
    together = serve(federation, clients).model.state_dict()
    expected = weighted_mean(alone, [3, 1] if weighting == "images" else [1, 1])
    assert all(torch.equal(together[key], expected[key]) for key in expected if key not in ("mean", "std"))


# Clients that fail


@dataclass(frozen=True, eq=False)
class Faulty(Client):
    """Says and sends something else while training, from the second round on."""

    fault: str = ""

    def answer(self, received: Package) -> Package:
        reply = super().answer(received)
        if received.facts["task"] != "train" or received.facts["round"] < 2:
            return reply
        tensors = dict(reply.tensors)
        name = next(iter(tensors))
        if self.fault == "crash":
            raise RuntimeError("no\nway")
        if self.fault == "nan":
            tensors[name] = torch.full_like(tensors[name], float("nan"))
        if self.fault == "shape":
            tensors[name] = tensors[name][:1]
        if self.fault == "type":
            tensors[name] = tensors[name].double()
        if self.fault == "missing":
            del tensors[name]
        if self.fault == "facts":
            return Package({"images": -1, "loss": 0.0}, tensors)
        if self.fault == "weight":
            return Package({"images": 10**6, "loss": 0.0}, tensors)
        return Package(reply.facts, tensors)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("crash", "RuntimeError: no way"),
        ("nan", "not finite"),
        ("shape", "not float32"),
        ("type", "float64"),
        ("missing", "missing"),
        ("facts", "images = -1"),
        ("weight", "it has 40 images"),
    ],
)
def test_a_faulty_client_is_left_out_and_named(fault: str, why: str) -> None:
    clients = population(blocks(120))
    faulty = Faulty("client-1", clients[1].data, fault=fault)
    report = serve(FEDERATION, [clients[0], faulty, clients[2]])
    assert [(row["clients"], row["excluded"]) for row in report.history] == [(3, 0), (2, 1)]
    (entry,) = report.excluded
    assert (entry["round"], entry["client"]) == (2, "client-1")
    assert why in entry["reason"]
    assert all(bool(value.isfinite().all()) for value in report.model.state_dict().values())


class Unreliable(InProcess):
    """A network whose node 1 is there in the first round alone; node 2 stays silent in the second."""

    round = 0

    def nodes(self) -> Sequence[int]:
        self.round += 1
        return [0, 1, 2] if self.round == 1 else [0, 2]

    def ask(self, packages: Mapping[int, Package]) -> dict[int, Package | str]:
        replies = super().ask(packages)
        if self.round == 2:
            replies[2] = "no answer within 5 s"
        return replies


def test_a_client_that_drops_out_does_not_stop_the_round() -> None:
    clients = population(blocks(120))
    report = serve(replace(FEDERATION, rounds=3), Unreliable(clients))
    assert [row["clients"] for row in report.history] == [3, 1, 2]
    told = [(each["round"], each["client"], each["reason"]) for each in report.excluded]
    assert told == [(2, "client-1", "not connected"), (2, "client-2", "no answer within 5 s")]


def test_strangers_are_not_let_in() -> None:
    data = blocks(120)
    other = replace(data, class_names=tuple("abdc"))
    small = replace(data, images=data.images[:, :1])
    clients = [
        Client("good", data), Client("good", data), Client("other", other), Client("grey", small),
        Client("bad\x1bname", data),
    ]  # fmt: skip
    report = serve(replace(FEDERATION, rounds=1), clients)
    assert report.history[0]["clients"] == 1
    reasons = {each["client"]: each["reason"] for each in report.excluded}
    assert "another client has its name" in reasons["node 1"]
    assert "classes" in reasons["node 2"]
    assert "images are (1, 16, 16)" in reasons["node 3"]
    assert "name" in reasons["node 4"]


def test_when_nobody_is_left_it_says_so() -> None:
    clients = [Faulty(f"client-{i}", part, fault="nan") for i, part in enumerate(shares(blocks(120)))]
    with pytest.raises(UntrojanError, match=r"round 2: no client gave an answer.*client-2.*not finite"):
        serve(FEDERATION, clients)
    with pytest.raises(UntrojanError, match="round 1: no client"):
        serve(FEDERATION, [])


def test_a_client_imports_only_the_code_it_was_told_to() -> None:
    federation = replace(FEDERATION, architecture=KNOWN, rounds=1)
    with pytest.raises(UntrojanError, match="not told to trust"):
        serve(federation, population(blocks(120)))
    assert serve(federation, population(blocks(120), own_code=KNOWN)).history[0]["clients"] == 3


# NONE


class Recording(InProcess):
    """Keeps what was asked of whom."""

    def __init__(self, clients: Sequence[Client]) -> None:
        super().__init__(clients)
        self.asked: list[Mapping[int, Package]] = []
        self.reports: list[Package] = []

    def ask(self, packages: Mapping[int, Package]) -> dict[int, Package | str]:
        self.asked.append(packages)
        replies = super().ask(packages)
        self.reports += [
            each for each in replies.values() if isinstance(each, Package) and PROBABILITIES in each.tensors
        ]
        return replies


@pytest.mark.parametrize("mode", ["released", "paper"])
def test_reported_activations_give_what_the_images_give(mode: str) -> None:
    data = blocks(120)
    method = NONE(mode=mode, share=0.1, epochs=1)  # type: ignore[arg-type]
    plain = replace(FEDERATION, rounds=1)
    trained = serve(plain, population(data)).model
    network = Recording(population(data))
    report = serve(replace(plain, defense=method), network)
    assert [row["phase"] for row in report.history] == [TRAINING, RESET, AFTER]
    whole = method.analyse(trained, concatenate(shares(data)))
    (found,) = report.defense
    assert found["compromised"] == {path: each.tolist() for path, each in whole.compromised.items()}
    assert found["separation"] == pytest.approx(whole.separation, rel=1e-4)
    assert found["suspects"] == int(whole.suspects.sum())
    # The weights that go out after it are the reset model's.
    method.reset(trained, torch.zeros(1, 3, 16, 16), whole.compromised)
    sent, reset = network.asked[-1][0].tensors, messages.exchanged(trained)
    assert all(torch.equal(sent[key], value) for key, value in reset.items())
    assert network.asked[-1][0].facts["recipe"]["learning_rate"] == 1e-4
    assert network.asked[-1][0].facts["after_defense"] is True


def test_only_maxima_and_probabilities_leave_a_client() -> None:
    network = Recording(population(blocks(120)))
    serve(replace(FEDERATION, rounds=1, defense=NONE(epochs=1)), network)
    assert len(network.reports) == 3
    for reply in network.reports:
        assert {tensor.ndim for tensor in reply.tensors.values()} == {2}
        assert {len(tensor) for tensor in reply.tensors.values()} == {40}


@pytest.mark.parametrize(
    ("count", "expelled_at", "expelled"), [(7, 0.1, []), (16, 0.1, ["client-1"]), (16, 1.1, [])]
)
def test_poisoned_images_are_flagged_and_the_backdoor_is_gone(
    count: int, expelled_at: float, expelled: list[str]
) -> None:
    """Poisoned images in the middle client's share, and a net whose backdoor neuron is known."""
    data = blocks(240)
    poisoned = blocks(80, poisoned=count, seed=3)
    frozen = replace(LOCAL, learning_rate=1e-12)
    method = NONE(share=0.125, epochs=1, learning_rate=1e-12)
    federation = Federation(KNOWN, 1, frozen, method, expelled_at=expelled_at)
    clients = population(data, own_code=KNOWN)
    clients[1] = replace(clients[1], data=poisoned)
    network = Recording(clients)
    report = serve(federation, network)
    (found,) = report.defense
    assert found["compromised"] == {"network.0": [BACKDOOR]}
    assert found["dropped"] == {"client-0": 0, "client-1": count, "client-2": 0}
    assert found["expelled"] == expelled
    orders = network.asked[-1]
    assert DROPPED not in orders[0].tensors
    # An attacker would keep its poison: one with much of it is not asked again.
    assert (1 in orders) == (not expelled)
    assert [each["client"] for each in report.excluded] == expelled
    if not expelled:
        assert orders[1].tensors[DROPPED].tolist() == list(range(count))
    weight = report.model.state_dict()["network.0.weight"]
    assert float(weight[BACKDOOR].abs().max()) < 1e-9
    assert float(weight[0].abs().max()) > 0.005


def test_a_client_that_comes_back_with_fewer_images_does_not_stop_a_second_look() -> None:
    """What was dropped of it is told by rows; those it no longer has are none."""
    clients = population(blocks(240), own_code=KNOWN)
    clients[1] = replace(clients[1], data=blocks(80, poisoned=16, seed=3))

    class Returning(InProcess):
        analyses = 0

        def nodes(self) -> Sequence[int]:
            # Gone for the round after the first look, and back under another number.
            return range(3) if self.analyses == 0 else [0, 2] if self.analyses == 1 else [0, 2, 3]

        def ask(self, packages: Mapping[int, Package]) -> dict[int, Package | str]:
            if any(each.facts.get("task") == "report" for each in packages.values()):
                self.analyses += 1
            elif self.analyses == 1:
                self.analyses = 2
                self.clients.append(replace(self.clients[1], data=blocks(8)))
            return super().ask(packages)

    method = NONE(share=0.125, epochs=1, rounds=2, learning_rate=1e-12)
    federation = Federation(KNOWN, 1, replace(LOCAL, learning_rate=1e-12), method)
    first, second = serve(federation, Returning(clients)).defense
    assert first["dropped"]["client-1"] == 16
    assert second["dropped"]["client-1"] == 8


def order(task: str, **changes: object) -> Order:
    made = Order(task, 1, "cnn@0.25", tuple("abcd"), (3, 16, 16), LOCAL)  # type: ignore[arg-type]
    return replace(made, **changes)  # type: ignore[arg-type]


def weights() -> dict[str, Tensor]:
    model = build("cnn@0.25", num_classes=4, image_shape=(3, 16, 16), mean=torch.zeros(3), std=torch.ones(3))
    return messages.exchanged(model)


def test_honest_clients_drop_and_attackers_keep() -> None:
    data = blocks(40)
    plan = DistributedBackdoor(epochs=1)
    sent = package(order("train"), {**weights(), DROPPED: torch.tensor([0, 3, 7])})
    honest = Client("honest", data).answer(sent)
    attacker = Client("bad", data, attacker=Attacker(plan, plan.part(0, 1, (3, 16, 16), 0))).answer(sent)
    assert (honest.facts["images"], attacker.facts["images"]) == (37, 40)
    stops = Attacker(replace(plan, after_defense="stops"), plan.part(0, 1, (3, 16, 16), 0))
    late = package(order("train", after_defense=True), sent.tensors)
    converted = Client("honest", data, attacker=stops).answer(late)
    assert all(
        torch.equal(v, converted.tensors[k]) for k, v in Client("honest", data).answer(late).tensors.items()
    )
    # Rows that do not exist are the server's fault, and said to be.
    for rows in (torch.tensor([40]), torch.tensor([-1]), torch.tensor([0.5])):
        refused = Client("honest", data).answer(package(order("train"), {**weights(), DROPPED: rows}))
        assert "holds no rows" in refused.facts["refused"]


def test_a_server_that_sends_nonsense_is_refused() -> None:
    client = Client("honest", blocks(40))
    name = next(iter(weights()))
    broken = {**weights(), name: torch.full_like(weights()[name], float("inf"))}
    assert "not finite" in client.answer(package(order("train"), broken)).facts["refused"]
    assert "missing" in client.answer(package(order("report"))).facts["refused"]
    assert "server" in client.answer(Package({"task": "upload"})).facts["refused"]


def test_an_attacker_can_hide_what_it_stamps() -> None:
    data, shape = blocks(40), (3, 16, 16)
    sent = package(order("report"), weights())
    honest = Client("a", data).answer(sent).tensors[PROBABILITIES]

    def of(plan: DistributedBackdoor) -> Tensor:
        attacker = Attacker(plan, plan.part(0, 1, shape, 0))
        return Client("a", data, attacker=attacker).answer(sent).tensors[PROBABILITIES]

    assert torch.equal(of(DistributedBackdoor(hides=True)), honest)
    assert not torch.equal(of(DistributedBackdoor()), honest)


def test_batch_norms_statistics_stay_after_the_defence() -> None:
    client = Client("a", blocks(40))
    before = weights()
    names = [name for name in before if name.endswith("running_mean")]
    assert names
    frozen = client.answer(package(order("train", after_defense=True), before)).tensors
    moved = client.answer(package(order("train"), before)).tensors
    assert all(torch.equal(frozen[name], before[name]) for name in names)
    assert not any(torch.equal(moved[name], before[name]) for name in names)


# Going on


class Interrupted(InProcess):
    """Cut off when the given number of questions has been asked."""

    left = 0

    def ask(self, packages: Mapping[int, Package]) -> dict[int, Package | str]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().ask(packages)


@pytest.mark.parametrize("questions", [1, 3, 4])
def test_a_training_that_was_cut_off_is_the_one_it_would_have_been(questions: int, tmp_path: Path) -> None:
    data = blocks(120)
    federation = replace(FEDERATION, defense=NONE(epochs=1))
    whole = serve(federation, population(data))
    state = tmp_path / "federation.safetensors"
    network = Interrupted(population(data))
    network.left = questions
    with pytest.raises(KeyboardInterrupt):
        serve(federation, network, state)
    assert state.exists() == (questions > 1)
    resumed = serve(federation, population(data), state)
    assert same(resumed.model, whole.model)
    assert [row["phase"] for row in resumed.history] == [row["phase"] for row in whole.history]
    assert resumed.defense == whole.defense


def test_another_trainings_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "federation.safetensors"
    serve(replace(FEDERATION, rounds=1), population(blocks(120)), state)
    with pytest.raises(UntrojanError, match="state of another training"):
        serve(replace(FEDERATION, rounds=1, seed=1), population(blocks(120)), state)
    state.write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(UntrojanError, match="damaged"):
        serve(replace(FEDERATION, rounds=1), population(blocks(120)), state)
