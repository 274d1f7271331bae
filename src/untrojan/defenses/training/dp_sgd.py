"""DP-SGD: no image moves the model far, so a few poisoned ones plant no backdoor. Its price is accuracy.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016; against poisoning Hong et al., "On the
Effectiveness of Mitigating Data Poisoning Attacks with Gradient Shaping", 2020. Runs on Opacus, the extra
``privacy``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Interval
from torch import nn

from untrojan.data.image_set import ImageSet
from untrojan.defenses.training.report import TrainingReport
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.models.registry import GROUP_NORM, build_for
from untrojan.seeding import generator
from untrojan.training.loop import OptimizerWrapper, train
from untrojan.training.recipe import Recipe

STEPS = "private_steps"
"""Key in the optimizer's own state, so that a resumed run draws the noise it would have drawn."""


def private(clip: float, noise: float, batch_size: int, seed: int) -> OptimizerWrapper:
    """Each step's gradient becomes (sum over the batch of clip(g_i, ``clip``) + N(0, ``noise``^2)) / B.

    ``clip`` bounds each image's gradient in l2 norm over all weights; ``noise`` is the standard deviation of
    what is added to every coordinate of the sum; B is ``batch_size``, also for a last, smaller batch. The
    noise of a step follows from ``seed`` and the step's number.
    """
    from opacus.optimizers import DPOptimizer

    class Private(DPOptimizer):  # type: ignore[misc,unused-ignore]
        def add_noise(self) -> None:
            group = self.param_groups[0]
            number = group.get(STEPS, 0)
            self.generator = torch.Generator(group["params"][0].device)
            self.generator.manual_seed(generator(seed, "privacy", number).initial_seed())
            group[STEPS] = number + 1
            super().add_noise()

    def wrap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return Private(
            optimizer, noise_multiplier=noise / clip, max_grad_norm=clip, expected_batch_size=batch_size
        )

    return wrap


@contextmanager
def per_sample_gradients(model: Classifier) -> Iterator[None]:
    """Inside, a backward pass of a mean loss leaves each image's gradient in ``weight.grad_sample``.

    Raises UntrojanError where a layer of the network does not allow it: one with statistics of its own, or
    one that a forward pass goes round.
    """
    from opacus.grad_sample import GradSampleModule

    # Its optimizer writes gradients in the default layout, and a fused step takes weights to be in theirs.
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    try:
        hooks = GradSampleModule(model.network)
    except NotImplementedError as error:
        raise UntrojanError(_refusal(model, str(error))) from None
    # It reads a convolution's input by strides that only that layout has: others give wrong gradients.
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    layouts = [each.register_forward_pre_hook(_contiguous) for each in convolutions]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        hooks.remove_hooks()
        for handle in layouts:
            handle.remove()
        for weight in model.parameters():
            for name in ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample"):
                if hasattr(weight, name):
                    delattr(weight, name)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _contiguous(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return arguments[0].contiguous(), *arguments[1:]


def privacy_spent(noise_multiplier: float, share: float, steps: int, delta: float) -> float | None:
    """Epsilon at ``delta`` after so many steps on batches that hold ``share`` of the set; None: unbounded.

    By Renyi accounting (Mironov 2017) as if every batch were drawn anew with each image in it by chance. The
    training loop deals out a shuffled set instead, so the figure is the customary one and no proof.
    """
    from opacus.accountants import RDPAccountant

    if noise_multiplier == 0:
        return None
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, min(share, 1.0), steps)]
    with warnings.catch_warnings():
        # Of orders at the end of its list: epsilon is then a bound that could be tighter.
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta=delta))


@dataclass(frozen=True)
class DPSGD:
    """Training with per-sample clipping and Gaussian noise.

    NONE's setting 1 is ``clip`` 4 and ``noise`` .1 (the default), setting 2 is 1 and .5. Whether its noise is
    a standard deviation or a multiple of ``clip`` is not said; Hong et al.'s code, which it follows, divides
    the noise by the clip before a library multiplies it again: a standard deviation, the default here.

    Runs in float32. Memory holds a gradient of all weights for every image of a batch. Batch norm, which
    mixes images, becomes group norm: the model's ``architecture`` then ends in ``+group-norm``.
    """

    clip: Annotated[float, Gt(0)] = 4.0
    """C: largest l2 norm of one image's gradient."""
    noise: Annotated[float, Ge(0)] = 0.1
    noise_is_multiplier: bool = False
    """Whether the standard deviation is ``noise`` times ``clip``, as libraries have it."""
    batch_size: Annotated[int, Gt(1)] | None = 256
    """None: the recipe's. Neither paper states it, nor the next."""
    learning_rate: Annotated[float, Gt(0)] | None = 0.01
    """None: the recipe's."""
    delta: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """At which epsilon is reported; None: one over the number of images."""
    seed: int = 0

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on the sum of a batch's clipped gradients."""
        return self.noise * self.clip if self.noise_is_multiplier else self.noise

    def __call__(
        self, data: ImageSet, architecture: str, recipe: Recipe, *, checkpoint: Path | None = None,
        device: str = "cpu",
    ) -> TrainingReport:  # fmt: skip
        """Train a new classifier on all of ``data``. Raises UntrojanError as training does, where Opacus is
        missing, and for networks with layers that have no gradient of each image's own."""
        require_opacus()
        model = build_for(data, architecture, seed=self.seed)
        batch_norms = sum(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in model.modules())
        if batch_norms:
            model = build_for(data, architecture + GROUP_NORM, seed=self.seed)
        model = model.to(device)
        private_recipe = replace(
            recipe, precision="float32", batch_size=self.batch_size or recipe.batch_size,
            learning_rate=self.learning_rate or recipe.learning_rate,
        )  # fmt: skip
        batch = private_recipe.batch_size
        with per_sample_gradients(model):
            _try_out(model, data)
            history = train(
                model, data, private_recipe, seed=self.seed, checkpoint=checkpoint, method=str(self),
                description="training with DP-SGD",
                wrap_optimizer=private(self.clip, self.deviation, batch, self.seed),
            )  # fmt: skip
        steps = recipe.epochs * -(-len(data) // batch)
        evidence = self._evidence(steps, batch, len(data)) | {
            "batch_norms_replaced": batch_norms,
            "architecture": model.architecture,
            "notes": _notes(batch_norms),
        }
        dropped = torch.zeros(len(data), dtype=torch.bool)
        return TrainingReport(model, dropped, history.to_json(), evidence)

    def _evidence(self, steps: int, batch: int, images: int) -> dict[str, Any]:
        delta = self.delta or 1 / images
        return {
            "clip": self.clip,
            "noise_standard_deviation": self.deviation,
            "noise_multiplier": self.deviation / self.clip,
            "steps": steps,
            "batch_size": batch,
            "epsilon": privacy_spent(self.deviation / self.clip, batch / images, steps, delta),
            "delta": delta,
        }


def require_opacus() -> None:
    """Raise UntrojanError with the command that installs Opacus where it cannot be imported."""
    try:
        import opacus  # noqa: F401
    except ImportError:
        raise UntrojanError("DP-SGD needs Opacus: pip install 'untrojan[privacy]'") from None


def _notes(batch_norms: int) -> list[str]:
    notes = ["epsilon is reckoned as if batches were drawn by chance; they were dealt out of a shuffled set"]
    if batch_norms:
        notes.insert(0, f"{batch_norms} batch norms, which mix the images of a batch, became group norms")
    return notes


def _try_out(model: Classifier, data: ImageSet) -> None:
    """Two images forth and back, so that what cannot work is known before an hour is spent on it."""
    with torch.random.fork_rng(devices=[]):
        model.train()
        logits = model.network((data.images[:2].to(model.device) / 255 - model.mean) / model.std)
        logits.square().mean().backward()
    for path, weight in model.named_parameters():
        if weight.requires_grad and getattr(weight, "grad_sample", None) is None:
            raise UntrojanError(_refusal(model, f"no image has a gradient of {path}"))
        weight.grad = weight.grad_sample = None  # type: ignore[attr-defined]


def _refusal(model: Classifier, why: str) -> str:
    return f"DP-SGD cannot train {model.architecture}: {' '.join(why.split())[:200]}: choose another net"
