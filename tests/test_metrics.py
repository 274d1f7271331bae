"""Metrics against models and records made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from untrojan.attacks.poisoning import Poisoning, PoisonRecord, TriggeredTest, poison_many
from untrojan.data.image_set import ImageSet, Splits, numbered
from untrojan.errors import UntrojanError
from untrojan.metrics.accuracy import attack_success_rate, benign_accuracy
from untrojan.metrics.cleansing import cleansing_rates
from untrojan.metrics.images import l2, linf, psnr
from untrojan.models.classifier import Classifier
from untrojan.triggers.additive import Additive


class FirstPixel(nn.Module):
    """Predicts the class whose number the first pixel's byte is."""

    def forward(self, images):
        return nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 4).float()


MODEL = Classifier(FirstPixel(), 4, torch.zeros(1), torch.ones(1))


def images_predicted_as(classes):
    images = torch.zeros(len(classes), 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(classes, dtype=torch.uint8)
    return images


def labelled(labels, predicted):
    names = ("a", "b", "c", "d")
    return ImageSet(images_predicted_as(predicted), torch.tensor(labels), names, numbered(len(labels)))


def test_benign_accuracy_counts_every_class():
    assert benign_accuracy(MODEL, labelled([0, 1, 2, 3, 3], [0, 1, 2, 0, 3])) == pytest.approx(0.8)
    with pytest.raises(UntrojanError, match="empty"):
        benign_accuracy(MODEL, labelled([0], [0]).select(torch.tensor([False])))


def test_attack_success_leaves_out_images_of_the_wanted_class():
    images = images_predicted_as([3, 3, 0, 3])
    triggered = TriggeredTest(images, torch.tensor([3, 3, 3, 3]), torch.tensor([0, 1, 2, 3]))
    assert attack_success_rate(MODEL, triggered) == pytest.approx(2 / 3)
    own = TriggeredTest(images, torch.tensor([3] * 4), torch.tensor([3] * 4))
    with pytest.raises(UntrojanError, match="other classes"):
        attack_success_rate(MODEL, own)


def test_attack_success_of_all_to_all_compares_with_each_images_own_wish():
    triggered = TriggeredTest(images_predicted_as([1, 2, 2, 0]), torch.tensor([1, 2, 3, 0]), torch.arange(4))
    assert attack_success_rate(MODEL, triggered) == pytest.approx(0.75)


def record_of(poisoned, target):
    count = len(poisoned)
    return PoisonRecord(
        poisoned=torch.tensor(poisoned, dtype=torch.bool),
        original_labels=torch.zeros(count, dtype=torch.int64),
        original_ids=np.array([""] * count),
        permutation=torch.arange(count),
        target=target,
        sources=(0,),
        trigger_name="chessboard",
        trigger_options={},
        trigger_seed=0,
        trigger=Additive(torch.zeros(1, 2, 2)),
        image_shape=(1, 2, 2),
    )


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def test_false_positives_are_counted_among_the_target_classs_clean_images():
    labels = torch.tensor([2, 2, 2, 2, 2, 0, 0, 1])
    record = record_of([1, 1, 0, 0, 0, 0, 0, 0], target=2)
    rates = cleansing_rates(flags(1, 0, 1, 0, 0, 1, 1, 0), labels, record)
    assert rates.true_positive_rate == pytest.approx(1 / 2)
    assert rates.false_positive_rate == pytest.approx(1 / 3)
    assert (rates.removed, rates.missed, rates.falsely_removed) == (4, 1, 3)


def test_rates_of_several_attacks_are_pooled():
    labels = torch.tensor([2, 2, 2, 1, 1, 1, 0, 0])
    records = [record_of([1, 0, 0, 0, 0, 0, 0, 0], 2), record_of([0, 0, 0, 1, 1, 0, 0, 0], 1)]
    rates = cleansing_rates(flags(1, 1, 0, 1, 0, 0, 1, 0), labels, records)
    assert rates.true_positive_rate == pytest.approx(2 / 3)
    assert rates.false_positive_rate == pytest.approx(1 / 3)


def test_rates_where_there_is_nothing_to_divide_by():
    labels = torch.tensor([0, 1, 2, 2])
    never = cleansing_rates(flags(1, 0, 0, 0), labels)
    assert (never.true_positive_rate, never.false_positive_rate) == (1.0, 0.25)
    all_poisoned = cleansing_rates(flags(0, 0, 1, 1), labels, record_of([0, 0, 1, 1], 2))
    assert (all_poisoned.true_positive_rate, all_poisoned.false_positive_rate) == (1.0, 0.0)
    to_all = cleansing_rates(flags(1, 1, 0, 0), labels, record_of([1, 0, 0, 0], None))
    assert to_all.false_positive_rate == pytest.approx(1 / 3)


def test_rates_refuse_flags_that_do_not_fit():
    with pytest.raises(UntrojanError, match="one for each"):
        cleansing_rates(flags(1, 0), torch.tensor([0, 1, 2]))
    with pytest.raises(UntrojanError, match="bool"):
        cleansing_rates(torch.tensor([1, 0]), torch.tensor([0, 1]))


def test_perfect_cleansing_of_a_real_attack_is_all_found_and_nothing_lost():
    images = torch.randint(256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = ImageSet(images, torch.arange(3).repeat(20), ("a", "b", "c"), numbered(60))
    attacks = [Poisoning("cross", target=0, sources=(1,), count=5), Poisoning("ell", target=1, rate=0.1)]
    made = poison_many(Splits(whole, whole), attacks, seed=0)
    truth = made.records[0].poisoned | made.records[1].poisoned
    rates = cleansing_rates(truth, made.train.labels, made.records)
    assert (rates.true_positive_rate, rates.false_positive_rate, rates.removed) == (1.0, 0.0, 11)


def test_distances_of_a_known_change():
    clean = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
    changed = clean.clone()
    changed[1, 0, 0, :2] = torch.tensor([103, 96], dtype=torch.uint8)
    assert linf(clean, changed).tolist() == pytest.approx([0, 4 / 255])
    assert l2(clean, changed).tolist() == pytest.approx([0, 5 / 255])
    ratios = psnr(clean, changed).tolist()
    assert ratios[0] == math.inf
    assert ratios[1] == pytest.approx(20 * math.log10(255) - 10 * math.log10(25 / 16))
