"""``untrojan demo``: the whole story on a data set made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from untrojan.cli import options

if TYPE_CHECKING:
    from collections.abc import Mapping


def demo(
    out: options.Out = Path("demo"),
    seed: options.Seed = 0,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Poison a generated data set, train on it, audit it, cleanse it, retrain, and report. Needs no data.

    Example: [bold]untrojan demo --out demo[/bold]
    """
    options.begin(threads, quiet)
    from untrojan.demo import run_demo
    from untrojan.runs import RunFolder

    with RunFolder(out, "demo", {"seed": seed}, overwrite=overwrite) as folder:
        metrics = run_demo(folder, seed=seed)
    if not quiet:
        _summary(metrics, out)


def _summary(metrics: Mapping[str, Any], out: Path) -> None:
    undefended, retrained = metrics["undefended"], metrics["retrained"]
    options.print_table(
        ["", "trained as delivered", "trained after cleansing"],
        [
            [label, options.share(undefended[key]), options.share(retrained[key])]
            for label, key in (
                ("accuracy on clean images", "benign_accuracy"),
                ("triggered images taken for the target", "attack_success_rate"),
            )
        ],
    )
    cleansing, audit = metrics["cleansing"], metrics["audit"]
    options.say(f"audit: {audit['verdict']}, {audit['reason']}")
    options.say(
        f"poisoned images found: {options.share(cleansing['true_positive_rate'])}, "
        f"clean images of the target class lost: {options.share(cleansing['false_positive_rate'])}"
    )
    options.say(f"report: {out / 'report.html'}")
