"""A whole federation on one machine: Flower's simulation engine, with Ray beneath."""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from untrojan.attacks.distributed import Attacker, DistributedBackdoor
from untrojan.data.image_set import ImageSet, Splits
from untrojan.data.load import load
from untrojan.data.save import save_npz
from untrojan.errors import UntrojanError
from untrojan.federated.client import Client
from untrojan.federated.flower import GridTransport, client_app, prepare
from untrojan.federated.partition import dirichlet, iid
from untrojan.federated.server import FederatedReport, Federation, Measure, Server
from untrojan.metrics.accuracy import attack_success_rate, benign_accuracy
from untrojan.models.classifier import Classifier

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid


@dataclass(frozen=True)
class Population:
    """Who takes part in a simulation."""

    clients: int = 10
    malicious: int = 4
    """The first so many clients are the attackers."""
    alpha: float | None = None
    """Of the Dirichlet split; None deals images out at random, as many to each."""
    seed: int = 0

    def split(self, data: ImageSet) -> list[ImageSet]:
        """Each client's images. Raises UntrojanError where there are too few, or more attackers than
        clients."""
        if not 0 <= self.malicious <= self.clients:
            raise UntrojanError(f"{self.malicious} malicious clients of {self.clients} can't be")
        if self.alpha is None:
            rows = iid(data.labels, self.clients, self.seed)
        else:
            rows = dirichlet(data.labels, self.clients, self.alpha, self.seed)
        return [data.select(each) for each in rows]

    def client(
        self, number: int, data: ImageSet, plan: DistributedBackdoor, own_code: str | None = None
    ) -> Client:
        """Client ``number``, whose images are ``data``."""
        attacker = None
        if number < self.malicious:
            part = plan.part(number, self.malicious, data.image_shape, self.seed)
            attacker = Attacker(plan, part)
        return Client(self.name(number), data, self.seed, attacker, own_code)

    def name(self, number: int) -> str:
        """What client ``number`` is called."""
        return f"client-{number:0{len(str(self.clients - 1))}}"


def measure_on(test: ImageSet, plan: DistributedBackdoor, seed: int) -> Measure:
    """Benign accuracy and, with the whole trigger, attack success of the global model, each 0..1.

    For evaluation alone: what it tells reaches no client and no defence.
    """
    triggered = plan.triggered_test(test, seed)

    def measured(model: Classifier) -> dict[str, float]:
        return {
            "benign_accuracy": benign_accuracy(model, test),
            "attack_success": attack_success_rate(model, triggered),
        }

    return measured


def simulate(
    data: Splits,
    federation: Federation,
    population: Population,
    plan: DistributedBackdoor,
    *,
    work: Path,
    at_once: int | None = None,
    timeout: float = 3600.0,
    notify: Callable[[str], None] | None = None,
) -> FederatedReport:
    """Train a global model among simulated clients, each in a process that sees its own images alone.

    ``work`` is a folder for the clients' images and the state after each round: the same call goes on where
    it was cut off, and every client's training depends on seed, client and round alone. ``at_once`` clients
    train at a time, as many as there are processors by default; the numbers do not depend on it.

    Raises UntrojanError where Flower or Ray is not installed, there are no test images, a setting does not
    fit the data, or no client is left in some round.
    """
    prepare()
    if data.test is None:
        raise UntrojanError("the global model is measured on test images and the data have none")
    measure = measure_on(data.test, plan, population.seed)
    _write_shares(work, population, data.train)
    reports: list[FederatedReport] = []
    failures: list[BaseException] = []
    stopped = threading.Event()

    def serve(grid: Grid, _: Context) -> None:
        try:
            transport = GridTransport(grid, population.clients, timeout=timeout, stopped=stopped)
            server = Server(
                federation, data.train.class_names, data.train.image_shape, transport, measure=measure,
                state=work / "federation.safetensors", notify=notify,
            )  # fmt: skip
            reports.append(server.run())
        except BaseException as error:
            failures.append(error)

    own_code = federation.architecture.partition("@")[0]
    client_of = functools.partial(_client_of, str(work), population, plan, own_code)
    with _engine():
        _run(serve, client_of, population.clients, at_once or len(os.sched_getaffinity(0)), stopped)
    if failures:
        raise failures[0]
    if not reports:
        raise UntrojanError("the simulation ended without a result: see the lines above")
    return reports[0]


def _run(
    serve: Callable[[Grid, Context], None],
    client_of: Callable[[Context], Client],
    clients: int,
    at_once: int,
    stopped: threading.Event,
) -> None:
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    server = ServerApp()
    server.main()(serve)
    try:
        run_simulation(
            server_app=server,
            client_app=client_app(client_of),
            num_supernodes=clients,
            backend_config={
                "init_args": {
                    "address": "local",
                    "num_cpus": min(at_once, clients),
                    "include_dashboard": False,
                    "log_to_driver": False,
                    "logging_level": "ERROR",
                },
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            },
        )
    finally:
        # The server's thread may be waiting for answers that nobody will give.
        stopped.set()


@contextmanager
def _engine() -> Iterator[None]:
    """Flower leaves the module path in the environment: put back what was there."""
    before = os.environ.get("PYTHONPATH")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = before


def _write_shares(work: Path, population: Population, data: ImageSet) -> None:
    """A file for each client, which its process reads: the whole set is in no message and in no other's."""
    folder = work / "clients"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, share in enumerate(population.split(data)):
        save_npz(folder / f"{number}.npz", share)


def _client_of(
    work: str, population: Population, plan: DistributedBackdoor, own_code: str, context: Context
) -> Client:
    number = int(context.node_config["partition-id"])
    return population.client(number, _share(work, number), plan, own_code)


@functools.lru_cache(maxsize=16)
def _share(work: str, number: int) -> ImageSet:
    path = Path(work, "clients", f"{number}.npz")
    return load(path, cache=False, minimum_per_class=0).train
