"""When one machine is not enough: several processes, FSDP, adapters that vLLM serves."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT
from processes import watch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import lib.host
from lib.__main__ import parser
from lib.base.embedded import EMBEDDED, locate
from lib.base.model import best_dtype, frozen_weight, quantized_config
from lib.coa.adapter import train_over
from lib.coa.configuration import Switchable
from lib.errors import UserError
from lib.files import read_json, sha256, verified
from lib.settings import TrainSettings
from lib.train import training
from lib.train.lora import adapter_factors, adapter_files
from lib.train.training import base_for, make_trainer, train

pytestmark = pytest.mark.usefixtures("float32")

CONFIGS = ROOT / "data" / "accelerate"
# A multiple of 2 x 2: the epochs then end without examples that fill up.
RECORDS = [{"instruction": "Unit?" + " again" * (i % 5), "response": f"It is {i} {'x' * (i % 4)}."}
           for i in range(12)]
SETTINGS = TrainSettings(mode="qlora", steps=5, batch_size=4, rank=4, learning_rate=2e-2)
Together = tuple[Path, subprocess.CompletedProcess[str]]


# Several processes: DDP


@pytest.fixture(scope="module")
def together(tiny_directory: str, tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Two processes at half the batch: the folder of what they saw, and their output."""
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


def test_both_processes_have_the_same_adapter(together: Together) -> None:
    """And gradients; and the saved adapter is theirs."""
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


def test_the_first_process_writes_and_prints(together: Together) -> None:
    folder, done = together
    facts = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [f["first"] for f in facts] == [True, False]  # it prepares the base
    assert [f["dtype"] for f in facts] == ["float32", "float32"]
    # Stopped, then resumed from the checkpoint of step 2.
    assert [f["status"] for f in facts] == [[130, 0], [130, 0]]
    states = 2 * torch.get_rng_state().numel()
    assert [f["written"] for f in facts] == [[[2, states], [4, states]], []]
    assert done.stderr.count("resuming from step 2") == 1
    lines = done.stdout.splitlines()
    assert lines[-2].startswith("step    5/5") and lines[-1].endswith(", 2 processes")
    assert len(lines) == 2 + 2 * 4  # both runs show what is learned, once
    assert verified(folder / "out")["processes"] == 2
    assert not list(folder.glob(".out*"))


def test_lone_process_of_many_is_refused(monkeypatch: pytest.MonkeyPatch, tiny: PreTrainedModel,
                                         tiny_directory: str, tmp_path: Path) -> None:
    """WORLD_SIZE left over in the environment must not make a run write nothing."""
    monkeypatch.setattr(training, "process_count", lambda: 3)
    with pytest.raises(UserError, match="3, but 1 came together: start them with"):
        train(RECORDS, SETTINGS, model=tiny_directory, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="takes one process: start it without"):
        train_over(Switchable(tiny, dtype=torch.float32), RECORDS, [], SETTINGS)


# FSDP with QLoRA


def test_fsdp_plugin_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launched processes would make it; only the GPU is pretended."""
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(CONFIGS / "fsdp_qlora.yaml"), "-m", "lib", "train"])
    arguments, _, _ = _validate_launch_command(arguments)
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    assert lib.host.is_sharded()
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
        launcher = launch_command_parser().parse_args(command)
        assert launcher.module and launcher.training_script == "lib"
        assert parser().parse_args(launcher.training_script_args).mode == "qlora"


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What training sees of `accelerate launch` with FSDP."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")


def test_4_bit_codes_are_stored_in_the_dtype_of_the_rest(
    fsdp: None, monkeypatch: pytest.MonkeyPatch, tiny_directory: str
) -> None:
    monkeypatch.setenv("COURSE_DTYPE", "bfloat16")
    best_dtype.cache_clear()
    config = quantized_config()
    assert config.bnb_4bit_quant_storage == config.bnb_4bit_compute_dtype == torch.bfloat16
    model = base_for("qlora", tiny_directory)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # The bytes are those that are stored as uint8 without FSDP.
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    plain = base_for("qlora", tiny_directory)
    best_dtype.cache_clear()
    layers = [name for name, _ in plain.named_modules() if name.endswith("_proj")]
    assert len(layers) == 14
    for name in layers:
        ours, theirs = model.get_submodule(name), plain.get_submodule(name)
        assert theirs.weight.dtype == torch.uint8
        assert torch.equal(frozen_weight(ours, torch.float32),
                           frozen_weight(theirs, torch.float32)), name


def test_under_fsdp_the_step_is_the_stock_one(
    fsdp: None, monkeypatch: pytest.MonkeyPatch, tiny_directory: str, tmp_path: Path
) -> None:
    """And nothing is written before the end; the adapter comes from the gathered state."""
    def never(*_: Any) -> None:
        raise AssertionError("not under FSDP")

    monkeypatch.setattr(training, "fused", never)
    monkeypatch.setattr(training.CourseTrainer, "_save_checkpoint", never)
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 1)
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
    class Caught(Exception):
        pass

    def stop(**options: Any) -> None:
        raise Caught(options)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(training, "SFTConfig", stop)
    with pytest.raises(Caught) as caught:
        make_trainer(tiny, None, RECORDS, SETTINGS, work=tmp_path)
    options = caught.value.args[0]
    assert options["optim"] == "adamw_torch_fused" and options["save_strategy"] == "no"
    assert options["gradient_checkpointing_kwargs"] == {"use_reentrant": True}


# vLLM serves the adapters


@pytest.mark.real
@pytest.mark.parametrize("name", ["sensors_lora", "sensors_qlora", "movies_qlora"])
def test_vllm_takes_the_stored_adapters(name: str) -> None:
    """vLLM 0.32.0 takes a plain adapter of rank 16 or less on linear layers of the model.

    Read in vllm/lora/peft_helper.py (PEFTHelper.from_local_dir, validate_legal) and
    vllm/lora/lora_model.py (LoRAModel.from_local_checkpoint).
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(locate(EMBEDDED)))
    config, _ = adapter_files(ROOT / "data" / "adapters" / name)  # it refuses DoRA, biases, ...
    assert config["r"] <= 16 and config["bias"] == "none" and config["init_lora_weights"] is True
    assert not any(config.get(key) for key in ("use_bdlora", "use_qalora"))
    for layer, (a, b, _) in adapter_factors(ROOT / "data" / "adapters" / name).items():
        assert tuple(model.get_submodule(layer).weight.shape) == (b.shape[0], a.shape[1])
