"""One model and one adapter for every configuration."""

import contextlib
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_adapter
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.evidence import alternate
from lib.base.embedded import EMBEDDED
from lib.base.model import MODULE_KINDS, load_tokenizer
from lib.base.records import sensors
from lib.coa.adapter import (
    LEAST_LOSS,
    NAME,
    OWNED,
    CoaLora,
    MixingNetwork,
    _descend_on_logarithm,
    learned_a,
    start_owned,
    train_joint,
    train_over,
)
from lib.coa.configuration import (
    Configuration,
    Layers,
    Switchable,
    best_formats,
    random_configuration,
)
from lib.errors import UserError
from lib.evaluate.scores import answer_loss
from lib.files import read_json, write_json, writing
from lib.quantize import merging
from lib.quantize.correction import input_roots, low_rank
from lib.quantize.formats import FORMATS, GRID, Format, GgufFormat, round_trip
from lib.settings import METHODS, TrainSettings
from lib.train import training
from lib.train.lora import count_trainable, fused, load_adapter

IDS = torch.tensor([[5, 900, 17, 3, 42, 7]])
Make = Callable[[], PreTrainedModel]
pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture
def base(tiny: PreTrainedModel) -> Switchable:
    return Switchable(tiny, dtype=torch.float32)


def some(base: Switchable, seed: int = 0, budget: float = 4.0) -> Configuration:
    return random_configuration(base.layers, budget, random.Random(seed))


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(model: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in state(model).items())


def cached_mb(base: Switchable) -> float:
    return sum(tensor.nbytes for tensor in base._cache.values()) / 1e6


def adapted(base: Switchable, *, seed: int = 0, mixing: float = 0.0) -> CoaLora:
    """A random adapter on all seven module kinds; `mixing` makes theta's last layer random."""
    coa = CoaLora(with_adapter(base.model, seed=seed, target_modules=list(MODULE_KINDS)), base)
    if mixing:
        torch.nn.init.normal_(coa.network.network[-1].weight, std=mixing)
    return coa


# The switchable model


def test_switching_changes_the_linears_alone(tiny: PreTrainedModel) -> None:
    """The released code deletes the linears' biases and un-pickles a model for each switch."""
    tiny.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.ones(128))
    base, before = Switchable(tiny, dtype=torch.float32), state(tiny)
    configuration = some(base)
    base.switch(configuration)
    for name, tensor in state(tiny).items():
        layer = name.removesuffix(".weight")
        if layer in base.layers.names:
            fmt = configuration.formats[base.layers.names.index(layer)]
            assert torch.equal(tensor, round_trip(before[name], fmt))
        else:
            assert torch.equal(tensor, before[name]), name
    assert base.configuration is configuration and base.model is tiny


def test_back_and_forth_is_bit_for_bit(base: Switchable) -> None:
    original, first = state(base.model), some(base, 1)
    base.switch(first)
    at_first = state(base.model)
    for seed in range(5):
        base.switch(some(base, seed + 2))
    base.switch(first)
    assert same(base.model, at_first)
    base.restore()
    assert same(base.model, original) and base.configuration is None


def test_the_cache_keeps_its_limit(make_tiny: Make) -> None:
    one = sum(Layers.of(make_tiny()).sizes) * 4 / 1e6
    base = Switchable(make_tiny(), dtype=torch.float32, cache_mb=2.5 * one)
    configurations = [Configuration.uniform(base.layers, Format(bits)) for bits in (2, 3, 4, 8)]
    for configuration in configurations:
        base.switch(configuration)
        assert cached_mb(base) <= 2.5 * one + 1e-9
    address = base.model.model.layers[0].mlp.up_proj.weight.data_ptr()
    base.switch(configurations[2])
    base.switch(configurations[3])
    assert base.model.model.layers[0].mlp.up_proj.weight.data_ptr() == address
    tight = Switchable(make_tiny(), dtype=torch.float32, cache_mb=0)
    for model in (tight, base):
        model.switch(configurations[0])
    assert cached_mb(tight) == 0
    assert torch.equal(logits(tight.model), logits(base.model))


def test_a_refused_configuration_changes_nothing(make_tiny: Make, tmp_path: Path) -> None:
    broken = make_tiny()
    broken.model.layers[1].self_attn.v_proj.weight.data[3, 3] = float("inf")
    base = Switchable(broken, dtype=torch.float32, cache_mb=0)
    before = state(base.model)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_proj: a weight is not fin"):
        base.switch(Configuration.uniform(base.layers, Format()))
    assert cached_mb(base) == 0
    first = Layers(*(part[:7] for part in vars(base.layers).values()))
    other = Configuration.uniform(first, Format())
    with pytest.raises(UserError, match="for another model, with other layers .7 instead of 14"):
        base.switch(other)
    with pytest.raises(UserError, match="another model"):
        adapted(Switchable(make_tiny())).materialise(other, tmp_path / "out")
    assert same(base.model, before) and not (tmp_path / "out").exists()


def test_the_fingerprint_is_the_weights(make_tiny: Make, tiny_directory: str) -> None:
    base = Switchable(make_tiny(), dtype=torch.float32)
    base.switch(Configuration.uniform(base.layers, Format(2)))
    assert base.fingerprint == Switchable(make_tiny()).fingerprint
    changed = make_tiny()
    changed.model.layers[0].mlp.up_proj.weight.data.mul_(1.01)
    assert Switchable(changed).fingerprint != base.fingerprint
    assert Switchable.load(tiny_directory).name == tiny_directory


# The adapter


def test_starts_as_plain_lora(base: Switchable) -> None:
    base.switch(some(base))
    model = with_adapter(base.model, target_modules=list(MODULE_KINDS))
    plain = logits(model)
    coa = CoaLora(model, base)
    assert torch.equal(logits(model), plain) and not coa.mixers.any()


def test_the_update_is_the_formula(base: Switchable) -> None:
    coa, configuration = adapted(base, mixing=0.3), some(base)
    base.switch(configuration)
    logits(coa.model)
    mixers = coa.network(configuration)
    for index in (0, 5, 13):
        layer = coa.lora_layers[base.layers.names[index]]
        x = torch.randn(3, layer.in_features)
        a = layer.lora_A[NAME].parametrizations.weight.original
        b, eye = layer.lora_B[NAME].weight, torch.eye(4)
        update = 12 / 4 * b @ (eye + mixers[index]) @ a
        expected = x @ (layer.base_layer.weight + update).T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_each_format_and_layer_has_its_own_mixing(base: Switchable) -> None:
    network = MixingNetwork(base.layers, 4)
    torch.nn.init.normal_(network.network[-1].weight)
    seen = [network(Configuration.uniform(base.layers, fmt)) for fmt in FORMATS[::29]]
    for i, one in enumerate(seen):
        assert all(not torch.allclose(one, other) for other in seen[:i])
        flat = one.flatten(1)
        assert (torch.cdist(flat, flat) + torch.eye(len(flat)) > 1e-3).all()


def test_saved_and_loaded(make_tiny: Make, tmp_path: Path) -> None:
    base = Switchable(make_tiny(), dtype=torch.float32)
    coa, configuration = adapted(base, mixing=0.3), some(base)
    base.switch(configuration)
    expected = logits(coa.model)
    with writing(tmp_path / "coa", **coa.facts) as part:
        coa.write(part)
    assert {p.suffix for p in (tmp_path / "coa").iterdir()} == {".json", ".safetensors"}
    other = Switchable(make_tiny(), dtype=torch.float32)
    loaded = CoaLora.from_pretrained(other, tmp_path / "coa")
    other.switch(configuration)
    assert torch.equal(logits(loaded.model), expected)
    # Without theta, or without a configuration, it is an ordinary adapter: LoRA with U = 0.
    plain = PeftModel.from_pretrained(make_tiny(), str(tmp_path / "coa"))
    base.restore()
    assert torch.equal(logits(plain), logits(coa.model)) and not coa.mixers.any()
    # peft's way to save gives the same files.
    coa.model.save_pretrained(tmp_path / "again")
    assert all((tmp_path / "again" / f.name).read_bytes() == f.read_bytes()
               for f in (tmp_path / "coa").iterdir() if f.name != "manifest.json")


def test_materialised_is_plain_peft(make_tiny: Make, tmp_path: Path) -> None:
    base = Switchable(make_tiny(), dtype=torch.float32)
    coa = adapted(base, mixing=0.3)
    for seed in range(3):
        configuration, out = some(base, seed, 3.0 + seed), tmp_path / f"{seed}"
        coa.materialise(configuration, out)
        assert {p.name for p in out.iterdir()} == {
            "adapter_model.safetensors", "adapter_config.json", "manifest.json"}
        base.switch(configuration)
        stock = Switchable(make_tiny(), dtype=torch.float32)
        stock.switch(configuration)
        theirs = PeftModel.from_pretrained(stock.model, str(out))
        torch.testing.assert_close(logits(theirs), logits(coa.model), rtol=0, atol=1e-4)
        assert load_adapter(make_tiny(), out)
        assert read_json(out / "manifest.json")["configuration"] == configuration.to_json()


def test_generate_uses_the_current_configuration(make_tiny: Make, tmp_path: Path) -> None:
    """peft's generate bypasses peft's forward: nothing runs between switch and generate."""
    base = Switchable(make_tiny(), dtype=torch.float32)
    coa, answers = adapted(base, mixing=2.0), []
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for seed in range(2):
        configuration = some(base, seed)
        base.switch(configuration)
        coa.materialise(configuration, tmp_path / f"{seed}")
        answers.append(coa.model.generate(input_ids=IDS, **options)[0].tolist())
        stock = Switchable(make_tiny(), dtype=torch.float32)
        stock.switch(configuration)
        theirs = PeftModel.from_pretrained(stock.model, str(tmp_path / f"{seed}"))
        assert theirs.generate(input_ids=IDS, **options)[0].tolist() == answers[-1]
    assert answers[0] != answers[1]


def test_merging_into_shared_weights_is_refused(base: Switchable) -> None:
    coa = adapted(base)
    base.switch(some(base))
    before = state(base.model)
    for merge in (coa.model.merge_adapter, coa.model.merge_and_unload):
        with pytest.raises(UserError, match="materialise"):
            merge()
    assert same(base.model, before)


def test_the_fused_step_has_the_stock_gradients(make_tiny: Make) -> None:
    """With mixing on, and two configurations in one backward pass."""
    grads = []
    for step in (contextlib.nullcontext, fused):
        base = Switchable(make_tiny(), dtype=torch.float32)
        coa = adapted(base, mixing=0.3)
        coa.model.train()
        with step(coa.model):
            total = torch.zeros(())
            for seed in range(2):
                base.switch(some(base, seed))
                loss = coa.model(input_ids=IDS, labels=IDS).loss
                if step is fused:
                    total = total + loss
                else:
                    loss.backward()
            if step is fused:
                total.backward()
        grads.append({n: p.grad for n, p in coa.model.named_parameters() if p.requires_grad})
    stock, ours = grads
    assert any("coa_network" in name for name in stock)
    for name, gradient in stock.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_an_adapter_of_some_layers_is_refused(base: Switchable) -> None:
    with pytest.raises(UserError, match=r"k_proj has no adapter"):
        CoaLora(with_adapter(base.model), base)


@pytest.mark.parametrize(("fact", "value", "word"), [
    ("base_hash", "0" * 64, "another base"), ("grid", "int", "is of another version")])
def test_an_adapter_of_another_base_or_grid(
        make_tiny: Make, tmp_path: Path, fact: str, value: str, word: str) -> None:
    coa = adapted(Switchable(make_tiny(), dtype=torch.float32))
    with writing(tmp_path / "bad", **coa.facts | {fact: value}) as part:
        coa.write(part)
    with pytest.raises(UserError, match=word):
        CoaLora.from_pretrained(Switchable(make_tiny(), dtype=torch.float32), tmp_path / "bad")


def test_owned_components_serve_their_own_bits(base: Switchable) -> None:
    network = MixingNetwork(base.layers, 16, owned=OWNED)
    assert network.owned == 4
    for bits in GRID["bits"]:
        configuration = Configuration.uniform(base.layers, Format(bits))
        diagonal = (torch.eye(16) + network(configuration)).diagonal(dim1=1, dim2=2)
        assert diagonal[0].nonzero()[:, 0].tolist() == [*range(16 if bits == 2 else 12)]
    plain = torch.eye(16) + network(None)
    assert plain.diagonal(dim1=1, dim2=2).sum() == 12 * len(base.layers.names)
    assert (MixingNetwork(base.layers, 16).gates == 1).all()  # the paper's has no owners


# Training over configurations


SETTINGS = TrainSettings(steps=6, batch_size=2, rank=4, learning_rate=1e-2, warmup=0.0)


@pytest.fixture
def quick(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **_: Any) -> PreTrainedTokenizerBase:
        """The base's own: another model's tokens would train on nonsense."""
        assert name == EMBEDDED
        return tokenizer

    for module in ("lib.train.training", "lib.coa.adapter", "data.evidence.alternate"):
        monkeypatch.setattr(f"{module}.load_tokenizer", load)


def several(base: Switchable, count: int = 3) -> list[Configuration]:
    return [some(base, seed, 3.5) for seed in range(count)]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_leaves_the_base_alone(make_tiny: Make, method: str) -> None:
    original = make_tiny().state_dict()
    base = Switchable(make_tiny(), dtype=torch.float32)
    run, coa = train_over(base, sensors("train", 12), several(base), SETTINGS, method=method)
    assert len(run.losses) == 6 and (coa is not None) == (method in ("coa", "paper"))
    base.restore()
    tensors = {n.replace(".base_layer", ""): t for n, t in base.model.state_dict().items()}
    assert all(torch.equal(tensors[name], original[name]) for name in original)
    if coa:
        assert coa.network.network[-1].weight.any()  # theta moved
        theta = sum(p.numel() for p in coa.network.parameters())
        assert count_trainable(run.model)[0] > theta


@pytest.mark.usefixtures("quick")
def test_the_same_seed_gives_the_same_adapter(make_tiny: Make) -> None:
    adapters = []
    for _ in range(2):
        base = Switchable(make_tiny(), dtype=torch.float32)
        adapters.append(train_over(base, sensors("train", 12), several(base), SETTINGS)[1])
    ours, theirs = (coa.factors() | dict(coa.network.named_parameters()) for coa in adapters)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def switched(monkeypatch: pytest.MonkeyPatch) -> list[Configuration]:
    """Every configuration that a model is switched to, as it happens."""
    seen, switch = [], Switchable.switch

    def watched(self: Switchable, configuration: Configuration) -> None:
        seen.append(configuration)
        switch(self, configuration)

    monkeypatch.setattr(Switchable, "switch", watched)
    return seen


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_part_of_a_step_uses_the_next_configuration(
        make_tiny: Make, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    seen, orders = switched(monkeypatch), []
    configurations = several(Switchable(make_tiny()))
    for seed in (0, 0, 1):
        train_over(Switchable(make_tiny(), dtype=torch.float32), sensors("train", 12),
                   configurations, method="shared",
                   settings=dataclasses.replace(SETTINGS, accumulate=accumulate, seed=seed))
        orders.append([configurations.index(configuration) for configuration in seen])
        seen.clear()
    assert len(orders[0]) == 6 * accumulate
    for order in orders:  # all get their turn in each round
        assert all(sorted(order[i:i + 3]) == [0, 1, 2] for i in range(0, len(order), 3))
    assert orders[0] == orders[1] != orders[2]


def test_without_a_configuration_nothing_is_corrected(base: Switchable) -> None:
    """The original weights have no error, so components made for one must be shut."""
    before = logits(base.model)
    model = with_adapter(base.model, target_modules=list(MODULE_KINDS), r=16)
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B[NAME].weight.data.zero_()
    coa = CoaLora(model, base, MixingNetwork(base.layers, 16, owned=OWNED))
    layer = coa.lora_layers[base.layers.names[3]]
    old = learned_a(layer).clone()
    start_owned(coa, [torch.eye(m.in_features) for m in coa.lora_layers.values()])
    new = learned_a(layer)
    # Twelve rows that move as far as sixteen; the other four are an error's.
    torch.testing.assert_close(new[:12].square().sum(), old[:12].square().sum() * 16 / 12)
    assert not torch.equal(new[12:], old[12:])
    assert torch.equal(logits(coa.model), before)
    base.switch(Configuration.uniform(base.layers, Format(8)))
    with_adapter_on = logits(coa.model)
    with coa.model.disable_adapter():
        assert torch.equal(logits(coa.model), with_adapter_on)


def test_low_rank_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(40, 30, generator=generator)
    inputs = torch.randn(500, 30, generator=generator) * torch.logspace(0, -2, 30)
    root = torch.linalg.cholesky(inputs.T @ inputs / 500)
    felt = torch.linalg.svdvals(error @ root).square()
    for rank in (1, 4, 12):
        b, a = low_rank(error, root, rank)
        assert b.shape == (40, rank) and a.shape == (rank, 30)
        torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))
        left = ((error - b @ a) @ root).square().sum()
        torch.testing.assert_close(left, felt[rank:].sum(), rtol=0.02, atol=0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("layer", ["mlp.down_proj", "mlp.up_proj", "self_attn.v_proj"])
def test_input_roots_are_those_of_the_inputs(layer: str, base: Switchable) -> None:
    seen, index = [], base.layers.names.index(f"model.layers.1.{layer}")
    hook = base.model.get_submodule(base.layers.names[index]).register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].flatten(0, -2)))
    roots = input_roots(base.model, base.layers.names, sensors("train", 3),
                        tokenizer=load_tokenizer(EMBEDDED))
    hook.remove()
    assert len(roots) == len(base.layers.names) and len(seen) == 3
    expected = sum(x.T @ x / len(x) for x in seen)
    torch.testing.assert_close(roots[index] @ roots[index].T, expected, rtol=0.02,
                               atol=3e-3 * float(expected.diagonal().mean()))


@pytest.mark.usefixtures("quick")
def test_started_from_the_error_it_is_nearer(base: Switchable) -> None:
    configuration = Configuration.uniform(base.layers, best_formats()[0])
    start = alternate.StartFromError(base, configuration, sensors("train", 4))
    original = logits(base.model)
    base.switch(configuration)
    before = (logits(base.model) - original).square().mean()
    model = with_adapter(base.model, target_modules=list(MODULE_KINDS), r=32, lora_alpha=64)
    start.on_train_begin(None, None, None, model=model)
    for index, name in enumerate(base.layers.names):
        layer = model.get_submodule(f"base_model.model.{name}")
        error = base.weight(index) - base.weight(index, configuration.formats[index])
        left = 2.0 * layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight - error
        assert (left @ start.roots[index]).norm() < 0.6 * (error @ start.roots[index]).norm()
    assert (logits(model) - original).square().mean() < 0.5 * before


def test_half_of_a_distilled_loss_is_the_distance_to_the_teacher(
        base: Switchable, make_tiny: Make) -> None:
    labels = torch.where(IDS > 10, IDS, -100)
    plain, count = training.answer_loss(base.model, IDS, labels)
    other = make_tiny()
    other.get_input_embeddings().weight.data *= 2
    for teacher, nearest in ((base.model, True), (other, False)):
        with alternate.distilling(teacher):
            taught, tokens = training.answer_loss(base.model, IDS, labels)
        assert tokens == count
        distance = (taught - plain / 2).item()
        assert abs(distance) < 1e-5 if nearest else distance > 1e-3
        with torch.no_grad():
            p, q = (m(IDS).logits[0, :-1].log_softmax(-1) for m in (teacher, base.model))
        rows = labels[0, 1:] != -100
        expected = 0.5 * float((p.exp() * (p - q)).sum(-1)[rows].sum())
        assert distance == pytest.approx(expected, abs=1e-4)
    assert training.answer_loss is answer_loss


@pytest.mark.parametrize(("family", "count"), [("nf", 12), ("gguf", 5)])
def test_a_killed_joint_training_goes_on_to_the_same_adapter(
        tiny_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str,
        count: int) -> None:
    """Also where the last step of an epoch has fewer parts than the others."""
    settings = dataclasses.replace(SETTINGS, method="coa", formats=family, accumulate=2, steps=5)
    records = sensors("train", count)
    monkeypatch.setattr("lib.train.training.CHECKPOINT_EVERY", 2)
    whole = train_joint(records, settings, model=tiny_directory, out=tmp_path / "whole")
    real, calls = Switchable.switch, iter(range(99))

    def dying(self: Switchable, configuration: Configuration) -> None:
        if next(calls) == 6:  # in the fourth step
            raise KeyboardInterrupt
        real(self, configuration)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Switchable, "switch", dying)
        train_joint(records, settings, model=tiny_directory, out=tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    again = train_joint(records, settings, model=tiny_directory, out=tmp_path / "cut")
    assert again.losses == whole.losses
    files = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()
             if f.suffix == ".safetensors"}
    assert len(files) == 2
    assert all((tmp_path / "cut" / name).read_bytes() == data for name, data in files.items())
    manifest = read_json(tmp_path / "cut" / "manifest.json")
    assert manifest["grid"] == family and manifest["settings"]["method"] == "coa"
    loaded = CoaLora.from_pretrained(Switchable.load(tiny_directory), tmp_path / "cut")
    other = {"nf": GgufFormat("Q4_0"), "gguf": Format()}[family]
    with pytest.raises(UserError, match="knows formats of the family"):
        loaded.network(Configuration.uniform(loaded.base.layers, other))
    with pytest.raises(UserError, match="trained for weights of fewer bits: .* deploy"):
        merging.merge(tmp_path / "cut")


def test_a_dedicated_adapter_is_trained_on_its_configuration(
        tiny_directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Switchable.load(tiny_directory)
    configuration = Configuration.uniform(base.layers, GgufFormat("Q5_0"))
    write_json(tmp_path / "one.json", configuration.to_json())
    seen = switched(monkeypatch)
    settings = dataclasses.replace(SETTINGS, method="dedicated", steps=2,
                                   configuration=str(tmp_path / "one.json"))
    train_joint(sensors("train", 4), settings, model=tiny_directory, out=tmp_path / "out")
    assert len(seen) == 2 and {*seen} == {configuration}
    assert not (tmp_path / "out" / "coa.safetensors").exists()
    manifest = read_json(tmp_path / "out" / "manifest.json")  # `deploy` takes that one
    assert manifest["grid"] == "gguf" and manifest["configuration"] == configuration.to_json()


def test_refusals(base: Switchable) -> None:
    records, (one,) = sensors("train", 2), several(base, 1)
    with pytest.raises(UserError, match="unknown method"):
        train_over(base, records, [one], SETTINGS, method="x")
    for wrong in ({"mode": "qlora"}, {"targets": "standard"}):
        with pytest.raises(UserError, match="mode lora and targets aggressive"):
            train_over(base, records, [one], dataclasses.replace(SETTINGS, **wrong))


def test_many_configurations_descend_on_the_logarithm() -> None:
    weight = torch.tensor([3.0], requires_grad=True)

    class Trainer:
        def compute_loss(self, scale: float) -> Tensor:
            return scale * weight.square().sum()

    for parts in (1, 2):
        trainer = Trainer()
        _descend_on_logarithm(trainer, parts)
        for scale in (1.0, 100.0):
            loss = trainer.compute_loss(scale / parts)
            assert float(loss.detach()) == pytest.approx(9 * scale / parts)  # as logged
            (gradient,) = torch.autograd.grad(loss, weight)
            # d log(s w^2) / dw = 2 / w, and a step is the mean of its parts.
            assert float(gradient) == pytest.approx(2 / 3 / parts)
        (gradient,) = torch.autograd.grad(trainer.compute_loss(LEAST_LOSS / 18 / parts), weight)
        assert float(gradient) == pytest.approx(6 / 18 / parts)  # below: the loss's own, scaled
