"""The inversion engine against a linear model, whose smallest pattern is known in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from untrojan.cost import measure
from untrojan.data.image_set import ImageSet, numbered
from untrojan.errors import UntrojanError
from untrojan.inversion.additive import AdditivePattern
from untrojan.inversion.engine import (
    ANY,
    FAST,
    PAPER,
    Adam,
    ProportionalStep,
    RawGradient,
    Schedule,
    Shrink,
    all_pairs,
    invert,
)
from untrojan.inversion.masked import MaskedPattern
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


def test_both_ways_a_pattern_unflips_as_many_as_it_flips() -> None:
    model = linear_model(2)
    data = grey_images(model, 2)
    weight = model.network[1].weight.detach()  # type: ignore[index, union-attr]
    normal = weight[1] - weight[0]
    # Images of class 1 lie deep in it: what carries class 0 over is too little to take them out.
    deeper = (data.images.float() + 60 * (normal / normal.abs().max()).view(3, 6, 6)).round().clamp(0, 255)
    ones = (data.labels == 1)[:, None, None, None]
    data = replace(data, images=torch.where(ones, deeper.byte(), data.images))
    there, back = (margins(model, data, *pair).quantile(0.95) / normal.norm() for pair in ((0, 1), (1, 0)))
    assert back > 2 * there
    pair = torch.tensor([[0, 1]])
    one_way = invert(model, data, pair, AdditivePattern(), FINE)
    both_ways = invert(model, data, pair, AdditivePattern(), replace(FINE, both_ways=True))
    assert float(one_way.parameters.norm()) == pytest.approx(float(there), rel=0.06)
    # Far from its constraint a pair is looked at seldom: it may go a few steps too far.
    assert float(back) <= float(both_ways.parameters.norm()) <= 1.3 * float(back)
    assert bool(both_ways.solved.all())


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
    with measure() as cost:
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
    for _ in ("resumed", "finished before"):
        with measure() as resumed_cost:
            resumed = invert(model, data, all_pairs(3), AdditivePattern(), FAST, checkpoint=checkpoint)
        assert torch.equal(resumed.parameters, whole.parameters)
        assert torch.equal(resumed.steps, whole.steps)
        assert resumed_cost.so_far()[1:] == cost.so_far()[1:]
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


SHRINKING = Schedule(
    Adam(0.1), images_a_side=32, flip_fraction=0.99, most_steps=600, shrink=Shrink(look_every=5, patience=2)
)


def pixel_backdoor(num_classes: int = 5) -> tuple[Classifier, ImageSet]:
    """A linear model that reads class 2 wherever pixel (1, 4) is white, and else a noisy prototype."""
    torch.manual_seed(0)
    prototypes = torch.randint(60, 150, (num_classes, 3, 6, 6)).float()
    labels = torch.arange(300) % num_classes
    images = (prototypes[labels] + 8 * torch.randn(300, 3, 6, 6)).clamp(0, 255).to(torch.uint8)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, num_classes))
    flat = (prototypes / 255).flatten(1)
    with torch.no_grad():
        # Nearest prototype, in ignorance of the backdoor's pixel.
        known = torch.ones(3, 6, 6)
        known[:, 1, 4] = 0
        network[1].weight.copy_(20 * flat * known.flatten())
        network[1].bias.copy_(-10 * (flat.square() * known.flatten()).sum(1))
        backdoor = torch.zeros(3, 6, 6)
        backdoor[:, 1, 4] = 40
        network[1].weight[2] += backdoor.flatten()
        network[1].bias[2] -= 40 * 3 * 0.45
    names = tuple(f"class {i}" for i in range(num_classes))
    model = Classifier(network, num_classes, torch.zeros(3), torch.ones(3))
    assert float((model(images.float() / 255).argmax(1) == labels).float().mean()) > 0.95
    return model, ImageSet(images, labels, names, numbered(300))


def test_a_mask_shrinks_to_the_backdoors_pixel() -> None:
    model, data = pixel_backdoor()
    pairs = torch.tensor([[ANY, target] for target in range(5)])
    problem = MaskedPattern()
    found = invert(model, data, pairs, problem, SHRINKING)
    masks, patterns = problem.trigger(found.parameters)
    sizes = problem.size(found.parameters)
    assert bool(found.solved.all())
    assert int(sizes.argmin()) == 2
    assert float(sizes[2]) < 1.5
    assert divmod(int(masks[2].argmax()), 6) == (1, 4)
    assert float(patterns[2, :, 1, 4].min()) > 0.9
    assert float(sizes[torch.arange(5) != 2].min()) > 3 * float(sizes[2])
    flips = model(problem.embed(found.parameters[2:3], data.images[None].float() / 255)[0]).argmax(1) == 2
    assert float(flips.float().mean()) > 0.97


def test_shrinking_does_not_depend_on_batching_and_resumes(tmp_path: Path) -> None:
    model, data = pixel_backdoor()
    pairs = torch.tensor([[ANY, target] for target in range(5)])
    schedule = replace(SHRINKING, most_steps=60)
    together = invert(model, data, pairs, MaskedPattern(), schedule)
    alone = [invert(model, data, pair[None], MaskedPattern(), schedule) for pair in pairs]
    torch.testing.assert_close(
        together.parameters, torch.cat([each.parameters for each in alone]), atol=1e-3, rtol=1e-3
    )
    place = tmp_path / "search.safetensors"
    invert(model, data, pairs, MaskedPattern(), schedule, checkpoint=place)
    again = invert(model, data, pairs, MaskedPattern(), schedule, checkpoint=place)
    torch.testing.assert_close(again.parameters, together.parameters)
    assert torch.equal(again.steps, together.steps)


def test_what_never_meets_the_constraint_is_failed_however_small_it_is() -> None:
    model, data = pixel_backdoor()
    with torch.no_grad():
        model.network[1].weight[3] = 0  # type: ignore[index, union-attr]
        model.network[1].bias[3] = -1e3  # type: ignore[index, union-attr]
    pairs = torch.tensor([[ANY, 2], [ANY, 3]])
    found = invert(model, data, pairs, MaskedPattern(), replace(SHRINKING, most_steps=100))
    assert found.solved.tolist() == [True, False]
    assert float(found.flip_fraction[1]) == 0.0


@pytest.mark.parametrize("leading", [0, 20])
def test_adam_is_torchs_with_another_rate_for_the_first_numbers(leading: int) -> None:
    start = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    ours, memory = start.clone(), torch.zeros(2, 2, 48)
    theirs = [part.clone().requires_grad_() for part in (start[:, :leading], start[:, leading:])]
    groups = [{"params": theirs[0], "lr": 0.02}, {"params": theirs[1]}]
    optimizer = torch.optim.Adam(groups, lr=0.1, betas=(0.5, 0.9))
    stepper = Adam(leading=leading, leading_rate=0.02)
    for step in range(5):
        gradients = ours**2 - 0.3
        for part, gradient in zip(theirs, (gradients[:, :leading], gradients[:, leading:]), strict=True):
            part.grad = gradient.clone()
        ours, memory = stepper(ours, gradients, memory, torch.ones(2), torch.full((2,), step))
        optimizer.step()
    torch.testing.assert_close(ours, torch.cat(theirs, 1).detach())
