"""NONE: training that breaks the linearity a backdoor needs.

Wang et al., "Training with More Confidence: Mitigating Injected and Natural Backdoors During Training",
NeurIPS 2022. A backdoor makes some neurons linear: they answer to the trigger and to nothing else. NONE finds
such neurons after training, drops the images that excite them, resets them and trains on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet
from untrojan.defenses.training.report import TrainingReport, keeping_every_class
from untrojan.errors import UntrojanError
from untrojan.metrics.grouping import groups_of_each, two_groups
from untrojan.models.channels import Reduction, channel_activations, norms_after, weighted_layers
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.registry import build_for
from untrojan.training.loop import train
from untrojan.training.recipe import Recipe

Mode = Literal["released", "paper"]
Groups = tuple[Tensor, Tensor, Tensor]
"""What :func:`~untrojan.metrics.grouping.groups_of_each` says of a layer's channels."""
NO_LAYERS = "NONE needs layers before the last one, with weights that are trained: choose another network"


FEWEST = 40
"""Images of a class that are worth splitting: of so many normally distributed values one set in a hundred has
a separation of 2, of 20 one in ten."""
SMALLEST = 5
"""Images in a group: a single one far from all others may be anything."""
COMMON = 3.0
"""Times the excess asked of a class's most linear channels that is asked of any channels for most classes: of
many some is bound to be apart, and classes may have two kinds of images in common, such as day and night."""
ALIKE = 0.6
"""Dice coefficient from which on two channels are taken to tell the same images apart."""
STANDS_OUT = 3.0
"""Times what any other class has of it, and in most layers: classes have kinds of images of their own, and of
many classes some have them far apart."""
STRONG, WEAK = 0.9, 0.1
"""An image is strong for a class whose probability is above the one, and weak below the other."""


def linearity_by_class(activations: Tensor, probabilities: Tensor) -> Tensor:
    """How far each channel's peak for a class lies above what it does for all others, (K, C).

    ``activations`` (N, C), ``probabilities`` (N, K). For class k the strong images have p_k > .9 and the weak
    p_k < .1; the score is max over strong of a - (mean + 3 std of a over weak). A class without strong or
    weak images scores 0. A channel's score is the largest of all classes (the released code's rule).
    """
    scores = torch.zeros(probabilities.shape[1], activations.shape[1])
    for label, confidence in enumerate(probabilities.T):
        strong, weak = activations[confidence > STRONG], activations[confidence < WEAK]
        if len(strong) and len(weak) > 1:
            scores[label] = strong.amax(0) - (weak.mean(0) + 3 * weak.std(0))
    return scores


def excess_by_class(activations: Tensor, predicted: Tensor, suspects: Tensor) -> Tensor:
    """How much more each channel answers to suspects than to what else is taken for their class, (S, C).

    ``activations`` (N, C), ``predicted`` (N,), ``suspects`` bool (N,). A row for each of the S classes with
    :data:`SMALLEST` or more of either.
    """
    rows = [activations.new_zeros(0, activations.shape[1])]
    for label in predicted[suspects].unique().tolist():
        mine = predicted == label
        upper, lower = activations[mine & suspects], activations[mine & ~suspects]
        if min(len(upper), len(lower)) >= SMALLEST:
            rows.append((upper.mean(0) - lower.mean(0))[None])
    return torch.cat(rows)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What one look at a trained model found."""

    compromised: dict[str, Tensor]
    """By layer, int64 channels, the worst first."""
    suspects: Tensor
    """bool (N,)."""
    separation: float
    """How clearly images fall into two groups (:class:`~untrojan.metrics.grouping.Split`): all of them;
    within classes, those of the clearest class by its second-best layer (of :attr:`NONE.layers`); in mode
    paper, by the best neuron."""
    apart: bool
    """Whether two groups are really there: else no suspect is dropped."""
    classes: tuple[int, ...] = ()
    """Split within classes: those that fell into two groups."""
    separations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Split within classes: of each class that is large enough, how far apart each layer has its images."""
    votes: Tensor | None = None
    """Split within classes: float (N,), how many layers have a say and the image in their upper group."""


@dataclass(frozen=True)
class NONE:
    """NONE, as released or as printed.

    ``released``: train, then ``rounds`` times: images are split in two; the ``share`` of channels of every
    layer with the largest linearity scores (:func:`linearity_by_class`) are compromised and set to zero;
    training goes on for ``epochs`` at ``learning_rate`` with batch norm's statistics frozen. ``paper``
    (algorithm 1): a channel is compromised where its mean output is positive for ``theta`` of all images;
    each compromised channel splits the images, and those of the upper group that lie ``deviations`` beyond
    the lower group's mean are dropped; channels are initialised anew.

    The code splits all images by the sum of each layer's worst channel, and always (``all-at-once`` with
    ``separation`` 0), so it is told whether the data are poisoned. A defender is not: images are dropped
    only where two groups are really there. And in a sum over all layers and classes what a class looks like
    drowns what a trigger does. So ``within-classes``, which is ours, asks of each class and layer whether
    the channel that is most linear for that class has the images that the model takes for it in two groups,
    and believes layers that agree. The paper's threshold of .95, "the standard value that evaluates the
    quality of such separation", may mean the goodness of variance fit; with one image in a hundred poisoned
    that is .65, all of them told apart, and as much with none poisoned.

    A pattern that leads to every class excites channels that are linear for none: so the channel of each
    layer that has most classes in two groups is asked, too. A faint pattern's channels are not the most
    linear: a class in which most layers tell the same images apart, far more so than in any other, is asked
    by the channels that do. And once some images are told apart it is known which channels answer to them.
    These are reset, instead of those that are linear for whatever class, and the foremost of each layer is
    asked about the classes in which another was more linear. All of this is ours; ``compromised_by`` has the
    released rule for what is reset.
    """

    mode: Mode = "released"
    rounds: Annotated[int, Ge(0)] = 1
    share: Annotated[float, Interval(gt=0, le=1)] = 0.05
    theta: Annotated[float, Interval(gt=0, le=1)] = 0.95
    deviations: Annotated[float, Gt(0)] = 3.0
    """lambda, not stated in the paper."""
    split: Literal["within-classes", "all-at-once"] = "within-classes"
    """How mode released splits the images."""
    layer_separation: Annotated[float, Ge(0)] = 2.0
    """Within classes: a layer has a say where it has a class at least so far apart."""
    layers: Annotated[int, Ge(1)] = 2
    """Within classes: of so many layers at least, or all where a network has fewer, ..."""
    excess: Annotated[float, Ge(0)] = 1.0
    """... and these lie so far above ``layer_separation`` in sum. Then the class's images that are in the
    upper group of at least ``layers`` of them, and of half of them, are dropped."""
    separation: Annotated[float, Ge(0)] = 3.0
    """All at once, and in mode paper: images are dropped only from groups at least so far apart."""
    compromised_by: Literal["suspects", "linearity"] = "suspects"
    """What tells compromised channels in mode released: how much more they answer to the images that are
    dropped than to others of the same class (:func:`excess_by_class`), or linearity for any class. Where no
    image is dropped, always linearity."""
    epochs: Annotated[int, Ge(1)] = 20
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    seed: int = 0

    def __call__(
        self, data: ImageSet, architecture: str, recipe: Recipe, *, checkpoint: Path | None = None,
        device: str = "cpu",
    ) -> TrainingReport:  # fmt: skip
        """Train a new classifier on ``data``, of which some images may be poisoned.

        Raises UntrojanError as training does, and for a network without layers before its last.
        """
        model = build_for(data, architecture, precision=recipe.precision, seed=self.seed).to(device)
        if not weighted_layers(model, to_float(data.images[:1], model.device)):
            raise UntrojanError(NO_LAYERS)
        history = train(model, data, recipe, seed=self.seed, checkpoint=checkpoint).to_json()
        return self.defend(model, data, recipe, history, checkpoint)

    def defend(
        self,
        model: Classifier,
        data: ImageSet,
        recipe: Recipe,
        history: list[dict[str, float]] | None = None,
        checkpoint: Path | None = None,
    ) -> TrainingReport:
        """The rounds alone, for a model that was trained on ``data`` by ``recipe``; it stays as it was."""
        model, history = copy.deepcopy(model), list(history or [])
        dropped = torch.zeros(len(data), dtype=torch.bool)
        found: list[dict[str, object]] = []
        onward = replace(
            recipe, epochs=self.epochs, learning_rate=self.learning_rate, schedule="constant", milestones=()
        )
        for number in range(self.rounds):
            analysis = self.analyse(model, data)
            dropped, kept_whole = keeping_every_class(self.dropped(analysis), data)
            self.reset(model, to_float(data.images[:1], model.device), analysis.compromised)
            place = None if checkpoint is None else checkpoint.with_name(f"round{number}-{checkpoint.name}")
            more = train(
                model, data.select(~dropped), onward, seed=self.seed + 1 + number, checkpoint=place,
                description=f"round {number + 1}", freeze_statistics=self.mode == "released",
            )  # fmt: skip
            history += more.to_json()
            found.append(
                {
                    "compromised": {path: each.tolist() for path, each in analysis.compromised.items()},
                    "separation": analysis.separation,
                    "suspects": int(analysis.suspects.sum()),
                    "classes": list(analysis.classes),
                    "dropped": int(dropped.sum()),
                    "classes_kept_whole": kept_whole,
                    "notes": _notes(analysis, [data.class_names[label] for label in kept_whole]),
                }
            )
        return TrainingReport(model, dropped, history, {"rounds": found})

    def analyse(self, model: Classifier, data: ImageSet) -> Analysis:
        """Compromised channels and the images that excite them. The model is left as it was."""
        activations, logits = channel_activations(model, data.images, self.reduction)
        return self.judge(activations, logits.softmax(1))

    @property
    def reduction(self) -> Reduction:
        """What of a channel's places :meth:`judge` looks at."""
        return "max" if self.mode == "released" else "mean"

    def judge(self, activations: dict[str, Tensor], probabilities: Tensor) -> Analysis:
        """The analysis where the images are elsewhere, as in federated learning.

        ``activations`` are (N, C) by layer, as :func:`~untrojan.models.channels.channel_activations` gives
        them by ``reduction``; ``probabilities`` (N, K). Raises UntrojanError where there is no layer.
        """
        if not activations:
            raise UntrojanError(NO_LAYERS)
        if self.mode == "released":
            return self._released(activations, probabilities)
        return self._paper(activations)

    def dropped(self, analysis: Analysis) -> Tensor:
        """bool (N,): the suspects where two groups of images are really there, else none."""
        return analysis.suspects if analysis.apart else torch.zeros_like(analysis.suspects)

    def compromised(
        self, activations: dict[str, Tensor], probabilities: Tensor, suspects: Tensor
    ) -> dict[str, Tensor]:
        """Channels to be reset where the images ``suspects``, bool (N,), are dropped: by layer, the worst
        first. The rest as for :meth:`judge`."""
        if self.mode == "paper":
            return _positive(activations, self.theta)
        return self._worst(
            activations, probabilities.argmax(1), suspects,
            lambda path: linearity_by_class(activations[path], probabilities),
        )  # fmt: skip

    def _worst(
        self,
        activations: dict[str, Tensor],
        predicted: Tensor,
        suspects: Tensor,
        linearity: Callable[[str], Tensor],
    ) -> dict[str, Tensor]:
        found = {}
        for path, values in activations.items():
            excess = excess_by_class(values, predicted, suspects)
            if self.compromised_by == "suspects" and len(excess):
                # Not in units of its deviation: what a channel passes on is the difference itself.
                scores = excess.mean(0)
            else:
                scores = linearity(path).amax(0)
            worst = scores.argsort(descending=True)[: math.ceil(self.share * len(scores))]
            # A channel without a score answers to no class or suspect beyond others: it is left alone.
            if float(scores[worst[0]]) > 0:
                found[path] = worst[scores[worst] > 0]
        return found

    def _released(self, activations: dict[str, Tensor], probabilities: Tensor) -> Analysis:
        linearity = {path: linearity_by_class(values, probabilities) for path, values in activations.items()}
        predicted = probabilities.argmax(1)
        if self.split == "within-classes":
            found = self._within_classes(linearity, activations, predicted)
        else:
            found = self._all_at_once(linearity, activations)
        compromised = self._worst(activations, predicted, self.dropped(found), linearity.__getitem__)
        return replace(found, compromised=compromised)

    def _all_at_once(self, linearity: dict[str, Tensor], activations: dict[str, Tensor]) -> Analysis:
        excitement = torch.zeros(len(next(iter(activations.values()))), dtype=torch.float64)
        for path, scores in linearity.items():
            channel = int(scores.amax(0).argmax())
            if float(scores[:, channel].max()) > 0:
                excitement += activations[path][:, channel].double()
        split = two_groups(excitement)
        apart = split.separation >= self.separation
        return Analysis({}, excitement > split.at, split.separation, apart)

    def _within_classes(
        self, linearity: dict[str, Tensor], activations: dict[str, Tensor], predicted: Tensor
    ) -> Analysis:
        enough = min(self.layers, len(activations))
        votes, suspects = torch.zeros(len(predicted)), torch.zeros(len(predicted), dtype=torch.bool)
        separations: dict[int, dict[str, float]] = {}
        classes: list[int] = []
        counts = predicted.bincount(minlength=len(next(iter(linearity.values()))))
        large = (counts >= FEWEST).nonzero().flatten().tolist()

        groups = {
            label: {
                path: groups_of_each(values[predicted == label], SMALLEST)
                for path, values in activations.items()
            }
            for label in large
        }

        def ask(channels_of: Mapping[int, dict[str, int]]) -> None:
            for label, channels in channels_of.items():
                if label in classes or not channels:
                    continue
                rows = predicted == label
                own, said, chosen = self._look(activations, rows, groups[label], channels, enough)
                if chosen is not None:
                    classes.append(label)
                    suspects[rows] = chosen
                if chosen is not None or label not in separations:
                    separations[label], votes[rows] = own, said

        linear = {label: _most_linear(linearity, label) for label in large}
        ask(linear)
        # One pattern leads to several classes: to most, and what answers to it is linear for none, ...
        ask(dict.fromkeys(large, self._common(groups, enough)))
        # ... or to one that has channels still more linear, ...
        left = [label for label in large if linear[label] and label not in classes]
        ask(self._standing_out(activations, predicted, groups, left))
        # ... or to some, and in one of them something else is more linear.
        ask(dict.fromkeys(large, _most_excited(activations, predicted, suspects)))
        ranked = [sorted(own.values()) for own in separations.values() if len(own) >= enough]
        clearest = max((own[-enough] for own in ranked), default=0.0)
        return Analysis({}, suspects, clearest, bool(classes), tuple(sorted(classes)), separations, votes)

    def _common(self, groups: Mapping[int, dict[str, Groups]], enough: int) -> dict[str, int]:
        """By layer, the channel that has most classes furthest apart; none where fewer than ``enough`` layers
        have one that has them clearly apart, and for a single class."""
        channels, typical = {}, []
        if len(groups) > 1:
            for path in next(iter(groups.values())):
                each = torch.stack([layers[path][2] for layers in groups.values()])
                best = each.median(0).values.max(0)
                channels[path] = int(best.indices)
                typical.append(float(best.values))
        return channels if self._agree(typical, enough, COMMON * self.excess) else {}

    def _standing_out(
        self,
        activations: dict[str, Tensor],
        predicted: Tensor,
        groups: Mapping[int, dict[str, Groups]],
        classes: Iterable[int],
    ) -> dict[int, dict[str, int]]:
        """That of ``classes`` of which most layers tell the same images apart, and by which channels; none
        where another has nearly as much of it."""
        ranked = []
        for label in classes:
            mine = {path: values[predicted == label] for path, values in activations.items()}
            ranked.append((*_in_unison(mine, groups[label], self.layer_separation), label))
        ranked.sort(key=lambda each: each[0], reverse=True)
        if len(ranked) < 2:
            return {}
        (apart, channels, label), (second, *_) = ranked[:2]
        stands_out = apart > STANDS_OUT * second and 2 * len(channels) > len(activations)
        return {label: channels} if stands_out else {}

    def _agree(self, separations: Iterable[float], enough: int, excess: float) -> bool:
        """Whether ``enough`` layers have a say, and lie so far above what it takes in sum."""
        agreeing = [each for each in separations if each >= self.layer_separation]
        return len(agreeing) >= enough and sum(agreeing) >= len(agreeing) * self.layer_separation + excess

    def _look(
        self,
        activations: dict[str, Tensor],
        rows: Tensor,
        groups: dict[str, Groups],
        channels: dict[str, int],
        enough: int,
    ) -> tuple[dict[str, float], Tensor, Tensor | None]:
        """At a class's images ``rows`` (N,) by a channel of each layer: how far apart each has them, how many
        have a say and the image in their upper group, and, where ``enough`` agree, which are suspects."""
        own, votes = {}, torch.zeros(int(rows.sum()))
        for path, channel in channels.items():
            at, _, separation = (each[channel] for each in groups[path])
            own[path] = float(separation)
            if own[path] >= self.layer_separation:
                votes += activations[path][rows, channel].double() > at
        agreeing = sum(each >= self.layer_separation for each in own.values())
        chosen = votes >= max(enough, agreeing / 2)
        return own, votes, chosen if self._agree(own.values(), enough, self.excess) else None

    def _paper(self, activations: dict[str, Tensor]) -> Analysis:
        suspects, best = torch.zeros(len(next(iter(activations.values()))), dtype=torch.bool), 0.0
        compromised = _positive(activations, self.theta)
        for path, linear in compromised.items():
            for channel in linear.tolist():
                own = activations[path][:, channel]
                split = two_groups(own)
                if split.separation < self.separation:
                    continue
                best = max(best, split.separation)
                lower = own[own <= split.at]
                apart = (own - lower.mean()).abs() >= self.deviations * lower.std().clamp_min(1e-12)
                suspects |= (own > split.at) & apart
        return Analysis(compromised, suspects, best, best >= self.separation)

    def reset(self, model: Classifier, image: Tensor, compromised: dict[str, Tensor]) -> None:
        """Zero the ``compromised`` channels of ``model`` itself, or draw them anew in mode paper.

        ``image`` is any float (1, C, H, W): it only shows which norm follows which layer.
        """
        layers, norms = weighted_layers(model, image), norms_after(model, image)
        random = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for path, channels in compromised.items():
                where = channels.to(model.device)
                layer, norm = layers[path], norms.get(path)
                if self.mode == "released":
                    layer.weight[where] = 0
                    if norm is not None and norm.weight is not None:
                        norm.weight[where], norm.bias[where] = 0, 0
                else:
                    layer.weight[where] = _drawn(layer, len(channels), random).to(layer.weight)
                    if norm is not None and norm.weight is not None:
                        norm.weight[where], norm.bias[where] = 1, 0
                if layer.bias is not None:
                    layer.bias[where] = 0


def _most_linear(linearity: dict[str, Tensor], label: int) -> dict[str, int]:
    """By layer, the channel with the largest score for a class, where it has one above 0."""
    return {
        path: int(scores[label].argmax())
        for path, scores in linearity.items()
        if float(scores[label].max()) > 0
    }


def _in_unison(
    activations: dict[str, Tensor], groups: dict[str, Groups], separation: float
) -> tuple[float, dict[str, int]]:
    """The set of a class's images that its layers have furthest apart from the rest, by more than
    ``separation``: by how much, summed over layers of which none counts for more than 1, and by which of
    their channels. ``activations`` are the class's, ``groups`` what becomes of them."""
    paths, channels, members, excess = [], [], [], []
    for path, values in activations.items():
        at, _, apart = groups[path]
        those = (apart >= separation).nonzero().flatten()
        if len(those):
            paths.append(path)
            channels.append(those)
            members.append((values[:, those] > at[those]).float())
            excess.append((apart[those] - separation).clamp_max(1))
    if not paths:
        return 0.0, {}
    member = torch.cat(members, 1)
    sizes = member.sum(0)
    alike = 2 * (member.T @ member) >= ALIKE * (sizes[:, None] + sizes)
    # For each channel's images, what each layer has of them: -1 where none of its channels has.
    best = [
        far.where(same, -1).max(1)
        for far, same in zip(excess, alike.split([len(each) for each in channels], 1), strict=True)
    ]
    sums = torch.stack([each.values.clamp_min(0) for each in best]).sum(0)
    foremost = int(sums.argmax())
    return float(sums[foremost]), {
        path: int(those[each.indices[foremost]])
        for path, those, each in zip(paths, channels, best, strict=True)
        if float(each.values[foremost]) >= 0
    }


def _most_excited(activations: dict[str, Tensor], predicted: Tensor, suspects: Tensor) -> dict[str, int]:
    """By layer, the channel that answers most to suspects, in units of its standard deviation."""
    found = {}
    for path, values in activations.items():
        excess = excess_by_class(values, predicted, suspects)
        if len(excess):
            found[path] = int((excess.mean(0) / values.std(0).clamp_min(1e-12)).argmax())
    return found


def _positive(activations: dict[str, Tensor], theta: float) -> dict[str, Tensor]:
    """By layer, the channels whose output is positive for the share ``theta`` of all images, where any is."""
    found = {}
    for path, values in activations.items():
        channels = ((values >= 0).double().mean(0) >= theta).nonzero().flatten()
        if len(channels):
            found[path] = channels
    return found


def _notes(analysis: Analysis, kept_whole: list[str]) -> list[str]:
    """What a reader might else take for a fault, in words."""
    notes = []
    if not analysis.compromised:
        notes.append("no neuron is compromised: no class is predicted with confidence, or none excites one")
    elif not analysis.apart:
        notes.append("the images do not fall into two groups: none was dropped")
    if kept_whole:
        notes.append(f"all images of {', '.join(kept_whole[:5])} look like poison: none of them was dropped")
    return notes


def _drawn(layer: nn.Conv2d | nn.Linear, count: int, random: torch.Generator) -> Tensor:
    """He-normal filters for ``count`` channels."""
    shape = layer.weight.shape[1:]
    return torch.randn(count, *shape, generator=random) * math.sqrt(2 / math.prod(shape))
