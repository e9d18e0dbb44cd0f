"""The user's own records: JSON lines, each with an instruction and a response."""

import json
from pathlib import Path
from typing import Any

from lib.errors import UserError, require
from lib.files import ROOT

DATA = ROOT / "data"
KEYS = ("instruction", "response")
Record = dict[str, Any]


def read_jsonl(path: Path | str) -> list[Record]:
    """Records of a JSON-lines file. A UserError names the line that is not a good record."""
    records = []
    # Split bytes: in JSON only \n ends a line, but text may contain Unicode's other line ends.
    lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
            # JSON can spell half a character ("\ud800"), which no tokenizer takes.
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeError:
            raise UserError(f"{path}:{number} is not UTF-8: save the file as UTF-8") from None
        except (ValueError, RecursionError):
            raise UserError(f"{path}:{number} is not JSON: use one object per line") from None
        check_record(record, f"{path}:{number}")
        records.append(record)
    require(records, f"{path} has no records: write one JSON object per line")
    return records


def check_record(record: Any, where: str) -> None:
    """UserError unless the record has an instruction and a response."""
    require(isinstance(record, dict), f"{where} is not a JSON object: use {{...}}")
    for key in KEYS:
        value = record.get(key)
        require(isinstance(value, str), f"{where} lacks the text {key!r}: add it")
        require(value.strip(), f"{where} has an empty {key!r}: fill it or drop the line")


def sensors(split: str, limit: int | None = None) -> list[Record]:
    """Split of data/sensors: train, validation, test or test_phrasings."""
    return read_jsonl(DATA / "sensors" / f"{split}.jsonl")[:limit]


def movies(split: str, limit: int | None = None) -> list[Record]:
    """Split of data/movie_sentiment: train, validation or test, as instructions."""
    text = (DATA / "movie_sentiment" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [{"instruction": f"Is this film review positive or negative?\n{row['text']}",
             "response": f"{row['label'].capitalize()}.", "expected_keyword": row["label"]}
            for row in map(json.loads, text.splitlines()[:limit])]
