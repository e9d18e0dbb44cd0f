"""data/: the sensor and sentiment sets are what their datasheets say, and cannot be guessed."""

import collections
import importlib.util
import json
import re
import types
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from lib.base.embedded import locate
from lib.base.records import DATA, Record, sensors
from lib.coa.configuration import Configuration, Layers
from lib.coa.pareto import front_by_segment
from lib.evaluate.scores import keyword_hit
from lib.files import read_json, sha256, verified

SENSORS, SENTIMENT = DATA / "sensors", DATA / "movie_sentiment"
SPLITS = {"train": 5000, "validation": 500, "test": 500, "test_phrasings": 500}
Reading = tuple[str, float, str]  # quantity, value in its first unit, as printed


def load(path: Path) -> types.ModuleType:
    """A script of data/ as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load(SENSORS / "generate.py")
UNITS = {re.escape(unit) for table in generator.UNITS.values() for unit, _, _ in table}
READING = rf"({'|'.join(generator.QUANTITIES)}) (\d+(?:\.\d+)?) ({'|'.join(UNITS)})\b"


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Record]]:
    """All sensor records, read by the library's own validating reader."""
    return {name: sensors(name) for name in SPLITS}


@pytest.fixture(scope="module")
def everything(splits: dict[str, list[Record]]) -> list[Record]:
    return [record for records in splits.values() for record in records]


@pytest.mark.parametrize("script", [SENSORS / "generate.py", SENTIMENT / "make_splits.py"])
def test_scripts_reproduce_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     script: Path) -> None:
    module = load(script)
    monkeypatch.setattr(module, "HERE", tmp_path)
    (tmp_path / "snippets.tsv").write_bytes((SENTIMENT / "snippets.tsv").read_bytes())
    module.main()
    names = sorted(p.name for p in script.parent.glob("*.jsonl"))
    assert names and names == sorted(p.name for p in tmp_path.glob("*.jsonl"))
    for name in names:
        assert (tmp_path / name).read_bytes() == (script.parent / name).read_bytes(), name


def test_sensor_splits_are_clean_and_balanced(splits: dict[str, list[Record]],
                                              everything: list[Record]) -> None:
    assert {name: len(records) for name, records in splits.items()} == SPLITS
    assert len({r["instruction"] for r in everything}) == len(everything)
    for record in everything:
        assert record.keys() == {"instruction", "response", "expected_keyword", "device", "fault"}
        assert all(v.strip() == v and v for v in record.values())
    for records in splits.values():
        for key, names in (("fault", generator.FAULTS), ("device", generator.LIMITS)):
            counts = collections.Counter(r[key] for r in records)
            mean = len(records) / len(names)
            assert counts.keys() == names.keys()
            assert all(0.9 * mean <= count <= 1.1 * mean for count in counts.values())


def test_the_keyword_tells_the_answers_apart(everything: list[Record]) -> None:
    """The right answer scores, no other fault's keyword is in it, and none is in the prompt."""
    for record in everything:
        assert record["expected_keyword"] == record["fault"]
        hits = [f for f in generator.FAULTS if keyword_hit(record["response"], f)]
        assert hits == [record["fault"]]
        assert not any(keyword_hit(record["instruction"], f) for f in generator.FAULTS)


def test_unseen_phrasings_are_unseen(splits: dict[str, list[Record]]) -> None:
    assert not set(generator.PHRASINGS) & set(generator.UNSEEN_PHRASINGS)
    for name, records in splits.items():
        used = {re.sub(f"{READING}(, {READING})+", "{readings}",
                       r["instruction"].replace(r["device"], "{device}")) for r in records}
        unseen = name == "test_phrasings"
        assert used == set(generator.UNSEEN_PHRASINGS if unseen else generator.PHRASINGS)


def readings(record: Record) -> list[Reading]:
    """What a prompt states, each value converted to its quantity's first unit."""
    result = []
    for quantity, shown, unit in re.findall(READING, record["instruction"]):
        factor, offset = {n: (f, o) for n, f, o in generator.UNITS[quantity]}[unit]
        result.append((quantity, (float(shown) - offset) / factor, shown))
    return result


def verdict(device: str, quantity: str, value: float) -> str:
    limit = generator.LIMITS[device][quantity]
    if generator.KINDS[quantity] == "min":
        return "low" if value < limit else "ok"
    return "high" if value > limit else "ok"


def diagnosis(verdicts: Iterable[tuple[str, str]]) -> str:
    """The fault with this pattern; empty if there is none."""
    wrong = {q for q, v in verdicts if v != "ok"}
    return next((f for f, (names, _) in generator.FAULTS.items() if set(names) == wrong), "")


def test_the_answer_follows_from_the_limits(everything: list[Record]) -> None:
    for record in everything:
        device, stated = record["device"], readings(record)
        assert device in record["instruction"]
        assert len({q for q, _, _ in stated}) == len(stated) == 3, record
        verdicts = [(q, verdict(device, q, v)) for q, v, _ in stated]
        assert diagnosis(verdicts) == record["fault"], record
        parts = [rf"{q} {re.escape(shown)} (?:min|max) [\d.]+ {v}"
                 for (q, _, shown), (_, v) in zip(stated, verdicts, strict=True)]
        start = f"{device}, {generator.MACHINES[device]} duty: "
        end = f": {record['fault']}. {generator.FAULTS[record['fault']][1]}"
        text = re.escape(start) + ", ".join(parts) + re.escape(end)
        assert re.fullmatch(text, record["response"]), record
        # The draws keep a quarter away from the limit; rounding may take some of that back.
        assert all(abs(v / generator.LIMITS[device][q] - 1) >= 0.1 for q, v, _ in stated), record


def test_sentiment_splits_are_clean() -> None:
    parts = [[json.loads(line) for line in (SENTIMENT / f"{name}.jsonl").open(encoding="utf-8")]
             for name in ("train", "validation", "test")]
    assert [len(part) for part in parts[1:]] == [500, 1000]
    texts = [row["text"] for part in parts for row in part]
    assert all(texts) and len(texts) == len(set(texts))
    for part in parts:
        counts = collections.Counter(row["label"] for row in part)
        assert counts["positive"] == counts["negative"] == len(part) // 2
        for row in part:
            assert row.keys() == {"id", "text", "label", "rating"}
            assert row["rating"] >= 0.5 if row["label"] == "positive" else row["rating"] <= -0.5


def test_the_front_belongs_to_the_shipped_adapter() -> None:
    adapter = DATA / "adapters" / "sensors_coa"
    front = read_json(adapter / "front.json")
    verified(adapter)
    assert front["adapter"] == sha256(adapter / "manifest.json")
    with torch.device("meta"):
        layers = Layers.of(LlamaForCausalLM(AutoConfig.from_pretrained(locate("embedded"))))
    points = torch.tensor([
        [Configuration.from_json(row["configuration"], layers).bits, row["loss"]]
        for row in front["front"]], dtype=torch.float64)
    assert front_by_segment(points) == list(range(len(points)))
    assert points[0, 0] < 2.5 and points[-1, 0] > 6.5
