"""MXFP4: weights as 4-bit numbers that share a scale of 2^e in blocks of 32 along the input.

Owns the numbers and the layout of gpt-oss checkpoints. Must not know files or models.

    python -c "import torch; from lib.export.mxfp4 import quantize; print(quantize(torch.randn(1, 64, 8)).scales)"

The format is OCP's Microscaling specification 1.0 (2023): a value is E2M1 (sign, 0, 0.5, 1, 1.5, 2, 3, 4, 6) times
2^(scale - 127). A stack of E experts with weights (E, in, out), as transformers keeps them, is stored as `blocks` uint8
(E, out, in / 32, 16), two values a byte with the earlier one in the low half, and `scales` uint8 (E, out, in / 32).

The scale is the smallest power of two with which no value of the block overflows 6, as OpenAI's kernels round it. So:
- what was MXFP4 before comes back exactly, whatever scale the block had: the values of a block whose largest is less
  than 4 are multiples of half the old step and fit a smaller scale;
- a value moves by half of the widest step at most, and that is the scale itself (from 4 to 6 is a step of 2 scales).
The specification's own example takes a scale that clips values over 6 instead, for up to 2 scales of error.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from lib.export.errors import ExportError

if TYPE_CHECKING:
    import torch

BLOCK = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""By code: the sign in the highest of four bits, then two of exponent and one of mantissa."""

_BIAS = 127
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Between neighbouring values without a sign."""


class Packed(NamedTuple):
    """A stack of weights in MXFP4."""

    blocks: torch.Tensor
    """uint8 (E, out, in / 32, 16)."""
    scales: torch.Tensor
    """uint8 (E, out, in / 32)."""


class Deviation(NamedTuple):
    """How far packed weights are from what was packed."""

    worst: float
    """The largest error of a value in units of its block's scale: 1 is the format's bound."""
    squared: float
    """Sum of squared errors."""
    power: float
    """Sum of squared weights."""

    def __add__(self, other: tuple[object, ...]) -> Deviation:
        assert isinstance(other, Deviation)
        return Deviation(max(self.worst, other.worst), self.squared + other.squared, self.power + other.power)

    @property
    def relative(self) -> float:
        """Root of the mean squared error over that of the weights."""
        return math.sqrt(self.squared / self.power) if self.power else 0.0


def packed_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `blocks` and `scales` for weights (E, in, out). Raises ExportError where blocks do not fit."""
    experts, wide, out = shape
    if wide % BLOCK:
        raise ExportError(f"weights of shape {shape} cannot be packed: {wide} inputs are no multiple of {BLOCK}")
    return (experts, out, wide // BLOCK, BLOCK // 2), (experts, out, wide // BLOCK)


def quantize(weights: torch.Tensor) -> Packed:
    """Weights (E, in, out) as blocks and scales. Raises ExportError for what is no number or does not fit."""
    import torch

    blocks, scales = packed_shapes(tuple(weights.shape))
    grouped = weights.transpose(1, 2).contiguous().view(*scales, BLOCK).float()
    largest = grouped.abs().amax(-1)
    if not torch.isfinite(largest).all():
        raise ExportError(
            "weights are infinite or not numbers, and cannot be packed: the training that made them broke; export an "
            "earlier checkpoint"
        )
    # largest = m * 2^x with 0.5 <= m < 1, and largest <= 6 * 2^e where m * 2^x <= 0.75 * 2^(e + 3).
    mantissa, exponent = torch.frexp(largest)
    smallest = exponent.int() - 3 + (mantissa > 0.75).int()
    codes = torch.where(largest > 0, smallest + _BIAS, _BIAS).clamp_(min=0)
    # Exact: a power of two between 2^-126 and 2^127.
    grouped = grouped * torch.exp2((_BIAS - codes).float()).unsqueeze(-1)
    nibbles = torch.bucketize(grouped.abs(), _limits(), out_int32=True).to(torch.uint8)
    nibbles += torch.signbit(grouped).to(torch.uint8) * 8
    return Packed((nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).reshape(blocks), codes.to(torch.uint8))


def _limits() -> torch.Tensor:
    """The largest number that is rounded to each code: a tie goes to the even one, as IEEE 754 has it."""
    import torch

    middles = torch.tensor(_MIDDLES)
    below = torch.nextafter(middles, torch.zeros(()))
    return torch.where(torch.arange(len(middles)) % 2 == 0, middles, below)


def dequantize(packed: Packed, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Weights (E, in, out) of type `dtype` (None = bfloat16), the values that transformers makes of them."""
    import torch

    return _grouped(packed).to(dtype or torch.bfloat16).flatten(2).transpose(1, 2).contiguous()


def _grouped(packed: Packed) -> torch.Tensor:
    """float32 (E, out, in / 32, 32)."""
    import torch

    blocks, scales = packed
    values = torch.tensor(VALUES)
    grouped = torch.empty((*scales.shape, BLOCK))
    grouped[..., 0::2] = values[(blocks & 15).int()]
    grouped[..., 1::2] = values[(blocks >> 4).int()]
    return torch.ldexp(grouped, (scales.int() - _BIAS).unsqueeze(-1), out=grouped)


def deviation(weights: torch.Tensor, packed: Packed) -> Deviation:
    """How far the packed weights are from these, (E, in, out)."""
    import torch

    exact = weights.transpose(1, 2).contiguous().view(*packed.scales.shape, BLOCK).float()
    error = _grouped(packed).sub_(exact).abs_()
    worst = (error.amax(-1).double() / torch.exp2(packed.scales.double() - _BIAS)).max()
    squared, power = (float(one.square().sum(dtype=torch.float64)) for one in (error, exact))
    return Deviation(float(worst), squared, power)
