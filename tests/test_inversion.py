"""The inversion engine against a linear model, whose smallest pattern is known in closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.errors import UntrojanError
from untrojan.inversion.additive import AdditivePattern
from untrojan.inversion.engine import (
    FAST,
    PAPER,
    ProportionalStep,
    RawGradient,
    Schedule,
    all_pairs,
    invert,
)
from untrojan.models.classifier import Classifier

FINE = Schedule(ProportionalStep(0.02, 2e-4, 0.0), images_a_side=16, confirm_every=1, most_steps=500)


def linear_model(num_classes: int, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, num_classes))
    with torch.no_grad():
        # Mid grey sits on the boundary of all classes, so that random images fall into each of them.
        network[1].bias.copy_(-network[1].weight.sum(1) / 2)
    return Classifier(network, num_classes, torch.zeros(3), torch.ones(3))


def grey_images(model: Classifier, num_classes: int, count: int = 400) -> ImageSet:
    """Images far from black and white, labelled as the model sees them."""
    torch.manual_seed(1)
    images = torch.randint(96, 160, (count, 3, 6, 6), dtype=torch.uint8)
    labels = model(images.float() / 255).argmax(1)
    names = tuple(f"class {i}" for i in range(num_classes))
    return ImageSet(images, labels, names, numbered(count))


def margins(model: Classifier, data: ImageSet, source: int, target: int) -> Tensor:
    logits = model(data.images[data.labels == source].float() / 255).detach()
    return logits[:, source] - logits[:, target]


@pytest.mark.parametrize("schedule", [FINE, Schedule(RawGradient(1e-3), images_a_side=64, confirm_every=1)])
def test_pattern_of_a_linear_model_is_the_closed_form(schedule: Schedule) -> None:
    model = linear_model(2)
    data = grey_images(model, 2)
    found = invert(model, data, all_pairs(2), AdditivePattern(), schedule)
    weight = model.network[1].weight.detach()  # type: ignore[index, union-attr]
    assert bool(found.solved.all())
    for (source, target), pattern in zip(found.pairs.tolist(), found.parameters, strict=True):
        normal = weight[target] - weight[source]
        # The .95 quantile of the margins is what has to be bridged, along the normal.
        needed = margins(model, data, source, target).quantile(0.95) / normal.norm()
        cosine = torch.cosine_similarity(pattern.flatten(), normal, dim=0)
        assert float(cosine) > 0.999
        assert float(pattern.norm()) == pytest.approx(float(needed), rel=0.06)


def test_results_do_not_depend_on_how_pairs_are_batched() -> None:
    model = linear_model(4)
    data = grey_images(model, 4)
    pairs = all_pairs(4)
    together = invert(model, data, pairs, AdditivePattern(), FAST)
    one_by_one = [invert(model, data, pair[None], AdditivePattern(), FAST) for pair in pairs]
    assert torch.equal(together.steps, torch.cat([each.steps for each in one_by_one]))
    alone = torch.cat([each.parameters for each in one_by_one])
    torch.testing.assert_close(together.parameters, alone, atol=1e-5, rtol=1e-4)


def test_model_is_left_as_it_was() -> None:
    model = linear_model(3).train()
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    invert(model, grey_images(model, 3), all_pairs(3), AdditivePattern(), FAST)
    assert model.training
    assert not frozen.requires_grad
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_pair_that_never_flips_is_reported_as_failed() -> None:
    model = linear_model(3)
    with torch.no_grad():
        model.network[1].weight[2] = 0  # type: ignore[index, union-attr]
        model.network[1].bias[2] = -1e6  # type: ignore[index, union-attr]
    data = grey_images(model, 3)
    data.labels[:20] = 2
    short = Schedule(ProportionalStep(), images_a_side=8, most_steps=80)
    found = invert(model, data, torch.tensor([[0, 2], [2, 0]]), AdditivePattern(), short)
    assert found.solved.tolist() == [False, True]
    assert found.steps.tolist()[0] == 80


def test_interrupted_search_resumes_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("untrojan.inversion.engine.CHECKPOINT_SECONDS", 0.0)
    model = linear_model(3)
    data = grey_images(model, 3)
    whole = invert(model, data, all_pairs(3), AdditivePattern(), FAST)
    calls = 0

    class Interrupted(AdditivePattern):
        def views(self, parameters: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 10:
                raise KeyboardInterrupt
            return super().views(parameters, sources, targets)

    checkpoint = tmp_path / "search.safetensors"
    with pytest.raises(KeyboardInterrupt):
        invert(model, data, all_pairs(3), Interrupted(), FAST, checkpoint=checkpoint)
    assert checkpoint.exists()
    resumed = invert(model, data, all_pairs(3), AdditivePattern(), FAST, checkpoint=checkpoint)
    assert torch.equal(resumed.parameters, whole.parameters)
    assert torch.equal(resumed.steps, whole.steps)
    with pytest.raises(UntrojanError, match="another search"):
        invert(model, data, all_pairs(3)[:2], AdditivePattern(), FAST, checkpoint=checkpoint)


def test_objective_is_finite_where_the_model_is_certain() -> None:
    logits = torch.tensor([[[200.0, -200.0, 0.0], [-300.0, 300.0, 0.0]]], requires_grad=True)
    loss = AdditivePattern().loss(logits, torch.zeros(1, 3, 2, 2), torch.tensor([[0, 1]]))
    # ln p_1 of the first view is -400; ln(1 - p_1) of the second is 0 - 300.
    assert float(loss.detach()) == pytest.approx(700.0)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().max()) > 0.5


def test_class_without_images_is_named() -> None:
    model = linear_model(3)
    data = grey_images(model, 3)
    only_two = data.select(data.labels != 1)
    with pytest.raises(UntrojanError, match="class 1"):
        invert(model, only_two, all_pairs(3), AdditivePattern(), FAST)


def test_paper_schedule_holds_the_published_constants() -> None:
    assert PAPER.stepper == RawGradient(1e-4)
    assert (PAPER.images_a_side, PAPER.flip_fraction, PAPER.confirm_images) == (256, 0.95, None)
