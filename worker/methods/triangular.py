"""Products with an upper triangular matrix, and its inverse, that leave the zeros out.

torch has neither: a dense product does twice the work, and solving for an identity three times. Blocks of
BLOCK columns keep what is left in matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def times_upper(x: Tensor, upper: Tensor) -> Tensor:
    """x U for x (m, n) and U (n, n)."""
    out = torch.empty_like(x)
    for low in range(0, len(upper), BLOCK):
        block = slice(low, low + BLOCK)
        torch.mm(x[:, : low + BLOCK], upper[: low + BLOCK, block], out=out[:, block])
    return out


def times_transpose(x: Tensor, upper: Tensor) -> Tensor:
    """x U^T for x (m, n) and U (n, n)."""
    out = torch.empty_like(x)
    for low in range(0, len(upper), BLOCK):
        block = slice(low, low + BLOCK)
        torch.mm(x[:, low:], upper[block, low:].T, out=out[:, block])
    return out


def invert_upper(upper: Tensor) -> None:
    """Replace U (n, n), zero below its diagonal, by U^-1.

    [A B; 0 D]^-1 = [A^-1, -A^-1 B D^-1; 0, D^-1].
    """
    n = len(upper)
    if n <= BLOCK:
        identity = torch.eye(n, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
        return
    first, second = slice(n // 2), slice(n // 2, n)
    invert_upper(upper[first, first])
    invert_upper(upper[second, second])
    inner = upper[first, first] @ upper[first, second]
    torch.mm(inner.neg_(), upper[second, second], out=upper[first, second])
