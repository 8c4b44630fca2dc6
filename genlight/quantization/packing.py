"""Codes in memory: four to a byte up to two bits, two to a byte up to four bits, one to a byte above.

Rows are packed one by one, and a row that does not fill its last byte is padded with zeros, which `unpack_codes` drops.
The lowest bits of a byte hold the first of its codes.
"""

import torch
from torch import Tensor


def storage_bits(bits: int) -> int:
    """Bits of memory that a code of `bits` bits takes: 2, 4 or 8."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a row of `columns` codes."""
    return -(-columns * storage_bits(bits) // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 [rows, columns] of `bits` bits as bytes [rows, packed_width]: uint8, or the int8 codes themselves."""
    width = storage_bits(bits)
    if width == 8:
        return codes.contiguous()
    per_byte = 8 // width
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte))
    # two's complement: the low bits of an int8 code are the code in `width` bits
    fields = (padded.view(torch.uint8) & (2**width - 1)).reshape(len(codes), -1, per_byte)
    packed: Tensor = fields[..., 0].clone()
    for position in range(1, per_byte):
        packed |= fields[..., position] << (position * width)
    return packed


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes int8 [rows, columns] that `pack_codes` packed."""
    width = storage_bits(bits)
    if width == 8:
        return packed
    signed = packed.view(torch.int8)
    # shifted up to the sign bit and, arithmetically, down again
    fields = [(signed << (8 - (position + 1) * width)) >> (8 - width) for position in range(8 // width)]
    return torch.stack(fields, dim=-1).flatten(1)[:, :columns]
