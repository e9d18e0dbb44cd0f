"""The same training step in fewer passes over memory.

On a CPU a LoRA step on short sequences spends more time moving activations
than multiplying. Two hand-written backward passes save most of that: the
frozen linear with its adapter, and RMSNorm with a frozen gain. Outside
`fused(model)` the model is the stock one.
"""

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

# Norms that compute x / rms(x) * weight; others (1 + weight) stay as they are.
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class LoraLinear(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T with W frozen (Hu et al. 2021, section 4.1).

    Shapes: x (..., d_in), W (d_out, d_in), A (r, d_in), B (d_out, r). Work is
    done in x's dtype; A and B may be float32 and get float32 gradients:
    dA = (dy B s)^T x, dB = s dy^T (x A^T), dx = dy W + (dy B s) A.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, a: Tensor, b: Tensor,
                scale: float, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low_a, low_b = a.to(x.dtype), b.to(x.dtype) * scale
        hidden = flat @ low_a.T
        weight = frozen_weight(base, x.dtype)
        y = flat @ weight.T
        y.addmm_(hidden, low_b.T)
        if bias is not None:
            y += bias.to(y.dtype)
        ctx.save_for_backward(flat, low_a, low_b, hidden)
        ctx.base, ctx.scale, ctx.shape = base, scale, x.shape
        # The layer may point to another weight by the time of the backward pass;
        # only a 4-bit one is decoded again, to save memory.
        ctx.weight = None if hasattr(base.weight, "quant_state") else weight.detach()
        ctx.dtypes = a.dtype, b.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, low_a, low_b, hidden = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        d_hidden = dy @ low_b
        dx = None
        if ctx.needs_input_grad[0]:
            weight = frozen_weight(ctx.base, dy.dtype) if ctx.weight is None else ctx.weight
            dx = dy @ weight
            dx = dx.addmm_(d_hidden, low_a).view(ctx.shape)
        da = (d_hidden.T @ flat).to(ctx.dtypes[0])
        db = (dy.T @ hidden).to(ctx.dtypes[1]) * ctx.scale
        return dx, None, da, db, None, None


class FrozenRMSNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps), no gradient for w (Zhang and Sennrich 2019).

    With n = x / rms and g = dy w: dx = (g - n mean(g n)) / rms, in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normal = x.float() * inverse
        g = grads[0] * weight.float()
        mean = (g * normal).mean(-1, keepdim=True)
        return g.sub_(normal.mul_(mean)).mul_(inverse).to(x.dtype), None, None


def frozen_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """Weight (d_out, d_in) of a linear layer, dequantised if it is 4-bit."""
    weight = base.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.to(dtype)
    import bitsandbytes.functional as bnb  # only a 4-bit model needs it

    if getattr(state, "packing_format_for_cpu", False):
        # Scoring repacked it for another kernel; put it back, as its layer would.
        weight.data, weight.quant_state = bnb._convert_weight_packed_for_cpu_inverse(
            weight.data, state)
    return bnb.dequantize_4bit(weight.data, weight.quant_state).to(dtype)


@contextlib.contextmanager
def decoded(model: nn.Module) -> Iterator[None]:
    """Compute 4-bit layers on a CPU with weights that are dequantised once.

    Their own kernel decodes the weights anew for every few rows: fit for one
    answer on a small machine, slow for the many rows of a score. The weights
    are the same; the block takes 2 bytes for each of them.
    """
    layers = [m for m in model.modules() if hasattr(m, "compute_dtype")
              and hasattr(m.weight, "quant_state") and m.weight.device.type == "cpu"]
    for layer in layers:
        weight = frozen_weight(layer, layer.compute_dtype or torch.float32)
        layer.forward = functools.partial(_plain_forward, weight=weight, bias=layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _plain_forward(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(weight.dtype)
    return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _lora_forward(self: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.disable_adapters or self.merged or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    name = self.active_adapters[0]
    base = self.get_base_layer()
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return LoraLinear.apply(x, base, a, b, self.scaling[name], base.bias)


def _norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    return FrozenRMSNorm.apply(x, self.weight, self.variance_epsilon)


def _plain_lora(module: nn.Module) -> bool:
    """One active adapter on a frozen linear, without dropout, bias or variant (DoRA)."""
    if not isinstance(module, LoraLayer) or len(module.active_adapters) != 1:
        return False
    base, name = module.get_base_layer(), module.active_adapters[0]
    linear = type(base).__name__ in ("Linear", "Linear4bit")
    return (linear and not module.merged
            and not any(p.requires_grad for p in base.parameters())
            and isinstance(module.lora_dropout[name], nn.Identity)
            and name not in module.lora_variant and not module.lora_bias.get(name))


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """Run the model's LoRA linears and frozen norms fused; yields how many.

    Attention is eager meanwhile: on a CPU the fused kernel's backward pass is
    many times slower on short sequences (its forward pass is not).
    """
    changed = []
    owner = model.get_base_model() if isinstance(model, PeftModel) else model
    attention = getattr(getattr(owner, "config", None), "_attn_implementation", None)
    if attention == "sdpa" and not torch.cuda.is_available():
        owner.set_attn_implementation("eager")
    for module in model.modules():
        if "forward" in vars(module):
            continue  # someone else's hook
        if _plain_lora(module):
            module.forward = types.MethodType(_lora_forward, module)
        elif type(module).__name__ in NORMS and not module.weight.requires_grad:
            module.forward = types.MethodType(_norm_forward, module)
        else:
            continue
        changed.append(module)
    try:
        yield len(changed)
    finally:
        for module in changed:
            del module.forward
        if attention == "sdpa" and not torch.cuda.is_available():
            owner.set_attn_implementation("sdpa")
