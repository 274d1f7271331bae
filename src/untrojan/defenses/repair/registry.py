"""Repairs by name."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from untrojan.data.image_set import ImageSet
from untrojan.defenses.repair.report import RepairReport
from untrojan.models.classifier import Classifier
from untrojan.registry import Registry


class Repair(Protocol):
    """Mends a model with a few clean images; never sees a triggered one. The given model stays as it was."""

    def __call__(
        self, model: Classifier, clean: ImageSet, *, checkpoint: Path | None = None
    ) -> RepairReport: ...


REPAIRS: Registry[Repair] = Registry(
    "repair",
    {
        "finetune": "untrojan.defenses.repair.finetune:Finetuning",
        "fine-pruning": "untrojan.defenses.repair.fine_pruning:FinePruning",
        "nad": "untrojan.defenses.repair.nad:NAD",
        "anp": "untrojan.defenses.repair.anp:ANP",
        "mcr": "untrojan.defenses.repair.mcr:MCR",
        "unlearning": "untrojan.defenses.repair.unlearning:Unlearning",
        "neuron-pruning": "untrojan.defenses.repair.neuron_pruning:NeuronPruning",
        "abs": "untrojan.defenses.repair.abs:ABSRepair",
        "moth": "untrojan.defenses.repair.moth:MOTH",
        "deck": "untrojan.defenses.repair.deck:DECK",
        "i-bau": "untrojan.defenses.repair.ibau:IBAU",
        "clp": "untrojan.defenses.repair.clp:CLP",
        "ft-sam": "untrojan.defenses.repair.ft_sam:FTSAM",
    },
)
