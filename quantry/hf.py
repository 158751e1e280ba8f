"""The `quantry` format for transformers: importing this module registers it.

`quantization_config` of config.json:
    quant_method "quantry", format_version 1, bits, group_size (null: per channel), symmetric, scale_dtype,
    layers {module name: {"bias": bool, "positions": rows of the position bias, and any of the keys before
    that differ for this layer}}, activations {operand name: description of its quantizer},
    probability_bias {attention module: heads, or 1 for one bias}, producer, recipe.
    Names are those of modules in memory. Layers not named stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import quantry.quantizers.kinds  # noqa: F401  (so that descriptions can be read)
from quantry.families import FAMILIES
from quantry.layers import operands  # the module: its own import of transformers may be what brings us here
from quantry.layers.conv import QuantizedConv2d
from quantry.layers.linear import LinearFormat, QuantizedLinear
from quantry.layers.positions import Locator, Positions, TokenIndices
from quantry.quantizers.activation import from_description
from quantry.vision import VISION_FAMILIES

FORMAT_VERSION = 1
_PER_LAYER = ("bits", "group_size", "symmetric", "scale_dtype")
_SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@register_quantization_config("quantry")
class QuantryConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """`quantization_config` of a checkpoint in the quantry format. `dequantize`: load dense weights."""

    def __init__(
        self,
        bits: int,
        group_size: int | None,
        symmetric: bool,
        scale_dtype: str,
        layers: dict[str, dict[str, Any]],
        activations: dict[str, dict[str, Any]] | None = None,
        probability_bias: dict[str, int] | None = None,
        format_version: int = FORMAT_VERSION,
        dequantize: bool = False,
        **extra: Any,
    ) -> None:
        self.quant_method = "quantry"
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint is of format version {format_version}, this quantry reads "
                f"{FORMAT_VERSION}: install the version that its model card names"
            )
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.scale_dtype = scale_dtype
        self.layers = layers
        self.activations = activations or {}
        self.probability_bias = probability_bias or {}
        self.format_version = format_version
        self.dequantize = dequantize
        for key, value in extra.items():  # recipe, producer: kept when the model is saved again
            if key != "quant_method":
                setattr(self, key, value)

    @property
    def quantizes_attention(self) -> bool:
        """Whether something of the checkpoint works inside of attention."""
        return bool(self.probability_bias) or any(not name.endswith(".input") for name in self.activations)

    def layer_format(self, name: str) -> LinearFormat:
        """What is stored for this layer. Raises ValueError for an entry that makes no sense."""
        entry = self.layers[name]
        unknown = set(entry) - {*_PER_LAYER, "bias", "positions"}
        if unknown:
            raise ValueError(f"quantization_config.layers.{name}: unknown keys {sorted(unknown)}")
        bits, group_size, symmetric, scale = (entry.get(key, getattr(self, key)) for key in _PER_LAYER)
        if scale not in _SCALE_DTYPES:
            raise ValueError(f"quantization_config.layers.{name}: scale_dtype {scale!r} is not known")
        bias, positions = bool(entry.get("bias", False)), int(entry.get("positions", 0))
        return LinearFormat(bits, group_size, symmetric, _SCALE_DTYPES[scale], bias, positions)


@register_quantizer("quantry")
class QuantryQuantizer(HfQuantizer):  # type: ignore[misc]  # as above
    """Puts packed layers in place of dense ones before transformers reads the files."""

    requires_calibration = True  # only checkpoints that are quantized already
    quantization_config: QuantryConfig

    def __init__(self, quantization_config: QuantryConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.transposed: set[str] = set()  # layers that were a Conv1D
        self.biased: set[str] = set()  # layers that the stock model gives a bias

    def update_attn_implementation(self, config: Any) -> Any:
        """Refuse an implementation that the caller asked for, where it would leave quantizers out."""
        wanted = config._attn_implementation
        if self.quantization_config.quantizes_attention and wanted not in (None, operands.ATTENTION):
            raise ValueError(
                f"this checkpoint quantizes inside of attention, which `{wanted}` does not run: leave "
                "`attn_implementation` out"
            )
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        names = _ModuleNames(model)
        positions = Positions()
        locator = TokenIndices() if _is_classifier(model) else positions
        for stored in self.quantization_config.layers:
            name = names.find(stored)
            if name is not None:
                form = self.quantization_config.layer_format(stored)
                self._pack(model, name, form, locator if form.positions else None)
        if locator is positions and any(e.get("positions") for e in self.quantization_config.layers.values()):
            positions.watch(model)
        self._attach_operands(model, names)

    def _pack(self, model: nn.Module, name: str, form: LinearFormat, locator: Locator | None) -> None:
        """A packed layer, still empty, in place of the dense one."""
        dense = model.get_submodule(name)
        packed: QuantizedLinear
        with torch.device("meta"):
            if isinstance(dense, nn.Conv2d):
                packed = QuantizedConv2d(dense, form, locator)
            else:
                packed = QuantizedLinear(*_shape(dense, name), form, locator)
        if isinstance(dense, Conv1D):
            self.transposed.add(name)
        if getattr(dense, "bias", None) is not None:
            self.biased.add(name)
        model.set_submodule(name, packed)
        # Some parents (GPT-2's) would rescale the weight of a layer at random initialization
        parent: Any = model.get_submodule(name.rpartition(".")[0])
        parent._is_hf_initialized = True

    def _attach_operands(self, model: nn.Module, names: _ModuleNames) -> None:
        """The activation quantizers and softmax biases, still empty, in their places."""
        config = self.quantization_config
        with _empty_float32():
            for stored, description in config.activations.items():
                path, _, role = stored.rpartition(".")
                name = names.find(path)
                if name is not None:
                    operands.attach(model, f"{name}.{role}", from_description(description))
            for stored, heads in config.probability_bias.items():
                name = names.find(stored)
                if name is not None:
                    operands.set_probability_bias(model, name, torch.zeros(heads, 1, 1))
        if config.quantizes_attention:
            operands.use_quantized_attention(model)
            model.register_forward_pre_hook(_check_attention)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return self._dequantize(model) if self.quantization_config.dequantize else model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Dense layers in place of packed ones. Raises ValueError for what a dense network cannot hold."""
        if self.quantization_config.activations or self.quantization_config.probability_bias:
            raise ValueError(
                "this checkpoint quantizes activations, which a dense network does not: keep it packed"
            )
        packed = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        held = [name for name, module in packed.items() if module.position_bias is not None]
        if held:
            raise ValueError(
                f"{held[0]} has a bias per position, which a dense layer cannot hold: keep it packed"
            )
        added = {name for name, module in packed.items() if module.bias is not None} - self.biased
        open_bias_slots(model, added)
        for name, module in packed.items():
            model.set_submodule(name, _dense(module, dtype or model.dtype, name in self.transposed))
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class _ModuleNames:
    """What the layers of a checkpoint are called in a model, which may be the whole or only its base."""

    def __init__(self, model: Any) -> None:
        self._names = {name for name, _ in model.named_modules()}
        self._prefix = f"{model.base_model_prefix}."
        self._is_base = model.base_model is model
        self._model = type(model).__name__

    def find(self, stored: str) -> str | None:
        """The name in this model; None for a layer of the head where this is only the base."""
        for name in (stored, stored.removeprefix(self._prefix)):
            if name in self._names:
                return name
        if self._is_base and not stored.startswith(self._prefix):
            return None
        raise ValueError(f"the checkpoint quantizes `{stored}`, which {self._model} does not have")


def _is_classifier(model: Any) -> bool:
    """Whether the model takes images."""
    return model.config.model_type in VISION_FAMILIES


@contextmanager
def _empty_float32() -> Iterator[None]:
    """Modules made here are on the meta device, and of float32 whatever dtype the model is loaded in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def _check_attention(model: Any, inputs: tuple[Any, ...]) -> None:
    """Refuse to run after somebody switched to an attention that knows no quantizers."""
    if model.config._attn_implementation != operands.ATTENTION:
        raise RuntimeError(
            f"this model quantizes inside of attention, which `{model.config._attn_implementation}` does not "
            f'run: model.set_attn_implementation("{operands.ATTENTION}")'
        )


def _shape(module: nn.Module, name: str) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    raise ValueError(f"`{name}` is a {type(module).__name__}, not a linear layer")


def _dense(packed: QuantizedLinear, dtype: torch.dtype, transposed: bool) -> Any:
    weight = packed.dequantize(dtype)
    bias = None if packed.bias is None else nn.Parameter(packed.bias.to(dtype))
    layer: Any
    with torch.device("meta"):
        if isinstance(packed, QuantizedConv2d):
            layer, weight = packed.dense(), weight.view(packed.kernel_shape)
        elif transposed:
            layer = Conv1D(packed.out_features, packed.in_features)
        else:
            layer = nn.Linear(packed.in_features, packed.out_features, bias=bias is not None)
    layer.weight = nn.Parameter(weight.t().contiguous() if transposed else weight, requires_grad=False)
    if transposed and bias is None:
        bias = nn.Parameter(torch.zeros(packed.out_features, dtype=dtype, device=weight.device))
    layer.bias = bias
    return layer


def open_bias_slots(model: Any, biased: set[str]) -> None:
    """Make the config say that these layers have biases, so that a model saved dense keeps them.

    A switch gives every layer under it a bias: those that had none get zeros. Warns where no switch exists.
    """
    family = FAMILIES.get(model.config.model_type)
    switches: Mapping[str, tuple[str, ...]] = family.bias_switches if family else {}
    fixed = family.fixed_bias if family else ()
    homeless = {name for name in biased if not name.endswith((*fixed, *sum(switches.values(), ()), "\0"))}
    if homeless:
        warnings.warn(
            f"{model.config.model_type} has no place for the biases of {len(homeless)} layers, such as "
            f"{min(homeless)}: they work in memory, but are lost when the dense model is saved and loaded",
            stacklevel=3,
        )
    for switch, suffixes in switches.items():
        if not getattr(model.config, switch, False) and any(name.endswith(suffixes) for name in biased):
            setattr(model.config, switch, True)
            under = [module for name, module in model.named_modules() if name.endswith(suffixes)]
            for module in under:
                _add_bias(module)


def _add_bias(module: nn.Module) -> None:
    """Give a linear layer that has no bias one of zeros."""
    if getattr(module, "bias", None) is not None:
        return
    if isinstance(module, QuantizedLinear):
        module.bias = torch.zeros(module.out_features, device=module.weight_packed.device)
    elif isinstance(module, nn.Linear):
        weight = module.weight
        module.bias = nn.Parameter(weight.new_zeros(module.out_features), requires_grad=weight.requires_grad)
