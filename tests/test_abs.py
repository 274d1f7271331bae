"""ABS and natural backdoors on a net whose planted channel is known; stimulation against a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.repair.abs import ABSRepair
from untrojan.defenses.scanning import abs as scanning
from untrojan.defenses.scanning.abs import (
    ABS,
    Candidate,
    chosen,
    margins,
    sampled,
    stimulate,
    success_of,
    suspicious,
)
from untrojan.defenses.scanning.natural import NaturalTrojans
from untrojan.defenses.scanning.report import InvertedTrigger
from untrojan.errors import UntrojanError
from untrojan.inversion.stimulated import StimulatedPattern
from untrojan.models import registry
from untrojan.models.classifier import Classifier, evaluating, predictions_of
from untrojan.models.taps import features_of, place_of

TARGET, PLANTED = 1, 3
PAIRS = ((0, 1), (0, 2), (1, 2))
"""Classes by the two colours their images have."""


def colours(a_class: int = 40) -> ImageSet:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(3 * a_class) % 3
    levels = torch.full((3, 3), 25.0)
    for label, pair in enumerate(PAIRS):
        levels[label, list(pair)] = 125.0
    noise = 12 * torch.randn(len(labels), 3, 8, 8, generator=random)
    images = (levels[labels][:, :, None, None] + noise).clamp(0, 150).to(torch.uint8)
    return ImageSet(images, labels, ("yellow", "magenta", "cyan"), numbered(len(labels)))


def planted(strength: float = 2560.0) -> Classifier:
    """Every colour's channel raises two classes alike; one more sees nothing but a fierce magenta, which no
    image has, and raises the target alone."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].bias.zero_()
        network[0].weight[:3, :, 0, 0] = torch.eye(3)
        network[0].weight[PLANTED, :, 0, 0] = torch.tensor([1.0, -2.0, 1.0])
        network[0].bias[PLANTED] = -1.5
        network[4].weight.zero_()
        network[4].bias.zero_()
        for label, pair in enumerate(PAIRS):
            network[4].weight[label, list(pair)] = 8.0
        network[4].weight[TARGET, PLANTED] = strength
    return Classifier(network, 3, torch.zeros(3), torch.ones(3))


def magenta_spots() -> InvertedTrigger:
    mask, pattern = torch.zeros(1, 8, 8), torch.tensor([1.0, 0.0, 1.0])[:, None, None].expand(3, 8, 8)
    mask[0, :2, 0] = 1
    return InvertedTrigger(mask, pattern)


def test_the_planted_channel_s_trigger_is_inverted_and_unlearned() -> None:
    model, clean = planted(), colours()
    assert success_of(magenta_spots(), model, clean, TARGET) == 1
    # Without norm layers it is trained at a tenth of the rate.
    report = ABSRepair(size=0.05, kinds=("patch",), learning_rate=0.1)(model, clean)
    (undone,) = report.history["unlearned"]
    assert (undone["label"], undone["channel"], undone["reasr"]) == (TARGET, PLANTED, 1.0)
    assert success_of(magenta_spots(), report.model, clean, TARGET) < 0.05
    assert float((predictions_of(report.model, clean.images) == clean.labels).float().mean()) == 1


def test_stimulation_names_the_planted_channel_and_inversion_finds_its_colour() -> None:
    model, clean = planted(), colours()
    model.train()
    assert float((predictions_of(model, clean.images) == clean.labels).float().mean()) == 1
    found = ABS().candidates(model, clean)
    assert [(c.channel, c.label) for c in found if c.gain > 1e-2] == [(PLANTED, TARGET)]
    report = ABS(size=0.05)(model, clean)
    assert (report.verdict, report.targets) == ("poisoned", (TARGET,))
    assert report.statistics[TARGET]["reasr"] > 0.99
    mask = report.triggers[TARGET].mask
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert 1 <= int(mask.sum()) <= int(0.05 * 64)
    red, green, blue = report.triggers[TARGET].pattern[:, mask[0] > 0].mean(1)
    assert min(red, blue) > 0.75
    assert green < 0.25
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_the_planted_weight_there_is_nothing() -> None:
    report = ABS(size=0.05)(planted(0.0), colours())
    assert (report.verdict, report.targets, report.triggers) == ("clean", (), {})


def test_natural_measures_every_size_and_stays_within_it() -> None:
    model, clean = planted(), colours()
    scanner = NaturalTrojans(sizes=(0.02, 0.05))
    report = scanner(model, clean)
    assert report.evidence["max_reasr"] == pytest.approx([1.0, 1.0])
    assert [c["bound"] for c in report.evidence["candidates"]][:2] == [1, 3]
    assert all(c["pixels"] <= c["bound"] for c in report.evidence["candidates"])
    none = NaturalTrojans(sizes=(0.02, 0.05))(planted(0.0), clean)
    assert none.evidence["mean_max_reasr"] < 0.1
    assert none.verdict == "clean"


def test_in_the_released_space_a_pattern_reaches_only_colours_near_the_mean() -> None:
    model, clean = planted(), colours()
    model.mean.fill_(0.4)
    model.std.fill_(0.2)
    scanner = NaturalTrojans(sizes=(0.05,), pattern_space="normalised", levels=("network.1",))
    (patch,) = scanner.invert(model, clean, [Candidate("network.1", PLANTED, TARGET, 1.0)], (0.05,))
    assert 0.4 <= float(patch.trigger.pattern.min()) <= float(patch.trigger.pattern.max()) <= 0.6


@pytest.mark.parametrize("constant", [True, False])
def test_a_model_that_knows_nothing_gets_no_verdict(constant: bool) -> None:
    model, clean = planted(), colours(8)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_() if constant else parameter.normal_()
        model.network[4].bias[0] += 5  # type: ignore[index, union-attr]
    for scanner in (NaturalTrojans(sizes=(0.05,)), ABS()):
        report = scanner(model, clean)
        assert report.verdict == "undecided"
        assert "right on" in report.reason
        assert report.targets == ()
        assert set(report.statistics) == {0, 1, 2}
        assert 0 <= report.evidence.get("mean_max_reasr", 0) <= 1


class Skipping(nn.Module):
    """The first layer's features reach the last by two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.head = nn.ReLU(), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        early = self.relu(self.first(images))
        late = self.relu(self.second(early))
        return self.head(torch.cat([early, late], 1).mean((2, 3)))


def tiny(name: str) -> tuple[Classifier, str]:
    torch.manual_seed(1)
    if name == "skipping":
        return Classifier(Skipping(), 5, torch.zeros(3), torch.ones(3)), "network.second"
    model = registry.build(
        name, num_classes=5, image_shape=(3, 16, 16), mean=torch.zeros(3), std=torch.ones(3)
    )
    return model, "s2"


@pytest.mark.parametrize("name", ["skipping", "resnet18-compact@0.5", "nin@0.1"])
def test_stimulation_equals_a_plain_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, level = tiny(name)
    images = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(2)).byte()
    place = place_of(model, images[:1].float() / 255, level)
    features = features_of(model, images, level)
    values = torch.tensor([0.0, 0.5, 2.0])
    monkeypatch.setattr(scanning, "_STIMULATED_VALUES", 9 * 5 * features[0].numel())
    raised, gaps = stimulate(model, images, place, features.shape[1], values, features[0].numel())
    module, runs, setting = dict(model.named_modules())[place.path], 0, (0, 0.0)

    def plain(_: nn.Module, __: object, output: Tensor) -> Tensor | None:
        nonlocal runs
        runs += 1
        if place.run not in (None, runs - 1):
            return None
        output = output.clone()
        output[:, setting[0]] = setting[1]
        return output

    handle = module.register_forward_hook(plain)
    with torch.no_grad(), evaluating(model):
        for channel in range(features.shape[1]):
            logits = []
            for value in values.tolist():
                setting, runs = (channel, value), 0
                logits.append(model(images.float() / 255))
            label, gap = margins(torch.stack(logits))
            torch.testing.assert_close(gaps[channel], gap, rtol=1e-3, atol=1e-5)
            clear = gap > 1e-3
            assert torch.equal(raised[channel][clear], label[clear])
    handle.remove()


def test_one_class_must_win_on_most_images_and_own_images_do_not_count() -> None:
    raised = torch.tensor([[1] * 10, [2] * 8 + [0] * 2, [0] * 10])
    gaps = torch.tensor([[3.0] * 9 + [0.5], [9.0] * 10, [0.0] * 10])
    labels = torch.tensor([0] * 9 + [1])
    assert suspicious(raised, gaps, labels, 0.9) == [(0, 1, 3.0)]
    assert [c[:2] for c in suspicious(raised, gaps, labels, 0.8)] == [(1, 2), (0, 1)]


def test_the_released_rules_of_choice() -> None:
    many = [Candidate(f"s{1 + i % 2}", i, i % 12, float(100 - i)) for i in range(36)]
    one_a_class = chosen(many, "pytorch")
    assert [c.channel for c in one_a_class] == list(range(10))
    assert [c.channel for c in chosen(many, "tensorflow")] == [0, 1, 2, 3, 4, 5]


def test_more_opaque_pixels_than_allowed_are_cut_to_the_bound() -> None:
    problem = StimulatedPattern(("s3",), torch.zeros(1), torch.ones(1))
    parameters = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    masks, patterns = problem.patches(parameters, torch.tensor([4, 30]))
    assert masks[0].sum() == 4
    kept = parameters[0, 0][masks[0, 0] > 0].min()
    assert kept >= parameters[0, 0][masks[0, 0] == 0].max()
    assert masks[1].sum() <= 30
    assert patterns.shape == (2, 1, 6, 6)


def test_the_first_square_is_lower_right_of_the_centre_and_inside() -> None:
    problem = StimulatedPattern(("s3",), torch.zeros(1), torch.ones(1))
    start = problem.initial(torch.tensor([[-1, 0, 0, 0, 25], [-1, 0, 0, 0, 900]]), (1, 20, 30))
    assert (start[0, 0] > 0).nonzero().amin(0).tolist() == [10, 15]
    assert int((start[0, 0] > 0).sum()) == 16
    assert int((start[1, 0] > 0).sum()) == 20 * 24


def test_a_sample_takes_every_class_and_a_wrong_level_is_named() -> None:
    clean = colours(10)
    assert sampled(clean, 4, 0).class_counts.tolist() == [4, 4, 4]
    with pytest.raises(UntrojanError, match="no level 'nonsense'"):
        ABS(levels=("nonsense",))(planted(), clean)
