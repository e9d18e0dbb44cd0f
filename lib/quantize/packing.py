"""Codes and scales in exactly their bits, and a linear layer that computes from them."""

import torch
from torch import Tensor, nn

from lib.errors import require
from lib.quantize.formats import DTYPES, Format, Quantized, dequantize

PARTS = ("codes", "scale_codes", "group_scales", "mean")


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) uint8 below 2^bits as a stream of ceil(n * bits / 8) bytes.

    Code i takes the bits from i * bits on, lowest first: eight codes fill `bits` bytes.
    """
    require(1 <= bits <= 8, f"{bits} bits: use 1 to 8")
    groups = nn.functional.pad(codes, (0, -codes.numel() % 8)).view(-1, 8).long()
    words = (groups << (bits * torch.arange(8))).sum(1)
    stream = words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)
    return stream[: -(-codes.numel() * bits // 8)].clone()


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes, uint8, of a stream from `pack_bits`; UserError if its length differs."""
    require(stream.numel() == -(-count * bits // 8),
            f"{stream.numel()} bytes do not hold {count} codes of {bits} bits: make them again")
    groups = nn.functional.pad(stream, (0, -stream.numel() % bits)).view(-1, bits)
    words = nn.functional.pad(groups, (0, 8 - bits)).contiguous().view(torch.int64)
    codes = (words >> (bits * torch.arange(8))) & (2**bits - 1)
    return codes.to(torch.uint8).view(-1)[:count]


def pack_weight(weight: Quantized) -> dict[str, Tensor]:
    """A layer as four rows of bytes, so that no change of a model's dtype rounds its scales."""
    return {"codes": pack_bits(weight.codes, weight.format.bits),
            "scale_codes": pack_bits(weight.scale_codes, weight.format.scale_bits),
            "group_scales": weight.group_scales.view(torch.uint8),
            "mean": weight.mean.view(1).view(torch.uint8)}


def unpack_weight(parts: dict[str, Tensor], fmt: Format, count: int) -> Quantized:
    """The `count` weights that `pack_weight` packed; UserError for a part of another length."""
    (blocks, groups), dtype = fmt.scales(count), DTYPES[fmt.scale_dtype]
    for name, size in (("group_scales", groups * dtype.itemsize), ("mean", 4)):
        require(parts[name].nbytes == size,
                f"{name} has {parts[name].nbytes} bytes instead of {size}: make the file again")
    return Quantized(fmt, unpack_bits(parts["codes"], fmt.bits, count),
                     unpack_bits(parts["scale_codes"], fmt.scale_bits, blocks),
                     parts["group_scales"].view(dtype), parts["mean"].view(torch.float32)[0])


class PackedLinear(nn.Linear):
    """A linear layer that holds b + b0/B0 + ... bits a weight, and unpacks it in each call.

    Decoding is slow for one row and costs little beside many. peft takes it for a linear layer.
    """

    def __init__(self, parts: dict[str, Tensor], fmt: Format, plain: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight
        for name in PARTS:
            self.register_buffer(name, parts[name])
        self.format, self.bias = fmt, plain.bias
        self.out_features, self.in_features = plain.out_features, plain.in_features

    @property
    def weight(self) -> Tensor:
        """The decoded weight (d_out, d_in), float32."""
        parts, shape = dict(self.named_buffers()), (self.out_features, self.in_features)
        return dequantize(unpack_weight(parts, self.format, shape[0] * shape[1])).view(shape)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out), in x's dtype."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
