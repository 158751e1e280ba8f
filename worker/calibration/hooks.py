"""Hooks that watch a block while it runs. None outlives its context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from worker.models.calls import BlockCall, run_block


class _Reached(Exception):
    """The layer that was waited for has its input."""


def layer_input(block: nn.Module, layer: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """What `layer` is given when `block` runs on `hidden`; the block is not run any further."""
    caught: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _Reached

    with layer.register_forward_pre_hook(stop):
        try:
            run_block(block, hidden, call)
        except _Reached:
            return caught[0]
    raise AssertionError("the block never ran the layer")


def input_and_output(
    block: nn.Module, layer: nn.Module, hidden: Tensor, call: BlockCall
) -> tuple[Tensor, Tensor]:
    """What `layer` is given when `block` runs on `hidden`, and what leaves the block."""
    seen: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        out = run_block(block, hidden, call)
    return seen[0], out


@contextmanager
def outputs_of(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show every layer's output to `see(name, output)`, each time it runs."""
    with ExitStack() as hooks:
        for name, layer in layers.items():

            def hook(module: nn.Module, inputs: object, output: Tensor, name: str = name) -> None:
                see(name, output)

            hooks.enter_context(layer.register_forward_hook(hook))
        yield
