"""Ways to turn images of one class into another's in a model's eyes, and to say how far that is.

A class distance (MOTH, DECK) is the least change that flips most images of one class to another; hardening
enlarges it with the very images that such a search generates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from untrojan.inversion.additive import FlippingPattern
from untrojan.inversion.engine import Adam, ImageProblem, Problem, Stepper
from untrojan.inversion.feature_space import PAPER_WEIGHTS, FeatureSpacePattern, LossWeights
from untrojan.inversion.filters import FilterMatrix
from untrojan.inversion.masked import MaskedPattern
from untrojan.inversion.warping import SmoothWarp

if TYPE_CHECKING:
    from untrojan.models.decoders import Decoder
    from untrojan.models.encoders import Encoder
    from untrojan.models.precision import Precision


class Generator(Protocol):
    """A kind of trigger, and how far it moves an image."""

    @property
    def stepper(self) -> Stepper: ...

    @property
    def cost(self) -> float:
        """What a unit of the problem's size adds to the loss to begin with."""
        ...

    def problem(self, seed: int) -> Problem:
        """The search for it; another seed sets out from another place."""
        ...

    def moved(self, problem: Problem, parameters: Tensor, images: Tensor) -> Tensor:
        """(A, n): how far each pair's transformation moves each of its images (A, n, C, H, W) in [0, 1]."""
        ...


@dataclass(frozen=True)
class MaskGenerator:
    """Neural Cleanse's trigger; the distance is the mask's L1 norm, in pixels: MOTH's."""

    stepper: Stepper = field(default_factory=lambda: Adam(0.1, (0.5, 0.9)))
    cost: float = 1e-3

    def problem(self, seed: int) -> MaskedPattern:
        return MaskedPattern(seed)

    def moved(self, problem: Problem, parameters: Tensor, images: Tensor) -> Tensor:
        return problem.size(parameters)[:, None].expand(-1, images.shape[1])


@dataclass(frozen=True, eq=False)
class FilterGenerator:
    """ABS's filter; the distance is the mean squared change of a pixel after clipping, in squared grey levels
    (0 to 255)."""

    moments: Tensor
    """Of the images at hand: :func:`untrojan.inversion.filters.second_moments`."""
    window: int = 11
    stepper: Stepper = field(default_factory=lambda: Adam(0.01, (0.5, 0.9)))
    cost: float = 1e-4

    def problem(self, seed: int) -> FilterMatrix:
        return FilterMatrix(self.moments, self.window, seed)

    def moved(self, problem: Problem, parameters: Tensor, images: Tensor) -> Tensor:
        return 255**2 * (problem.embed(parameters, images) - images).square().flatten(2).mean(2)


@dataclass(frozen=True)
class AdditiveGenerator:
    """One pattern added to all images; the distance is its L2 norm, of pixels in [0, 1]."""

    stepper: Stepper = field(default_factory=lambda: Adam(0.01, (0.5, 0.9)))
    cost: float = 1e-2

    def problem(self, seed: int) -> FlippingPattern:
        return FlippingPattern()

    def moved(self, problem: Problem, parameters: Tensor, images: Tensor) -> Tensor:
        return problem.size(parameters)[:, None].expand(-1, images.shape[1])


@dataclass(frozen=True)
class WarpGenerator:
    """A smooth warping; the distance is the control points' mean squared displacement, in squared pixels."""

    points: int = 4
    stepper: Stepper = field(default_factory=lambda: Adam(0.1, (0.5, 0.9)))
    cost: float = 1e-2

    def problem(self, seed: int) -> SmoothWarp:
        return SmoothWarp(self.points, seed)

    def moved(self, problem: Problem, parameters: Tensor, images: Tensor) -> Tensor:
        return problem.size(parameters)[:, None].expand(-1, images.shape[1])


@dataclass(frozen=True, eq=False)
class FeatureGenerator:
    """DECK's transformation of an encoder's features; the distance is their mean squared change, in squared
    pixel levels (section III)."""

    encoder: Encoder
    decoder: Decoder
    regions: int = 4
    kernel: int = 3
    precision: Precision = "float32"
    """Of the search, as of the model that is searched."""
    weights: LossWeights = PAPER_WEIGHTS
    stepper: Adam = field(default_factory=lambda: Adam(1e-3, (0.5, 0.9)))
    cost: float = 1e-2
    relative: bool = False

    def problem(self, seed: int) -> FeatureSpacePattern:
        return FeatureSpacePattern(
            self.encoder, self.decoder, regions=self.regions, kernel=self.kernel, seed=seed,
            precision=self.precision, weights=self.weights, relative=self.relative,
        )  # fmt: skip

    def moved(self, problem: Problem, parameters: Tensor, images: Tensor) -> Tensor:
        assert isinstance(problem, ImageProblem)
        return problem.measure(parameters, images, problem.embed(parameters, images))[1]
