"""The directions in which features vary most, for methods that look at few of them."""

from __future__ import annotations

import torch
from torch import Tensor

from untrojan.threads import one_blas_thread

SMALL = 1024
"""Up to so many rows or columns, a Gram matrix is decomposed whole."""


def centred(features: Tensor) -> Tensor:
    """Floating-point (n, D) less its mean; exactly 0 where all rows are equal."""
    # Taking off a row first keeps the mean's rounding error from posing as a direction.
    values = features.clone()
    values -= values[:1].clone()
    values -= values.mean(0)
    return values


def leading_directions(values: Tensor, count: int) -> Tensor:
    """(count, D): the right singular vectors of (n, D) with the largest singular values, in order.

    Fewer where the rows span fewer dimensions; none where all are 0. No full decomposition is made: it is
    that of the smaller Gram matrix, or Lanczos iterations where both sides are large.
    """
    from scipy.linalg import eigh
    from scipy.sparse.linalg import svds

    if not values.any():
        return values[:0]
    wide = values.shape[1] > values.shape[0]
    tall = values.T if wide else values
    if tall.shape[1] <= max(SMALL, 4 * count):
        gram = (tall.T @ tall).double().numpy()
        with one_blas_thread():
            squares, columns = eigh(gram, subset_by_index=[max(0, len(gram) - count), len(gram) - 1])
        sizes, vectors = (torch.from_numpy(each).to(values.dtype).flip(-1) for each in (squares, columns))
        sizes = sizes.clamp_min(0).sqrt()
        found = (tall @ vectors / sizes.clamp_min(1e-30) if wide else vectors).T
    else:
        start = torch.randn(tall.shape[1], generator=torch.Generator().manual_seed(0), dtype=tall.dtype)
        left, singular, right = svds(tall.numpy(), count, v0=start.numpy())
        order = singular.argsort()[::-1].copy()
        sizes = torch.from_numpy(singular[order])
        found = torch.from_numpy(left.T[order] if wide else right[order])
    # A Gram matrix squares the singular values: those below are its rounding errors.
    least = 4 * torch.finfo(values.dtype).eps ** 0.5
    spanned: Tensor = found[sizes > least * sizes[0]]
    return spanned
