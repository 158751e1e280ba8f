"""What quantizes the activations of a network, put on the copies of its blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from quantry.layers.operands import attach, set_probability_bias
from quantry.quantizers.activation import ActivationQuantizer


@dataclass(frozen=True)
class Dressing:
    """The activation quantizers of a network and its softmax corrections.

    quantizers: by place, `<layer>.input` or `<attention>.query` and so on, full names. probability_bias:
    (H, 1, 1) or (1, 1, 1) by attention module.
    """

    quantizers: Mapping[str, ActivationQuantizer] = field(default_factory=dict)
    probability_bias: Mapping[str, Tensor] = field(default_factory=dict)

    def dress(self, prefix: str, module: nn.Module) -> None:
        """Attach copies of what belongs to the block whose names start with `prefix`."""
        names = dict(module.named_modules())
        device = next(module.parameters()).device
        for place, quantizer in self.quantizers.items():
            inside = _inside(prefix, place)
            if inside is not None and inside.rpartition(".")[0] in names:
                attach(module, inside, copy.deepcopy(quantizer).to(device))
        for attention, bias in self.probability_bias.items():
            inside = _inside(prefix, attention)
            if inside is not None and inside in names:
                set_probability_bias(module, inside, bias.to(device))


def _inside(prefix: str, name: str) -> str | None:
    """The name without the block's prefix; None where it is another block's."""
    if not prefix:
        return name
    return name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else None
