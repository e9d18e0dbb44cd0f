"""The user's own records: files of many formats, in many shapes, as messages, as token ids.
A field that carries content is used, listed in `ignore`, or refused by its name."""

import copy
import csv
import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from lib.errors import UserError, require
from lib.files import ROOT, in_call_order, unique

DATA = ROOT / "data"
Record = dict[str, Any]
Tokenizer = Any  # a fast one of transformers, which is not imported: it takes seconds
LABEL = "expected_keyword"  # what `evaluate` looks for in an answer; training ignores it
Controls = tuple[re.Pattern[str], dict[str, int]]
IGNORED = -100  # the label of a token that is not learned
HIDDEN = 0xF0000  # stands for characters of a record that spell a control token: they stay text
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "developer": "system"} | {
    role: role for role in ("system", "user", "assistant", "tool")}


class Records:
    """Records of a file or a hub data set, read as needed, each as `normalised` gives it.
    `where` names the place of the last one, and so do errors."""

    def __init__(self, source: Path | str, *, ignore: Collection[str] = ()) -> None:
        self.source, self.ignore, self.where = str(source), ignore, str(source)

    def __iter__(self) -> Iterator[Record]:
        for where, row in _rows(self.source):
            self.where = where
            yield normalised(row, where, self.ignore)
        require(self.where != self.source, f"{self.source} has no records: write at least one")


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of each record as it stands in the source."""
    path, kind = Path(source), Path(source).suffix.lower()
    if kind not in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"):
        require(source.count("/") == 1 and not path.exists(), f"{source}: give a .jsonl, .json, "
                ".csv, .tsv or .parquet file, or a hub data set, OWNER/NAME or OWNER/NAME:SPLIT")
        yield from _hub_rows(source)
    elif kind == ".parquet":
        import pyarrow.parquet
        path.open("rb").close()  # a path that cannot be read is reported as such
        try:
            file = pyarrow.parquet.ParquetFile(path)
            require(len({*file.schema_arrow.names}) == len(file.schema_arrow.names),
                    f"{source} has two columns of one name: name each")
            rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
            yield from ((f"{source}, record {i}", _said(row)) for i, row in enumerate(rows, 1))
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            raise UserError(f"{source} is not a Parquet file ({error}): write it again") from None
    elif kind in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            csv.field_size_limit(2**31 - 1)
            reader = csv.reader(file, delimiter="\t" if kind == ".tsv" else ",", strict=True,
                                quoting=csv.QUOTE_NONE if kind == ".tsv" else csv.QUOTE_MINIMAL)
            try:
                names = next(reader, [])
                require(len({*names, ""}) > len(names), f"{source}:1 has two columns of one "
                        "name, or one without a name: name each")
                for row in filter(None, reader):
                    place = f"{source}:{reader.line_num}"
                    require(not any(re.match(' +"' if kind == ".csv" else '"', f) for f in row),
                            f"{place} has a quote, which programs read in different ways: save "
                            "as CSV without spaces before quotes, or as JSON lines")
                    require(len(row) == len(names), f"{place} has {len(row)} fields instead of "
                            f"{len(names)}: put quotes around text with commas or line breaks")
                    # So databases write a field without a value.
                    yield place, {n: f for n, f in zip(names, row, strict=True) if f != r"\N"}
            except (csv.Error, UnicodeError) as error:
                raise UserError(f"{source}:{reader.line_num} cannot be read ({error}): double "
                                "each quote inside quotes, and save as UTF-8") from None
    else:
        yield from _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        # In JSON only \n ends a line, but text may contain Unicode's other line ends.
        for number, line in enumerate(file, 1):
            line, place = line.removeprefix(b"\xef\xbb\xbf" * (number == 1)), f"{path}:{number}"
            try:
                rows = []
                if path.suffix.lower() == ".json" and line.lstrip()[:1] == b"[":
                    rows = json.loads((line + file.read()).decode(), object_pairs_hook=unique)
                elif line.strip():
                    rows = [json.loads(line.decode(), object_pairs_hook=unique)]
                # JSON can spell half a character ("\ud800"), which no tokenizer takes.
                json.dumps(rows, ensure_ascii=False).encode("utf-8")
            except UnicodeError:
                raise UserError(f"{place} is not UTF-8: save the file as UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place} is not JSON ({getattr(error, 'msg', error)}): use one "
                                "object a line, and each key once") from None
            yield from ((place if len(rows) == 1 else f"{place}, record {i}", row)
                        for i, row in enumerate(rows, 1))


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets
    name, _, part = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=part or "train", streaming=True)
        yield from ((f"{source}, record {i}", row) for i, row in enumerate(map(_said, rows), 1))
    except Exception as error:  # of many kinds: the network, the name, the files
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{source} is neither a file here nor a data set that the hub gives "
                        f"({reason}): check the name and the network") from error


def _said(value: Any) -> Any:
    """A value of a table without the nulls that it has where another row has a key."""
    if isinstance(value, dict):
        return {key: _said(item) for key, item in value.items() if item is not None}
    return [*map(_said, value)] if isinstance(value, list) else value


def normalised(row: Any, where: str = "it", ignore: Collection[str] | None = None) -> Record:
    """A record of any of the shapes as {"messages": [...]} or {"text": ...}, with tools and label.
    Without `ignore` further fields are not looked at."""
    require(isinstance(row, dict), f"{where} is not a JSON object: use {{...}}")
    row = {k: v for k, v in row.items() if v not in (None, [], {}) and k not in (ignore or ())}
    left = {k: v for k, v in row.items() if not isinstance(v, str) or v.strip()}

    def take(*names: str) -> Any:
        """The one of these fields that is there; it must be text."""
        name = next((n for n in names if n in row), names[0])
        value = row.get(name)
        require(name in row, f"{where} lacks the text {name!r}: add it")
        require(isinstance(value, str) and not re.match(
            rf"""(?s)\s*\[\s*{{.*?['"](role|from)['"]\s*:\s*['"]({'|'.join(ROLES)})['"]""", value),
                f"{where} has a {name!r} that is not text: use text, or messages in JSON lines")
        require(value.strip(), f"{where} has an empty {name!r}: fill it or drop the record")
        del left[name]
        return value

    require(isinstance(label := left.get(LABEL, ""), str | int | float) and label == label,  # NaN
            f"{where} has a {LABEL!r} that is neither text nor a number: use one of them")
    record: Record = {LABEL: left.pop(LABEL)} if LABEL in left else {}
    if isinstance(number := record.get(LABEL), float) and number.is_integer():
        record[LABEL] = int(number)  # a column of whole numbers with a gap is read as floats
    if "messages" in left or "conversations" in left:
        turns = left.pop("messages" if "messages" in left else "conversations")
        require(isinstance(turns, list), f"{where} has messages that are not a list: use [...]")
        record["messages"] = [_message(turn, where, ignore) for turn in turns]
    elif isinstance(left.get("prompt"), list) and isinstance(left.get("completion"), list):
        asked, turns = len(left["prompt"]), left.pop("prompt") + left.pop("completion")
        record["messages"] = [_message(turn, where, ignore) for turn in turns]
        require("assistant" not in [m["role"] for m in record["messages"][:asked]], f"{where} has "
                "answers in 'prompt', which would be learned: use messages, with --learn last")
    elif "prompt" in row or "instruction" in row:
        given = take("prompt") if "prompt" in row else take("instruction")
        if "input" in left:
            given += "\n\n" + take("input")
        answer = take("completion") if "prompt" in row else take("response", "output")
        record["messages"] = chat(given, answer)
    elif "text" in row:
        record["text"] = take("text")
    else:
        raise UserError(f"{where} has {', '.join(map(str, row)) or 'nothing'}: use instruction and "
                        "response, prompt and completion, messages, or text")
    if "messages" in record and "system" in left:
        record["messages"].insert(0, {"role": "system", "content": take("system")})
    if "messages" in record and "tools" in left:
        require(isinstance(left["tools"], list), f"{where} has tools, but not a list: use [...]")
        record["tools"] = [_tool(tool, where) for tool in left.pop("tools")]
    require(not left or ignore is None, f"{where} has {', '.join(map(repr, left))}, which would "
            "not be used: drop it, or name it with --ignore")
    if (turns := record.get("messages")) is not None:
        last = turns[-1]["role"] if turns else "nothing"
        require(last == "assistant", f"{where} ends with {last}: end with the assistant's turn")
        require(in_call_order(turns),
                f"{where} has tool answers in a different order from their calls: reorder them")
    return record


def _message(turn: Any, where: str, ignore: Collection[str] | None) -> Record:
    """One turn of a chat, from OpenAI's or ShareGPT's form."""
    require(isinstance(turn, dict), f"{where} has a turn that is not an object: use {{...}}")
    turn = {k: v for k, v in turn.items() if v is not None and k not in (ignore or ())}
    message = {{"from": "role", "value": "content"}.get(key, key): turn[key] for key in turn}
    require(len(message) == len(turn), f"{where} has a turn with {', '.join(map(repr, turn))}: "
            "keep one of 'role' and 'from', and of 'content' and 'value'")
    for key, value in message.items():  # whether the template uses a text is seen later
        require(isinstance(value, str) or key in ("content", "tool_calls"), f"{where} has {key!r} "
                "in a turn, which would not be used: drop it, or name it with --ignore")
    role = ROLES.get(message.get("role"))
    require(role, f"{where} has the role {message.get('role')!r}: use one of {', '.join(ROLES)}")
    content = message.get("content", "")
    if isinstance(content, list) and all(isinstance(part, dict) and part == {
            "type": "text", "text": str(part.get("text"))} for part in content):
        content = "".join(part["text"] for part in content)
    require(isinstance(content, str), f"{where} has a turn whose content is not text: use text")
    require(content.strip() or message.get("tool_calls"),
            f"{where} has an empty turn of the {role}: fill it or drop the record")
    calls = copy.deepcopy(message.get("tool_calls", []))
    try:
        for function in (call.get("function", call) for call in calls):
            if isinstance(function.get("arguments"), str):  # templates expect them decoded
                text = function["arguments"]
                function["arguments"] = json.loads(text, object_pairs_hook=unique)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: tool calls unlike OpenAI's ({error}): write them so") from None
    return message | {"role": role, "content": content} | ({"tool_calls": calls} if calls else {})


def _tool(tool: Any, where: str) -> Record:
    """A tool of OpenAI's form as llama.cpp puts it into a prompt, so that it is learned so."""
    try:
        given = tool | tool.get("function", {})
        function = {"name": given["name"], "description": given.get("description") or "",
                    "parameters": given.get("parameters") or {}}
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{where}: tools unlike OpenAI's ({error}): write them so") from None
    left = given.keys() - {*function, "type", "function", "strict"}  # `strict` is for engines
    require(not left, f"{where} has a tool with {', '.join(left)}, which no prompt shows: drop it")
    return {"type": "function", "function": function}


def chat(instruction: str, response: str | None = None) -> list[dict[str, str]]:
    """Chat messages of an instruction and, if given, its answer."""
    turns = [("user", instruction), ("assistant", response)]
    return [{"role": role, "content": text} for role, text in turns if text is not None]


def begin(tokenizer: Tokenizer, text: str) -> str:
    """A rendered text, after the BOS token if this tokenizer begins with one."""
    bos = tokenizer.bos_token
    has = bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return bos + text if has and not text.startswith(bos) else text


def render(tokenizer: Tokenizer, prompt: str | Sequence[Record]) -> str:
    """An instruction or messages as a text that asks for an answer."""
    messages = chat(prompt) if isinstance(prompt, str) else prompt
    return begin(tokenizer, tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True))


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[Record]) -> list[int]:
    """Ids of what `render` gives, as in training: a control token in a message stays text."""
    controls = _controls(tokenizer)
    messages = _hidden(chat(prompt) if isinstance(prompt, str) else [*prompt], controls)
    return _ids(tokenizer, render(tokenizer, messages), controls)


def encode(tokenizer: Tokenizer, record: Record, *, learn: str = "all", where: str = "the record",
           asked: bool = True) -> tuple[list[int], list[int]]:
    """Token ids of a record and their labels: those of the assistant's turns with their ends.
    `learn` is "all" or "last", of these turns. Of plain text all tokens are learned. UserError
    if the chat template leaves out a part of the record, does not end an answer, or (`asked`)
    would ask for it otherwise than it begins, as where the question ends in an open thought."""
    record = normalised(record, where)
    if "text" in record:
        end = tokenizer.eos_token or ""
        ended = record["text"].rstrip().endswith(end)
        text = begin(tokenizer, record["text"] + end * (not ended))
        ids = tokenizer(text, add_special_tokens=False).input_ids
        require(len(ids) > 1 and end, f"{where} has one token, or there is no eos_token: mend it")
        _require_known(tokenizer, ids, record, text, where=where)
        return ids, list(ids)
    controls = _controls(tokenizer)
    messages, tools = (_hidden(record.get(key), controls) for key in ("messages", "tools"))

    def rendered(count: int, **options: Any) -> str:
        try:
            return begin(tokenizer, tokenizer.apply_chat_template(
                messages[:count], tools=tools, tokenize=False, **options))
        except Exception as error:  # of Jinja, or what a template raises itself
            remedy = "use --learn last, or another --template" if count else (
                "leave out the assistant's first turn, which answers nothing")
            raise UserError(f"{where}: the template says {error}: {remedy}") from None

    whole, cuts = rendered(len(messages)), [0]
    own = [message for message in messages if message["role"] != "tool"]  # some quote a tool's
    rest, at, lost = [m | {"content": ""} if m in own else m for m in messages], 0, list[str]()
    said = "\n".join(message["content"] for message in own)  # which may hold a name, too
    for part in map(str.strip, _strings([rest, tools])):
        forms = {part, json.dumps(part, ensure_ascii=False)[1:-1]}
        lost += [part] * (sum(map(whole.count, forms)) <= said.count(part))
    for message in own:  # in their order: an answer may repeat what a template left out
        part = message["content"] if message["role"] == "assistant" else message["content"].strip()
        lost += [part] * (part not in whole[at:])
        at = whole.find(part, at) + len(part)
    require(not lost, f"{where}: the chat template leaves out "
            f"{', '.join(map(repr, lost))[:99]}, or spaces in it: train with another --template")
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and (learn == "all" or index == len(messages) - 1):
            prompt, text = rendered(index, add_generation_prompt=True), rendered(index + 1).rstrip()
            if not (asked or text.startswith(prompt)):
                prompt = rendered(index)
            ended = len(text) in [m.end() for m in controls[0].finditer(text, len(prompt))]
            kept = text.startswith(prompt) and whole.startswith(text)
            require(ended and kept, f"{where}: the chat template does not end an answer, or changes"
                    " it later: use --template course or --learn last")
            cuts += [len(prompt), len(text)]
    ids, labels, parts = [], [], [*itertools.pairwise([*cuts, len(whole)])]
    prefixes = [_ids(tokenizer, whole[:end], controls) for _, end in parts]
    # A token that reaches over the start of an answer is cut, as it is when one is asked.
    alike = all(prefixes[-1][:len(prefix)] == prefix for prefix in prefixes)
    for number, (start, end) in enumerate(parts):
        ids += (part := prefixes[number][len(ids):] if alike
                else _ids(tokenizer, whole[start:end], controls))
        labels += part if number % 2 else [IGNORED] * len(part)  # every other part is learned
    _require_known(tokenizer, ids, record, whole, where=where)
    return ids, labels


def _require_known(tokenizer: Tokenizer, ids: list[int], record: Record, text: str, *, where: str
                   ) -> None:
    """UserError for characters of a record that stand in its text, and not in its ids, and for
    answers that these change: with other spaces, letters or signs."""
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    given, said, shown = ({*unicodedata.normalize("NFKC", t).casefold()} for t in (
        "".join(_strings(record | {LABEL: 0})), text, decoded))
    lost = sorted(c for c in given & said - shown if c.strip())
    require(not lost, f"{where} has {lost[:9]}, unknown to the tokenizer: replace it")
    whole = unicodedata.normalize("NFC", decoded)
    for message in record.get("messages", ()):
        exact = unicodedata.normalize("NFC", message["content"]) in whole
        require(exact or message["role"] != "assistant", f"{where}: the tokenizer changes spaces, "
                f"capitals or signs of {message['content'][:99]!r}: use another model")


@functools.lru_cache(4)
def _controls(tokenizer: Tokenizer) -> Controls:
    """A pattern of the control tokens, longest first, and their numbers. Gemma has thousands."""
    names = sorted({token.content for token in tokenizer.added_tokens_decoder.values()
                    if token.special}, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
    return pattern, {name: number for number, name in enumerate(names)}


def _hidden(value: Any, controls: Controls) -> Any:
    """The value with each control token in its texts replaced by as many private characters."""
    if isinstance(value, dict):
        return {key: _hidden(item, controls) for key, item in value.items()}
    if isinstance(value, list):
        return [_hidden(item, controls) for item in value]
    pattern, numbers = controls
    return value if not isinstance(value, str) else pattern.sub(
        lambda m: chr(HIDDEN + numbers[m[0]]) * len(m[0]), value)


def _strings(value: Any) -> list[str]:
    """Every text inside a record, but for names of roles and types, and numbers of calls."""
    if isinstance(value, dict):
        value = [v for k, v in value.items() if k not in ("role", "type", "id", "tool_call_id")]
    if isinstance(value, list):
        return [s for item in value for s in _strings(item)]
    return [value] if isinstance(value, str) else []


def _ids(tokenizer: Tokenizer, text: str, controls: Controls) -> list[int]:
    """Ids of a rendered text; what was hidden in it becomes text."""
    (pattern, numbers), ids = controls, []
    if not any(ord(c) >= HIDDEN for c in text):
        return tokenizer(text, add_special_tokens=False).input_ids
    for piece in pattern.split(text):
        split = piece not in numbers
        for name, number in numbers.items() if split else ():
            piece = piece.replace(chr(HIDDEN + number) * len(name), name)
        ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=split).input_ids
    return ids


def sensors(split: str, limit: int | None = None) -> list[Record]:
    """Train, validation, test or test_phrasings of data/sensors, each record with its labels."""
    lines = (DATA / "sensors" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [*map(json.loads, lines[:limit])]


def movies(split: str, limit: int | None = None) -> list[Record]:
    """Split of data/movie_sentiment: train, validation or test, as instructions."""
    text = (DATA / "movie_sentiment" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [{"instruction": f"Is this film review positive or negative?\n{row['text']}",
             "response": f"{row['label'].capitalize()}.", "expected_keyword": row["label"]}
            for row in map(json.loads, text.splitlines()[:limit])]
