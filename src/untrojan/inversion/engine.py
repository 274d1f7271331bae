"""Find the smallest input transformation that flips a model, for many (source, target) pairs at once.

Reverse engineering, Neural Cleanse, MOTH, DECK and ABS all solve this problem K or K(K-1) times. Here the
parameters of all pairs are stacked, their images concatenated, and one forward and backward serves them
all: what counts on any machine is images a step, so each pair can make do with few of them. A pair whose
constraint is met leaves the batch.

A search ends in one of two ways. RE's patterns start from nothing and grow until they meet the constraint;
Neural Cleanse's masks start large and shrink as far as the constraint allows.

Which images a pair sees at a step depends on the seed, the pair and the step alone. Results therefore do
not depend on how the pairs were batched, beyond float rounding, and a killed run resumes exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from untrojan.cost import NOTHING, measure, recall
from untrojan.data.image_set import ImageSet
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.frozen import frozen
from untrojan.progress import task
from untrojan.seeding import generator

CHECKPOINT_SECONDS = 30.0
ANY = -1
"""In place of a source class: images of every class."""


class Problem(Protocol):
    """What is sought: a transformation, and what it is rewarded for."""

    @property
    def both_sides(self) -> bool:
        """Whether images of the target class are looked at too."""
        ...

    def initial(self, pairs: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        """Starting parameters (P, ...) for int64 pairs (P, 2) of source and target class."""
        ...

    def views(self, parameters: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
        """The images to classify, (A, V, C, H, W), of A pairs.

        ``sources`` and ``targets`` are (A, n, C, H, W) in [0, 1]. The first n views are the source images
        with the transformation embedded: they measure the flip fraction.
        """
        ...

    def loss(self, logits: Tensor, parameters: Tensor, pairs: Tensor) -> Tensor:
        """To be minimised: (A,) from logits (A, V, K), parameters (A, ...) and pairs (A, 2)."""
        ...

    def embed(self, parameters: Tensor, images: Tensor) -> Tensor:
        """Images (A, n, C, H, W) with each pair's transformation."""
        ...

    def size(self, parameters: Tensor) -> Tensor:
        """What is to be small: (A,) from parameters (A, ...)."""
        ...


@runtime_checkable
class LooksInside(Protocol):
    """A problem whose loss reads more than logits."""

    @property
    def needs_every_module(self) -> bool:
        """Whether batch norm must not be folded away, because a layer is looked at by its path."""
        ...

    def watching(self, model: Classifier) -> AbstractContextManager[object]:
        """Entered round the search, with the copy of the model that it asks."""
        ...


@runtime_checkable
class ImageProblem(Problem, Protocol):
    """A problem whose start and size depend on the images too, not on the parameters alone."""

    def initial_on(self, pairs: Tensor, images_of: Callable[[int], Tensor]) -> Tensor:
        """In place of ``initial``; ``images_of`` gives the uint8 images (n, C, H, W) of a source class."""
        ...

    def measure(self, parameters: Tensor, sources: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """What :class:`Shrink` multiplies by its cost, (A,), and each image's size, (A, n), of which the
        mean over the flipped ones takes the place of ``size``.

        ``sources`` and ``embedded``, (A, n, C, H, W) in [0, 1], are the images without and with the
        transformation.
        """
        ...


class Stepper(Protocol):
    """How a gradient moves the parameters."""

    @property
    def memories(self) -> int:
        """How many tensors of the parameters' shape it has to remember for each pair."""
        ...

    def __call__(
        self, parameters: Tensor, gradients: Tensor, memory: Tensor, boost: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """New parameters (A, ...) and memory (A, memories, ...), which starts at zero.

        ``boost`` (A,) multiplies the step of a pair that has stalled; ``steps`` (A,) counts steps taken.
        """
        ...


@dataclass(frozen=True)
class RawGradient:
    """v <- v - rate * gradient: RE's line 6."""

    rate: float = 1e-4
    memories: ClassVar[int] = 0

    def __call__(
        self, parameters: Tensor, gradients: Tensor, memory: Tensor, boost: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        return parameters - _per_pair(self.rate * boost, gradients) * gradients, memory


@dataclass(frozen=True)
class Adam:
    """Kingma & Ba (2015), with a count of steps for each pair."""

    rate: float = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    leading: int = 0
    """How many of the first numbers of flat parameters move by a rate of their own."""
    leading_rate: float = 0.1
    memories: ClassVar[int] = 2

    def __call__(
        self, parameters: Tensor, gradients: Tensor, memory: Tensor, boost: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        first, second = memory.unbind(1)
        first = self.betas[0] * first + (1 - self.betas[0]) * gradients
        second = self.betas[1] * second + (1 - self.betas[1]) * gradients.square()
        mean = first / _per_pair(1 - self.betas[0] ** (steps + 1), first)
        variance = second / _per_pair(1 - self.betas[1] ** (steps + 1), second)
        moved = parameters - _per_pair(self.rate * boost, gradients) * mean / (variance.sqrt() + 1e-8)
        if self.leading:
            own = slice(self.leading)
            moved[:, own] = parameters[:, own] + self.leading_rate / self.rate * (moved - parameters)[:, own]
        return moved, torch.stack([first, second], 1)


@dataclass(frozen=True)
class ProportionalStep:
    """Along the gradient by a share of the pattern's own norm, so that small and large patterns are found
    in about as many steps and to about the same relative precision.

    ``least`` is the step's root mean square over pixel values in [0, 1] while the pattern is still small:
    it must be a fraction of the faintest pattern's, or the first step leaps over it. ``memory`` is the
    share of the previous direction in the next: what a few images' gradients have not in common averages
    out, and only what they have in common, the pattern, adds to the norm.
    """

    share: float = 0.05
    least: float = 1.8e-4
    memory: float = 0.8
    memories: ClassVar[int] = 1

    def __call__(
        self, parameters: Tensor, gradients: Tensor, memory: Tensor, boost: Tensor, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        velocity = self.memory * memory[:, 0] + (1 - self.memory) * _unit(gradients)
        least = self.least * parameters[0].numel() ** 0.5
        lengths = (self.share * _norms(parameters)).clamp_min(least) * boost
        return parameters - _per_pair(lengths, gradients) * _unit(velocity), velocity[:, None]


@dataclass(frozen=True)
class Shrink:
    """Once the constraint is met, go on to the smallest parameters that meet it.

    The loss gains a cost times the size. Each look at the last few steps' flip fraction finds the constraint
    met or not; after ``patience`` looks of one kind in a row the cost rises or falls. The smallest
    parameters seen to meet the constraint are the result (Wang et al., "Neural Cleanse", section IV-B).
    """

    cost: float = 1e-3
    """To begin with; from zero it rises to a thousandth."""
    look_every: int = 10
    """Steps whose flip fractions make one look."""
    patience: int = 5
    rise: float = 1.5
    fall: float = 1.5**1.5
    give_up: int = 25
    """Looks without a size at least one per cent smaller, after which a pair is finished, if its cost has
    both risen and fallen."""
    confirm: bool = False
    """Keep parameters only if they meet the constraint on all the pair's confirming images, too: a look sees
    few images, and the smallest of many sizes is one whose look was lucky."""


@dataclass(frozen=True)
class Schedule:
    """How hard to try. See :data:`PAPER` and :data:`FAST`."""

    stepper: Stepper
    images_a_side: int
    """Source images, and as many target images, in each step of each pair."""
    flip_fraction: float = 0.95
    """The constraint: the share of source images that must be classified as the target (RE's pi)."""
    confirm_images: int | None = None
    """Source images on which the constraint is confirmed; None takes every one. 0 never confirms it: every
    pair takes all its steps, and none is reported as solved."""
    confirm_every: int = 5
    """Steps between two confirmations at least; a pair far from its constraint waits longer."""
    most_steps: int = 5000
    """A pair that has not met its constraint by then is reported as failed, never as a small norm."""
    stall_steps: int = 200
    """Steps without a better flip fraction after which the step length doubles."""
    images_a_forward: int = 512
    shrink: Shrink | None = None
    """Without it a pair is finished when it meets the constraint."""
    both_ways: bool = False
    """Ask as much of the target's images: that share must no longer be classified as the target. For problems
    that look at both sides, where all of the target's images are believed to carry what is sought."""


PAPER = Schedule(RawGradient(1e-4), images_a_side=256)
"""RE's published constants (section 5.2.1): step 1e-4 along the raw gradient, 256 images a side, and the
constraint confirmed on every source image."""

FAST = Schedule(
    ProportionalStep(), images_a_side=12, confirm_images=512, confirm_every=2, most_steps=400, stall_steps=60
)
"""Few images a step for many pairs at once, and steps in proportion to the pattern found so far."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """What was found for each pair."""

    pairs: Tensor
    """int64 (P, 2 or more): source and target class, and the problem's own."""
    parameters: Tensor
    """float32 (P, ...)."""
    flip_fraction: Tensor
    """float32 (P,): share of the confirming images that flip."""
    solved: Tensor
    """bool (P,): the constraint was met. Norms of the others mean nothing."""
    steps: Tensor
    """int64 (P,)."""


def all_pairs(num_classes: int) -> Tensor:
    """int64 (K(K-1), 2): every ordered pair of different classes."""
    source, target = torch.meshgrid(torch.arange(num_classes), torch.arange(num_classes), indexing="ij")
    different = source != target
    return torch.stack([source[different], target[different]], 1)


def invert(
    model: Classifier,
    data: ImageSet,
    pairs: Tensor,
    problem: Problem,
    schedule: Schedule,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    start: Tensor | None = None,
    description: str = "inverting",
) -> Inversion:
    """Solve ``problem`` for every pair; the model's weights, modes and gradient flags stay as they are.

    ``data`` are the labelled images (possibly poisoned: labels are taken as they stand), ``pairs`` int64
    (P, 2), ``start`` parameters (P, ...) to set out from instead of the problem's own. With ``checkpoint``,
    an interrupted search goes on where it was. Columns of ``pairs`` past the second are the problem's own:
    it gets them back with each pair.

    Raises UntrojanError where a class of a pair has no images or the model another number of classes.
    """
    pools = ClassPools(data, seed)
    _check(model, data, pools, pairs)
    kind = _Search if schedule.shrink is None else _ShrinkingSearch
    inside = problem if isinstance(problem, LooksInside) else None
    copied = frozen(model, fold=inside is None or not inside.needs_every_module)
    state = kind(copied, pools, pairs, problem, schedule, start)
    state.restore(checkpoint)
    with (
        inside.watching(copied) if inside else nullcontext(),
        task(description, len(pairs), "pairs", done=int(state.finished.sum())) as bar,
        measure() as cost,
    ):
        recall(state.spent.tolist())
        last_saved = time.monotonic()
        while not state.finished.all():
            for active in state.chunks():
                bar.advance(state.advance(active))
            if checkpoint is not None and time.monotonic() - last_saved > CHECKPOINT_SECONDS:
                state.save(checkpoint, cost.so_far())
                last_saved = time.monotonic()
        if checkpoint is not None:
            state.save(checkpoint, cost.so_far())
    return Inversion(pairs, state.parameters, state.flips, state.solved, state.steps)


class ClassPools:
    """Each class's images in an order of its own, dealt out in turn without replacement."""

    def __init__(self, data: ImageSet, seed: int) -> None:
        self.images = data.images
        self.shape = data.image_shape
        shuffled = torch.randperm(len(data), generator=generator(seed, "pools"))
        by_class = shuffled[data.labels[shuffled].argsort(stable=True)]
        counts = data.class_counts
        # One more class, reached by the index ANY: all images.
        self.order = torch.cat([by_class, shuffled])
        self.starts = torch.cat([counts.cumsum(0) - counts, torch.tensor([len(data)])])
        self.counts = torch.cat([counts, torch.tensor([len(data)])])
        # Pairs set out from different places of a class, or all would see the same few images.
        offsets = torch.randint(
            1 << 30, (data.num_classes, data.num_classes), generator=generator(seed, "offsets")
        )
        self.offsets = F.pad(offsets, (0, 1, 0, 1))
        self.offsets[ANY, :-1] = offsets.diagonal()

    def deal(self, classes: Tensor, others: Tensor, steps: Tensor, count: int) -> Tensor:
        """uint8 (A, count, C, H, W): the images of ``classes`` that pairs see at their ``steps``."""
        first = self.offsets[classes, others] + steps * count
        places = (first[:, None] + torch.arange(count)) % self.counts[classes][:, None]
        rows = self.order[self.starts[classes][:, None] + places]
        return self.images[rows.flatten()].view(len(classes), count, *self.shape)

    def first(self, label: int, count: int | None) -> Tensor:
        """uint8 (n, C, H, W): a fixed random subset of a class, or all of it."""
        size = int(self.counts[label])
        begin = int(self.starts[label])
        return self.images[self.order[begin : begin + min(size, count or size)]]


class _Search:
    """Where each pair stands."""

    def __init__(
        self,
        model: Classifier,
        pools: ClassPools,
        pairs: Tensor,
        problem: Problem,
        schedule: Schedule,
        start: Tensor | None,
    ) -> None:
        self.model, self.pools, self.pairs = model, pools, pairs
        self.problem, self.schedule = problem, schedule
        count = len(pairs)
        if start is not None:
            self.parameters = start.clone()
        elif isinstance(problem, ImageProblem):
            self.parameters = problem.initial_on(pairs, lambda label: pools.first(label, None))
        else:
            self.parameters = problem.initial(pairs, pools.shape)
        self.memory = torch.zeros(count, schedule.stepper.memories, *self.parameters.shape[1:])
        self.flips = torch.zeros(count)
        self.latest = torch.zeros(count)
        self.running = torch.zeros(count)
        self.best = torch.zeros(count)
        self.boost = torch.ones(count)
        self.steps = torch.zeros(count, dtype=torch.int64)
        self.last_gain = torch.zeros(count, dtype=torch.int64)
        self.next_confirmation = torch.zeros(count, dtype=torch.int64)
        self.solved = torch.zeros(count, dtype=torch.bool)
        self.finished = torch.zeros(count, dtype=torch.bool)
        self.spent = torch.tensor(NOTHING, dtype=torch.float64)
        """What the search had cost when it was last saved; see :meth:`~untrojan.cost.Cost.so_far`."""
        self.begin(count)

    def begin(self, count: int) -> None:
        """What a kind of search keeps besides, for each of so many pairs."""

    def chunks(self) -> list[Tensor]:
        """The pairs still searching, in groups that fill one forward each."""
        a_pair = (1 + self.problem.both_sides) * self.schedule.images_a_side
        size = max(1, self.schedule.images_a_forward // a_pair)
        return list((~self.finished).nonzero().flatten().split(size))

    def advance(self, active: Tensor) -> int:
        """One step of these pairs; the number of them that finished."""
        self._confirm(active[(self.steps[active] >= self.next_confirmation[active])])
        moving = active[~self.finished[active]]
        if len(moving):
            self._step(moving)
        return int(self.finished[active].sum())

    def _step(self, active: Tensor) -> None:
        pairs, count, steps = self.pairs[active], self.schedule.images_a_side, self.steps[active]
        device = self.model.device
        source, target = pairs[:, 0], pairs[:, 1]
        source_images = to_float(self.pools.deal(source, target, steps, count), device)
        target_images = source_images[:, :0]
        if self.problem.both_sides:
            target_images = to_float(self.pools.deal(target, source, steps, count), device)
        shown = self.parameters[active]
        parameters = shown.to(device).detach().requires_grad_()
        views = self.problem.views(parameters, source_images, target_images)
        logits = self.model(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        hits = logits[:, :count].argmax(2) == pairs[:, 1:2].to(device)
        loss = self.problem.loss(logits, parameters, pairs.to(device))
        loss = loss + self._price(active, parameters, source_images, views[:, :count], hits)
        (gradients,) = torch.autograd.grad(loss.sum(), parameters)
        moved, memory = self.schedule.stepper(
            parameters.detach(), gradients, self.memory[active].to(device), self.boost[active].to(device),
            steps.to(device),
        )  # fmt: skip
        self.parameters[active], self.memory[active] = moved.cpu(), memory.cpu()
        self.steps[active] += 1
        self._note(active, hits.float().mean(1).cpu(), shown)

    def _price(
        self, active: Tensor, parameters: Tensor, sources: Tensor, embedded: Tensor, hits: Tensor
    ) -> Tensor:
        """What the size of these pairs' transformations adds to their loss, (A,)."""
        return torch.zeros(len(active), device=parameters.device)

    def _note(self, active: Tensor, flipped: Tensor, shown: Tensor) -> None:
        """Keep a running flip fraction, double the step of stalled pairs, give up on hopeless ones."""
        self.latest[active] = flipped
        self.running[active] = 0.7 * self.running[active] + 0.3 * flipped
        gained = active[self.running[active] > self.best[active] + 0.005]
        self.best[gained] = self.running[gained]
        self.last_gain[gained] = self.steps[gained]
        stalled = active[self.steps[active] - self.last_gain[active] >= self.schedule.stall_steps]
        self.boost[stalled] *= 2
        self.last_gain[stalled] = self.steps[stalled]
        spent = active[self.steps[active] >= self.schedule.most_steps]
        if len(spent):
            self._confirm(spent)
            self.finished[spent] = True

    def _confirm(self, due: Tensor) -> None:
        """Measure the constraint where the last step's estimate comes near it."""
        if self.schedule.confirm_images == 0:
            return
        wanted = self.schedule.flip_fraction
        # A few images a step make a rough estimate; what it would miss by is made up by confirming early.
        margin = 1.5 * (wanted * (1 - wanted) / self.schedule.images_a_side) ** 0.5
        first = self.steps[due] == 0
        for pair in due[first | (self.latest[due] >= wanted - margin)].tolist():
            flips = self._measure(pair, self.parameters[pair : pair + 1])
            self.flips[pair] = flips
            if flips >= wanted:
                self.solved[pair] = self.finished[pair] = True
            # At the start nothing has flipped yet, which says nothing of how long it will take.
            gap = max(0.0, wanted - flips) if self.steps[pair] else 0.0
            wait = self.schedule.confirm_every * (1 + int(20 * gap))
            self.next_confirmation[pair] = self.steps[pair] + wait

    @torch.no_grad()
    def _measure(self, pair: int, parameters: Tensor) -> float:
        """The share of a pair's confirming images that its ``parameters`` (1, ...) flip; both ways, the
        lesser of the shares flipped and unflipped."""
        source, target = self.pairs[pair, :2].tolist()
        parameters = parameters.to(self.model.device)

        def share(label: int, changed: Callable[[Tensor], Tensor], to_target: bool) -> float:
            images = self.pools.first(label, self.schedule.confirm_images)
            hits = 0
            for batch in images.split(self.schedule.images_a_forward):
                logits = self.model(changed(to_float(batch, self.model.device)[None])[0])
                hits += int(((logits.argmax(1) == target) == to_target).sum())
            return hits / len(images)

        flipped = share(source, lambda images: self.problem.embed(parameters, images), True)
        if not self.schedule.both_ways:
            return flipped
        return min(flipped, share(target, lambda i: self.problem.views(parameters, i[:, :0], i), False))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def save(self, path: Path, spent: Sequence[float]) -> None:
        from safetensors.torch import save_file

        self.spent = torch.tensor(spent, dtype=torch.float64)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file({name: value.contiguous() for name, value in self._tensors().items()}, partial)
        partial.replace(path)

    def restore(self, path: Path | None) -> None:
        from safetensors.torch import load_file

        if path is None or not path.exists():
            return
        saved = load_file(path)
        if not torch.equal(saved["pairs"], self.pairs) or saved["parameters"].shape != self.parameters.shape:
            raise UntrojanError(
                f"{path} is the checkpoint of another search: remove it, or choose another folder"
            )
        for name, value in saved.items():
            setattr(self, name, value)


class _ShrinkingSearch(_Search):
    """A search whose parameters go on shrinking; see :class:`Shrink`."""

    def begin(self, count: int) -> None:
        assert self.schedule.shrink is not None
        self.shrink = self.schedule.shrink
        self.cost = torch.full((count,), self.shrink.cost)
        self.seen = torch.zeros(count)
        """Sum of the flip fractions since the last look."""
        self.streak = torch.zeros(count, dtype=torch.int64)
        """Looks in a row that found the constraint met; below zero: not met."""
        self.risen = torch.zeros(count, dtype=torch.bool)
        self.fallen = torch.zeros(count, dtype=torch.bool)
        self.stale = torch.zeros(count, dtype=torch.int64)
        self.smallest = torch.full((count,), float("inf"))
        self.measured = torch.zeros(count)
        """Sum of the flipped images' sizes since the last look, where images have one, and their number."""
        self.measured_images = torch.zeros(count)
        self.kept = self.parameters.clone()

    def advance(self, active: Tensor) -> int:
        self._step(active)
        return int(self.finished[active].sum())

    def _price(
        self, active: Tensor, parameters: Tensor, sources: Tensor, embedded: Tensor, hits: Tensor
    ) -> Tensor:
        if isinstance(self.problem, ImageProblem):
            price, sizes = self.problem.measure(parameters, sources, embedded)
            self.measured[active] += (sizes.detach() * hits).sum(1).cpu()
            self.measured_images[active] += hits.sum(1).cpu()
        else:
            price = self.problem.size(parameters)
        return self.cost[active].to(parameters.device) * price

    def _sizes(self, active: Tensor, parameters: Tensor) -> Tensor:
        if not isinstance(self.problem, ImageProblem):
            return self.problem.size(parameters)
        sizes = self.measured[active] / self.measured_images[active]
        self.measured[active], self.measured_images[active] = 0.0, 0.0
        return sizes

    def _note(self, active: Tensor, flipped: Tensor, shown: Tensor) -> None:
        self.seen[active] += flipped
        due = self.steps[active] % self.shrink.look_every == 0
        if due.any():
            # A size that was measured on images is that of the parameters they were shown with.
            on_images = isinstance(self.problem, ImageProblem)
            self._look(active[due], shown[due] if on_images else self.parameters[active[due]])
        done = (self.steps[active] >= self.schedule.most_steps) | (
            self.risen[active] & self.fallen[active] & (self.stale[active] >= self.shrink.give_up)
        )
        finished = active[done]
        self.finished[finished] = True
        self.parameters[finished] = self.kept[finished]

    def _look(self, active: Tensor, parameters: Tensor) -> None:
        flips = self.seen[active] / self.shrink.look_every
        self.seen[active] = 0
        met = flips >= self.schedule.flip_fraction
        sizes = self._sizes(active, parameters)
        better = met & (sizes < self.smallest[active])
        if self.shrink.confirm:
            for place in better.nonzero().flatten().tolist():
                flips[place] = self._measure(int(active[place]), parameters[place : place + 1])
            met &= flips >= self.schedule.flip_fraction
            better &= met
        self.stale[active] = (self.stale[active] + 1) * ~(met & (sizes < 0.99 * self.smallest[active]))
        kept = active[better]
        self.kept[kept], self.smallest[kept] = parameters[better], sizes[better]
        self.solved[active] |= met
        unsolved = ~self.solved[active]
        self.flips[active] = torch.where(better | unsolved, flips, self.flips[active])
        self.kept[active[unsolved]] = parameters[unsolved]
        streak = self.streak[active]
        self.streak[active] = torch.where(met, streak.clamp_min(0) + 1, streak.clamp_max(0) - 1)
        up = active[self.streak[active] >= self.shrink.patience]
        down = active[self.streak[active] <= -self.shrink.patience]
        self.cost[up] = torch.where(self.cost[up] > 0, self.cost[up] * self.shrink.rise, 1e-3)
        self.cost[down] /= self.shrink.fall
        self.risen[up], self.fallen[down] = True, True
        self.streak[up], self.streak[down] = 0, 0


def _check(model: Classifier, data: ImageSet, pools: ClassPools, pairs: Tensor) -> None:
    if model.num_classes < data.num_classes:
        raise UntrojanError(
            f"the model has {model.num_classes} outputs for the data's {data.num_classes} classes"
        )
    for label in pairs[:, :2].unique().tolist():
        if int(pools.counts[label]) == 0:
            raise UntrojanError(f"class {data.class_names[label]!r} has no images to invert with")


def _norms(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return norms


def _unit(values: Tensor) -> Tensor:
    return values / _per_pair(_norms(values).clamp_min(1e-12), values)


def _per_pair(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
