"""Rivals in the same bytes: level switching keeps them, AutoRound's layers are Q4_0's codes."""

import random
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from data.evidence import equal_bytes
from data.evidence.equal_bytes import as_q4_0, child_of, evolution
from lib.base.records import Record
from lib.coa.configuration import Configuration, Layers
from lib.deploy.deployment import FAST
from lib.errors import UserError
from lib.quantize.formats import decode

LAYERS = Layers(tuple(f"layer{i}" for i in range(12)), (64, 128) * 6)
START = Configuration(LAYERS, (FAST[1],) * 4 + (FAST[0],) * 8)


def test_a_child_has_the_bytes_of_its_parent() -> None:
    rng, seen = random.Random(0), [START]
    for _ in range(50):
        seen.append(child_of(rng.choice(seen), rng))
        assert seen[-1].bytes == START.bytes
    assert len({*seen}) > 20


def test_the_best_of_the_second_judgement_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_bytes, "GENERATIONS", 60)

    def judge(configuration: Configuration, records: Sequence[Record]) -> float:
        """Best with the larger type in the last layers; the first judgement says nothing."""
        loss = sum(1 / (1 + i) for i, kind in enumerate(configuration.formats) if kind == FAST[1])
        return loss if len(records) == equal_bytes.MANY else 1.0

    best = evolution(START, judge, [{}] * 100)
    assert best.formats == (FAST[0],) * 8 + (FAST[1],) * 4 and best.bytes == START.bytes


def test_rounded_layers_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    codes, scales = torch.randint(-8, 8, (6, 3, 32)), torch.randn(6, 3).half()
    weight = torch.nn.Parameter((codes * scales.float()[..., None]).view(6, 96))
    layer = SimpleNamespace(scale=scales, weight=weight)
    assert torch.equal(decode(as_q4_0("q", layer), "Q4_0"), weight.data)
    weight.data += 0.3 * scales.float().repeat_interleave(32, 1)
    with pytest.raises(UserError, match="q is not in Q4_0's form"):
        as_q4_0("q", layer)
