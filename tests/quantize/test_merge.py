"""lib.merge: merged equals unmerged, the three routes, and models saved and reloaded."""

import copy
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from lib.base.model import (
    dequantized_base,
    frozen_weight,
    load_model,
    quantized_config,
)
from lib.errors import UserError
from lib.files import size_mb, writing
from lib.quantize.merging import load_saved, merge, save_model, save_quantized
from lib.train.lora import adapter_factors, load_adapter

pytestmark = pytest.mark.usefixtures("float32")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def adapter(_tiny: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of the size of a trained one, on all seven linears."""
    out = tmp_path_factory.mktemp("adapters") / "adapter"
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(_tiny), LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with writing(out) as part:
        model.save_pretrained(part)
    return out


@pytest.fixture(scope="module")
def merged(adapter: Path, tiny_directory: str, tmp_path_factory: pytest.TempPathFactory,
           float32: None) -> Path:
    """The merged model, saved in float16."""
    out = tmp_path_factory.mktemp("merged") / "merged"
    save_model(merge(adapter, model=tiny_directory), out, tokenizer_of=tiny_directory)
    return out


def logits(model: PreTrainedModel) -> Tensor:
    """Logits of a fixed batch, float32."""
    ids = torch.randint(3, 49152, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def distance(left: Tensor, right: Tensor) -> float:
    """Largest difference of two sets of logits."""
    return (left - right).abs().max().item()


def test_merged_equals_unmerged(adapter: Path, tiny_directory: str) -> None:
    base = load_model(tiny_directory, dtype=torch.float32)
    before = logits(base)
    unmerged = logits(load_adapter(base, adapter))
    model = merge(adapter, model=tiny_directory)
    assert type(model) is LlamaForCausalLM and not model.training
    assert model.dtype == torch.float32
    assert distance(logits(model), unmerged) < TOLERANCE
    assert distance(before, unmerged) > 100 * TOLERANCE


def test_merge_is_w_plus_delta(adapter: Path, tiny_directory: str) -> None:
    base = load_model(tiny_directory, dtype=torch.float32)
    model = merge(adapter, model=tiny_directory)
    factors = adapter_factors(adapter)
    assert len(factors) == 14
    for name, (a, b, scale) in factors.items():
        expected = base.get_submodule(name).weight + scale * b @ a
        torch.testing.assert_close(model.get_submodule(name).weight, expected,
                                   rtol=1e-5, atol=1e-6)


def test_the_three_routes(adapter: Path, tiny_directory: str) -> None:
    """A QLoRA adapter meets the base it was trained on in one route only."""
    trained_on = logits(load_adapter(
        load_model(tiny_directory, quantization_config=quantized_config()), adapter))
    models = {route: merge(adapter, route=route, model=tiny_directory)
              for route in ("original", "dequantized", "through_4bit")}
    gaps = {route: distance(logits(m), trained_on) for route, m in models.items()}
    assert gaps["dequantized"] < 1e-3
    assert gaps["original"] > 20 * gaps["dequantized"]
    assert gaps["through_4bit"] > 20 * gaps["dequantized"]
    kinds = {route: {type(m).__name__ for n, m in model.named_modules() if "proj" in n}
             for route, model in models.items()}
    assert kinds == {"original": {"Linear"}, "dequantized": {"Linear"},
                     "through_4bit": {"Linear4bit"}}
    assert not any(m.training for m in models.values())


def test_through_4bit_rounds_the_sum(adapter: Path, tiny_directory: str) -> None:
    """Its weights are the dequantised route's, rounded to NF4 once more."""
    round_trip = merge(adapter, route="through_4bit", model=tiny_directory)
    exact = merge(adapter, route="dequantized", model=tiny_directory)
    checked = 0
    for name, module in round_trip.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            theirs = exact.get_submodule(name).weight.data
            packed, state = bnb.functional.quantize_4bit(
                theirs, blocksize=64, quant_type="nf4", compress_statistics=True)
            expected = bnb.functional.dequantize_4bit(packed, state).float()
            ours = frozen_weight(module, torch.float32)
            assert distance(ours, theirs) > 0.01 * theirs.abs().max()
            # Values next to a border between two codes may fall on either side.
            assert (ours - expected).abs().gt(1e-3).float().mean() < 0.01
            checked += 1
    assert checked == 14


def test_dequantized_base_is_the_nf4_model(tiny_directory: str) -> None:
    quantized = load_model(tiny_directory, quantization_config=quantized_config())
    base = dequantized_base(tiny_directory)
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    assert distance(logits(base), logits(quantized)) < 1e-3
    assert distance(logits(base), logits(load_model(tiny_directory))) > 1e-2


def test_float16_model_reloads_identical(merged: Path, adapter: Path,
                                         tiny_directory: str) -> None:
    stored = load_file(merged / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    expected = merge(adapter, model=tiny_directory)
    for parameter in expected.parameters():
        parameter.data = parameter.data.half().float()
    assert torch.equal(logits(load_saved(merged, dtype=torch.float32)), logits(expected))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[PreTrainedModel]:
    """The models that lib.merge loads, as they are in memory."""
    kept: list[PreTrainedModel] = []

    def load(*arguments: Any, **options: Any) -> PreTrainedModel:
        kept.append(load_model(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr("lib.quantize.merging.load_model", load)
    return kept


def saved_and_reloaded(merged: Path, out: Path, bits: int, loaded: list[PreTrainedModel]
                       ) -> PreTrainedModel:
    """The model from the file that `save_quantized` wrote; its logits are those before."""
    save_quantized(merged, out, bits)
    in_memory = loaded[-1]
    again = load_saved(out, dtype=in_memory.dtype)
    assert again is not in_memory
    assert torch.equal(logits(again), logits(in_memory))
    return again


def test_int8_reloads_identical(merged: Path, tmp_path: Path,
                                loaded: list[PreTrainedModel]) -> None:
    again = saved_and_reloaded(merged, tmp_path / "int8", 8, loaded)
    kinds = {type(m).__name__ for n, m in again.named_modules() if "proj" in n}
    assert kinds == {"Linear8bitLt"}
    assert {m.state.threshold for m in again.modules()
            if isinstance(m, bnb.nn.Linear8bitLt)} == {6.0}
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    linears = [t for n, t in stored.items() if n.endswith("proj.weight")]
    assert len(linears) == 14 and {t.dtype for t in linears} == {torch.int8}


def test_nf4_reloads_identical(merged: Path, tmp_path: Path,
                               loaded: list[PreTrainedModel]) -> None:
    again = saved_and_reloaded(merged, tmp_path / "nf4", 4, loaded)
    layers = [m for m in again.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and all(m.weight.quant_state.nested for m in layers)


def test_int8_and_nf4_are_near_and_smaller(merged: Path, tmp_path: Path) -> None:
    save_quantized(merged, tmp_path / "int8", 8)
    save_quantized(merged, tmp_path / "nf4", 4)
    exact = logits(load_saved(merged, dtype=torch.float32))
    scale = exact.abs().max().item()
    gaps = [distance(logits(load_saved(tmp_path / name)), exact) / scale
            for name in ("int8", "nf4")]
    assert 0 < gaps[0] < 0.12 < gaps[1] < 0.8, gaps
    sizes = [size_mb(d) for d in (merged, tmp_path / "int8", tmp_path / "nf4")]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(("options", "message"), [
    ({"lora_bias": True}, "peft cannot merge .*no bias"),
    # peft would merge it into the head as well.
    ({"target_modules": ["q_proj", "embed_tokens"]}, "it would change both")])
def test_what_cannot_be_merged_is_one_line(tiny_directory: str, tmp_path: Path,
                                           options: dict[str, Any], message: str) -> None:
    model = get_peft_model(load_model(tiny_directory), LoraConfig(
        **{"target_modules": ["q_proj"]} | options))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        merge(tmp_path, model=tiny_directory)


def test_load_saved_refuses_a_damaged_model(merged: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(merged, copied)
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="model.safetensors is missing or damaged"):
        load_saved(copied)
    with pytest.raises(UserError, match="is not an artifact"):
        load_saved(tmp_path / "none")
