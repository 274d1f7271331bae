"""How well a cleanser told poisoned images from clean ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from untrojan.attacks.record import PoisonRecord
from untrojan.errors import UntrojanError


@dataclass(frozen=True)
class CleansingRates:
    """RE section 5.2.3; rates are shares, 0 to 1."""

    true_positive_rate: float
    """Of the poisoned images, those removed; 1 where there were none to find."""
    false_positive_rate: float
    """Of the clean images labelled to a true target class, those removed; 0 where there are none. In a set
    that was never poisoned: of all images."""
    removed: int
    """Images removed in all."""
    missed: int
    """Poisoned images that stayed."""
    falsely_removed: int
    """Clean images removed, whatever their label."""
    precision: float | None
    """Of the images removed, those poisoned; None where none was removed."""

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)


def cleansing_rates(
    flagged: Tensor, labels: Tensor, records: PoisonRecord | Sequence[PoisonRecord] = ()
) -> CleansingRates:
    """Rates of ``flagged``, bool (N,), on a training set labelled ``labels``, int64 (N,).

    With several records an image is poisoned if any attack made it, and the clean images of all their
    targets are pooled. An all-to-all attack makes every class a target.
    """
    records = [records] if isinstance(records, PoisonRecord) else list(records)
    poisoned = torch.zeros(len(labels), dtype=torch.bool)
    lengths = {len(flagged), len(labels), *(len(record.poisoned) for record in records)}
    if len(lengths) > 1 or flagged.dtype != torch.bool:
        raise UntrojanError(f"flags must be bool, one for each of the set's {len(labels)} images")
    for record in records:
        poisoned |= record.poisoned
    targets = [record.target for record in records]
    at_risk = torch.ones_like(poisoned)
    if targets and None not in targets:
        at_risk = torch.isin(labels, torch.tensor(targets))
    clean = at_risk & ~poisoned
    found, bad = int((flagged & poisoned).sum()), int(poisoned.sum())
    return CleansingRates(
        true_positive_rate=found / bad if bad else 1.0,
        false_positive_rate=int((flagged & clean).sum()) / max(int(clean.sum()), 1),
        removed=int(flagged.sum()),
        missed=bad - found,
        falsely_removed=int((flagged & ~poisoned).sum()),
        precision=found / int(flagged.sum()) if bool(flagged.any()) else None,
    )
