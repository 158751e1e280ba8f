"""GPTQ with an asymmetric target, static act-order and a refinement of scales and codes.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
ICLR 2023, arXiv:2210.17323. Rows are independent and share H, so everything runs over all rows at once;
matrices are kept transposed, (in, out), so that a column of W lies together in memory.

Asymmetric target: minimise |W^ X_q - W X_f|^2. With D = E[(x_f - x_q) x_q^T] the target is
W* = W + W D (H + lambda I)^-1 under the Hessian of X_q (Li et al., "GPTAQ", arXiv:2504.02692, and Zhang et
al., "Qronos", arXiv:2505.11695, start from the same objective).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantry.contract import GptqStep
from quantry.quantizers.affine import QuantizedWeight
from worker.calibration.statistics import InputStatistics
from worker.errors import CalibrationError
from worker.methods.grids import Grid, clipped_grid, minmax_grid, store_scale
from worker.methods.rtn import by_group, on_grid

LADDER = (1, 2, 5, 10, 20, 50, 100)  # times the damping asked for, until H is positive definite
LEAF = 16  # columns swept one by one before a matrix product takes over


@dataclass(frozen=True)
class Factor:
    """The damped Hessian of a group of layers, factored once.

    hessian: H + lambda I, (n, n), in the order of the sweep. inverse_root: U, upper triangular, with
    (H + lambda I)^-1 = U^T U, in that order. order: sweep position -> column. damping: the share used.
    """

    hessian: Tensor
    inverse_root: Tensor
    order: Tensor
    damping: float


def factorize(hessian: Tensor, *, damping: float, act_order: bool) -> Factor:
    """Damp, order and factor H (n, n) float32.

    Raises: CalibrationError if no damping of the ladder makes it positive definite.
    """
    n = len(hessian)
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(n, device=hessian.device)
    ordered = (hessian + hessian.T)[order][:, order] / 2
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    ordered.diagonal()[ordered.diagonal() == 0] = mean  # a dead input: any rounding will do
    for factor in LADDER:
        damped = ordered.clone()
        damped.diagonal().add_(factor * damping * mean)
        root = _inverse_root(damped)
        if root is not None:
            return Factor(damped, root, order, factor * damping)
    raise CalibrationError(
        f"the Hessian of {n} inputs is not positive definite even with damping {LADDER[-1] * damping:g}: "
        "give more or more varied calibration text"
    )


def _inverse_root(h: Tensor) -> Tensor | None:
    """U with h^-1 = U^T U. With J the reversal, J h J = L L^T gives h = (J L J)(J L J)^T, so U = (J L J)^-1."""
    lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
    if int(info) != 0 or not torch.isfinite(lower.diagonal()).all():
        return None
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1).contiguous(), eye, upper=True)


def shifted_target(w: Tensor, cross: Tensor, factor: Factor, strength: float) -> Tensor:
    """W* = W + strength * W D (H + lambda I)^-1 for w (out, in) and D = `cross` (in, in), in column order."""
    shift = (w @ cross)[:, factor.order]
    shift = (shift @ factor.inverse_root.T) @ factor.inverse_root
    target = w.clone()
    target[:, factor.order] += strength * shift
    return target


@dataclass(frozen=True)
class GptqResult:
    weight: QuantizedWeight
    damping: float
    target: Tensor


def gptq(w: Tensor, statistics: InputStatistics, step: GptqStep, factor: Factor | None = None) -> GptqResult:
    """Quantize w (out, in) float32 for inputs with the given mean statistics.

    Layers that share their input may be stacked along `out`: rows do not interact.
    """
    assert statistics.hessian is not None
    factor = factor or factorize(statistics.hessian, damping=step.damping, act_order=step.act_order == "static")
    target = w
    if step.target == "asymmetric" and statistics.cross is not None:
        target = shifted_target(w, statistics.cross, factor, step.target_strength)
    grid = _fit_grid(target, statistics.hessian.diagonal(), step)
    columns = Columns.of(grid, factor.order, step.group_size, w.shape[1])
    wanted = target.T[factor.order].contiguous()
    codes = sweep(wanted.clone(), factor.inverse_root, columns)
    for _ in range(step.refinement):
        columns = refit_scales(wanted, codes, factor.hessian, columns)
        codes = descend(wanted, codes, factor.hessian, columns)
    grid = columns.grid(grid)
    restored = torch.empty_like(codes)
    restored[factor.order] = codes
    return GptqResult(on_grid(restored.T.to(torch.uint8).contiguous(), grid, step.group_size), factor.damping, target)


def _fit_grid(w: Tensor, diagonal: Tensor, step: GptqStep) -> Grid:
    grouped = by_group(w, step.group_size)
    if step.clip == "none":
        return minmax_grid(grouped, step.bits, symmetric=step.symmetric)
    weight = diagonal.clamp(min=0).view(grouped.shape[1:])
    weight = weight / weight.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return clipped_grid(grouped, step.bits, symmetric=step.symmetric, weight=weight)


@dataclass(frozen=True)
class Columns:
    """The grid as the sweep meets it: scale, zero (groups, out); group_of: sweep position -> group."""

    scale: Tensor
    zero: Tensor
    group_of: Tensor
    top: int

    @classmethod
    def of(cls, grid: Grid, order: Tensor, group_size: int | None, columns: int) -> Columns:
        group_of = order // (group_size or columns)
        return cls(grid.scale.T.contiguous(), grid.zero_point.T.contiguous(), group_of, 2**grid.bits - 1)

    def grid(self, like: Grid) -> Grid:
        return Grid(self.scale.T.contiguous(), self.zero.T.contiguous(), like.bits, like.symmetric)

    def values(self, codes: Tensor) -> Tensor:
        """What codes (n, out) stand for."""
        if len(self.scale) == 1:
            return (codes - self.zero) * self.scale
        return (codes - self.zero[self.group_of]) * self.scale[self.group_of]


def sweep(w: Tensor, root: Tensor, columns: Columns, leaf: int = LEAF) -> Tensor:
    """Round the columns in order, spreading each error over those not yet rounded (equation 3 of the paper).

    Args: w: (n, out), overwritten. root: U (n, n). Returns: codes (n, out) float32.
    The lazy update is recursive: halve the columns, sweep the left, update the right by one product.
    """
    codes = torch.empty_like(w)
    errors = torch.empty_like(w)
    diagonal = root.diagonal().tolist()
    group_of = columns.group_of.tolist()
    scale, zero = list(columns.scale), list(columns.zero)

    def run(low: int, high: int) -> None:
        if high - low > leaf:
            middle = (low + high) // 2
            run(low, middle)
            w[middle:high].addmm_(root[low:middle, middle:high].T, errors[low:middle], alpha=-1)
            run(middle, high)
            return
        for i in range(low, high):
            s, z = scale[group_of[i]], zero[group_of[i]]
            q = torch.div(w[i], s, out=codes[i]).round_().add_(z).clamp_(0, columns.top)
            error = torch.sub(w[i], (q - z).mul_(s), out=errors[i]).div_(diagonal[i])
            if i + 1 < high:
                w[i + 1 : high].addr_(root[i, i + 1 : high], error, alpha=-1)

    run(0, len(w))
    return codes


def refit_scales(target: Tensor, codes: Tensor, hessian: Tensor, columns: Columns) -> Columns:
    """The scales of least error tr((W^ - W*) H (W^ - W*)^T) for fixed codes: one small system per row.

    With p = q - zero, entry (g, h) of the system is p_g^T H_gh p_h and its right side p_g^T (H w*)_g.
    target, codes: (n, out). A scale that would vanish stays as it was.
    """
    groups, rows = columns.scale.shape
    points = codes - (columns.zero if groups == 1 else columns.zero[columns.group_of])
    right = _sum_groups(points * (hessian @ target), columns, groups)
    system = torch.empty(rows, groups, groups, device=codes.device)
    for g in range(groups):
        members = (columns.group_of == g).nonzero().squeeze(1)
        system[:, g] = _sum_groups(points * (hessian[:, members] @ points[members]), columns, groups).T
    system.diagonal(dim1=1, dim2=2).add_(1e-6 * system.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + 1e-30)
    solution, info = torch.linalg.solve_ex(system, right.T.unsqueeze(-1))
    fresh = solution.squeeze(-1).T
    ratio = fresh / columns.scale
    usable = torch.isfinite(fresh) & (ratio > 0.25) & (ratio < 4) & (info == 0)
    scale = store_scale(torch.where(usable, fresh, columns.scale))
    return Columns(scale.contiguous(), columns.zero, columns.group_of, columns.top)


def _sum_groups(x: Tensor, columns: Columns, groups: int) -> Tensor:
    """Sum x (n, out) over the columns of each group: (groups, out)."""
    if groups == 1:
        return x.sum(0, keepdim=True)
    return torch.zeros(groups, x.shape[1], device=x.device).index_add_(0, columns.group_of, x)


def descend(target: Tensor, codes: Tensor, hessian: Tensor, columns: Columns, leaf: int = 32) -> Tensor:
    """One pass of cyclic coordinate descent: each column to its best grid point, given all the others.

    The objective tr((W^ - W*) H (W^ - W*)^T) never rises. target, codes: (n, out); returns new codes.
    """
    codes = codes.clone()
    delta = columns.values(codes) - target
    diagonal = hessian.diagonal().tolist()
    group_of = columns.group_of.tolist()
    scale, zero = list(columns.scale), list(columns.zero)
    for low in range(0, len(codes), leaf):
        high = min(low + leaf, len(codes))
        gradient = hessian[low:high] @ delta
        for i in range(low, high):
            s, z, row = scale[group_of[i]], zero[group_of[i]], i - low
            wish = torch.sub(delta[i], gradient[row], alpha=1 / diagonal[i]).add_(target[i])
            torch.div(wish, s, out=codes[i]).round_().add_(z).clamp_(0, columns.top)
            fresh = (codes[i] - z).mul_(s).sub_(target[i])
            change = fresh - delta[i]
            delta[i] = fresh
            if row + 1 < high - low:
                gradient[row + 1 :].addr_(hessian[i, i + 1 : high], change)
    return codes
