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

from quantry.quantizers.affine import QuantizedWeight
from quantry.recipe import GptqStep
from worker.calibration.statistics import InputStatistics
from worker.errors import CalibrationError
from worker.methods.grids import Grid, fit_grid, store_scale
from worker.methods.rtn import by_group, on_grid
from worker.methods.triangular import invert_upper, times_transpose, times_upper

LADDER = (1, 2, 5, 10, 20, 50, 100)  # times the damping asked for, until H is positive definite
REFINED_STEPS = 12  # ranges that the clip search tries where the scales are fitted again afterwards
LEAF = 16  # columns swept one by one before a matrix product takes over


@dataclass(frozen=True)
class Factor:
    """The damped Hessian of a group of layers, factored once.

    hessian: H + lambda I, (n, n). order: sweep position -> column. inverse_root: U, upper triangular, with
    (H + lambda I)^-1 = U^T U, in the order of the sweep. damping: the share of the mean diagonal used.
    """

    hessian: Tensor
    inverse_root: Tensor
    order: Tensor
    damping: float


def factorize(hessian: Tensor, *, damping: float, act_order: bool) -> Factor:
    """Damp, order and factor H (n, n) float32, symmetric.

    Raises: CalibrationError if no damping of the ladder makes it positive definite.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    diagonal[diagonal == 0] = mean  # a dead input: any rounding will do
    order = torch.arange(len(damped), device=damped.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    used = 0.0
    for factor in LADDER:
        diagonal.add_((factor * damping - used) * mean)
        used = factor * damping
        root = _inverse_root(damped, order)
        if root is not None:
            return Factor(damped, root, order, used)
    raise CalibrationError(
        f"the Hessian of {len(damped)} inputs is not positive definite even with damping {used:g}: "
        "give more or more varied calibration text"
    )


def _inverse_root(h: Tensor, order: Tensor) -> Tensor | None:
    """U upper triangular with h^-1 = U^T U, for h in the given order; None if h is not positive definite.

    With J the reversal, J h J = L L^T gives h = (J L J)(J L J)^T, so U = (J L J)^-1.
    """
    reverse = order.flip(0)
    lower = h[reverse.unsqueeze(1), reverse].T  # symmetric; columns together in memory, so factored in place
    info = torch.empty((), dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if int(info) != 0 or not torch.isfinite(lower.diagonal()).all():
        return None
    root = lower.flip(0, 1)
    del lower
    invert_upper(root)
    return root


def shifted_target(w: Tensor, statistics: InputStatistics, factor: Factor, strength: float) -> Tensor:
    """W* = W + strength * W D (H + lambda I)^-1 for w (out, in), in column order.

    D is the cross moment, or W D = E[W x_f x_q^T] - W H where the outputs' moment was gathered; W where neither was.
    """
    root, order, cross = factor.inverse_root, factor.order, statistics.cross
    if statistics.outputs is not None and statistics.hessian is not None:
        pull = torch.addmm(statistics.outputs, w, statistics.hessian, alpha=-1)
        shift = times_upper(times_transpose(pull[:, order], root), root)
    elif cross is None:
        return w
    elif len(w) < len(root):
        shift = times_upper(times_transpose((w @ cross)[:, order], root), root)
    else:
        shift = w @ times_upper(times_transpose(cross[:, order], root), root)
    target = w.clone()
    target[:, order] += strength * shift
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
    factor = factor or factorize(
        statistics.hessian, damping=step.damping, act_order=step.act_order == "static"
    )
    target = w
    if step.target == "asymmetric":
        target = shifted_target(w, statistics, factor, step.target_strength)
    grid = _fit_grid(target, statistics.hessian.diagonal(), step)
    columns = Columns.of(grid, step.group_size, w.shape[1])
    points = torch.empty(w.shape[1], w.shape[0], device=w.device)
    points[factor.order] = sweep(
        target.T[factor.order].contiguous(), factor.inverse_root, columns.permuted(factor.order)
    )
    if step.passes:
        wanted = target.T.contiguous()
        for _ in range(step.passes):
            columns = descend(wanted, points, factor.hessian, columns)
    return GptqResult(
        on_grid(columns.codes(points), columns.grid(grid), step.group_size), factor.damping, target
    )


def _fit_grid(w: Tensor, diagonal: Tensor, step: GptqStep) -> Grid:
    grouped = by_group(w, step.group_size)
    weight = diagonal.clamp(min=0).view(grouped.shape[1:])
    weight = weight / weight.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    steps = REFINED_STEPS if step.passes else 2 * REFINED_STEPS
    return fit_grid(grouped, step, weight=weight, steps=steps)


@dataclass(frozen=True)
class Columns:
    """The grid as the sweep meets it: scale (groups, out); points from low to high, (groups, out), without their
    zero-points; group_of: column -> group."""

    scale: Tensor
    low: Tensor
    high: Tensor
    group_of: Tensor

    @classmethod
    def of(cls, grid: Grid, group_size: int | None, columns: int) -> Columns:
        group_of = torch.arange(columns, device=grid.scale.device) // (group_size or columns)
        low = -grid.zero_point.T.contiguous()
        return cls(grid.scale.T.contiguous(), low, low + (2**grid.bits - 1), group_of)

    def permuted(self, order: Tensor) -> Columns:
        return Columns(self.scale, self.low, self.high, self.group_of[order])

    def codes(self, points: Tensor) -> Tensor:
        """The codes of `points` (n, out), as they are stored: uint8 (out, n)."""
        return (points - self.low[self.group_of]).T.to(torch.uint8).contiguous()

    def grid(self, like: Grid) -> Grid:
        return Grid(self.scale.T.contiguous(), like.zero_point, like.bits, like.symmetric)


def sweep(w: Tensor, root: Tensor, columns: Columns, leaf: int = LEAF) -> Tensor:
    """Round the columns in order, spreading each error over those not yet rounded (equation 3 of the paper).

    Args: w: (n, out), overwritten. root: U (n, n). Returns: points q - zero_point, (n, out) float32.
    The lazy update is recursive: halve the columns, sweep the left, update the right by one product.
    """
    points, errors = torch.empty_like(w), torch.empty_like(w)
    rows = [list(part) for part in (columns.scale, columns.low, columns.high)]
    grid = [(scale[g], low[g], high[g]) for scale, low, high in [rows] for g in columns.group_of.tolist()]
    _sweep_columns(w, root, points, errors, grid, leaf)
    return points


def _sweep_columns(
    w: Tensor,
    root: Tensor,
    points: Tensor,
    errors: Tensor,
    grid: list[tuple[Tensor, Tensor, Tensor]],
    leaf: int,
) -> None:
    """Sweep these columns; w, points and errors are overwritten. grid: scale, low and high of each column."""
    count = len(w)
    if count > leaf:
        half = count // 2
        first, second = slice(half), slice(half, count)
        _sweep_columns(w[first], root[first, first], points[first], errors[first], grid[first], leaf)
        w[second].addmm_(root[first, second].T, errors[first], alpha=-1)
        _sweep_columns(w[second], root[second, second], points[second], errors[second], grid[second], leaf)
        return
    diagonal = root.diagonal().unsqueeze(1)
    spread = root / diagonal
    for i, (scale, low, high) in enumerate(grid):
        q = torch.div(w[i], scale, out=points[i]).round_().clamp_(low, high)
        error = torch.addcmul(w[i], q, scale, value=-1, out=errors[i])
        if i + 1 < count:
            w[i + 1 :].addr_(spread[i, i + 1 :], error, alpha=-1)
    errors /= diagonal


def descend(target: Tensor, points: Tensor, hessian: Tensor, columns: Columns, leaf: int = 32) -> Columns:
    """One pass of block coordinate descent on tr((W^ - W*) H (W^ - W*)^T), which never rises.

    Group by group: first the scale that is best for the group's points, then each column's best grid point,
    given everything else. target, points: (n, out), columns in their own order; points are overwritten.
    Returns: the columns with their new scales.
    """
    scale = columns.scale.clone()
    delta = torch.addcmul(-target, points, scale[columns.group_of])
    size = len(points) // len(scale)
    for group, s in enumerate(scale):
        span = slice(group * size, (group + 1) * size)
        gradient = hessian[span] @ delta
        _refit_scale(points[span], hessian[span, span], gradient, delta[span], s)
        gradient /= s  # from here on in steps of the grid, as the points are
        bounds = columns.low[group], columns.high[group]
        for start in range(span.start, span.stop, leaf):
            part = slice(start, min(start + leaf, span.stop))
            inside = slice(part.start - span.start, part.stop - span.start)
            change = _descend_columns(points[part], hessian[part, part], gradient[inside], bounds)
            if part.stop < span.stop:
                gradient[inside.stop :].addmm_(hessian[part.stop : span.stop, part], change)
            delta[part].addcmul_(change, s)
    return Columns(scale, columns.low, columns.high, columns.group_of)


def _refit_scale(points: Tensor, hessian: Tensor, gradient: Tensor, delta: Tensor, scale: Tensor) -> None:
    """Move one group's scale (out,) to its optimum, where storing it in float16 still lowers the error.

    points: q - zero of the group (columns, out). hessian: H_gg. gradient: (H delta)_g. The error as a function
    of a change d of the scale is 2 d p^T (H delta)_g + d^2 p^T H_gg p. scale, gradient, delta are updated.
    """
    image = hessian @ points
    slope = torch.linalg.vecdot(points, gradient, dim=0)
    curvature = torch.linalg.vecdot(points, image, dim=0)
    fresh = store_scale(scale - slope / curvature.clamp(min=torch.finfo(torch.float32).tiny))
    change = fresh - scale
    better = (2 * change * slope + change.square() * curvature < 0) & (fresh * scale > 0)
    change = torch.where(better, change, torch.zeros_like(change))
    scale += change
    delta.addcmul_(points, change)
    gradient.addcmul_(image, change)


def _descend_columns(
    points: Tensor, hessian: Tensor, gradient: Tensor, bounds: tuple[Tensor, Tensor]
) -> Tensor:
    """Each of these columns to its best grid point, in turn; returns by how much points (columns, out) moved.

    points and gradient, both in steps of the grid, are overwritten.
    """
    steps = (1 / hessian.diagonal()).tolist()
    change = torch.empty_like(points)
    for i in range(len(points)):
        best = torch.sub(points[i], gradient[i], alpha=steps[i]).round_().clamp_(*bounds)
        torch.sub(best, points[i], out=change[i])
        if i + 1 < len(points):
            gradient[i + 1 :].addr_(hessian[i, i + 1 :], change[i])
    points += change
    return change
