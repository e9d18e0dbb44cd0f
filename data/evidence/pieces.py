"""What all stored results share: their folder, the form of a score, how a piece is stored."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.base.model import load_tokenizer, machine
from lib.base.records import Record, sensors
from lib.client import ask_all, question
from lib.evaluate.scores import Score, keyword_hit, keyword_score
from lib.files import BUILD, ROOT, versions, write_json
from lib.serve.server import running
from lib.settings import TrainSettings
from lib.train.training import TrainResult

RESULTS = ROOT / "data" / "results"
ADAPTERS = ROOT / "data" / "adapters"
WORK = BUILD / "reference"
Task = Callable[[str], list[Record]]


@dataclass(frozen=True)
class Piece:
    """A stored result: its file below `data/results`, without `.json`, and what makes it."""

    file: str
    make: Callable[[], dict[str, Any]]


def store(name: str, piece: Piece, results: Path = RESULTS) -> None:
    """Make a piece and store it with its command, date, machine and versions."""
    print(f"{name} ...", flush=True)
    start = time.monotonic()
    result = piece.make()
    write_json(results / f"{piece.file}.json", {
        "piece": Path(piece.file).name, "command": f"python -m data.evidence {name}",
        "made": time.strftime("%Y-%m-%d"),
        "machine": machine() | {"torch_threads": torch.get_num_threads()},
        "versions": versions(), "piece_seconds": round(time.monotonic() - start),
        "result": result})
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def score_row(score: Score) -> dict[str, Any]:
    """A score as it is stored: share, interval, and 1 or 0 for each example."""
    low, high = score.interval
    return {"share": score.share, "low": low, "high": high, "examples": len(score.hits),
            "hits": "".join("01"[h] for h in score.hits)}


def score_tests(model: Any, splits: tuple[str, ...] = ("test", "test_phrasings"), *,
                task: Task = sensors, template: str = "auto", **options: Any) -> dict[str, Any]:
    """Keyword score on the whole test set, and on the phrasings never trained on."""
    tokenizer = load_tokenizer(template=template)
    return {split: score_row(keyword_score(model, tokenizer, task(split), **options))
            for split in splits}


def served_score(path: Path, records: Sequence[Record], name: str = "") -> Score:
    """Keyword score of a server's answers, by the adapter of this name if any."""
    with running(path) as served:
        answers = ask_all(served.url, [question(r["instruction"], model=name) for r in records])
    texts = tuple(answer.text for answer in answers)
    return Score(tuple(keyword_hit(text, record["expected_keyword"])
                       for text, record in zip(texts, records, strict=True)), texts)


def training_row(result: TrainResult, settings: TrainSettings) -> dict[str, Any]:
    """Cost of a run, its settings and its loss history."""
    return {"settings": dataclasses.asdict(settings), "seconds": round(result.seconds, 1),
            "peak_mb": round(result.peak_mb), "trainable": result.trainable,
            "parameters": result.parameters, "optimizer_mb": round(result.optimizer_mb, 2),
            "losses": [round(x, 4) for x in result.losses]}
