"""Second moments of the inputs that a group of layers shares, gathered in float32 over streams of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.errors import CalibrationError, NonFiniteError


@dataclass
class InputStatistics:
    """Moments over T tokens of a layer's inputs x_q (quantized prefix) and x_f (float prefix), n columns.

    hessian: sum x_q x_q^T, (n, n), or None where nothing looks at it. cross: sum (x_f - x_q) x_q^T, (n, n),
    or None. sum_q, sum_f: float64, (n,), or (positions, n) where biases vary with the position.
    `update` takes matching batches (windows, positions, n) of any float dtype.
    """

    hessian: Tensor | None
    cross: Tensor | None
    sum_q: Tensor
    sum_f: Tensor
    tokens: int = 0

    @classmethod
    def zeros(
        cls, columns: int, *, hessian: bool, cross: bool, positions: int | None, device: torch.device
    ) -> InputStatistics:
        square = torch.zeros(columns, columns, device=device)
        shape = (columns,) if positions is None else (positions, columns)
        line = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(square if hessian else None, square.clone() if cross else None, line, line.clone())

    def update(self, x_q: Tensor, x_f: Tensor | None) -> None:
        axes = (0, 1) if self.sum_q.ndim == 1 else (0,)
        self.sum_q += x_q.sum(axes, dtype=torch.float64)
        self.tokens += x_q.shape[0] * x_q.shape[1]
        x = x_q.flatten(0, 1).float()
        if self.hessian is not None:
            self.hessian.addmm_(x.T, x)
        if x_f is not None:
            self.sum_f += x_f.sum(axes, dtype=torch.float64)
            if self.cross is not None:
                self.cross.addmm_((x_f.flatten(0, 1).float() - x).T, x)

    def mean(self, layer: str) -> InputStatistics:
        """The same, divided by the number of tokens. Raises CalibrationError for no token, NaN or infinity."""
        if self.tokens == 0:
            raise CalibrationError(f"calibration gave {layer} no token: give more windows")
        diagonal = self.sum_q if self.hessian is None else self.hessian.diagonal()
        if not (torch.isfinite(self.sum_q).all() and torch.isfinite(diagonal).all()):
            raise NonFiniteError(f"the inputs of {layer} hold NaN or infinity; check the model in full precision")
        t = self.tokens
        rows = t if self.sum_q.ndim == 1 else t // len(self.sum_q)
        hessian = None if self.hessian is None else self.hessian / t
        cross = None if self.cross is None else self.cross / t
        return InputStatistics(hessian, cross, self.sum_q / rows, self.sum_f / rows, t)
