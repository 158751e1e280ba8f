"""Packing against the definition of the bit stream and against what compressed-tensors writes."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from quantry.quantizers.packing import pack, packed_words, unpack


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_element_i_takes_bits_i_times_b(bits: int, values: list[int]) -> None:
    codes = [value % 2**bits for value in values]
    stream = sum(code << (index * bits) for index, code in enumerate(codes))
    words = pack(torch.tensor([codes], dtype=torch.uint8), bits)
    read = sum((int(word) & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words[0]))
    assert read == stream
    assert unpack(words, bits, len(codes)).tolist() == [codes]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100, 576])
@pytest.mark.parametrize("dim", [0, 1])
def test_same_words_as_compressed_tensors(bits: int, count: int, dim: int) -> None:
    codes = random_codes(bits, 5, count) if dim else random_codes(bits, count, 5)
    words = pack(codes, bits, dim)
    theirs = pack_to_int32((codes.int() - 2 ** (bits - 1)).to(torch.int8), bits, dim)
    assert torch.equal(words, theirs)
    assert words.shape[dim] == packed_words(count, bits)
    assert torch.equal(unpack(words, bits, count, dim), codes)


def test_large_tensors_are_packed_in_chunks_without_seams() -> None:
    codes = random_codes(3, 3000, 1501)  # more than one chunk, rows that end inside a word
    words = pack(codes, 3)
    assert torch.equal(unpack(words, 3, 1501), codes)
    assert torch.equal(words[2999:], pack(codes[2999:], 3))


def test_views_and_three_dimensions() -> None:
    codes = random_codes(5, 4, 6, 9)
    words = pack(codes, 5, dim=1)
    assert words.shape == (4, packed_words(6, 5), 9)
    assert torch.equal(unpack(words, 5, 6, dim=1), codes)
    assert torch.equal(pack(codes[:, :, 0].t(), 5, dim=0), pack(codes[:, :, 0], 5).t())
    assert torch.equal(codes, random_codes(5, 4, 6, 9))  # packing leaves its input alone


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 8 bits, not 9"):
        pack(random_codes(4, 2, 8), 9)
    with pytest.raises(ValueError, match="must be uint8"):
        pack(torch.zeros(2, 8), 4)
    with pytest.raises(ValueError, match="must be int32"):
        unpack(torch.zeros(2, 1), 4, 8)
    with pytest.raises(ValueError, match="9 codes of 4 bits take 2 words, not 1"):
        unpack(torch.zeros(2, 1, dtype=torch.int32), 4, 9)
