"""lib.packing: bits in their places, files of the stated size, a layer that computes from them."""

import json
import random
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from conftest import with_adapter
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lib.coa.adapter import CoaLora
from lib.coa.configuration import MODULE_KINDS, Configuration, Switchable, random_configuration
from lib.deploy.packed import load_packed, save_packed
from lib.errors import UserError
from lib.quantize.formats import (
    FORMATS,
    Format,
    GgufFormat,
    pack_bits,
    pack_weight,
    quantize,
    unpack_bits,
    unpack_weight,
)

pytestmark = pytest.mark.usefixtures("float32")


@given(st.integers(1, 8), st.data())
def test_packing_there_and_back(bits: int, data: st.DataObject) -> None:
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=99)),
                         dtype=torch.uint8)
    stream = pack_bits(codes, bits)
    assert stream.numel() == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack_bits(stream, bits, codes.numel()), codes)


def test_bits_stand_where_the_docstring_says() -> None:
    codes = torch.tensor([1, 2, 7, 0, 5], dtype=torch.uint8)
    number = sum(int(code) << (3 * i) for i, code in enumerate(codes))
    assert pack_bits(codes, 3).tolist() == list(number.to_bytes(2, "little"))
    assert pack_bits(torch.tensor([255, 128], dtype=torch.uint8), 8).tolist() == [255, 128]


@pytest.mark.parametrize(("bits", "count"), [(3, 9), (3, 5), (8, 17)])
def test_a_stream_of_another_length(bits: int, count: int) -> None:
    stream = pack_bits(torch.zeros(8, dtype=torch.uint8), bits)
    with pytest.raises(UserError, match="do not hold"):
        unpack_bits(stream, bits, count)


@given(st.sampled_from(FORMATS), st.integers(1, 700), st.integers(0, 9))
def test_any_level_and_size_is_bit_exact(level: Format, count: int, seed: int) -> None:
    weight = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    whole = quantize(weight, level)
    parts = pack_weight(whole)
    back = unpack_weight(parts, level, count)
    for name in ("codes", "scale_codes", "group_scales", "mean"):
        assert torch.equal(getattr(back, name), getattr(whole, name)), name
        assert getattr(back, name).dtype == getattr(whole, name).dtype
    # Four parts, each rounded up to whole bytes.
    stored = sum(t.numel() * t.element_size() for t in parts.values())
    assert level.storage_bits(count) <= 8 * stored < level.storage_bits(count) + 16


def test_a_file_there_and_back(make_tiny: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    base = Switchable(make_tiny(), dtype=torch.float32)
    plan = random_configuration(base.layers, 3.5, random.Random(0))
    file = tmp_path / "packed.safetensors"
    save_packed(base, plan, file)
    stored = sum(t.numel() * t.element_size() for t in load_file(file).values())
    assert plan.bytes <= stored <= plan.bytes + 2 * len(plan.formats)
    other = make_tiny()
    load_packed(other, file)
    base.switch(plan)
    ids = torch.tensor([[1, 5, 900]])
    with torch.inference_mode():
        assert torch.equal(other(input_ids=ids).logits, base.model(input_ids=ids).logits)
    assert list(tmp_path.iterdir()) == [file]


def test_equal_models_make_equal_files(make_tiny: Callable[[], PreTrainedModel],
                                        tmp_path: Path) -> None:
    """Several entries of metadata would stand in another order in half of the files."""
    base = Switchable(make_tiny(), dtype=torch.float32)
    plan = Configuration.uniform(base.layers, Format())
    made = set()
    for number in range(12):
        save_packed(base, plan, file := tmp_path / f"{number}.safetensors")
        made.add(file.read_bytes())
    assert len(made) == 1


def test_bad_files(make_tiny: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    base = Switchable(make_tiny(), dtype=torch.float32)
    plan, file = Configuration.uniform(base.layers, Format()), tmp_path / "packed.safetensors"
    save_packed(base, plan, file)
    tensors = load_file(file)
    about = {name: [*astuple(Format())] for name in base.layers.names}
    name, last = f"{base.layers.names[3]}.codes", base.layers.names[-1]
    short = tensors | {name: tensors[name][:-1].clone()}
    lacking = {k: v for k, v in tensors.items() if k != name}
    scales = tensors | {f"{last}.group_scales": tensors[f"{last}.group_scales"][:2].clone()}
    floats = tensors | {f"{last}.mean": torch.ones(4)}
    few = {name: about[name] for name in base.layers.names[1:]}
    cases = [(tensors, None, "'packed'"), (tensors, few, "some layers are not in it"),
             (scales, about, "divisible by 4"), (floats, about, "another number"),
             (short, about, "do not hold"), (lacking, about, name), (tensors, "{", "damaged"),
             (tensors, about | {last: [5, 8, "fp32", 64, 256]}, "bits is 5"),
             (tensors, about | {"model.layers.9.mlp.up_proj": [4]}, "model.layers.9")]
    for i, (content, metadata, word) in enumerate(cases):
        bad = tmp_path / f"{i}.safetensors"
        save_file(content, bad, metadata and {"packed": (
            metadata if isinstance(metadata, str) else json.dumps(metadata))})
        with pytest.raises(UserError) as caught:
            load_packed(make_tiny(), bad)
        assert word in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "cut").write_bytes(file.read_bytes()[:100])
    for missing in ("cut", "none"):
        with pytest.raises(UserError):
            load_packed(make_tiny(), tmp_path / missing)
    typed = Configuration.uniform(base.layers, GgufFormat("Q4_0"))
    with pytest.raises(UserError, match="packed files hold NormalFloat"):
        save_packed(base, typed, tmp_path / "typed")


def test_an_adapter_goes_on_a_packed_base(make_tiny: Callable[[], PreTrainedModel],
                                          tmp_path: Path) -> None:
    base = Switchable(make_tiny(), dtype=torch.float32)
    plan = random_configuration(base.layers, 3.5, random.Random(0))
    base.switch(plan)
    coa = CoaLora(with_adapter(base.model, target_modules=list(MODULE_KINDS)), base)
    torch.nn.init.normal_(coa.network.network[-1].weight, std=0.3)
    coa.materialise(plan, tmp_path / "adapter")
    save_packed(base, plan, tmp_path / "packed.safetensors")
    small = make_tiny()
    load_packed(small, tmp_path / "packed.safetensors")
    small = PeftModel.from_pretrained(small, str(tmp_path / "adapter"))
    ids = torch.tensor([[1, 5, 900]])
    with torch.inference_mode():
        torch.testing.assert_close(small(input_ids=ids).logits,
                                   coa.model(input_ids=ids).logits, rtol=0, atol=1e-4)
