"""Second moments of the inputs that a group of layers shares, gathered in float32 over streams of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worker.errors import CalibrationError, NonFiniteError

PRODUCT_TOKENS = 2048
PANEL = 256  # columns


@dataclass
class InputStatistics:
    """Moments over T tokens of a layer's inputs x_q (quantized prefix) and x_f (float prefix), n columns.

    hessian: sum x_q x_q^T, (n, n), or None where nothing looks at it. cross: sum (x_f - x_q) x_q^T, (n, n),
    or None. outputs: in its place, of a layer that has fewer outputs than inputs, sum W x_f x_q^T, (out, n).
    sum_q, sum_f: float64, (n,), or (positions, n) where biases vary with the position.
    `update` takes matching batches (windows, positions, n) of any float dtype.
    """

    hessian: Tensor | None
    cross: Tensor | None
    sum_q: Tensor
    sum_f: Tensor
    tokens: int = 0
    outputs: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        columns: int,
        *,
        hessian: bool,
        cross: bool,
        positions: int | None,
        device: torch.device,
        outputs: int | None = None,
    ) -> InputStatistics:
        """outputs: how many a layer has whose `outputs` are gathered where `cross` is asked for."""

        def zeros(rows: int) -> Tensor:
            return torch.zeros(columns, rows, device=device)

        shape = (columns,) if positions is None else (positions, columns)
        line = torch.zeros(shape, dtype=torch.float64, device=device)
        found = cls(zeros(columns) if hessian else None, None, line, line.clone())
        moment = zeros(outputs or columns).T if cross else None  # as the products below come out
        return replace(found, outputs=moment) if outputs else replace(found, cross=moment)

    def update(self, x_q: Tensor, x_f: Tensor | None, y_f: Tensor | None = None) -> None:
        """y_f: W x_f, for `outputs`."""
        axis = 0 if self.sum_q.ndim == 2 else (0, 1)
        self.sum_q += x_q.sum(axis, dtype=torch.float32)
        self.tokens += x_q.shape[0] * x_q.shape[1]
        if x_f is not None:
            self.sum_f += x_f.sum(axis, dtype=torch.float32)
        if self.hessian is None:
            return
        flat = x_q.flatten(0, 1)
        floating = x_f.flatten(0, 1) if x_f is not None and self.cross is not None else None
        for start in range(0, len(flat), PRODUCT_TOKENS):
            tokens = slice(start, start + PRODUCT_TOKENS)
            columns = flat[tokens].T
            if _rounds(columns):
                columns = columns.contiguous()  # products with a transposed view take up to twice the time
            add_square(self.hessian, columns)
            if floating is not None and self.cross is not None:
                add_product(self.cross.T, columns, floating[tokens] - flat[tokens])
            if y_f is not None and self.outputs is not None:
                add_exact(self.outputs.T, columns, y_f.flatten(0, -2)[tokens])

    def mean(self, layer: str) -> InputStatistics:
        """The same, divided by the number of tokens; the sums are used up.

        Raises: CalibrationError for no token, NonFiniteError for NaN or infinity.
        """
        if self.tokens == 0:
            raise CalibrationError(f"calibration gave {layer} no token: give more windows")
        diagonal = self.sum_q if self.hessian is None else self.hessian.diagonal()
        if not (torch.isfinite(self.sum_q).all() and torch.isfinite(diagonal).all()):
            raise NonFiniteError(
                f"the inputs of {layer} hold NaN or infinity; check the model in full precision"
            )
        t = self.tokens
        rows = t if self.sum_q.ndim == 1 else t // len(self.sum_q)
        hessian = None if self.hessian is None else self.hessian.triu_().div_(t)
        if hessian is not None:
            mirror_upper(hessian)
        for moment in (self.cross, self.outputs):
            if moment is not None:
                moment.div_(t)
        return InputStatistics(hessian, self.cross, self.sum_q / rows, self.sum_f / rows, t, self.outputs)

    def of_rows(self, rows: slice) -> InputStatistics:
        """The statistics for these outputs of the layer alone."""
        return self if self.outputs is None else replace(self, outputs=self.outputs[rows])


def mirror_upper(matrix: Tensor) -> None:
    """Make (n, n) symmetric, its lower triangle from its upper one, a panel at a time."""
    for low in range(0, len(matrix), PANEL):
        panel = slice(low, low + PANEL)
        matrix[low + PANEL :, panel] = matrix[panel, low + PANEL :].T
        corner = matrix[panel, panel]
        corner += corner.triu(1).T


def add_square(total: Tensor, columns: Tensor) -> None:
    """Upper triangle of total += X X^T for X = `columns` (n, tokens), the products of two values summed in float32.

    Rounding H itself to bfloat16 would drown its small eigenvalues where the largest is a thousand times theirs,
    and (H + lambda I)^-1 with them.
    """
    exact = _rounds(columns)
    if exact:
        columns = columns.float()
    with bfloat16_products(exact):
        for low in range(0, len(columns), PANEL):
            panel = slice(low, low + PANEL)
            add_product(total[: low + PANEL, panel], columns[: low + PANEL], columns[panel].T)


def add_exact(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, for (n, tokens) and (tokens, m), the products of two values summed in float32."""
    exact = _rounds(left)
    if exact:
        left, right = left.float(), right.float()
    with bfloat16_products(exact):
        add_product(total, left, right)


def _rounds(factor: Tensor) -> bool:
    """Whether a product of such matrices is rounded to their own precision."""
    return factor.device.type == "cpu" and factor.dtype == torch.bfloat16


@contextmanager
def bfloat16_products(wanted: bool) -> Iterator[None]:
    """Let float32 products on a CPU multiply in bfloat16, and sum and answer in float32.

    Exact for values that bfloat16 holds, and about twice as fast as float32.
    """
    precision = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = precision.fp32_precision
    if wanted:
        precision.fp32_precision = "bf16"
    try:
        yield
    finally:
        precision.fp32_precision = before


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, for (n, tokens) and (tokens, m).

    A product of bfloat16 rounds once on a CPU: over a few tokens at a time, that averages out.
    """
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        total += torch.mm(left, right, out_dtype=torch.float32)
    else:
        total += left @ right
