"""lib.fused: the hand-written passes equal peft's and autograd's, and leave no trace."""

import copy
import types
from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lib.base_model import load_model
from lib.fused import FrozenRMSNorm, LoraLinear, decoded, frozen_weight, fused

Gradients = dict[str, Tensor]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RELATIVE = 1e-5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def adapted(model: nn.Module, targets: list[str] | None = None, **options: object) -> PeftModel:
    """peft's model with random A and B, in training mode."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets or ALL, **options)
    peft = get_peft_model(model, config)
    for index, (name, parameter) in enumerate(peft.named_parameters()):
        if "lora_" in name and "magnitude" not in name:
            parameter.data = random(*parameter.shape, seed=index, dtype=parameter.dtype) * 0.2
    return peft.train()


def loss_and_gradients(model: nn.Module, seed: int = 0) -> tuple[Tensor, Gradients]:
    """Loss of a fixed batch, and the gradient of every trainable parameter."""
    ids = torch.randint(3, 49152, (2, 9), generator=torch.Generator().manual_seed(seed))
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
    """A model that is one linear layer, so that peft can adapt it."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.only = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


@pytest.mark.parametrize("targets", [["q_proj"], ALL])
def test_model_equals_stock_peft(tiny: LlamaForCausalLM, targets: list[str]) -> None:
    model = adapted(tiny, targets)
    loss, gradients = loss_and_gradients(model)
    with fused(model) as changed:
        assert changed == 2 * len(targets) + 5  # adapters, and 2 norms a block + 1
        ours, our_gradients = loss_and_gradients(model)
    torch.testing.assert_close(ours, loss, rtol=RELATIVE, atol=0)
    assert set(our_gradients) == set(gradients)
    assert len(gradients) == 2 * 2 * len(targets)
    for name, gradient in gradients.items():
        assert_near(our_gradients[name], gradient)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_layer_equals_stock_peft(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model = adapted(Holder(nn.Linear(5, 7, bias=bias)), ["only"], use_rslora=True)
    x = random(*shape, seed=1)
    results = []
    for inside in (False, True):
        point = x.clone().requires_grad_()
        model.zero_grad()
        if inside:
            with fused(model) as changed:
                assert changed == 1
                y = model(point)
                y.sin().sum().backward()
        else:
            y = model(point)
            y.sin().sum().backward()
        layer = model.base_model.model.only
        results.append((y, point.grad, layer.lora_A["default"].weight.grad.clone(),
                        layer.lora_B["default"].weight.grad.clone()))
    for theirs, ours in zip(*results, strict=True):
        assert_near(ours, theirs)


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


def test_norm_gradient_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function works in float32 by design; here its formula does in float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    x = random(2, 3, 6, seed=3, dtype=torch.float64).requires_grad_()
    weight = random(6, seed=4, dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        return FrozenRMSNorm.apply(x, weight, 1e-3)

    assert torch.autograd.gradcheck(call, [x])
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(call(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_equals_transformers(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(16, eps=1e-4)
    norm.weight.data = random(16, seed=5).abs()
    norm = norm.to(dtype).requires_grad_(False)
    point = random(2, 3, 16, seed=6).to(dtype)
    results = []
    for inside in (False, True):
        x = point.clone().requires_grad_()
        model = Holder(norm)
        if inside:
            with fused(model) as changed:
                assert changed == 1
                y = model(x)
        else:
            y = model(x)
        y.float().sin().sum().backward()
        results.append((y, x.grad))
    for theirs, ours in zip(*results, strict=True):
        # bfloat16 keeps 8 bits, and the stock norm rounds once more than ours.
        assert_near(ours, theirs, RELATIVE if dtype == torch.float32 else 2**-6)


def four_bit(double: bool = True) -> tuple[bnb.nn.Linear4bit, Tensor]:
    """An NF4 layer 128 -> 64, and its weight in float32."""
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32,
                              quant_type="nf4", compress_statistics=double)
    layer.load_state_dict({"weight": random(64, 128, seed=7) * 0.1})
    layer = layer.to("cpu")
    if layer.weight.quant_state is None:
        layer.weight._quantize("cpu")
    return layer, dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


@pytest.mark.parametrize("double", [False, True])
def test_frozen_weight_of_a_4bit_layer(double: bool) -> None:
    layer, weight = four_bit(double)
    assert layer.weight.dtype == torch.uint8
    assert torch.equal(frozen_weight(layer, torch.float32), weight)
    assert frozen_weight(layer, torch.bfloat16).dtype == torch.bfloat16
    plain = nn.Linear(3, 2)
    assert torch.equal(frozen_weight(plain, torch.float32), plain.weight)


def test_4bit_layer_equals_its_dequantised_weight() -> None:
    layer, weight = four_bit()
    inputs = [random(2, 3, 128, seed=1), random(4, 128, seed=2), random(64, 4, seed=3)]
    ours = [t.clone().requires_grad_() for t in inputs]
    theirs = [t.clone().requires_grad_() for t in inputs]
    y = LoraLinear.apply(ours[0], layer, ours[1], ours[2], 0.5, None)
    x, a, b = theirs
    expected = x @ (weight + 0.5 * b @ a).T
    assert_near(y, expected)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine.grad, other.grad)


@pytest.mark.usefixtures("float32")
def test_4bit_model_equals_the_dequantised_model(tiny_directory: str) -> None:
    """All gradients of an NF4 model against a plain model with its weights."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32)
    quantized = load_model(tiny_directory, quantization_config=config)
    plain = load_model(tiny_directory)
    count = 0
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            weight = dequantize_4bit(module.weight.data, state).float()
            plain.get_submodule(name).weight.data = weight
            count += 1
    assert count == 14
    loss, gradients = loss_and_gradients(adapted(plain))
    model = adapted(quantized)
    with fused(model) as changed:
        assert changed == 14 + 5
        ours, our_gradients = loss_and_gradients(model)
    torch.testing.assert_close(ours, loss, rtol=RELATIVE, atol=0)
    assert len(gradients) == 28
    for name, gradient in gradients.items():
        assert_near(our_gradients[name], gradient, 1e-4)


def scored(layer: bnb.nn.Linear4bit) -> None:
    """Use a layer as generation does: evaluation mode, no gradients wanted."""
    layer.support_avx512bf16_for_cpu = has_avx512bf16()  # as it is outside of tests
    layer.eval()
    with torch.inference_mode():
        layer(random(3, 128))
    layer.train()
    assert getattr(layer.weight.quant_state, "packing_format_for_cpu", False) == bool(
        has_avx512bf16())


def test_frozen_weight_after_scoring() -> None:
    """bitsandbytes repacks a scored layer on a CPU with AVX-512 bf16: same weight still."""
    layer, weight = four_bit()
    scored(layer)
    # The scales of a repacked layer are bfloat16: 8 bits.
    assert_near(frozen_weight(layer, torch.float32), weight, 2**-7)


def test_training_after_scoring() -> None:
    """Score the base, then train on it: output and gradients are still right."""
    layer, weight = four_bit()
    scored(layer)
    inputs = [random(6, 128, seed=1), random(4, 128, seed=2), random(64, 4, seed=3)]
    ours = [t.clone().requires_grad_() for t in inputs]
    theirs = [t.clone().requires_grad_() for t in inputs]
    y = LoraLinear.apply(ours[0], layer, ours[1], ours[2], 0.5, None)
    x, a, b = theirs
    expected = x @ (weight + 0.5 * b @ a).T
    y.sum().backward()
    expected.sum().backward()
    assert_near(y, expected, 2**-6)
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine.grad, other.grad, 2**-6)


def test_bfloat16_input_with_float32_adapter() -> None:
    """Work in bfloat16, gradients in float32 where the adapter is."""
    base = nn.Linear(8, 6, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = random(3, 8).bfloat16().requires_grad_()
    a, b = random(4, 8, seed=1).requires_grad_(), random(6, 4, seed=2).requires_grad_()
    y = LoraLinear.apply(x, base, a, b, 2.0, None)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert a.grad.dtype == b.grad.dtype == torch.float32
    wide = [t.detach().float().requires_grad_() for t in (x, a, b)]
    expected = wide[0] @ (base.weight.float() + 2.0 * wide[2] @ wide[1]).T
    expected.sum().backward()
    for ours, theirs in zip((x, a, b), wide, strict=True):
        assert_near(ours.grad.float(), theirs.grad, 2**-5)


def test_stock_forward_is_back_afterwards(tiny: LlamaForCausalLM) -> None:
    model = adapted(tiny)
    before = {n: m.forward.__func__ for n, m in model.named_modules()}
    with fused(model):
        inside = {n: m.forward.__func__ for n, m in model.named_modules()}
        assert sum(inside[n] is not f for n, f in before.items()) == 19
    after = {n: m.forward.__func__ for n, m in model.named_modules()}
    assert after == before
    assert not any("forward" in vars(m) for m in model.modules())


def test_stock_forward_is_back_after_an_error(tiny: LlamaForCausalLM) -> None:
    model = adapted(tiny)
    with pytest.raises(KeyboardInterrupt), fused(model):
        raise KeyboardInterrupt
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_wrapped_forward_survives() -> None:
    """accelerate's hooks are forwards of one module: they must be there afterwards."""
    model = adapted(Holder(nn.Linear(4, 4)), ["only"])
    layer = model.base_model.model.only
    hooked = types.MethodType(lambda self, x: type(self).forward(self, x), layer)
    layer.forward = hooked
    with fused(model):
        pass
    assert layer.forward is hooked


def two_adapters(model: PeftModel) -> None:
    model.add_adapter("second", LoraConfig(r=4, target_modules=["only"]))
    model.base_model.set_adapter(["default", "second"])


def merge_adapter(model: PeftModel) -> None:
    model.merge_adapter()


def train_base(model: PeftModel) -> None:
    model.base_model.model.only.get_base_layer().weight.requires_grad_()


def train_bias(model: PeftModel) -> None:
    model.base_model.model.only.get_base_layer().bias.requires_grad_()


@pytest.mark.parametrize(("options", "change"), [
    ({"lora_dropout": 0.5}, None),
    ({"use_dora": True}, None),
    ({"lora_bias": True}, None),
    ({}, two_adapters),
    ({}, merge_adapter),
    ({}, train_base),
    ({}, train_bias),
], ids=["dropout", "dora", "lora_bias", "two_adapters", "merged", "trained_base",
        "trained_bias"])
def test_other_layers_are_left_alone(
    options: dict[str, object], change: Callable[[PeftModel], None] | None
) -> None:
    torch.manual_seed(0)
    model = adapted(Holder(nn.Linear(6, 6)), ["only"], **options)
    with fused(model) as changed:
        assert changed == 1 or options  # the plain layer is taken, so this test can fail
    if change:
        change(model)
    stock = copy.deepcopy(model)
    x = random(3, 6)
    with fused(model) as changed:
        assert changed == 0
        torch.manual_seed(1)
        ours = model(x)
    torch.manual_seed(1)
    assert torch.equal(ours, stock(x))


@pytest.mark.parametrize("base", [nn.Conv1d(4, 4, 1), nn.Embedding(8, 4)])
def test_other_kinds_of_base_are_left_alone(base: nn.Module) -> None:
    model = adapted(Holder(base), ["only"])
    with fused(model) as changed:
        assert changed == 0


def test_activated_lora_is_left_alone(tiny: LlamaForCausalLM) -> None:
    """aLoRA adapts only the tokens after its invocation: a variant like DoRA."""
    model = adapted(tiny, ["q_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    with fused(model) as changed:
        assert changed == 5  # the norms


def test_disabled_adapter_is_disabled_inside(tiny: LlamaForCausalLM) -> None:
    model = adapted(tiny, ["q_proj"])
    ids = torch.arange(3, 11)[None]
    with torch.no_grad(), model.disable_adapter():
        stock = model(input_ids=ids).logits
    with torch.no_grad(), fused(model), model.disable_adapter():
        ours = model(input_ids=ids).logits
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_a_norm_with_one_plus_weight_is_left_alone() -> None:
    model = Holder(GemmaRMSNorm(8).requires_grad_(False))
    stock = model(random(2, 8))
    with fused(model) as changed:
        assert changed == 0
        assert torch.equal(model(random(2, 8)), stock)


def test_a_trained_norm_is_left_alone() -> None:
    model = Holder(LlamaRMSNorm(8))
    with fused(model) as changed:
        assert changed == 0
    model.requires_grad_(False)
    with fused(model) as changed:
        assert changed == 1


@pytest.mark.parametrize("bias", [False, True])
def test_decoded_layer_is_the_layer(bias: bool) -> None:
    """Same output as the 4-bit kernel, own forward back afterwards, weight untouched."""
    layer, _ = four_bit()  # in training mode it dequantises, in float32
    if bias:
        layer.bias = nn.Parameter(random(64))
    codes, x = layer.weight.data.clone(), random(5, 128, seed=1)
    wanted = layer(x)
    with decoded(nn.Sequential(layer)):
        assert layer.forward.func.__name__ == "_plain_forward"
        assert_near(layer(x), wanted, 1e-6)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert "forward" not in vars(layer)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(layer(x), wanted)


def test_decoded_leaves_other_layers() -> None:
    plain = nn.Linear(4, 4)
    with decoded(plain):
        assert "forward" not in vars(plain)
