"""Bias compensation: move the mean output error of a quantized layer into its bias.

Gong et al., "Minimize Quantization Output Error with Bias Compensation", 2024, arXiv:2404.01892. The channel
form merges into the layer's bias and is the empirical bias correction of Nagel et al., 2019, arXiv:1906.04721.
A linear layer's mean output is W times its mean input, so the minimiser of E|y - (y_q + c)|^2 needs only
means: c = W E[x_f] - W_q E[x], with x the inputs that the quantized layer is given.
"""

from __future__ import annotations

from torch import Tensor


def channel_bias(w: Tensor, w_q: Tensor, mean_float: Tensor, mean_given: Tensor) -> Tensor:
    """c = W E[x_f] - W_q E[x]: (out,) float32, in the units of the layer's output; add it to the bias.

    Args: w, w_q: (out, in), float and dequantized. mean_float: E[x_f] (in,). mean_given: E[x] (in,), over
        what the quantized layer sees (`targets: sequential`) or over x_f again (`targets: published`).
    """
    return (w.double() @ mean_float.double() - w_q.double() @ mean_given.double()).float()


def position_bias(w: Tensor, w_q: Tensor, mean_float: Tensor, mean_given: Tensor) -> Tensor:
    """The same for each position of the window: (positions, out) float32, for means (positions, in)."""
    return (mean_float.double() @ w.double().T - mean_given.double() @ w_q.double().T).float()
