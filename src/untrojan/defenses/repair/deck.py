"""DECK: harden a model against pervasive backdoors, by enlarging the change of features between classes.

Tao et al., "DECK: Model Hardening for Defending Pervasive Backdoors", sections IV and V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Interval

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.hardening import Hardening
from untrojan.inversion.engine import Adam
from untrojan.inversion.feature_space import PAPER_WEIGHTS, LossWeights
from untrojan.inversion.generators import FeatureGenerator, Generator
from untrojan.models.classifier import Classifier
from untrojan.models.decoders import Upsampling, prepare_decoder


@dataclass(frozen=True)
class DECK(Hardening):
    """:mod:`untrojan.defenses.repair.hardening` with DECK's feature-space generator.

    D is the features' mean squared change. Raises UntrojanError, besides, where the encoder is not to be had
    or no good enough decoder for it can be trained on the clean images.
    """

    stamped: Annotated[float, Interval(gt=0, le=1)] = 0.5
    """Not stated in the paper; a tenth, as in MOTH, is a single image of a class in each step."""
    encoder: str = "local"
    """A name of :func:`untrojan.models.encoders.load_encoder`. ``vgg`` is the paper's; ``local`` needs
    nothing but the clean images. A decoder for it is taken from the cache where there is one."""
    regions: Annotated[int, Ge(1)] = 8
    """z: a map is cut into z x z regions. Not stated in the paper."""
    kernel: Annotated[int, Ge(1)] = 3
    """m, odd. Not stated in the paper."""
    upsampling: Upsampling = "gaussian"
    """The decoder's; the others are table X's."""
    weights: LossWeights = PAPER_WEIGHTS
    """Of what the search keeps small."""
    search_rate: Annotated[float, Gt(0)] = 1e-2
    """Adam's, in the search for a transformation. Not stated in the paper."""
    cost: Annotated[float, Gt(0)] = 1e-4
    """alpha of equation 11 to begin with; a pair's later steps have ten times as much. Not stated in the
    paper. At 1e-2 a search ends with faint changes of many kinds before it comes upon a backdoor as strong as
    SIG's stripes, and hardening leaves it in; at 1e-4, and with costs of both kinds by turns, half of a
    filter's stays."""
    cost_spread: Annotated[float, Ge(1)] = 100.0
    steps: Annotated[int, Ge(1)] = 150
    replayed: Annotated[float, Interval(ge=0, le=1)] = 0.25
    fast_steps: ClassVar[tuple[int, int, int]] = (100, 30, 10)

    def generator(self, model: Classifier, clean: ImageSet) -> FeatureGenerator:
        encoder, decoder = prepare_decoder(
            self.encoder, clean, upsampling=self.upsampling, seed=self.seed, device=str(model.device)
        )
        return FeatureGenerator(
            encoder, decoder, self.regions, self.kernel, model.precision, weights=self.weights,
            stepper=Adam(self.search_rate, (0.5, 0.9)), cost=self.cost,
        )  # fmt: skip

    def told(self, generator: Generator) -> dict[str, Any]:
        assert isinstance(generator, FeatureGenerator)
        encoder, decoder = generator.encoder, generator.decoder
        return {
            "encoder": encoder.name,
            "encoder_sha256": encoder.fingerprint(),
            "decoder_psnr": decoder.psnr,
        }
