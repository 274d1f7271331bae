"""The one training loop: victims, probes, retraining and every training defence run through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from untrojan.cost import NOTHING, measure, recall
from untrojan.data.augment import augment
from untrojan.data.image_set import ImageSet
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier
from untrojan.models.registry import build_for
from untrojan.progress import task
from untrojan.seeding import generator
from untrojan.training.recipe import Recipe

BatchLoss = Callable[[Classifier, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(model, float images, labels, row numbers in the set) -> scalar loss and logits (N, K)."""
BatchTransform = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(uint8 images, labels, generator) -> images and labels, before augmentation: a noise mode, say."""
AugmentedTransform = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(float images, labels, row numbers, generator) -> images and labels, after augmentation: a trigger that
must not be cropped or mirrored, say."""
AfterStep = Callable[[Classifier], None]
"""Called after each of the optimiser's steps: to keep weights in their range, say."""
OptimizerWrapper = Callable[[torch.optim.Optimizer], torch.optim.Optimizer]
"""The recipe's optimizer -> one that does more at each step and has the same state."""

CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class Epoch:
    """One pass over the data."""

    loss: float
    """Mean training loss."""
    accuracy: float
    """Share of training images predicted as labelled while they were trained on, 0..1."""
    learning_rate: float
    seconds: float


@dataclass
class TrainingHistory:
    """What happened, an entry an epoch."""

    epochs: list[Epoch] = field(default_factory=list)

    def to_json(self) -> list[dict[str, float]]:
        return [asdict(epoch) for epoch in self.epochs]


def train(
    model: Classifier,
    data: ImageSet,
    recipe: Recipe,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    description: str = "training",
    loss: BatchLoss | None = None,
    batch_transform: BatchTransform | None = None,
    augmented_transform: AugmentedTransform | None = None,
    method: str = "",
    freeze_statistics: bool = False,
    after_epoch: Callable[[int, Epoch], None] | None = None,
    after_step: AfterStep | None = None,
    state: Mapping[str, Tensor] | None = None,
    wrap_optimizer: OptimizerWrapper | None = None,
) -> TrainingHistory:
    """Train ``model`` in place and leave it in evaluation mode.

    Every random choice of a step depends on the seed and the step's number alone, so a run that resumes
    from ``checkpoint`` (written about every half minute, removed by nobody) takes the very steps it would
    have taken: the same seed on the same number of threads gives the same weights bit for bit. ``method``
    is whatever else decides the weights, such as what ``loss`` is and its settings, as text: the checkpoint
    of another method is another run's. With ``freeze_statistics`` batch norm normalises by its running
    statistics and leaves them as they are. ``state`` holds the tensors, by name, that hooks change in place
    from step to step: they are saved with a checkpoint, and filled from it. ``wrap_optimizer`` gets the
    recipe's optimizer and gives the one that takes the steps in its place.

    Raises UntrojanError where the loss stops being a number, the checkpoint belongs to another run, or
    the model has not as many outputs as the data have classes.
    """
    if model.num_classes != data.num_classes:
        raise UntrojanError(
            f"the model has {model.num_classes} outputs and the data have {data.num_classes} classes: "
            "they must be as many"
        )
    model.precision = recipe.precision
    run = _Run(
        model,
        data,
        recipe,
        seed,
        loss or _cross_entropy(recipe),
        batch_transform,
        augmented_transform,
        method,
        after_step,
        state or {},
        wrap_optimizer,
    )
    run.restore(checkpoint)
    with (
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
        task(description, recipe.epochs * len(data), "images", done=run.images_seen) as bar,
        measure() as cost,
    ):
        recall(run.spent)
        if run.random_state is None:
            torch.manual_seed(seed)
        else:
            torch.set_rng_state(run.random_state)
        model.train()
        if freeze_statistics:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        last_saved = time.monotonic()
        while run.step < run.total_steps:
            bar.advance(run.advance())
            if run.at_epoch_end:
                epoch = run.finish_epoch()
                bar.note(f"epoch {len(run.history.epochs)}: loss {epoch.loss:.3f}, fit {epoch.accuracy:.1%}")
                if after_epoch is not None:
                    after_epoch(len(run.history.epochs), epoch)
            if checkpoint is not None and time.monotonic() - last_saved > CHECKPOINT_SECONDS:
                run.save(checkpoint, cost.so_far())
                last_saved = time.monotonic()
        if checkpoint is not None:
            run.save(checkpoint, cost.so_far())
    model.eval()
    return run.history


def train_new(
    data: ImageSet,
    architecture: str,
    recipe: Recipe,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    description: str = "training",
    device: str = "cpu",
) -> tuple[Classifier, TrainingHistory]:
    """A new classifier for ``data``, trained on them: how victims, probes and retrained models are made.

    ``architecture`` is a name of :mod:`untrojan.models.registry`. Raises UntrojanError as :func:`train` does
    and for an unknown architecture.
    """
    model = build_for(data, architecture, precision=recipe.precision, seed=seed).to(device)
    history = train(model, data, recipe, seed=seed, checkpoint=checkpoint, description=description)
    return model, history


def _cross_entropy(recipe: Recipe) -> BatchLoss:
    def loss(model: Classifier, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images)
        return F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing), logits

    return loss


class _Run:
    """The state of one training run: all that a checkpoint has to hold."""

    def __init__(
        self,
        model: Classifier,
        data: ImageSet,
        recipe: Recipe,
        seed: int,
        loss: BatchLoss,
        batch_transform: BatchTransform | None,
        augmented_transform: AugmentedTransform | None,
        method: str,
        after_step: AfterStep | None,
        state: Mapping[str, Tensor],
        wrap_optimizer: OptimizerWrapper | None,
    ) -> None:
        self.model, self.data, self.recipe, self.seed = model, data, recipe, seed
        self.loss, self.batch_transform = loss, batch_transform
        self.augmented_transform, self.method = augmented_transform, method
        self.after_step, self.state = after_step, state
        self.images, self.labels = data.images.to(model.device), data.labels.to(model.device)
        # A last batch of one image has no variance for batch norm to divide by.
        self.steps_an_epoch = -(-len(data) // recipe.batch_size)
        if len(data) % recipe.batch_size == 1:
            self.steps_an_epoch -= 1
        if self.steps_an_epoch < 1:
            raise UntrojanError("training needs at least two images")
        self.total_steps = recipe.epochs * self.steps_an_epoch
        self.optimizer = _optimizer(model, recipe)
        if wrap_optimizer is not None:
            self.optimizer = wrap_optimizer(self.optimizer)
        self.schedule = _schedule(self.optimizer, recipe, self.total_steps, self.steps_an_epoch)
        self.step = 0
        self.history = TrainingHistory()
        self.random_state: Tensor | None = None
        self.spent: Sequence[float] = NOTHING
        self.order = torch.empty(0, dtype=torch.int64)
        self._begin_epoch()

    @property
    def images_seen(self) -> int:
        within = (self.step % self.steps_an_epoch) * self.recipe.batch_size
        return self.step // self.steps_an_epoch * len(self.data) + within

    @property
    def at_epoch_end(self) -> bool:
        return self.step % self.steps_an_epoch == 0

    def _begin_epoch(self) -> None:
        epoch = self.step // self.steps_an_epoch
        self.order = torch.randperm(len(self.data), generator=generator(self.seed, "order", epoch))
        self.loss_sum, self.hits, self.counted = 0.0, 0, 0
        self.epoch_started = time.monotonic()

    def advance(self) -> int:
        """Take one step; the number of images in it."""
        within = self.step % self.steps_an_epoch
        rows = self.order[within * self.recipe.batch_size : (within + 1) * self.recipe.batch_size]
        rows = rows.to(self.model.device)
        images, labels = self.images[rows], self.labels[rows]
        random = generator(self.seed, "batch", self.step)
        if self.batch_transform is not None:
            images, labels = self.batch_transform(images, labels, random)
        recipe = self.recipe
        images = augment(
            images, random, crop_padding=recipe.crop_padding, flip=recipe.flip, rotation=recipe.rotation
        )
        if self.augmented_transform is not None:
            images, labels = self.augmented_transform(images, labels, rows, random)
        value, logits = self.loss(self.model, images, labels, rows)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step(self.model)
        self.schedule.step()
        self.step += 1
        self._note(float(value.detach()), logits.detach(), labels)
        return len(rows)

    def _note(self, loss: float, logits: Tensor, labels: Tensor) -> None:
        if not math.isfinite(loss):
            raise UntrojanError(
                f"training diverged at step {self.step} (loss {loss}): lower learning_rate "
                f"from {self.recipe.learning_rate}"
            )
        self.loss_sum += loss * len(labels)
        self.counted += len(labels)
        self.hits += int((logits.argmax(1) == labels).sum())

    def finish_epoch(self) -> Epoch:
        epoch = Epoch(
            loss=self.loss_sum / max(self.counted, 1),
            accuracy=self.hits / max(self.counted, 1),
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            seconds=time.monotonic() - self.epoch_started,
        )
        self.history.epochs.append(epoch)
        self._begin_epoch()
        return epoch

    def _identity(self) -> dict[str, Any]:
        identity = {"recipe": repr(self.recipe), "seed": self.seed, "data": self.data.fingerprint()}
        return {**identity, "method": self.method} if self.method else identity

    def save(self, path: Path, spent: Sequence[float]) -> None:
        """Write everything the run would need to go on, and what it cost, or nothing."""
        state = {
            "identity": self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "spent": list(spent),
            "random_state": torch.get_rng_state(),
            "history": self.history.to_json(),
            "sums": [self.loss_sum, self.hits, self.counted],
            "state": {name: value.detach() for name, value in self.state.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, path: Path | None) -> None:
        """Go on from a checkpoint, where there is one."""
        if path is None or not path.exists():
            return
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        if state["identity"] != self._identity():
            raise UntrojanError(
                f"{path} is the checkpoint of another run: remove it, or choose another folder"
            )
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError:
            # The user's own network, say, whose code has changed since.
            raise UntrojanError(
                f"{path} is the checkpoint of another network: remove it, or choose another folder"
            ) from None
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        with torch.no_grad():
            for name, value in self.state.items():
                value.copy_(state["state"][name])
        self.step = state["step"]
        self.spent = state.get("spent", NOTHING)
        self.history = TrainingHistory([Epoch(**epoch) for epoch in state["history"]])
        self.random_state = state["random_state"].cpu()
        self._begin_epoch()
        self.loss_sum, self.hits, self.counted = state["sums"]


def _optimizer(model: Classifier, recipe: Recipe) -> torch.optim.Optimizer:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not weights:
        raise UntrojanError(f"{model.architecture} has no weights that are trained: choose another network")
    if recipe.optimizer == "adam":
        return torch.optim.Adam(weights, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        weights,
        recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def _schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int, steps_an_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if recipe.schedule == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            recipe.learning_rate,
            # One step more than are taken, for the scheduler is stepped once after the last of them.
            total_steps=total_steps + 1,
            pct_start=recipe.warm_up,
            cycle_momentum=False,
        )
    milestones = [epoch * steps_an_epoch for epoch in recipe.milestones] if recipe.schedule == "steps" else []
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=recipe.decay)
