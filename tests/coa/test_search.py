"""The search on problems whose answers are known; its journal; its surrogate."""

import itertools
import json
import random
from dataclasses import astuple

import pytest
import torch

from data.evidence.front import JournalFile
from data.evidence.rivals import FIELDS, STRIDES
from lib.coa.configuration import Switchable, random_configuration
from lib.coa.pareto import (
    COVER,
    SEGMENTS,
    Evaluated,
    Features,
    Journal,
    Surrogate,
    climb,
    fillers,
    hypervolume,
    neighbours,
    propose,
    reference_point,
    search,
    segment,
)
from lib.errors import UserError
from lib.quantize.formats import FAMILIES, FORMATS

LAYERS = 8


@pytest.fixture(scope="module")
def features() -> Features:
    """Eight layers of equal size; noise falls by four a bit, and differs by layer."""
    bits = torch.tensor([fmt.bits_per_parameter for fmt in FORMATS], dtype=torch.float64)
    shares = 4.0 ** torch.arange(LAYERS, dtype=torch.float64) / 1000
    groups = torch.cat([torch.ones(LAYERS, 1), torch.eye(LAYERS)], 1).double()
    return Features(shares[:, None] * 4.0 ** -bits, (bits / LAYERS).expand(LAYERS, -1), groups)


def loss_of(features: Features):
    return lambda configuration: float(features.sums(configuration[None])[0, 0]) + 1e-4


def start_of(features: Features, count: int = 30) -> Evaluated:
    rng = torch.Generator().manual_seed(0)
    configurations = torch.randint(len(FORMATS), (count, LAYERS), generator=rng)
    return Evaluated.at(configurations, features, loss_of(features), Journal())


def surrogate_of(evaluated: Evaluated, features: Features, **options: int) -> Surrogate:
    return Surrogate(features.sums(evaluated.configurations), evaluated.points[:, 1], **options)


@pytest.mark.parametrize("number", [0, 211, 431])
def test_neighbours_differ_in_one_field_of_one_layer(features, number):
    layer, new = neighbours(torch.full((2,), number), features)
    assert len(set(zip(layer.tolist(), new.tolist(), strict=True))) == len(layer)
    expected = set()
    for other in range(len(FORMATS)):
        changed = [(a, b, i) for i, (a, b) in enumerate(
            zip(astuple(FORMATS[number]), astuple(FORMATS[other]), strict=True)) if a != b]
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
    passed = climb(torch.full((3,), start), features, lambda _, sums: 1000.0 - sums.sum(1),
                   steps=20)
    end = passed[-1] if passed else torch.full((3,), start)
    assert end.tolist() == [target] * 3


def test_the_search_reaches_the_known_front(features):
    start = start_of(features)
    evaluated = search(start, features, loss_of(features), evaluations=60, seed=0)
    assert len(evaluated.configurations) == 90
    reference = reference_point(start.points)
    # The true front's supported points: for each price of a bit, each layer's best format.
    prices = torch.logspace(-8, 2, 400, dtype=torch.float64)
    best = torch.stack([(features.noise + p * features.cost).argmin(1) for p in prices])
    true = Evaluated.at(best, features, loss_of(features), Journal())
    reached, most = (hypervolume(e.points, reference) for e in (evaluated, true))
    # Random starts alone reach far less.
    assert hypervolume(start.points, reference) < 0.9 * most
    assert reached > 0.97 * most


def test_the_same_seed_searches_the_same_way(features):
    start = start_of(features)
    runs = [search(start, features, loss_of(features), evaluations=10, seed=s)
            for s in (3, 3, 4)]
    assert torch.equal(runs[0].configurations, runs[1].configurations)
    assert not torch.equal(runs[0].configurations, runs[2].configurations)


def test_a_search_that_is_cut_goes_on_to_the_same_result(features, tmp_path):
    start, path, calls = start_of(features), tmp_path / "j.jsonl", itertools.count()

    def failing(configuration):
        if next(calls) == 7:
            raise RuntimeError("the power is gone")
        return loss_of(features)(configuration)

    # Failures of an evaluation are not swallowed, as the released code does.
    with pytest.raises(RuntimeError, match="power"):
        search(start, features, failing, evaluations=15, journal=JournalFile(path, "a"))
    with path.open("a") as file:
        file.write('[3.1, [2,')  # cut while it wrote
    again = search(start, features, failing, evaluations=15, journal=JournalFile(path, "a"))
    whole = search(start, features, loss_of(features), evaluations=15)
    assert torch.equal(again.configurations, whole.configurations)
    assert torch.equal(again.points, whole.points)
    assert next(calls) == 16  # seven, the failure, and the eight that were missing
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == "a" and len(rows) == 16
    assert all(loss > 0 and len(positions) == LAYERS for loss, positions in rows[1:])


@pytest.mark.parametrize("content", [
    "", '"b"\n', '"a"\nnonsense\n', '"a"\n{"loss": 1.0, "configuration": {"layers": {}}}\n',
    '"a"\n[1.0]\n', '"a"\n[[0], 1.0]\n'])
def test_a_journal_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "j.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="is not the journal of this search .*: remove it"):
        JournalFile(path, "a")
    assert path.read_text() == content


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 0.0])
def test_a_loss_that_is_not_finite_raises(features, loss):
    with pytest.raises(UserError, match="finite loss"):
        search(start_of(features), features, lambda _: loss, evaluations=5)


def test_a_search_that_knows_everything_ends(features, monkeypatch):
    start = start_of(features)
    monkeypatch.setattr("lib.coa.pareto.climb", lambda configuration, *_: [configuration])
    monkeypatch.setattr("lib.coa.pareto.fillers", lambda *_: [])
    evaluated = search(start, features, loss_of(features), evaluations=5)
    assert torch.equal(evaluated.configurations, start.configurations)


def test_two_surrogates_are_independent(features):
    # The released code's two processes share a kernel: the second fit overwrites the first.
    start = start_of(features)
    sums = features.sums(start.configurations)
    first = Surrogate(sums, start.points[:, 1])
    before, learnt = first.predict(sums), first.process.kernel_.theta.copy()
    second = Surrogate(sums, torch.randn(len(sums), dtype=torch.float64))
    assert (first.process.kernel_.theta == learnt).all()
    assert all(torch.equal(a, b) for a, b in zip(before, first.predict(sums), strict=True))
    assert (second.process.kernel_.theta != learnt).any()


def test_the_surrogate_predicts_what_it_has_not_seen(features):
    start, new = start_of(features, 60), torch.randint(432, (40, LAYERS))
    mean, spread = surrogate_of(start, features).predict(features.sums(new))
    truth = Evaluated.at(new, features, loss_of(features), Journal()).points[:, 1]
    assert float((mean - truth).square().mean() / truth.var()) < 0.02
    assert float(((mean - truth).abs() < 3 * spread).double().mean()) > 0.9


def test_features_add_up_and_know_the_bits(tiny):
    base = Switchable(tiny, dtype=torch.float32)
    features = Features.of(base, torch.ones(14))
    configuration = random_configuration(base.layers, 4.0, random.Random(0))
    row = configuration.numbers
    assert float(features.bits(row[None])) == pytest.approx(configuration.bits)
    sums = features.sums(row[None])[0]
    assert float(sums[1:8].sum()) == pytest.approx(float(sums[0]))  # by module kind
    assert float(sums[8:].sum()) == pytest.approx(float(sums[0]))  # by depth
    # A layer's noise is its squared error, here of all its weights.
    whole = torch.stack([(base.weight(3, fmt) - base.weight(3)).square().sum()
                         for fmt in (FORMATS[0], FORMATS[200], FORMATS[431])])
    assert torch.allclose(features.noise[3, [0, 200, 431]].float(), whole, rtol=0.2)


def test_empty_segments_are_filled_first():
    rng, layers = torch.Generator().manual_seed(0), 120
    bits = torch.tensor([fmt.bits_per_parameter for fmt in FORMATS], dtype=torch.float64)
    shares = torch.rand(layers, generator=rng).double() + 0.01
    features = Features(shares[:, None] * 4.0 ** -bits, (bits / layers).expand(layers, -1),
                        torch.ones(layers, 1).double())
    start = Evaluated.at(torch.randint(len(FORMATS), (20, layers), generator=rng), features,
                         loss_of(features), Journal())
    taken = set(segment(start.points[:, 0]).tolist())
    fills = torch.stack(fillers(features, start.points))
    assert sorted(segment(features.bits(fills)).tolist()) == [
        i for i in range(SEGMENTS) if i not in taken]
    batch = propose(start, features, surrogate_of(start, features, starts=1),
                    reference_point(start.points), count=5, rng=random.Random(0))
    assert len({tuple(row) for row in batch.tolist()}) == 5
    assert len(set(segment(features.bits(batch)[:COVER]).tolist()) - taken) == COVER


def test_a_type_may_become_any_other(tiny):
    base = Switchable(tiny, dtype=torch.float32)
    features = Features.of(base, torch.ones(14), "gguf")
    layer, new = neighbours(torch.full((14,), 2), features)
    expected = {(i, n) for i in range(14) for n in range(len(FAMILIES["gguf"])) if n != 2}
    assert set(zip(layer.tolist(), new.tolist(), strict=True)) == expected
