"""Reading the user's own records: JSON lines with an instruction and a response."""

import json
from pathlib import Path
from typing import Any

from lib.errors import UserError, require

KEYS = ("instruction", "response")
Record = dict[str, Any]


def read_jsonl(path: Path | str) -> list[Record]:
    """Records of a JSON-lines file, each with an instruction and a response.

    Raises:
        UserError: naming the file and the line that is no JSON object, lacks
            a key, or has an empty value.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a file of yours") from None
    # Bytes first: only \n ends a line of JSON; text may hold Unicode's others.
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    records = [_record(line, f"{path}:{number}")
               for number, line in enumerate(lines, 1) if line.strip()]
    require(records, f"{path} has no records: one JSON object a line is expected")
    return records


def _record(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise UserError(f"{where} is not UTF-8 text: save the file as UTF-8") from None
    except (ValueError, RecursionError):
        raise UserError(f"{where} is no JSON: one object a line is expected") from None
    check_record(record, where)
    return record


def check_record(record: Any, where: str) -> None:
    """UserError unless it has an instruction and a response."""
    require(isinstance(record, dict), f"{where} is no JSON object: use {{...}}")
    for key in KEYS:
        value = record.get(key)
        require(isinstance(value, str), f"{where} lacks the text {key!r}: add it")
        require(value.strip(), f"{where} has an empty {key!r}: fill it or drop the line")
