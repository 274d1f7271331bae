"""Flower beneath: packages as its messages, a client as its ClientApp, its grid as the server's transport.

Flower (Beutel et al., "Flower: A Friendly Federated Learning Research Framework", 2020) carries messages;
what is in them, and whether it is believed, is decided in ``messages.py``. Flower is an optional dependency,
imported inside functions, after its and Ray's reporting of usage has been switched off.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from untrojan.errors import UntrojanError
from untrojan.federated.client import Client
from untrojan.federated.messages import LARGEST_FACTS, Package, from_bytes, one_line, refusal, to_bytes

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

FACTS, TENSORS, RAW = "facts", "tensors", "raw"
SILENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray announces a change of a default with a warning where this is not set.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment in which neither Flower nor Ray calls home. Both read it when they are imported."""
POLL_SECONDS = 0.2


def prepare() -> None:
    """Called before Flower is imported. Raises UntrojanError where it is not installed."""
    if missing := [name for name in ("flwr", "ray") if importlib.util.find_spec(name) is None]:
        raise UntrojanError(
            f"federated learning needs {' and '.join(missing)}: pip install 'untrojan[federated]'"
        )
    os.environ.update(SILENT)
    importlib.import_module("flwr")
    # What Flower tells of each round the progress bar tells, too.
    logging.getLogger("flwr").setLevel(logging.ERROR)


def to_record(sent: Package) -> RecordDict:
    """A package as Flower carries it."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    arrays = {}
    for name, tensor in sent.tensors.items():
        kind, shape, content = to_bytes(name, tensor)
        arrays[name] = Array(dtype=kind, shape=shape, stype=RAW, data=content)
    facts = ConfigRecord({FACTS: json.dumps(sent.facts)})
    return RecordDict({FACTS: facts, TENSORS: ArrayRecord(arrays)})


def from_record(record: RecordDict) -> Package:
    """The package in what Flower received. Raises UntrojanError where there is none."""
    from flwr.app import ArrayRecord, ConfigRecord

    config, arrays = record.get(FACTS), record.get(TENSORS)
    text = config.get(FACTS) if isinstance(config, ConfigRecord) else None
    if not isinstance(text, str) or not isinstance(arrays, ArrayRecord) or len(text) > LARGEST_FACTS:
        raise UntrojanError("the message is not one of untrojan's")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise UntrojanError("the message's facts are no JSON object")
    tensors = {name: from_bytes(name, array.dtype, array.shape, array.data) for name, array in arrays.items()}
    return Package(facts, tensors)


def client_app(client_of: Callable[[Context], Client]) -> ClientApp:
    """A ClientApp whose node's client ``client_of`` finds by the node's configuration.

    A client that can't be made, for want of its data say, refuses in words like any other.
    """
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    def answer(message: Message, context: Context) -> Message:
        try:
            reply = to_record(client_of(context).answer(from_record(message.content)))
        except UntrojanError as error:
            reply = to_record(refusal(error))
        return Message(reply, reply_to=message)

    app = ClientApp()
    app.query()(answer)
    app.train()(answer)
    return app


class GridTransport:
    """A transport over Flower's grid, in a simulation and in a deployment alike."""

    def __init__(
        self,
        grid: Grid,
        expected: int,
        *,
        patience: float = 600.0,
        timeout: float = 3600.0,
        stopped: threading.Event | None = None,
    ) -> None:
        """``expected`` nodes are waited for, ``patience`` seconds at most, before the first round;
        ``timeout`` is how long a round waits for answers, in seconds. ``stopped`` ends every wait."""
        self.grid, self.expected, self.patience, self.timeout = grid, expected, patience, timeout
        self.stopped = stopped or threading.Event()

    def nodes(self) -> Sequence[int]:
        """The nodes that are connected. Raises UntrojanError where the simulation has been ended."""
        until = time.monotonic() + self.patience
        while len(online := sorted(self.grid.get_node_ids())) < self.expected:
            if time.monotonic() > until:
                break
            self._wait()
        # From now on whoever is there takes part.
        self.expected = 0
        return online

    def ask(self, packages: Mapping[int, Package]) -> dict[int, Package | str]:
        from flwr.app import Message, MessageType

        messages = [
            Message(
                to_record(each),
                dst_node_id=node,
                message_type=MessageType.TRAIN if each.facts["task"] == "train" else MessageType.QUERY,
                ttl=self.timeout,
            )
            for node, each in packages.items()
        ]
        waiting = {each for each in self.grid.push_messages(messages) if each}
        del messages
        replies: dict[int, Package | str] = {}
        until = time.monotonic() + self.timeout
        while waiting and time.monotonic() < until:
            for message in self.grid.pull_messages(sorted(waiting)):
                waiting.discard(message.metadata.reply_to_message_id)
                replies[message.metadata.src_node_id] = _content(message)
            if waiting:
                self._wait()
        late = f"no answer within {self.timeout:g} s"
        return {node: replies.get(node, late) for node in packages}

    def _wait(self) -> None:
        if self.stopped.wait(POLL_SECONDS):
            raise UntrojanError("the federated training was ended from outside")


def _content(message: Message) -> Package | str:
    if message.has_error():
        return one_line(message.error.reason or f"Flower's error {message.error.code}")
    try:
        return from_record(message.content)
    except UntrojanError as error:
        return str(error)
