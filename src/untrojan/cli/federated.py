"""``untrojan federated``: clients train one model together, some of them with a backdoor in mind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from untrojan.cli import inputs, options
from untrojan.errors import UntrojanError

if TYPE_CHECKING:
    from untrojan.attacks.distributed import DistributedBackdoor
    from untrojan.data.image_set import ImageSet, Splits
    from untrojan.federated.server import FederatedReport, Federation
    from untrojan.federated.simulation import Population
    from untrojan.runs import RunFolder

_ATTACK, _DEPLOYMENT = "Attack", "Several machines (see docs/federated.md)"


def federated(
    data: options.Data,
    out: options.Out,
    clients: Annotated[int, typer.Option(min=1, max=10_000, help="Participants.")] = 10,
    malicious: Annotated[
        int,
        typer.Option(min=0, help="How many of them attack; 0 for a clean control.", rich_help_panel=_ATTACK),
    ] = 4,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Before the defence: 30 for images up to 28 pixels, else 100.")
    ] = None,
    defense: Annotated[
        Literal["none", "plain"],
        typer.Option(help="none (NONE), on activations that clients report; or plain averaging."),
    ] = "none",
    defense_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A setting of NONE, epochs being rounds; repeatable."),
    ] = None,
    expelled_at: Annotated[
        float,
        typer.Option(
            "--expel-at",
            min=0.001,
            metavar="SHARE",
            help="Leave out a client from then on, so much of whose images NONE drops; above 1: nobody.",
        ),
    ] = 0.1,
    net: options.Net = "resnet18-compact",
    dirichlet: Annotated[
        float | None,
        typer.Option(metavar="ALPHA", help="Unequal shares: small for few classes a client; else at random."),
    ] = None,
    weighting: Annotated[
        Literal["equal", "images"], typer.Option(help="Clients count alike, or by their images.")
    ] = "equal",
    local_epochs: Annotated[
        int | None, typer.Option(min=1, help="Of an honest client in a round: 1 up to 28 pixels, else 2.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of honest clients.")] = 0.1,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    trigger: Annotated[
        str,
        typer.Option(metavar="NAME", help="strips are dealt out among attackers.", rich_help_panel=_ATTACK),
    ] = "strips",
    trigger_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A setting of the trigger; repeatable.", rich_help_panel=_ATTACK
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(metavar="CLASS", help="Where the trigger leads.", rich_help_panel=_ATTACK)
    ] = "2",
    poisoned: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images of each local batch: 20 up to 28 pixels, else 5.", rich_help_panel=_ATTACK
        ),
    ] = None,
    malicious_epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Local epochs: 10 up to 28 pixels, else 6.", rich_help_panel=_ATTACK),
    ] = None,
    malicious_rate: Annotated[
        float, typer.Option(min=0, help="Learning rate of attackers.", rich_help_panel=_ATTACK)
    ] = 0.05,
    after_defense: Annotated[
        Literal["poisons", "keeps-rate", "stops"],
        typer.Option(
            help="Attackers after a defence: go on, go on at their own learning rate, or train honestly.",
            rich_help_panel=_ATTACK,
        ),
    ] = "poisons",
    hides: Annotated[
        bool, typer.Option("--hides", help="Attackers report clean images only.", rich_help_panel=_ATTACK)
    ] = False,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Clients that train at a time; by default, one a core.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a round waits for a client.")] = 3600.0,
    superlink: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Flower's SuperLink, on this machine.", rich_help_panel=_DEPLOYMENT
        ),
    ] = None,
    root_certificates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="That sign its.", rich_help_panel=_DEPLOYMENT)
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without encryption.", rich_help_panel=_DEPLOYMENT)
    ] = False,
    size: options.Size = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Federated learning under a distributed backdoor attack, simulated; a run that was cut off goes on.

    Writes model.safetensors, history.csv (a line a round) and metrics.json: benign accuracy and attack
    success by round, before and after the defence, and which clients were left out when and why.

    Example: [bold]untrojan federated signs --rounds 10 --net cnn --defense none --out federated[/bold]
    """
    options.begin(threads, quiet)
    from untrojan.attacks.distributed import DistributedBackdoor
    from untrojan.data.load import load
    from untrojan.federated.flower import prepare
    from untrojan.federated.simulation import Population
    from untrojan.models.registry import check_name
    from untrojan.runs import RunFolder

    check_name(net)
    prepare()
    if not math.isfinite(timeout):
        raise UntrojanError(f"--timeout {timeout:g} is no number of seconds: give one, such as 3600")
    if superlink is None and malicious > clients:
        raise UntrojanError(f"--malicious {malicious} is more than --clients {clients}")
    if superlink is None and (insecure or root_certificates is not None):
        raise UntrojanError("--insecure and --root-certificates belong to --superlink: add it, or drop them")
    inputs.keep_apart(out, {"the data": data})
    splits = load(data, size=size)
    train = splits.train
    small = _small(train)
    federation = _federation(
        net, rounds or (30 if small else 100), local_epochs or (1 if small else 2), learning_rate, batch_size,
        weighting, defense, inputs.key_values(defense_option, "--defense-option"), seed, expelled_at,
    )  # fmt: skip
    plan = DistributedBackdoor.chosen(
        train.image_shape,
        {
            "trigger": trigger,
            "trigger_options": inputs.key_values(trigger_option, "--trigger-option"),
            "target": train.class_index(target),
            "poisoned": poisoned,
            "epochs": malicious_epochs,
            "learning_rate": malicious_rate,
            "after_defense": after_defense,
            "hides": hides,
        },
    )
    population = Population(clients, malicious, dirichlet, seed)
    config = {
        "data": data, "size": size, "federation": federation, "attack": plan, "population": population,
        "superlink": superlink, "seed": seed,
    }  # fmt: skip
    with RunFolder(out, "federated", config, overwrite=overwrite) as folder:
        folder.use_data("train", train)
        if superlink is None:
            report = _simulate(splits, federation, population, plan, folder, at_once, timeout, quiet)
        else:
            report = _deploy(
                splits, federation, clients, plan, folder, timeout, data, size,
                (superlink, root_certificates, insecure),
            )  # fmt: skip
        _write(folder, report, train.class_names)
    _summary(report, out, quiet)


def _small(train: ImageSet) -> bool:
    from untrojan.triggers.strips import SMALL_SIDE

    return min(train.image_shape[1:]) <= SMALL_SIDE


def _federation(
    net: str,
    rounds: int,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    weighting: str,
    defense: str,
    settings: dict[str, Any],
    seed: int,
    expelled_at: float,
) -> Federation:
    from untrojan.defenses.training.none import NONE
    from untrojan.federated.server import Federation
    from untrojan.registry import validated
    from untrojan.training.recipe import Recipe

    if defense == "plain" and settings:
        raise UntrojanError("--defense-option needs a defence: add --defense none, or drop it")
    recipe = {
        "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "optimizer": "sgd",
        "weight_decay": 5e-4,
    }  # fmt: skip
    method = validated(NONE, {"seed": seed, **settings}, "--defense-option") if defense == "none" else None
    return Federation(
        net, rounds, validated(Recipe, recipe, "the local training"), method,
        "images" if weighting == "images" else "equal", seed, expelled_at,
    )  # fmt: skip


def _simulate(
    splits: Splits,
    federation: Federation,
    population: Population,
    plan: DistributedBackdoor,
    folder: RunFolder,
    at_once: int | None,
    timeout: float,
    quiet: bool,
) -> FederatedReport:
    from untrojan.federated.simulation import simulate

    return simulate(
        splits, federation, population, plan, work=folder.work, at_once=at_once, timeout=timeout,
        notify=lambda line: options.say(line, quiet=quiet, to_stderr=True),
    )  # fmt: skip


def _deploy(
    splits: Splits,
    federation: Federation,
    clients: int,
    plan: DistributedBackdoor,
    folder: RunFolder,
    timeout: float,
    data: str,
    size: int | None,
    connection: tuple[str, Path | None, bool],
) -> FederatedReport:
    from untrojan.federated.deployment import Deployment, deploy

    superlink, certificates, insecure = connection
    # The server's process has a working folder of its own.
    place = str(Path(data).absolute()) if Path(data).exists() else data
    deployment = Deployment(place, federation, plan, clients, size, timeout=timeout)
    return deploy(
        deployment, splits, superlink, work=folder.work.absolute(), root_certificates=certificates,
        insecure=insecure,
    )  # fmt: skip


def _write(folder: RunFolder, report: FederatedReport, class_names: tuple[str, ...]) -> None:
    from untrojan.models.checkpoints import save_checkpoint

    folder.write_json(
        "metrics.json",
        {
            "before": report.before(),
            "after": report.after(),
            "rounds": report.history,
            "excluded": report.excluded,
            "defense": report.defense,
        },
    )
    header = list(report.history[0])
    folder.write_csv("history.csv", header, [[row.get(key) for key in header] for row in report.history])
    save_checkpoint(folder.staged("model.safetensors"), report.model, class_names)


def _summary(report: FederatedReport, out: Path, quiet: bool) -> None:
    for what, found in (("averaged model", report.before()), ("after NONE", report.after())):
        if found is not None:
            accuracy, success = (
                options.share(found["benign_accuracy"]),
                options.share(found["attack_success"]),
            )
            options.say(f"{what}: accuracy {accuracy}, attack success {success}", quiet=quiet)
    for found in report.defense:
        if found["expelled"]:
            options.say(f"expelled: {', '.join(found['expelled'])}", quiet=quiet)
    if report.excluded:
        options.say(f"answers left out: {len(report.excluded)}, see {out / 'metrics.json'}", quiet=quiet)
    options.say(f"model: {out / 'model.safetensors'}", quiet=quiet)
