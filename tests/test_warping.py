"""Warping as a trigger that is searched for: shifts by hand, WaNet's own warping, and a bar to be moved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from untrojan.data.image_set import ImageSet, numbered
from untrojan.inversion.engine import Schedule, Shrink, invert
from untrojan.inversion.generators import WarpGenerator
from untrojan.inversion.warping import SmoothWarp
from untrojan.models.classifier import Classifier
from untrojan.seeding import generator
from untrojan.triggers.warp import Warp


def test_a_shift_takes_every_pixel_from_its_neighbour_and_the_border_from_itself() -> None:
    images = torch.rand(2, 3, 1, 9, 7, generator=torch.Generator().manual_seed(0))
    shifts = torch.zeros(2, 2, 4, 4)
    shifts[1, 0] = 1.0
    moved = SmoothWarp().embed(shifts, images)
    torch.testing.assert_close(moved[0], images[0], atol=1e-5, rtol=0)
    expected = images[1][..., torch.tensor([1, 2, 3, 4, 5, 6, 6])]
    torch.testing.assert_close(moved[1], expected, atol=1e-5, rtol=0)
    assert SmoothWarp().size(shifts).tolist() == [0.0, 1.0]


def test_wanets_own_warping_is_one_of_them() -> None:
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    warping = Warp(strength=2.0).draw((3, 32, 32), seed=3)
    field = torch.rand(1, 2, 4, 4, generator=generator(3, "warp")) * 2 - 1
    field = field / field.abs().mean()
    parameters = 2.0 * field / 32 * (31 / 2)
    torch.testing.assert_close(
        SmoothWarp().embed(parameters, images[None])[0], warping(images), atol=1e-5, rtol=0
    )


class _Centre(nn.Module):
    """Class 1 where the light's centre lies right of column 15."""

    def forward(self, images: Tensor) -> Tensor:
        columns = torch.arange(32.0) - 15
        right = (images * columns).sum((1, 2, 3)) / images.sum((1, 2, 3))
        return torch.stack([-right, right], 1)


def test_a_bar_is_moved_to_the_other_side_by_little_more_than_it_must() -> None:
    labels = torch.arange(20) % 2
    images = torch.zeros(20, 1, 32, 32, dtype=torch.uint8)
    images[labels == 0, :, :, 12] = 200
    images[labels == 1, :, :, 18] = 200
    data = ImageSet(images, labels, ("left", "right"), numbered(20))
    model = Classifier(_Centre(), 2, torch.zeros(1), torch.ones(1))
    ways = WarpGenerator()
    schedule = Schedule(
        ways.stepper, 8, 0.9, most_steps=200, shrink=Shrink(ways.cost, look_every=2, patience=3)
    )
    pairs, problem = torch.tensor([[0, 1], [1, 0]]), ways.problem(0)
    found = invert(model, data, pairs, problem, schedule, seed=0)
    assert found.solved.tolist() == [True, True]
    # Three pixels all over would do; but only what lies about the bar has to move.
    sizes = problem.size(found.parameters)
    assert bool((sizes < 3.0**2).all())
    assert bool((sizes > 0.5).all())
    shown = data.images.float() / 255
    moved = problem.embed(found.parameters, torch.stack([shown[labels == 0], shown[labels == 1]]))
    assert (model(moved[0]).argmax(1) == 1).float().mean() >= 0.9
    assert (model(moved[1]).argmax(1) == 0).float().mean() >= 0.9
    torch.testing.assert_close(
        ways.moved(problem, found.parameters, torch.zeros(2, 3, 1, 32, 32)), sizes[:, None].expand(2, 3)
    )
