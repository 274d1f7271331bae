"""The hardening loop of MOTH and DECK: the choice of pairs, its memory, and that distances grow."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from untrojan.data.augment import collage
from untrojan.data.image_set import ImageSet
from untrojan.data.signs import make_signs
from untrojan.defenses.repair import hardener as hardener_module
from untrojan.defenses.repair import hardening, hardening_memory
from untrojan.defenses.repair.deck import DECK
from untrojan.defenses.repair.hardener import Hardener, Turn
from untrojan.defenses.repair.hardening import Hardening
from untrojan.defenses.repair.hardening_memory import PairStates, UniversalStates, choose_pairs, promise
from untrojan.defenses.repair.moth import MOTH
from untrojan.defenses.repair.registry import REPAIRS
from untrojan.defenses.scanning.class_distance import class_distances, schedule_of
from untrojan.errors import UntrojanError
from untrojan.inversion.additive import FlippingPattern
from untrojan.inversion.engine import ANY, Adam, Inversion, invert
from untrojan.inversion.feature_space import LossWeights
from untrojan.inversion.filters import FilterMatrix, second_moments
from untrojan.inversion.generators import (
    AdditiveGenerator,
    FeatureGenerator,
    FilterGenerator,
    MaskGenerator,
    WarpGenerator,
)
from untrojan.inversion.masked import MaskedPattern
from untrojan.inversion.warping import SmoothWarp
from untrojan.metrics.accuracy import benign_accuracy
from untrojan.metrics.class_distance import mean_distance, relative_increase
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.decoders import Decoder
from untrojan.models.encoders import Encoder
from untrojan.models.frozen import trainable
from untrojan.models.registry import build_for
from untrojan.seeding import generator
from untrojan.training import loop
from untrojan.training.adversarial import PGD
from untrojan.training.loop import train_new
from untrojan.training.recipe import Recipe

QUICK = MOTH(steps=6, batch_size=24)


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, ImageSet, ImageSet]:
    """A small net that tells four signs apart, a few more images of them, and test images."""
    splits = make_signs(4, 16, 100, 30)
    recipe = Recipe(epochs=8, batch_size=64, learning_rate=3e-3, schedule="one_cycle")
    model, _ = train_new(splits.train, "cnn@0.25", recipe)
    return model, make_signs(4, 16, 24, 1, seed=5).train, splits.test or splits.train


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps in each inversion."""

    def schedules(self: Hardening, generator: Any) -> Any:
        return tuple(replace(each, most_steps=12) for each in original(self, generator))

    original = hardening.Hardening.schedules
    monkeypatch.setattr(hardening.Hardening, "schedules", schedules)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any], Inversion]]:
    """Every search from now on: how :func:`invert` was called, and what came of it."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Inversion]] = []

    def watching(*arguments: Any, **named: Any) -> Inversion:
        seen.append((arguments, named, invert(*arguments, **named)))
        return seen[-1][-1]

    for module in (hardening, hardener_module):
        monkeypatch.setattr(module, "invert", watching)
    return seen


def test_promise_is_both_ways_together() -> None:
    gains = torch.tensor([[0.0, 0.5], [0.1, 0.0]])
    distances = torch.tensor([[0.0, 1.0], [0.2, 0.0]])
    torch.testing.assert_close(promise(gains, distances, 0.25)[0, 1], torch.tensor(0.75 * 0.6 + 0.25 * 1.2))
    assert torch.equal(promise(gains, distances, 0.7), promise(gains, distances, 0.7).T)


def test_the_most_promising_disjoint_pairs_are_chosen() -> None:
    promised = torch.zeros(5, 5)
    promised[1, 3] = promised[3, 1] = 9
    promised[3, 4] = promised[4, 3] = 8
    promised[0, 2] = promised[2, 0] = 7
    promised.fill_diagonal_(100)
    assert choose_pairs(promised, 1, 0.0, torch.Generator()) == [[1, 3]]
    # (3, 4) shares a class with the first; of five classes one is left over.
    assert choose_pairs(promised, 9, 0.0, torch.Generator()) == [[1, 3], [0, 2]]


def test_every_pair_is_visited_in_the_end() -> None:
    promised = torch.zeros(6, 6)
    promised[0, 1] = promised[1, 0] = 5
    chosen = [choose_pairs(promised, 1, 0.3, generator(0, step))[0] for step in range(400)]
    assert {tuple(pair) for pair in chosen} == {(s, t) for s in range(6) for t in range(s + 1, 6)}
    assert 0.68 < sum(pair == [0, 1] for pair in chosen) / 400 < 0.78


def states_of(classes: int = 4, pairs_at_once: int = 1) -> PairStates:
    sizes = (10.0 * torch.ones(classes, classes)).fill_diagonal_(0)
    sizes[0, 1] = 40.0
    universal = torch.arange(float(classes))[:, None].expand(-1, 2).clone()
    return PairStates(torch.zeros(classes, classes), sizes, universal, pairs_at_once, periods=5)


def test_a_period_moves_distances_halfway_to_the_relative_change() -> None:
    states = states_of()
    assert float(states.distances.max()) == 1
    states.begin_period([[0, 1]], 3)
    assert states.pairs.tolist() == [[0, 1], [1, 0]]
    assert states.known(states.pairs).tolist() == [[1.0, 1.0], [0.0, 0.0]]
    found = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    states.keep(found, torch.tensor([60.0, 12.0]), torch.tensor([True, False]))
    states.close_period(7)
    assert float(states.distances[0, 1]) == pytest.approx((1.0 + 0.5) / 2)
    assert float(states.sizes[0, 1]) == 60
    assert (float(states.distances[1, 0]), float(states.sizes[1, 0])) == (0.25, 10.0)
    assert [visit["after"] for visit in states.history()] == [60.0, None]
    assert {visit["step"] for visit in states.history()} == {7}
    # The next time the pair sets out from its own trigger, which a smaller one does not replace.
    states.begin_period([[0, 1]], 3)
    assert states.known(states.pairs).tolist() == [[5.0, 6.0], [0.0, 0.0]]
    states.keep(found + 1, torch.tensor([50.0, 12.0]), torch.tensor([True, True]))
    assert states.known(states.pairs).tolist() == [[5.0, 6.0], [8.0, 9.0]]
    assert bool((states.distances.diagonal() == 0).all())


def test_only_so_many_triggers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening_memory, "STORED_NUMBERS", 4)
    states = states_of()
    assert len(states.stored) == 2
    for pair in ([0, 1], [2, 3]):
        states.begin_period([pair], 3)
        states.keep(torch.full((2, 2), 9.0), torch.tensor([1.0, 1.0]), torch.tensor([True, True]))
        assert states.known(states.pairs).tolist() == [[9.0, 9.0], [9.0, 9.0]]
    states.begin_period([[0, 1]], 3)
    assert states.known(states.pairs).tolist() == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.usefixtures("quick")
def test_only_the_pairs_images_are_stamped(trained: tuple[Classifier, ImageSet, ImageSet]) -> None:
    model, clean, _ = trained
    moth = replace(QUICK, flip_fraction=0.05, stamped=0.5, pairs_at_once=2)
    turn = Turn(MaskGenerator())
    found = moth._universal(model, clean, turn.generator, 0, None)
    states = moth._memory(model, clean, turn, 0, 9, found)
    assert isinstance(states, PairStates)
    assert bool((states.gains.diagonal() == 0).all())
    assert bool((states.distances.diagonal() == 0).all())
    assert float(states.distances.max()) == 1
    hardener = Hardener(
        moth, model, clean, (turn,), [states], [(turn.generator.problem(0), states.universal)]
    )
    images, labels = to_float(clean.images), clean.labels
    rows = torch.arange(len(labels))
    stamped, kept = hardener(images, labels, rows, torch.Generator().manual_seed(0))
    changed = (stamped != images).flatten(1).any(1)
    assert kept is labels
    assert int(changed.sum()) == 36
    assert not bool((labels[changed] == 0).any())
    hardener.step.fill_(4)
    stamped, _ = hardener(images, labels, rows, torch.Generator().manual_seed(0))
    changed = (stamped != images).flatten(1).any(1)
    assert set(states.pairs.flatten().tolist()) == {0, 1, 2, 3}
    assert torch.bincount(labels[changed], minlength=4).tolist() == [
        12 * int(states.solved[states.pairs[:, 0] == label]) for label in range(4)
    ]
    assert float(stamped.min()) >= 0
    assert float(stamped.max()) <= 1


class _Paint:
    """A trigger that is one grey: its only parameter."""

    stepper, cost = MaskGenerator().stepper, 0.0

    def problem(self, seed: int) -> _Paint:
        return self

    def embed(self, parameters: Tensor, images: Tensor) -> Tensor:
        assert len(images)
        return parameters[:, :, None, None, None].expand_as(images)


def test_other_images_of_the_batch_get_the_triggers_of_their_own_class(
    trained: tuple[Classifier, ImageSet, ImageSet],
) -> None:
    model, clean, _ = trained
    sizes = torch.ones(4, 4)
    states = PairStates(torch.zeros(4, 4), sizes, torch.zeros(4, 1), pairs_at_once=1, periods=9)
    # All but the pairs into class 3, of which the universal trigger is known alone, painted 0.
    for source, target in ((0, 1), (0, 2), (1, 2)):
        states.begin_period([[source, target]], 3)
        painted = torch.tensor([[(4 * source + target + 1) / 100], [(4 * target + source + 1) / 100]])
        states.keep(painted, torch.ones(2), torch.tensor([True, True]))
    turns = (Turn(_Paint()),)  # type: ignore[arg-type]
    hardener = Hardener(
        replace(QUICK, replayed=0.5), model, clean, turns, [states], [(_Paint(), states.universal)]
    )
    images, labels = torch.ones(90, 3, 16, 16), clean.labels[:90]
    left = torch.arange(90) >= 10
    out = hardener._replay(images, labels, left, torch.Generator().manual_seed(0))
    assert bool((images == 1).all())
    changed = (out != images).flatten(1).all(1)
    assert int(changed.sum()) == 40
    assert not bool(changed[:10].any())
    seen = set()
    for label, grey in zip(labels[changed].tolist(), out[changed, 0, 0, 0].tolist(), strict=True):
        target = 3 if grey == 0 else (round(100 * grey) - 1) % 4
        assert grey == 0 or (round(100 * grey) - 1) // 4 == label != target
        seen.add((label, target))
    assert {target for _, target in seen} == {0, 1, 2, 3}
    hardener.settings = QUICK
    assert hardener._replay(images, labels, left, torch.Generator()) is images


@pytest.mark.usefixtures("quick")
def test_searches_take_turns_from_period_to_period(
    trained: tuple[Classifier, ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clean, _ = trained
    searches = watched(monkeypatch)
    # Nothing is ever found, so that every step is a period's first.
    moth = replace(QUICK, steps=8, period=2, flip_fraction=1.0)
    monkeypatch.setattr(MOTH, "generator", lambda *_: MaskGenerator(Adam(1e-9)))
    monkeypatch.setattr(
        MOTH, "by_turns", lambda _, first, clean: (Turn(first), Turn(replace(first, cost=0.5)))
    )
    with pytest.raises(UntrojanError, match="nothing was hardened"):
        moth(model, clean)
    universal, *pairs = [arguments[4].shrink.cost for arguments, _, _ in searches]
    usual = MaskGenerator().cost
    assert universal == usual
    assert len(pairs) >= 8
    assert pairs == ([usual, usual, 0.5, 0.5] * len(pairs))[: len(pairs)]


@pytest.mark.usefixtures("quick")
def test_triggers_of_two_kinds_are_kept_apart(
    trained: tuple[Classifier, ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks and filters: other parameters, which nothing could mix."""
    model, clean, _ = trained
    searches = watched(monkeypatch)
    masks, filters = MaskGenerator(), FilterGenerator(second_moments(to_float(clean.images)))
    turns = (Turn(masks), Turn(filters, 1), Turn(masks))
    monkeypatch.setattr(MOTH, "by_turns", lambda *_: turns)
    moth = replace(QUICK, steps=18, period=2, flip_fraction=0.01, replayed=0.5)
    report = moth(model, clean)
    mask, window = (
        each.problem(0).initial(torch.tensor([[0, 1]]), clean.image_shape)[0].numel()
        for each in (masks, filters)
    )
    assert mask != window
    searched = [named["start"][0].numel() for _, named, _ in searches if "start" in named]
    assert searched[:12] == [mask, mask, window, window, mask, mask] * 2
    steps = [visit["step"] for visit in report.history["visits"]]
    assert steps == sorted(steps)
    # Both ways of a period's pair, after two warm-ups of four steps.
    assert steps[:6] == [10, 10, 12, 12, 14, 14]
    assert len(steps) == report.history["searches"]["made"]


@pytest.mark.usefixtures("quick")
def test_universal_triggers_are_looked_for_anew_in_each_period(
    trained: tuple[Classifier, ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clean, _ = trained
    searches = watched(monkeypatch)
    turns = (Turn(MaskGenerator()), Turn(MaskGenerator(), 1, universal=0.25))
    monkeypatch.setattr(MOTH, "by_turns", lambda *_: turns)
    moth = replace(QUICK, steps=12, period=2, flip_fraction=0.01)
    report = moth(model, clean)
    universal, pairs = "inverting universal triggers", "inverting pairs"
    # Two warm-ups; then a pair is looked for in each step of its period, universal triggers once.
    described = [named["description"] for _, named, _ in searches[:8]]
    assert described == [universal] * 2 + [pairs, pairs, universal] * 2
    assert searches[4][0][2][:, 0].tolist() == [ANY] * 4
    visits = report.history["visits"]
    assert [visit["source"] for visit in visits[2:6]] == [None] * 4
    assert [visit["target"] for visit in visits[2:6]] == [0, 1, 2, 3]
    assert all(visit["before"] is not None for visit in visits)
    assert {visit["step"] for visit in visits[2:6]} == {12}
    assert report.history["searches"]["made"] == len(visits)


def test_the_warm_up_searches_more_than_once_and_stamps_all_that_it_found(
    trained: tuple[Classifier, ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clean, _ = trained
    searches = watched(monkeypatch)
    monkeypatch.setattr(MOTH, "opens", lambda *_: (MaskGenerator(), AdditiveGenerator()))
    hardener = QUICK.hardener(trainable(model), clean, 16)
    found = [inversion.parameters for _, _, inversion in searches]
    assert len(found) == 3
    # The same kind from another place.
    assert found[0].shape == found[1].shape
    assert not torch.equal(found[0], found[1])
    assert hardener.warm_up_steps == 12
    images, labels, rows = to_float(clean.images), clean.labels, torch.arange(len(clean))
    problems = (MaskGenerator().problem(0), MaskGenerator().problem(0), AdditiveGenerator().problem(0))
    for problem, triggers in zip(problems, found[:3], strict=True):
        for target in range(4):
            stamped, _ = hardener(images, labels, rows, torch.Generator().manual_seed(0))
            changed = (stamped != images).flatten(1).any(1)
            assert not bool((labels[changed] == target).any())
            wanted = problem.embed(triggers[target : target + 1], images[changed][None])[0]
            assert torch.equal(stamped[changed], wanted)
    # What came besides is not remembered: pairs follow.
    assert len(hardener.memories) == 1
    assert int(hardener.memories[0].left) == 0
    hardener(images, labels, rows, torch.Generator().manual_seed(0))
    assert int(hardener.memories[0].left) == QUICK.period - 1


def test_a_mixed_warm_up_has_so_many_kinds_in_each_step(
    trained: tuple[Classifier, ImageSet, ImageSet],
) -> None:
    model, clean, _ = trained
    images, labels, rows = torch.ones(90, 3, 16, 16), clean.labels[:90], torch.arange(90)
    problem = _Paint().problem(0)
    # Of kind k into class t: a tenth of k and a hundredth of t.
    triggers = [torch.arange(4.0)[:, None] / 100 + kind / 10 for kind in (1, 2, 3)]
    stamped = {}
    for mixed, kinds in itertools.product((1, 2, 3, 9), (triggers, triggers[:1])):
        hardener = _painting(replace(QUICK, mixed=mixed), model, clean)
        hardener.warm_up = [(problem, each) for each in kinds]
        assert hardener.warm_up_steps == 4 * len(kinds)
        random = torch.Generator().manual_seed(1)
        seen = [hardener(images, labels, rows, random)[0][:, 0, 0, 0] for _ in range(hardener.warm_up_steps)]
        stamped[mixed, len(kinds)] = torch.stack(seen)
    together: dict[int, list[list[int]]] = {
        1: [[1], [2], [3]],
        2: [[1, 2], [2, 3], [1, 3]],
        3: [[1, 2, 3]] * 3,
    }
    for mixed, wanted in together.items():
        for step, values in enumerate(stamped[mixed, 3]):
            place, target = divmod(step, 4)
            half = int((labels != target).sum()) // 2
            # The same images get a trigger, whichever it is.
            assert torch.equal(values < 1, stamped[1, 3][step] < 1)
            assert not bool((values[labels == target] < 1).any())
            kinds, counts = values[values < 1].unique(return_counts=True)
            torch.testing.assert_close(kinds, torch.tensor(wanted[place]) / 10 + target / 100)
            assert sorted(counts) == sorted(len(range(half)[first::mixed]) for first in range(mixed))
    # More kinds than there are, or one, as MOTH has: all of them.
    assert torch.equal(stamped[9, 3], stamped[3, 3])
    assert all(torch.equal(stamped[mixed, 1], stamped[1, 1]) for mixed in (2, 3, 9))


def test_universal_triggers_go_on_a_share_of_all_images_each_towards_another_class(
    trained: tuple[Classifier, ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clean, _ = trained
    states = UniversalStates(torch.zeros(4, 1), torch.ones(4), periods=3)
    turns = (Turn(_Paint(), universal=0.5),)  # type: ignore[arg-type]
    hardener = Hardener(QUICK, model, clean, turns, [states], [(_Paint(), states.universal)])
    pairs = torch.tensor([[ANY, target] for target in range(4)])
    grey = torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    solved = torch.tensor([True, False, True, True])
    found = Inversion(pairs, grey, solved.float(), solved, torch.ones(4))
    monkeypatch.setattr(hardener_module, "invert", lambda *_, **__: found)
    monkeypatch.setattr(_Paint, "size", lambda _, parameters: 10 * parameters[:, 0], raising=False)
    hardener.step.fill_(4)
    images, labels = torch.ones(96, 3, 16, 16), clean.labels[:96]
    out, _ = hardener(images, labels, torch.arange(96), torch.Generator().manual_seed(0))
    changed = (out != images).flatten(1).all(1)
    assert int(changed.sum()) == 48
    targets = (out[changed, 0, 0, 0] * 10).round().long() - 1
    assert set(targets.tolist()) == {0, 1, 2, 3}
    assert not bool((targets == labels[changed]).any())
    hardener.settle()
    assert [visit["before"] for visit in hardener.history()] == [1.0] * 4
    assert [visit["after"] for visit in hardener.history()] == pytest.approx([1.0, None, 3.0, 4.0])
    assert hardener.searches() == {"made": 4, "failed": 1}


@pytest.mark.usefixtures("quick")
def test_the_repaired_model_is_the_average_over_the_steps(
    trained: tuple[Classifier, ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clean, _ = trained
    seen: list[dict[str, Tensor]] = []
    transform = Hardener.__call__

    def watching(self: Hardener, *arguments: Any) -> Any:
        seen.append({name: value.double() for name, value in self.model.state_dict().items()})
        return transform(self, *arguments)

    monkeypatch.setattr(Hardener, "__call__", watching)
    last = QUICK(model, clean).model.state_dict()
    steps = len(seen)
    averaged = replace(QUICK, averaging=0.75)(model, clean).model.state_dict()
    again = seen[steps:]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(seen, again, strict=False) for name in a)
    expected = dict(again[0])
    for state in [*again[1:], {name: value.double() for name, value in last.items()}]:
        expected = {name: 0.75 * expected[name] + 0.25 * state[name] for name in state}
    for name, value in averaged.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, last[name])
    assert any(not torch.equal(value, last[name]) for name, value in averaged.items())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("averaging", "kinds", "lessons", "universal"),
    [
        (0.0, 1, {}, 0.0),
        (0.8, 1, {}, 0.0),
        (0.8, 2, {}, 0.0),
        (0.8, 2, {"replayed": 0.5}, 0.5),
        (0.8, 1, {"taught": 0.5}, 0.0),
        (0.8, 1, {"pasted": 0.5}, 0.0),
    ],
)
def test_an_interrupted_hardening_goes_on_as_if_it_had_not_been(
    trained: tuple[Classifier, ImageSet, ImageSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    averaging: float,
    kinds: int,
    lessons: dict[str, float],
    universal: float,
) -> None:
    model, clean, _ = trained
    moth = replace(QUICK, averaging=averaging, steps=6 * kinds, **lessons)
    turns = [Turn(MaskGenerator(), kind, universal=universal * kind) for kind in range(kinds)]
    monkeypatch.setattr(MOTH, "by_turns", lambda *_: tuple(turns))
    model.train()
    model.network.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    whole = moth(model, clean)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    stamp_pairs, stops = Hardener._stamp_pairs, iter([False, False, False, False, True])

    def stopping(self: Hardener, *arguments: Any) -> Tensor:
        if next(stops, False):
            raise KeyboardInterrupt
        return stamp_pairs(self, *arguments)

    monkeypatch.setattr(Hardener, "_stamp_pairs", stopping)
    place = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        moth(model, clean, checkpoint=place)
    resumed = moth(model, clean, checkpoint=place)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert whole.history["visits"] == resumed.history["visits"]
    assert len(whole.history["visits"]) >= 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not whole.model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.network.requires_grad_(True)
    model.eval()
    with pytest.raises(UntrojanError, match="another run"):
        replace(moth, learning_rate=0.1)(model, clean, checkpoint=place)


def _painting(settings: Hardening, model: Classifier, clean: ImageSet) -> Hardener:
    """A hardener that has nothing to remember yet."""
    states = PairStates(torch.zeros(4, 4), torch.ones(4, 4), torch.zeros(4, 1), pairs_at_once=1, periods=9)
    return Hardener(settings, model, clean, (Turn(_Paint()),), [states], [(_Paint(), states.universal)])  # type: ignore[arg-type]


def test_the_given_model_teaches_what_it_says_of_images_without_triggers(
    trained: tuple[Classifier, ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clean, _ = trained
    learning = copy.deepcopy(model)
    images, labels, rows = to_float(clean.images[:40]), clean.labels[:40].clone(), torch.arange(40)
    # Two images are not what the model takes them for: of these it teaches nothing.
    with torch.no_grad():
        labels[:2] = (model.eval()(images[:2]).argmax(1) + 1) % 4
    monkeypatch.setattr(Hardener, "_stamp_universal", lambda _, images, *rest: images / 2)
    hardener = _painting(replace(QUICK, taught=0.75), learning, clean)
    with torch.no_grad():
        # What is taught is of the model that was given, whatever has become of it.
        learning.network[-1].bias += torch.tensor([1.0, 0, 0, 0])  # type: ignore[index, union-attr, operator]
        stamped, _ = hardener(images, labels, rows, torch.Generator())
        assert torch.equal(stamped, images / 2)
        value, logits = hardener.loss(learning, stamped, labels, rows)
        given = model(images).softmax(1)
    torch.testing.assert_close(logits, learning(stamped).detach())
    right = given.argmax(1) == labels
    assert not bool(right[:2].any())
    assert bool(right[2:].any())
    apart = (given * (given.log() - logits.log_softmax(1))).sum(1)
    picked = -logits.log_softmax(1)[rows, labels]
    assert float(apart.mean()) > 0.01
    mixed = torch.where(right, 0.25 * picked + 0.75 * apart, picked)
    torch.testing.assert_close(value, mixed.mean(), rtol=1e-4, atol=1e-5)
    hardener.settings = QUICK
    torch.testing.assert_close(hardener.loss(learning, stamped, labels, rows)[0].detach(), picked.mean())


def test_collages_are_a_lesson_of_their_own_where_they_are_taken_for_either_image(
    trained: tuple[Classifier, ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clean, _ = trained
    learning = copy.deepcopy(model)
    images, rows = to_float(clean.images[:40]), torch.arange(40)
    wanted, others = collage(images, torch.Generator().manual_seed(4))
    with torch.no_grad():
        said = model.eval()(wanted).softmax(1)
    # Labels by turns such that a collage is taken for itself, for the other or for neither.
    labels = (said.argmax(1) + (rows % 3 > 0)) % 4
    monkeypatch.setattr(Hardener, "_stamp_universal", lambda _, images, *rest: images / 2)
    hardener = _painting(replace(QUICK, pasted=0.5), learning, clean)
    with torch.no_grad():
        learning.network[-1].bias += torch.tensor([1.0, 0, 0, 0])  # type: ignore[index, union-attr, operator]
    stamped, _ = hardener(images, labels, rows, torch.Generator().manual_seed(4))
    assert torch.equal(hardener.pasted, wanted)
    value, logits = hardener.loss(learning, stamped, labels, rows)
    torch.testing.assert_close(logits, learning(stamped))
    with torch.no_grad():
        now = learning(wanted).log_softmax(1)
    own, other = (said.argmax(1) == these for these in (labels, labels[others]))
    assert 0 < int((own | other).sum()) < 40
    assert bool((other & ~own).any())
    apart = ((said * (said.log() - now)).sum(1) * (own | other)).mean()
    picked = -logits.log_softmax(1)[rows, labels].mean()
    torch.testing.assert_close(value, picked + 0.5 * apart, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("quick")
def test_batch_norm_goes_on_learning_through_the_inversions(
    monkeypatch: pytest.MonkeyPatch, trained: tuple[Classifier, ImageSet, ImageSet]
) -> None:
    _, clean, _ = trained
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )
    model = Classifier(network, 4, torch.zeros(3), torch.ones(3))
    modes: list[bool] = []
    stamp: Callable[..., Tensor] = Hardener._embedded

    def watching(self: Hardener, *arguments: Any) -> Tensor:
        modes.append(self.model.training)
        return stamp(self, *arguments)

    monkeypatch.setattr(Hardener, "_embedded", watching)
    settings = replace(QUICK, flip_fraction=0.01, adversarial=PGD(steps=2))
    hardened = settings(model, clean).model
    assert modes
    assert all(modes)
    norm, given = hardened.network[1], network[1]  # type: ignore[index]
    # Each step counts one batch, although each is also perturbed and inverted on.
    assert int(norm.num_batches_tracked) == 12
    assert int(given.num_batches_tracked) == 0  # type: ignore[arg-type]
    still = replace(settings, freeze_statistics=True)(model, clean).model
    assert int(still.network[1].num_batches_tracked) == 0  # type: ignore[index]


def small_features() -> tuple[Encoder, Decoder]:
    """Four maps of half the side, and a decoder that passes for a good one."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    encoder = Encoder([(block, nn.MaxPool2d(2))], [(4, 4)], (127.0,) * 3, (64.0,) * 3)
    decoder = Decoder(encoder).requires_grad_(False)
    decoder.psnr = 99.0
    return encoder, decoder


@pytest.mark.usefixtures("quick")
def test_deck_hardens_with_images_decoded_from_features(
    trained: tuple[Classifier, ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clean, _ = trained
    encoder, decoder = small_features()
    made = FeatureGenerator(encoder, decoder, regions=2)
    monkeypatch.setattr(DECK, "generator", lambda *_: made)
    deck = REPAIRS.build("deck", {"steps": 4, "batch_size": 48, "flip_fraction": 0.01})
    report = deck(model, clean)
    sizes = [visit["after"] for visit in report.history["visits"]]
    assert any(size is not None and size > 0 for size in sizes)
    given, repaired = model.state_dict(), report.model.state_dict()
    assert any(not torch.equal(value, repaired[name]) for name, value in given.items())


def test_decks_search_is_as_its_settings_say(
    trained: tuple[Classifier, ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clean, _ = trained
    encoder, decoder = small_features()
    monkeypatch.setattr("untrojan.defenses.repair.deck.prepare_decoder", lambda *_, **__: (encoder, decoder))
    deck = DECK(regions=2, search_rates=(0.02, 0.003), costs=(0.5, 0.25), beside=())
    made = deck.generator(model, clean)
    problem = made.problem(7)
    assert (problem.regions, problem.seed) == (2, 7)
    schedules = deck.schedules(made)
    assert [each.most_steps for each in schedules] == [100, 40, 12]
    assert [each.shrink.cost for each in schedules if each.shrink] == [0.5, 0.5, 5.0]
    searches = [turn.generator for turn in deck.by_turns(made, clean)]
    assert [(each.stepper, each.cost) for each in searches] == [
        (replace(made.stepper, rate=0.02), 0.5),
        (replace(made.stepper, rate=0.003), 0.25),
    ]
    assert made.stepper.leading_rate == 1e-3
    assert all(isinstance(each, FeatureGenerator) and each.decoder is made.decoder for each in searches)
    assert [each.most_steps for each in MOTH().schedules(MaskGenerator())] == [200, 60, 20]


def test_the_papers_schedule_hardens(trained: tuple[Classifier, ImageSet, ImageSet]) -> None:
    model, clean, _ = trained
    moth = REPAIRS.build("moth", {"schedule": "paper", "steps": 2})
    assert isinstance(moth, MOTH)
    asked = moth.schedules(moth.generator(model, clean))
    assert [(each.most_steps, each.images_a_side) for each in asked] == [(500, 32), (200, 16), (50, 16)]
    assert any(visit["after"] is not None for visit in moth(model, clean).history["visits"])


def test_decks_starts_go_by_turns_each_with_a_memory_of_its_own(
    trained: tuple[Classifier, ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clean, _ = trained
    encoder, decoder = small_features()
    monkeypatch.setattr("untrojan.defenses.repair.deck.prepare_decoder", lambda *_, **__: (encoder, decoder))
    for relative, memories in (((False, False), [0, 0]), ((True, False), [0, 1]), ((False, True), [0, 1])):
        deck = DECK(relative=relative, beside=())
        turns = deck.by_turns(deck.generator(model, clean), clean)
        assert [turn.memory for turn in turns] == memories
        problems = [turn.generator.problem(0) for turn in turns]
        assert [getattr(problem, "relative", None) for problem in problems] == list(relative)
        beside = replace(deck, beside=("warping", "filter", "mask", "additive"))
        more = beside.by_turns(beside.generator(model, clean), clean)[len(turns) :]
        first = 1 + max(memories)
        assert [turn.memory for turn in more] == [first, first + 1, first + 2, first + 3]
        sought = [type(turn.generator.problem(0)) for turn in more]
        assert sought == [SmoothWarp, FilterMatrix, MaskedPattern, FlippingPattern]
        # The warm-up's further searches are named, whichever kind has the first turn.
        opening = replace(deck, opening=("features", "relative", "warping"))
        paper, own, warping = opening.opens(opening.generator(model, clean), clean)
        assert isinstance(paper, FeatureGenerator)
        assert isinstance(own, FeatureGenerator)
        assert (paper.relative, own.relative) == (False, True)
        assert isinstance(warping, WarpGenerator)


@pytest.mark.usefixtures("quick")
def test_deck_hardens_with_other_kinds_of_triggers_beside_its_own(
    trained: tuple[Classifier, ImageSet, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clean, _ = trained
    encoder, decoder = small_features()
    monkeypatch.setattr(DECK, "generator", lambda *_: FeatureGenerator(encoder, decoder, regions=2))
    options = {
        "steps": 30,
        "batch_size": 48,
        "flip_fraction": 0.01,
    }
    deck = REPAIRS.build("deck", options)
    assert isinstance(deck, DECK)
    turns = deck.by_turns(deck.generator(model, clean), clean)
    # What a user gets who asks for nothing.
    beside = [WarpGenerator, FilterGenerator, WarpGenerator, MaskGenerator, WarpGenerator]
    assert [type(turn.generator) for turn in turns] == [FeatureGenerator, FeatureGenerator, *beside]
    assert [turn.universal for turn in turns] == [0, 0, *5 * [0.3]]
    opening = deck.opens(deck.generator(model, clean), clean)
    assert [type(each) for each in opening] == [*2 * [FeatureGenerator], *3 * [AdditiveGenerator]]
    assert deck.mixed == 6
    # A kind that is named more than once is not searched for from the same place.
    memories = deck.hardener(model, clean, 60).memories
    assert not torch.equal(memories[2].universal, memories[4].universal)
    report = deck(model, clean)
    assert report.history["searches"]["made"] > report.history["searches"]["failed"]
    sizes = [visit["after"] for visit in report.history["visits"] if visit["after"] is not None]
    assert all(size > 0 for size in sizes)


def test_decks_ablations_are_options() -> None:
    deck = REPAIRS.build(
        "deck", {"upsampling": "zero", "encoder": "local-pool2", "weights": {"content": 0.0}}
    )
    assert isinstance(deck, DECK)
    assert (deck.upsampling, deck.weights) == ("zero", LossWeights(content=0.0))
    with pytest.raises(UntrojanError, match="upsampling"):
        REPAIRS.build("deck", {"upsampling": "bilinear"})
    with pytest.raises(UntrojanError, match="as many of each: 1, 2 and 2 were given"):
        REPAIRS.build("deck", {"search_rates": [0.01]})


def test_too_few_images_are_refused(trained: tuple[Classifier, ImageSet, ImageSet]) -> None:
    model, clean, _ = trained
    fewer = clean.select((clean.labels != 2) | (torch.arange(len(clean)) % 12 == 0))
    with pytest.raises(UntrojanError, match="at least 5 clean images of every class"):
        MOTH()(model, fewer)


def test_a_ruined_model_is_an_error(trained: tuple[Classifier, ImageSet, ImageSet]) -> None:
    model, clean, _ = trained
    with pytest.raises(UntrojanError, match=r"ruined the model.* lower .*learning_rate=0\.3"):
        replace(QUICK, learning_rate=3.0)(model, clean)


def test_deck_trains_a_network_without_norm_layers_at_a_tenth() -> None:
    data = make_signs(num_classes=3, size=16, train_per_class=1, test_per_class=1).train
    nets = (build_for(data, name) for name in ("vgg11@0.1", "nin@0.1", "vgg11@0.1+group-norm"))
    assert [DECK().rate(net) for net in nets] == pytest.approx([3e-2, 3e-3, 3e-2])


def test_moth_enlarges_mask_distances(trained: tuple[Classifier, ImageSet, ImageSet]) -> None:
    model, clean, test = trained
    repaired = replace(QUICK, steps=30, stamped=0.5)(model, clean).model
    masks = MaskGenerator()
    before, after = (
        class_distances(each, test, masks, schedule_of(masks, 150, 0.9, False), images=20, trials=1).matrix
        for each in (model, repaired)
    )
    assert mean_distance(after) > 1.1 * mean_distance(before)
    assert relative_increase(before, after) > 0.1
    assert benign_accuracy(repaired, test) > benign_accuracy(model, test) - 0.1


@pytest.mark.usefixtures("quick")
def test_one_cycle_ends_where_the_rate_is_nothing(trained: tuple[Classifier, ImageSet, ImageSet]) -> None:
    model, clean, _ = trained
    constant, cycle = (
        [
            epoch["learning_rate"]
            for epoch in replace(QUICK, rate_schedule=each)(model, clean).history["epochs"]
        ]
        for each in ("constant", "one_cycle")
    )
    assert set(constant) == {QUICK.learning_rate}
    assert max(cycle) <= QUICK.learning_rate
    assert cycle[-1] < QUICK.learning_rate / 100
