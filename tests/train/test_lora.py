"""LoRA in formulas: the update, its counts, and adapters from disk."""

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import saved_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from data.evidence.tiny import tiny_model
from lib.base.model import MODULE_KINDS, load_model, quantized_config
from lib.errors import UserError
from lib.files import read_json, write_json, writing
from lib.settings import TARGETS, TrainSettings
from lib.train.lora import (
    adapter_factors,
    count_adapter,
    count_trainable,
    delta_weight,
    linear_shapes,
    load_adapter,
    lora_config,
    make_portable,
)


@pytest.fixture
def adapter(tiny: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A saved adapter that fits `tiny`."""
    return saved_adapter(tiny, tmp_path / "adapter")


@pytest.mark.parametrize("rslora", [False, True])
def test_update_equals_peft(make_tiny: Callable[[], LlamaForCausalLM], tmp_path: Path,
                            rslora: bool) -> None:
    """From the factors on disk, and by the formula."""
    out = saved_adapter(make_tiny(), tmp_path / "adapter", use_rslora=rslora)
    stock = PeftModel.from_pretrained(make_tiny(), str(out))
    alpha = read_json(out / "adapter_config.json")["lora_alpha"]
    factors = adapter_factors(out)
    assert len(factors) == 4
    for name, (a, b, scale) in factors.items():
        theirs = stock.base_model.model.get_submodule(name).get_delta_weight("default")
        assert theirs.abs().max() > 0
        torch.testing.assert_close(scale * b @ a, theirs)
        torch.testing.assert_close(delta_weight(a, b, alpha=alpha, rslora=rslora), theirs)


def test_delta_weight_by_hand() -> None:
    a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    expected = torch.tensor([[1.0, 2.0], [3.0, 7.0]])
    assert torch.equal(delta_weight(a, b, alpha=6), 3 * expected)
    torch.testing.assert_close(delta_weight(a, b, alpha=6, rslora=True), 6 / 2**0.5 * expected)
    with pytest.raises(UserError, match=r"rank 2.*rank 3"):
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
    assert model.get_nb_trainable_parameters() == count_trainable(model)
    assert formula == count_trainable(model)[0]


def test_four_bits_hold_as_many_parameters(tiny_directory: str) -> None:
    counts = [count_trainable(load_model(tiny_directory, **options)) for options in (
        {}, {"quantization_config": quantized_config()})]
    assert counts[0][1] == counts[1][1]


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
    shapes = {name.split(".")[-1]: tuple(m.weight.shape)
              for name, m in tiny.model.layers[0].named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear_shapes(tiny.config) == shapes
    wide = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=24)
    assert [linear_shapes(wide)[name] for name in ("q_proj", "k_proj", "o_proj")] == [
        (48, 32), (24, 32), (32, 48)]


@pytest.mark.parametrize(("settings", "message"), [
    ({"rank": 65}, "rank 65 is above the width 64 of q_proj"),
    # k_proj has two heads of 16: 32 wide
    ({"rank": 33, "targets": "k_proj"}, "rank 33 is above the width 32 of k_proj"),
    ({"targets": "q_proj,nonsense"}, "no target module 'nonsense'"),
    ({"targets": ""}, "no target module ''"),
    ({"targets": "q_proj,lm_head"}, "no target module 'lm_head'"),
    ({"targets": "embed_tokens"}, "no target module 'embed_tokens'"),
])
def test_lora_config_refuses(tiny: LlamaForCausalLM, settings: dict[str, Any],
                             message: str) -> None:
    settings = {"rank": 4, "targets": "minimal"} | settings
    with pytest.raises(UserError, match=message) as caught:
        lora_config(tiny, TrainSettings(**settings))
    if "exist" in message:  # the remedy names what exists
        assert str(caught.value).split(": use ")[1].split(", ") == sorted(MODULE_KINDS)


def test_lora_config_takes_the_settings(tiny: LlamaForCausalLM) -> None:
    config = lora_config(tiny, TrainSettings(
        rank=32, alpha=7, targets="k_proj,v_proj", dropout=0.25, rslora=True))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (32, 7, 0.25)
    assert config.use_rslora and config.bias == "none" and config.task_type == "CAUSAL_LM"
    assert set(config.target_modules) == {"k_proj", "v_proj"}


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


def test_trained_biases_are_loaded(tiny_directory: str, tmp_path: Path) -> None:
    """peft saves those of `bias="all"` beside A and B, by the names of the layers below."""
    config = AutoConfig.from_pretrained(tiny_directory, attention_bias=True)
    base = LlamaForCausalLM(config)
    tuned = get_peft_model(copy.deepcopy(base), LoraConfig(
        task_type="CAUSAL_LM", bias="all", target_modules=["q_proj"]))
    for name, parameter in tuned.named_parameters():
        if name.endswith("q_proj.base_layer.bias"):
            parameter.data += 1
    tuned.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(10, 20)[None]
    ours = load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.equal(ours(ids).logits, tuned.eval()(ids).logits)


def flip_a_byte(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [flip_a_byte, shutil.rmtree])
def test_damaged_adapter(make_tiny: Callable[[], LlamaForCausalLM], adapter: Path,
                         damage: Callable[[Path], None]) -> None:
    damage(adapter)
    with pytest.raises(UserError, match=str(adapter)):
        load_adapter(make_tiny(), adapter)


def other_width() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0))


@pytest.mark.parametrize("make", [other_width, lambda: tiny_model(layers=3),
                                  lambda: tiny_model(layers=1)],
                         ids=["other width", "more layers", "fewer layers"])
def test_adapter_of_another_model(make_tiny: Callable[[], LlamaForCausalLM], tmp_path: Path,
                                  make: Callable[[], LlamaForCausalLM]) -> None:
    with pytest.raises(UserError, match="adapter does not fit") as caught:
        load_adapter(make_tiny(), saved_adapter(make(), tmp_path / "adapter"))
    assert "\n" not in str(caught.value)


def changed(adapter: Path, out: Path, *, tensors: Callable[[str], str] = str,
            **config: object) -> Path:
    """A copy of an adapter with other names of tensors or entries of its configuration."""
    with writing(out) as part:
        save_file({tensors(name): tensor for name, tensor in
                   load_file(adapter / "adapter_model.safetensors").items()},
                  part / "adapter_model.safetensors")
        write_json(part / "adapter_config.json",
                   read_json(adapter / "adapter_config.json") | config)
    return out


@pytest.mark.parametrize(("change", "message"), [
    ({"peft_type": "IA3"}, "is not a LoRA adapter"),
    ({"tensors": lambda name: name.replace("q_proj", "c_attn"), "target_modules": ["c_attn"]},
     "does not fit"),
    ({"tensors": lambda name: name.replace("layers.1", "layers.7")}, "does not fit")])
def test_adapter_of_something_else(make_tiny: Callable[[], LlamaForCausalLM], adapter: Path,
                                   tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_adapter(make_tiny(), changed(adapter, tmp_path / "changed", **change))


@pytest.mark.parametrize("change", [
    {"r": 3}, {"lora_alpha": "8"},
    # A bias, or A without B.
    {"tensors": lambda name: name.replace("0.self_attn.q_proj.lora_B.weight",
                                          "0.self_attn.q_proj.lora_B.bias")}])
def test_factors_that_do_not_go_together(adapter: Path, tmp_path: Path,
                                         change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="needs an A and a B of rank"):
        adapter_factors(changed(adapter, tmp_path / "changed", **change))


def test_copies_of_the_base_are_no_factors(adapter: Path, tmp_path: Path) -> None:
    """peft saves an adapted head or embedding, too."""
    mine = Path(shutil.copytree(adapter, tmp_path / "mine"))
    (mine / "manifest.json").unlink(missing_ok=True)
    whole = load_file(mine / "adapter_model.safetensors")
    save_file(whole | {"base_model.model.lm_head.base_layer.weight": torch.ones(8, 8)},
              mine / "adapter_model.safetensors")
    assert adapter_factors(mine).keys() == adapter_factors(adapter).keys()


@pytest.mark.parametrize("options", [
    {"target_modules": "all-linear"}, {"target_modules": r".*\.1\..*(q_proj|up_proj)"},
    {"layers_to_transform": [1]}, {"use_rslora": True}, {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    {"use_dora": True}, {"modules_to_save": ["o_proj"]},
    {"trainable_token_indices": [5, 7]}], ids=str)
def test_adapters_made_elsewhere(make_tiny: Callable[[], LlamaForCausalLM], tmp_path: Path,
                                 options: dict[str, Any]) -> None:
    """peft merges its own; as A and B they are whole, or refused."""
    theirs = get_peft_model(make_tiny(), LoraConfig(
        **{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]} | options))
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    theirs.eval().save_pretrained(str(tmp_path))
    make_portable(tmp_path, "base")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        merged = load_adapter(make_tiny(), tmp_path).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)
        assert (make_tiny()(input_ids=ids).logits - expected).abs().max() > 1e-3
        try:
            factors = adapter_factors(tmp_path)
        except UserError as error:
            assert re.search("which A and B do not hold|needs an A and a B", str(error))
            return
        plain = make_tiny()
        for name, (a, b, scale) in factors.items():
            plain.get_submodule(name).weight.data += scale * b @ a
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)


def test_damaged_values(adapter: Path) -> None:
    """Files made elsewhere have no manifest."""
    (adapter / "manifest.json").unlink()
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {min(tensors): tensors[min(tensors)] * float("inf")}, file)
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged .*not all"):
        adapter_factors(adapter)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged"):
        adapter_factors(adapter)
