"""lib.quantize.formats: the NormalFloat codebook, blocks, and what they cost."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lib.errors import UserError
from lib.quantize.formats import (
    DTYPES,
    FORMATS,
    Format,
    _codes,
    dequantize,
    dequantize_blocks,
    normal_float,
    quantize,
    quantize_blocks,
    round_trip,
)

# Table of QLoRA's NF4 (Dettmers et al. 2023, appendix E).
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
       -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
       0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)

values = st.floats(-1e6, 1e6, width=32)
weights = st.lists(values, min_size=1, max_size=200).map(torch.tensor)
widths = st.integers(2, 8)
sizes = st.integers(1, 70)


def there_and_back(weight: Tensor, bits: int, block: int) -> Tensor:
    """Quantised and back, as float32 of shape (n,)."""
    book = normal_float(bits)
    codes, absmax = quantize_blocks(weight, book, block)
    return dequantize_blocks(codes, absmax, book, block)


def scale_of_each(weight: Tensor, block: int) -> Tensor:
    """Absmax of the block that each weight is in, computed one block at a time."""
    return torch.cat([b.abs().max().expand(len(b)) for b in weight.reshape(-1).split(block)])


def test_nf4_equals_both_tables() -> None:
    book = normal_float(4)
    assert book.dtype == torch.float32
    torch.testing.assert_close(book, torch.tensor(NF4), rtol=0, atol=1e-6)
    theirs = bnb.get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(book, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codebook_has_its_properties(bits: int) -> None:
    book = normal_float(bits)
    assert len(book) == 2**bits
    assert (book.diff() > 0).all()
    assert book[0] == -1 and book[-1] == 1
    assert (book == 0).sum() == 1
    assert (book > 0).sum() == 2 ** (bits - 1)


@pytest.mark.parametrize("shape", [(64, 64), (48, 128), (1, 64), (3, 50)])
def test_equals_bitsandbytes(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.3
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    theirs = bnb.dequantize_4bit(packed, state)
    codes, absmax = quantize_blocks(weight, normal_float(4), 64)
    ours = dequantize_blocks(codes, absmax, normal_float(4), 64)
    torch.testing.assert_close(ours.view(shape), theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(absmax, state.absmax.float(), rtol=0, atol=0)
    # Two codes to a byte, the first in the high half.
    both = packed.flatten().repeat_interleave(2)
    both[0::2] >>= 4
    assert torch.equal(codes, (both & 15)[: codes.numel()])


@given(weights, widths, sizes)
@example(torch.tensor([1e-40, 5e-41]), 4, 2)
def test_error_stays_under_its_bound(weight: Tensor, bits: int, block: int) -> None:
    half_gap = normal_float(bits).diff().max() / 2
    error = (there_and_back(weight, bits, block) - weight).abs()
    # The slack is float32 rounding; 3e-45 is two of its smallest numbers.
    bound = half_gap * scale_of_each(weight, block) * (1 + 1e-5) + 3e-45
    assert (error <= bound).all()


@given(widths, st.floats(2.0**-60, 2.0**60, width=32), st.randoms(use_true_random=False))
def test_codebook_values_round_trip_exactly(bits: int, scale: float, random: object) -> None:
    book = normal_float(bits)
    order = list(range(len(book)))
    random.shuffle(order)  # type: ignore[attr-defined]
    weight = book[order] * scale
    codes, absmax = quantize_blocks(weight, book, len(book))
    assert codes.tolist() == order
    assert torch.equal(dequantize_blocks(codes, absmax, book, len(book)), weight)


@given(weights, widths, sizes)
def test_shapes_and_a_short_last_block(weight: Tensor, bits: int, block: int) -> None:
    book = normal_float(bits)
    codes, absmax = quantize_blocks(weight, book, block)
    assert codes.shape == (weight.numel(),) and codes.dtype == torch.uint8
    assert absmax.shape == (-(-weight.numel() // block),) and absmax.dtype == torch.float32
    expected = torch.stack([b.abs().max() for b in weight.split(block)])
    assert torch.equal(absmax, expected)
    assert dequantize_blocks(codes, absmax, book, block).shape == weight.shape


@given(weights, widths, sizes)
def test_quantising_twice_changes_nothing(weight: Tensor, bits: int, block: int) -> None:
    once = there_and_back(weight, bits, block)
    assert torch.equal(there_and_back(once, bits, block), once)


@given(st.one_of(widths.map(normal_float), st.lists(st.floats(-1, 1, width=32), min_size=2).map(
    lambda levels: torch.tensor(sorted(levels)))), st.sampled_from([
        torch.float32, torch.float64, torch.float16, torch.bfloat16]), st.integers(0, 99))
def test_a_code_is_the_nearest_level(book: Tensor, dtype: torch.dtype, seed: int) -> None:
    """Of two the lower one: also on the midpoints, beside them, outside, and for no number."""
    levels = book.to(dtype)
    middles = (levels[1:] + levels[:-1]) / 2
    near = [torch.nextafter(middles.float(), torch.tensor(to)) for to in (-9.0, 9.0)]
    noise = torch.randn(999, generator=torch.Generator().manual_seed(seed)) / 2
    row = torch.cat([middles.float(), *near, noise, torch.tensor([3e38, -3e38, torch.inf, 0.0])])
    for scales in ([1.0, 0.3, 0.0, -1.0, 1e-40], [1.0, torch.nan]):
        rows, scale = row.expand(len(scales), -1).clone(), torch.tensor(scales)
        expected = rows / torch.where(scale != 0, scale, 1.0)[:, None]
        assert torch.equal(_codes(rows, scale, levels),
                           torch.bucketize(expected, middles).byte().flatten())


def test_many_blocks_are_coded_in_parts() -> None:
    weight = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))
    whole = torch.cat([quantize_blocks(part, normal_float(4), 16)[0] for part in weight.split(999)])
    assert torch.equal(quantize_blocks(weight, normal_float(4), 16)[0], whole)


def test_what_is_refused() -> None:
    for bits in (1, 9):
        with pytest.raises(UserError, match="2 to 8"):
            normal_float(bits)
    with pytest.raises(UserError, match="positive"):
        quantize_blocks(torch.ones(4), normal_float(4), 0)
    with pytest.raises(UserError, match="GGUF type 'Q9': use F32, "):
        round_trip(torch.ones(1, 32), "Q9")


def test_bits_per_parameter_is_what_bitsandbytes_stores() -> None:
    """Bytes of a double-quantised 1024 x 1024 matrix, counted in its tensors."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    stored = [packed, state.absmax, state.state2.absmax]
    bits = 8 * sum(t.numel() * t.element_size() for t in stored) / weight.numel()
    assert bits == pytest.approx(Format(4, 8, "fp32", 64, 256).bits_per_parameter, rel=1e-6)


levels = st.sampled_from(FORMATS)


def test_a_block_of_scale_zero() -> None:
    weight = torch.randn(197, generator=torch.Generator().manual_seed(0))
    weight[64:128] = 0
    codes, absmax = quantize_blocks(weight, normal_float(4), 64)
    values = dequantize_blocks(codes, absmax, normal_float(4), 64)
    assert absmax[1] == 0 and not values[64:128].any()


modest = st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=200).map(torch.tensor)


@given(modest, levels)
def test_any_level_on_any_weight(weight: Tensor, level: Format) -> None:
    packed = quantize(weight, level)
    blocks = -(-weight.numel() // level.block)
    assert packed.codes.shape == (weight.numel(),) and packed.scale_codes.shape == (blocks,)
    assert packed.group_scales.shape == (-(-blocks // level.group),)
    assert packed.group_scales.dtype == DTYPES[level.scale_dtype]
    assert int(packed.codes.max()) < 2**level.bits
    assert int(packed.scale_codes.max()) < 2**level.scale_bits
    back = dequantize(packed)
    assert back.shape == weight.shape and back.isfinite().all()
    assert torch.equal(round_trip(weight, level), back)


@pytest.mark.parametrize("scale_bits", [2, 8])
@pytest.mark.parametrize("block", [16, 64])
def test_error_falls_as_bits_rise(scale_bits: int, block: int) -> None:
    weight = torch.randn(20_000, generator=torch.Generator().manual_seed(4))
    errors = [float((round_trip(weight, Format(bits, scale_bits, "fp16", block, 64))
                     - weight).square().mean()) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("gguf_type", "bits"), [("Q4_0", 4), ("Q8_0", 8)])
def test_types_of_gguf_err_as_their_bits_say(gguf_type: str, bits: int) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(7))
    back = round_trip(weight, gguf_type)
    assert back.shape == weight.shape
    errors = [(x - weight).square().mean()
              for x in (back, round_trip(weight, Format(bits, 8, "fp32", 32, 16)))]
    assert 0.5 < errors[0] / errors[1] < 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number(bad: float) -> None:
    weight = torch.ones(100)
    weight[77] = bad
    with pytest.raises(UserError, match="finite"):
        quantize(weight, Format())


def test_scales_beyond_the_dtype() -> None:
    weight = torch.zeros(160)
    weight[150] = 1e6
    with pytest.raises(UserError, match="too large for fp16"):
        quantize(weight, Format(4, 8, "fp16", 16, 16))
    assert quantize(weight, Format(4, 8, "bf16", 16, 16)).scales.isfinite().all()
