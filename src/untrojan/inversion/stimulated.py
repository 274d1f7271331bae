"""ABS's inversion: a small patch, or a filter, that excites one inner channel and, with it, one class.

Liu et al., "ABS: Scanning Neural Networks for Back-doors by Artificial Brain Stimulation", CCS 2019, sections
4.3 and 5.5, with the constants of its released forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from untrojan.inversion.filters import FilterMatrix
from untrojan.models.classifier import Classifier
from untrojan.models.taps import NAMED_LEVELS, Taps, tapped

Released = Literal["pytorch", "tensorflow"]

OTHERS = 1e-4
"""Weight of the other channels' activations."""
FILTER_EXCITEMENT, FILTER_OTHERS = 0.01, 1e-5
"""The same of a filter's search, and the weight of all activations there."""
COUNTED = 0.01
"""Mask value above which a pixel counts against the size bound while searching."""
OPAQUE = 0.1
"""Mask value above which a pixel belongs to the final patch: the released code's mask^2 > .01."""
_AT_REST = 4.0
"""Where the masks' parameters start, beneath tanh: a mask of .9997 inside the first square, .0003 outside."""

LEVEL, CHANNEL, SIZE = 2, 3, 4
"""Columns of a pair past source and target: the level's index, its channel, the bound in pixels."""


@dataclass(frozen=True, eq=False)
class _Stimulated:
    """What the search for a channel's trigger sees of the network's inside."""

    levels: tuple[str, ...]
    _watched: list[Taps] = field(default_factory=list, init=False, repr=False)

    @property
    def needs_every_module(self) -> bool:
        return not set(self.levels) <= set(NAMED_LEVELS)

    @contextmanager
    def watching(self, model: Classifier) -> Iterator[None]:
        with tapped(model, self.levels) as taps:
            self._watched.append(taps)
            try:
                yield
            finally:
                self._watched.pop()

    def _activations(self, count: int, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Of each pair's level, summed over images and places: its own channel's, and all channels', (A,)."""
        taps = self._watched[-1]
        own, every = [], []
        # A few levels; a level's every pair at once.
        for index, level in enumerate(self.levels):
            features = taps[level].unflatten(0, (count, -1))
            by_channel = features.flatten(3).sum((1, 3)) if features.ndim > 3 else features.sum(1)
            here = pairs[:, LEVEL] == index
            chosen = torch.where(here, pairs[:, CHANNEL], 0)
            own.append(here * by_channel.gather(1, chosen[:, None])[:, 0])
            every.append(here * by_channel.sum(1))
        return torch.stack(own).sum(0), torch.stack(every).sum(0)


@dataclass(frozen=True, eq=False)
class StimulatedPattern(_Stimulated):
    """x' = (1 - m) x + m p: an :class:`~untrojan.inversion.engine.Problem`.

    The loss is -(activation) + 1e-4 (others' activations) - (target's logit), summed over a pair's images,
    and a penalty on the mask.

    Pairs are (P, 5), see :data:`LEVEL`; parameters (P, 1 + C, H, W), mask and pattern beneath tanh. Levels
    of one network are watched together: candidates of all layers share a forward. Both released forms take
    the activation before and after ReLU; here it is what the level gives. The PyTorch form weighs the logit
    three times as much in the second half of the search and moves nothing in the first epoch; here neither.
    """

    lowest: Tensor
    """(C,): the pattern's least values, in pixels of [0, 1]."""
    highest: Tensor
    penalty: Released = "pytorch"
    """``pytorch``: .01 times the mask's sum within the bound, 50 above it, 100 above 1.2 times it.
    ``tensorflow``: 500 above it, 1,000 above (sqrt(bound) + 2)^2."""
    seed_size: float = 0.8
    """The first square's side as a share of the bound's square root."""
    both_sides: ClassVar[bool] = False

    def initial(self, pairs: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        """Masks: squares to the lower right of the centre, as large as fits there; patterns: mid-range."""
        channels, height, width = image_shape
        parameters = torch.zeros(len(pairs), 1 + channels, height, width)
        sides = (pairs[:, SIZE].double().sqrt() * self.seed_size).long().clamp_min(1)
        rows, columns = (
            (torch.arange(extent) >= first[:, None]) & (torch.arange(extent) < (first + sides)[:, None])
            for extent in (height, width)
            for first in ((extent - sides).clamp_max(extent // 2).clamp_min(0),)
        )
        inside = rows[:, :, None] & columns[:, None, :]
        parameters[:, 0] = torch.where(inside, _AT_REST, -_AT_REST)
        return parameters

    def views(self, parameters: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        masks, patterns = self._soft(parameters)
        return (1 - masks[:, None]) * sources + (masks * patterns)[:, None]

    def loss(self, logits: Tensor, parameters: Tensor, pairs: Tensor) -> Tensor:
        wanted = logits.gather(2, pairs[:, 1, None, None].expand(-1, logits.shape[1], 1)).sum((1, 2))
        own, every = self._activations(len(pairs), pairs)
        return -own + OTHERS * (every - own) + self._penalty(parameters, pairs[:, SIZE]) - wanted

    def _penalty(self, parameters: Tensor, bound: Tensor) -> Tensor:
        masks = self._soft(parameters)[0].flatten(1)
        used = (masks > COUNTED).sum(1)
        if self.penalty == "tensorflow":
            weight = 500.0 * (used > bound) * (1 + (used > (bound.double().sqrt() + 2).square()))
        else:
            weight = torch.where(used > bound, 50.0, 0.01) * (1 + (used > 1.2 * bound))
        return weight * masks.sum(1)

    def embed(self, parameters: Tensor, images: Tensor) -> Tensor:
        """The patch as it would be stamped: opaque, see :data:`OPAQUE`."""
        masks, patterns = self._soft(parameters)
        masks = (masks > OPAQUE).to(images)
        return (1 - masks[:, None]) * images + (masks * patterns)[:, None]

    def size(self, parameters: Tensor) -> Tensor:
        """Pixels of the opaque patches."""
        return (self._soft(parameters)[0] > OPAQUE).flatten(1).sum(1).float()

    def patches(self, parameters: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """Opaque masks (P, 1, H, W), of at most ``bounds`` (P,) pixels each, and patterns (P, C, H, W).

        Where the search has kept more pixels than it may, the most opaque stay.
        """
        masks, patterns = self._soft(parameters)
        flat = masks.flatten(1)
        rank = flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return ((flat > OPAQUE) & (rank < bounds[:, None])).to(masks).view_as(masks), patterns

    def _soft(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        values = parameters.tanh().add(1).div(2)
        lowest, highest = (each.to(values).view(-1, 1, 1) for each in (self.lowest, self.highest))
        return values[:, :1], lowest + (highest - lowest) * values[:, 1:]


@dataclass(frozen=True, eq=False)
class StimulatedFilter(_Stimulated):
    """A filter that excites a channel: an :class:`~untrojan.inversion.engine.Problem`.

    The loss is .01 (-(activation) + 1e-5 (others' activations)), the mean over a pair's images, and the cross
    entropy of the target. What is to be small is the filter's change of the images; the released code bounds
    the structural similarity in its place and has no term for the target.

    Pairs are (P, 4), see :data:`LEVEL`; parameters those of the filter.
    """

    filter: FilterMatrix
    both_sides: ClassVar[bool] = False

    def initial(self, pairs: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        return self.filter.initial(pairs, image_shape)

    def views(self, parameters: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        return self.filter.embed(parameters, sources)

    def loss(self, logits: Tensor, parameters: Tensor, pairs: Tensor) -> Tensor:
        own, every = self._activations(len(pairs), pairs)
        excitement = (own - FILTER_OTHERS * (every - own)) / logits.shape[1]
        return self.filter.loss(logits, parameters, pairs) - FILTER_EXCITEMENT * excitement

    def embed(self, parameters: Tensor, images: Tensor) -> Tensor:
        return self.filter.embed(parameters, images)

    def size(self, parameters: Tensor) -> Tensor:
        """Mean squared change of a pixel, in squared grey levels."""
        return self.filter.size(parameters)
