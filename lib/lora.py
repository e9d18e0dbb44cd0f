"""LoRA in formulas: the update, what it counts, what it weighs (Hu et al. 2021)."""

import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lib.artifacts import read_json, verified, write_json
from lib.errors import UserError, require
from lib.profiles import TrainSettings

# What peft can do and the course does not; some of it would be left out without a word.
UNUSED = ("layer_replication", "modules_to_save", "use_dora", "rank_pattern", "alpha_pattern",
          "megatron_config", "target_parameters", "trainable_token_indices")


def delta_weight(a: Tensor, b: Tensor, *, alpha: float, rslora: bool = False) -> Tensor:
    """The update of a frozen weight: dW = (alpha / r) B A.

    Args:
        a: (r, d_in), random at the start.
        b: (d_out, r), zero at the start, so that dW = 0.
        alpha: scale; rsLoRA divides it by sqrt(r) instead (Kalajdzievski 2023).

    Returns:
        (d_out, d_in), in the dtype of `b @ a`.

    Raises:
        UserError: the ranks of a and b differ.
    """
    rank = a.shape[0]
    require(b.shape[1] == rank, f"A has rank {rank}, B has rank {b.shape[1]}: make them equal")
    return (alpha / (rank**0.5 if rslora else rank)) * (b @ a)


def linear_shapes(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each linear layer in a Llama block."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, value = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "q_proj": (query, hidden), "k_proj": (value, hidden), "v_proj": (value, hidden),
        "o_proj": (hidden, query), "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }


def count_adapter(config: PretrainedConfig, *, rank: int, modules: Iterable[str]) -> int:
    """Adapter parameters by formula: layers * sum over modules of r (d_in + d_out)."""
    shapes = linear_shapes(config)
    per_block = sum(rank * sum(shapes[name]) for name in modules)
    return config.num_hidden_layers * per_block


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of a model."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


def lora_config(model: PreTrainedModel, settings: TrainSettings) -> LoraConfig:
    """peft's configuration, checked against the model it is for.

    Raises:
        UserError: a target that the model lacks, a tied embedding, or a rank
            above the narrowest width of a target.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for target in settings.modules:
        found = [m for name, m in linears.items() if name.split(".")[-1] == target]
        known = sorted({name.split(".")[-1] for name in linears} - {"lm_head"})
        require(found and target != "lm_head",
                f"target module {target!r} does not exist here: use {', '.join(known)}")
        width = min(min(m.in_features, m.out_features) for m in found)
        require(settings.rank <= width,
                f"rank {settings.rank} is above the width {width} of {target}: lower it")
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=settings.modules,
        lora_dropout=settings.dropout, use_rslora=settings.rslora, bias="none",
        task_type="CAUSAL_LM")


def adapter_files(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a saved adapter, when they make sense together.

    Raises:
        UserError: naming the file that is damaged, or is of something else.
    """
    file, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    config = read_json(file) if file.is_file() else None
    require(isinstance(config, dict) and config.get("peft_type") == "LORA",
            f"{directory} is no LoRA adapter: name the folder of one")
    for key in UNUSED:
        require(not config.get(key), f"{file} asks for {key}, which is not done here: "
                "train a plain LoRA adapter")
    try:
        tensors = load_file(weights)
        finite = all(t.is_floating_point() and t.float().isfinite().all() for t in tensors.values())
    except Exception as error:  # of safetensors, of torch for a dtype
        raise UserError(f"{weights} is damaged ({error}): train the adapter again") from error
    require(finite, f"{weights} holds what are no finite numbers: train the adapter again")
    a, b = ({name.removesuffix(end): t for name, t in tensors.items() if name.endswith(end)}
            for end in (".lora_A.weight", ".lora_B.weight"))
    ranks = {t.shape[side] if t.dim() == 2 else None for side, factors in enumerate((a, b))
             for t in factors.values()}
    rank, alpha = config.get("r"), config.get("lora_alpha")
    require(type(rank) is int and ranks == {rank} and a.keys() == b.keys()
            and type(alpha) in (int, float) and 0 < alpha < math.inf
            and isinstance(config.get("target_modules"), list),
            f"{file} does not go with {weights.name} (rank {rank}, there {ranks}): "
            "train the adapter again")
    return config, tensors


def load_adapter(model: PreTrainedModel, directory: Path | str) -> PeftModel:
    """The model with a saved adapter on it, files verified first."""
    directory = Path(directory)
    verified(directory)
    tensors = adapter_files(directory)[1]
    try:
        with warnings.catch_warnings():
            # peft only warns of layers that the file lacks; that is no fit.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(directory)).eval()
    except Exception as error:  # peft's own, for whatever its configuration says
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{directory} does not fit this model ({reason}): "
                        "train an adapter for it") from error
    require(not tensors.keys() - get_peft_model_state_dict(
        adapted, save_embedding_layers=False).keys(),
        f"{directory} does not fit this model (it has layers that the model lacks): "
        "train an adapter for it")
    return adapted


def make_portable(directory: Path, base: str) -> None:
    """Put an adapter's config in order: the base's name, not a path; modules sorted."""
    config = directory / "adapter_config.json"
    kept = read_json(config)
    # A path of this machine means nothing to others; a set has no order.
    write_json(config, kept | {"base_model_name_or_path": base, "inference_mode": True,
                               "target_modules": sorted(kept["target_modules"])})


def adapter_factors(directory: Path | str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{module: (A, B, scale)} in float32, from an adapter's files."""
    config, tensors = adapter_files(Path(directory))
    root = config["r"]**0.5 if config.get("use_rslora") else config["r"]
    names = [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): (
            tensors[f"{name}.lora_A.weight"].float(),
            tensors[f"{name}.lora_B.weight"].float(), config["lora_alpha"] / root)
        for name in names
    }


def singular_values(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The r singular values of `scale * B A`, largest first, without forming it.

    B = Q_b R_b and A^T = Q_a R_a give the values of R_b R_a^T, an r x r matrix.
    """
    _, right = torch.linalg.qr(a.float().T)
    _, left = torch.linalg.qr(b.float())
    return torch.linalg.svdvals(scale * left @ right.T)
