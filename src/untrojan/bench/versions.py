"""The version of each stage function, a part of its stages' keys.

Raise one when the outcome of the same configuration changes: stored stages and results of the old version
then count as another experiment's.
"""

from __future__ import annotations

from collections.abc import Mapping

VERSIONS: Mapping[str, int] = {
    "data": 1,
    "poison": 1,
    "train": 1,
    "deliver": 1,
    "evaluate": 1,
    "audit": 7,
    "score": 1,
    "retrain": 1,
    "infect": 1,
    "federate": 1,
    "expose": 2,
    "prune": 1,
    "defend": 1,
    "score_dropped": 1,
    "repair": 1,
    "gauge": 1,
    "assess": 1,
    "scan": 1,
    "score_scan": 1,
}
