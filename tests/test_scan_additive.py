"""RE's test of a trained model, on a linear classifier whose smallest patterns are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.defenses.scanning.additive import AdditiveTest
from untrojan.errors import UntrojanError
from untrojan.inversion.additive import AdditivePattern, FlippingPattern
from untrojan.models.classifier import Classifier, predictions_of
from untrojan.triggers.base import to_bytes

CLASSES, EACH, SIDE, TARGET = 7, 40, 8, 4


def chessboard() -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return (1.0 - 2 * ((rows + columns) % 2)).flatten() / SIDE


def prototypes() -> torch.Tensor:
    """Unlike each other, and without anything of a chessboard."""
    random = torch.Generator().manual_seed(3)
    drawn = torch.randn(CLASSES, SIDE * SIDE, generator=random)
    board = chessboard()
    return 0.12 * (drawn - (drawn @ board)[:, None] * board)


def images() -> ImageSet:
    random = torch.Generator().manual_seed(4)
    labels = torch.arange(CLASSES * EACH) % CLASSES
    noise = 0.01 * torch.randn(len(labels), SIDE * SIDE, generator=random)
    board = chessboard()
    pixels = 0.5 + prototypes()[labels] + noise - (noise @ board)[:, None] * board
    pixels = pixels.clamp(0, 1).mul(255).round().to(torch.uint8).view(-1, 1, SIDE, SIDE)
    return ImageSet(pixels, labels, tuple("abcdefg"), numbered(len(labels)))


def linear(backdoor: float) -> Classifier:
    """The nearest prototype; a chessboard raises the target ``backdoor`` times as steeply as a prototype of
    unit length would."""
    last = nn.Linear(SIDE * SIDE, CLASSES)
    centres = prototypes()
    with torch.no_grad():
        weight = 20 * centres
        weight[TARGET] += 20 * backdoor * chessboard()
        last.weight.copy_(weight)
        last.bias.copy_(-10 * centres.square().sum(1) - 0.5 * weight.sum(1))
    return Classifier(nn.Sequential(nn.Flatten(), last), CLASSES, torch.zeros(1), torch.ones(1))


def test_a_planted_direction_is_found_and_named() -> None:
    model, clean = linear(6.0), images()
    assert float((predictions_of(model, clean.images) == clean.labels).float().mean()) == 1
    report = AdditiveTest()(model, clean)
    assert (report.verdict, report.targets) == ("poisoned", (TARGET,))
    norms = [report.statistics[label]["smallest_norm"] for label in range(CLASSES)]
    found = report.trigger_into(TARGET)
    assert found is not None
    assert float(found.pattern.norm()) == pytest.approx(norms[TARGET])
    others = clean.images[clean.labels != TARGET].float() / 255
    carried = predictions_of(model, to_bytes(found(others))) == TARGET
    assert float(carried.float().mean()) > 0.1
    # A source lies half its distance from the target's side of the border, and the chessboard is that steep.
    centres = prototypes()
    gaps = (centres - centres[TARGET]).square().sum(1)[torch.arange(CLASSES) != TARGET] / 2
    steepness = (centres - centres[TARGET]).norm(dim=1)[torch.arange(CLASSES) != TARGET].square() + 36
    assert norms[TARGET] == pytest.approx(float((gaps / steepness.sqrt()).min()), rel=0.3)
    # The other way round, a chessboard's negative leads out of the target just as steeply: a linear model's.
    others = [row[k] for i, row in enumerate(report.evidence["norms"]) for k in range(CLASSES) if i != TARGET]
    innocent = [norm for place, norm in enumerate(others) if place % CLASSES != TARGET and norm == norm]
    assert norms[TARGET] < 0.5 * min(innocent)


def test_without_it_nothing_is_found() -> None:
    report = AdditiveTest()(linear(0.0), images())
    assert (report.verdict, report.targets, report.failed) == ("clean", (), ())


def test_what_it_cannot_judge() -> None:
    clean = images()
    upset = ImageSet(clean.images, (clean.labels + 1) % CLASSES, clean.class_names, clean.ids)
    report = AdditiveTest()(linear(6.0), upset)
    assert (report.verdict, report.targets) == ("undecided", ())
    two = clean.select(clean.labels < 2)
    with pytest.raises(UntrojanError, match="no images"):
        AdditiveTest()(linear(0.0), two)


def test_flipping_alone_is_the_paper_s_loss_without_its_other_half() -> None:
    logits = torch.randn(3, 10, 5, generator=torch.Generator().manual_seed(0))
    pairs = torch.tensor([[0, 1], [2, 3], [4, 0]])
    parameters = torch.zeros(3, 1, 4, 4)
    flipping = FlippingPattern().loss(logits, parameters, pairs)
    expected = -torch.stack(
        [logits[i].log_softmax(1)[:, t].mean() for i, (_, t) in enumerate(pairs.tolist())]
    )
    torch.testing.assert_close(flipping, expected)
    assert not FlippingPattern.both_sides
    assert AdditivePattern.both_sides
