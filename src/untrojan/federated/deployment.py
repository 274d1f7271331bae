"""The same server and clients on several machines: Flower's SuperLink and SuperNodes.

``untrojan federated --superlink ADDRESS`` runs on the SuperLink's machine. It hands Flower a small app whose
two halves are :func:`server_app` and :func:`client_app_of_node`; the first finds its plan in the run folder,
the second its images in the configuration of the SuperNode that it runs on. See ``docs/federated.md``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from untrojan.attacks.distributed import Attacker, DistributedBackdoor
from untrojan.data.image_set import Splits
from untrojan.data.load import load
from untrojan.errors import UntrojanError
from untrojan.federated.client import Client
from untrojan.federated.flower import SILENT, GridTransport, client_app, prepare
from untrojan.federated.messages import Name, one_line
from untrojan.federated.server import FederatedReport, Federation, Server
from untrojan.federated.simulation import Population, measure_on
from untrojan.federated.state import rounds_done
from untrojan.federated.transport import InProcess, Transport
from untrojan.progress import task
from untrojan.registry import validated
from untrojan.runs import json_text, write_bytes_atomically

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

STATE, PLAN, FAILED = "federation.safetensors", "plan.json", "failed.txt"
APP = {
    "pyproject.toml": """[project]
name = "untrojan-federated"
version = "1.0.0"
description = "Federated training by untrojan"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "untrojan"

[tool.flwr.app.components]
serverapp = "untrojan_federated.server:app"
clientapp = "untrojan_federated.client:app"

[tool.flwr.app.config]
plan = ""
""",
    "untrojan_federated/__init__.py": "",
    "untrojan_federated/server.py": (
        "from untrojan.federated.deployment import server_app\n\napp = server_app()\n"
    ),
    "untrojan_federated/client.py": (
        "from untrojan.federated.deployment import client_app_of_node\n\napp = client_app_of_node()\n"
    ),
}
"""The app that Flower ships to its nodes: two references to what is installed there."""


@dataclass(frozen=True)
class Deployment:
    """Everything the server needs to know, as JSON in the run folder."""

    data: str
    """Whose test images measure the global model; no image of it is trained on."""
    federation: Federation
    attack: DistributedBackdoor
    clients: Annotated[int, Ge(1)]
    """SuperNodes to wait for."""
    size: int | None = None
    patience: Annotated[float, Gt(0)] = 600.0
    """Seconds to wait for them."""
    timeout: Annotated[float, Gt(0)] = 3600.0
    """Seconds a round waits for answers."""


@dataclass(frozen=True)
class Node:
    """A SuperNode's settings, ``--node-config`` with underscores as dashes."""

    data: str
    """Its own images, anything ``untrojan`` reads."""
    name: Name | None = None
    """By default ``client-`` and the partition, or the SuperNode's number."""
    size: int | None = None
    seed: int = 0
    architecture: str | None = None
    """The one ``module:factory`` that the server may name."""
    partition_id: Annotated[int, Ge(0)] | None = None
    num_partitions: Annotated[int, Ge(1)] = 10
    """For experiments: this SuperNode has that part of ``data`` rather than all of it."""
    dirichlet: Annotated[float, Gt(0)] | None = None
    malicious: bool = False
    """For experiments: attack."""
    attacker: Annotated[int, Ge(0)] = 0
    attackers: Annotated[int, Ge(1)] = 4
    target: Annotated[int, Ge(0)] = 2
    trigger: str = "strips"
    poisoned: Annotated[int, Ge(1)] | None = None
    malicious_epochs: Annotated[int, Ge(1)] | None = None
    malicious_rate: Annotated[float, Gt(0)] | None = None

    def client(self, node_id: int) -> Client:
        """The client. Raises UntrojanError where its data can't be read or its settings don't fit."""
        data = load(self.data, size=self.size).train
        number = self.partition_id
        if number is not None:
            population = Population(self.num_partitions, 0, self.dirichlet, self.seed)
            if number >= self.num_partitions:
                raise UntrojanError(
                    f"partition-id {number} of {self.num_partitions} partitions: count from 0"
                )
            data = population.split(data)[number]
        attacker = None
        if self.malicious:
            given = {
                "poisoned": self.poisoned,
                "epochs": self.malicious_epochs,
                "learning_rate": self.malicious_rate,
            }
            plan = DistributedBackdoor.for_images(
                data.image_shape, target=self.target, trigger=self.trigger,
                **{key: value for key, value in given.items() if value is not None},
            )  # fmt: skip
            part = plan.part(self.attacker, self.attackers, data.image_shape, self.seed)
            attacker = Attacker(plan, part)
        name = self.name or f"client-{node_id if number is None else number}"
        return Client(name, data, self.seed, attacker, self.architecture)


def node_of(config: Mapping[str, Any]) -> Node:
    """A SuperNode's settings from its ``--node-config``. Raises UntrojanError for a wrong one."""
    given = {key.replace("-", "_"): value for key, value in config.items()}
    if "data" not in given:
        raise UntrojanError('--node-config lacks data: give data="/path/to/images"')
    return validated(Node, given, "--node-config")


def client_app_of_node() -> ClientApp:
    """The ClientApp of a deployment: one client a SuperNode."""
    prepare()

    def client_of(context: Context) -> Client:
        return node_of(context.node_config).client(context.node_id)

    return client_app(client_of)


def server_app() -> ServerApp:
    """The ServerApp of a deployment. Its run configuration names the plan that ``deploy`` has written."""
    prepare()
    from flwr.serverapp import ServerApp

    app = ServerApp()
    app.main()(_serve)
    return app


def _serve(grid: Grid, context: Context) -> None:
    place = Path(str(context.run_config["plan"]))
    try:
        serve(grid, place)
    except UntrojanError as error:
        write_bytes_atomically(place.with_name(FAILED), str(error).encode())
        raise


def serve(grid: Grid, place: Path, notify: Callable[[str], None] = print) -> FederatedReport:
    """Run the plan at ``place`` to its end. Its state, beside it, is what the waiting command reads."""
    plan = validated(Deployment, json.loads(place.read_text()), str(place))
    transport = GridTransport(grid, plan.clients, patience=plan.patience, timeout=plan.timeout)
    splits = load(plan.data, size=plan.size)
    return _server(plan, splits, transport, place.with_name(STATE), notify).run()


def _server(
    plan: Deployment, splits: Splits, transport: Transport, state: Path, notify: Callable[[str], None]
) -> Server:
    if splits.test is None:
        raise UntrojanError("the global model is measured on test images and the data have none")
    return Server(
        plan.federation, splits.test.class_names, splits.test.image_shape, transport,
        measure=measure_on(splits.test, plan.attack, plan.federation.seed), state=state, notify=notify,
    )  # fmt: skip


def deploy(
    plan: Deployment,
    splits: Splits,
    superlink: str,
    *,
    work: Path,
    root_certificates: Path | None = None,
    insecure: bool = False,
) -> FederatedReport:
    """Submit the plan to the SuperLink on this machine at ``superlink`` (host:port) and wait for its end.

    ``work`` is a folder that the SuperLink's processes can reach, too. The connection is encrypted, checked
    by ``root_certificates`` where they are given, unless ``insecure``.

    Raises UntrojanError where Flower refuses or the training fails, with the reason where it left one.
    """
    prepare()
    state, failed = work / STATE, work / FAILED
    failed.unlink(missing_ok=True)
    write_bytes_atomically(work / PLAN, json_text(plan).encode())
    environment = _write_app(work, superlink, root_certificates, insecure)
    rounds = len(plan.federation.steps())
    if rounds_done(state) < rounds:
        log = _run_app(work, environment, state, rounds)
        if failed.exists():
            raise UntrojanError(one_line(failed.read_text(errors="replace")))
        if rounds_done(state) < rounds:
            told = one_line(log[-400:]) if log else "it left no word"
            raise UntrojanError(f"the training on {superlink} ended before its time: {told}")
    # No round is left: this only reads the state.
    return _server(plan, splits, InProcess([]), state, lambda _: None).run()


def _write_app(work: Path, superlink: str, certificates: Path | None, insecure: bool) -> dict[str, str]:
    """The app and Flower's configuration; the environment in which ``flwr`` finds the latter."""
    home = work / "flower"
    shutil.rmtree(home, ignore_errors=True)
    for name, text in APP.items():
        place = home / "app" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    lines = ["[superlink]", 'default = "here"', "", "[superlink.here]", f"address = {json.dumps(superlink)}"]
    if insecure:
        lines.append("insecure = true")
    elif certificates is not None:
        lines.append(f"root-certificates = {json.dumps(str(certificates.absolute()))}")
    (home / "config.toml").write_text("\n".join(lines) + "\n")
    return {**os.environ, **SILENT, "FLWR_HOME": str(home)}


def _run_app(work: Path, environment: dict[str, str], state: Path, rounds: int) -> str:
    """``flwr run`` until it ends; what it printed. Where this is interrupted the run is stopped."""
    flwr = shutil.which("flwr", path=str(Path(sys.executable).parent)) or shutil.which("flwr")
    if flwr is None:
        raise UntrojanError("there is no flwr command beside this Python: pip install 'untrojan[federated]'")
    config = f"plan={json.dumps(str((work / PLAN).absolute()))}"
    command = [flwr, "run", str(work / "flower" / "app"), "here", "--stream", "--run-config", config]
    log = work / "flower.log"
    with (
        log.open("w") as output,
        task("federated training", rounds, "rounds", done=rounds_done(state)) as bar,
    ):
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        seen = rounds_done(state)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                now = rounds_done(state)
                bar.advance(now - seen)
                seen = now
        except BaseException:
            process.terminate()
            _stop_run(flwr, log, environment)
            raise
        finally:
            process.wait()
    return log.read_text(errors="replace")


def _stop_run(flwr: str, log: Path, environment: dict[str, str]) -> None:
    words = log.read_text(errors="replace").split()
    run = next(
        (words[i + 1] for i, each in enumerate(words[:-1]) if each == "run" and words[i + 1].isdigit()), None
    )
    if run is not None:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run([flwr, "stop", run, "here"], env=environment, capture_output=True, timeout=30)
