"""Codes as dense bit streams: 32 codes of `b` bits in `b` words of 32 bits, the first code lowest.

Shapes: m = rows, n = codes of a row, w = words of a row, `ceil(n b / 32)`.
"""

import torch
from jaxtyping import Int8, Int32
from torch import Tensor

WORD = 32
"""Bits of a word."""


def packed(codes: Int8[Tensor, "*batch m n"], bits: int) -> Int32[Tensor, "*batch m w"]:
    """Signed codes, shifted to be unsigned, as a bit stream for each row.

    Examples:
        >>> packed(torch.tensor([[-8, 7, 0]], dtype=torch.int8), 4).tolist()  # 0x8f0
        [[2288]]
    """
    n = codes.shape[-1]
    words = -(-n * bits // WORD)
    unsigned = codes.long() + 2 ** (bits - 1)
    stream = (unsigned[..., None] >> torch.arange(bits, device=codes.device)) & 1
    stream = torch.nn.functional.pad(stream.flatten(-2), (0, words * WORD - n * bits))
    weights = torch.ones((), dtype=torch.int64, device=codes.device) << torch.arange(
        WORD, device=codes.device
    )
    return (stream.unflatten(-1, (words, WORD)) * weights).sum(-1).to(torch.int32)


def unpacked(words: Int32[Tensor, "*batch m w"], bits: int, n: int) -> Int8[Tensor, "*batch m n"]:
    """The first `n` codes of every row of a bit stream.

    Raises:
        ValueError: If the rows are too short or too long for them.

    Examples:
        >>> unpacked(torch.tensor([[2288]], dtype=torch.int32), 4, 3)
        tensor([[-8,  7,  0]], dtype=torch.int8)
    """
    if words.shape[-1] != -(-n * bits // WORD):
        raise ValueError(
            f"unpacked(words, {bits}, {n}): rows of {words.shape[-1]} words do not hold {n} codes "
            f"of {bits} bits.\nThey take {-(-n * bits // WORD)}: damaged, or of another matrix."
        )
    stream = (words[..., None].long() >> torch.arange(WORD, device=words.device)) & 1
    stream = stream.flatten(-2)[..., : n * bits].unflatten(-1, (n, bits))
    powers = torch.ones((), dtype=torch.int64, device=words.device) << torch.arange(
        bits, device=words.device
    )
    return ((stream * powers).sum(-1) - 2 ** (bits - 1)).to(torch.int8)
