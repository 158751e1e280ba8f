"""Dense packing of small unsigned integers: codes of 1..8 bits in 32-bit words, no bit wasted.

Along the packed dimension, element i takes bits `i*bits .. i*bits + bits - 1` of a little-endian bit
stream, and the stream is cut into int32 words; a value may straddle two of them. compressed-tensors (>= 0.18
for 3, 5, 6 and 7 bits) and GPTQ use the same stream.

Eight codes of b bits are b bytes, whatever b is. So eight bytes are read as one 64-bit number, and three
shifts close the gaps between its fields, of 1, 2 and 4 bytes (or open them, to unpack): there is no loop over
elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The lower and the upper field of each pair, for fields of 8, 16 and 32 bits; the upper mask of the last is
# left without its sign bit: codes below 8 bits never reach it, and 8 bits need no packing.
_PAIRS = (
    (8, 0x00FF00FF00FF00FF, 0x7F00FF00FF00FF00),
    (16, 0x0000FFFF0000FFFF, 0x7FFF0000FFFF0000),
    (32, 0x00000000FFFFFFFF, 0x7FFFFFFF00000000),
)
_CHUNK = 1 << 22  # codes at a time: the 64-bit temporaries stay in the cache, and memory stays small


def packed_words(count: int, bits: int) -> int:
    """How many int32 words `count` codes of `bits` bits take."""
    _check_bits(bits)
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Pack unsigned codes along `dim`.

    Args:
        codes: uint8 of any shape, values in [0, 2**bits - 1]; larger ones are not checked for here.
    Returns: int32, contiguous, `packed_words(n, bits)` long along `dim`; unused bits of the last word are 0.
    Raises: ValueError for another dtype or bits outside 1..8.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, not {codes.dtype}")
    moved = codes.movedim(dim, -1)
    count = moved.shape[-1]
    rows = moved.reshape(-1, count)
    words = torch.zeros(len(rows), packed_words(count, bits), dtype=torch.int32, device=codes.device)
    stream = words.view(torch.uint8)
    for start, stop in _row_chunks(len(rows), count):
        packed = _close_gaps(_pad(rows[start:stop], 8), bits)
        width = min(packed.shape[-1], stream.shape[-1])
        stream[start:stop, :width] = packed[:, :width]
    return words.view(*moved.shape[:-1], -1).movedim(-1, dim).contiguous()


def unpack(words: Tensor, bits: int, count: int, dim: int = -1) -> Tensor:
    """The `count` codes that `pack` put along `dim`: uint8, contiguous.

    Raises: ValueError if the words are not int32 or not `packed_words(count, bits)` long.
    """
    _check_bits(bits)
    if words.dtype != torch.int32:
        raise ValueError(f"packed words must be int32, not {words.dtype}")
    moved = words.movedim(dim, -1)
    expected = packed_words(count, bits)
    if moved.shape[-1] != expected:
        raise ValueError(f"{count} codes of {bits} bits take {expected} words, not {moved.shape[-1]}")
    stream = moved.reshape(-1, expected).contiguous().view(torch.uint8)
    codes = torch.empty(len(stream), count, dtype=torch.uint8, device=words.device)
    for start, stop in _row_chunks(len(stream), count):
        codes[start:stop] = _open_gaps(stream[start:stop], bits, count)
    return codes.view(*moved.shape[:-1], count).movedim(-1, dim).contiguous()


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")


def _row_chunks(rows: int, count: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK // max(count, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _pad(rows: Tensor, multiple: int) -> Tensor:
    """(rows, n) uint8 with n rounded up to a multiple of `multiple`, contiguous and aligned."""
    excess = -rows.shape[1] % multiple
    return torch.nn.functional.pad(rows, (0, excess)) if excess else rows.contiguous().clone()


def _close_gaps(rows: Tensor, bits: int) -> Tensor:
    """(rows, 8k) codes, one a byte, to (rows, bits * k) bytes of the stream."""
    if bits == 8:
        return rows
    fields = rows.view(torch.int64)
    for width, low, high in _PAIRS:
        gap = (8 - bits) * (width // 8)
        fields = (fields & low).bitwise_or_((fields & high).bitwise_right_shift_(gap))
    return fields.view(torch.uint8).view(len(rows), -1, 8)[..., :bits].reshape(len(rows), -1)


def _open_gaps(stream: Tensor, bits: int, count: int) -> Tensor:
    """(rows, bytes) of the stream to (rows, count) codes, one a byte."""
    if bits == 8:
        return stream[:, :count]
    eights = -(-count // 8)
    used = _fit(stream, eights * bits).view(len(stream), eights, bits)
    fields = torch.nn.functional.pad(used, (0, 8 - bits)).view(torch.int64)
    for width, low, high in reversed(_PAIRS):
        kept = bits * (width // 8)  # bits of the lower field that are in use
        lower = low & ~_above(kept, width)
        gap = width - kept
        fields = (fields & lower).bitwise_or_(fields.bitwise_left_shift(gap).bitwise_and_(high))
    return fields.view(torch.uint8).view(len(stream), -1)[:, :count]


def _above(kept: int, width: int) -> int:
    """A mask of the bits from `kept` up in each lower field of a pair of fields `width` bits wide."""
    field = ((1 << width) - 1) ^ ((1 << kept) - 1)
    return sum(field << start for start in range(0, 64, 2 * width))


def _fit(stream: Tensor, width: int) -> Tensor:
    """The first `width` bytes of each row, zeros where the row ends earlier."""
    missing = width - stream.shape[1]
    return torch.nn.functional.pad(stream, (0, missing)) if missing > 0 else stream[:, :width]
