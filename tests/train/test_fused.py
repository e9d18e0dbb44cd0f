"""The fused step: the hand-written passes equal peft's and autograd's, and leave no trace."""

import contextlib
import copy
import types
from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lib.base.model import MODULE_KINDS, decoded, frozen_weight, load_model
from lib.train.lora import LoraLinear, fused
from lib.train.training import base_for

RELATIVE = 1e-5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def adapted(model: nn.Module, targets: list[str] | None = None, **options: object) -> PeftModel:
    """peft's model with random A and B, in training mode."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets or list(MODULE_KINDS), **options)
    peft = get_peft_model(model, config)
    for index, (name, parameter) in enumerate(peft.named_parameters()):
        if "lora_" in name and "magnitude" not in name:
            parameter.data = random(*parameter.shape, seed=index, dtype=parameter.dtype) * 0.2
    return peft.train()


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a fixed batch, and the gradient of every trainable parameter."""
    ids = torch.randint(3, 49152, (2, 9), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()
                           if p.grad is not None}


def assert_near(ours: Tensor, theirs: Tensor, relative: float = RELATIVE) -> None:
    """Equal to `relative`, measured against the largest element."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    scale = theirs.abs().max()
    assert scale > 0
    assert (ours - theirs).abs().max() <= relative * scale


class Holder(nn.Module):
    """A model that is one layer, so that peft can adapt it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.only = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


@pytest.mark.parametrize("targets", [["q_proj"], list(MODULE_KINDS)])
def test_model_equals_stock_peft(tiny: LlamaForCausalLM, targets: list[str]) -> None:
    model = adapted(tiny, targets)
    loss, gradients = loss_and_gradients(model)
    with fused(model) as count:
        assert count == 2 * len(targets)
        our_loss, our_gradients = loss_and_gradients(model)
    torch.testing.assert_close(our_loss, loss, rtol=RELATIVE, atol=0)
    assert set(our_gradients) == set(gradients) and len(gradients) == 2 * 2 * len(targets)
    for name, gradient in gradients.items():
        assert_near(our_gradients[name], gradient)


@pytest.mark.parametrize("bias", [False, True])
def test_lora_gradient_in_float64(bias: bool) -> None:
    base = nn.Linear(6, 5, bias=bias, dtype=torch.float64).requires_grad_(False)
    inputs = [random(*shape, seed=i, dtype=torch.float64).requires_grad_()
              for i, shape in enumerate([(2, 3, 6), (4, 6), (5, 4)])]

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return LoraLinear.apply(x, base, a, b, 1.7, base.bias)

    assert torch.autograd.gradcheck(call, inputs)
    x, a, b = inputs
    expected = x @ (base.weight + 1.7 * b @ a).T + (base.bias if bias else 0)
    torch.testing.assert_close(call(x, a, b), expected)


def test_bfloat16_input_with_float32_adapter() -> None:
    """Compute in bfloat16, with float32 gradients for a float32 adapter."""
    base = nn.Linear(8, 6, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = random(3, 8).bfloat16().requires_grad_()
    a, b = random(4, 8, seed=1).requires_grad_(), random(6, 4, seed=2).requires_grad_()
    y = LoraLinear.apply(x, base, a, b, 2.0, None)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert a.grad.dtype == b.grad.dtype == torch.float32
    wide = [t.detach().float().requires_grad_() for t in (x, a, b)]
    (wide[0] @ (base.weight.float() + 2.0 * wide[2] @ wide[1]).T).sum().backward()
    for ours, theirs in zip((x, a, b), wide, strict=True):
        assert_near(ours.grad.float(), theirs.grad, 2**-5)


# 4-bit layers


def four_bit(double: bool = True) -> tuple[bnb.nn.Linear4bit, Tensor]:
    """An NF4 layer 128 -> 64, and its weight in float32."""
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32,
                              quant_type="nf4", compress_statistics=double)
    layer.load_state_dict({"weight": random(64, 128, seed=7) * 0.1})
    layer = layer.to("cpu")
    if layer.weight.quant_state is None:
        layer.weight._quantize("cpu")
    return layer, dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def score(layer: bnb.nn.Linear4bit) -> None:
    """Use a layer as generation does: on a CPU with AVX-512 bf16, bitsandbytes repacks it."""
    layer.support_avx512bf16_for_cpu = has_avx512bf16()  # tests turn this off elsewhere
    layer.eval()
    with torch.inference_mode():
        layer(random(3, 128))
    layer.train()
    assert getattr(layer.weight.quant_state, "packing_format_for_cpu", False) == bool(
        has_avx512bf16())


@pytest.mark.parametrize("double", [False, True])
def test_frozen_weight_of_a_4bit_layer(double: bool) -> None:
    layer, weight = four_bit(double)
    assert layer.weight.dtype == torch.uint8
    assert torch.equal(frozen_weight(layer, torch.float32), weight)
    assert frozen_weight(layer, torch.bfloat16).dtype == torch.bfloat16
    if double:  # as in the course; bitsandbytes undoes its repacking only there
        score(layer)
        assert_near(frozen_weight(layer, torch.float32), weight, 2**-7)  # bfloat16 scales


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("inside", [False, True], ids=["stock", "fused"])
def test_4bit_model_equals_the_dequantised_model(tiny_directory: str, inside: bool) -> None:
    """Gradients through an NF4 model, bitsandbytes' and ours, against a plain model's."""
    quantized, plain = base_for("qlora", tiny_directory), load_model(tiny_directory)
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        state = layer.weight.quant_state
        assert state.nested and state.quant_type == "nf4"  # double quantisation
        plain.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, state).float()
    loss, gradients = loss_and_gradients(adapted(plain))
    model = adapted(quantized)
    with fused(model) if inside else contextlib.nullcontext():
        our_loss, our_gradients = loss_and_gradients(model)
    torch.testing.assert_close(our_loss, loss, rtol=RELATIVE, atol=0)
    assert our_gradients.keys() == gradients.keys() and len(gradients) == 28
    for name, gradient in gradients.items():
        assert_near(our_gradients[name], gradient, 1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_decoded_layer_is_the_layer(bias: bool) -> None:
    """Same output as the 4-bit kernel; afterwards the layer is as before."""
    layer, _ = four_bit()  # in training mode it dequantises, in float32
    if bias:
        layer.bias = nn.Parameter(random(64))
    plain = nn.Linear(4, 4)
    codes, x = layer.weight.data.clone(), random(5, 128, seed=1)
    wanted = layer(x)
    with decoded(nn.Sequential(layer, plain)):
        assert "forward" in vars(layer) and "forward" not in vars(plain)
        assert_near(layer(x), wanted, 1e-6)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert "forward" not in vars(layer)
    assert torch.equal(layer.weight.data, codes) and torch.equal(layer(x), wanted)


# What is fused, and what is left alone


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_stock_forward_is_back_afterwards(tiny: LlamaForCausalLM,
                                          error: type[BaseException] | None) -> None:
    model = adapted(tiny)
    with pytest.raises(error) if error else contextlib.nullcontext(), fused(model):
        assert sum("forward" in vars(m) for m in model.modules()) == 14
        if error:
            raise error
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_wrapped_forward_survives() -> None:
    """accelerate's hooks replace the forward of a module: they must stay."""
    model = adapted(Holder(nn.Linear(4, 4)), ["only"])
    layer = model.base_model.model.only
    hook = types.MethodType(lambda self, x: type(self).forward(self, x), layer)
    layer.forward = hook
    with fused(model) as count:
        assert count == 0
    assert layer.forward is hook


def two_adapters(model: PeftModel) -> None:
    model.add_adapter("second", LoraConfig(r=4, target_modules=["only"]))
    model.base_model.set_adapter(["default", "second"])


def train_base(model: PeftModel) -> None:
    model.base_model.model.only.get_base_layer().weight.requires_grad_()


def other_kind(model: PeftModel) -> None:
    class Other(nn.Linear):
        """A layer that may compute something else."""

    model.base_model.model.only.get_base_layer().__class__ = Other


@pytest.mark.parametrize(("options", "change"), [
    ({"lora_dropout": 0.5}, None),
    ({"use_dora": True}, None),
    ({"lora_bias": True}, None),
    ({}, two_adapters),
    ({}, lambda model: model.merge_adapter()),
    ({}, train_base),
    ({}, other_kind),
], ids=["dropout", "dora", "lora_bias", "two_adapters", "merged", "trained_base", "other_kind"])
def test_other_layers_are_left_alone(
    options: dict[str, object], change: Callable[[PeftModel], None] | None
) -> None:
    torch.manual_seed(0)
    model = adapted(Holder(nn.Linear(6, 6)), ["only"], **options)
    with fused(model) as count:
        assert count == 1 or options  # the plain layer is fused, so this test can fail
    if change:
        change(model)
    stock = copy.deepcopy(model)
    x = random(3, 6)
    with fused(model) as count:
        assert count == 0
        torch.manual_seed(1)
        ours = model(x)
    torch.manual_seed(1)
    assert torch.equal(ours, stock(x))


def test_disabled_adapter_is_disabled_inside(tiny: LlamaForCausalLM) -> None:
    model = adapted(tiny, ["q_proj"])
    ids = torch.arange(3, 11)[None]
    with torch.no_grad(), model.disable_adapter():
        stock = model(input_ids=ids).logits
        with fused(model):
            ours = model(input_ids=ids).logits
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
