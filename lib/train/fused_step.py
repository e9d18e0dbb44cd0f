"""The same training step in fewer passes over memory, which take most of its time on a CPU.

Backward passes by hand: of a frozen linear layer with its adapter, of RMSNorm with a frozen gain.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lib.base.model import frozen_weight

# Norms that compute x / rms(x) * weight. Others (1 + weight) are left alone.
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class LoraLinear(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T with W frozen (Hu et al. 2021, section 4.1).

    Shapes: x (..., d_in), W (d_out, d_in), A (r, d_in), B (d_out, r). It computes in the dtype
    of x; A and B may be float32 and then get float32 gradients:
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
        ctx.base, ctx.scale, ctx.shape, ctx.dtypes = base, scale, x.shape, (a.dtype, b.dtype)
        # The layer may point to another weight by the time of the backward pass. Only a 4-bit
        # weight is decoded a second time, to save memory.
        ctx.weight = None if hasattr(base.weight, "quant_state") else weight.detach()
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, low_a, low_b, hidden = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        d_hidden = dy @ low_b
        dx = None
        if ctx.needs_input_grad[0]:
            weight = frozen_weight(ctx.base, dy.dtype) if ctx.weight is None else ctx.weight
            dx = (dy @ weight).addmm_(d_hidden, low_a).view(ctx.shape)
        da = (d_hidden.T @ flat).to(ctx.dtypes[0])
        db = (dy.T @ hidden).to(ctx.dtypes[1]) * ctx.scale
        return dx, None, da, db, None, None


class FrozenRMSNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps), without a gradient for w (Zhang and Sennrich 2019).

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
    """Run the model's LoRA linears and frozen norms fused in the block; yields their number."""
    # On a CPU the backward pass of "sdpa" is many times slower on short sequences than eager.
    fused_modules = []
    owner = model.get_base_model() if isinstance(model, PeftModel) else model
    kind = getattr(getattr(owner, "config", None), "_attn_implementation", None)
    eager = kind == "sdpa" and not torch.cuda.is_available()
    if eager:
        owner.set_attn_implementation("eager")
    for module in model.modules():
        if "forward" in vars(module):
            continue  # a hook of another library
        if isinstance(module, LoraLayer) and _is_plain(module):
            module.forward = types.MethodType(_lora_forward, module)
        elif type(module).__name__ in NORMS and not module.weight.requires_grad:
            module.forward = types.MethodType(lambda self, x: FrozenRMSNorm.apply(
                x, self.weight, self.variance_epsilon), module)
        else:
            continue
        fused_modules.append(module)
    try:
        yield len(fused_modules)
    finally:
        for module in fused_modules:
            del module.forward
        if eager:
            owner.set_attn_implementation("sdpa")
