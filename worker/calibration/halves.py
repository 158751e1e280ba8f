"""Taking a stream through a pre-norm block, half by half: mid = x + attention(norm(x)), out = mid + mlp(norm(mid)).

Between stops nothing is held but the residual stream, in the stream's own buffer, and for the attention's output
projection its inputs. Attention and output projection run once; norms and the MLP's first layers run once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from worker.calibration.hooks import input_and_output, layer_input
from worker.calibration.streams import Stream
from worker.models.calls import BlockCall, run_block


@dataclass(frozen=True)
class Parts:
    """The norm that begins each half of a block, and the attention."""

    first_norm: nn.Module
    attention: nn.Module
    second_norm: nn.Module


class Halves:
    """A passage (see `walk.Passage`) that overwrites what entered the block once the first half is done.

    layers: where to stop: the attention's first layers, its output projection, the MLP's layers. replaced: whether
    the weights of a group are, once its inputs were seen; if not, each batch goes on at once.
    """

    def __init__(
        self,
        block: nn.Module,
        parts: Parts,
        layers: Sequence[nn.Module],
        stream: Stream,
        index: int,
        *,
        replaced: bool,
    ) -> None:
        self._block, self._parts, self._stream, self._index = block, parts, stream, index
        self._replaced = replaced
        self._layers = iter(enumerate(layers))
        self._projection = layers[1]
        self._projected: Tensor | None = None

    def inputs(self, *, leave: bool = False) -> Iterator[Tensor]:
        number, layer = next(self._layers)
        for where, states, call in self._stream.batches(self._index):  # holds on to nothing that it yields
            if number == 0:
                yield layer_input(self._block, layer, states, call)
            elif number == 1 and self._replaced:
                yield self._hold(where, layer_input(self._block, layer, states, call))
            elif number == 1:
                yield from self._look_and_go_on(where, states, call)
            else:
                if number == 2 and self._projected is not None:
                    self._stream.put(where, self._middle(self._projected[where], states, call))
                yield self._second_input(layer, where, call, leave)
        if number == 2:
            self._projected = None

    def _hold(self, where: slice, x: Tensor) -> Tensor:
        if self._projected is None:
            self._projected = x.new_empty(len(self._stream.hidden), *x.shape[1:])
        self._projected[where] = x
        return self._projected[where]

    def _look_and_go_on(self, where: slice, states: Tensor, call: BlockCall) -> Iterator[Tensor]:
        x = layer_input(self._block, self._projection, states, call)
        yield x
        self._stream.put(where, self._middle(x, states, call))

    def _middle(self, x: Tensor, states: Tensor, call: BlockCall) -> Tensor:
        """The residual stream between the halves. x: what the attention's output projection is given."""
        attended = self._projection(x)
        with _instead(self._parts.attention, lambda *_, **__: (attended, None)):
            return layer_input(self._block, self._parts.second_norm, states, call).view(states.shape)

    def _second_input(self, layer: nn.Module, where: slice, call: BlockCall, leave: bool) -> Tensor:
        """What a layer of the second half is given; `leave`: the batch goes on to the end."""
        states = self._stream.hidden[where]
        with self._second_half():
            if not leave:
                return layer_input(self._block, layer, states, call)
            x, out = input_and_output(self._block, layer, states, call)
        self._stream.put(where, out)
        return x

    @contextmanager
    def _second_half(self) -> Iterator[None]:
        """Let the block add nothing to its input before the second half."""

        def nothing(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, None]:
            states = args[0] if args else kwargs["hidden_states"]
            return states.new_zeros(1).expand_as(states), None

        with (
            _instead(self._parts.first_norm, lambda states: states),
            _instead(self._parts.attention, nothing),
        ):
            yield

    def finish(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for where, states, call in self._stream.batches(self._index):
            with self._second_half():
                out = run_block(self._block, states, call)
            yield where, states, out
            self._stream.put(where, out)

    def close(self) -> None:
        self._projected = None


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Let a module compute something else."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
