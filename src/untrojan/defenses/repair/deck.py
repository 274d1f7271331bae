"""DECK: harden a model against pervasive backdoors, by enlarging the change of features between classes.

Tao et al., "DECK: Model Hardening for Defending Pervasive Backdoors", sections IV and V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.hardener import Turn
from untrojan.defenses.repair.hardening import Hardening
from untrojan.errors import UntrojanError
from untrojan.inversion.engine import Adam
from untrojan.inversion.feature_space import PAPER_WEIGHTS, STATISTICS, LossWeights
from untrojan.inversion.filters import second_moments
from untrojan.inversion.generators import (
    AdditiveGenerator,
    FeatureGenerator,
    FilterGenerator,
    Generator,
    MaskGenerator,
    WarpGenerator,
)
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.decoders import Upsampling, prepare_decoder
from untrojan.models.layers import bearable_rate

_BESIDE: Mapping[str, Callable[[ImageSet], Generator]] = {
    "warping": lambda clean: WarpGenerator(),
    "filter": lambda clean: FilterGenerator(second_moments(to_float(clean.images))),
    "mask": lambda clean: MaskGenerator(),
    "additive": lambda clean: AdditiveGenerator(),
}


@dataclass(frozen=True)
class DECK(Hardening):
    """:mod:`untrojan.defenses.repair.hardening` with DECK's feature-space generator.

    D is the features' mean squared change. The paper searches for changes of features alone and trains with
    the labels alone. That left most of a strong WaNet and much of Invisible, so by default there are four
    things besides that are ours: every other of those searches sets out from the images themselves
    (``relative``); warpings, filters and patches are searched for as well (``beside``); the warm-up searches
    more than once and stamps several kinds in each of its steps (``opening``, ``mixed``); and what the
    given model says of images without triggers is taught (``taught``, ``pasted``).
    ``relative=(False, False)``, ``beside=()``, ``opening=()``, ``mixed=1``, ``taught=0``, ``pasted=0``
    and ``learning_rate=2e-3`` leave them out.

    Raises UntrojanError, besides, where the encoder is not to be had or no good enough decoder for it can be
    trained on the clean images, and where there are not as many search rates as costs.
    """

    encoder: str = "local"
    """A name of :func:`untrojan.models.encoders.load_encoder`. ``vgg`` is the paper's; ``local`` needs
    nothing but the clean images. A decoder for it is taken from the cache where there is one."""
    regions: Annotated[int, Ge(1)] = 4
    """z: a map is cut into z x z regions. Not stated in the paper."""
    kernel: Annotated[int, Ge(1)] = 3
    """m, odd. Not stated in the paper."""
    upsampling: Upsampling = "gaussian"
    """The decoder's; the others are table X's."""
    weights: LossWeights = PAPER_WEIGHTS
    """Of what the search keeps small."""
    search_rates: tuple[Annotated[float, Gt(0)], ...] = (1e-2, 1e-3)
    """Adam's for kernels, from period to period by turns. Not stated in the paper. Long strides come upon
    strong patterns such as SIG's stripes, short ones upon the small changes of a filter."""
    costs: tuple[Annotated[float, Gt(0)], ...] = (1e-4, 1e-2)
    """alpha of equation 11 to begin with, by the same turns; a pair's later steps have ten times as much. Not
    stated in the paper."""
    relative: tuple[bool, ...] = (False, True)
    """Whether triggers set out from the images themselves, by the same turns:
    :attr:`~untrojan.inversion.feature_space.FeatureSpacePattern.relative`. The paper's never do. Either kind
    has a warm-up and a memory of its own. More than two searches may take turns."""
    opening: tuple[Literal["features", "relative", "warping", "filter", "mask", "additive"], ...] = (
        "features",
        "features",
        "additive",
        "additive",
        "additive",
    )
    """Further searches of the warm-up: of the given model, which answers to a backdoor as no later one does.
    Each sets out from a place of its own and adds a step for each class. ``features`` are the paper's,
    ``relative`` set out from the images themselves. A single search of features misses
    SIG's stripes now and then, and many then outlast hardening. Ours."""
    mixed: Annotated[int, Ge(1)] = 6
    """Of twelve kinds by default. One at a time, SIG comes back to a VGG between them; all twelve at once,
    to a ResNet."""
    beside: tuple[Literal["warping", "filter", "mask", "additive"], ...] = (
        "warping",
        "filter",
        "warping",
        "mask",
        "warping",
    )
    """Further searches that take their turns after those: for a smooth warping, for ABS's filter, for MOTH's
    patch, for a pattern that is added. They take a tenth of the time that features' do, so each looks for
    universal triggers, anew in every period. What is named more than once has as many memories: a backdoor
    answers to many warpings, and unlearning some leaves others. Ours."""
    stamped_beside: Annotated[float, Interval(gt=0, le=1)] = 0.3
    """Share of the batch's images that get those."""
    steps: Annotated[int, Ge(1)] = 120
    replayed: Annotated[float, Interval(ge=0, le=1)] = 0.2
    """The more, the sooner strong patterns are gone, and the more accuracy it costs."""
    averaging: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    taught: Annotated[float, Interval(ge=0, le=1)] = 0.8
    pasted: Annotated[float, Ge(0)] = 3.0
    """The less, the more accuracy hardening costs."""
    learning_rate: Annotated[float, Gt(0)] = 3e-2
    """Thirty times that of MOTH's code: at less, warpings outlast hardening. It takes what is taught besides
    the labels to bear it. A network without norm layers does not all the same, and is trained at a tenth: a
    NiN was at chance after these steps."""
    fast_steps: ClassVar[tuple[int, int, int]] = (100, 40, 12)

    def __post_init__(self) -> None:
        counts = [len(self.search_rates), len(self.costs), len(self.relative)]
        if not counts[0] or len(set(counts)) > 1:
            raise UntrojanError(
                "search_rates, costs and relative go by turns, so there must be as many of each: "
                f"{counts[0]}, {counts[1]} and {counts[2]} were given"
            )

    def rate(self, model: Classifier) -> float:
        return bearable_rate(self.learning_rate, model)

    def generator(self, model: Classifier, clean: ImageSet) -> FeatureGenerator:
        encoder, decoder = prepare_decoder(
            self.encoder, clean, upsampling=self.upsampling, seed=self.seed, device=str(model.device)
        )
        return FeatureGenerator(
            encoder, decoder, self.regions, self.kernel, model.precision, weights=self.weights,
            stepper=_stepper(self.search_rates[0]), cost=self.costs[0], relative=self.relative[0],
        )  # fmt: skip

    def by_turns(self, generator: Generator, clean: ImageSet) -> tuple[Turn, ...]:
        assert isinstance(generator, FeatureGenerator)
        turns = tuple(
            Turn(
                replace(generator, stepper=_stepper(rate), cost=cost, relative=relative),
                memory=int(relative != self.relative[0]),
            )
            for rate, cost, relative in zip(self.search_rates, self.costs, self.relative, strict=True)
        )
        kinds = len({turn.memory for turn in turns})
        others = (
            Turn(_BESIDE[name](clean), memory=kinds + place, universal=self.stamped_beside)
            for place, name in enumerate(self.beside)
        )
        return (*turns, *others)

    def opens(self, generator: Generator, clean: ImageSet) -> tuple[Generator, ...]:
        def named(name: str) -> Generator:
            if name not in ("features", "relative"):
                return _BESIDE[name](clean)
            assert isinstance(generator, FeatureGenerator)
            return replace(generator, relative=name == "relative")

        return tuple(named(name) for name in self.opening)

    def told(self, generator: Generator) -> dict[str, Any]:
        assert isinstance(generator, FeatureGenerator)
        encoder, decoder = generator.encoder, generator.decoder
        return {
            "encoder": encoder.name,
            "encoder_sha256": encoder.fingerprint(),
            "decoder_psnr": decoder.psnr,
        }


def _stepper(rate: float) -> Adam:
    """``rate`` is that of kernels."""
    return Adam(rate, (0.5, 0.9), leading=STATISTICS, leading_rate=1e-3)
