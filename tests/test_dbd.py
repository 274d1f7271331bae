"""DBD: its losses by hand, its split, and its stages on small data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from untrojan.attacks.poisoning import PoisonedData, Poisoning
from untrojan.data.signs import make_signs
from untrojan.data.views import strong_view
from untrojan.defenses.training.dbd import (
    DBD,
    classification_layer,
    contrastive_loss,
    credible_images,
    sharpened,
    symmetric_cross_entropy,
)
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.models.registry import build_for
from untrojan.training.recipe import Recipe

SHORT = Recipe(epochs=2, batch_size=32, optimizer="sgd", learning_rate=0.05)
BRIEF = DBD(contrastive_epochs=1, contrastive_batch=32, head_epochs=1)


def poisoned() -> PoisonedData:
    data = make_signs(num_classes=4, size=16, train_per_class=40, test_per_class=10, seed=0)
    return Poisoning("patch", {"size": 3}, target=1, rate=0.08)(data, 0)


def test_the_contrastive_loss_by_hand() -> None:
    first = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    second = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    # Every view: its partner at similarity 1, the two views of the other image at 0.
    expected = -torch.log(torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + 2))
    assert float(contrastive_loss(first, second, 0.5)) == pytest.approx(float(expected), rel=1e-5)
    assert float(contrastive_loss(first, second.flip(0), 0.5)) > float(expected) + 1


def test_symmetric_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 2])
    p = logits.softmax(1)
    # Cross-entropy of the label under p, and of p under a label whose zeros are 1e-4.
    forward = [-p[0, 0].log(), -p[1, 2].log()]
    label = torch.tensor([[1, 1e-4, 1e-4], [1e-4, 1e-4, 1]], dtype=torch.float64)
    reverse = -(p * label.log()).sum(1)
    found = symmetric_cross_entropy(logits, labels, 0.1, 2.0)
    torch.testing.assert_close(found, 0.1 * torch.stack(forward) + 2 * reverse)
    # Bounded in its reverse part, however wrong the label.
    sure = torch.tensor([[50.0, 0.0, 0.0]])
    assert float(symmetric_cross_entropy(sure, torch.tensor([1]), 0.0, 1.0)) == pytest.approx(
        9.2103, abs=1e-3
    )


def test_the_least_losses_are_credible() -> None:
    losses = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    together = credible_images(losses, labels, 0.5, by_class=False)
    assert together.tolist() == [True, True, True, True, True, False, False, True], "1 and 2 keep their best"
    each = credible_images(losses, labels, 0.5, by_class=True)
    assert each.tolist() == [True, True, False, False, True, True, False, True]


def test_sharpening_keeps_distributions_and_their_order() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]])
    torch.testing.assert_close(sharpened(p, 1.0), p)
    torch.testing.assert_close(sharpened(p, 0.5), p.square() / p.square().sum())


def test_strong_views_differ_and_stay_images() -> None:
    images = poisoned().train.images[:16].float() / 255
    one, two = (strong_view(images, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert one.shape == images.shape
    assert 0 <= float(one.min()) <= float(one.max()) <= 1
    assert float((one - two).abs().mean()) > 0.02
    assert torch.equal(one, strong_view(images, torch.Generator().manual_seed(0)))
    grey = strong_view(images[:, :1], torch.Generator().manual_seed(0), flip=False)
    assert grey.shape == images[:, :1].shape
    flat = torch.full((8, 3, 16, 16), 0.5)
    # Nothing but light and colour can change an image of one colour; a grey one has no colour to turn.
    view = strong_view(flat, torch.Generator().manual_seed(3))
    torch.testing.assert_close(view, view[:, :1, :1, :1].expand_as(view))


def test_mixmatch_of_one_kind_of_images() -> None:
    data = poisoned().train
    model = build_for(data, "cnn@0.25").eval()
    images, labels = data.images[:8].float() / 255, data.labels[:8]
    twice, method = torch.cat([images, images]), DBD(mixing=1e4)
    # A Beta so narrow mixes halves: with all images alike, mixing changes nothing.
    same = images[:1].expand(16, -1, -1, -1)
    everyone = torch.ones(8, dtype=torch.bool)
    loss, logits = method.mixmatch_loss(model, same, labels[:1].expand(8), everyone, 5.0)
    expected = nn.functional.cross_entropy(model(images[:1]), labels[:1])
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert logits.shape == (8, 4)
    # Without a credible image only the guesses speak, at their weight.
    none, _ = method.mixmatch_loss(model, twice, labels, ~everyone, 0.0)
    assert float(none.detach()) == 0.0
    mixed, _ = method.mixmatch_loss(model, twice, labels, labels == 0, 1.0)
    assert torch.isfinite(mixed)


def test_stages_do_what_they_are_for() -> None:
    data = poisoned().train
    model = build_for(data, "cnn@0.25")
    keys = [*model.state_dict()]
    shuffled = replace(data, labels=data.labels.flip(0))
    twin = build_for(data, "cnn@0.25")
    BRIEF._learn_features(model, data, SHORT, None)
    BRIEF._learn_features(twin, shuffled, SHORT, None)
    ours, theirs = model.state_dict(), twin.state_dict()
    assert [*ours] == keys
    assert all(torch.equal(ours[key], theirs[key]) for key in keys), "labels reached the features"
    layer = classification_layer(model, data.images[:1].float())
    head = {key for key, value in model.named_parameters() if any(value is own for own in layer.parameters())}
    before = {key: value.clone() for key, value in ours.items()}
    BRIEF._learn_head(model, data, SHORT, None)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == head
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_run_that_was_killed_ends_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    from untrojan.training import loop

    data = poisoned().train
    whole = BRIEF(data, "cnn@0.25", SHORT)
    assert whole.model.state_dict().keys() == build_for(data, "cnn@0.25").state_dict().keys()
    assert int((~whole.dropped).sum()) == whole.evidence["credible"]
    assert len(whole.history) == 1 + 1 + 2
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    saves, save = [0], loop._Run.save
    steps = -(-len(data) // 32)

    def dying(run: Any, path: Path, spent: Sequence[float]) -> None:
        save(run, path, spent)
        saves[0] += 1
        # In the last epoch of fine-tuning, so that the renewed split has to come from the checkpoint.
        if saves[0] == 2 * (steps + 1) + steps + 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop._Run, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        BRIEF(data, "cnn@0.25", SHORT, checkpoint=tmp_path / "run.pt")
    resumed = BRIEF(data, "cnn@0.25", SHORT, checkpoint=tmp_path / "run.pt")
    assert torch.equal(whole.dropped, resumed.dropped)
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_network_without_a_head_is_refused() -> None:
    model = Classifier(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, torch.zeros(3), torch.ones(3))
    with pytest.raises(UntrojanError, match="no linear or convolutional layer"):
        classification_layer(model, torch.zeros(1, 3, 16, 16))
