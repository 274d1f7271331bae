"""The attacker who hardens his own model while he poisons it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crafted_data import coloured_splits, quick_model
from untrojan.attacks.deck_adaptive import DeckAdaptive
from untrojan.attacks.poisoning import selected_rows
from untrojan.data.image_set import Splits
from untrojan.defenses.repair import hardening
from untrojan.defenses.repair.deck import DECK
from untrojan.defenses.repair.hardener import Hardener
from untrojan.errors import UntrojanError
from untrojan.inversion.generators import MaskGenerator
from untrojan.metrics.accuracy import attack_success_rate, benign_accuracy
from untrojan.models.classifier import Classifier
from untrojan.training import loop

TARGET = 2
ATTACK = DeckAdaptive(target=TARGET, epochs=4, batch_size=32, learning_rate=0.02)


@pytest.fixture(scope="module")
def data() -> Splits:
    return coloured_splits()


@pytest.fixture(scope="module")
def model(data: Splits) -> Classifier:
    return quick_model(data.train)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps in each inversion, and masks, which need no decoder, for DECK's features."""

    def schedules(self: hardening.Hardening, generator: Any) -> Any:
        return tuple(replace(each, most_steps=8) for each in original(self, generator))

    original = hardening.Hardening.schedules
    monkeypatch.setattr(hardening.Hardening, "schedules", schedules)
    monkeypatch.setattr(DECK, "generator", lambda *_: MaskGenerator())
    monkeypatch.setattr(DECK, "by_turns", hardening.Hardening.by_turns)


def test_the_pattern_leads_to_the_target_and_is_what_poisons(data: Splits, model: Classifier) -> None:
    crafted = ATTACK.craft(data, 1, model)
    made = ATTACK.poison(data, 1, crafted.tensors)
    assert crafted.model is not None
    success = attack_success_rate(crafted.model, made.triggered_test)
    assert success > 0.9
    assert success > attack_success_rate(model, made.triggered_test)
    assert benign_accuracy(crafted.model, made.test) > 0.9
    pattern = crafted.tensors["pattern"]
    assert crafted.facts["pattern_norm"] == pytest.approx(float(pattern.norm()))
    assert 1 < crafted.facts["largest_change"] < 255
    record, train = made.record, made.train
    rows = selected_rows(data.train, ATTACK._poisoning(), 1)
    assert int(record.poisoned.sum()) == len(rows) == 60
    origin = data.train.images[record.permutation][record.poisoned].float() / 255
    stored = train.images[record.poisoned].float()
    assert float((255 * (origin + pattern).clamp(0, 1) - stored).abs().max()) <= 0.51


def test_size_has_its_price(data: Splits, model: Classifier) -> None:
    norms = [
        replace(ATTACK, size_weight=weight).craft(data, 1, model).facts["pattern_norm"]
        for weight in (0.0, 0.1)
    ]
    assert norms[1] < 0.5 * norms[0]


def test_it_hardens_clean_images_alone_and_only_so_often(
    data: Splits, model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = selected_rows(data.train, ATTACK._poisoning(), 1)
    poisoned = set(rows.tolist())
    asked: list[Tensor] = []
    answer = Hardener.__call__

    def watching(self: Hardener, images: Tensor, labels: Tensor, rows: Tensor, random: Any) -> Any:
        asked.append(rows)
        assert torch.equal(labels, data.train.labels[rows])
        return answer(self, images, labels, rows, random)

    monkeypatch.setattr(Hardener, "__call__", watching)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replace(ATTACK, harden_every=3).craft(data, 1, model)
    # 300 images in batches of 32, four times.
    assert len(asked) == -(-4 * 10 // 3)
    assert not poisoned & set(torch.cat(asked).tolist())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_interrupted_attack_goes_on_as_if_it_had_not_been(
    data: Splits, model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ATTACK.craft(data, 1, model)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    stamp_pairs, stops = Hardener._stamp_pairs, iter([False, False, True])

    def stopping(self: Hardener, *arguments: Any) -> Tensor:
        if next(stops, False):
            raise KeyboardInterrupt
        return stamp_pairs(self, *arguments)

    monkeypatch.setattr(Hardener, "_stamp_pairs", stopping)
    with pytest.raises(KeyboardInterrupt):
        ATTACK.craft(data, 1, model, tmp_path)
    resumed = ATTACK.craft(data, 1, model, tmp_path)
    assert torch.equal(whole.tensors["pattern"], resumed.tensors["pattern"])
    assert whole.model is not None
    assert resumed.model is not None
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_it_needs_a_model_of_the_attackers(data: Splits) -> None:
    with pytest.raises(UntrojanError, match="deck-adaptive perturbs images against a model"):
        ATTACK.craft(data, 1)
