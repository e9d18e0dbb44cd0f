"""What a configuration is, costs, and where it comes from."""

import copy
import itertools
import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.evidence.alternate import from_numbers
from lib.base.model import MODULE_KINDS, pad_right
from lib.base.records import encode, sensors
from lib.coa.configuration import (
    SPANS,
    Configuration,
    Layers,
    Switchable,
    best_formats,
    block_and_kind,
    format_errors,
    greedy_configuration,
    random_configuration,
    sensitivities,
    spend,
)
from lib.errors import UserError
from lib.evaluate.scores import answer_loss
from lib.quantize.formats import FAMILIES, FORMATS, GRID, Format, GgufFormat, round_trip

BLOCKS = 3
NAMES = tuple(f"model.layers.{i}.{'self_attn' if k[0] in 'qkvo' else 'mlp'}.{k}"
              for i in range(BLOCKS) for k in MODULE_KINDS)
LAYERS = Layers(NAMES, tuple(64 * (10 + i % 7) for i in range(len(NAMES))))
configurations = st.one_of(*(
    st.lists(st.sampled_from(formats), min_size=len(NAMES), max_size=len(NAMES)).map(
        lambda formats: Configuration(LAYERS, tuple(formats))) for formats in FAMILIES.values()))


def test_the_grid_has_432_formats() -> None:
    assert len(FORMATS) == len(set(FORMATS)) == 432
    assert min(x.bits_per_parameter for x in FORMATS) == 2 + 2 / 64 + 16 / (64 * 256)
    assert max(x.bits_per_parameter for x in FORMATS) == 8 + 8 / 16 + 32 / (16 * 16)


@pytest.mark.parametrize(("field", "value"), [
    ("bits", 5), ("bits", "4"), ("bits", 4.0), ("bits", True), ("bits", None),
    ("scale_bits", 16), ("scale_dtype", "int8"), ("block", 48), ("group", 0)])
def test_a_format_names_the_illegal_value(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{field} is {value!r}"):
        Format(**{field: value})


def test_positions_differ_by_block_and_kinds_within_it() -> None:
    """The released code gives every Llama block the position 0."""
    places = [block_and_kind(name) for name in NAMES]
    assert len(set(places)) == len(NAMES)
    assert [block for block, _ in places] == [i for i in range(BLOCKS) for _ in MODULE_KINDS]
    attention, mlp = "model.layers.7.self_attn.o_proj", "model.layers.7.mlp.down_proj"
    assert block_and_kind(attention)[1] != block_and_kind(mlp)[1]
    assert block_and_kind("base_model.model.model.layers.12.mlp.up_proj") == (12, "up_proj")
    for name in ("lm_head", "model.layers.0.mlp.act_fn", "layers.x.q_proj"):
        with pytest.raises(UserError, match="not a linear layer"):
            block_and_kind(name)


def test_layers_of_a_model(tiny: PreTrainedModel) -> None:
    layers = Layers.of(tiny)
    assert len(layers.names) == 14 and layers.sizes[:3] == (64 * 64, 32 * 64, 32 * 64)
    with pytest.raises(UserError, match="no Llama blocks"):
        Layers.of(torch.nn.Linear(2, 2))
    other = copy.deepcopy(tiny)  # it would be written, and neither counted nor chosen
    other.model.layers[0].mlp.c_fc = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="other layers in them"):
        Layers.of(other)


@given(configurations)
def test_there_and_back_and_what_it_costs(configuration: Configuration) -> None:
    data = json.loads(json.dumps(configuration.to_json()))
    assert Configuration.from_json(data, LAYERS) == configuration
    numbers, family = configuration.numbers.tolist(), configuration.family
    assert from_numbers(LAYERS, numbers, family) == configuration
    costs = [fmt.bits_per_parameter for fmt in configuration.formats]
    assert min(costs) - 1e-9 <= configuration.bits <= max(costs) + 1e-9
    assert configuration.bytes * 8 >= configuration.bits * sum(LAYERS.sizes) - 1e-6


def test_one_line() -> None:
    configuration = Configuration.uniform(LAYERS, Format(bits=3))
    assert str(configuration) == f"{configuration.bits:.2f} bits a weight, 0.0 MB: 21 in 3 bits"
    some = from_numbers(LAYERS, [0, 1, 2] * 7, "gguf")
    assert str(some) == "4.42 bits a weight, 0.0 MB: 7 in IQ4_NL, 7 in MXFP4, 7 in Q4_0"
    with pytest.raises(UserError, match="2 formats for 21 layers"):
        Configuration(LAYERS, (Format(), Format()))
    with pytest.raises(UserError, match="NormalFloat and GGUF types in one"):
        Configuration(LAYERS, (*some.formats[1:], Format()))


def changed(name: str, value: Any) -> dict[str, Any]:
    data = Configuration.uniform(LAYERS, Format()).to_json()
    data["layers"][name] = value
    return data


@pytest.mark.parametrize(("data", "word"), [
    ([], "a configuration is"), ({"layers": 3}, "a configuration is"),
    (Configuration.uniform(LAYERS, Format()).to_json() | {"embedding": "Q4_0"}, "configuration is"),
    ({"layers": {}}, f"lacks {NAMES[0]}"),
    (changed("model.layers.9.mlp.up_proj", [4, 8, "fp32", 64, 256]),
     "no layer model.layers.9.mlp.up_proj"),
    (changed(NAMES[2], [5, 8, "fp32", 64, 256]), f"{NAMES[2]}: [5, 8,"),
    (changed(NAMES[2], [4, 8, "fp64", 64, 256]), "scale_dtype is 'fp64'"),
    (changed(NAMES[2], [4, 8, "fp32", 64]), f"{NAMES[2]}: [4, 8, 'fp32', 64] is not [b,"),
    (changed(NAMES[2], None), f"{NAMES[2]}: None is not"),
    (changed(NAMES[2], "Q9_0"), f"{NAMES[2]}: 'Q9_0' is not"),
    (changed(NAMES[2], "Q4_0"), "NormalFloat and GGUF types in one"),
    (changed(NAMES[2], [[4], 8, "fp32", 64, 256]), f"{NAMES[2]}: [[4]")])
def test_bad_configurations(data: Any, word: str) -> None:
    with pytest.raises(UserError) as caught:
        Configuration.from_json(data, LAYERS)
    assert word in str(caught.value)


@given(st.sampled_from(["nf", "gguf"]), st.floats(0, 1), st.integers(0, 99))
def test_random_configurations_meet_their_budget(family: str, share: float, seed: int) -> None:
    low, high = {"nf": (2.2, 8.3), "gguf": (4.3, 8.4)}[family]
    budget = low + share * (high - low)
    configuration = random_configuration(LAYERS, budget, random.Random(seed), family)
    assert abs(configuration.bits - budget) <= 0.05 and configuration.family == family
    assert configuration == random_configuration(LAYERS, budget, random.Random(seed), family)


def test_budgets_out_of_reach() -> None:
    for budget in (1.0, 1.9, 8.8, float("nan")):
        with pytest.raises(UserError, match="bits a weight: use"):
            random_configuration(LAYERS, budget, random.Random(0))
    with pytest.raises(UserError, match=r"found no mixture of formats at 6.5"):
        random_configuration(Layers(NAMES[:1], (64,)), 6.5, random.Random(0))


@pytest.mark.parametrize("gguf_type", FAMILIES["gguf"])
def test_trained_weights_are_those_of_the_file(tiny: PreTrainedModel, gguf_type: str) -> None:
    base = Switchable(tiny, dtype=torch.float32)
    plain = tiny.model.layers[1].mlp.down_proj.weight.data.clone()
    base.switch(Configuration.uniform(base.layers, GgufFormat(gguf_type)))
    weight = tiny.model.layers[1].mlp.down_proj.weight.data
    assert torch.equal(weight, round_trip(plain, gguf_type))
    assert not torch.equal(weight, plain)


@pytest.mark.parametrize("family", ["nf", "gguf"])
def test_a_training_set_covers_the_budgets(tiny: PreTrainedModel, family: str) -> None:
    base = Switchable(tiny, dtype=torch.float32)
    found = base.training_set(sensors("train", 2), family)
    bits = sorted(configuration.bits for configuration in found)
    low, high = SPANS[family]
    assert len(found) > 25 and {c.family for c in found} == {family}
    assert bits[0] < low + 0.3 and bits[-1] > high - 0.3
    assert all(b - a < 0.5 for a, b in itertools.pairwise(bits))
    assert found == base.training_set(sensors("train", 2), family)


def test_the_best_formats_are_a_convex_front() -> None:
    costs = [fmt.bits_per_parameter for fmt in best_formats()]
    assert costs == sorted(costs) and 10 < len(costs) < 60
    assert {fmt.bits for fmt in best_formats()} == set(GRID["bits"])
    assert costs[0] == min(x.bits_per_parameter for x in FORMATS)


def test_greedy_gives_bits_where_the_error_is() -> None:
    formats, errors = [Format(2), Format(4)], torch.tensor([[1.0, 0.1]]).repeat(len(NAMES), 1)
    errors[5] *= 100
    assert greedy_configuration(LAYERS, 2.4, formats, errors).formats[5].bits == 4
    with pytest.raises(UserError, match="bits a weight: use"):
        greedy_configuration(LAYERS, 2.0, formats, errors)


def test_greedy_beats_random_at_equal_bits(tiny: PreTrainedModel) -> None:
    base = Switchable(tiny, dtype=torch.float32)
    formats = best_formats()
    errors = format_errors(base, formats)
    assert errors.shape == (14, len(formats))
    assert (errors.diff(dim=1) < errors[:, :1] * 0.05).all()

    def error(configuration: Configuration) -> float:
        return sum(float((base.weight(i, fmt) - base.weight(i)).square().sum())
                   for i, fmt in enumerate(configuration.formats))

    greedy = greedy_configuration(base.layers, 4.0, formats, errors)
    for seed in range(3):
        assert error(greedy) < error(random_configuration(base.layers, 4.0, random.Random(seed)))


def test_sensitivity_is_what_noise_does_to_the_loss(
        tiny: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    base, record = Switchable(tiny, dtype=torch.float32), sensors("train", 1)
    felt, rng = sensitivities(base, record), torch.Generator().manual_seed(0)
    assert felt.shape == (14,) and bool((felt > 0).all())
    linears = [base.model.get_submodule(name) for name in base.layers.names]
    assert not any(linear.weight.requires_grad for linear in linears)
    ids, labels = pad_right([encode(tokenizer, record[0])], 0)

    def loss() -> float:
        with torch.no_grad():
            total, tokens = answer_loss(tiny, ids, labels)
        return float(total / tokens)

    before = loss()
    for index in (1, 6, 12):
        weight, moved = linears[index].weight, []
        plain = weight.data
        for _ in range(60):
            noise = 3e-3 * torch.randn(plain.shape, generator=rng)
            weight.data = plain + noise
            moved.append((loss() - before) ** 2)
        weight.data = plain
        expected = float(felt[index]) * plain.numel() * 3e-3 ** 2
        assert sum(moved) / 60 == pytest.approx(expected, rel=0.6)


def test_bits_go_where_they_are_felt(tiny: PreTrainedModel) -> None:
    tiny.model.layers[0].mlp.up_proj.weight.data.zero_()
    base, felt = Switchable(tiny, dtype=torch.float32), torch.ones(14)
    felt[9] = 1e6
    errors = format_errors(base, best_formats())
    plain, weighed = (greedy_configuration(base.layers, 3.0, best_formats(), weight * errors)
                      for weight in (torch.ones(14, 1), felt[:, None]))
    assert weighed.formats[9].bits == 8 > plain.formats[9].bits
    # A layer of zeros has no error.
    assert not errors[base.layers.names.index("model.layers.0.mlp.up_proj")].any()
    assert errors.isfinite().all()


@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_spending_stays_under_the_budget(seed: int, share: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    costs = torch.rand(6, 5, generator=rng).cumsum(1) + 0.01
    errors = torch.rand(6, 5, generator=rng)
    least, most = float(costs[:, 0].sum()), float(costs[:, -1].sum())
    budget = least + share * (most - least) + 1e-5
    chosen = spend(errors, costs, budget)
    assert float(costs[range(6), chosen].sum()) <= budget
    assert all(errors[i, c] <= errors[i, 0] for i, c in enumerate(chosen))
    if share == 1.0:
        assert chosen == errors.argmin(1).tolist()
