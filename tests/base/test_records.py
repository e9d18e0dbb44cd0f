"""lib.base.records and lib.base.records: files, shapes, prompts and labels."""

import copy
import itertools
import json
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from tokenizers.pre_tokenizers import Sequence, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from lib.base.model import load_tokenizer, pad_right
from lib.base.records import (
    IGNORED,
    Record,
    Records,
    chat,
    encode,
    movies,
    normalised,
    prompt_ids,
    render,
    sensors,
)
from lib.errors import UserError

CASES = {
    "ok.jsonl": [{"instruction": "Name it.", "response": " Paris,\n  France."}],
    "input.json": [{"instruction": "Translate.", "input": "Cheese.", "output": "Fromage."}],
    "system.ndjson": [{"system": "Be brief.", "instruction": "Hi", "response": "Hello."}],
    "completion.jsonl": [{"prompt": "Hi", "completion": "Hello."}],
    "lists.jsonl": [{"prompt": [{"role": "user", "content": "Hi"}],
                     "completion": [{"role": "assistant", "content": "Hello."}]}],
    "parts.jsonl": [{"messages": [
        {"role": "developer", "content": [{"type": "text", "text": "Be "},
                                          {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": "Hello."}]}],
    "sharegpt.jsonl": [{"conversations": [{"from": "human", "value": "Hi"},
                                          {"from": "gpt", "value": "Hello."}]}]}
HELLO = [("user", "Hi"), ("assistant", "Hello.")]
EXPECTED = {
    "ok.jsonl": [("user", "Name it."), ("assistant", " Paris,\n  France.")],
    "input.json": [("user", "Translate.\n\nCheese."), ("assistant", "Fromage.")],
    "system.ndjson": [("system", "Be brief."), *HELLO], "completion.jsonl": HELLO,
    "lists.jsonl": HELLO, "parts.jsonl": [("system", "Be brief."), *HELLO],
    "sharegpt.jsonl": HELLO}


@pytest.mark.parametrize("name", CASES)
def test_shapes_become_messages(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lines = json.dumps(CASES[name]) if name.endswith(".json") else "\n".join(
        map(json.dumps, CASES[name]))
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (record,) = Records(path)
    assert [(m["role"], m["content"]) for m in record["messages"]] == EXPECTED[name]
    if name != "parts.jsonl":  # Parquet has no column of texts and lists
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CASES[name]), tmp_path / "p.parquet")
        assert [*Records(tmp_path / "p.parquet")] == [record]


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('instruction,response,id\n'
                                    '"Name, or\ntell","He said ""x"".", \n')
    (tmp_path / "c.tsv").write_text(
        'instruction\tresponse\tid\nName, or tell\tHe said "x".\t\\N\n')  # as MySQL writes it
    for name, asked in (("c.csv", "Name, or\ntell"), ("c.tsv", "Name, or tell")):
        (record,) = Records(tmp_path / name)
        assert [m["content"] for m in record["messages"]] == [asked, 'He said "x".']


@pytest.mark.parametrize(("name", "text", "message"), [
    ("d.jsonl", "once upon a time", "d.jsonl:2 is not JSON"),
    ("d.jsonl", b'{"instruction": "caf\xe9", "response": "b"}', "d.jsonl:2 is not UTF-8"),
    ("d.jsonl", '{"instruction": "\\ud800", "response": "b"}', "d.jsonl:2 is not UTF-8"),
    ("d.jsonl", '["instruction", "response"]', "d.jsonl:2 is not a JSON object"),
    ("d.jsonl", '{"instruction": "a"}', "d.jsonl:2 lacks the text 'response'"),
    ("d.jsonl", '{"instruction": " ", "response": "b"}', "d.jsonl:2 has an empty 'instruction'"),
    ("d.jsonl", '{"instruction": "a", "response": "b", "context": "c"}',
     "d.jsonl:2 has 'context', which would not be used: drop it, or name it with --ignore"),
    ("d.jsonl", '{"instruction": "a", "response": "b", "output": "c"}', "has 'output', which"),
    ("d.jsonl", '{"question": "a"}', "has question: use instr"),
    ("d.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "ends with user"),
    ("d.jsonl", '{"messages": [{"role": "robot", "content": "a"}]}', "has the role 'robot'"),
    ("d.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "not text"),
    ("d.jsonl", '{"text": "a", "tools": [{"name": "b"}]}', "has 'tools', which would not"),
    ("d.jsonl", '{"prompt": "a", "completion": "b", "tools": [{}]}', "tools unlike OpenAI's"),
    ("d.jsonl", '{"prompt": "a", "completion": "b", "tools": ["c"]}', "tools unlike OpenAI's"),
    *(("d.jsonl", json.dumps({"prompt": "a", "completion": "b", "tools": tools}), "not a list")
      for tools in ("[]", 5, True, {"name": "f"})),
    ("d.jsonl", json.dumps({"prompt": [{"role": r, "content": "a"} for r in ("user", "assistant")],
                            "completion": [{"role": "assistant", "content": "b"}]}),
     "has answers in 'prompt', which would be learned: use messages, with --learn last"),
    ("d.jsonl", '{"prompt": "a", "completion": "b", "tools": [{"name": "c", "cost": 1}]}',
     "has a tool with cost, which no prompt shows"),
    ("d.jsonl", '{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}',
     "has 'weight' in a turn, which would not be used"),
    ("d.jsonl", '{"messages": [{"role": "assistant", "tool_calls": ["f"]}]}', "unlike OpenAI's"),
    ("d.jsonl", '{"messages": [{"role": "assistant", "tool_calls": [{"arguments": "{"}]}]}',
     "tool calls unlike OpenAI's"),
    ("d.jsonl", '{"messages": [{"role": "assistant", "tool_calls": [{"arguments": '
     '"{\\"b\\": 1, \\"b\\": 2}"}]}]}', "d.jsonl:2: tool calls .*'b' is twice"),
    ("d.jsonl", '{"prompt": "a", "completion": "b", "prompt": "c"}',
     r"d.jsonl:2 is not JSON \('prompt' is twice in one object\): use .* each key once"),
    ("d.jsonl", '{"messages": [{"role": "user", "from": "gpt", "content": "a"}]}',
     "d.jsonl:2 has a turn with 'role', 'from', 'content': keep one of"),
    ("d.jsonl", '{"messages": [{"role": "user", "value": "b", "content": "a"}]}',
     "d.jsonl:2 has a turn with 'role', 'value', 'content': keep one of"),
    ("d.jsonl", '{"instruction": "a", "response": 5}', "'response' that is not text: use text"),
    ("d.jsonl", '{"instruction": "a", "response": "b", "expected_keyword": ["b"]}',
     "d.jsonl:2 has a 'expected_keyword' that is neither text nor a number"),
    ("d.jsonl", '{"instruction": "a", "response": "b", "expected_keyword": NaN}',
     "d.jsonl:2 has a 'expected_keyword' that is neither text nor a number"),
    ("d.jsonl", '{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}',
     "has a turn whose content is not text"),
    ("d.jsonl", '{"messages": [{"role": "user", "content": [{"type": "thought", "text": "a"}]}]}',
     "has a turn whose content is not text"),
    ("d.jsonl", '{"messages": 5}', "has messages that are not a list"),
    ("d.jsonl", json.dumps({"messages": [
        {"role": "assistant", "tool_calls": [{"id": n, "function": {}} for n in "ab"]},
        *({"role": "tool", "tool_call_id": n, "content": n} for n in "ba"),
        {"role": "assistant", "content": "c"}]}), "tool answers in a different order from"),
    ("c.csv", "instruction,response,response\na,b,c", "c.csv:1 has two columns of one name"),
    ("c.csv", "instruction,response\na,b,c", "c.csv:2 has 3 fields instead of 2: put quotes"),
    ("c.tsv", 'instruction\tresponse\nSay\t"Hello\nBye\tHe said bye"\n', "c.tsv:2 has a quote"),
    ("c.csv", 'instruction,response\nWhen?, "At 7"\n', "c.csv:2 has a quote.*without spaces"),
    ("c.csv", """prompt,completion\n[{'role': 'user'}],b""", "has a 'prompt' that is not text"),
    ("d.jsonl", json.dumps({"prompt": "[{'content': 'a', 'role': 'user'}]", "completion": "b"}),
     "has a 'prompt' that is not text"),
    ("c.csv", 'instruction,response\n"a"b,c', "c.csv:2 cannot be read .*double each quote"),
    ("p.parquet", "PAR1", "p.parquet is not a Parquet file"),
    ("d.xlsx", "x", "give a .jsonl, .json, .csv"), ("d.jsonl", "\n \n", "has no records")])
def test_says_which_record_is_wrong(tmp_path: Path, name: str, text: str | bytes,
                                    message: str) -> None:
    path = tmp_path / name
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(b"\n" * name.endswith("l") + text)
    with pytest.raises(UserError, match=message):
        list(Records(path))


def test_parquet_and_long_fields(tmp_path: Path) -> None:
    """Keys that only other rows have stay absent; what is wrong has its place."""
    rows = [CALL, {"messages": [*CALL["messages"][:1], {
        "role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "stop", "arguments": {"at": 5}}}]}]}]
    call = copy.deepcopy(CALL)
    call["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"of": "pump"}
    file = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([call, rows[1]]), file)
    assert [r["messages"] for r in Records(file)] == [call["messages"], rows[1]["messages"]]
    labels = pyarrow.table({"text": ["a b"] * 2, "expected_keyword": [7.0, 7.5]})  # as pandas
    pyarrow.parquet.write_table(labels, file)
    assert [record["expected_keyword"] for record in Records(file)] == [7, 7.5]
    assert str(next(iter(Records(file)))["expected_keyword"]) == "7"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 999, " "]}), file)
    with pytest.raises(UserError, match="p.parquet, record 2 has an empty 'text'"):
        list(Records(file))
    data = bytearray(file.read_bytes())
    data[4:40] = b"x" * 36
    file.write_bytes(data)
    with pytest.raises(UserError, match="p.parquet is not a Parquet file"):
        list(Records(file))
    (tmp_path / "long.csv").write_text(f"text\n{'a' * 200_000}\n")
    assert len(next(iter(Records(tmp_path / "long.csv")))["text"]) == 200_000


def test_numbers_of_calls_that_say_nothing() -> None:
    """In tables each turn has each field; some calls have no number, some answers come in parts."""
    call = {"id": "a", "function": {"name": "f", "arguments": {}}}
    for calls, numbers in (([call], ["a", "a"]), ([call | {"id": ""}], ["x"]), ([], ["x", ""])):
        turns = [{"role": "assistant", "content": "c", "tool_call_id": "", "tool_calls": calls},
                 *({"role": "tool", "content": n or "b", "tool_call_id": n} for n in numbers)]
        normalised({"messages": [*turns, turns[0] | {"tool_calls": []}]})


def test_what_is_listed_is_ignored(tmp_path: Path) -> None:
    row = {"instruction": "a", "response": "b", "id": 7, "notes": "x", "expected_keyword": "b"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    (record,) = Records(tmp_path / "d.jsonl", ignore=["id", "notes"])
    assert record.keys() == {"messages", "expected_keyword"}
    (record,) = Records(tmp_path / "d.jsonl", ignore=["id", "notes", "expected_keyword"])
    assert record.keys() == {"messages"}


def test_a_limit_takes_the_first() -> None:
    for records in (sensors, movies):
        assert records("test", 3) == records("test")[:3]
    assert movies("test", 1)[0].keys() == {"instruction", "response", "expected_keyword"}


def test_prompt_is_the_tutorials_form(tokenizer: PreTrainedTokenizerBase) -> None:
    assert render(tokenizer, "Why?") == "### Instruction:\nWhy?\n\n### Response:\n"
    full = tokenizer.apply_chat_template(chat("Why?", "So."), tokenize=False)
    assert full == render(tokenizer, "Why?") + "So." + tokenizer.eos_token
    own = render(load_tokenizer(template="own"), "Why?")
    assert own.endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")


def learned(tokenizer: PreTrainedTokenizerBase, record: Record, **options: str) -> list[str]:
    """The runs of learned tokens, each as text."""
    pairs = zip(*encode(tokenizer, record, **options), strict=True)
    groups = itertools.groupby(pairs, lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in part]) for own, part in groups if own]


# The tokenizer lacks some bytes of control characters and of unassigned ones.
texts = st.text(
    st.characters(codec="utf-8", max_codepoint=0xFFFF, exclude_categories=("Cc", "Cn", "Co"),
                  include_characters="\n\t"), min_size=1, max_size=30).filter(str.strip)


@given(texts, texts, st.sampled_from(["own", "course"]))
@example("a\n\n", "b  \n\n", "course")
@example("a", "  b", "course")
@example("a <|im_end|>\n<|im_start|>", "\n\n<|im_end|> is\n an end<|im_end|>", "own")
@example("<empty_output>", "<filename>x<|endoftext|>", "course")
@example("### Response:\nx", "### Instruction:\nfoo\n\n### Response:\nbar", "course")
def test_labels_are_the_answer_and_the_end(instruction: str, response: str,
                                           template: str) -> None:
    """As it is, with one end; control tokens in the record are text."""
    tokenizer = load_tokenizer(template=template)
    record = {"instruction": instruction, "response": response}
    ids, labels = encode(tokenizer, record)
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    assert learned(tokenizer, record) == [response + tokenizer.eos_token]
    assert labels.count(tokenizer.eos_token_id) == 1
    controls = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert sum(token in controls for token in ids) == {"own": 6, "course": 1}[template]


@pytest.mark.parametrize("template", ["own", "course", "spaced"])
@pytest.mark.parametrize("kind", ["byte level", "prefix space"])
@pytest.mark.parametrize(("question", "answer"), [
    ("a <|im_end|>\n<|im_start|>system b", "c"), ("a", "<|endoftext|> c"), ("a", "  c"),
    ("a ", "c"), ("<|im_end|>", "\n<|im_end|>")])
def test_a_prompt_is_asked_as_it_was_learned(template: str, kind: str, question: str,
                                             answer: str) -> None:
    tokenizer = load_tokenizer(template="own" if template == "own" else "course")
    if template == "spaced":  # where the split of spaces depends on what follows
        tokenizer.chat_template = tokenizer.chat_template.replace("Response:\n", "Response:\n\n")
    if kind == "prefix space":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
    ids, labels = encode(tokenizer, {"prompt": question, "completion": answer})
    count = next(i for i, label in enumerate(labels) if label != IGNORED)
    asked = prompt_ids(tokenizer, question)
    assert asked == ids[:count] and IGNORED not in labels[count:count + 2]
    controls = [[token in tokenizer.all_special_ids for token in prompt]
                for prompt in (asked, prompt_ids(tokenizer, "x"))]
    assert sum(controls[0]) == sum(controls[1])


TURNS = {"messages": [{"role": role, "content": text} for role, text in (
    ("system", "Be brief."), ("user", "One?"), ("assistant", "1."), ("user", "Two?"),
    ("assistant", "2."))]}
CALL = {"messages": [
    {"role": "user", "content": "How warm?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "read_sensor", "arguments": '{"of": "pump"}'}}]},
    {"role": "tool", "content": "78"}, {"role": "assistant", "content": "78 C."}]}


def test_turns_tools_and_plain_text(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token
    assert learned(tokenizer, TURNS) == [f"1.{end}", f"2.{end}"]
    assert learned(tokenizer, TURNS, learn="last") == [f"2.{end}"]
    assert learned(tokenizer, {"text": "All of it."}) == [f"All of it.{end}"]
    for text in (f"All of it.{end}", f"All of it.{end}\n"):
        assert learned(tokenizer, {"text": text}) == [text]
    named = [{"role": "user", "name": "Imani", "content": "Hi"}, TURNS["messages"][-1]]
    for record, part in ((CALL, "'read_sensor'"), ({"messages": named}, "'Imani'")):
        with pytest.raises(UserError, match=f"leaves out {part}"):
            encode(tokenizer, record)
    able = copy.deepcopy(tokenizer)
    able.chat_template = tokenizer.chat_template.replace(
        "message['content'] + eos", "message['content'] + (message.tool_calls | tojson if "
        "message.tool_calls else '') + eos")
    first, last = learned(able, CALL)
    assert '"arguments": {"of": "pump"}' in first and last == f"78 C.{end}"
    # Some templates quote what a tool answers.
    read = copy.deepcopy(CALL)
    read["messages"][2]["content"] = '{"temperature": 78}'
    quoting = copy.deepcopy(able)
    quoting.chat_template = able.chat_template.replace(
        "{{ message['content'] + '", "{{ (message['content'] | tojson if message['role'] == 'tool' "
        "else message['content']) + '")
    assert learned(quoting, read) == learned(able, read) == [first, last]
    assert '"{\\"temperature' in quoting.decode(encode(quoting, read)[0])
    # Tools are read as llama.cpp shows them, in whatever order and form they are given.
    able.chat_template = "{{ tools | tojson }}" + able.chat_template
    shown = ('[{"type": "function", "function": {"name": "read_sensor", "description": "", '
             '"parameters": {"type": "object"}}}]')
    function = {"strict": True, "parameters": {"type": "object"}, "name": "read_sensor"}
    for tool in (function, {"function": function, "type": "function"}):
        assert able.decode(encode(able, CALL | {"tools": [tool]})[0]).startswith(shown)


def test_bos_as_the_tokenizer_has_it(tokenizer: PreTrainedTokenizerBase) -> None:
    own = copy.deepcopy(tokenizer)
    own.bos_token = "<|im_start|>"
    assert encode(own, TURNS)[0] == encode(tokenizer, TURNS)[0]  # it does not begin with one
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", own.bos_token_id)])
    ids, labels = encode(own, TURNS)
    assert ids == [own.bos_token_id, *encode(tokenizer, TURNS)[0]] and labels[0] == IGNORED
    assert render(own, "Hi").startswith("<|im_start|>###")
    own.chat_template = "{{ bos_token }}" + own.chat_template
    assert encode(own, TURNS)[0] == ids


def test_what_an_answer_repeats_must_still_be_rendered(tokenizer: PreTrainedTokenizerBase) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = tokenizer.chat_template.replace(
        "{%- else -%}{{ message['content'] + '\n\n' }}", "{%- else -%}")
    for system, question in (("22 C", "22 C?"), ("Answer.", "Answer. Now?")):
        with pytest.raises(UserError, match="leaves out"):
            encode(own, {"system": system, "instruction": question, "response": "22 C"})
    trims = copy.deepcopy(tokenizer)
    trims.chat_template = tokenizer.chat_template.replace(
        "message['content'] + eos", "(message['content'] | trim) + eos")
    with pytest.raises(UserError, match="or spaces in it"):
        encode(trims, {"instruction": "a", "response": "    return x\n"})


def test_templates_that_fail(tokenizer: PreTrainedTokenizerBase) -> None:
    own = copy.deepcopy(tokenizer)
    for name in ("Bob", "Ann"):  # a name that the text happens to contain
        with pytest.raises(UserError, match=f"leaves out '{name}'"):
            encode(tokenizer, {"messages": [
                {"role": "user", "name": name, "content": "I am Bob, she is Ann. Who asks?"},
                {"role": "assistant", "content": name}]})
    for template, message in (("{{ raise_exception('no system') }}", "says no system"),
                              ("{{ messages[0].content }}", "leaves out"),
                              ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "not end"),
                              ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n"
                               "{% endfor %}", "not end"),  # control tokens before answers alone
                              (own.chat_template + "{{ 'x' if add_generation_prompt }}",
                               "does not end an answer, or changes it later")):
        own.chat_template = template
        with pytest.raises(UserError, match=message):
            encode(own, TURNS)
    # As models that reason begin an answer: not to be trained so, but it has a loss.
    ids, labels = encode(own, TURNS, asked=False)
    assert own.decode(ids) == tokenizer.decode(encode(tokenizer, TURNS)[0])
    assert own.decode([label for label in labels if label != IGNORED]) == "".join(
        f"### Response:\n{n}.{own.eos_token}" for n in "12")
    with pytest.raises(UserError, match="leave out the assistant's first turn"):
        encode(tokenizer, {"messages": TURNS["messages"][2:]})


def test_every_character_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    """This tokenizer drops some control characters; others have an unknown token."""
    for record in ({"instruction": "Range?", "response": "5\x1310 bar"}, {"text": "5\x1310 bar"},
                   {"system": "5\x1310 bar", "instruction": "Range?", "response": "Yes."}):
        with pytest.raises(UserError, match=r"here has \['\\x13'\], unknown to the tokenizer"):
            encode(tokenizer, record, where="here")
    spaced = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    spaced.pre_tokenizer = Sequence([Whitespace(), spaced.pre_tokenizer])
    squeezing = copy.deepcopy(tokenizer)
    squeezing._tokenizer = spaced  # as those of some models do
    code = {"prompt": "a", "completion": "if x:\n  y = x"}
    encode(tokenizer, code)
    with pytest.raises(UserError, match=r"the tokenizer changes spaces, .* of 'if x:\\n  y = x'"):
        encode(squeezing, code)
    for text in ("Cre\u0300me, \u00bd \ufb01ne", "\u4f60\u597d \U0001f600 \u200b!", "A\tB\r\nC"):
        encode(tokenizer, {"instruction": text, "response": text})
    encode(tokenizer, {"instruction": "A", "response": "B <|im_end|>", "expected_keyword": "\x13"})
    quoting = copy.deepcopy(tokenizer)
    quoting.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] + '\n\n' }}", "{{ (message['content'] | tojson) + '\n\n' }}")
    turns = [{"role": "tool", "content": "5\x13"}, {"role": "assistant", "content": "Five."}]
    ids, _ = encode(quoting, {"messages": turns})
    assert "5\\u0013" in quoting.decode(ids)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match="there is no eos_token"):
        encode(endless, {"text": "So it goes on."})


def test_pad_right() -> None:
    ids, labels = pad_right([([5, 6], [IGNORED, 6]), ([7, 8, 9], [IGNORED, 8, 9])], 0)
    assert ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert labels.tolist() == [[IGNORED, 6, IGNORED], [IGNORED, 8, 9]]


def test_an_answer_in_json_is_text() -> None:
    for answer in ('[{"value": 21.5, "unit": "C"}]', '[{"content": "a"}]', '[{"from": "Paris"}]'):
        record = normalised({"prompt": "Extract.", "completion": answer})
        assert record["messages"][1]["content"] == answer
