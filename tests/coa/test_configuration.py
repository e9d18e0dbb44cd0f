"""What a configuration is, costs, and where it comes from."""

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
    Configuration,
    Layers,
    Switchable,
    best_formats,
    block_and_kind,
    format_errors,
    greedy_configuration,
    numbers,
    random_configuration,
    sensitivities,
    spend,
)
from lib.errors import UserError
from lib.evaluate.scores import answer_loss
from lib.quantize.formats import FORMATS, GRID, Format

BLOCKS = 3
NAMES = tuple(f"model.layers.{i}.{'self_attn' if k[0] in 'qkvo' else 'mlp'}.{k}"
              for i in range(BLOCKS) for k in MODULE_KINDS)
LAYERS = Layers(NAMES, tuple(64 * (10 + i % 7) for i in range(len(NAMES))))
configurations = st.lists(st.sampled_from(FORMATS), min_size=len(NAMES), max_size=len(NAMES)).map(
    lambda formats: Configuration(LAYERS, tuple(formats)))


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


@given(configurations)
def test_there_and_back_and_what_it_costs(configuration: Configuration) -> None:
    data = json.loads(json.dumps(configuration.to_json()))
    assert Configuration.from_json(data, LAYERS) == configuration
    assert from_numbers(LAYERS, numbers(configuration).tolist()) == configuration
    costs = [fmt.bits_per_parameter for fmt in configuration.formats]
    assert min(costs) - 1e-9 <= configuration.bits <= max(costs) + 1e-9
    assert configuration.bytes * 8 >= configuration.bits * sum(LAYERS.sizes)
    assert [len(row) for row in configuration.grid()] == [len(MODULE_KINDS)] * BLOCKS
    assert list(itertools.chain(*configuration.grid())) == costs


def test_one_line() -> None:
    configuration = Configuration.uniform(LAYERS, Format(bits=3))
    assert str(configuration) == f"{configuration.bits:.2f} bits a weight, 0.0 MB: 21 in 3 bits"
    with pytest.raises(UserError, match="2 formats for 21 layers"):
        Configuration(LAYERS, (Format(), Format()))


def changed(name: str, value: Any) -> dict[str, Any]:
    data = Configuration.uniform(LAYERS, Format()).to_json()
    data["layers"][name] = value
    return data


@pytest.mark.parametrize(("data", "word"), [
    ([], "a configuration is"), ({"layers": 3}, "a configuration is"),
    ({"layers": {}}, f"lacks {NAMES[0]}"),
    (changed("model.layers.9.mlp.up_proj", [4, 8, "fp32", 64, 256]),
     "no layer model.layers.9.mlp.up_proj"),
    (changed(NAMES[2], [5, 8, "fp32", 64, 256]), f"{NAMES[2]}: [5, 8,"),
    (changed(NAMES[2], [4, 8, "fp64", 64, 256]), "scale_dtype is 'fp64'"),
    (changed(NAMES[2], [4, 8, "fp32", 64]), f"{NAMES[2]}: [4, 8, 'fp32', 64] is not [b,"),
    (changed(NAMES[2], None), f"{NAMES[2]}: None is not"),
    (changed(NAMES[2], [[4], 8, "fp32", 64, 256]), f"{NAMES[2]}: [[4]")])
def test_bad_configurations(data: Any, word: str) -> None:
    with pytest.raises(UserError) as caught:
        Configuration.from_json(data, LAYERS)
    assert word in str(caught.value)


@given(st.floats(2.2, 8.3), st.integers(0, 99))
def test_random_configurations_meet_their_budget(budget: float, seed: int) -> None:
    configuration = random_configuration(LAYERS, budget, random.Random(seed))
    assert abs(configuration.bits - budget) <= 0.05
    assert configuration == random_configuration(LAYERS, budget, random.Random(seed))


def test_budgets_out_of_reach() -> None:
    for budget in (1.0, 2.0, 8.63, float("nan")):
        with pytest.raises(UserError, match="cannot be reached"):
            random_configuration(LAYERS, budget, random.Random(0))
    with pytest.raises(UserError, match=r"found no mixture of formats at 6.5"):
        random_configuration(Layers(NAMES[:1], (64,)), 6.5, random.Random(0))


def test_the_best_formats_are_a_convex_front() -> None:
    costs = [fmt.bits_per_parameter for fmt in best_formats()]
    assert costs == sorted(costs) and 10 < len(costs) < 60
    assert {fmt.bits for fmt in best_formats()} == set(GRID["bits"])
    assert costs[0] == min(x.bits_per_parameter for x in FORMATS)


def test_greedy_gives_bits_where_the_error_is() -> None:
    formats, errors = [Format(2), Format(4)], torch.tensor([[1.0, 0.1]]).repeat(len(NAMES), 1)
    errors[5] *= 100
    assert greedy_configuration(LAYERS, 2.4, formats, errors).formats[5].bits == 4
    with pytest.raises(UserError, match="below the cheapest"):
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
