"""Taking a stream through a block with a stop before each group of layers.

At a stop the group's inputs are looked at and its weights replaced. `Walk` runs every operation once: the
forward of each batch is a coroutine (a greenlet: it may pause below any number of calls) that holds its
activations meanwhile. `Rerun` holds nothing and runs the block again up to each stop. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import psutil
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from worker.calibration.hooks import input_and_output, layer_input
from worker.calibration.streams import Stream
from worker.models.calls import BlockCall, run_block

WALK_SHARE = 4  # a walk may take this part of the free memory


class Passage(Protocol):
    """A stream on its way through one block."""

    def inputs(self, *, leave: bool = False) -> Iterator[Tensor]:
        """The inputs at the next stop, batch by batch; `leave`: of batches that have left the block already."""

    def finish(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The end: `(where, what entered the block, what leaves it)`, batch by batch.

        What leaves is written over what entered when the iterator moves on.
        """

    def close(self) -> None:
        """Leave the block without finishing."""


def passage(
    block: nn.Module, layers: Sequence[nn.Module], stream: Stream, index: int, columns: int
) -> Passage:
    """A walk if the memory is there, else reruns. columns: of the widest layer; layers: where to stop."""
    hidden = stream.hidden
    rows = hidden[..., 0].numel()
    needed = rows * (hidden.shape[-1] * 4 + columns) * hidden.element_size()
    device = hidden.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    kind = Walk if needed * WALK_SHARE < free else Rerun
    return kind(block, layers, stream, index)


class Walk:
    """The forwards of all batches, in step. Memory: what each holds at the pause."""

    def __init__(self, block: nn.Module, layers: Sequence[nn.Module], stream: Stream, index: int) -> None:
        self._stream = stream
        self._runs: list[tuple[slice, greenlet, Tensor]] = []
        self._hooks: list[RemovableHandle] = [layer.register_forward_pre_hook(_pause) for layer in layers]
        for where, states, call in stream.batches(index):
            self._runs.append((where, greenlet(partial(_forward, block, call)), states))

    def inputs(self, *, leave: bool = False) -> Iterator[Tensor]:
        for where, run, states in self._runs:
            if not leave:
                yield run.switch(states)
                continue
            x = run.switch(states)
            self._stream.put(where, run.switch(states))
            yield x
            del x
        if leave:
            self.close()

    def finish(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for hook in self._hooks:
            hook.remove()
        for where, run, states in self._runs:
            out = run.switch(states)
            yield where, states, out
            self._stream.put(where, out)
        self._runs = []

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._runs = []


def _forward(block: nn.Module, call: BlockCall, states: Tensor) -> Tensor:
    return run_block(block, states, call)


def _pause(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    getcurrent().parent.switch(inputs[0])


class Rerun:
    """The block run from its start up to each stop."""

    def __init__(self, block: nn.Module, layers: Sequence[nn.Module], stream: Stream, index: int) -> None:
        self._block, self._layers, self._stream, self._index = block, iter(layers), stream, index

    def inputs(self, *, leave: bool = False) -> Iterator[Tensor]:
        layer = next(self._layers)
        for where, states, call in self._stream.batches(self._index):
            if not leave:
                yield layer_input(self._block, layer, states, call)
                continue
            x, out = input_and_output(self._block, layer, states, call)
            self._stream.put(where, out)
            del out
            yield x
            del x

    def finish(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for where, states, call in self._stream.batches(self._index):
            out = run_block(self._block, states, call)
            yield where, states, out
            self._stream.put(where, out)

    def close(self) -> None:
        """Nothing is held."""
