"""One adapter for the decoder language models of transformers: a skeleton, and its blocks one at a time.

The skeleton (embeddings, norms, head) lives on the device; a block is materialised from the checkpoint
when the sweep visits it and freed after, so that the device holds one block and the activations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quantry.families import Family, block_bias_layer, block_halves, family_of, units_of
from quantry.planning import is_halved
from worker.errors import ModelError, NonFiniteError
from worker.models.attention import use_tiles
from worker.models.calls import BlockCall
from worker.models.source import refusing
from worker.models.tensors import Checkpoint

BATCH_TOKENS = {"cpu": 1024}  # windows that run together hold about this many tokens; elsewhere OTHER_TOKENS
OTHER_TOKENS = 2048


@dataclass
class _Recorded:
    hidden: Tensor | None = None
    calls: list[BlockCall] = field(default_factory=list)


class CausalLM:
    """A causal language model that is never whole in memory.

    Args:
        folder: a checked checkpoint (see `worker.models.source`).
        device: where the skeleton, the blocks and the activations live.
        attention: transformers' implementation; "quantry" where probabilities are quantized; None: its default.
        dtype: of the forwards; the full-precision weights are read in the checkpoint's own dtype.
    Raises: ModelError if the folder's tensors do not fit the architecture.
    """

    def __init__(
        self, folder: Path, *, device: torch.device, dtype: torch.dtype, attention: str | None = None
    ) -> None:
        self.folder, self.device, self.dtype, self.attention_kind = folder, device, dtype, attention
        with refusing(folder, "config.json"):
            self.config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.family: Family = family_of(self.config.to_dict())
        self.tensors = Checkpoint(folder, self.family)
        with refusing(folder, "config.json"), torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(
                self.config, dtype=dtype, attn_implementation=attention
            )
        self.model.eval().requires_grad_(False)
        if device.type == "cpu":
            use_tiles(self.model)
        self._as_stored = True
        self._scales: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._check_names()
        self._load_skeleton()

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def count(self) -> int:
        return len(self.blocks)

    def prefix(self, index: int) -> str:
        return f"{self.family.blocks}.{index}"

    def groups(self, index: int) -> tuple[tuple[str, ...], ...]:
        return self.family.groups

    def batch(self, inputs: Tensor) -> int:
        return max(1, BATCH_TOKENS.get(self.device.type, OTHER_TOKENS) // inputs.shape[1])

    def attention(self, index: int) -> str | None:
        return self.family.groups[0][0].rpartition(".")[0]

    @property
    def halves(self) -> tuple[str, str, str] | None:
        return block_halves(self.family, self.config.to_dict())

    def units(self, index: int) -> dict[str, tuple[str, str]]:
        """The attention module of a block and, where it is a module, the feed-forward network."""
        return units_of(self.family)

    def output_layer(self, index: int) -> str | None:
        return block_bias_layer(self.family, self.config.to_dict())

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer. Raises ModelError."""
        with refusing(self.folder, "the tokenizer"):
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)

    @property
    def start_token(self) -> int | None:
        """The token that the model expects before a document: the config's bos, else its eos."""
        config = self.config
        token = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
        first: int | None = token[0] if isinstance(token, list) else token
        return first

    def block(self, index: int) -> nn.Module:
        """Block `index` in full precision, its own copy, in the forward's dtype."""
        prefix = self.prefix(index)
        block = copy.deepcopy(self.blocks[index])
        self._materialise(block, prefix)
        self._rewrite(block, prefix)
        return block

    def smooth(self, prefix: str, scales: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        """From now on the block under `prefix` has these norms, and its layers' columns are multiplied by scales.

        scales: (in,) by layer, norms: by tensor, both by name inside the block.
        """
        self._scales |= {f"{prefix}.{name}": scale for name, scale in scales.items()}
        for name, tensor in norms.items():
            kept = self.tensors.load(f"{prefix}.{name}").dtype
            self._norms[f"{prefix}.{name}"] = tensor.to(kept)

    def smooth_like(self, other: CausalLM) -> None:
        """Take over what `smooth` did to another adapter of the same checkpoint."""
        self._scales = {name: scale.to(self.device) for name, scale in other._scales.items()}
        self._norms = {name: norm.to(self.device) for name, norm in other._norms.items()}

    def _rewrite(self, block: nn.Module, prefix: str) -> None:
        for name, tensor in self._norms.items():
            if name.startswith(f"{prefix}."):
                block.get_parameter(name.removeprefix(f"{prefix}.")).copy_(tensor)
        for name in self._scales:
            if name.startswith(f"{prefix}."):
                weight = self.weight(name)
                parameter = block.get_parameter(f"{name.removeprefix(f'{prefix}.')}.weight")
                parameter.copy_(weight.T if self.family.transposed else weight)

    def columns(self, name: str) -> int:
        """The number of inputs of a linear layer."""
        return self.tensors.shape(f"{name}.weight")[0 if self.family.transposed else 1]

    def weight(self, name: str) -> Tensor:
        """The full-precision weight of a linear layer: (out, in) float32 on the device."""
        weight = self.tensors.load(f"{name}.weight").to(self.device, torch.float32)
        weight = weight.T.contiguous() if self.family.transposed else weight
        return weight * self._scales[name] if name in self._scales else weight

    def bias(self, name: str) -> Tensor | None:
        """The full-precision bias (out,) float32, or None."""
        key = f"{name}.bias"
        return self.tensors.load(key).to(self.device, torch.float32) if key in self.tensors else None

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """What enters the first block for tokens (batch, length), and the call of every block."""
        with self._stubs(None) as recorded:
            self.model.base_model(input_ids=tokens.to(self.device), use_cache=False)
        assert recorded.hidden is not None
        return recorded.hidden, recorded.calls

    @torch.no_grad()
    def head(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The logits (batch, length, vocabulary) for what leaves the last block, (batch, length, width)."""
        with self._stubs(hidden):
            logits: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return logits

    @property
    def _halved(self) -> list[str]:
        """The embeddings and head that the artifact stores in fewer bits than the checkpoint."""
        return [name for name in self.tensors if is_halved(name, self.tensors.infos[name].dtype)]

    def kept(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is not a quantized layer's, `(canonical name, tensor)`, as the artifact stores it."""
        quantized = {
            f"{self.family.blocks}.{i}.{name}"
            for i in range(len(self.blocks))
            for name in self.family.linears
        }
        tied = self._tied
        for name in self.tensors:
            if name.rpartition(".")[0] not in quantized and name not in tied:
                yield name, self._stored(name)

    def use_kept(self, *, as_stored: bool) -> None:
        """Embeddings and head as the artifact stores them (what a new model has), or as the checkpoint does."""
        if as_stored == self._as_stored:
            return
        self._as_stored = as_stored
        for name in self._halved:
            if name not in self._tied:
                self._copy(name, self.model.get_parameter(name).data)

    def _copy(self, name: str, into: Tensor) -> None:
        """A tensor of the checkpoint into a parameter. Raises NonFiniteError if its stored form overflows."""
        halve = self._as_stored and is_halved(name, self.tensors.infos[name].dtype)
        self.tensors.copy(name, into, through=torch.float16 if halve else None)
        if halve and not torch.isfinite(into.sum(dtype=torch.float32)):
            raise NonFiniteError(
                f"{name} holds NaN, infinity or values beyond float16, in which it is stored"
            )

    def _load_skeleton(self) -> None:
        blocks = {id(module) for block in self.blocks for module in block.modules()}
        outside = [(n, m) for n, m in self.model.named_modules() if id(m) not in blocks]
        self._fill(outside, "")
        self.model.tie_weights()

    @property
    def _tied(self) -> set[str]:
        """Parameters that another one stands for (the head, where it is the embedding)."""
        return set(self.model.all_tied_weights_keys)

    def _stored(self, name: str) -> Tensor:
        if name in self._norms:
            return self._norms[name].cpu()
        tensor = self.tensors.load(name)
        return tensor.half() if is_halved(name, self.tensors.infos[name].dtype) else tensor

    @contextmanager
    def _stubs(self, first: Tensor | None) -> Iterator[_Recorded]:
        """Let every block pass its input on (the first one: return `first`), and record how it was called."""
        recorded = _Recorded()

        def stub(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                recorded.hidden = hidden
            recorded.calls.append(BlockCall(args[1:], kwargs))
            return first if index == 0 and first is not None else hidden

        try:
            for index, block in enumerate(self.blocks):
                block.forward = partial(stub, index)
            yield recorded
        finally:
            for block in self.blocks:
                del block.forward

    def _check_names(self) -> None:
        expected = {name: tuple(p.shape) for name, p in self.model.state_dict(keep_vars=True).items()}
        missing = [n for n in expected if n not in self.tensors and n not in self._tied]
        if missing:
            raise ModelError(f"{self.folder.name}: tensor `{missing[0]}` is missing ({len(missing)} in all)")
        for name, shape in expected.items():
            if name in self.tensors and self.tensors.shape(name) != shape:
                raise ModelError(
                    f"{self.folder.name}: `{name}` has shape {self.tensors.shape(name)}, the config says {shape}"
                )
        unknown = [n for n in self.tensors if n not in expected]
        if unknown:
            raise ModelError(
                f"{self.folder.name}: tensor `{unknown[0]}` belongs to no layer of the architecture"
            )

    def _materialise(self, block: nn.Module, prefix: str) -> None:
        self._fill(list(block.named_modules()), prefix)
        for name, parameter in block.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteError(f"{prefix}.{name} holds NaN or infinity: the checkpoint is damaged")

    def _fill(self, modules: list[tuple[str, nn.Module]], prefix: str) -> None:
        """Give modules on the meta device their memory, computed buffers and checkpoint tensors."""
        for path, module in modules:
            module.to_empty(device=self.device, recurse=False)
            if module._non_persistent_buffers_set:
                self.model._init_weights(module)  # transformers fills computed buffers here
            for name, tensor in [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]:
                key = ".".join(part for part in (prefix, path, name) if part)
                if key in self.tensors:
                    self._copy(key, tensor.data)
