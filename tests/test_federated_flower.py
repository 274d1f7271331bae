"""Federated learning on Flower: its messages, its simulation engine and its deployment on one machine."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from test_federated import blocks, same
from untrojan.attacks.distributed import DistributedBackdoor
from untrojan.cli.main import main
from untrojan.data.load import load
from untrojan.data.save import save_npz
from untrojan.defenses.training.none import NONE
from untrojan.errors import UntrojanError
from untrojan.federated.deployment import node_of
from untrojan.federated.flower import SILENT, GridTransport, client_app, from_record, to_record
from untrojan.federated.messages import Introduction, Order, Package, package
from untrojan.federated.server import Federation, Server
from untrojan.federated.simulation import Population
from untrojan.federated.transport import InProcess
from untrojan.models.checkpoints import load_checkpoint
from untrojan.training.recipe import Recipe

LOCAL = Recipe(epochs=1, batch_size=16, optimizer="sgd", learning_rate=0.02, weight_decay=5e-4)
FEDERATION = Federation("cnn@0.25", 1, LOCAL, NONE(epochs=1))
# In this process, too: nothing is to be reported from tests.
os.environ.update(SILENT)
PLAN = DistributedBackdoor.for_images((3, 16, 16), epochs=1)
OPTIONS = [
    *("--rounds", "1", "--net", "cnn@0.25", "--local-epochs", "1", "--learning-rate", "0.02"),
    *("--batch-size", "16", "--malicious-epochs", "1", "--defense-option", "epochs=1"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    place = tmp_path / "data.npz"
    save_npz(place, blocks(120), blocks(60, seed=1))
    return place


def in_process(data: Path, clients: int, malicious: int) -> Any:
    """The model that the very same clients train without Flower."""
    splits, population = load(data), Population(clients, malicious)
    members = [population.client(i, share, PLAN) for i, share in enumerate(population.split(splits.train))]
    train = splits.train
    return Server(FEDERATION, train.class_names, train.image_shape, InProcess(members)).run().model


def test_without_flower_the_way_out_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("flwr", "ray") else real(name)
    )
    assert main(["federated", str(data), "--out", str(tmp_path / "run")]) == 2
    assert "needs flwr and ray: pip install 'untrojan[federated]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--malicious", "11"], "--malicious 11 is more than --clients 10"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--insecure"], "belong to --superlink"),
        (["--defense", "plain", "--defense-option", "share=.1"], "needs a defence"),
        (["--defense-option", "sher=.1"], "'sher'"),
        (["--trigger", "stripes"], "unknown trigger 'stripes'"),
        (["--target", "zebra"], "no class 'zebra'"),
        (["--net", "vgg99"], "unknown architecture"),
    ],
)
def test_wrong_options_end_in_a_line(
    arguments: list[str], wrong: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("untrojan.federated.flower.prepare", lambda: None)
    assert main(["federated", str(data), "--out", str(tmp_path / "run"), *arguments]) == 2
    assert wrong in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_nodes_settings_are_checked() -> None:
    node = node_of({"data": "/x", "partition-id": 2, "malicious": True})
    assert (node.partition_id, node.malicious) == (2, True)
    with pytest.raises(UntrojanError, match="lacks data"):
        node_of({})
    with pytest.raises(UntrojanError, match="no option 'dataset'"):
        node_of({"data": "/x", "dataset": "y"})
    with pytest.raises(UntrojanError, match="no_such"):
        node_of({"data": "no_such", "partition-id": 0}).client(7)


# What needs Flower


def test_packages_travel_as_records() -> None:
    pytest.importorskip("flwr")
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict

    tensors = {"w": torch.randn(3, 2), "n": torch.tensor(4), "none": torch.zeros(0, 5)}
    arrived = from_record(to_record(package(Introduction("client-1", 5), tensors)))
    assert arrived.facts == {"name": "client-1", "images": 5}
    assert all(torch.equal(value, tensors[key]) for key, value in arrived.tensors.items())
    assert arrived.tensors.keys() == tensors.keys()
    hostile = [
        RecordDict(),
        RecordDict({"facts": ConfigRecord({"facts": "{"}), "tensors": ArrayRecord()}),
        RecordDict({"facts": ConfigRecord({"facts": "[" * 100_000}), "tensors": ArrayRecord()}),
        RecordDict({"facts": ConfigRecord({"facts": "7"}), "tensors": ArrayRecord()}),
        RecordDict({"facts": ConfigRecord({"facts": "x" * 2**21}), "tensors": ArrayRecord()}),
    ]
    for record in hostile:
        with pytest.raises(UntrojanError, match="message"):
            from_record(record)
    # A NumPy file, which could hold objects, is not even looked into.
    foreign = ArrayRecord([torch.randn(3).numpy()])
    with pytest.raises(UntrojanError, match="bytes are not"):
        from_record(RecordDict({"facts": ConfigRecord({"facts": "{}"}), "tensors": foreign}))


class Grid:
    """Flower's grid as far as the transport uses it: node 3's message is lost, node 2 has an error."""

    def __init__(self, online: Iterable[list[int]]) -> None:
        self.online = iter(online)
        self.sent: dict[str, Any] = {}

    def get_node_ids(self) -> list[int]:
        return next(self.online)

    def push_messages(self, messages: list[Any]) -> list[str]:
        self.sent = {str(i): message for i, message in enumerate(messages)}
        return list(self.sent)

    def pull_messages(self, ids: list[str]) -> Iterator[Any]:
        for key in ids:
            node = self.sent[key].metadata.dst_node_id
            if node < 3:
                yield SimpleNamespace(
                    metadata=SimpleNamespace(reply_to_message_id=key, src_node_id=node),
                    has_error=lambda node=node: node == 2,
                    error=SimpleNamespace(reason="died\nof \x1b[0m cold", code=1),
                    content=self.sent[key].content,
                )


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower lets only a process that runs a task of its make messages."""
    pytest.importorskip("flwr")
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(f"flwr.supercore.task_identity.TaskIdentity.{name}", 1)


@pytest.mark.usefixtures("identity")
def test_a_silent_node_is_waited_for_no_longer_than_asked() -> None:
    grid: Any = Grid([[1], [1, 2], [3, 2, 1], [1, 2]])
    transport = GridTransport(grid, 3, timeout=0.5)
    assert transport.nodes() == [1, 2, 3]
    # Waiting for the expected number is for the beginning alone.
    assert transport.nodes() == [1, 2]
    said = package(Order("introduce", 1, "cnn", ("a", "b"), (3, 16, 16), LOCAL))
    replies = transport.ask(dict.fromkeys((1, 2, 3), said))
    assert isinstance(replies[1], Package)
    assert replies[1].facts == said.facts
    assert replies[2] == "died of [0m cold"
    assert replies[3] == "no answer within 0.5 s"
    transport.stopped.set()
    with pytest.raises(UntrojanError, match="ended from outside"):
        transport.ask({3: said})


@pytest.mark.usefixtures("identity")
def test_a_client_without_its_data_refuses_in_words() -> None:
    from flwr.app import Context, Message, RecordDict

    def client_of(context: Context) -> Any:
        return node_of(context.node_config).client(context.node_id)

    app = client_app(client_of)
    context = Context(
        run_id=1, node_id=2, node_config={"data": "/no/such"}, state=RecordDict(), run_config={}
    )
    sent = package(Order("introduce", 1, "cnn", ("a", "b"), (3, 16, 16), LOCAL))
    reply = app(Message(to_record(sent), dst_node_id=2, message_type="query"), context)
    assert "/no/such" in from_record(reply.content).facts["refused"]


def test_nothing_calls_home() -> None:
    pytest.importorskip("flwr")
    code = (
        "from untrojan.federated.flower import prepare; prepare(); "
        "from flwr.supercore import telemetry; print(telemetry.FLWR_TELEMETRY_ENABLED)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in SILENT}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.stdout.strip() == "0", done.stderr


def test_a_simulation_trains_what_its_clients_train_elsewhere(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    pytest.importorskip("ray")
    out = tmp_path / "run"
    command = [sys.executable, "-m", "untrojan", "federated", str(data), *OPTIONS, "--clients", "3"]
    done = subprocess.run(
        [*command, "--malicious", "1", "--at-once", "1", "--threads", "1", "--out", str(out)],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "after NONE: accuracy" in done.stdout
    model, _ = load_checkpoint(out / "model.safetensors")
    assert same(model, in_process(data, 3, 1))
    metrics = json.loads((out / "metrics.json").read_text())
    assert [row["phase"] for row in metrics["rounds"]] == ["training", "reset", "after defence"]
    assert [row["clients"] for row in metrics["rounds"]] == [3, 3, 3]
    assert metrics["before"]["round"] == 1
    assert metrics["after"]["round"] == 3
    assert metrics["excluded"] == []
    assert len((out / "history.csv").read_text().splitlines()) == 4
    assert not (out / ".work").exists()


# A deployment on loopback addresses


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            yield
        finally:
            # Its helpers, too: they are of its session.
            for sent in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, sent)
                except ProcessLookupError:
                    break
                if sent == signal.SIGTERM:
                    time.sleep(1.0)
            process.wait()


def wait_for(port: int, seconds: float = 60.0) -> None:
    """Until something listens there: a command that comes sooner is told that there is no link."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)


@pytest.mark.slow
def test_a_deployment_trains_the_same_model(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    link, *ports = free_ports(4)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **SILENT, "FLWR_HOME": str(tmp_path / "flower"), "PATH": programs}
    node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--node-config"]
    own = f'data="{data}" num-partitions=2 partition-id='
    configs = [f"{own}0 malicious=true attackers=1 malicious-epochs=1", f"{own}1", 'data="/no/such"']
    out = tmp_path / "run"
    with running(
        ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", str(link)],
        tmp_path / "link.log", environment,
    ):  # fmt: skip
        wait_for(link)
        nodes = [
            running([*node, config, "--port", str(port)], tmp_path / f"node{port}.log", environment)
            for config, port in zip(configs, ports, strict=True)
        ]
        with nodes[0], nodes[1], nodes[2]:
            done = subprocess.run(
                [sys.executable, "-m", "untrojan", "federated", str(data), *OPTIONS, "--clients", "3",
                 "--superlink", f"127.0.0.1:{link}", "--insecure", "--out", str(out)],
                capture_output=True, text=True, timeout=900,
            )  # fmt: skip
    assert done.returncode == 0, (done.stderr, (tmp_path / "link.log").read_text())
    metrics = json.loads((out / "metrics.json").read_text())
    assert [row["clients"] for row in metrics["rounds"]] == [2, 2, 2]
    assert {each["round"] for each in metrics["excluded"]} == {1, 2, 3}
    assert "/no/such" in metrics["excluded"][0]["reason"]
    model, _ = load_checkpoint(out / "model.safetensors")
    assert same(model, in_process(data, 2, 1))
