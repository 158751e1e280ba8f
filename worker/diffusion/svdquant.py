"""SVDQuant: outliers move into the weights, their largest singular directions stay in 16 bits, the rest is rounded.

Li et al., "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", 2025, arXiv:2411.05007:
W diag(s) = up down + R, y = (x / s) (up down)^T + Q(x / s) Q(R)^T. The smoothing s_j = max|X_j|^alpha / max|W_j|^(1 -
alpha) is searched over alpha by the error of the layer's output. Its refinement of the branch over many rounds, and its
kernels, are left out: products are computed in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from quantry.layers.linear import LinearFormat, QuantizedLinear, pack_weight
from quantry.layers.low_rank import LowRankLinear
from quantry.quantizers.activation import TokenQuantizer
from quantry.quantizers.affine import QuantizedWeight
from quantry.recipe import RtnStep, SvdquantStep
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.trajectory import Latents
from worker.errors import CalibrationError, NonFiniteError
from worker.methods.rtn import rtn

TOKENS = 512  # of a layer's input that smoothing is searched on
ALPHAS = 20
EXTRA = 8  # singular directions computed beyond those kept
ROUNDS = 2  # of the subspace iteration


@dataclass(frozen=True)
class LowRank:
    """What takes a layer's place: weight of the residual, down (rank, in), up (out, rank), smooth (in,), float32."""

    weight: QuantizedWeight
    down: Tensor
    up: Tensor
    smooth: Tensor

    def storage_bits(self) -> int:
        """Codes and scales, the branch in 16 bits, the smoothing in 32."""
        return (
            self.weight.storage_bits() + 16 * (self.down.numel() + self.up.numel()) + 32 * self.smooth.numel()
        )

    def layer(self, bias: Tensor | None) -> LowRankLinear:
        columns, rows = self.down.shape[1], self.up.shape[0]
        weight = self.weight
        form = LinearFormat(
            weight.bits, weight.group_size, weight.symmetric, weight.scale.dtype, bias is not None
        )
        made = LowRankLinear(columns, rows, form, len(self.down)).to(self.down.device)
        made.down, made.up, made.smooth = self.down, self.up, self.smooth
        _fill(made.residual, weight, bias)
        return made


def _fill(packed: QuantizedLinear, weight: QuantizedWeight, bias: Tensor | None) -> None:
    for name, tensor in pack_weight(weight).items():
        setattr(packed, name, tensor)
    if bias is not None:
        packed.bias = bias.detach().float().clone()


@torch.no_grad()
def fit_low_rank(
    weight: Tensor, inputs: Tensor, step: SvdquantStep, activation: TokenQuantizer | None
) -> LowRank:
    """The branch, smoothing and residual of least output error for inputs (tokens, in).

    weight: (out, in). activation: what rounds the input of the residual; None: nothing does.
    """
    w, x = weight.float(), inputs.float()
    wanted = x @ w.T
    best: tuple[float, LowRank] | None = None
    for alpha in torch.linspace(0, 1, ALPHAS).tolist():
        found = _decompose(w, smoothing(x, w, alpha), step)
        scaled = x / found.smooth
        rounded = scaled if activation is None else activation(scaled)
        output = rounded @ found.weight.dequantize().T + scaled @ found.down.T @ found.up.T
        error = float((output - wanted).double().square().sum())
        if best is None or error < best[0]:
            best = error, found
    assert best is not None
    return best[1]


def smoothing(inputs: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s (in,): larger where inputs are larger than weights; around 1, so that neither side leaves its range."""
    top, heavy = inputs.abs().amax(0).clamp(min=1e-5), weight.abs().amax(0).clamp(min=1e-5)
    s = top.pow(alpha) / heavy.pow(1 - alpha)
    return s / s.log().mean().exp()


def _decompose(w: Tensor, smooth: Tensor, step: SvdquantStep) -> LowRank:
    scaled = w * smooth
    rank = min(step.rank, *scaled.shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the subspace iteration starts at random
        u, s, v = torch.svd_lowrank(scaled, q=min(rank + EXTRA, *scaled.shape), niter=ROUNDS)
    root = s[:rank].sqrt()
    up, down = (u[:, :rank] * root).half().float(), (v[:, :rank] * root).T.contiguous().half().float()
    grid = RtnStep(bits=step.bits, group_size=step.group_size, symmetric=step.symmetric, clip=step.clip)
    return LowRank(rtn(scaled - up @ down, grid), down, up, smooth)


@torch.no_grad()
def layer_inputs(
    network: StepNetwork, names: Sequence[str], latents: Sequence[Latents]
) -> Mapping[str, Tensor]:
    """Some tokens of each layer's input, (TOKENS at most, in), evenly from all latents. Raises NonFiniteError."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    share = max(1, TOKENS // max(1, len(latents)))

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].flatten(0, -2)
        places = torch.linspace(0, len(tokens) - 1, min(share, len(tokens)), device=tokens.device).long()
        found[name].append(tokens[places].float())

    hooks = [network.unet.get_submodule(n).register_forward_pre_hook(partial(keep, n)) for n in names]
    try:
        for index, x, seeds in latents:
            network.of(seeds)(x, index)
    finally:
        for hook in hooks:
            hook.remove()
    if not latents:
        raise CalibrationError("svdquant needs at least one latent")
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    for name, values in joined.items():
        if not torch.isfinite(values).all():
            raise NonFiniteError(f"{name}: its input holds NaN or infinity on the calibration samples")
    return joined
