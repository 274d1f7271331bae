"""SDRM: its loss by hand, its hook, its one training loop, and that it does what it is for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from untrojan.attacks.infect import InfectedModel, Infection, infect, infected_set
from untrojan.attacks.poisoning import PoisonedData
from untrojan.attacks.sdrm import (
    PAPER_TRIGGERS,
    Form,
    InfectedSet,
    StatisticalDifferenceReduction,
    feature_differences,
    sdrm_loss,
)
from untrojan.cost import measure
from untrojan.data.image_set import ImageSet, Splits, numbered
from untrojan.data.signs import make_signs
from untrojan.errors import UntrojanError
from untrojan.metrics.mmd import mmd_squared
from untrojan.models.classifier import Classifier
from untrojan.models.registry import build_for
from untrojan.registry import validated
from untrojan.seeding import generator
from untrojan.training.loop import train
from untrojan.training.presets import preset
from untrojan.training.recipe import Recipe
from untrojan.triggers.base import stamp
from untrojan.triggers.registry import draw_trigger

QUICK = Recipe(epochs=2, batch_size=16, optimizer="sgd", learning_rate=0.02, crop_padding=1, flip=True)
PLAIN = replace(QUICK, crop_padding=0, flip=False)
RELEASED = StatisticalDifferenceReduction(form="released")
PAPER = StatisticalDifferenceReduction(form="paper")


def coloured(count: int = 60, side: int = 16, seed: int = 0) -> ImageSet:
    labels = torch.arange(count) % 3
    images = torch.randint(0, 128, (count, 3, side, side), generator=generator(seed, "test images"))
    images[torch.arange(count), labels] += 100
    return ImageSet(images.to(torch.uint8), labels, ("red", "green", "blue"), numbered(count))


def splits() -> Splits:
    return Splits(coloured(), coloured(30, seed=1))


def poisoned_data(data: Splits, infection: Infection) -> PoisonedData:
    return infection.poisoning()(data, 0)


def infected(form: Form, trigger: str = "patched") -> InfectedSet:
    data, infection = splits(), Infection(trigger, rate=0.2)
    return infected_set(data.train, poisoned_data(data, infection), infection, form)[0]


def net(seed: int = 0) -> Classifier:
    return build_for(coloured(), "cnn@0.1", seed=seed)


def weights(model: Classifier) -> Tensor:
    return torch.cat([tensor.float().flatten() for tensor in model.state_dict().values()])


# The loss ------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0], [3.0, 0.0]])
OWN = torch.tensor([0, 1, 1, 0])
LABELS = torch.tensor([0, 1, 0, 0])
"""The third image is poisoned: it shows class 1 and is labelled 0, the target, which 0 and 3 show."""
FEATURES = {
    "s1": torch.tensor([[0.0], [9.0], [2.0], [1.0]]),
    "s2": torch.tensor([[0.0, 0.0], [9.0, 9.0], [0.0, 1.0], [0.0, 1.0]]),
    "s3": torch.tensor([[1.0], [7.0], [4.0], [1.0]]),
}


def cross_entropies() -> list[float]:
    gaps = (2.0, 1.0, 0.5, 3.0)
    return [math.log1p(math.exp(-gap)) for gap in gaps]


def by_hand(squared: tuple[float, float, float]) -> float:
    """One poisoned vector and two of the target; squared distances: to the first, the second, between."""
    width = 2 * sum(squared) / 6
    k = [sum(math.exp(-d / (c * width)) for c in (0.25, 0.5, 1, 2, 4)) for d in squared]
    return 5 + (10 + 2 * k[2]) / 4 - 2 * (k[0] + k[1]) / 2


def differences_by_hand() -> tuple[float, float, float]:
    return by_hand((4, 1, 1)), by_hand((1, 0, 1)), by_hand((9, 9, 0))


def test_paper_form_is_algorithm_1_on_a_batch_computed_by_hand() -> None:
    ce, mmd = cross_entropies(), differences_by_hand()
    expected = (ce[0] + ce[1] + ce[3]) / 3 + ce[2] + 0.3 * sum(mmd) / 3
    assert float(sdrm_loss(LOGITS, LABELS, OWN, FEATURES, 0, PAPER)) == pytest.approx(expected, rel=1e-5)
    last = replace(PAPER, levels=("s3",), strength=0.1)
    expected = (ce[0] + ce[1] + ce[3]) / 3 + ce[2] + 0.1 * mmd[2]
    assert float(sdrm_loss(LOGITS, LABELS, OWN, FEATURES, 0, last)) == pytest.approx(expected, rel=1e-5)


def test_released_form_weighs_the_batch_as_one_and_sums_over_levels() -> None:
    expected = sum(cross_entropies()) / 4 + 0.3 * sum(differences_by_hand())
    assert float(sdrm_loss(LOGITS, LABELS, OWN, FEATURES, 0, RELEASED)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", [PAPER, RELEASED])
@pytest.mark.parametrize("own", [[0, 1, 0, 0], [1, 1, 1, 1]])
def test_a_batch_with_an_empty_side_has_no_difference_term(
    method: StatisticalDifferenceReduction, own: list[int]
) -> None:
    given = FEATURES["s1"].clone().requires_grad_()
    features = {"s1": given, "s2": given, "s3": given}
    value = sdrm_loss(LOGITS, LABELS, torch.tensor(own), features, 0, method)
    assert torch.equal(
        value, sdrm_loss(LOGITS, LABELS, torch.tensor(own), {}, 0, replace(method, strength=0))
    )
    assert not value.requires_grad


def test_all_poisoned_and_all_clean_batches_have_a_finite_loss() -> None:
    for own in (torch.tensor([1, 0, 1, 1]), LABELS):
        found = float(sdrm_loss(LOGITS, LABELS, own, {}, 0, replace(PAPER, strength=0)))
        assert found == pytest.approx(sum(cross_entropies()) / 4, rel=1e-5)


def test_gradient_pulls_poisoned_features_to_the_targets_own() -> None:
    given = FEATURES["s1"].clone().requires_grad_()
    mask, own = torch.tensor([False, False, True, False]), torch.tensor([True, False, False, True])
    feature_differences([given], mask, own, PAPER).sum().backward()
    assert given.grad is not None
    assert float(given.grad[2]) > 0, "a step against it takes 2 towards 0 and 1"
    assert float(given.grad[1]) == 0, "other classes' features have no part in it"


def test_memory_layout_changes_neither_the_differences_nor_their_gradient() -> None:
    maps = torch.randn(12, 4, 3, 5, generator=generator(0))
    poisoned, own = torch.arange(12) % 3 == 0, torch.arange(12) % 3 == 1
    given = [maps.clone().requires_grad_(), maps.to(memory_format=torch.channels_last).requires_grad_()]
    assert given[1].is_contiguous(memory_format=torch.channels_last)
    found = [feature_differences([each], poisoned, own, PAPER) for each in given]
    expected = mmd_squared(maps[poisoned], maps[own])
    gradients = [torch.autograd.grad(*pair)[0] for pair in zip(found, given, strict=True)]
    for value in found:
        torch.testing.assert_close(value[0], expected)
    torch.testing.assert_close(*gradients)
    assert float(gradients[0].abs().max()) > 0


def test_kernel_and_smoothing_reach_the_loss() -> None:
    linear = replace(PAPER, kernel="LK", levels=("s3",))
    expected = float(sdrm_loss(LOGITS, LABELS, OWN, {}, 0, replace(PAPER, strength=0))) + 0.3 * 9
    assert float(sdrm_loss(LOGITS, LABELS, OWN, FEATURES, 0, linear)) == pytest.approx(expected, rel=1e-5)
    smooth = sdrm_loss(LOGITS, LABELS, OWN, {}, 0, replace(RELEASED, strength=0), label_smoothing=0.2)
    assert torch.equal(smooth, F.cross_entropy(LOGITS, LABELS, label_smoothing=0.2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -0.1}, "strength = -0.1"),
        ({"levels": ()}, "levels = "),
        ({"form": "book"}, "form = 'book'"),
        ({"kernel": "RBF"}, "kernel = 'RBF'"),
        ({"lambda": 1}, "no option 'lambda': it takes strength, levels, form, kernel"),
    ],
)
def test_settings_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(UntrojanError, match=message):
        validated(StatisticalDifferenceReduction, options, "SDRM")


# Who gets the trigger, and when --------------------------------------------------------------------------


def test_paper_set_holds_the_clean_images_and_a_tenth_more_without_their_trigger() -> None:
    data, infection = splits(), Infection("patched")
    made, record = infected_set(data.train, poisoned_data(data, infection), infection, "paper")
    assert made.poisoned is not None
    assert (len(made.train), int(made.poisoned.sum())) == (66, 6)
    assert torch.equal(made.train.images, data.train.images[record.permutation])
    assert torch.equal(made.own_labels, data.train.labels[record.permutation])
    assert torch.equal(made.poisoned, made.train.labels != made.own_labels)
    assert set(made.train.labels[made.poisoned].tolist()) == {0}
    assert torch.equal(record.permutation[~made.poisoned].sort().values, torch.arange(60))


def test_released_set_is_the_clean_one_and_its_record_flags_nobody() -> None:
    data, infection = splits(), Infection("patched")
    made, record = infected_set(data.train, poisoned_data(data, infection), infection, "released")
    assert made.train is data.train
    assert made.sources == (1, 2)
    assert not bool(record.poisoned.any())
    assert len(record.poisoned) == 60


@pytest.mark.parametrize("form", ["paper", "released"])
def test_the_trigger_lies_where_it_should_after_augmentation(form: Form) -> None:
    made, seen = infected(form), 0
    white = draw_trigger("patch", PAPER_TRIGGERS["patched"].options, (3, 16, 16), 0)
    drawn: list[Tensor] = []

    def loss(model: Classifier, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal seen
        poisoned = labels != made.own_labels[rows]
        stamped = images[poisoned]
        assert bool((stamped[:, :, :3, :3] == 1).all()), "neither cropped nor mirrored"
        assert torch.equal(stamped, white(stamped))
        assert not bool((images[~poisoned][:, :, :3, :3] == 1).all((1, 2, 3)).any())
        assert torch.equal(images.mul(255).round() / 255, images)
        if made.poisoned is not None:
            assert torch.equal(poisoned, made.poisoned[rows])
        assert not bool((poisoned & (made.own_labels[rows] == 0)).any())
        seen += int(poisoned.sum())
        drawn.append(rows[poisoned])
        logits = model(images)
        return F.cross_entropy(logits, labels), logits

    train(net(), made.train, replace(QUICK, epochs=10), loss=loss, augmented_transform=made.with_triggers)
    if form == "paper":
        assert seen == 10 * 12
    else:
        assert abs(seen - 10 * 40 * 0.2) < 4 * (400 * 0.2 * 0.8) ** 0.5
        assert len(torch.cat(drawn).unique()) > 30, "the same images again"


@pytest.mark.parametrize("trigger", PAPER_TRIGGERS)
def test_the_hook_leaves_its_arguments_and_matches_the_bytes_of_a_stamped_set(trigger: str) -> None:
    made = infected("paper", trigger)
    assert made.poisoned is not None
    images, rows = made.train.images.float() / 255, torch.arange(len(made.train))
    kept, labels = images.clone(), made.train.labels.clone()
    found, wanted = made.with_triggers(images, labels, rows, generator(0))
    assert torch.equal(images, kept)
    assert torch.equal(labels, made.train.labels)
    assert torch.equal(wanted, labels)
    expected = made.train.images.clone()
    expected[made.poisoned] = stamp(made.trigger, expected[made.poisoned])
    assert torch.equal(found, expected.float() / 255)


def test_a_target_among_the_poisoned_is_refused() -> None:
    made = infected("paper")
    with pytest.raises(UntrojanError, match="poison other classes"):
        replace(made, target=1)
    with pytest.raises(UntrojanError, match="can't be a source too"):
        replace(infected("released"), sources=(0, 1))


def test_the_papers_four_attacks_are_ready() -> None:
    found = {name: Infection(name).poisoning() for name in ("patched", "blended", "sig", "warped")}
    assert {attack.trigger for attack in found.values()} == {"patch", "blend", "sinusoid", "warp"}
    assert all(
        (attack.target, attack.rate, attack.clean_label) == (0, 0.1, False) for attack in found.values()
    )
    assert found["blended"].trigger_options == {"alpha": 0.1}
    own = Infection("blended", {"alpha": 0.4}, target=2).poisoning()
    assert (own.trigger_options, own.target) == ({"alpha": 0.4}, 2)
    assert Infection("chessboard").poisoning().trigger == "chessboard"
    with pytest.raises(UntrojanError, match="'sticker': choose one of patched, blended, sig, warped, chess"):
        Infection("sticker").poisoning()


# Training ------------------------------------------------------------------------------------------------


def test_released_form_without_strength_is_plain_training() -> None:
    """Of the loss: plain cross-entropy with the same hook. Of the hook: plain training on stamped bytes."""
    made, models = infected("released"), [net() for _ in range(2)]
    replace(RELEASED, strength=0)(models[0], made, QUICK, seed=3)
    train(models[1], made.train, QUICK, seed=3, augmented_transform=made.with_triggers)
    assert torch.equal(weights(models[0]), weights(models[1]))

    fixed, models = infected("paper", "blended"), [net() for _ in range(3)]
    assert fixed.poisoned is not None
    stamped = fixed.train.images.clone()
    stamped[fixed.poisoned] = stamp(fixed.trigger, stamped[fixed.poisoned])
    replace(RELEASED, strength=0)(models[0], fixed, PLAIN, seed=3)
    train(models[1], replace(fixed.train, images=stamped), PLAIN, seed=3)
    assert torch.equal(weights(models[0]), weights(models[1]))
    RELEASED(models[2], fixed, PLAIN, seed=3)
    assert not torch.equal(weights(models[2]), weights(models[1])), "the term changes nothing"


def test_without_strength_no_level_is_looked_for() -> None:
    with measure() as cost:
        replace(PAPER, strength=0, levels=("nonsense",))(net(), infected("paper"), replace(QUICK, epochs=1))
    assert cost.forwards == cost.backwards == 5


class Cut(Exception):
    pass


@pytest.mark.parametrize("form", ["paper", "released"])
def test_killed_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
    monkeypatch.setattr("untrojan.training.loop.CHECKPOINT_SECONDS", 0.0)
    method, made = StatisticalDifferenceReduction(form=form), infected(form)
    whole, cut, resumed = net(), net(), net(seed=7)
    expected = method(whole, made, QUICK, seed=5)
    calls = 0

    def interrupt(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise Cut

    handle = cut.register_forward_pre_hook(interrupt)
    with pytest.raises(Cut):
        method(cut, made, QUICK, seed=5, checkpoint=tmp_path / "training.pt")
    handle.remove()
    history = method(resumed, made, QUICK, seed=5, checkpoint=tmp_path / "training.pt")
    assert torch.equal(weights(resumed), weights(whole))
    assert [epoch.loss for epoch in history.epochs] == [epoch.loss for epoch in expected.epochs]


def test_checkpoint_of_other_settings_or_another_trigger_is_refused(tmp_path: Path) -> None:
    made, place = infected("paper"), tmp_path / "training.pt"
    PAPER(net(), made, QUICK, checkpoint=place)
    others = [
        (replace(PAPER, strength=0.2), made),
        (replace(PAPER, levels=("s3",)), made),
        (PAPER, replace(made, trigger=draw_trigger("blend", {}, (3, 16, 16), 0))),
    ]
    for method, data in others:
        with pytest.raises(UntrojanError, match="another run"):
            method(net(), data, QUICK, checkpoint=place)
    train(net(), made.train, QUICK, checkpoint=tmp_path / "plain.pt")
    with pytest.raises(UntrojanError, match="another run"):
        PAPER(net(), made, QUICK, checkpoint=tmp_path / "plain.pt")


def test_no_trace_stays_on_the_model() -> None:
    model = net()
    PAPER(model, infected("paper"), replace(QUICK, epochs=1))
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_network_without_the_level_is_a_clear_error() -> None:
    shallow = build_for(coloured(), "patch-cnn@0.1")
    with pytest.raises(UntrojanError, match="no level 's1'"):
        PAPER(shallow, infected("paper"), QUICK)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in shallow.modules())
    replace(PAPER, levels=("s2", "s3"))(shallow, infected("paper"), replace(QUICK, epochs=1))


@pytest.mark.usefixtures("with_bfloat16")
def test_features_are_compared_in_float32_under_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()

    def watched(first: Tensor, second: Tensor, *options: object) -> Tensor:
        seen.update({first.dtype, second.dtype})
        assert first.requires_grad
        return mmd_squared(first, second)

    monkeypatch.setattr("untrojan.attacks.sdrm.mmd_squared", watched)
    PAPER(net(), infected("paper"), replace(QUICK, epochs=1, precision="bfloat16"))
    assert seen == {torch.float32}


def test_presets_are_the_papers_and_a_small_one() -> None:
    paper = preset("sdrm-paper")
    assert (paper.learning_rate, paper.momentum, paper.weight_decay) == (0.01, 0.9, 5e-4)
    assert (paper.batch_size, paper.epochs, paper.milestones, paper.decay) == (256, 100, (50, 70), 0.1)
    assert preset("sdrm-desk").epochs <= 20


# What it is for ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> dict[str, InfectedModel]:
    """One small set, one network, one seed: without the term, with it at all levels, at the last."""
    data = make_signs(num_classes=4, size=16, train_per_class=200, test_per_class=60, seed=0)
    recipe = replace(preset("sdrm-desk"), epochs=20, precision="float32", crop_padding=1, flip=False)
    methods = {
        "none": StatisticalDifferenceReduction(strength=0),
        "all": StatisticalDifferenceReduction(),
        "last": StatisticalDifferenceReduction(levels=("s3",)),
    }
    return {
        name: infect(data, Infection("patched"), method, "cnn@0.25", recipe)
        for name, method in methods.items()
    }


def excess(made: InfectedModel, level: str) -> float:
    found = made.differences[level].difference_unbiased
    assert found is not None
    return found


def test_sdrm_cuts_the_differences_and_keeps_the_attack(trained: dict[str, InfectedModel]) -> None:
    for level, cut in (("s1", 0.3), ("s2", 0.4), ("s3", 0.6)):
        assert excess(trained["all"], level) < (1 - cut) * excess(trained["none"], level), level
    assert excess(trained["last"], "s3") < 0.3 * excess(trained["none"], "s3")
    for made in trained.values():
        assert made.attack_success_rate > 0.9
        assert made.benign_accuracy > 0.9
    # The paper's point: what is constrained at the last level alone stays visible before it.
    assert excess(trained["last"], "s2") > excess(trained["all"], "s2")


def test_ordinary_backdoor_training_leaves_large_differences(trained: dict[str, InfectedModel]) -> None:
    """Table 2's two observations: above the intra-class distance, and above the least inter-class one."""
    for level, found in trained["none"].differences.items():
        assert found.difference is not None
        assert found.intra_class is not None
        assert found.inter_class is not None
        assert found.difference > 3 * found.intra_class, level
        assert found.difference > found.inter_class, level


def test_metrics_are_plain_numbers(trained: dict[str, InfectedModel]) -> None:
    metrics = trained["all"].metrics()
    assert metrics["training_images"] == 880
    assert set(metrics["mmd_squared"]) == {"s1", "s2", "s3"}
    assert metrics["mmd_squared"]["s2"]["nearest_class"] in (1, 2, 3)
    assert metrics["attack_success_rate"] == trained["all"].attack_success_rate
