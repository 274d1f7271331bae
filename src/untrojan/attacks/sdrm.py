"""SDRM: training a backdoored model whose features of triggered images look clean.

Xia et al., "Enhancing Backdoor Attacks with Multi-Level MMD Regularization" (2022), first titled "A
Statistical Difference Reduction Method for Escaping Backdoor Detection". The attacker owns the training and
adds a term to its loss: the squared maximum mean discrepancy, at several levels of the network, between the
poisoned images' features and those of clean images of the target class (section 5, equation 4, algorithm 1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, MinLen
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.errors import UntrojanError
from untrojan.metrics.mmd import KernelName, mmd_squared
from untrojan.models.classifier import Classifier
from untrojan.models.taps import SDRM_LEVELS, tapped
from untrojan.training.loop import TrainingHistory, train
from untrojan.training.recipe import Recipe
from untrojan.triggers.base import Trigger, to_bytes

Form = Literal["paper", "released"]


@dataclass(frozen=True)
class PaperTrigger:
    """One of the paper's four attacks (table 1): a trigger and its settings."""

    trigger: str
    options: Mapping[str, Any] = field(default_factory=dict)


PAPER_TRIGGERS: Mapping[str, PaperTrigger] = {
    # Figure 2 shows a white square in the upper left; its side is not stated.
    "patched": PaperTrigger("patch", {"size": 3, "colour": "#ffffff", "place": "top-left"}),
    # The released code blends in a photograph, which is not public: uniform noise in its place.
    "blended": PaperTrigger("blend", {"alpha": 0.1}),
    "sig": PaperTrigger("sinusoid"),
    "warped": PaperTrigger("warp"),
}
PAPER_TARGET = 0
PAPER_RATE = 0.1


@dataclass(frozen=True, eq=False)
class InfectedSet:
    """What SDRM trains on: images that get their trigger only after augmentation, and which of them do."""

    train: ImageSet
    """Images without trigger, with the labels they are trained on."""
    own_labels: Tensor
    """int64 (N,): what each image truly shows. A batch's poisoned images are those labelled otherwise."""
    trigger: Trigger
    target: int
    poisoned: Tensor | None
    """bool (N,): the paper's fixed set U. None: drawn anew for every batch, as the released code does."""
    rate: float = PAPER_RATE
    """With ``poisoned`` None, the chance with which an image of a source class is poisoned in an epoch."""
    sources: tuple[int, ...] = ()
    """With ``poisoned`` None, the classes that are drawn from; never the target."""

    def __post_init__(self) -> None:
        if self.target in self.sources:
            raise UntrojanError(f"class {self.target} is the target and can't be a source too")
        if self.poisoned is not None and bool((self.own_labels[self.poisoned] == self.target).any()):
            raise UntrojanError("SDRM compares poisoned images with the target's own: poison other classes")

    def with_triggers(
        self, images: Tensor, labels: Tensor, rows: Tensor, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The training loop's hook: float (B, C, H, W) in [0, 1], labels and rows (B,); none is modified.

        Poisoned pixels are rounded to 8 bits, as those that the model will meet.
        """
        rows = rows.cpu()
        if self.poisoned is not None:
            which = self.poisoned[rows]
        else:
            drawn = torch.rand(len(rows), generator=random) < self.rate
            which = drawn & torch.isin(self.own_labels[rows], torch.tensor(self.sources))
        which = which.to(images.device)
        images, labels = images.clone(), labels.clone()
        images[which] = to_bytes(self.trigger(images[which])).float().div_(255)
        labels[which] = self.target
        return images, labels

    def fingerprint(self) -> str:
        """Of all but ``train``, whose own the training loop checks."""
        digest = hashlib.sha256(repr((self.target, self.rate, self.sources)).encode())
        tensors = [self.own_labels, self.poisoned, *(self.trigger.tensors[k] for k in self.trigger.tensors)]
        for tensor in tensors:
            digest.update(b"drawn anew" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class StatisticalDifferenceReduction:
    """SDRM, called on a model and an infected set.

    With ``levels`` all of ``s1``, ``s2``, ``s3`` it is the paper's SDRM-A, with ``s3`` alone SDRM-L, and with
    ``strength`` 0 its regular backdoor training (RBT).
    """

    strength: Annotated[float, Ge(0)] = 0.3
    """The paper's lambda, of 0, 0.1, 0.2 and 0.3."""
    levels: Annotated[tuple[str, ...], MinLen(1)] = SDRM_LEVELS
    """As :mod:`untrojan.models.taps` names them. Features are neither pooled nor normalised."""
    form: Form = "paper"
    """``paper``, algorithm 1: mean cross-entropy of the clean images + that of the poisoned ones + strength *
    *mean* over levels. ``released``: mean cross-entropy of the whole batch, of which the poisoned are a tenth
    or so, + strength * *sum* over levels, hence thrice as strong with three levels."""
    kernel: KernelName = "GMK2"
    """Of table 3."""

    def __call__(
        self,
        model: Classifier,
        infected: InfectedSet,
        recipe: Recipe,
        *,
        seed: int = 0,
        checkpoint: Path | None = None,
        description: str = "SDRM",
    ) -> TrainingHistory:
        """Train ``model`` in place, resumable from ``checkpoint``; see :func:`untrojan.training.loop.train`.

        The last weights are kept; the released code keeps those of the best epoch on clean images.
        Raises UntrojanError as ``train`` does and for a level that the network does not have.
        """
        features: Mapping[str, Tensor] = {}

        def loss(model: Classifier, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits = model(images)
            own = infected.own_labels[rows.cpu()].to(labels.device)
            smoothing = recipe.label_smoothing
            return sdrm_loss(logits, labels, own, features, infected.target, self, smoothing), logits

        with ExitStack() as stack:
            if self.strength:
                # Entered once for the whole run: looking for the levels costs a forward.
                features = stack.enter_context(tapped(model, self.levels))
            return train(
                model,
                infected.train,
                recipe,
                seed=seed,
                checkpoint=checkpoint,
                description=description,
                loss=loss,
                augmented_transform=infected.with_triggers,
                method=f"{self} {infected.fingerprint()}",
            )


def sdrm_loss(
    logits: Tensor,
    labels: Tensor,
    own_labels: Tensor,
    features: Mapping[str, Tensor],
    target: int,
    method: StatisticalDifferenceReduction,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss () of one batch, algorithm 1's lines 6 to 12.

    ``logits`` (B, K), ``labels`` as trained on and ``own_labels`` as the images show (B,), which differ
    exactly for the poisoned; ``features`` (B, ...) at each of the method's levels, unused at strength 0. A
    term with no images on one of its sides is zero.
    """
    poisoned = labels != own_labels
    if method.form == "released":
        value = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    else:
        parts = [part for part in (~poisoned, poisoned) if bool(part.any())]
        value = torch.stack(
            [F.cross_entropy(logits[part], labels[part], label_smoothing=label_smoothing) for part in parts]
        ).sum()
    if not method.strength:
        return value
    differences = feature_differences(
        [features[level] for level in method.levels], poisoned, own_labels == target, method
    )
    total = differences.sum() if method.form == "released" else differences.mean()
    return value + method.strength * total


def feature_differences(
    features: Sequence[Tensor], poisoned: Tensor, target_class: Tensor, method: StatisticalDifferenceReduction
) -> Tensor:
    """Biased squared MMD (L,) between poisoned and the target's own images in a batch, level by level.

    ``features`` are L tensors (B, ...), the masks bool (B,). Zero where a mask is empty.
    """
    attacked, own = poisoned.nonzero().flatten(), target_class.nonzero().flatten()
    if not (len(attacked) and len(own)):
        return torch.zeros(len(features), device=poisoned.device)
    rows = torch.cat([attacked, own])
    found = []
    for each in features:
        # One gather of the few rows, in the order in which the values lie: its gradient is then one tensor
        # of zeros of the same layout to add to the network's own, which is nearly all that this term costs.
        few = _as_it_lies(each).index_select(0, rows)
        found.append(mmd_squared(few[: len(attacked)], few[len(attacked) :], method.kernel))
    return torch.stack(found)


def _as_it_lies(feature: Tensor) -> Tensor:
    """A channels-last map with its channels last; distances do not depend on the order of values."""
    channels_last = feature.ndim == 4 and feature.is_contiguous(memory_format=torch.channels_last)
    return feature.permute(0, 2, 3, 1) if channels_last else feature
