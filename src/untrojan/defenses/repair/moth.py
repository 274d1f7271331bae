"""MOTH: harden a model against patches, by enlarging the patch that each class needs to become another.

Tao et al., "Model Orthogonalization: Class Distance Hardening in Neural Networks for Better Security", S&P
2022.
"""

from __future__ import annotations

from dataclasses import dataclass

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.hardening import Hardening
from untrojan.inversion.generators import MaskGenerator
from untrojan.models.classifier import Classifier


@dataclass(frozen=True)
class MOTH(Hardening):
    """:mod:`untrojan.defenses.repair.hardening` with Neural Cleanse's masks; D is their L1 norm."""

    def generator(self, model: Classifier, clean: ImageSet) -> MaskGenerator:
        return MaskGenerator()
