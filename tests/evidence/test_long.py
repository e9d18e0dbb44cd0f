"""What takes gigabytes or hours: `python -m pytest -m long`."""

import pytest

from data.evidence.load import soak
from data.evidence.make import edge_files
from data.evidence.vllm import compared

pytestmark = pytest.mark.long


def test_vllm_answers_as_our_server() -> None:
    rows = compared(10)
    for name, ours in rows["ours"].items():
        theirs = rows["vllm"][name]["hits"]
        assert sum(a != b for a, b in zip(ours["hits"], theirs, strict=True)) <= 1, name


def test_memory_is_flat_over_hours() -> None:
    row = soak(edge_files() / "Q8_0_lora")
    assert row["other_text"] == 0
    assert abs(row["front_mb_an_hour"]) < 1 and abs(row["engine_mb_an_hour"]) < 5
