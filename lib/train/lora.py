"""LoRA in formulas (Hu et al. 2021): the update, its size, a faster step, adapters on disk."""

import contextlib
import re
import types
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lib.base.model import MODULE_KINDS, frozen_weight
from lib.errors import UserError, require
from lib.files import MANIFEST, read_json, verified, write_json
from lib.settings import TrainSettings

# Features of peft that are more than an A and a B of one rank for each linear layer.
UNUSED = ("layer_replication", "modules_to_save", "use_dora", "rank_pattern", "alpha_pattern",
          "megatron_config", "target_parameters", "trainable_token_indices", "lora_bias",
          "alora_invocation_tokens")


def delta_weight(a: Tensor, b: Tensor, *, alpha: float, rslora: bool = False) -> Tensor:
    """The update of a frozen weight: dW = (alpha / r) B A, of shape (d_out, d_in).
    A (r, d_in) is random at the start, B (d_out, r) zero, so that dW = 0. rsLoRA divides alpha
    by sqrt(r) instead (Kalajdzievski 2023). UserError if A and B differ in rank."""
    rank = a.shape[0]
    require(b.shape[1] == rank, f"A has rank {rank}, B has rank {b.shape[1]}: make them equal")
    return (alpha / (rank**0.5 if rslora else rank)) * (b @ a)


def linear_shapes(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each linear layer in a Llama block."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, value = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = ((query, hidden), (value, hidden), (value, hidden), (hidden, query),
              (inner, hidden), (inner, hidden), (hidden, inner))
    return dict(zip(MODULE_KINDS, shapes, strict=True))


def count_adapter(config: PretrainedConfig, *, rank: int, modules: Iterable[str]) -> int:
    """Adapter parameters by formula: layers * sum over modules of r (d_in + d_out)."""
    shapes = linear_shapes(config)
    return config.num_hidden_layers * sum(rank * sum(shapes[name]) for name in modules)


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of a model; a byte of NF4 counts as the two it holds."""
    shapes = [(getattr(p, "quant_state", p).shape, p.requires_grad) for p in model.parameters()]
    return sum(s.numel() for s, trained in shapes if trained), sum(s.numel() for s, _ in shapes)


def lora_config(model: PreTrainedModel, settings: TrainSettings) -> LoraConfig:
    """peft's configuration; UserError for a target that is missing or narrower than the rank."""
    widths = {name.rpartition(".")[2]: min(module.in_features, module.out_features)
              for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    widths.pop("lm_head", None)  # tied to the embedding, which has no adapter
    for target in settings.modules:
        require(target in widths,
                f"no target module {target!r}: use {', '.join(sorted(widths)) or 'another model'}")
        rank, width = settings.rank, widths[target]
        require(rank <= width, f"rank {rank} is above the width {width} of {target}: lower it")
    return LoraConfig(
        task_type="CAUSAL_LM", r=settings.rank, lora_alpha=settings.alpha, bias="none",
        target_modules=settings.modules, lora_dropout=settings.dropout, use_rslora=settings.rslora)


def adapter_files(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an adapter, made here or elsewhere; UserError if damaged."""
    file, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    config = read_json(file) if file.is_file() else None
    require(isinstance(config, dict) and config.get("peft_type") == "LORA",
            f"{directory} is not a LoRA adapter: name the folder of one")
    if (directory / MANIFEST).is_file():
        verified(directory)
    require(weights.is_file() or not weights.with_suffix(".bin").is_file(), f"{directory} has "
            "adapter_model.bin, a pickle, which is not read: save it as safetensors")
    try:
        tensors = load_file(weights)
        require(all(t.float().isfinite().all() for t in tensors.values()), "not all are finite")
    except Exception as error:  # safetensors, and torch for some dtypes, have their own
        raise UserError(f"{weights} is damaged ({error}): train the adapter again") from error
    return config, tensors


def origin(directory: Path | str, *, rounded: bool = False) -> tuple[str, str]:
    """(base, route) of an adapter: the model it was trained on, and which form of its weights.
    The route is "dequantized" after QLoRA and "original" after LoRA; "" where files do not say.
    UserError if it was trained for configurations, unless the weights will be `rounded` to one."""
    config, file = adapter_files(Path(directory))[0], Path(directory) / MANIFEST
    manifest = read_json(file) if file.is_file() else {}
    aware = Path(directory, "coa.safetensors").is_file() or "configuration" in manifest
    require(rounded or not aware, f"{directory} was trained for weights of fewer bits: use `python "
            "-m lib deploy --adapter`, then evaluate or serve what that writes")
    require(config.get("revision") in (None, "", "main"), f"{directory} names a revision of its "
            "base, not main, which is loaded: name a folder of it in adapter_config.json")
    mode = manifest.get("settings", {}).get("mode")
    return (manifest.get("base") or config.get("base_model_name_or_path") or "",
            {"qlora": "dequantized", "lora": "original"}.get(mode, ""))


def settled(directory: Path, model: str = "", route: str = "", *, rounded: bool = False
            ) -> tuple[str, str]:
    """(base, route) of an adapter, or those named; UserError if it has others, or none."""
    base, own = origin(directory, rounded=rounded)
    require(base or model, f"{directory} does not say its base: name that with --model")
    # A path of another machine, a hub id of which this is a copy, or what Unsloth made of one.
    theirs, ours = Path(base).name, Path(model).absolute().name if model else ""
    moved = not Path(base).exists() and (
        base[:1] in tuple("/.~") or base[1:2] == ":" or (theirs == ours and Path(model).is_dir())
        or re.sub("(-unsloth)?-bnb-4bit$", "", theirs.lower()) == ours.lower() != theirs.lower())
    require(model or not moved, f"{directory} was trained on {base}, which is not there: put it "
            "back, or name where it is with --model")
    require(not (base and model) or moved or Path(base).resolve() == Path(model).resolve(),
            f"{directory} was trained on {base}, not on {model}: name its base, or a copy so named")
    require(own or route, f"{directory} does not say how it was trained: name --route original, or "
            "dequantized (after QLoRA)")
    require(route in ("", own) or not own, f"{directory} was trained on the {own} weights, not on "
            f"the {route} ones: use --route {own}")
    return model or base, own or route


def load_adapter(model: PreTrainedModel, directory: Path | str) -> PeftModel:
    """The model with a saved adapter. UserError if a file is damaged or does not fit."""
    tensors = adapter_files(directory := Path(directory))[1]
    try:
        with warnings.catch_warnings(action="ignore"):
            adapted = PeftModel.from_pretrained(model, str(directory)).eval()
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        # peft warns only of layers missing, and saves an adapted embedding's own weights, too.
        own = {name for name in tensors if ".base_layer.weight" not in name}
        require(expected == own, "it adapts other layers")
    except Exception as error:  # the configuration decides which one peft raises
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{directory} does not fit ({reason}): use it with its own base") from error
    return adapted


def make_portable(directory: Path, base: str) -> None:
    """Name the base in a saved configuration, not its local path, and sort the modules."""
    file = directory / "adapter_config.json"
    config, modules = read_json(file), read_json(file)["target_modules"]
    write_json(file, config | {"base_model_name_or_path": base, "inference_mode": True,
                               "target_modules": modules if isinstance(modules, str)
                               else sorted(modules)})


def adapter_factors(directory: Path | str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{module: (A, B, scale)} of a saved adapter, in float32. UserError if it has other parts."""
    config, tensors = adapter_files(Path(directory))
    # peft adds a copy of an adapted head or embedding.
    tensors = {name: t for name, t in tensors.items() if ".base_layer.weight" not in name}
    parts = [key for key in UNUSED if config.get(key)]
    if config.get("init_lora_weights") not in (True, False, None, "gaussian"):
        parts.append(f"init_lora_weights {config['init_lora_weights']!r}")  # it changes the base
    require(not parts, f"{directory} uses {', '.join(parts)}, which A and B do not hold: "
            "merge it with --merge, or train a plain LoRA adapter")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    ranks = {t.shape[0] if ".lora_A." in name else t.shape[-1]  # A (r, d_in), B (d_out, r)
             for name, t in tensors.items() if t.dim() == 2}
    paired = {name.rpartition(".lora_")[0]: None for name in tensors}
    pairs = {f"{module}.lora_{factor}.weight" for module in paired for factor in "AB"}
    require(type(rank) is int and ranks == {rank} and tensors.keys() == pairs
            and type(alpha) in (int, float) and 0 < alpha < float("inf"),
            f"{directory} needs an A and a B of rank {rank} a module, not {ranks}: train it again")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    factors = {m: [tensors[f"{m}.lora_{factor}.weight"].float() for factor in "AB"] for m in paired}
    return {m.removeprefix("base_model.model."): (a, b, scale) for m, (a, b) in factors.items()}


class LoraLinear(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T with W frozen (Hu et al. 2021, section 4.1).
    Shapes: x (..., d_in), W (d_out, d_in), A (r, d_in), B (d_out, r). It computes in the dtype
    of x; A and B may be float32 and then get float32 gradients:
    dA = (dy B s)^T x, dB = s dy^T (x A^T), dx = dy W + (dy B s) A."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, a: Tensor, b: Tensor,
                scale: float, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low_a, low_b = a.to(x.dtype), b.to(x.dtype) * scale
        hidden = flat @ low_a.T
        weight = frozen_weight(base, x.dtype)
        y = (flat @ weight.T).addmm_(hidden, low_b.T)
        if bias is not None:
            y += bias.to(y.dtype)
        ctx.save_for_backward(flat, low_a, low_b, hidden)
        ctx.base, ctx.scale, ctx.shape, ctx.dtypes = base, scale, x.shape, (a.dtype, b.dtype)
        # By then the layer may point to another. A 4-bit weight is decoded twice, to save memory.
        ctx.weight = None if hasattr(base.weight, "quant_state") else weight.detach()
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, low_a, low_b, hidden = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        d_hidden, dx = dy @ low_b, None
        if ctx.needs_input_grad[0]:
            weight = frozen_weight(ctx.base, dy.dtype) if ctx.weight is None else ctx.weight
            dx = (dy @ weight).addmm_(d_hidden, low_a).view(ctx.shape)
        da = (d_hidden.T @ flat).to(ctx.dtypes[0])
        db = (dy.T @ hidden).to(ctx.dtypes[1]) * ctx.scale
        return dx, None, da, db, None, None


def _lora_forward(self: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.disable_adapters or self.merged or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    name, base = self.active_adapters[0], self.get_base_layer()
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return LoraLinear.apply(x, base, a, b, self.scaling[name], base.bias)


def _is_plain(layer: LoraLayer) -> bool:
    """Whether it is one adapter on a frozen linear, without dropout, bias or variant (DoRA)."""
    if len(layer.active_adapters) != 1 or layer.merged:
        return False
    base, name = layer.get_base_layer(), layer.active_adapters[0]
    return (type(base).__name__ in ("Linear", "Linear4bit")
            and not any(p.requires_grad for p in base.parameters())
            and isinstance(layer.lora_dropout[name], nn.Identity)
            and name not in layer.lora_variant and not layer.lora_bias.get(name))


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """Run the model's LoRA linears fused in the block; yields their number."""
    # On a CPU the backward pass of "sdpa" is many times slower on short sequences than eager.
    kind, fused_modules = getattr(getattr(model, "config", None), "_attn_implementation", None), []
    eager = kind == "sdpa" and not torch.cuda.is_available()
    if eager:
        model.set_attn_implementation("eager")
    for module in model.modules():
        if "forward" not in vars(module) and isinstance(module, LoraLayer) and _is_plain(module):
            module.forward = types.MethodType(_lora_forward, module)
            fused_modules.append(module)
    try:
        yield len(fused_modules)
    finally:
        for module in fused_modules:
            del module.forward
        if eager:
            model.set_attn_implementation("sdpa")
