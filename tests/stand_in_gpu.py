"""A stand-in for a GPU: tensors that say `cuda` and compute on the CPU, where no GPU is at hand.

Within `stand_in()` torch believes in one CUDA device. What is asked of it runs on the CPU, but under CUDA's rules about
where things are: an operation whose tensors are in two places fails, numbers leave by `.cpu()` or `.item()` alone,
a generator serves one device only, and products of int8 keep the sizes that cuBLAS demands. It shows forgotten
`.to(device)`s, not what a kernel computes, how fast, or in how much memory: for that, `make test-gpu`.

As a plugin of pytest it puts whole jobs there, or on the GPU if there is one, where a test runs them itself:
`pytest -p stand_in_gpu tests/worker/...`.
Torch keeps the device for the rest of the process, so the test suite does that in processes of their own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from worker.workspace import Workspace

CUDA = torch.device("cuda", 0)
BELOW = torch.device("privateuseone:0")  # what torch's C++ takes it for
FREE = 1 << 32  # bytes that the device says it has
_ACROSS = {"_to_copy", "copy_", "copy", "_copy_from", "set_"}  # operations that take tensors of two places
# Their indices may be on the CPU.
_INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
_Generator = torch.Generator


class OnCuda(Tensor):
    """A tensor that says it is on the GPU; its values are a CPU tensor's."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnCuda:
        made: OnCuda = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=BELOW,
            requires_grad=False,
        )
        made.values = values
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnCuda({self.values!r})"

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    def tolist(self) -> Any:
        return self.values.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a cuda tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Rules(TorchDispatchMode):
    """Sends what makes new tensors on the GPU there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Turns `cuda` into the device that torch's C++ takes it for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **kwargs or {})
        args = tuple(_below(x) for x in args)
        kwargs = {name: _below(x) for name, x in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == BELOW:  # they allow no mode
            del kwargs["device"]
            return func(*args, **kwargs).to(BELOW)
        return func(*args, **kwargs)


_apply = torch.autograd.function.BackwardCFunction.apply


def _backward(function: Any, *args: Any) -> Any:
    """The backward of a function of ours: torch calls it with no mode on."""
    with _Names():
        return _apply(function, *args)


def _below(x: Any) -> Any:
    cuda = x.type == "cuda" if isinstance(x, torch.device) else isinstance(x, str) and x in ("cuda", "cuda:0")
    return BELOW if cuda else x


class _SeededGenerator(_Generator):
    """A generator that remembers its device; its numbers are the CPU's."""

    on_gpu: ClassVar[set[int]] = set()  # what they are known by below

    def __new__(cls, device: Any = "cpu") -> _SeededGenerator:
        made: _SeededGenerator = super().__new__(cls)
        if torch.device(device).type == "cuda":
            cls.on_gpu.add(made._cdata)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:
        return CUDA if self._cdata in self.on_gpu else torch.device("cpu")

    def __del__(self) -> None:
        self.on_gpu.discard(self._cdata)


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[1]
    flat = tree_flatten((args, kwargs))[0]
    tensors = [x for x in flat if isinstance(x, Tensor)]
    wanted = kwargs.get("device")
    on_gpu = any(isinstance(x, OnCuda) for x in tensors)
    if name not in _ACROSS:
        _check_places(name, args, tensors)
    gpu = torch.device(wanted).type in (BELOW.type, "cuda") if wanted is not None else on_gpu
    if name in ("copy_", "set_", "_copy_from"):
        gpu = isinstance(args[0], OnCuda)
    _check_generator(name, kwargs.get("generator"), gpu)
    inner = {id(x.values): x for x in tensors if isinstance(x, OnCuda)}
    cpu_args, cpu_kwargs = tree_map(_values, (args, kwargs))
    cpu_kwargs.pop("pin_memory", None)
    if wanted is not None and gpu:
        cpu_kwargs["device"] = torch.device("cpu")
    out = _on_cpu(func, name, cpu_args, cpu_kwargs, gpu)
    if not gpu:
        return out
    return tree_map(lambda x: _wrapped(x, inner) if isinstance(x, Tensor) else x, out)


def _wrapped(values: Tensor, known: dict[int, OnCuda]) -> OnCuda:
    """What changes a tensor in place gives that very tensor back."""
    return known[id(values)] if id(values) in known else OnCuda(values)


def _values(x: Any) -> Any:
    return x.values if isinstance(x, OnCuda) else x


def _on_cpu(func: Any, name: str, args: Any, kwargs: dict[str, Any], gpu: bool) -> Any:
    if gpu and name == "_int_mm":
        rows, inner, columns = (*args[0].shape, args[1].shape[1])
        if rows <= 16 or inner % 8 or columns % 8:
            raise RuntimeError(f"_int_mm on CUDA: {rows}x{inner} by {inner}x{columns}")
    if gpu and str(func) == "aten.mm.dtype":  # CUDA alone sums products of bfloat16 in float32
        return args[0].to(args[2]) @ args[1].to(args[2])
    return func(*args, **kwargs)


def _check_places(name: str, args: Any, tensors: list[Tensor]) -> None:
    if name in _INDEXED and isinstance(args[0], OnCuda):
        tensors = [x for x in tree_flatten(args[2:])[0] if isinstance(x, Tensor)] + [args[0]]
    joined = name in ("cat", "stack")  # else a number on the CPU may join
    places = {isinstance(x, OnCuda) for x in tensors if x.ndim or joined or isinstance(x, OnCuda)}
    if places == {False} or places == {True} or not places:
        return
    shapes = [(tuple(x.shape), "cuda" if isinstance(x, OnCuda) else "cpu") for x in tensors]
    raise RuntimeError(f"{name}: tensors on two devices: {shapes}")


def _check_generator(name: str, generator: Any, gpu: bool) -> None:
    if generator is not None and (generator._cdata in _SeededGenerator.on_gpu) != gpu:
        raise RuntimeError(
            f"{name}: tensor and generator are on two devices, the tensor on {'cuda' if gpu else 'cpu'}"
        )


@cache
def _register() -> None:
    """For the rest of the process."""
    _setup_privateuseone_for_python_backend("standin")


@contextmanager
def stand_in() -> Iterator[None]:
    """Let torch believe in a GPU."""
    if torch.cuda.is_available():
        raise AssertionError("there is a GPU here: use it")
    _register()
    changed = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.mem_get_info": lambda *_: (FREE, FREE),
        "torch.cuda.max_memory_allocated": lambda *_: 1,
        "torch.cuda.reset_peak_memory_stats": lambda *_: None,
        "torch.cuda.get_device_name": lambda *_: "stand-in",
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.Generator": _SeededGenerator,
        "torch.autograd.function.BackwardCFunction.apply": _backward,
    }
    with ExitStack() as changes:
        for path, value in changed.items():
            changes.enter_context(patch(path, value))
        changes.enter_context(torch.autograd.set_multithreading_enabled(False))
        changes.enter_context(_Names())
        changes.enter_context(_Rules())
        yield


def pytest_configure() -> None:
    """Let jobs run on the GPU where a test does not say where."""
    Workspace.model_fields["device"].default = "cuda"
    Workspace.model_rebuild(force=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    with nullcontext() if torch.cuda.is_available() else stand_in():
        return (yield)
