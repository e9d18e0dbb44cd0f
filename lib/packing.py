"""Codes and scales in exactly their bits, and a linear layer that computes from them."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lib.configuration import Configuration, Layers, Level
from lib.errors import UserError, require
from lib.quantize import DTYPES, GRIDS, Quantized, dequantize, quantize
from lib.scratch import replacing
from lib.switchable import Switchable

PARTS = ("codes", "scale_codes", "group_scales", "mean")
# The key under which a file says its grid and configuration.
ABOUT = "packed"


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) uint8 below 2^bits as a stream of ceil(n * bits / 8) bytes.

    Code i takes the bits from i * bits on, lowest first. Eight codes make one
    whole number of 8 * bits bits, whose lowest bytes are kept.
    """
    require(1 <= bits <= 8, f"{bits} bits: use 1 to 8")
    groups = nn.functional.pad(codes, (0, -codes.numel() % 8)).view(-1, 8).long()
    words = (groups << (bits * torch.arange(8))).sum(1)
    stream = words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)
    return stream[: -(-codes.numel() * bits // 8)].clone()


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """The codes (count,) uint8 that `pack_bits` was given.

    Raises:
        UserError: a stream of another length.
    """
    require(stream.numel() == -(-count * bits // 8),
            f"{stream.numel()} bytes do not hold {count} codes of {bits} bits: make them again")
    groups = nn.functional.pad(stream, (0, -stream.numel() % bits)).view(-1, bits)
    words = nn.functional.pad(groups, (0, 8 - bits)).contiguous().view(torch.int64)
    codes = (words >> (bits * torch.arange(8))) & (2**bits - 1)
    return codes.to(torch.uint8).view(-1)[:count]


def packed(weight: Quantized) -> dict[str, Tensor]:
    """The tensors of a layer's file: codes of weights and scales packed."""
    level = weight.level
    # Scales as bytes, too: a model that changes its dtype must not round them.
    return {"codes": pack_bits(weight.codes, level.bits),
            "scale_codes": pack_bits(weight.scale_codes, level.scale_bits),
            "group_scales": weight.group_scales.view(torch.uint8),
            "mean": weight.mean.view(1).view(torch.uint8)}


def unpacked(parts: dict[str, Tensor], level: Level, count: int, grid: str = "nf") -> Quantized:
    """What `packed` was given, bit for bit; `count` weights.

    Raises:
        UserError: a part of another length.
    """
    blocks, groups = level.scales(count)
    dtype = DTYPES[level.scale_dtype]
    require(all(part.dtype == torch.uint8 and part.dim() == 1 for part in parts.values()),
            "packed codes and scales are rows of bytes: make the file again")
    sizes = {"group_scales": groups * dtype.itemsize, "mean": 4}
    for name, size in sizes.items():
        require(parts[name].numel() == size, f"{name} has {parts[name].numel()} bytes instead of "
                f"{size}: make the file again")
    return Quantized(level, grid, unpack_bits(parts["codes"], level.bits, count),
                     unpack_bits(parts["scale_codes"], level.scale_bits, blocks),
                     parts["group_scales"].view(dtype), parts["mean"].view(torch.float32)[0])


class PackedLinear(nn.Linear):
    """A linear layer whose weight is unpacked for the time of each call.

    Holds b + b0/B0 + ... bits a weight. Each call decodes the whole weight,
    so it is slow for one row and costs little beside many. To peft it is a
    linear layer like any other.
    """

    def __init__(self, parts: dict[str, Tensor], level: Level, shape: torch.Size, *,
                 grid: str = "nf", bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the weight
        for name in PARTS:
            self.register_buffer(name, parts[name])
        self.level, self.grid, self.shape = level, grid, shape
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The decoded weight (d_out, d_in), float32."""
        parts = {name: getattr(self, name) for name in PARTS}
        whole = unpacked(parts, self.level, self.shape.numel(), self.grid)
        return dequantize(whole).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out), in x's dtype."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def save_packed(base: Switchable, configuration: Configuration, out: Path) -> None:
    """Write the blocks' linears at a configuration into one safetensors file."""
    base.layers.require_same(configuration.layers)
    tensors = {}
    for index, (name, level) in enumerate(zip(base.layers.names, configuration.levels,
                                              strict=True)):
        parts = packed(quantize(base.weight(index), level, base.grid))
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    with replacing(out) as part:
        # One entry: safetensors writes several in any order, so equal files would differ.
        save_file(tensors, part, {ABOUT: json.dumps(
            {"grid": base.grid, "configuration": configuration.to_json()})})


def load_packed(model: PreTrainedModel, file: Path) -> Configuration:
    """Put a packed file's layers into a model of the same shape, in place.

    Raises:
        UserError: no such file, no packed file, another model's layers.
    """
    layers, made = Layers.of(model), {}
    require(file.is_file(), f"{file} does not exist: check the path")
    try:
        with safe_open(file, "pt") as reader:
            about = json.loads((reader.metadata() or {}).get(ABOUT, "{}"))
            require(about.get("grid") in GRIDS and "configuration" in about,
                    f"{file} is no packed model: make it with save_packed")
            plan = Configuration.from_json(about["configuration"], layers)
            for name, level in zip(layers.names, plan.levels, strict=True):
                old = model.get_submodule(name)
                parts = {part: reader.get_tensor(f"{name}.{part}") for part in PARTS}
                unpacked(parts, level, old.weight.numel())  # a wrong length shows now
                made[name] = PackedLinear(
                    parts, level, old.weight.shape, grid=about["grid"],
                    bias=None if old.bias is None else old.bias.data)
    except UserError:
        raise
    except Exception as error:  # of safetensors, of JSON, of torch for a dtype
        raise UserError(f"{file} is damaged ({error}): make it again") from error
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return plan


def unpack(model: PreTrainedModel) -> None:
    """Decode the packed layers of a model once, in place: plain linear layers."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, PackedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(layer.weight.to(model.dtype), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
