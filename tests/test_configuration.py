"""lib.configuration and lib.plans: what a configuration is, costs, and where it comes from."""

import copy
import itertools
import json
import random
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from coa import starting_set
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.configuration import GRID, KINDS, LEVELS, Configuration, Layers, Level, place
from lib.errors import UserError
from lib.plans import (
    best_levels,
    error_table,
    greedy_plan,
    random_plan,
    sensitivities,
    spend,
)
from lib.plots import heat_map
from lib.switchable import Switchable
from lib.tasks import answer_loss, encode, pad_right, sensors

BLOCKS = 3
NAMES = tuple(f"model.layers.{i}.{'self_attn' if k[0] in 'qkvo' else 'mlp'}.{k}"
              for i in range(BLOCKS) for k in KINDS)
LAYERS = Layers(NAMES, tuple(64 * (10 + i % 7) for i in range(len(NAMES))))
levels = st.sampled_from(LEVELS)
configurations = st.lists(levels, min_size=len(NAMES), max_size=len(NAMES)).map(
    lambda chosen: Configuration(LAYERS, tuple(chosen)))


def test_the_grid_has_432_levels() -> None:
    assert len(LEVELS) == len(set(LEVELS)) == 432
    assert min(x.bits_per_parameter for x in LEVELS) == 2 + 2 / 64 + 16 / (64 * 256)
    assert max(x.bits_per_parameter for x in LEVELS) == 8 + 8 / 16 + 32 / (16 * 16)


@pytest.mark.parametrize(("field", "value"), [
    ("bits", 5), ("bits", "4"), ("bits", 4.0), ("bits", True), ("bits", None),
    ("scale_bits", 16), ("scale_dtype", "int8"), ("block", 48), ("group", 0)])
def test_a_level_names_the_illegal_value(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{field} is {value!r}"):
        Level(**{field: value})


def test_positions_differ_by_block_and_kinds_within_it() -> None:
    """The released code gives every Llama block the position 0."""
    places = [place(name) for name in NAMES]
    assert len(set(places)) == len(NAMES)
    assert [block for block, _ in places] == [i for i in range(BLOCKS) for _ in KINDS]
    attention, mlp = "model.layers.7.self_attn.o_proj", "model.layers.7.mlp.down_proj"
    assert place(attention)[1] != place(mlp)[1]
    assert place("base_model.model.model.layers.12.mlp.up_proj") == (12, "up_proj")


@pytest.mark.parametrize("name", ["lm_head", "model.layers.0.mlp.act_fn", "layers.x.q_proj",
                                  "model.embed_tokens"])
def test_other_modules_have_no_place(name: str) -> None:
    with pytest.raises(UserError, match="no linear layer"):
        place(name)


def test_layers_of_a_model(tiny: PreTrainedModel) -> None:
    layers = Layers.of(tiny)
    assert len(layers.names) == 14
    assert layers.sizes[:3] == (64 * 64, 32 * 64, 32 * 64)
    with pytest.raises(UserError, match="no Llama blocks"):
        Layers.of(torch.nn.Linear(2, 2))


@given(configurations)
def test_json_there_and_back(plan: Configuration) -> None:
    data = json.loads(json.dumps(plan.to_json()))
    assert Configuration.from_json(data, LAYERS) == plan


@given(configurations)
def test_bits_lie_between_the_levels(plan: Configuration) -> None:
    costs = [level.bits_per_parameter for level in plan.levels]
    assert min(costs) - 1e-9 <= plan.bits <= max(costs) + 1e-9
    assert plan.bytes * 8 >= plan.bits * sum(LAYERS.sizes)
    assert [len(row) for row in plan.grid()] == [len(KINDS)] * BLOCKS
    assert list(itertools.chain(*plan.grid())) == costs


def test_one_line() -> None:
    plan = Configuration.uniform(LAYERS, Level(bits=3))
    assert str(plan) == f"{plan.bits:.2f} bits a weight, 0.0 MB: 21 in 3 bits"


def good() -> dict[str, Any]:
    return Configuration.uniform(LAYERS, Level()).to_json()


def changed(name: str, value: Any) -> dict[str, Any]:
    data = good()
    data["layers"][name] = value
    return data


@pytest.mark.parametrize(("data", "word"), [
    ([], "a configuration is"), ("x", "a configuration is"), ({"layers": 3}, "a configuration"),
    ({"layers": {}}, f"lacks {NAMES[0]} and 20 more"),
    ({"layers": {k: v for k, v in good()["layers"].items() if k != NAMES[4]}},
     f"lacks {NAMES[4]}"),
    (changed("model.layers.9.mlp.up_proj", [4, 8, "fp32", 64, 256]),
     "no layer model.layers.9.mlp.up_proj"),
    (changed(NAMES[2], [5, 8, "fp32", 64, 256]), f"{NAMES[2]}: bits is 5"),
    (changed(NAMES[2], [4, 8, "fp64", 64, 256]), f"{NAMES[2]}: scale_dtype is 'fp64'"),
    (changed(NAMES[2], [4, 8, "fp32", 64]), f"{NAMES[2]} has"),
    (changed(NAMES[2], None), f"{NAMES[2]} has None"),
    (changed(NAMES[2], [[4], 8, "fp32", 64, 256]), f"{NAMES[2]}: bits is"),
])
def test_bad_configurations(data: Any, word: str) -> None:
    with pytest.raises(UserError) as caught:
        Configuration.from_json(data, LAYERS)
    assert word in str(caught.value)


def test_a_level_for_each_layer() -> None:
    with pytest.raises(UserError, match="2 levels for 21 layers"):
        Configuration(LAYERS, (Level(), Level()))


def test_saved_and_loaded(tmp_path: Path) -> None:
    plan = random_plan(LAYERS, 4.0, random.Random(1))
    plan.save(tmp_path / "plan.json")
    assert Configuration.load(tmp_path / "plan.json", LAYERS) == plan
    (tmp_path / "bad.json").write_text("{")
    for name, word in (("bad.json", "JSON"), ("none.json", "does not exist")):
        with pytest.raises(UserError, match=word):
            Configuration.load(tmp_path / name, LAYERS)


@given(st.floats(2.2, 8.3), st.integers(0, 99))
def test_random_plans_meet_their_budget(budget: float, seed: int) -> None:
    plan = random_plan(LAYERS, budget, random.Random(seed))
    assert abs(plan.bits - budget) <= 0.05
    assert plan == random_plan(LAYERS, budget, random.Random(seed))


@pytest.mark.parametrize("budget", [1.0, 2.0, 8.63, float("nan")])
def test_budgets_out_of_reach(budget: float) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        random_plan(LAYERS, budget, random.Random(0))


@pytest.fixture(scope="module")
def some_levels() -> tuple[Level, ...]:
    return best_levels("nf", 1 << 14)


def test_the_best_levels_are_a_convex_front(some_levels: tuple[Level, ...]) -> None:
    costs = [level.bits_per_parameter for level in some_levels]
    assert costs == sorted(costs) and 10 < len(costs) < 60
    assert {level.bits for level in some_levels} == set(GRID["bits"])
    assert some_levels[0].bits_per_parameter == min(x.bits_per_parameter for x in LEVELS)


@given(st.floats(2.1, 8.6))
def test_greedy_spends_what_is_there(budget: float) -> None:
    chosen = [Level(2), Level(3), Level(4), Level(8)]
    gen = torch.Generator().manual_seed(0)
    scale = torch.rand(len(NAMES), 1, generator=gen) + 0.1
    errors = scale * torch.tensor([[0.12, 0.035, 0.009, 0.0]])
    if budget < chosen[0].bits_per_parameter:
        return
    plan = greedy_plan(LAYERS, budget, chosen, errors)
    assert plan.bits <= budget + 1e-9
    # What is left does not pay for one more step anywhere.
    step = 4.2 * max(LAYERS.sizes) / sum(LAYERS.sizes)
    assert plan.bits > min(budget, chosen[-1].bits_per_parameter) - step


def test_greedy_gives_bits_where_the_error_is() -> None:
    chosen = [Level(2), Level(4)]
    errors = torch.ones(len(NAMES), 2) * torch.tensor([1.0, 0.1])
    errors[5] *= 100
    plan = greedy_plan(LAYERS, 2.4, chosen, errors)
    assert plan.levels[5].bits == 4
    with pytest.raises(UserError, match="below the cheapest"):
        greedy_plan(LAYERS, 2.0, chosen, errors)


def test_greedy_beats_random_at_equal_bits(tiny: PreTrainedModel) -> None:
    base = Switchable(tiny, dtype=torch.float32)
    choice, errors = error_table(base)
    assert errors.shape == (14, len(choice))
    assert (errors.diff(dim=1) < errors[:, :1] * 0.05).all()

    def error(plan: Configuration) -> float:
        return sum(float((base.weight(i, level) - base.weight(i)).square().sum())
                   for i, level in enumerate(plan.levels))

    budget = greedy_plan(base.layers, 4.0, choice, errors)
    for seed in range(3):
        assert error(budget) < error(random_plan(base.layers, 4.0, random.Random(seed)))


def test_the_starting_set_covers_the_budgets(tiny: PreTrainedModel) -> None:
    base = Switchable(tiny, dtype=torch.float32)
    table = error_table(base)
    plans = starting_set(base, table, count=12)
    assert len(plans) == 12
    bits = sorted(plan.bits for plan in plans)
    assert bits[0] < 3.2 and bits[-1] > 6.2
    assert plans == starting_set(base, table, count=12)
    assert plans != starting_set(base, table, count=12, seed=1)


def test_a_budget_that_no_mixture_meets() -> None:
    one = Layers(NAMES[:1], (64,))
    with pytest.raises(UserError, match=r"no mixture of levels was found at 6.5"):
        random_plan(one, 6.5, random.Random(0))


def test_errors_are_those_of_the_bases_grid(tiny: PreTrainedModel) -> None:
    nf, whole = (error_table(Switchable(copy.deepcopy(tiny), dtype=torch.float32, grid=grid))
                 for grid in ("nf", "int"))
    assert nf[0] != whole[0] or not torch.equal(nf[1], whole[1])




def test_the_heat_map_shows_every_layer() -> None:
    plan = random_plan(LAYERS, 4.0, random.Random(2))
    heat_map(plan)
    shown = plt.gca().get_images()[0].get_array()
    assert shown.T.tolist() == plan.grid()
    assert [label.get_text() for label in plt.gca().get_yticklabels()][3] == "o"
    plt.close("all")


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
    base = Switchable(tiny, dtype=torch.float32)
    felt = torch.ones(14)
    felt[9] = 1e6
    plain, weighed = (greedy_plan(base.layers, 3.0, *error_table(base, f)) for f in (None, felt))
    assert weighed.levels[9].bits == 8 > plain.levels[9].bits


@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_what_is_spent_stays_under_the_budget(seed: int, share: float) -> None:
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


def test_a_layer_of_zeros_has_no_error(tiny: PreTrainedModel) -> None:
    tiny.model.layers[0].mlp.up_proj.weight.data.zero_()
    base = Switchable(tiny, dtype=torch.float32)
    _, errors = error_table(base)
    zero = [name.endswith("layers.0.mlp.up_proj") for name in base.layers.names].index(True)
    assert not errors[zero].any() and errors.isfinite().all()
