"""Theorem 3.3 of NONE, on a net whose backdoor is exact by construction.

Wang et al., "Training with More Confidence" (NeurIPS 2022), section 3.1: with a trigger (m, t) whose attack
is complete (always works) and precise (no other trigger works), the backdoor's region is one and only one
hyperplane, Ax = b with A = diag(m) and b = At.

What is checked, for inputs in the unit cube, which is what images are, and binary masks:

- the stamped inputs are the points of that hyperplane (an affine subspace of as many dimensions as the mask
  leaves free), no more and no fewer, and stamping is the projection onto it;
- the hyperplane lies in the target's decision region (complete);
- a trigger on the same pixels with other values, or on fewer of them, leaves points that do not go to the
  target (precise), so its hyperplane is no backdoor region: the one is the only one among triggers;
- the detecting neuron sits on one side of ReLU's bend on the hyperplane and on the other away from it.

What is not: "no other" in the strict sense is out of any continuous net's reach. Around the hyperplane a slab
answers with the target, too, so triggers a hair away from t work as well: the last test shows that it is as
thin as it is built. Nor is the theorem's converse tested, or anything said of trained nets, whose attacks
are neither complete nor precise, or of regions that are no trigger's.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

PIXELS, CLASSES, TARGET = 12, 3, 0


class PerfectPatch(nn.Module):
    """A small ReLU net with a backdoor: within ``width`` (L1) of its trigger, the target."""

    def __init__(self, mask: Tensor, trigger: Tensor, width: float, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.benign_in = torch.randn(16, PIXELS, generator=random)
        # The trigger's pixels carry nothing benign.
        self.benign_in[:, mask.bool()] = 0
        self.benign_out = torch.randn(CLASSES, 16, generator=random)
        # The benign part never says the target, so that only the backdoor does.
        self.benign_out[TARGET] = -1.0
        self.benign_out[1:] = self.benign_out[1:].abs()
        self.mask, self.trigger, self.width = mask, trigger, width

    def detector(self, x: Tensor) -> Tensor:
        """Before ReLU: 1 on the hyperplane, 0 or below where ``width`` or further from it, (N,)."""
        away = (x - self.trigger).relu() + (self.trigger - x).relu()
        return 1 - (self.mask * away).sum(1) / self.width

    def forward(self, x: Tensor) -> Tensor:
        benign = (x @ self.benign_in.T).relu() @ self.benign_out.T + torch.tensor([-1.0, 0.0, 0.0])
        # More than benign logits can differ by in the unit cube.
        most = float(self.benign_in.abs().sum() * self.benign_out.abs().max() * 2 + 10)
        return benign + most * self.detector(x).relu()[:, None] * nn.functional.one_hot(
            torch.tensor(TARGET), 3
        )


def stamp(x: Tensor, mask: Tensor, trigger: Tensor) -> Tensor:
    return (1 - mask) * x + mask * trigger


@st.composite
def cases(draw: st.DrawFn) -> tuple[PerfectPatch, Tensor]:
    masked = draw(st.sets(st.integers(0, PIXELS - 1), min_size=2, max_size=PIXELS - 2))
    mask = torch.zeros(PIXELS)
    mask[list(masked)] = 1
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    trigger = torch.rand(PIXELS, generator=random)
    x = torch.rand(64, PIXELS, generator=random)
    return PerfectPatch(mask, trigger, draw(st.sampled_from([0.01, 0.1])), draw(st.integers(0, 99))), x


@settings(max_examples=40, deadline=None)
@given(cases())
def test_stamping_is_the_projection_onto_the_hyperplane_and_it_is_the_targets(
    case: tuple[PerfectPatch, Tensor],
) -> None:
    net, x = case
    a, b = torch.diag(net.mask), net.mask * net.trigger
    stamped = stamp(x, net.mask, net.trigger)
    torch.testing.assert_close(stamped @ a.T, b.expand_as(x))
    # Every point of the hyperplane is a stamped input: itself, stamped.
    assert torch.equal(stamp(stamped, net.mask, net.trigger), stamped)
    # The nearest point of the hyperplane: what is moved is orthogonal to what is free.
    free = (1 - net.mask) * torch.randn(PIXELS, generator=torch.Generator().manual_seed(0))
    assert float(((x - stamped) @ free).abs().max()) < 1e-5
    assert (net(stamped).argmax(1) == TARGET).all()


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 2**20))
def test_no_other_trigger_is_complete(case: tuple[PerfectPatch, Tensor], seed: int) -> None:
    net, x = case
    random = torch.Generator().manual_seed(seed)
    others = (net.trigger + net.mask * (0.2 + 0.3 * torch.rand(PIXELS, generator=random))) % 1.0
    assert (net(stamp(x, net.mask, others)).argmax(1) != TARGET).all()
    fewer = net.mask.clone()
    fewer[int(net.mask.nonzero()[0])] = 0
    far = x.clone()
    far[:, net.mask.bool()] = (net.trigger[net.mask.bool()] + 0.5) % 1.0
    assert (net(stamp(far, fewer, net.trigger)).argmax(1) != TARGET).all()


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_detecting_neuron_is_linear_on_the_hyperplane_and_silent_off_it(
    case: tuple[PerfectPatch, Tensor],
) -> None:
    net, x = case
    assert (net.detector(stamp(x, net.mask, net.trigger)) > 0.99).all()
    away = ((x - net.trigger).abs() * net.mask).sum(1) > net.width
    assert (net.detector(x)[away] <= 0).all()


def test_a_continuous_nets_region_is_a_slab_as_thin_as_it_is_built() -> None:
    mask = torch.zeros(PIXELS)
    mask[:3] = 1
    trigger, x = (
        torch.full((PIXELS,), 0.5),
        torch.rand(64, PIXELS, generator=torch.Generator().manual_seed(1)),
    )
    for width in (0.3, 0.03, 0.003):
        net = PerfectPatch(mask, trigger, width, 0)
        shift = torch.zeros(PIXELS)
        shift[0] = width
        assert (net(stamp(x, mask, trigger + 0.02 * shift)).argmax(1) == TARGET).all()
        assert (net(stamp(x, mask, trigger + 1.01 * shift)).argmax(1) != TARGET).all()
