"""What hardening remembers from step to step: how near classes are, and triggers that it has found.

Tao et al., "Model Orthogonalization: Class Distance Hardening in Neural Networks for Better Security"
(MOTH), S&P 2022, section IV: U, D and the choice of pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from untrojan.data.image_set import ImageSet
from untrojan.inversion.engine import Inversion
from untrojan.inversion.generators import Generator
from untrojan.models.classifier import Classifier, to_float
from untrojan.models.frozen import frozen

STORED_NUMBERS = 1 << 26
"""Of remembered triggers at most, a quarter of a gigabyte: DECK's have 150,000 each,
four times as many with 64 channels."""


def promise(gains: Tensor, distances: Tensor, weight: float) -> Tensor:
    """How much each pair of classes has to gain, symmetric (K, K), from U and D of the same shape.

    (1 - a)(U + U') + a (D + D'), MOTH's equation for the choice of pairs, a being ``weight``.
    """
    return (1 - weight) * (gains + gains.T) + weight * (distances + distances.T)


def choose_pairs(promised: Tensor, count: int, explore: float, random: torch.Generator) -> list[list[int]]:
    """``count`` disjoint pairs (s, t), s < t, or as many as there are, the most promising first.

    Each is one of the pairs left with probability ``explore``, uniformly, and else the best of them.
    """
    open_pairs = torch.ones_like(promised, dtype=torch.bool).triu(1)
    chosen: list[list[int]] = []
    while len(chosen) < count and bool(open_pairs.any()):
        left = open_pairs.nonzero()
        if float(torch.rand((), generator=random)) < explore:
            place = int(torch.randint(len(left), (), generator=random))
        else:
            place = int(promised[open_pairs].argmax())
        pair = left[place]
        chosen.append(pair.tolist())
        open_pairs[pair] = False
        open_pairs[:, pair] = False
    return chosen


@torch.no_grad()
def universal_effects(
    model: Classifier, sample: ImageSet, generator: Generator, seed: int, found: Inversion
) -> tuple[Tensor, Tensor]:
    """U and the sizes, (K, K) with zero diagonals: what each target's trigger does to each source's images.

    U is (CE before - CE after) / CE before, cross-entropies with the target averaged over the source's images
    first: an image that lies in the target's region already would divide by nothing.
    """
    asked, problem, count = frozen(model), generator.problem(seed), sample.num_classes
    images = to_float(sample.images, model.device)
    labels = sample.labels.to(model.device)
    by_class = F.one_hot(labels, count).float() / sample.class_counts.to(model.device)
    before = -torch.cat([asked(part).log_softmax(1) for part in images.split(512)])
    gains, sizes = torch.zeros(count, count), torch.zeros(count, count)
    for target in range(count):
        parameters = found.parameters[target : target + 1].to(model.device)
        after, moved = [], []
        for part in images.split(512):
            after.append(-asked(problem.embed(parameters, part[None])[0]).log_softmax(1)[:, target])
            moved.append(generator.moved(problem, parameters, part[None])[0])
        start = by_class.T @ before[:, target]
        gains[:, target] = ((start - by_class.T @ torch.cat(after)) / start.clamp_min(1e-6)).cpu()
        sizes[:, target] = (by_class.T @ torch.cat(moved)).cpu()
    return gains.fill_diagonal_(0), sizes.fill_diagonal_(0)


class _Visits:
    """Of one kind of trigger, what was searched for in which period.

    Each tensor is changed in place: the training loop saves them with its checkpoint.
    """

    def __init__(self, a_period: int, periods: int) -> None:
        self.left = torch.zeros((), dtype=torch.int64)
        """Steps of the period."""
        self.visits = torch.full((a_period * periods, 5), float("nan"), dtype=torch.float64)
        """Source, target, step, size before and after; NaN for any source, and after where the last search
        failed."""
        self.visited = torch.zeros((), dtype=torch.int64)
        self.periods = torch.zeros((), dtype=torch.int64)

    def note(self, *seen: Tensor) -> None:
        """The columns of :attr:`visits` for the period that ends."""
        rows = torch.stack([each.double() for each in seen], 1)
        first = int(self.visited)
        self.visits[first : first + len(rows)] = rows
        self.visited += len(rows)
        self.periods += 1

    def history(self) -> list[dict[str, float | None]]:
        """One entry for each period and way."""
        names = ("source", "target", "step", "before", "after")
        return [
            {
                name: None if value != value else int(value) if name in names[:3] else value
                for name, value in zip(names, visit, strict=True)
            }
            for visit in self.visits[: int(self.visited)].tolist()
        ]


class PairStates(_Visits):
    """What hardening remembers of every ordered pair and one kind of trigger."""

    def __init__(
        self, gains: Tensor, sizes: Tensor, universal: Tensor, pairs_at_once: int, periods: int
    ) -> None:
        """``gains`` is U, ``sizes`` the universal triggers', both (K, K), ``universal`` their parameters
        (K, ...); so many disjoint pairs are hardened in each of at most so many periods."""
        classes, hand = len(gains), 2 * min(pairs_at_once, len(gains) // 2)
        super().__init__(hand, periods)
        self.gains, self.universal, self.sizes = gains, universal, sizes.clone()
        self.distances = sizes / sizes.max().clamp_min(1e-12)
        self.pairs = torch.zeros(hand, 2, dtype=torch.int64)
        """The ordered pairs in hand: (s, t), (t, s), and so on."""
        self.solved, self.latest = torch.zeros(hand, dtype=torch.bool), torch.zeros(hand)
        slots = min(
            classes * (classes - 1), hand * periods, max(hand, STORED_NUMBERS // universal[0].numel())
        )
        self.slot = torch.full((classes, classes), -1)
        """Where a pair's trigger is stored; -1 where none is."""
        self.stored = torch.zeros(slots, *universal.shape[1:])
        self.stored_sizes = torch.zeros(slots)
        self.stored_count = torch.zeros((), dtype=torch.int64)

    @property
    def succeeded(self) -> bool:
        """Whether any search ever did."""
        return int(self.stored_count) > 0

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        return {name: value for name, value in vars(self).items() if name not in ("gains", "universal")}

    def begin_period(self, chosen: list[list[int]], steps: int) -> None:
        """Take up disjoint pairs, both ways of each."""
        ways = [way for source, target in chosen for way in ([source, target], [target, source])]
        self.pairs.copy_(torch.tensor(ways))
        self.solved.fill_(False)
        self.left.fill_(steps)

    def known(self, pairs: Tensor) -> Tensor:
        """Parameters (A, ...) of the ordered ``pairs``: their own trigger or, for want of one, their target's
        universal one."""
        slots = self.slot[pairs[:, 0], pairs[:, 1]]
        own = self.stored[slots.clamp_min(0)]
        stored = (slots >= 0).view(-1, *[1] * (own.ndim - 1))
        return torch.where(stored, own, self.universal[pairs[:, 1]])

    def keep(self, parameters: Tensor, sizes: Tensor, solved: Tensor) -> None:
        """Remember what a step found for the pairs in hand; of two triggers of a pair the larger."""
        self.solved.copy_(solved)
        self.latest.copy_(sizes)
        for place in solved.nonzero().flatten().tolist():
            source, target = self.pairs[place].tolist()
            slot = int(self.slot[source, target])
            if slot < 0:
                # Where all are taken, the one that was taken first gives way.
                slot = int(self.stored_count) % len(self.stored)
                self.slot[self.slot == slot] = -1
                self.slot[source, target] = slot
                self.stored_sizes[slot] = 0
                self.stored_count += 1
            if sizes[place] >= self.stored_sizes[slot]:
                self.stored[slot], self.stored_sizes[slot] = parameters[place], sizes[place]

    def close_period(self, step: int) -> None:
        """D becomes the mean of itself and the size's relative change, where the last search succeeded."""
        source, target = self.pairs.unbind(1)
        before = self.sizes[source, target]
        after = torch.where(self.solved, self.latest, before)
        halfway = (self.distances[source, target] + (after - before) / before.clamp_min(1e-12)) / 2
        self.distances[source, target] = torch.where(self.solved, halfway, self.distances[source, target])
        self.sizes[source, target] = after
        self.note(source, target, torch.full_like(source, step), before, after.where(self.solved, torch.nan))


class UniversalStates(_Visits):
    """What hardening remembers of one kind of trigger that is looked for anew in each period, into each class
    from all others."""

    def __init__(self, universal: Tensor, sizes: Tensor, periods: int) -> None:
        """``universal`` (K, ...) are the warm-up's parameters, ``sizes`` (K,) theirs."""
        super().__init__(len(universal), periods)
        self.universal, self.sizes = universal.clone(), sizes.clone()
        self.before, self.solved = sizes.clone(), torch.zeros(len(sizes), dtype=torch.bool)

    @property
    def succeeded(self) -> bool:
        """Whether any search ever did."""
        return not bool(self.visits[: int(self.visited), 4].isnan().all())

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        return dict(vars(self))

    def begin_period(self, found: Inversion, sizes: Tensor, steps: int) -> None:
        """Take up what was found into each class."""
        self.before.copy_(self.sizes)
        for own, new in (
            (self.universal, found.parameters),
            (self.sizes, sizes),
            (self.solved, found.solved),
        ):
            own.copy_(new)
        self.left.fill_(steps)

    def known(self, pairs: Tensor) -> Tensor:
        """Parameters (A, ...) of the ordered ``pairs``: their target's trigger."""
        return self.universal[pairs[:, 1]]

    def close_period(self, step: int) -> None:
        """Write down what was searched for."""
        anyone, after = torch.full_like(self.sizes, torch.nan), self.sizes.where(self.solved, torch.nan)
        targets = torch.arange(len(self.sizes))
        self.note(anyone, targets, torch.full_like(targets, step), self.before, after)
