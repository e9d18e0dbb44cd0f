"""The search on problems whose answers are known; its journal; its surrogate."""

import itertools
import json
import random

import pytest
import torch
from rivals import at_random, nsga2

from lib.configuration import LEVELS, Layers
from lib.errors import UserError
from lib.pareto import SEGMENTS, hypervolume, segment
from lib.plans import random_plan
from lib.search import (
    COVER,
    FIELDS,
    STRIDES,
    Found,
    Journal,
    climb,
    fillers,
    neighbours,
    propose,
    reference_point,
    search,
)
from lib.surrogate import Features, Surrogate, numbers
from lib.switchable import Switchable

LAYERS = 8


@pytest.fixture(scope="module")
def features() -> Features:
    """Eight layers of equal size; noise falls by four a bit, and differs by layer."""
    bits = torch.tensor([level.bits_per_parameter for level in LEVELS], dtype=torch.float64)
    shares = 4.0 ** torch.arange(LAYERS, dtype=torch.float64) / 1000
    groups = torch.cat([torch.ones(LAYERS, 1), torch.eye(LAYERS)], 1).double()
    return Features(shares[:, None] * 4.0 ** -bits, (bits / LAYERS).expand(LAYERS, -1), groups)


def loss_of(features: Features):
    return lambda plan: float(features.sums(plan[None])[0, 0]) + 1e-4


def start_of(features: Features, count: int = 30) -> Found:
    plans = torch.randint(len(LEVELS), (count, LAYERS), generator=torch.Generator().manual_seed(0))
    return Found.at(plans, features, loss_of(features), Journal())


def test_a_level_s_number_is_made_of_its_fields():
    for number in (0, 17, 203, 431):
        at = [number // stride % count for stride, count in zip(STRIDES, FIELDS, strict=True)]
        assert LEVELS[number] == LEVELS[sum(a * s for a, s in zip(at, STRIDES, strict=True))]
        assert all(a < count for a, count in zip(at, FIELDS, strict=True))


@pytest.mark.parametrize("number", [0, 211, 431])
def test_neighbours_differ_in_one_field_of_one_layer(number):
    plan = torch.full((2,), number)
    layer, new = neighbours(plan)
    assert len(set(zip(layer.tolist(), new.tolist(), strict=True))) == len(layer)
    expected = set()
    for other in range(len(LEVELS)):
        changed = [(a, b, i) for i, (a, b) in enumerate(
            zip(LEVELS[number].as_list(), LEVELS[other].as_list(), strict=True)) if a != b]
        if len(changed) == 1:
            apart = abs(number - other) // STRIDES[changed[0][2]]
            if changed[0][2] == 2 or apart == 1:
                expected |= {(0, other), (1, other)}
    assert set(zip(layer.tolist(), new.tolist(), strict=True)) == expected


@pytest.mark.parametrize("start", [0, 100, 431])
@pytest.mark.parametrize("target", [0, 260, 431])
def test_the_climb_reaches_a_quadratic_s_optimum_from_any_start(start, target):
    def places(number: int) -> list[int]:
        return [number // s % c for s, c in zip(STRIDES, FIELDS, strict=True)]

    # The released code takes raw values at the borders and returns its start.
    squares = torch.tensor([sum((a - b) ** 2 for a, b in zip(
        places(n), places(target), strict=True)) for n in range(432)], dtype=torch.float64)
    features = Features(squares.expand(3, -1), squares.expand(3, -1), torch.eye(3).double())

    class Quadratic:
        def __call__(self, bits, sums):
            return 1000.0 - sums.sum(1)

    acquire = Quadratic()
    acquire.features = features
    passed = climb(torch.full((3,), start), acquire, steps=20)
    end = passed[-1] if passed else torch.full((3,), start)
    assert end.tolist() == [target] * 3


def test_the_reference_point_is_worse_than_the_dearest_plan():
    dearest = torch.tensor([[8.625, -1.0], [4.0, 0.0]], dtype=torch.float64)
    reference = reference_point(dearest)
    assert (reference > dearest).all()
    assert reference_point(dearest[1:])[0] == 8.6  # what is stored was measured from


def test_the_search_reaches_the_known_front(features):
    start = start_of(features)
    found = search(start, features, loss_of(features), evaluations=60, seed=0)
    assert len(found.plans) == 90
    reference = reference_point(start.points)
    # The true front's supported points: for each price of a bit, each layer's best level.
    prices = torch.logspace(-8, 2, 400, dtype=torch.float64)
    best = torch.stack([(features.noise + p * features.cost).argmin(1) for p in prices])
    true = Found.at(best, features, loss_of(features), Journal())
    reached, most = (hypervolume(f.points, reference) for f in (found, true))
    # Random starts alone reach far less.
    assert hypervolume(start.points, reference) < 0.9 * most
    assert reached > 0.97 * most


def test_the_same_seed_searches_the_same_way(features):
    start = start_of(features)
    runs = [search(start, features, loss_of(features), evaluations=10, seed=s)
            for s in (3, 3, 4)]
    assert torch.equal(runs[0].plans, runs[1].plans)
    assert not torch.equal(runs[0].plans, runs[2].plans)


def test_a_search_that_is_cut_goes_on_to_the_same_result(features, tmp_path):
    start, path, made = start_of(features), tmp_path / "j.jsonl", itertools.count()

    def failing(plan):
        if next(made) == 7:
            raise RuntimeError("the power is gone")
        return loss_of(features)(plan)

    with pytest.raises(RuntimeError, match="power"):
        search(start, features, failing, evaluations=15, journal=Journal(path, "a"))
    with path.open("a") as file:
        file.write('{"bits": 3.1, "lo')  # cut while it wrote
    count = itertools.count()

    def counted(plan):
        next(count)
        return loss_of(features)(plan)

    again = search(start, features, counted, evaluations=15, journal=Journal(path, "a"))
    assert torch.equal(again.plans,
                       search(start, features, loss_of(features), evaluations=15).plans)
    assert next(count) == 8  # seven were known
    assert len(path.read_text().splitlines()) == 16
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_journal_of_something_else_is_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, "a")
    with pytest.raises(UserError, match="another search"):
        Journal(path, "b")
    path.write_text('{"key": "a"}\nnonsense\n')
    with pytest.raises(UserError, match="no journal"):
        Journal(path, "a")


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 0.0])
def test_a_loss_that_is_no_number_raises(features, loss):
    with pytest.raises(UserError, match="finite loss"):
        search(start_of(features), features, lambda plan: loss, evaluations=5)


def test_a_failure_in_the_search_raises(features, monkeypatch):
    def failing(*_, **__):
        raise FloatingPointError("not positive definite")

    monkeypatch.setattr(Surrogate, "fit", failing)
    with pytest.raises(FloatingPointError, match="positive definite"):
        search(start_of(features), features, loss_of(features), evaluations=5)


def test_a_search_that_knows_everything_ends(features, monkeypatch):
    """No error, and no plan twice: what it found comes back."""
    start = start_of(features)
    monkeypatch.setattr("lib.search.climb", lambda plan, *_: [plan])
    monkeypatch.setattr("lib.search.fillers", lambda *_: [])
    found = search(start, features, loss_of(features), evaluations=5)
    assert torch.equal(found.plans, start.plans)


def test_two_surrogates_are_independent(features):
    # The released code's two processes share a kernel: the second fit overwrites the first.
    start = start_of(features)
    sums = features.sums(start.plans)
    first = Surrogate().fit(sums, start.points[:, 1])
    before, learnt = first.predict(sums), first.process.kernel_.theta.copy()
    second = Surrogate().fit(sums, torch.randn(len(sums), dtype=torch.float64))
    assert (first.process.kernel_.theta == learnt).all()
    assert all(torch.equal(a, b) for a, b in zip(before, first.predict(sums), strict=True))
    assert (second.process.kernel_.theta != learnt).any()


def test_the_surrogate_predicts_what_it_has_not_seen(features):
    start, new = start_of(features, 60), torch.randint(432, (40, LAYERS))
    surrogate = Surrogate().fit(features.sums(start.plans), start.points[:, 1])
    mean, spread = surrogate.predict(features.sums(new))
    truth = Found.at(new, features, loss_of(features), Journal()).points[:, 1]
    assert float((mean - truth).square().mean() / truth.var()) < 0.02
    assert float(((mean - truth).abs() < 3 * spread).double().mean()) > 0.9


def test_a_batch_holds_different_plans(features):
    start = start_of(features)
    surrogate = Surrogate().fit(features.sums(start.plans), start.points[:, 1])
    batch = propose(start, features, surrogate, reference_point(start.points), count=5,
                    rng=random.Random(0))
    assert len({tuple(p.tolist()) for p in batch}) == 5


def test_nsga2_has_the_same_start_and_number_of_evaluations(features, tmp_path):
    start, asked = start_of(features), []

    def evaluate(plan):
        asked.append(tuple(plan.tolist()))
        return loss_of(features)(plan)

    journal = Journal(tmp_path / "j.jsonl", "a")
    for plan, (_, log) in zip(start.plans, start.points, strict=True):
        journal.known[tuple(plan.tolist())] = float(log.exp())
    found = nsga2(start, features, evaluate, evaluations=12, seed=0, journal=journal)
    assert torch.equal(found.plans[:30].unique(dim=0), start.plans.unique(dim=0))
    assert len(found.plans) == 42 and len(asked) <= 15
    assert bool(((found.plans >= 0) & (found.plans < len(LEVELS))).all())
    # Children are made of the parents' fields.
    assert not {tuple(p.tolist()) for p in found.plans[30:]} <= {
        tuple(p.tolist()) for p in start.plans}


def test_random_plans_are_spread_over_the_budgets(tiny):
    layers = Layers.of(tiny)
    bits = torch.tensor([level.bits_per_parameter for level in LEVELS], dtype=torch.float64)
    sizes = torch.tensor(layers.sizes, dtype=torch.float64)
    flat = Features(torch.ones(14, 432, dtype=torch.float64),
                    bits * (sizes / sizes.sum())[:, None], torch.ones(14, 1).double())
    start = Found.at(torch.zeros(1, 14, dtype=torch.long), flat, lambda plan: 1.0, Journal())
    found = at_random(start, flat, lambda plan: 2.0, layers, evaluations=30, seed=0,
                      journal=Journal())
    assert len(found.plans) == 31
    assert found.points[1:, 0].min() < 3 and found.points[1:, 0].max() > 6


def test_features_add_up_and_know_the_bits(tiny):
    base = Switchable(tiny, dtype=torch.float32)
    features = Features.of(base, torch.ones(14))
    plan = random_plan(base.layers, 4.0, random.Random(0))
    row = numbers(plan)
    assert float(features.bits(row[None])) == pytest.approx(plan.bits)
    sums = features.sums(row[None])[0]
    assert float(sums[1:8].sum()) == pytest.approx(float(sums[0]))  # by kind
    assert float(sums[8:].sum()) == pytest.approx(float(sums[0]))  # by depth
    # A layer's noise is its squared error, here of all its weights.
    whole = torch.stack([(base.weight(3, level) - base.weight(3)).square().sum()
                         for level in (LEVELS[0], LEVELS[200], LEVELS[431])])
    assert torch.allclose(features.noise[3, [0, 200, 431]].float(), whole, rtol=0.2)


def test_empty_segments_are_filled_first():
    layers = 120
    bits = torch.tensor([level.bits_per_parameter for level in LEVELS], dtype=torch.float64)
    shares = torch.rand(layers, generator=torch.Generator().manual_seed(0)).double() + 0.01
    features = Features(shares[:, None] * 4.0 ** -bits, (bits / layers).expand(layers, -1),
                        torch.ones(layers, 1).double())
    plans = torch.randint(len(LEVELS), (20, layers), generator=torch.Generator().manual_seed(0))
    found = Found.at(plans, features, loss_of(features), Journal())
    taken = set(segment(found.points[:, 0]).tolist())
    made = torch.stack(fillers(features, found.points))
    assert sorted(segment(features.bits(made)).tolist()) == [
        i for i in range(SEGMENTS) if i not in taken]
    surrogate = Surrogate(starts=1).fit(features.sums(found.plans), found.points[:, 1])
    new = propose(found, features, surrogate, reference_point(found.points), count=5,
                  rng=random.Random(0))
    assert len(set(segment(features.bits(new)[:COVER]).tolist()) - taken) == COVER
