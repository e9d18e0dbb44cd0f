"""lib.base.records and lib.base.prompts: reading JSON lines, prompts and labels."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lib.base.prompts import IGNORED, chat, encode, pad_right, render
from lib.base.records import Record, movies, read_jsonl, sensors
from lib.errors import UserError


@settings(max_examples=15)
@given(st.lists(st.fixed_dictionaries({
    key: st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
    for key in ("instruction", "response", "extra")}), min_size=1, max_size=2))
@example([{"instruction": "a\u2028b", "response": "c\x85d\x0ce", "extra": "\x1c"}])
@pytest.mark.parametrize(("ascii_only", "end"), [(True, "\n"), (False, "\r\n")])
def test_reads_what_json_writes(tmp_path: Path, end: str, ascii_only: bool,
                                records: list[Record]) -> None:
    """Also text with Unicode's other line ends, and the mark that Windows editors write."""
    path = tmp_path / "data.jsonl"
    text = end.join(json.dumps(r, ensure_ascii=ascii_only) for r in records)
    path.write_bytes(b"\xef\xbb\xbf" * ascii_only + text.encode())
    assert read_jsonl(path) == records


@pytest.mark.parametrize(("line", "message"), [
    (b"once upon a time", "data.jsonl:2 is not JSON"),
    (b'{"instruction": "caf\xe9", "response": "b"}', "data.jsonl:2 is not UTF-8"),
    (b'{"instruction": "\\ud800", "response": "b"}', "data.jsonl:2 is not UTF-8"),
    (b'["instruction", "response"]', "data.jsonl:2 is not a JSON object"),
    (b'{"instruction": "a"}', "data.jsonl:2 lacks the text 'response'"),
    (b'{"instruction": " ", "response": "b"}', "data.jsonl:2 has an empty 'instruction'")])
def test_says_which_line_is_wrong(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n" + line)
    with pytest.raises(UserError, match=message):
        read_jsonl(path)
    path.write_bytes(b" \n\n")
    with pytest.raises(UserError, match="has no records"):
        read_jsonl(path)


def test_a_limit_takes_the_first() -> None:
    for records in (sensors, movies):
        assert records("test", 3) == records("test")[:3]
    assert movies("test", 1)[0].keys() == {"instruction", "response", "expected_keyword"}


def test_prompt_is_the_tutorials_form(tokenizer: PreTrainedTokenizerBase) -> None:
    assert render(tokenizer, "Why?") == "### Instruction:\nWhy?\n\n### Response:\n"
    full = tokenizer.apply_chat_template(chat("Why?", "So."), tokenize=False)
    assert full == render(tokenizer, "Why?") + "So." + tokenizer.eos_token
    own = render(tokenizer, "Why?", own=True)
    assert own.endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")


# The tokenizer lacks some bytes of control characters and of unassigned ones.
texts = st.text(
    st.characters(codec="utf-8", max_codepoint=0xFFFF, exclude_categories=("Cc", "Cn", "Co"),
                  include_characters="\n\t"), min_size=1, max_size=30)


@given(texts, texts.filter(str.strip))
@example("a\n\n", "b  \n\n")
@example("a", "  b")
@example("a ", "- item\n    indented\n")
def test_labels_are_the_answer_and_the_end(tokenizer: PreTrainedTokenizerBase, instruction: str,
                                           response: str) -> None:
    ids, labels = encode(tokenizer, {"instruction": instruction, "response": response})
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    assert labels[-1] == tokenizer.eos_token_id
    answer = [label for label in labels if label != IGNORED]
    assert tokenizer.decode(answer) == response.strip() + tokenizer.eos_token


def test_pad_right() -> None:
    ids, labels = pad_right([([5, 6], [IGNORED, 6]), ([7, 8, 9], [IGNORED, 8, 9])], 0)
    assert ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert labels.tolist() == [[IGNORED, 6, IGNORED], [IGNORED, 8, 9]]
