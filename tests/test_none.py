"""NONE: the split, the scores, and nets whose backdoor neuron is known."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from known_backdoor import BACKDOOR, CLASSES, TARGET, backdoored, blocks
from untrojan.cost import measure
from untrojan.defenses.training.none import (
    NONE,
    Analysis,
    excess_by_class,
    linearity_by_class,
)
from untrojan.errors import UntrojanError
from untrojan.metrics.grouping import groups_of_each, two_groups
from untrojan.models.channels import Reduction, channel_activations, norms_after, weighted_layers
from untrojan.models.classifier import Classifier, predictions_of
from untrojan.training.loop import train, train_new
from untrojan.training.recipe import Recipe

QUICK = Recipe(epochs=1, batch_size=32, optimizer="sgd", learning_rate=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=40), st.integers(1, 4))
def test_the_cut_is_otsus(values: list[int], smallest: int) -> None:
    split = two_groups(torch.tensor(values, dtype=torch.float32), smallest)
    array = np.array(values, dtype=float)
    total = ((array - array.mean()) ** 2).sum()
    cuts = [at for at in set(values) if min((array <= at).sum(), (array > at).sum()) >= smallest]
    if not cuts:
        assert split.fit == 0.0
        assert not bool((torch.tensor(values) > split.at).any())
        return
    within = [
        sum(((g - g.mean()) ** 2).sum() for g in (array[array <= at], array[array > at])) for at in cuts
    ]
    assert split.fit == pytest.approx(1 - min(within) / total, abs=1e-9)
    upper = array > split.at
    assert smallest <= upper.sum() <= len(values) - smallest
    gap, spread = array[upper].mean() - array[~upper].mean(), array[upper].std() + array[~upper].std()
    assert split.separation == pytest.approx(gap / max(spread, 1e-9 * gap), rel=1e-6)


def test_one_kind_of_values_is_not_separated() -> None:
    random = np.random.default_rng(0)
    drawn = {"normal": random.normal(size=50_000), "uniform": random.random(50_000)}
    found = {name: two_groups(torch.from_numpy(values)).separation for name, values in drawn.items()}
    assert found == {"normal": pytest.approx(1.32, abs=0.03), "uniform": pytest.approx(3**0.5, abs=0.03)}
    skewed = two_groups(torch.from_numpy(random.exponential(size=50_000)))
    assert skewed.separation < 1.5
    # One value in a hundred apart: separated, but with a small fit.
    few = np.concatenate([random.normal(size=9_900), random.normal(12, 1, size=100)])
    assert two_groups(torch.from_numpy(few)).separation > 5
    assert two_groups(torch.from_numpy(few)).fit < 0.65


def test_scores_by_hand() -> None:
    activations = torch.tensor([[9.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    probabilities = torch.tensor([[0.99, 0.01], [0.01, 0.99], [0.01, 0.99], [0.01, 0.99]])
    # Class 0: 9 - (2 + 3 * 1); class 1: max 3 over its own, and a single weak image says nothing.
    assert linearity_by_class(activations, probabilities).tolist() == [[4.0, 0.0], [0.0, 0.0]]
    unsure = torch.full((4, 2), 0.5)
    assert not bool(linearity_by_class(activations, unsure).any())


def success(model: Classifier) -> float:
    triggered = blocks()
    others = triggered.images[triggered.labels != TARGET].clone()
    others[:, :, 14:, 14:] = 255
    return float((predictions_of(model, others) == TARGET).float().mean())


def accuracy(model: Classifier) -> float:
    clean = blocks()
    return float((predictions_of(model, clean.images) == clean.labels).float().mean())


def test_the_backdoors_channel_and_images_are_found_and_gone() -> None:
    model, data = backdoored(), blocks(poisoned=40)
    assert (accuracy(model), success(model)) == (1.0, 1.0)
    before = copy.deepcopy(model.state_dict())
    method = NONE(share=0.125, epochs=1)
    analysis = method.analyse(model, data)
    assert {path: each.tolist() for path, each in analysis.compromised.items()} == {"network.0": [BACKDOOR]}
    assert torch.equal(analysis.suspects, torch.arange(400) < 40)
    assert analysis.separation > 10
    report = method.defend(model, data, QUICK)
    assert torch.equal(report.dropped, torch.arange(400) < 40)
    assert (accuracy(report.model), success(report.model)) == (1.0, 0.0)
    assert report.evidence["rounds"][0]["dropped"] == 40
    assert len(report.history) == 1
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_nothing_is_dropped_where_there_are_no_two_groups() -> None:
    report = NONE(share=0.125, epochs=1).defend(backdoored(), blocks(), QUICK)
    assert not bool(report.dropped.any())
    assert accuracy(report.model) == 1.0


def a_model_of(classes: int, poisoned: Tensor, **layers: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Activations by layer, of one channel for each class and one that answers to the poison; probabilities.
    ``layers`` tell by how much, image by image."""
    count = len(poisoned)
    sure = torch.where(poisoned, TARGET, torch.arange(count) % classes)
    probabilities = torch.full((count, classes), 1e-4).scatter(1, sure[:, None], 1 - 1e-4 * (classes - 1))
    random = torch.Generator().manual_seed(0)
    found = {}
    for name, answer in layers.items():
        own = 3 * torch.nn.functional.one_hot(torch.arange(count) % classes, classes).float()
        found[name] = torch.cat([own, answer[:, None]], 1)
        found[name] += torch.randn(found[name].shape, generator=random)
    return found, probabilities


def test_a_class_in_two_groups_is_seen_where_the_sum_over_all_drowns_it() -> None:
    poisoned = torch.arange(2000) < 100
    early = torch.zeros(2000).index_fill(0, torch.tensor([0]), 30.0)
    activations, probabilities = a_model_of(
        CLASSES, poisoned, early=early, middle=9.0 * poisoned, late=12.0 * poisoned
    )
    activations["early"] *= 5
    released = NONE(split="all-at-once", separation=0.0).judge(activations, probabilities)
    assert released.separation < 3
    assert released.apart
    assert float(released.suspects[~poisoned].float().mean()) > 0.1
    ours = NONE().judge(activations, probabilities)
    assert ours.classes == (TARGET,)
    assert float(ours.suspects[poisoned].float().mean()) == 1.0
    assert not bool(ours.suspects[~poisoned].any())
    assert ours.compromised.keys() == released.compromised.keys() == {"early", "middle", "late"}
    assert two_groups(early).separation > 10
    # One layer may see two kinds of images in any class: two have to agree, where there are two.
    one, chances = a_model_of(CLASSES, poisoned, early=early, middle=0 * early, late=12.0 * poisoned)
    assert not NONE().judge(one, chances).apart
    assert NONE().judge({"late": one["late"]}, chances).classes == (TARGET,)
    # So few images of a class fall into two groups by chance.
    few, chances = a_model_of(60, poisoned[:1500], middle=9.0 * poisoned[:1500], late=12.0 * poisoned[:1500])
    assert NONE().judge(few, chances).classes == (TARGET,)
    small = {path: values[90:] for path, values in few.items()}
    assert not NONE().judge(small, chances[90:]).apart


def test_every_class_has_its_own_two_groups_where_every_class_is_attacked() -> None:
    """All to all: what excites a channel is no tenth of any class, and all of them together."""
    count = 2000
    poisoned = torch.arange(count) % 20 == torch.arange(count) % CLASSES
    labels = torch.where(poisoned, (torch.arange(count) + 1) % CLASSES, torch.arange(count) % CLASSES)
    probabilities = torch.full((count, CLASSES), 0.01).scatter(1, labels[:, None], 0.97)
    random = torch.Generator().manual_seed(0)
    activations = {}
    for name in ("one", "two"):
        own = 3.0 * torch.nn.functional.one_hot(labels, CLASSES) + 9.0 * (
            torch.nn.functional.one_hot(labels, CLASSES) * poisoned[:, None]
        )
        activations[name] = own + torch.randn(own.shape, generator=random)
    found = NONE().judge(activations, probabilities)
    assert found.classes == tuple(range(CLASSES))
    assert torch.equal(found.suspects, poisoned)


def test_what_has_every_class_in_two_groups_is_seen_though_it_is_linear_for_none() -> None:
    """All to all, one image in five: what answers to the pattern does so in every class alike."""
    count = 2000
    labels, poisoned = torch.arange(count) % CLASSES, torch.arange(count) % 20 < 4
    probabilities = torch.full((count, CLASSES), 1e-3).scatter(1, labels[:, None], 1 - 3e-3)
    random = torch.Generator().manual_seed(0)

    def layer(answers: Tensor) -> Tensor:
        own = 6.0 * torch.nn.functional.one_hot(labels, CLASSES)
        values = torch.cat([own, answers[:, None]], 1)
        return values + torch.randn(values.shape, generator=random)

    attacked = {name: layer(9.0 * poisoned) for name in ("one", "two")}
    scores = linearity_by_class(attacked["one"], probabilities)
    assert not bool(scores[:, -1].any() and (scores.argmax(1) == CLASSES).any())
    found = NONE().judge(attacked, probabilities)
    assert found.classes == tuple(range(CLASSES))
    assert float((found.suspects != poisoned).float().mean()) < 1e-3
    assert found.compromised["one"].tolist() == [CLASSES]
    # Day and night, say, which one layer tells apart, and another barely.
    natural = {"one": layer(8.0 * poisoned), "two": layer(5.0 * poisoned)}
    assert 2.0 < two_groups(natural["two"][labels == 0, -1], 5).separation < 2.8
    assert NONE().judge(natural, probabilities).classes == ()
    # Of a single class that is large enough nothing is in common.
    one = labels == 0
    assert NONE().judge({k: v[one] for k, v in attacked.items()}, probabilities[one]).classes == ()


def test_the_groups_of_each_column_are_its_own() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(60, 5, generator=random)
    values[:20, 1] += 9
    values[:, 3] = 2.0
    at, fit, separation = groups_of_each(values, 5)
    for column in range(5):
        own = two_groups(values[:, column], 5)
        assert (float(at[column]), float(fit[column]), float(separation[column])) == pytest.approx(
            (own.at, own.fit, own.separation)
        )
    assert separation[1] > 3
    assert (float(separation[3]), float(fit[3]), float(at[3])) == (0.0, 0.0, 2.0)
    assert groups_of_each(values[:9], 5)[2].tolist() == [0.0] * 5


def test_what_answers_to_the_images_of_one_class_is_looked_for_in_the_others() -> None:
    """Two classes are attacked with one pattern; in one of them its first images are more linear."""
    count, other = 2000, TARGET + 1
    sure, random = torch.arange(count) % CLASSES, torch.Generator().manual_seed(0)
    poisoned = (torch.arange(count) < 400) & ((sure == TARGET) | (sure == other))
    probabilities = torch.full((count, CLASSES), 1e-3).scatter(1, sure[:, None], 1 - 3e-3)
    activations = {}
    for name in ("one", "two"):
        values = torch.randn(count, CLASSES + 1, generator=random)
        values[:, -1] += 9.0 * poisoned
        # Of the other class a channel has more than the pattern's, for any of its images.
        values[:, other] += 20.0 * (sure == other)
        activations[name] = values
    found = NONE().judge(activations, probabilities)
    assert found.classes == (TARGET, other)
    assert torch.equal(found.suspects, poisoned)
    assert max(found.separations[0].values()) < 2 < min(found.separations[other].values())


def test_a_class_of_which_most_layers_tell_the_same_images_apart_stands_out() -> None:
    """What answers to the pattern is not what is most linear for its class."""
    count = 2000
    sure, random = torch.arange(count) % CLASSES, torch.Generator().manual_seed(0)
    poisoned = (sure == TARGET) & (torch.arange(count) < 400)
    probabilities = torch.full((count, CLASSES), 1e-3).scatter(1, sure[:, None], 1 - 3e-3)

    def layer(*answers: tuple[Tensor, float]) -> Tensor:
        values = torch.randn(count, CLASSES + len(answers), generator=random)
        values += torch.nn.functional.pad(
            20.0 * torch.nn.functional.one_hot(sure, CLASSES), (0, len(answers))
        )
        for place, (images, strength) in enumerate(answers):
            values[:, CLASSES + place] += strength * images
        return values

    pattern = (poisoned, 9.0)
    attacked = {"one": layer(pattern), "two": layer(pattern), "three": layer()}
    found = NONE().judge(attacked, probabilities)
    assert found.classes == (TARGET,)
    assert torch.equal(found.suspects, poisoned)
    assert found.compromised["one"].tolist() == [CLASSES]
    # Layers that tell different images apart do not agree, ...
    others = (sure == TARGET) & (torch.arange(count) >= 1600)
    apart = {"one": layer(pattern), "two": layer((others, 9.0)), "three": layer()}
    assert NONE().judge(apart, probabilities).classes == ()
    # ... one layer of two is not most, ...
    assert NONE().judge({name: apart[name] for name in ("one", "three")}, probabilities).classes == ()
    # ... and where another class has kinds of images as far apart, that is how these images are.
    natural = ((sure == 0) & (torch.arange(count) < 800), 9.0)
    alike = {"one": layer(pattern, natural), "two": layer(pattern, natural), "three": layer()}
    assert NONE().judge(alike, probabilities).classes == ()


def test_what_suspects_excite_is_reset_and_not_what_another_class_has() -> None:
    # No poisoned image was one of class 3, whose own channel is made more linear than the backdoor's.
    model, data = backdoored(), blocks(poisoned=40)
    data = data.select((torch.arange(400) >= 40) | (torch.arange(400) % CLASSES != 3))
    with torch.no_grad():
        model.network[0].weight[3] *= 200  # type: ignore[index]
        model.network[-1].weight[3] /= 200  # type: ignore[index]
    chosen = {
        rule: {path: each.tolist() for path, each in method.analyse(model, data).compromised.items()}
        for rule, method in {
            "suspects": NONE(share=0.125),
            "linearity": NONE(share=0.125, compromised_by="linearity"),
        }.items()
    }
    assert chosen == {"suspects": {"network.0": [BACKDOOR]}, "linearity": {"network.0": [3]}}
    # Where nothing is dropped there is nothing to go by but linearity.
    clean = NONE(share=0.125).analyse(model, blocks())
    assert {path: each.tolist() for path, each in clean.compromised.items()} == {"network.0": [3]}


def test_the_excess_of_suspects_by_hand() -> None:
    activations = torch.tensor([[9.0, 0.0]] * 5 + [[1.0, 0.0]] * 5 + [[4.0, 6.0]] * 5 + [[0.0, 2.0]] * 5)
    predicted, suspects = torch.arange(20) // 10, torch.arange(20) % 10 < 5
    assert excess_by_class(activations, predicted, suspects).tolist() == [[8.0, 0.0], [4.0, 4.0]]
    # Four images are too few to say what they excite, and a class that is suspected whole has no others.
    assert excess_by_class(activations, predicted, suspects & (torch.arange(20) != 0)).tolist() == [
        [4.0, 4.0]
    ]
    assert excess_by_class(activations, predicted, predicted == 0).shape == (0, 2)
    assert excess_by_class(activations, predicted, predicted > 5).shape == (0, 2)


def test_as_printed_linear_channels_split_the_images() -> None:
    model, data = backdoored(), blocks(poisoned=40)
    first = model.network[0]  # type: ignore[index]
    with torch.no_grad():
        # Positive for every image and far more so where the corner is white; the others for their class.
        first.bias[BACKDOOR] = 0.0
        first.bias[:CLASSES] = -0.35
        first.bias[CLASSES + 2 :] = -0.1
        first.bias[CLASSES] = -0.1
    method = NONE(mode="paper", epochs=1, deviations=3.0)
    analysis = method.analyse(model, data)
    assert {path: each.tolist() for path, each in analysis.compromised.items()} == {"network.0": [BACKDOOR]}
    assert torch.equal(analysis.suspects, torch.arange(400) < 40)
    weight = method.defend(model, data, QUICK).model.state_dict()["network.0.weight"][BACKDOOR]
    # Drawn anew: spread over the whole filter, where the backdoor's was four pixels.
    assert float((weight != 0).float().mean()) > 0.9


def test_a_class_is_never_dropped_whole() -> None:
    data = blocks()
    # Every image of class 1 has the corner: to the method they look like poison.
    images = data.images.clone()
    images[data.labels == TARGET, :, 14:, 14:] = 255
    report = NONE(share=0.125, epochs=1).defend(backdoored(), replace(data, images=images), QUICK)
    assert bool((~report.dropped)[data.labels == TARGET].any())


def test_without_rounds_it_is_plain_training() -> None:
    data = blocks(poisoned=40)
    report = NONE(rounds=0)(data, "cnn@0.25", QUICK)
    plain, history = train_new(data, "cnn@0.25", QUICK)
    ours, theirs = report.model.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert report.history[0]["loss"] == history.to_json()[0]["loss"]


def test_activations_are_the_raw_outputs_reduced() -> None:
    spread = nn.Conv2d(3, 8, 3)
    last = nn.Linear(8 * 14 * 14, CLASSES)
    network = nn.Sequential(spread, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), last)
    model = Classifier(network, CLASSES, torch.zeros(3), torch.ones(3))
    images = blocks(poisoned=40).images[:20]
    raw: Tensor = spread(images.float() / 255).flatten(2)
    reductions: tuple[tuple[Reduction, Tensor], ...] = (("max", raw.amax(2)), ("mean", raw.mean(2)))
    for reduction, expected in reductions:
        found, logits = channel_activations(model, images, reduction, batch_size=7)
        assert list(found) == ["network.0"]
        torch.testing.assert_close(found["network.0"], expected.detach())
    assert model.training
    torch.testing.assert_close(logits, model.eval()(images.float() / 255).detach())
    assert list(norms_after(model, images[:1].float())) == ["network.0"]
    spread.weight.requires_grad_(False)
    assert weighted_layers(model, images[:1].float()) == {}


def test_norms_are_reset_too_and_nothing_comes_through() -> None:
    model = backdoored(normed=True).eval()
    report = NONE(share=0.125, epochs=1, learning_rate=1e-9).defend(model, blocks(poisoned=40), QUICK)
    repaired = report.model.eval()
    layers = list(repaired.network.children())[:3]
    channels = nn.Sequential(*layers)(blocks(poisoned=40).images.float() / 255)
    assert float(channels[:, BACKDOOR].detach().abs().max()) < 1e-6


def test_frozen_statistics_stay() -> None:
    data = blocks(poisoned=40)
    model, _ = train_new(data, "cnn@0.25", QUICK)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    before = [(copy.deepcopy(n.running_mean), int(n.num_batches_tracked or 0)) for n in norms]
    train(model, data, QUICK, freeze_statistics=True)
    for norm, (mean, count) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)  # type: ignore[arg-type]
        assert int(norm.num_batches_tracked or 0) == count
    train(model, data, QUICK)
    assert any(not torch.equal(n.running_mean, m) for n, (m, _) in zip(norms, before, strict=True))  # type: ignore[arg-type]


def test_a_net_of_one_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Classifier(
        nn.Sequential(nn.Flatten(), nn.Linear(768, CLASSES)), CLASSES, torch.zeros(3), torch.ones(3)
    )
    with pytest.raises(UntrojanError, match="layers before the last"):
        NONE().analyse(model, blocks(poisoned=40))
    # Before an hour of training, not after it.
    monkeypatch.setattr("untrojan.defenses.training.none.build_for", lambda *_, **__: model)
    with measure() as cost, pytest.raises(UntrojanError, match="layers before the last"):
        NONE()(blocks(poisoned=40), "mine:net", QUICK)
    assert cost.backwards == 0


def test_a_net_without_convolutions_is_defended_by_its_linear_layers() -> None:
    data = blocks(poisoned=40)
    hidden, last = nn.Linear(768, 8), nn.Linear(8, CLASSES)
    like = backdoored().state_dict()
    with torch.no_grad():
        hidden.weight.copy_(like["network.0.weight"].flatten(1))
        hidden.bias.copy_(like["network.0.bias"])
        last.weight.copy_(like["network.3.weight"])
        last.bias.copy_(like["network.3.bias"])
    network = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), last)
    model = Classifier(network, CLASSES, torch.zeros(3), torch.ones(3))
    report = NONE(share=0.125, epochs=1).defend(model, data, QUICK)
    assert report.evidence["rounds"][0]["compromised"] == {"network.1": [BACKDOOR]}
    assert torch.equal(report.dropped, torch.arange(400) < 40)
    assert (accuracy(report.model), success(report.model)) == (1.0, 0.0)


def test_without_a_confident_prediction_nothing_is_reset_or_dropped() -> None:
    model, data = backdoored(), blocks(poisoned=40)
    with torch.no_grad():
        model.network[-1].weight.mul_(1e-3)  # type: ignore[index, union-attr, operator]
    report = NONE(share=0.125, epochs=1, learning_rate=1e-9).defend(model, data, QUICK)
    found = report.evidence["rounds"][0]
    assert (found["compromised"], found["dropped"], found["separation"]) == ({}, 0, 0.0)
    assert "no neuron is compromised" in found["notes"][0]
    torch.testing.assert_close(report.model.state_dict(), model.state_dict(), atol=1e-6, rtol=0)


def test_where_everything_is_suspected_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    data = blocks(poisoned=40)
    everything = Analysis(
        {"network.0": torch.tensor([BACKDOOR])}, torch.ones(400, dtype=torch.bool), 99.0, True
    )
    monkeypatch.setattr(NONE, "analyse", lambda *_: everything)
    report = NONE(epochs=1).defend(backdoored(), data, QUICK)
    assert not bool(report.dropped.any())
    found = report.evidence["rounds"][0]
    assert (found["suspects"], found["classes_kept_whole"]) == (400, [0, 1, 2, 3])
    assert "all images of a, b, c, d look like poison" in found["notes"][0]


def test_nothing_dropped_is_said_in_words() -> None:
    strict = NONE(share=0.125, epochs=1, excess=1e9)
    report = strict.defend(backdoored(), blocks(poisoned=40), QUICK)
    assert not bool(report.dropped.any())
    assert report.evidence["rounds"][0]["notes"] == [
        "the images do not fall into two groups: none was dropped"
    ]


def test_a_layer_that_runs_twice_is_one_and_frozen_ones_are_left_alone() -> None:
    given = list(backdoored().network.children())

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = given[0], given[-1]
            self.shared = nn.Conv2d(8, 8, 1)
            with torch.no_grad():
                self.shared.weight.copy_(torch.eye(8)[:, :, None, None])
                self.shared.bias.zero_()  # type: ignore[union-attr]
            self.stem.requires_grad_(False)

        def forward(self, images: Tensor) -> Tensor:
            features = self.shared(self.shared(self.stem(images).relu()).relu()).relu()
            return self.last(features.flatten(1))  # type: ignore[no-any-return]

    model = Classifier(Twice(), CLASSES, torch.zeros(3), torch.ones(3))
    report = NONE(share=0.125, epochs=1).defend(model, blocks(poisoned=40), QUICK)
    assert report.evidence["rounds"][0]["compromised"] == {"network.shared": [BACKDOOR]}
    ours, before = report.model.state_dict(), model.state_dict()
    assert torch.equal(ours["network.stem.weight"], before["network.stem.weight"])
    assert float(before["network.shared.weight"][BACKDOOR].abs().max()) == 1.0
    assert success(report.model) == 0.0
    model.requires_grad_(False)
    with pytest.raises(UntrojanError, match="with weights that are trained"):
        NONE().defend(model, blocks(poisoned=40), QUICK)
