"""Packed codes come back, and take the memory they should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlight.quantization.packing import pack_codes, packed_width, storage_bits, unpack_codes
from genlight.quantization.uniform import BITS, code_range


@settings(deadline=None, max_examples=80)
@given(bits=st.sampled_from(list(BITS)), rows=st.integers(1, 5), columns=st.integers(1, 37), seed=st.integers(0, 999))
def test_codes_come_back_for_every_width_and_every_row_length(bits: int, rows: int, columns: int, seed: int) -> None:
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, packed_width(columns, bits))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize(("bits", "bytes_of_64"), [(2, 16), (3, 32), (4, 32), (5, 64), (8, 64)])
def test_bytes_of_a_row(bits: int, bytes_of_64: int) -> None:
    packed = pack_codes(torch.zeros(10, 64, dtype=torch.int8), bits)
    assert packed.untyped_storage().nbytes() == 10 * bytes_of_64 == 10 * 64 * storage_bits(bits) // 8


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    codes = torch.tensor([[1, -1, 0, -2]], dtype=torch.int8)
    assert pack_codes(codes, 2).tolist() == [[0b10_00_11_01]]
    assert pack_codes(codes, 4).tolist() == [[0xF1, 0xE0]]
