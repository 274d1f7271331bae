"""A pattern added to every image: RE's embedding, equation 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Additive:
    """clip(x + v) for one pattern v, the same on every image; differentiable in x and in v."""

    pattern: Tensor
    """float (C, H, W), in units of the pixel range [0, 1]; of either sign."""

    def __call__(self, images: Tensor) -> Tensor:
        return (images + self.pattern.to(images)).clamp(0, 1)

    def inverse(self) -> Additive:
        """The removal clip(x - v), which is exact wherever the embedding did not clip."""
        return Additive(-self.pattern)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"pattern": self.pattern}
