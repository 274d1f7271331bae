"""How packages get from the server to clients and back; Flower's way is in ``flower.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from untrojan.federated.client import Client
from untrojan.federated.messages import Package, one_line


class Transport(Protocol):
    """A network of nodes, each with a client."""

    def nodes(self) -> Sequence[int]:
        """The nodes that are connected now; at the first call, after waiting for the expected number."""
        ...

    def ask(self, packages: Mapping[int, Package]) -> dict[int, Package | str]:
        """Each node's answer, or in words why there is none. Never raises for a single node's fault."""
        ...


class InProcess:
    """Clients in this very process, one after another: no Flower, no Ray, the same numbers."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self.clients = list(clients)

    def nodes(self) -> Sequence[int]:
        return range(len(self.clients))

    def ask(self, packages: Mapping[int, Package]) -> dict[int, Package | str]:
        return {node: self._answer(self.clients[node], each) for node, each in packages.items()}

    @staticmethod
    def _answer(client: Client, received: Package) -> Package | str:
        # What a client's own code raises must not end the others' training.
        try:
            return client.answer(received)
        except Exception as error:
            return one_line(f"{type(error).__name__}: {error}")
