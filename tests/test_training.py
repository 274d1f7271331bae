"""The training loop: exact resumption, schedules, and errors that say what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from untrojan.cost import measure
from untrojan.data.image_set import ImageSet, numbered
from untrojan.errors import UntrojanError
from untrojan.models.classifier import Classifier, predictions_of
from untrojan.training.loop import train
from untrojan.training.presets import preset, probe_recipe
from untrojan.training.recipe import Recipe

QUICK = Recipe(epochs=3, batch_size=16, learning_rate=0.01, crop_padding=1, flip=True)


def tiny_net(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(8, 3),
    )  # fmt: skip
    return Classifier(network, 3, torch.full((3,), 0.5), torch.full((3,), 0.25))


def coloured(count: int = 100) -> ImageSet:
    """Three classes told apart by their colour."""
    torch.manual_seed(2)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 128, (count, 3, 8, 8))
    images[torch.arange(count), labels] += 100
    return ImageSet(images.to(torch.uint8), labels, ("red", "green", "blue"), numbered(count))


def test_a_separable_set_is_learned_and_the_history_tells() -> None:
    model, data = tiny_net(), coloured()
    history = train(model, data, replace(QUICK, epochs=20, schedule="one_cycle", learning_rate=0.02))
    assert float((predictions_of(model, data.images) == data.labels).float().mean()) > 0.95
    assert len(history.epochs) == 20
    assert history.epochs[-1].loss < history.epochs[0].loss
    assert history.epochs[-1].accuracy > 0.9
    assert not model.training


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("interrupted_at", [4, 7, 10])
def test_killed_run_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, interrupted_at: int
) -> None:
    monkeypatch.setattr("untrojan.training.loop.CHECKPOINT_SECONDS", 0.0)
    recipe = replace(QUICK, optimizer=optimizer, schedule="one_cycle")
    data = coloured()
    whole = tiny_net()
    with measure() as cost:
        expected = train(whole, data, recipe, seed=5)

    calls = 0

    def interrupt(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls > interrupted_at:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "victim.pt"
    killed = tiny_net()
    handle = killed.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(killed, data, recipe, seed=5, checkpoint=checkpoint)
    handle.remove()
    resumed = tiny_net(seed=9)
    with measure() as around, measure() as resumed_cost:
        history = train(resumed, data, recipe, seed=5, checkpoint=checkpoint)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert [e.loss for e in history.epochs] == [e.loss for e in expected.epochs]
    assert [e.accuracy for e in history.epochs] == [e.accuracy for e in expected.epochs]
    # What was done before counts, what was lost does not.
    assert resumed_cost.so_far()[1:] == around.so_far()[1:] == cost.so_far()[1:]


def test_hooks_that_keep_a_state_resume_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("untrojan.training.loop.CHECKPOINT_SECONDS", 0.0)
    data, steps = coloured(), 3 * 7

    def run(model: Classifier, checkpoint: Path | None, end: int = steps) -> Tensor:
        total = torch.zeros(2)

        def after_step(model: Classifier) -> None:
            last = model.network[6]  # type: ignore[index]
            with torch.no_grad():
                last.weight.clamp_(-0.2, 0.2)
                # What is to come depends on all that was: only an exact state goes on exactly.
                total[0] = 0.9 * total[0] + last.weight[0, 0]
                last.bias.add_(0.01 * total[0])
            total[1] += 1
            if total[1] >= end:
                raise KeyboardInterrupt

        try:
            train(
                model, data, QUICK, seed=5, checkpoint=checkpoint, after_step=after_step, state={"t": total}
            )
        except KeyboardInterrupt:
            assert end <= steps
        return total

    whole, killed, resumed = tiny_net(), tiny_net(), tiny_net(seed=9)
    expected = run(whole, None, steps + 99)
    for place, end in (("early.pt", 4), ("late.pt", 16)):
        run(killed, tmp_path / place, end)
        assert torch.equal(run(resumed, tmp_path / place, steps + 99), expected)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        killed, resumed = tiny_net(), tiny_net(seed=9)
    assert float(whole.network[6].weight.detach().abs().max()) == pytest.approx(0.2)  # type: ignore[index]


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    checkpoint, data = tmp_path / "victim.pt", coloured()
    with measure() as first:
        train(tiny_net(), data, QUICK, checkpoint=checkpoint)
    passed: list[Tensor] = []
    again = tiny_net()
    again.register_forward_hook(lambda module, inputs, logits: passed.append(logits))
    with measure() as cost:
        train(again, data, QUICK, checkpoint=checkpoint)
    assert not passed
    # The model cost what it cost, whoever asks.
    assert cost.so_far()[1:] == first.so_far()[1:]
    assert cost.backwards > 0
    assert cost.seconds > 0.5 * first.seconds


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoint, data = tmp_path / "victim.pt", coloured()
    train(tiny_net(), data, QUICK, checkpoint=checkpoint)
    with pytest.raises(UntrojanError, match="another run"):
        train(tiny_net(), data, QUICK, seed=1, checkpoint=checkpoint)


def test_a_network_that_has_nothing_to_train() -> None:
    frozen = tiny_net().requires_grad_(False)
    with pytest.raises(UntrojanError, match="no weights that are trained"):
        train(frozen, coloured(), QUICK)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    train(tiny_net(), coloured(), QUICK)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_divergence_is_a_clear_error() -> None:
    with pytest.raises(UntrojanError, match="lower learning_rate"):
        train(tiny_net(), coloured(), replace(QUICK, optimizer="sgd", learning_rate=1e30))


def test_wrong_number_of_classes_is_a_clear_error() -> None:
    data = replace(coloured(), class_names=("red", "green", "blue", "white"))
    with pytest.raises(UntrojanError, match="3 outputs and the data have 4"):
        train(tiny_net(), data, QUICK)


def test_last_batch_of_one_image_is_left_out() -> None:
    data = coloured(33)
    with measure() as cost:
        train(tiny_net(), data, replace(QUICK, epochs=1))
    assert cost.backwards == 2


def test_steps_schedule_decays_at_its_milestones() -> None:
    recipe = replace(QUICK, epochs=4, schedule="steps", milestones=(2, 3), learning_rate=1e-3)
    rates = [epoch.learning_rate for epoch in train(tiny_net(), coloured(), recipe).epochs]
    assert rates == pytest.approx([1e-3, 1e-4, 1e-5, 1e-5])


def test_loss_and_batch_hooks_see_rows_and_bytes() -> None:
    seen: list[Tensor] = []

    def transform(images: Tensor, labels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        assert images.dtype == torch.uint8
        return images, torch.zeros_like(labels)

    def loss(model: Classifier, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert not bool(labels.any())
        seen.append(rows)
        logits = model(images)
        return nn.functional.cross_entropy(logits, labels), logits

    train(tiny_net(), coloured(), replace(QUICK, epochs=1), loss=loss, batch_transform=transform)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(100))


def test_presets_are_by_name_and_scale() -> None:
    assert preset("paper-victim").epochs == 100
    assert (preset("paper-probe").crop_padding, preset("paper-probe").flip) == (0, False)
    with pytest.raises(UntrojanError, match="desk-probe"):
        preset("nonsense")
    assert [probe_recipe(n).epochs for n in (100, 4000, 50_000, 10**7)] == [40, 25, 8, 8]


def test_the_checkpoint_of_a_network_that_has_changed_since(tmp_path: Path) -> None:
    images = ImageSet(
        torch.zeros(32, 3, 8, 8, dtype=torch.uint8), torch.arange(32) % 2, ("a", "b"), numbered(32)
    )

    def net(width: int) -> Classifier:
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.Linear(width, 2))
        return Classifier(network, 2, torch.zeros(3), torch.ones(3), "mine:net", "float32", (3, 8, 8))

    checkpoint = tmp_path / "mine.pt"
    train(net(4), images, QUICK, checkpoint=checkpoint)
    with pytest.raises(UntrojanError, match="another network"):
        train(net(5), images, QUICK, checkpoint=checkpoint)
