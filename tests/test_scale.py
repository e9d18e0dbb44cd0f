"""When one machine is not enough: several processes, FSDP, adapters that vLLM takes."""

import dataclasses
import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT, saved_adapter, with_adapter
from peft import LoraConfig, get_peft_model
from processes import watch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lib.processes
import lib.train
from lib.__main__ import parser
from lib.artifacts import read_json, sha256, verified
from lib.base_model import best_dtype
from lib.coa import CoaLora
from lib.configuration import KINDS
from lib.errors import UserError
from lib.fused import frozen_weight
from lib.joint import train_over
from lib.lora import linear_shapes
from lib.plans import random_plan
from lib.profiles import TrainSettings
from lib.switchable import Switchable
from lib.train import base_for, make_trainer, quantized_config, train
from lib.trainer import last_checkpoint

pytestmark = pytest.mark.usefixtures("float32", "cheap_tokenizer")

CONFIGS = ROOT / "data" / "accelerate"
# A multiple of 2 x 2: the epochs then end without examples that fill up.
RECORDS = [{"instruction": "Unit?" + " again" * (i % 5), "response": f"It is {i} {'x' * (i % 4)}."}
           for i in range(12)]
SETTINGS = TrainSettings(mode="qlora", steps=5, batch_size=4, rank=4, learning_rate=2e-2)


# Several processes: DDP


@pytest.fixture(scope="module")
def together(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory
             ) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Two processes at half the batch; the folder of what they saw, and what they said."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch has no gloo here")
    folder = tmp_path_factory.mktemp("together")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
        CONFIGS / "ddp.yaml", ROOT / "tests" / "processes.py", folder,
        "train", "--data", data, "--out", folder / "out", "--model", tiny_directory,
        "--steps", SETTINGS.steps, "--batch-size", SETTINGS.batch_size // 2,
        "--rank", SETTINGS.rank, "--learning-rate", SETTINGS.learning_rate]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [str(part) for part in command], text=True, capture_output=True, timeout=600,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


@pytest.fixture(scope="module")
def alone(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one process at the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, folder / "0.safetensors")
        train(RECORDS, SETTINGS, model=tiny_directory, out=folder / "out")
    return folder


Together = tuple[Path, subprocess.CompletedProcess[str]]


def test_both_processes_have_the_same_adapter(together: Together) -> None:
    """Gradients, too; and what is saved is what they have."""
    folder, _ = together
    assert sha256(folder / "0.safetensors") == sha256(folder / "1.safetensors")
    seen = load_file(folder / "0.safetensors")
    saved = load_file(folder / "out" / "adapter_model.safetensors")
    assert len(saved) == 28
    for name, tensor in saved.items():
        assert torch.equal(tensor, seen[f"weight.{name.replace('.weight', '.default.weight')}"])


def test_two_processes_do_what_one_does_at_double_batch(together: Together, alone: Path) -> None:
    """Equal but for the order of the sums, in float32.

    The gradient is linear in the examples: its rounding stays near 1e-7 of the
    largest entry. Adam divides each entry by its own size, so an entry that is
    nearly zero passes its rounding on to the weights; their bound is wider.
    """
    two, one = load_file(together[0] / "0.safetensors"), load_file(alone / "0.safetensors")
    assert two.keys() == one.keys()
    moved = 0
    for name, expected in one.items():
        error = (two[name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < (1e-5 if name.startswith("gradient") else 1e-2), name
        moved += bool(expected.any())
    # At the first step B is zero, and with it A's gradient.
    assert moved == 14 + 28
    losses = [read_json(f / "out" / "losses.json") for f in (together[0], alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_first_process_writes_and_speaks(together: Together) -> None:
    folder, done = together
    facts = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    # Stopped, then resumed from the checkpoint of step 2.
    assert [f["status"] for f in facts] == [[130, 0], [130, 0]]
    states = 2 * torch.get_rng_state().numel()
    assert [f["written"] for f in facts] == [[[2, states], [4, states], [5, states]], []]
    assert done.stderr.count("resuming from step 2") == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("step    5/5")
    assert lines[1].endswith(", 2 processes")
    assert verified(folder / "out")["processes"] == 2
    assert not list(folder.glob(".out*"))


def test_one_prepares_the_base_and_says_the_dtype(together: Together) -> None:
    facts = [json.loads((together[0] / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [f["first"] for f in facts] == [True, False]
    assert [f["dtype"] for f in facts] == ["float32", "float32"]


def test_lone_process_of_many_is_refused(monkeypatch: pytest.MonkeyPatch, tiny_directory: str,
                                         tmp_path: Path) -> None:
    """WORLD_SIZE left over in the environment must not make a run write nothing."""
    monkeypatch.setattr(lib.processes, "count", lambda: 3)
    with pytest.raises(UserError, match="3, but 1 came together: start them with"):
        train(RECORDS, SETTINGS, model=tiny_directory, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_configurations_are_for_one_process(monkeypatch: pytest.MonkeyPatch,
                                            tiny: PreTrainedModel) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process: start it without"):
        train_over(Switchable(tiny, dtype=torch.float32), RECORDS, [], SETTINGS)


def test_checkpoints_of_8_bit_adam(tiny: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                                   tmp_path: Path) -> None:
    """The optimizer of a GPU counts in an int and shares its code table among weights."""
    settings = dataclasses.replace(SETTINGS, mode="lora")
    trainer = make_trainer(tiny, tokenizer, RECORDS, settings, work=tmp_path)
    weights = list(trainer._trainable().values())
    trainer.optimizer = bnb.optim.AdamW8bit(weights, lr=0.1, min_8bit_size=256)
    trainer.create_scheduler(num_training_steps=4)

    def step() -> list[Tensor]:
        for weight in weights:
            weight.grad = weight.data.sin() + 1
        trainer.optimizer.step()
        return [weight.detach().clone() for weight in weights]

    before = step()
    trainer._write_checkpoint(torch.get_rng_state())
    after = step()
    kinds = {t.dtype for t in trainer.optimizer.state[weights[0]].values()
             if isinstance(t, Tensor)}
    assert kinds == {torch.uint8, torch.float32}
    for weight, old in zip(weights, before, strict=True):
        weight.data.copy_(old)
    trainer.optimizer.state.clear()
    trainer._load_optimizer_and_scheduler(str(last_checkpoint(tmp_path)))
    assert trainer.optimizer.state[weights[0]]["step"] == 1
    assert all(map(torch.equal, step(), after))


# FSDP with QLoRA


def launched(name: str) -> dict[str, str]:
    """The environment that `accelerate launch` would give to the processes."""
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(CONFIGS / name), "-m", "lib", "train"])
    arguments, _, _ = _validate_launch_command(arguments)
    return {k: v for k, v in prepare_multi_gpu_env(arguments).items()
            if k.startswith(("FSDP_", "ACCELERATE_"))}


@pytest.mark.parametrize(("name", "kind"), [("ddp.yaml", "MULTI_GPU"), ("fsdp_qlora.yaml", "FSDP")])
def test_accelerate_reads_the_file(name: str, kind: str) -> None:
    """Its loader refuses keys that it does not know."""
    config = load_config_from_file(str(CONFIGS / name))
    assert config.distributed_type == kind and config.num_processes == 2
    assert config.mixed_precision == "no" and not config.use_cpu


def test_fsdp_plugin_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launched processes would make it; only the GPU is pretended."""
    for key, value in launched("fsdp_qlora.yaml").items():
        monkeypatch.setenv(key, value)
    assert lib.processes.sharded()
    monkeypatch.setattr("accelerate.utils.dataclasses.is_cuda_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 1 and plugin.sharding_strategy.name == "FULL_SHARD"
    assert plugin.use_orig_params is False and plugin.cpu_offload.offload_params
    assert plugin.sync_module_states and plugin.cpu_ram_efficient_loading
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.activation_checkpointing


def test_the_page_has_commands_that_parse() -> None:
    page = (ROOT / "notebooks" / "SCALE.md").read_text(encoding="utf-8")
    commands = [shlex.split(block.replace("\\\n", " ")) for block in
                re.findall(r"^accelerate launch(.*?)^```", page, re.DOTALL | re.MULTILINE)]
    assert [c[1] for c in commands] == [
        "data/accelerate/ddp.yaml", "data/accelerate/fsdp_qlora.yaml"]
    for command in commands:
        assert (ROOT / command[1]).is_file()
        launcher = launch_command_parser().parse_args(command)
        assert launcher.module and launcher.training_script == "lib"
        assert parser().parse_args(launcher.training_script_args).mode == "qlora"


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lib.train sees of `accelerate launch` with FSDP."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")


def test_4_bit_codes_are_stored_in_the_dtype_of_the_rest(
    fsdp: None, monkeypatch: pytest.MonkeyPatch, tiny_directory: str
) -> None:
    for name in ("float32", "bfloat16"):
        monkeypatch.setenv("COURSE_DTYPE", name)
        best_dtype.cache_clear()
        config = quantized_config()
        assert config.bnb_4bit_quant_storage == config.bnb_4bit_compute_dtype
        assert config.bnb_4bit_quant_storage == getattr(torch, name)
    model = base_for("qlora", tiny_directory)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # The bytes are the ones that are stored as uint8 elsewhere.
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    plain = dict(base_for("qlora", tiny_directory).named_modules())
    best_dtype.cache_clear()
    layers = [name for name in plain if name.endswith("_proj")]
    assert len(layers) == 14
    for name in layers:
        ours, theirs = model.get_submodule(name), plain[name]
        assert theirs.weight.dtype == torch.uint8
        assert torch.equal(frozen_weight(ours, torch.float32),
                           frozen_weight(theirs, torch.float32)), name


def test_under_fsdp_the_step_is_the_stock_one(
    fsdp: None, monkeypatch: pytest.MonkeyPatch, tiny_directory: str, tmp_path: Path
) -> None:
    """And nothing is written before the end; the adapter comes from the gathered state."""
    def never(*_: Any) -> None:
        raise AssertionError("not under FSDP")

    monkeypatch.setattr(lib.train, "fused", never)
    monkeypatch.setattr(lib.train.CourseTrainer, "_write_checkpoint", never)
    monkeypatch.setattr(lib.train, "CHECKPOINT_EVERY", 1)
    settings = dataclasses.replace(SETTINGS, steps=2)
    result = train(RECORDS, settings, model=tiny_directory, out=tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ours = dict(result.model.named_parameters())
    assert len(saved) == 28
    for name, tensor in saved.items():
        assert torch.equal(tensor, ours[name.replace(".weight", ".default.weight")])


def test_the_arguments_under_fsdp(fsdp: None, monkeypatch: pytest.MonkeyPatch,
                                  tiny: PreTrainedModel, tmp_path: Path) -> None:
    """On a GPU: an optimizer that FSDP can gather, no checkpoints, the reentrant kind."""
    class Made(Exception):
        pass

    def record(**options: Any) -> None:
        raise Made(options)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(lib.train, "SFTConfig", record)
    with pytest.raises(Made) as caught:
        make_trainer(tiny, None, RECORDS, SETTINGS, work=tmp_path)
    made = caught.value.args[0]
    assert made["optim"] == "adamw_torch_fused" and made["save_strategy"] == "no"
    assert made["gradient_checkpointing_kwargs"] == {"use_reentrant": True}


# vLLM serves the adapters


def refusals(directory: Path, model: PreTrainedModel, *, max_rank: int = 16) -> list[str]:
    """Why vLLM 0.32.0 would not load this adapter of a Llama model; empty if it would.

    Read in vllm/lora/peft_helper.py (PEFTHelper.from_local_dir, validate_legal),
    vllm/lora/lora_model.py (LoRAModel.from_local_checkpoint), vllm/lora/utils.py
    (parse_fine_tuned_lora_name) and vllm/config/lora.py (MaxLoRARanks).
    """
    config = read_json(directory / "adapter_config.json")
    tensors = load_file(directory / "adapter_model.safetensors")
    shapes = linear_shapes(model.config)
    found = [f"lacks {key}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    found += [key for key in (
        "modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens",
        "layer_replication", "use_bdlora", "use_qalora") if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append("bias")
    if str(config.get("init_lora_weights", True)).lower() not in (
            "true", "false", "gaussian", "eva", "orthogonal", "mica", "lora_ga"):
        found.append("init_lora_weights")
    ranks = [config.get("r", 0), *(config.get("rank_pattern") or {}).values()]
    if min(ranks) < 1 or max(ranks) > max_rank:
        found.append("rank")
    layers = {name for name, _ in model.named_modules() if name.split(".")[-1] in shapes}
    for name, tensor in tensors.items():
        layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        out, into = shapes.get(layer.split(".")[-1], (0, 0))
        expected = {"A.weight": (ranks[0], into), "B.weight": (out, ranks[0])}.get(part)
        if layer not in layers or tuple(tensor.shape) != expected:
            found.append(name)
    pairs = {n.replace("lora_A", "lora_B") for n in tensors if "lora_A" in n}
    return found + sorted(pairs ^ {n for n in tensors if "lora_B" in n})


@pytest.mark.real
@pytest.mark.parametrize("name", ["sensors_lora", "sensors_qlora", "movies_qlora"])
def test_vllm_takes_the_stored_adapters(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from lib.embedded import EMBEDDED, locate

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(locate(EMBEDDED)))
    assert refusals(ROOT / "data" / "adapters" / name, model) == []


def test_vllm_takes_what_training_writes(alone: Path, together: Together, tiny: PreTrainedModel
                                         ) -> None:
    for folder in (alone, together[0]):
        assert refusals(folder / "out", tiny) == []
    assert refusals(alone / "out", tiny, max_rank=1) == ["rank"]


def test_vllm_takes_a_materialised_adapter(tiny: PreTrainedModel,
                                           make_tiny: Callable[[], PreTrainedModel],
                                           tmp_path: Path) -> None:
    base = Switchable(tiny, dtype=torch.float32)
    coa = CoaLora(with_adapter(base.model, target_modules=list(KINDS)), base)
    coa.materialise(random_plan(base.layers, 4.0, random.Random(0)), tmp_path / "plan")
    assert refusals(tmp_path / "plan", make_tiny()) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("options", "reason"), [
    ({"bias": "lora_only"}, "bias"), ({"use_dora": True}, "use_dora"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"r": 32}, "rank"),
    ({"rank_pattern": {"q_proj": 32}}, "rank"), ({"lora_bias": True}, "lora_bias")])
def test_the_contract_refuses_what_vllm_refuses(tiny: PreTrainedModel, tmp_path: Path,
                                                options: dict[str, Any], reason: str) -> None:
    """peft writes them; our own training never does."""
    options = {"r": 4, "target_modules": ["q_proj"]} | options
    get_peft_model(tiny, LoraConfig(**options)).save_pretrained(tmp_path)
    assert reason in refusals(tmp_path, tiny)


def test_the_contract_refuses_other_tensors(tiny: PreTrainedModel, tmp_path: Path) -> None:
    out = saved_adapter(tiny, tmp_path / "adapter")
    assert refusals(out, tiny) == []
    tensors = load_file(out / "adapter_model.safetensors")
    name = next(n for n in tensors if "lora_A" in n)
    other = name.replace("q_proj", "wq").replace("down_proj", "w2")
    save_file({other if n == name else n: t for n, t in tensors.items()},
              out / "adapter_model.safetensors")
    assert refusals(out, tiny)[0] == other
    save_file({n: t.T.contiguous() for n, t in tensors.items()}, out / "adapter_model.safetensors")
    assert len(refusals(out, tiny)) == len(tensors)
