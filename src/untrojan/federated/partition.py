"""How a data set is split among clients."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from untrojan.errors import UntrojanError
from untrojan.seeding import generator

SMALLEST_SHARE = 2
"""Images: training with batch norm needs at least two."""


def iid(labels: Tensor, clients: int, seed: int = 0) -> list[Tensor]:
    """Random rows for each client, as many each (to one image). Raises UntrojanError for too few images."""
    _check(labels, clients)
    order = torch.randperm(len(labels), generator=generator(seed, "iid split"))
    return [rows.sort().values for rows in order.tensor_split(clients)]


def dirichlet(labels: Tensor, clients: int, alpha: float, seed: int = 0) -> list[Tensor]:
    """Rows for each client, every class dealt out in shares drawn from a Dirichlet(alpha) distribution.

    ``labels`` is int64 (N,). Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for
    Federated Visual Classification", 2019, in the form that DBA uses: shares are drawn class by class. Small
    ``alpha`` gives each client few classes, a large one comes close to :func:`iid`. Clients that would get
    fewer than two images take them from the largest. Every row belongs to exactly one client.

    Raises UntrojanError where alpha is not positive or there are too few images.
    """
    _check(labels, clients)
    if not (np.isfinite(alpha) and alpha > 0):
        raise UntrojanError(f"alpha of a Dirichlet split must be above 0, not {alpha:g}")
    random = generator(seed, "dirichlet split")
    shares = np.random.default_rng(random.initial_seed())
    owner = torch.empty(len(labels), dtype=torch.int64)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=random)]
        # NumPy gives NaN where all of a tiny alpha's gammas underflow: then one client has the class.
        drawn = shares.dirichlet(np.full(clients, alpha))
        if not np.isfinite(drawn).all():
            drawn = np.eye(clients)[shares.integers(clients)]
        cuts = torch.from_numpy(np.round(drawn.cumsum()[:-1] * len(rows)).astype(np.int64))
        for client, part in enumerate(rows.tensor_split(cuts)):
            owner[part] = client
    _fill_up(owner, clients)
    return [(owner == client).nonzero().flatten() for client in range(clients)]


def _fill_up(owner: Tensor, clients: int) -> None:
    counts = torch.bincount(owner, minlength=clients)
    for client in range(clients):
        while counts[client] < SMALLEST_SHARE:
            richest = int(counts.argmax())
            owner[(owner == richest).nonzero().flatten()[-1]] = client
            counts[richest] -= 1
            counts[client] += 1


def _check(labels: Tensor, clients: int) -> None:
    if clients < 1:
        raise UntrojanError(f"a split needs at least one client, not {clients}")
    if len(labels) < SMALLEST_SHARE * clients:
        raise UntrojanError(
            f"{len(labels)} images are too few for {clients} clients: {SMALLEST_SHARE} each at least"
        )
