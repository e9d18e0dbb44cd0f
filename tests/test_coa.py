"""lib.switchable, lib.coa and lib.joint: one model and one adapter for every configuration."""

import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alternate
import gguf
import pytest
import torch
from conftest import with_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.artifacts import read_json, writing
from lib.coa import NAME, OWNED, CoaLora, MixingNetwork
from lib.configuration import GRID, KINDS, LEVELS, Configuration, Layers, Level
from lib.correction import input_roots, low_rank, start_from_error, start_owned
from lib.embedded import EMBEDDED
from lib.errors import UserError
from lib.fused import fused
from lib.gguf import save_adapter
from lib.joint import LEAST_LOSS, METHODS, _relative, train_over
from lib.lora import count_trainable, load_adapter
from lib.plans import best_levels, random_plan
from lib.profiles import TrainSettings
from lib.quantize import rounded
from lib.surrogate import Features, numbers
from lib.switchable import Switchable
from lib.tasks import sensors
from lib.train import TrainResult

IDS = torch.tensor([[5, 900, 17, 3, 42, 7]])
pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture
def base(tiny: PreTrainedModel) -> Switchable:
    return Switchable(tiny, dtype=torch.float32)


def some_plan(base: Switchable, seed: int = 0, budget: float = 4.0) -> Configuration:
    return random_plan(base.layers, budget, random.Random(seed))


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def adapted(base: Switchable, *, seed: int = 0, mixing: float = 0.0) -> CoaLora:
    """A random adapter on all seven kinds; `mixing` makes theta's last layer random."""
    coa = CoaLora(with_adapter(base.model, seed=seed, target_modules=list(KINDS)), base)
    if mixing:
        torch.nn.init.normal_(coa.network.network[-1].weight, std=mixing)
    return coa


# The switchable model


def test_switching_changes_the_linears_alone(tiny: PreTrainedModel, base: Switchable) -> None:
    before = state(tiny)
    plan = some_plan(base)
    base.switch(plan)
    for name, tensor in state(tiny).items():
        layer = name.removesuffix(".weight")
        if layer in base.layers.names:
            level = plan.levels[base.layers.names.index(layer)]
            assert torch.equal(tensor, rounded(before[name], level))
        else:
            assert torch.equal(tensor, before[name]), name
    assert base.configuration is plan


def test_a_bias_is_kept(tiny: PreTrainedModel) -> None:
    """The released code deletes the linears' biases."""
    tiny.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.ones(128))
    with_bias = logits(tiny)
    base = Switchable(tiny, dtype=torch.float32)
    base.switch(Configuration.uniform(base.layers, Level(8)))
    assert torch.equal(tiny.model.layers[0].mlp.up_proj.bias, torch.ones(128))
    base.restore()
    assert torch.equal(logits(tiny), with_bias)


def test_back_and_forth_is_bit_for_bit(tiny: PreTrainedModel, base: Switchable) -> None:
    original, first = state(tiny), some_plan(base, 1)
    base.switch(first)
    at_first = state(tiny)
    for seed in range(5):
        base.switch(some_plan(base, seed + 2))
    base.switch(first)
    assert all(torch.equal(t, at_first[n]) for n, t in state(tiny).items())
    base.restore()
    assert all(torch.equal(t, original[n]) for n, t in state(tiny).items())
    assert base.configuration is None


def test_eight_bits_are_near_the_original_and_two_are_not(base: Switchable) -> None:
    original = logits(base.model)
    errors = []
    for bits in (2, 3, 4, 8):
        base.switch(Configuration.uniform(base.layers, Level(bits, block=16)))
        errors.append(float((logits(base.model) - original).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 * errors[0]


def test_the_cache_holds_its_limit_and_serves_what_it_keeps(
        make_tiny: Callable[[], PreTrainedModel]) -> None:
    one = sum(Layers.of(make_tiny()).sizes) * 4 / 1e6
    base = Switchable(make_tiny(), dtype=torch.float32, cache_mb=2.5 * one)
    plans = [Configuration.uniform(base.layers, Level(bits)) for bits in (2, 3, 4, 8)]
    for plan in plans:
        base.switch(plan)
        assert base.cached_mb <= 2.5 * one + 1e-9
    kept = base.model.model.layers[0].mlp.up_proj.weight.data_ptr()
    base.switch(plans[2])
    base.switch(plans[3])
    assert base.model.model.layers[0].mlp.up_proj.weight.data_ptr() == kept
    tight = Switchable(make_tiny(), dtype=torch.float32, cache_mb=0)
    tight.switch(plans[0])
    base.switch(plans[0])
    assert tight.cached_mb == 0
    assert torch.equal(logits(tight.model), logits(base.model))


def test_another_models_configuration_is_refused(base: Switchable) -> None:
    other = Layers(base.layers.names[:7], base.layers.sizes[:7])
    before = logits(base.model)
    with pytest.raises(UserError, match=r"no more layers .* model.layers.1.self_attn.q_proj"):
        base.switch(Configuration.uniform(other, Level()))
    assert torch.equal(logits(base.model), before)


def test_an_unknown_grid(tiny: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="unknown grid"):
        Switchable(tiny, grid="fp4")


def test_a_broken_weight_is_named(tiny: PreTrainedModel) -> None:
    tiny.model.layers[1].self_attn.v_proj.weight.data[3, 3] = float("nan")
    base = Switchable(tiny, dtype=torch.float32)
    before = state(tiny)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_proj: a weight is not a fin"):
        base.switch(Configuration.uniform(base.layers, Level()))
    assert all(torch.equal(t, before[n]) or t.isnan().any() for n, t in state(tiny).items())
    base.cache_mb = 0
    with pytest.raises(UserError):
        base.switch(Configuration.uniform(base.layers, Level(3)))
    assert base.cached_mb == 0


def test_the_fingerprint_is_the_weights(make_tiny: Callable[[], PreTrainedModel]) -> None:
    first, same, other = (Switchable(make_tiny(), dtype=torch.float32) for _ in range(3))
    mark = first.fingerprint
    first.switch(Configuration.uniform(first.layers, Level(2)))
    assert Switchable(make_tiny()).fingerprint == same.fingerprint == first.fingerprint == mark
    changed = make_tiny()
    changed.model.layers[0].mlp.up_proj.weight.data.mul_(1.01)
    assert Switchable(changed).fingerprint != other.fingerprint


def test_loads_by_name(tiny_directory: str) -> None:
    base = Switchable.load(tiny_directory, dtype=torch.float32)
    base.switch(some_plan(base))
    assert logits(base.model).isfinite().all()


# The adapter


def test_starts_as_plain_lora(base: Switchable) -> None:
    base.switch(some_plan(base))
    model = with_adapter(base.model, target_modules=list(KINDS))
    plain = logits(model)
    coa = CoaLora(model, base)
    assert torch.equal(logits(model), plain)
    assert coa.mixers is not None and not coa.mixers.any()


def test_the_update_is_the_formula(base: Switchable) -> None:
    coa, plan = adapted(base, mixing=0.3), some_plan(base)
    base.switch(plan)
    coa._refresh()
    mixers = coa.network(plan)
    for index in (0, 5, 13):
        layer = coa.places[base.layers.names[index]]
        x = torch.randn(3, layer.in_features)
        a = layer.lora_A[NAME].parametrizations.weight.original
        b, eye = layer.lora_B[NAME].weight, torch.eye(4)
        update = 12 / 4 * b @ (eye + mixers[index]) @ a
        expected = x @ (layer.base_layer.weight + update).T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_each_configuration_has_its_own_mixing(base: Switchable) -> None:
    network = MixingNetwork(base.layers, 4)
    torch.nn.init.normal_(network.network[-1].weight)
    seen = [network(Configuration.uniform(base.layers, level)) for level in LEVELS[::29]]
    for i, one in enumerate(seen):
        assert all(not torch.allclose(one, other) for other in seen[:i])
        # No two layers share theirs: positions and kinds are told apart.
        flat = one.flatten(1)
        assert (torch.cdist(flat, flat) + torch.eye(len(flat)) > 1e-3).all()


def test_gradients_in_float64(make_tiny: Callable[[], PreTrainedModel]) -> None:
    """Of A, B and theta through one layer, against finite differences."""
    base = Switchable(make_tiny().double(), dtype=torch.float64)
    plan = some_plan(base)
    base.switch(plan)
    coa = adapted(base, mixing=0.3)
    coa.model.double()
    layer = coa.places[base.layers.names[6]]
    x = torch.randn(2, layer.in_features, dtype=torch.float64)
    a = layer.lora_A[NAME].parametrizations.weight.original
    learned = (a, layer.lora_B[NAME].weight, *coa.network.parameters())

    def loss(*_: Tensor) -> Tensor:
        coa._refresh()
        return layer(x).square().mean()

    assert torch.autograd.gradcheck(loss, learned, atol=1e-6, fast_mode=True)
    loss().backward()
    for parameter in learned:
        assert parameter.grad is not None and parameter.grad.any()


def test_saved_and_loaded(make_tiny: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    base = Switchable(make_tiny(), dtype=torch.float32)
    coa, plan = adapted(base, mixing=0.3), some_plan(base)
    base.switch(plan)
    expected = logits(coa.model)
    coa.save_pretrained(tmp_path / "coa")
    other = Switchable(make_tiny(), dtype=torch.float32)
    loaded = CoaLora.from_pretrained(other, tmp_path / "coa")
    other.switch(plan)
    assert torch.equal(logits(loaded.model), expected)
    # Without theta it is an ordinary adapter: LoRA with U = 0.
    plain = PeftModel.from_pretrained(make_tiny(), str(tmp_path / "coa"))
    base.restore()
    assert torch.equal(logits(plain), logits(coa.model))
    # peft's way to save gives the same files.
    coa.model.save_pretrained(tmp_path / "again")
    assert all((tmp_path / "again" / f.name).read_bytes() == f.read_bytes()
               for f in (tmp_path / "coa").iterdir() if f.name != "manifest.json")


def test_materialised_is_plain_peft(make_tiny: Callable[[], PreTrainedModel], tmp_path: Path
                                    ) -> None:
    base = Switchable(make_tiny(), dtype=torch.float32)
    coa = adapted(base, mixing=0.3)
    for seed in range(3):
        plan, out = some_plan(base, seed, 3.0 + seed), tmp_path / f"plan{seed}"
        coa.materialise(plan, out)
        assert {p.name for p in out.iterdir()} == {
            "adapter_model.safetensors", "adapter_config.json", "manifest.json"}
        base.switch(plan)
        stock = Switchable(make_tiny(), dtype=torch.float32)
        stock.switch(plan)
        theirs = PeftModel.from_pretrained(stock.model, str(out))
        torch.testing.assert_close(logits(theirs), logits(coa.model), rtol=0, atol=1e-4)
        assert load_adapter(make_tiny(), out)
        assert read_json(out / "manifest.json")["configuration"] == plan.to_json()


def test_without_a_configuration_it_is_plain(make_tiny: Callable[[], PreTrainedModel]) -> None:
    base = Switchable(make_tiny(), dtype=torch.float32)
    coa = adapted(base, mixing=0.3)
    base.switch(some_plan(base))
    logits(coa.model)
    base.restore()
    plain = logits(with_adapter(make_tiny(), target_modules=list(KINDS)))
    assert torch.equal(logits(coa.model), plain) and not coa.mixers.any()


def test_generate_uses_the_configuration_of_now(make_tiny: Callable[[], PreTrainedModel],
                                                tmp_path: Path) -> None:
    """peft's generate goes round peft's forward: nothing runs between switch and generate."""
    base = Switchable(make_tiny(), dtype=torch.float32)
    coa, said = adapted(base, mixing=2.0), []
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for seed in range(2):
        plan = some_plan(base, seed)
        base.switch(plan)
        coa.materialise(plan, tmp_path / f"{seed}")
        said.append(coa.model.generate(input_ids=IDS, **options)[0].tolist())
        stock = Switchable(make_tiny(), dtype=torch.float32)
        stock.switch(plan)
        theirs = PeftModel.from_pretrained(stock.model, str(tmp_path / f"{seed}"))
        assert theirs.generate(input_ids=IDS, **options)[0].tolist() == said[-1]
    assert said[0] != said[1]


def test_merging_into_shared_levels_is_refused(base: Switchable) -> None:
    coa, plan = adapted(base), some_plan(base)
    base.switch(plan)
    before = state(base.model)
    for merge in (coa.model.merge_adapter, coa.model.merge_and_unload):
        with pytest.raises(UserError, match="materialise"):
            merge()
    assert all(torch.equal(t, before[n]) for n, t in state(base.model).items())


def test_the_fused_step_has_the_stock_gradients(make_tiny: Callable[[], PreTrainedModel]) -> None:
    """With mixing on, and two configurations in one backward pass."""
    grads = []
    for step in (contextlib.nullcontext, fused):
        base = Switchable(make_tiny(), dtype=torch.float32)
        coa = adapted(base, mixing=0.3)
        coa.model.train()
        with step(coa.model) if step is fused else step():
            total = 0.0
            for seed in range(2):
                base.switch(some_plan(base, seed))
                total = total + coa.model(input_ids=IDS, labels=IDS).loss
                if step is not fused:
                    total.backward()
                    total = 0.0
            if step is fused:
                total.backward()
        grads.append({n: p.grad for n, p in coa.model.named_parameters()
                      if p.requires_grad})
    stock, ours = grads
    assert any("coa_network" in name for name in stock)
    for name, gradient in stock.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_materialised_for_llama_cpp(make_tiny: Callable[[], PreTrainedModel], tmp_path: Path
                                    ) -> None:
    base = Switchable(make_tiny(), dtype=torch.float32)
    coa, plan = adapted(base, mixing=0.3), some_plan(base)
    coa.materialise(plan, tmp_path / "plan")
    save_adapter(tmp_path / "plan", tmp_path / "plan.gguf", base.model.config)
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "plan.gguf").tensors}
    a = coa.factors(plan)["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"]
    assert len(tensors) == 28
    torch.testing.assert_close(torch.tensor(tensors["blk.1.ffn_up.weight.lora_a"]).float(), a,
                               rtol=2e-3, atol=1e-4)


def test_an_adapter_of_some_layers_is_refused(base: Switchable) -> None:
    model = with_adapter(base.model)
    before = state(model)
    with pytest.raises(UserError, match=r"k_proj has no adapter"):
        CoaLora(model, base)
    assert state(model).keys() == before.keys()


def test_materialise_for_another_model(base: Switchable, tmp_path: Path) -> None:
    other = Layers(base.layers.names[:7], base.layers.sizes[:7])
    with pytest.raises(UserError, match="another model"):
        adapted(base).materialise(Configuration.uniform(other, Level()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damage(source: Path, change: Callable[[Path], None]) -> Path:
    """A copy of an artifact with one change, its manifest made to fit."""
    facts = {k: v for k, v in read_json(source / "manifest.json").items()
             if k not in ("files", "versions")}
    with writing(source.with_name("damaged"), **facts) as part:
        for file in source.iterdir():
            if file.name != "manifest.json":
                (part / file.name).write_bytes(file.read_bytes())
        change(part)
    return source.with_name("damaged")


def other_rank(part: Path) -> None:
    tensors = load_file(part / "coa.safetensors")
    tensors["network.3.bias"] = torch.zeros(64)
    tensors["network.3.weight"] = torch.zeros(64, 128)
    save_file(tensors, part / "coa.safetensors")


def not_finite(part: Path) -> None:
    tensors = load_file(part / "coa.safetensors")
    tensors["network.3.weight"][0, 0] = float("nan")
    save_file(tensors, part / "coa.safetensors")


@pytest.mark.parametrize(("change", "word"), [
    (lambda part: (part / "coa.safetensors").unlink(), "no coa.safetensors"),
    (other_rank, "does not fit an adapter of rank 4"),
    (lambda part: (part / "coa.safetensors").write_bytes(b"x" * 20), "coa.safetensors"),
    (lambda part: not_finite(part), "not finite"),
])
def test_damaged_adapters(make_tiny: Callable[[], PreTrainedModel], tmp_path: Path,
                          change: Callable[[Path], None], word: str) -> None:
    adapted(Switchable(make_tiny(), dtype=torch.float32)).save_pretrained(tmp_path / "coa")
    bad = damage(tmp_path / "coa", change)
    base = Switchable(make_tiny(), dtype=torch.float32)
    before = state(base.model)
    with pytest.raises(UserError) as caught:
        CoaLora.from_pretrained(base, bad)
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert state(base.model).keys() == before.keys()


def test_an_adapter_of_another_base(make_tiny: Callable[[], PreTrainedModel], tmp_path: Path
                                    ) -> None:
    adapted(Switchable(make_tiny(), dtype=torch.float32)).save_pretrained(tmp_path / "coa")
    changed = make_tiny()
    changed.model.layers[0].mlp.up_proj.weight.data.mul_(1.01)
    with pytest.raises(UserError, match="another base"):
        CoaLora.from_pretrained(Switchable(changed, dtype=torch.float32), tmp_path / "coa")
    with pytest.raises(UserError, match="another grid: nf, this one is int"):
        CoaLora.from_pretrained(Switchable(make_tiny(), dtype=torch.float32, grid="int"),
                                tmp_path / "coa")


def test_nothing_here_is_slow_by_mistake(base: Switchable) -> None:
    """Theta is evaluated once for all layers, not layer by layer."""
    coa = adapted(base)
    calls = []
    coa.network.network.register_forward_hook(lambda *_: calls.append(time.monotonic()))
    base.switch(some_plan(base))
    logits(coa.model)
    assert len(calls) == 1


# Training over configurations


SETTINGS = TrainSettings(steps=6, batch_size=2, rank=4, learning_rate=1e-2, warmup=0.0)


def trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: str,
            plans: int = 3) -> tuple[Switchable, TrainResult, CoaLora | None]:
    base = Switchable(model, dtype=torch.float32)
    chosen = [some_plan(base, seed, 3.5) for seed in range(plans)]
    return base, *train_over(base, sensors("train", 12), chosen, SETTINGS, method=method)


@pytest.fixture
def quick(cheap_tokenizer: None, tokenizer: PreTrainedTokenizerBase,
          monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> PreTrainedTokenizerBase:
        """The base's own: another model's numbers of tokens would train on nonsense."""
        assert name == EMBEDDED
        return tokenizer

    monkeypatch.setattr("lib.joint.load_tokenizer", load)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains(make_tiny: Callable[[], PreTrainedModel], method: str,
                            tokenizer: PreTrainedTokenizerBase) -> None:
    original = state(make_tiny())
    base, run, coa = trained(make_tiny(), tokenizer, method)
    assert len(run.losses) == 6
    assert (coa is not None) == (method in ("coa", "paper"))
    base.restore()
    for name, tensor in state(base.model).items():
        plain = name.replace(".base_layer", "")
        if plain in original:
            assert torch.equal(tensor, original[plain]), name
    if coa:
        assert coa.network.network[-1].weight.any()  # theta moved
        assert count_trainable(run.model)[0] > sum(
            p.numel() for p in coa.network.parameters())


@pytest.mark.usefixtures("quick")
def test_the_same_seed_gives_the_same_adapter(make_tiny: Callable[[], PreTrainedModel],
                                              tokenizer: PreTrainedTokenizerBase) -> None:
    first, second = (trained(make_tiny(), tokenizer, "coa")[2] for _ in range(2))
    ours, theirs = first.factors(), second.factors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert all(torch.equal(a, b) for a, b in zip(
        first.network.parameters(), second.network.parameters(), strict=True))


def switched(monkeypatch: pytest.MonkeyPatch) -> list[Configuration]:
    """Every configuration that a model is switched to, as it happens."""
    seen, switch = [], Switchable.switch
    monkeypatch.setattr(Switchable, "switch",
                        lambda self, plan: (seen.append(plan), switch(self, plan))[1])
    return seen


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_part_of_a_step_uses_the_next_configuration(
        make_tiny: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch,
        accumulate: int) -> None:
    seen, orders = switched(monkeypatch), []
    plans = [some_plan(Switchable(make_tiny()), seed, 3.5) for seed in range(3)]
    for seed in (0, 0, 1):
        train_over(Switchable(make_tiny(), dtype=torch.float32), sensors("train", 12), plans,
                   dataclasses.replace(SETTINGS, accumulate=accumulate, seed=seed), method="lora")
        orders.append([plans.index(plan) for plan in seen])
        seen.clear()
    assert len(orders[0]) == 6 * accumulate
    for order in orders:  # all get their turn in each round
        assert all(sorted(order[i:i + 3]) == [0, 1, 2] for i in range(0, len(order), 3))
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.usefixtures("quick")
def test_plans_are_renewed_by_a_search_with_the_adapter_of_now(
        make_tiny: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alternate.load_tokenizer", lambda *_: tokenizer)
    base, held, sets = Switchable(make_tiny(), dtype=torch.float32), sensors("validation", 3), []
    features = Features.of(base, torch.ones(len(base.layers.names)))
    plans = [some_plan(base, seed, 3.0 + seed) for seed in range(4)]

    def renew(coa: CoaLora, now: list[Configuration]) -> list[Configuration]:
        sets.append((now, alternate.renewed(coa, now, features=features, held=held, evaluations=5)))
        assert coa.model.training
        return sets[-1][1]

    seen = switched(monkeypatch)
    train_over(base, sensors("train", 12), plans, SETTINGS, renew=renew, renew_at=(2, 4))
    (first, second), (third, last) = sets
    assert first == plans and third == second and set(last) - set(plans)
    # Two steps; nine evaluations; two steps; an evaluation of each plan and five more.
    trained_on = [*seen[:2], *seen[11:13], *seen[-2:]]
    assert set(trained_on[:2]) <= set(plans) and set(trained_on[2:4]) <= set(second)
    assert set(trained_on[4:]) <= set(last)


def test_plans_are_scored_on_one_batch_with_the_adapter_as_it_is(
        base: Switchable, tokenizer: PreTrainedTokenizerBase,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The released code scores on a random training batch, without U, and never anew."""
    monkeypatch.setattr("alternate.load_tokenizer", lambda *_: tokenizer)
    coa, held, batches = adapted(base, mixing=0.5), sensors("validation", 3), []
    measured = alternate.held_out_loss

    def watched(model: PeftModel, words: Any, records: Any) -> float:
        batches.append(records)
        return measured(model, words, records)

    monkeypatch.setattr("alternate.held_out_loss", watched)
    evaluate, plan = alternate.loss_with(coa, held), numbers(some_plan(base))
    before = evaluate(plan)
    assert evaluate(numbers(some_plan(base, 1))) != before == evaluate(plan)
    assert all(batch is held for batch in batches)
    torch.nn.init.zeros_(coa.network.network[-1].weight)  # as training would change it
    assert evaluate(plan) != before


# Components that layers of some bits own, and what an adapter starts from


def test_owned_components_serve_their_own_bits(base: Switchable) -> None:
    network = MixingNetwork(base.layers, 16, owned={2: 1 / 4, 3: 1 / 8})
    assert network.owned == {2: [12, 13, 14, 15], 3: [10, 11]}
    for bits in GRID["bits"]:
        plan = Configuration.uniform(base.layers, Level(bits))
        kept = (torch.eye(16) + network(plan)).diagonal(dim1=1, dim2=2)
        shut = [i for other, rows in network.owned.items() if other != bits for i in rows]
        assert torch.equal(kept[0].nonzero()[:, 0],
                           torch.tensor([i for i in range(16) if i not in shut]))
    plain = torch.eye(16) + network.unquantised()
    assert plain.diagonal(dim1=1, dim2=2).sum() == 10 * len(base.layers.names)
    # A rank too small to share has no owners.
    assert not MixingNetwork(base.layers, 2, owned={3: 1 / 8}).owned


def test_without_a_configuration_nothing_is_corrected(base: Switchable) -> None:
    """The original weights have no error: what was made for one must be shut."""
    before = logits(base.model)
    model = with_adapter(base.model, target_modules=list(KINDS), r=16)
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B[NAME].weight.data.zero_()
    coa = CoaLora(model, base, MixingNetwork(base.layers, 16, owned=OWNED))
    old = coa.places[base.layers.names[3]].lora_A[NAME].parametrizations.weight.original.clone()
    start_owned(coa, [torch.eye(m.in_features) for m in coa.places.values()])
    new = coa.places[base.layers.names[3]].lora_A[NAME].parametrizations.weight.original
    # Twelve rows that move as far as sixteen; the other four are an error's.
    torch.testing.assert_close(new[:12].square().sum(), old[:12].square().sum() * 16 / 12)
    assert not torch.equal(new[12:], old[12:])
    assert torch.equal(logits(coa.model), before)
    base.switch(Configuration.uniform(base.layers, Level(8)))
    with_it = logits(coa.model)
    with coa.model.disable_adapter():
        assert torch.equal(logits(coa.model), with_it)


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


@pytest.mark.parametrize("layer", ["mlp.down_proj", "mlp.up_proj", "self_attn.v_proj"])
def test_input_roots_are_those_of_the_inputs(layer: str, base: Switchable, cheap_tokenizer: None,
                                             tokenizer: PreTrainedTokenizerBase,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.correction.load_tokenizer", lambda *_: tokenizer)
    seen, index = [], base.layers.names.index(f"model.layers.1.{layer}")
    hook = base.model.get_submodule(base.layers.names[index]).register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].flatten(0, -2)))
    roots = input_roots(base.model, base.layers.names, sensors("train", 3))
    hook.remove()
    assert len(roots) == len(base.layers.names) and len(seen) == 3
    expected = sum(x.T @ x / len(x) for x in seen)
    torch.testing.assert_close(roots[index] @ roots[index].T, expected, rtol=0.02,
                               atol=3e-3 * float(expected.diagonal().mean()))


def test_started_from_the_error_it_is_nearer(base: Switchable, tokenizer: PreTrainedTokenizerBase,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.correction.load_tokenizer", lambda *_: tokenizer)
    plan = Configuration.uniform(base.layers, best_levels()[0])
    roots = input_roots(base.model, base.layers.names, sensors("train", 4))
    original = logits(base.model)
    base.switch(plan)
    before = (logits(base.model) - original).square().mean()
    model = with_adapter(base.model, target_modules=list(KINDS), r=32, lora_alpha=64)
    start_from_error(model, base, plan, roots)
    for index, name in enumerate(base.layers.names):
        layer = model.get_submodule(f"base_model.model.{name}")
        error = base.weight(index) - base.weight(index, plan.levels[index])
        update = 2.0 * layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight
        assert ((update - error) @ roots[index]).norm() < 0.6 * (error @ roots[index]).norm()
    assert (logits(model) - original).square().mean() < 0.5 * before


def test_no_plans_and_unknown_methods(base: Switchable) -> None:
    with pytest.raises(UserError, match="at least one"):
        train_over(base, sensors("train", 2), [], SETTINGS)
    with pytest.raises(UserError, match="unknown method"):
        train_over(base, sensors("train", 2), [some_plan(base)], SETTINGS, method="x")
    for wrong in ({"mode": "full"}, {"targets": "standard"}):
        with pytest.raises(UserError, match="mode lora and targets aggressive"):
            train_over(base, sensors("train", 2), [some_plan(base)],
                       dataclasses.replace(SETTINGS, **wrong))
    with_adapter(base.model)
    with pytest.raises(UserError, match="an adapter already"):
        train_over(base, sensors("train", 2), [some_plan(base)], SETTINGS)


def test_the_state_is_json_and_safetensors(base: Switchable, tmp_path: Path) -> None:
    adapted(base).save_pretrained(tmp_path / "coa")
    assert {p.suffix for p in (tmp_path / "coa").iterdir()} == {".json", ".safetensors"}
    config = json.loads((tmp_path / "coa" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(KINDS)
    assert config["base_model_name_or_path"] == "embedded"


def test_many_plans_descend_on_the_logarithm() -> None:
    weight = torch.tensor([3.0], requires_grad=True)

    class Trainer:
        def compute_loss(self, scale: float) -> Tensor:
            return scale * weight.square().sum()

    for parts in (1, 2):
        trainer = Trainer()
        _relative(trainer, parts)
        for scale in (1.0, 100.0):
            loss = trainer.compute_loss(scale / parts)
            assert float(loss.detach()) == pytest.approx(9 * scale / parts)  # as logged
            (found,) = torch.autograd.grad(loss, weight)
            # d log(s w^2) / dw = 2 / w, and a step is the mean of its parts.
            assert float(found) == pytest.approx(2 / 3 / parts)
        (found,) = torch.autograd.grad(trainer.compute_loss(LEAST_LOSS / 18 / parts), weight)
        assert float(found) == pytest.approx(6 / 18 / parts)  # below: the loss's own, scaled
