"""lib.lora: the update, its counts and singular values, and adapters from disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import saved_adapter, with_adapter
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lib.artifacts import writing
from lib.base_model import tiny_model
from lib.errors import UserError
from lib.lora import (
    adapter_factors,
    count_adapter,
    count_trainable,
    delta_weight,
    linear_shapes,
    load_adapter,
    lora_config,
    singular_values,
)
from lib.profiles import TARGETS, TrainSettings


@pytest.fixture
def adapter(tiny: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A saved adapter that fits `tiny`."""
    return saved_adapter(tiny, tmp_path / "adapter")


@pytest.mark.parametrize("rslora", [False, True])
def test_delta_weight_equals_peft(tiny: LlamaForCausalLM, rslora: bool) -> None:
    model = with_adapter(tiny, use_rslora=rslora)
    checked = 0
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            ours = delta_weight(a, b, alpha=12, rslora=rslora)
            theirs = module.get_delta_weight("default")
            assert theirs.abs().max() > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
            checked += 1
    assert checked == 4


def test_delta_weight_by_hand() -> None:
    a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    expected = torch.tensor([[1.0, 2.0], [3.0, 7.0]])
    assert torch.equal(delta_weight(a, b, alpha=6), 3 * expected)
    torch.testing.assert_close(delta_weight(a, b, alpha=6, rslora=True),
                               6 / 2**0.5 * expected)


def test_delta_weight_refuses_unequal_ranks() -> None:
    with pytest.raises(UserError, match="rank 2.*rank 3"):
        delta_weight(torch.ones(2, 5), torch.ones(5, 3), alpha=1)


def test_zero_b_changes_no_logit(tiny: LlamaForCausalLM) -> None:
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        before = tiny(input_ids=ids).logits
        config = lora_config(tiny, TrainSettings(rank=4))
        assert torch.equal(get_peft_model(tiny, config)(input_ids=ids).logits, before)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("targets", TARGETS)
def test_count_equals_peft(tiny: LlamaForCausalLM, targets: str, rank: int) -> None:
    settings = TrainSettings(targets=targets, rank=rank)
    formula = count_adapter(tiny.config, rank=rank, modules=settings.modules)
    model = get_peft_model(tiny, lora_config(tiny, settings))
    trainable, total = model.get_nb_trainable_parameters()
    assert formula == trainable
    assert count_trainable(model) == (trainable, total)


@pytest.mark.parametrize(("targets", "millions"), [
    ("minimal", 8.389), ("standard", 16.777), ("aggressive", 39.977)])
def test_count_for_llama_2_7b(targets: str, millions: float) -> None:
    """The published counts at rank 16, on a model without memory."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32, vocab_size=32000))
        settings = TrainSettings(targets=targets, rank=16)
        formula = count_adapter(model.config, rank=16, modules=settings.modules)
        trainable, _ = count_trainable(get_peft_model(model, lora_config(model, settings)))
    assert formula == trainable
    assert formula / 1e6 == pytest.approx(millions, abs=1e-3)


def test_linear_shapes_are_the_models(tiny: LlamaForCausalLM) -> None:
    block = tiny.model.layers[0]
    found = {name.split(".")[-1]: tuple(m.weight.shape) for name, m in block.named_modules()
             if isinstance(m, torch.nn.Linear)}
    assert linear_shapes(tiny.config) == found
    wide = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=24)
    assert linear_shapes(wide)["q_proj"] == (48, 32)
    assert linear_shapes(wide)["k_proj"] == (24, 32)
    assert linear_shapes(wide)["o_proj"] == (32, 48)


@pytest.mark.parametrize(("settings", "message"), [
    ({"rank": 65}, "rank 65 is above the width 64 of q_proj"),
    # k_proj has two heads of 16: 32 wide
    ({"rank": 33, "targets": "k_proj"}, "rank 33 is above the width 32 of k_proj"),
    ({"targets": "q_proj,nonsense"}, "'nonsense' does not exist"),
    ({"targets": ""}, "'' does not exist"),
    ({"targets": "lm_head"}, "'lm_head' does not exist"),
    ({"targets": "q_proj,lm_head"}, "'lm_head' does not exist"),
    ({"targets": "embed_tokens"}, "'embed_tokens' does not exist"),
    ({"targets": "model.layers.0.self_attn.q_proj"}, "does not exist"),
])
def test_lora_config_refuses(tiny: LlamaForCausalLM, settings: dict[str, Any],
                             message: str) -> None:
    settings = {"rank": 4, "targets": "minimal"} | settings
    with pytest.raises(UserError, match=message) as caught:
        lora_config(tiny, TrainSettings(**settings))
    if "exist" in message:  # the remedy: what it could have been
        known = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        remedy = str(caught.value).split(": use ")[1]
        assert sorted(known) == sorted(remedy.split(", "))


@pytest.mark.parametrize("rank", [0, -3])
def test_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(UserError, match=f"rank {rank}: use a positive"):
        TrainSettings(rank=rank)


def test_lora_config_takes_the_settings(tiny: LlamaForCausalLM) -> None:
    config = lora_config(tiny, TrainSettings(
        rank=32, alpha=7, targets="k_proj,v_proj", dropout=0.25, rslora=True))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (32, 7, 0.25)
    assert config.use_rslora and config.bias == "none" and config.task_type == "CAUSAL_LM"
    assert set(config.target_modules) == {"k_proj", "v_proj"}


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(40, 24, 6), (24, 40, 6), (9, 9, 9)])
def test_singular_values_equal_the_full_products(d_out: int, d_in: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, d_in, generator=generator), torch.randn(
        d_out, rank, generator=generator)
    ours = singular_values(a, b, 0.5)
    theirs = torch.linalg.svdvals(0.5 * b @ a)[:rank]
    assert ours.shape == (rank,)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_singular_values_of_a_known_product() -> None:
    a, b = torch.eye(2, 5), torch.zeros(4, 2)
    b[0, 0], b[1, 1] = 3.0, 2.0
    torch.testing.assert_close(singular_values(a, b, 2.0), torch.tensor([6.0, 4.0]))
    assert singular_values(a, b * 0, 2.0).tolist() == [0, 0]


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_factors_give_the_delta(make_tiny: Callable[[], LlamaForCausalLM],
                                        tmp_path: Path, rslora: bool) -> None:
    out = saved_adapter(make_tiny(), tmp_path / "adapter", use_rslora=rslora)
    stock = PeftModel.from_pretrained(make_tiny(), str(out))
    factors = adapter_factors(out)
    assert len(factors) == 4
    for name, (a, b, scale) in factors.items():
        layer = stock.base_model.model.get_submodule(name)
        torch.testing.assert_close(scale * b @ a, layer.get_delta_weight("default"))


def test_load_adapter_equals_stock_peft(make_tiny: Callable[[], LlamaForCausalLM],
                                        adapter: Path) -> None:
    ids = torch.arange(10, 20)[None]
    ours = load_adapter(make_tiny(), adapter)
    stock = PeftModel.from_pretrained(make_tiny(), str(adapter)).eval()
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        assert torch.equal(ours(input_ids=ids).logits, expected)
        assert not torch.equal(make_tiny()(input_ids=ids).logits, expected)
    assert not ours.training


def flip_a_byte(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncate(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_config(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()


def remove_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, remove_config, remove_manifest,
                                    shutil.rmtree])
def test_damaged_adapter(make_tiny: Callable[[], LlamaForCausalLM], adapter: Path,
                         damage: Callable[[Path], None]) -> None:
    damage(adapter)
    with pytest.raises(UserError, match=str(adapter)):
        load_adapter(make_tiny(), adapter)


def other_width(tmp_path: Path) -> Path:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
                         num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
    return saved_adapter(LlamaForCausalLM(config), tmp_path / "foreign")


def more_layers(tmp_path: Path) -> Path:
    return saved_adapter(tiny_model(layers=3), tmp_path / "foreign")


def fewer_layers(tmp_path: Path) -> Path:
    return saved_adapter(tiny_model(layers=1), tmp_path / "foreign")


def other_modules(tmp_path: Path) -> Path:
    """An adapter whose configuration names layers that this model lacks."""
    made = saved_adapter(tiny_model(), tmp_path / "made")
    with writing(tmp_path / "foreign") as part:
        tensors = load_file(made / "adapter_model.safetensors")
        save_file({k.replace("q_proj", "c_attn"): v for k, v in tensors.items()},
                  part / "adapter_model.safetensors")
        config = json.loads((made / "adapter_config.json").read_text())
        config["target_modules"] = ["c_attn"]
        (part / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "foreign"


def not_an_adapter(tmp_path: Path) -> Path:
    """A whole model's artifact in an adapter's place."""
    with writing(tmp_path / "foreign") as part:
        tiny_model(layers=1).save_pretrained(part)
    return tmp_path / "foreign"


@pytest.mark.parametrize("foreign", [other_width, more_layers, fewer_layers, other_modules,
                                     not_an_adapter])
def test_foreign_adapter(make_tiny: Callable[[], LlamaForCausalLM], tmp_path: Path,
                         foreign: Callable[[Path], Path]) -> None:
    directory = foreign(tmp_path)
    with pytest.raises(UserError, match="does not fit this model|is no LoRA adapter") as caught:
        load_adapter(make_tiny(), directory)
    assert "\n" not in str(caught.value)
