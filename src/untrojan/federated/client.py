"""A client: trains the global model on images that never leave it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from untrojan.attacks.distributed import Attacker
from untrojan.data.image_set import ImageSet
from untrojan.defenses.training.report import keeping_every_class
from untrojan.errors import UntrojanError
from untrojan.federated.messages import (
    Introduction,
    Order,
    Package,
    Reported,
    Trained,
    exchanged,
    package,
    read,
    refusal,
    take_weights,
)
from untrojan.models.channels import channel_activations
from untrojan.models.classifier import Classifier
from untrojan.models.registry import build, is_user_code
from untrojan.seeding import generator
from untrojan.training.loop import train

DROPPED, PROBABILITIES, LAYER = "dropped", "probabilities", "layer/"
"""Names of tensors in messages, beside the weights' own."""


@dataclass(frozen=True, eq=False)
class Client:
    """One participant, honest or not."""

    name: str
    data: ImageSet
    seed: int = 0
    attacker: Attacker | None = None
    """None for an honest client."""
    own_code: str | None = None
    """The one ``module:factory`` that the server may name as the architecture."""
    device: str = "cpu"

    def answer(self, received: Package) -> Package:
        """Do what the server asks. What can't be done is refused in words; the server goes on without."""
        try:
            order = read(Order, received, "the server")
            if order.task == "introduce":
                self._check_data(order)
                return package(Introduction(self.name, len(self.data)))
            weights = dict(received.tensors)
            dropped = weights.pop(DROPPED, None)
            model = self._model(order, weights)
            if order.task == "report":
                return self._report(model, order)
            return self._train(model, order, dropped)
        except UntrojanError as error:
            return refusal(error)

    def _check_data(self, order: Order) -> None:
        if order.image_shape != self.data.image_shape:
            raise UntrojanError(
                f"its images are {self.data.image_shape}, the federation's {order.image_shape}"
            )
        if order.class_names != self.data.class_names:
            raise UntrojanError("its classes are not the federation's, or in another order")

    def _model(self, order: Order, weights: Mapping[str, Tensor]) -> Classifier:
        # Building such a network imports code: only what this machine's owner has named.
        if is_user_code(order.architecture) and order.architecture.partition("@")[0] != self.own_code:
            raise UntrojanError(f"it was not told to trust {order.architecture}")
        channels = order.image_shape[0]
        model = build(
            order.architecture,
            num_classes=len(order.class_names),
            image_shape=order.image_shape,
            mean=torch.zeros(channels),
            std=torch.ones(channels),
            precision=order.recipe.precision,
        )
        take_weights(model, weights, "the server")
        return model.to(self.device)

    def _train(self, model: Classifier, order: Order, dropped: Tensor | None) -> Package:
        data, recipe, transform = self.data, order.recipe, None
        if self.attacker is not None and not self._stopped(order):
            # An attacker keeps the images that a defence has found.
            plan = self.attacker.plan
            recipe = plan.recipe(recipe, order.after_defense)
            transform = plan.on_batches(self.attacker.trigger)
        elif dropped is not None:
            data = data.select(~keeping_every_class(self._mask(dropped), data)[0])
        seed = generator(self.seed, "client", self.name, order.round).initial_seed()
        history = train(
            model, data, recipe, seed=seed, batch_transform=transform,
            freeze_statistics=order.after_defense, description=f"client {self.name}",
        )  # fmt: skip
        return package(Trained(len(data), history.epochs[-1].loss), exchanged(model))

    def _stopped(self, order: Order) -> bool:
        return (
            order.after_defense and self.attacker is not None and self.attacker.plan.after_defense == "stops"
        )

    def _mask(self, dropped: Tensor) -> Tensor:
        count = len(self.data)
        sound = dropped.dtype == torch.int64 and dropped.ndim == 1 and len(dropped) > 0
        if not sound or not 0 <= int(dropped.min()) <= int(dropped.max()) < count:
            raise UntrojanError(f"the server: {DROPPED} holds no rows of {count} images")
        return torch.zeros(count, dtype=torch.bool).index_fill_(0, dropped, True)

    def _report(self, model: Classifier, order: Order) -> Package:
        images = self.data.images
        if self.attacker is not None and not self.attacker.plan.hides:
            images = self.attacker.plan.stamped(images, self.attacker.trigger, order.recipe.batch_size)
        activations, logits = channel_activations(model, images, order.reduction)
        tensors = {LAYER + path: values for path, values in activations.items()}
        return package(Reported(len(images)), {**tensors, PROBABILITIES: logits.softmax(1)})
