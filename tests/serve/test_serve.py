"""lib.serve over HTTP: a real server process, httpx, the openai package, and bad requests."""

import contextlib
import copy
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from conftest import ROOT, saved_adapter
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from data.evidence.parity import compare
from lib.base.records import render, sensors
from lib.client import ask, ask_all, question
from lib.errors import UserError
from lib.quantize.gguf import write_adapter, write_model
from lib.serve.bundle import Reader
from lib.serve.front import left_out
from lib.serve.server import Served, running
from lib.settings import TARGETS
from lib.train.lora import load_adapter

NAMES = ("red", "blue")
# As in Qwen 2.5. It knows tools, their answers and `polite`.
TOOL_TEMPLATE = """
{%- if tools %}{{- '<|im_start|>system\n<tools>' }}{%- for tool in tools %}{{- '\n' }}
{{- tool | tojson }}{%- endfor %}{{- '\n</tools>\nFor each call return <tool_call>\n
{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- endif %}{%- if polite %}{{- 'Be polite.' }}{%- endif %}{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
OPTIONS = ("--context", "256", "--slots", "4")


@pytest.fixture(scope="module")
def folder(_tiny: LlamaForCausalLM, tiny_gguf: Path, tokenizer: PreTrainedTokenizerBase,
           tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model and two adapters, whose answers all differ."""
    folder = tmp_path_factory.mktemp("serve")
    write_model(tiny_gguf, folder / "tiny.gguf", gguf_type="F32", tokenizer=tokenizer)
    with_tools = copy.deepcopy(tokenizer)
    with_tools.chat_template = TOOL_TEMPLATE
    write_model(tiny_gguf, folder / "tools.gguf", gguf_type="F32", tokenizer=with_tools)
    for seed, name in enumerate(NAMES):
        adapter = saved_adapter(_tiny, folder / name, seed=seed, r=8, lora_alpha=32,
                                target_modules=list(TARGETS["aggressive"]))
        write_adapter(adapter, folder / f"{name}.gguf", tiny_gguf, _tiny)
    return folder


def loras(folder: Path) -> list[str]:
    return [x for name in NAMES for x in ("--lora", f"{name}={folder / name}.gguf")]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with running(folder / "tiny.gguf", *OPTIONS, *loras(folder)) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def body(text: str = "Hello there", model: str = "tiny", **options: object) -> dict:
    return question(text, model=model, **{"max_tokens": 8, **options})


def content(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"].strip()


def refusal(reply: httpx.Response, status: int) -> dict:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "Traceback" not in error["message"]
    return error


def test_listing_health_and_metrics(client: httpx.Client, server: Served) -> None:
    listed = client.get("/models").json()
    assert [m["id"] for m in listed["data"]] == ["tiny", *NAMES]
    root = server.url.removesuffix("/v1")
    assert client.get(f"{root}/health").json() == {"status": "ok"}
    assert "llamacpp:tokens_predicted_total" in client.get(f"{root}/metrics").text
    refusal(client.get(CHAT), 405)


def listening(server: Served) -> list[tuple[str, int]]:
    """Addresses where the front or its engine listens."""
    front = psutil.Process(server.pid)
    return [c.laddr for process in (front, *front.children(recursive=True))
            for c in process.net_connections() if c.status == psutil.CONN_LISTEN]


def test_only_loopback_listens(server: Served) -> None:
    assert {ip for ip, _ in listening(server)} == {"127.0.0.1"}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8080", "evil.example",
                                  "127.0.0.1.nip.io"])
def test_only_this_machines_names_are_answered(client: httpx.Client, host: str) -> None:
    """A web page can point its own host name to 127.0.0.1, but it sends that name."""
    for reply in (client.get("models", headers={"Host": host}),
                  client.post(CHAT, json=body(), headers={"Host": host})):
        if host.split(":")[0] in ("127.0.0.1", "localhost"):
            assert reply.status_code == 200
        else:
            refusal(reply, 400)


def test_one_model_is_listed(client: httpx.Client) -> None:
    assert client.get("/models/red").json()["id"] == "red"
    assert refusal(client.get("/models/green"), 404)["code"] == "model_not_found"


def test_key_pages_and_strict(folder: Path) -> None:
    options = ("--strict", "--api-key", "secret", "--cors", "http://page.example", "--max-tokens",
               "3")
    with (running(folder / "tiny.gguf", *OPTIONS, *options) as served,
          httpx.Client(base_url=served.url, timeout=60) as client):
        assert refusal(client.post(CHAT, json=body()), 401)["code"] == "invalid_api_key"
        client.headers["Authorization"] = "bearer secret"
        page = {"Origin": "http://page.example"}
        asks = client.options(CHAT, headers=page | {
            "Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network":
            "true"})
        assert asks.headers["access-control-allow-private-network"] == "true"
        assert asks.headers["access-control-allow-origin"] == page["Origin"]
        allowed = client.post(CHAT, json=body(), headers=page)
        assert content(allowed) and allowed.headers["access-control-allow-origin"] == page["Origin"]
        refusal(client.post(CHAT, json=body(), headers={"Origin": "http://evil.example"}), 403)
        assert refusal(client.post(CHAT, json=body(mood="good")), 400)["param"] == "mood"
        reply = client.post(CHAT, json={"messages": HELLO, "temperature": 0})
        assert reply.json()["usage"]["completion_tokens"] == 3  # nobody said how many


def test_pages_are_not_answered_by_default(client: httpx.Client) -> None:
    page = {"Origin": "http://page.example"}
    refusal(client.post(CHAT, json=body(), headers=page), 403)
    refusal(client.options(CHAT, headers=page | {"Access-Control-Request-Method": "POST"}), 405)


def test_engine_needs_the_key(server: Served) -> None:
    """The engine's own port would serve unchecked requests."""
    inner = {port for _, port in listening(server)} - {httpx.URL(server.url).port}
    assert len(inner) == 1
    reply = httpx.post(f"http://127.0.0.1:{inner.pop()}/v1/chat/completions", json=body())
    assert reply.status_code == 401


def test_answers_are_greedy_and_differ_by_adapter(client: httpx.Client) -> None:
    texts = {m: content(client.post("/chat/completions", json=body(model=m)))
             for m in ("tiny", *NAMES)}
    assert len(set(texts.values())) == 3
    again = content(client.post("/chat/completions", json=body(model="red")))
    assert again == texts["red"]


def test_chat_renders_the_course_template(client: httpx.Client,
                                          tokenizer: PreTrainedTokenizerBase) -> None:
    """Training and serving must see the same text."""
    plain = client.post("/completions", json={
        "model": "tiny", "prompt": render(tokenizer, "Hello there"), "temperature": 0,
        "max_tokens": 8}).json()
    chat = client.post("/chat/completions", json=body()).json()
    assert plain["choices"][0]["text"].strip() == chat["choices"][0]["message"]["content"].strip()
    assert plain["usage"]["prompt_tokens"] == chat["usage"]["prompt_tokens"] == len(
        tokenizer(render(tokenizer, "Hello there")).input_ids)


def test_streams(client: httpx.Client) -> None:
    answer = ask(client, body(model="blue"))
    assert answer.text == content(client.post("/chat/completions", json=body(model="blue")))
    assert answer.tokens == 8
    assert 0 < answer.first <= answer.last


def test_scales(client: httpx.Client) -> None:
    def scaled(model: str, **scales: float) -> str:
        entries = [{"name": n, "scale": s} for n, s in scales.items()]
        return content(client.post("/chat/completions", json=body(model=model, lora=entries)))

    plain, red = (content(client.post("/chat/completions", json=body(model=m)))
                  for m in ("tiny", "red"))
    assert scaled("red", red=0) == scaled("tiny", red=0, blue=0) == plain
    assert scaled("tiny", red=1) == red
    assert scaled("tiny", red=1, blue=1) not in (plain, red)


def test_default_scale(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And files named from the folder that one is in."""
    monkeypatch.chdir(folder)
    options = (*OPTIONS, "--lora", "red=red.gguf:1", "--lora", f"blue={folder / 'blue.gguf'}")
    with (running(Path("tiny.gguf"), *options) as served,
          httpx.Client(base_url=served.url, timeout=60) as client):
        texts = [content(client.post("/chat/completions", json=body(model=m)))
                 for m in ("tiny", "red", "blue")]
    assert texts[0] == texts[1] != texts[2]
    with (running(Path("tiny.gguf"), *OPTIONS, "--lora", "red=red.gguf:0.5") as served,
          httpx.Client(base_url=served.url, timeout=60) as client):
        named, half, whole = (
            content(client.post("/chat/completions", json=body(model="red") | extra))
            for extra in ({}, *({"lora": [{"name": "red", "scale": s}]} for s in (0.5, 1))))
    assert named == half != whole


def test_adapters_in_turn_answer_as_a_cold_server_does(client: httpx.Client, folder: Path) -> None:
    """What is cached of a prompt was computed with one adapter, and must not serve another."""
    text = "One prompt for all of them, long enough to be kept"
    names = (*NAMES, "tiny")
    warm = [content(client.post(CHAT, json=body(text, model=m))) for m in (*names, *names)]
    assert warm[:3] == warm[3:] and len({*warm}) == 3
    for name, said in zip(names, warm, strict=False):
        with (running(folder / "tiny.gguf", *OPTIONS, *loras(folder)) as served,
              httpx.Client(base_url=served.url, timeout=60) as cold):
            assert content(cold.post(CHAT, json=body(text, model=name))) == said


def test_openai_client(server: Served) -> None:
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "Hello there"}]
    options = {"model": "red", "messages": messages, "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**options)
    parts = client.chat.completions.create(**options, stream=True)
    text = "".join(c.choices[0].delta.content or "" for c in parts if c.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 8
    plain, listed = (client.completions.create(
        model="tiny", prompt=prompt, max_tokens=3, temperature=0).choices[0].text
        for prompt in ("Hello", ["Hello"]))  # as LangChain writes one
    assert plain == listed
    assert {m.id for m in client.models.list()} == {"tiny", *NAMES}
    with pytest.raises(openai.NotFoundError, match="unknown model 'green'"):
        client.chat.completions.create(**options | {"model": "green"})
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(**options | {"max_tokens": -1})


CHAT, PLAIN = "/chat/completions", "/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {
    "name": "weather", "description": 'Of a "place" in \u00e9',
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments":
                                                    '{"city": "Z\u00fcrich"}'}}
BAD = [
    *((CHAT, data, 400) for data in (
        b"", b"{", b"[1, 2]", b"null", b"\xff\xfe{}", b'{"messages": NaN}', b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "Hi \\ud83d"}]}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "min_p": 1e999}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "max_tokens": 5}')),
    *((CHAT, {"messages": messages}, 400) for messages in (
        [], "Hello", [{}], ["Hello"], [{"role": "user", "content": 5}],
        [{"role": "robot", "content": "Hello"}], [{"role": "user", "content": "word " * 400}],
        [{"role": "user"}], [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
        [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [*HELLO, {"role": "assistant", "content": "Well,"}],
        [{"role": "user", "content": "Hello", "name": "Ann"}])),
    *((CHAT, {"messages": HELLO, name: value}, 400) for name, value in (
        ("max_tokens", -1), ("max_tokens", 0), ("max_tokens", 257), ("max_tokens", 10**30),
        ("max_tokens", 2.5), ("max_tokens", "ten"), ("max_tokens", True),
        ("max_completion_tokens", -5), ("temperature", "hot"), ("temperature", -1), ("top_p", 2),
        ("stream", "yes"), ("n", 0), ("n", 3), ("seed", "x"), ("model", 5), ("stop", 5),
        ("min_p", math.nan), ("min_p", 5), ("top_k", 2.5), ("mirostat", 3), ("dry_base", 0.5),
        ("repeat_penalty", True), ("stop", [""]),
        ("logit_bias", {"a": 1}), ("logit_bias", {"99999999": 1}), ("logit_bias", {"1": 101}),
        ("stream_options", {"include_usage": True}), ("functions", []), ("modalities", ["audio"]),
        ("top_logprobs", 3), ("prompt", "a"), ("chat_template_kwargs", {"enable_thinking": False}),
        ("tools", [TOOL]), ("tool_choice", "required"), ("n_predict", -1), ("seed", 2**32 - 1),
        ("top_logprobs", 0), *(("chat_template_kwargs", {name: 1}) for name in (
            "messages", "add_generation_prompt", "essage", "enable_thinking")),
        ("grammar", "root ::= ("),
        ("grammar", "%llguidance {}\nstart: ("), *(("response_format", shape) for shape in (
            "json", {"type": "poem"}, {"type": "json_object", "schema": {}},
            {"type": "json_schema"}, {"type": "json_schema", "schema": {}},
            {"type": "json_schema", "json_schema": {
                "name": "a", "schema": {"type": "array", "uniqueItems": True}}})),
        *(("json_schema", schema) for schema in (  # the engine reads numbers as doubles
            {"const": 2**53 + 1}, {"enum": ["a", {"id": [-2**53 - 1]}]},
            {"type": "integer", "minimum": 2**53 + 1})),
        *(("json_schema", schema) for schema in (
            {"type": "string", "pattern": "^(?=a)b$"}, {"type": "string", "pattern": "^(a$"},
            {"type": "string", "format": "colour"}, {"type": "string", "format": "uri"},
            {"type": "string", "pattern": "^^a$$"}, {"not": {"type": "string"}},
            {"type": "object", "dependentRequired": {"a": ["b"]}}, {"$ref": "#/nowhere"},
            {"type": "string", "nullable": True}, {"name": "string"},
            {"type": "object", "properties": {"name": {"type": "string", "required": True}}},
            {"type": "array", "items": {"x-guidance": {"lenient": True}}},
            {"type": "integer", "format": "int32"}, {"type": "string", "format": "unknown"},
            {"type": "object", "properties": {"a": {"type": "string"}},
             "patternProperties": {"^a": {"enum": ["b"]}}},
            {"oneOf": [{"type": "object", "properties": {"a": {"type": "string"}}},
                       {"type": "object", "properties": {"b": {"type": "string"}}}]})),
        *(("messages", [{"role": "user", "content": None, "tool_calls": None}, *HELLO]),
          ("messages", [{"role": "user", "content": []}])),
        ("lora", 5),
        ("lora", [{"name": "red"}]), ("lora", [{"name": "red", "scale": "0.5"}]),
        ("lora", [{"name": "red", "scale": True}]),
        ("lora", [{"name": "red", "scale": math.inf}]),
        ("lora", [{"name": "red", "scale": 1}, {"name": "red", "scale": 0}]))),
    *((PLAIN, {"prompt": prompt}, 400) for prompt in (
        5, None, "", [], [-1], [10**6], [1, "a"], "word " * 400, ["a", "b"], [[1], [2]])),
    *((PLAIN, {"prompt": "a", name: value}, 400) for name, value in (
        ("echo", True), ("suffix", "b"), ("best_of", 2), ("n", 2), ("logprobs", 2), ("tools", []),
        ("messages", HELLO), ("n_probs", 2**31))),
    (CHAT, {}, 400), (PLAIN, {}, 400), ("/nowhere", {}, 404),
    (CHAT, {"messages": HELLO, "model": "green"}, 404), (PLAIN, {"prompt": "a", "model": "x"}, 404),
    (CHAT, {"messages": HELLO, "lora": [{"name": "green", "scale": 1}]}, 404),
]


@pytest.mark.parametrize(("options", "said"), [
    ({"json_schema": {"enum": [1]}, "ignore_eos": True}, "ignore_eos: omit it"),
    ({"json_schema": {"type": "object", "minProperties": 2}}, "the model may repeat a key"),
    ({"mirostat": 2, "top_k": 1}, "mirostat takes the place of the other samplers"),
    ({"json_schema": functools.reduce(lambda inner, _: {"items": inner}, range(300), {})}, "JSON"),
    ({"json_schema": {"type": "object", "properties": {"n": {"type": "number", "format": "float"}}}
      }, "a format of what is not a string"),
    ({"json_schema": {"oneOf": [{"type": "object"}, {"type": "object", "title": "b"}]}}, "anyOf"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "only parts with a type, text, and a text are read")])
def test_a_refusal_says_what_to_do(client: httpx.Client, options: dict, said: str) -> None:
    assert said in refusal(client.post(CHAT, json=body(**options)), 400)["message"]


def test_a_model_without_a_template_is_not_asked_in_another(
        folder: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp would take ChatML, which a base model has never seen."""
    def without(path: Path) -> Reader:
        reader = Reader(path)
        reader.fields.pop("tokenizer.chat_template", None)
        return reader

    monkeypatch.setattr("lib.quantize.gguf.Reader", without)
    write_model(tiny_gguf, folder / "plain.gguf", gguf_type="F32")
    with (running(folder / "plain.gguf", *OPTIONS) as served,
          httpx.Client(base_url=served.url, timeout=60) as client):
        assert "no chat template" in refusal(client.post(CHAT, json=body(model="")), 400)["message"]
        assert client.post(PLAIN, json={"prompt": "a", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(("path", "sent", "status"), BAD)
def test_bad_requests(client: httpx.Client, path: str, sent: object, status: int) -> None:
    data = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    refusal(client.post(path, content=data, headers={"Content-Type": "application/json"}),
            status)
    assert content(client.post(CHAT, json=body()))  # it still serves


def test_fields_that_are_not_known_are_named(client: httpx.Client) -> None:
    reply = client.post(CHAT, json=body(user="me", mood="good", seed=None, n=1, stop=[]))
    assert content(reply) == content(client.post(CHAT, json=body()))
    assert reply.headers["x-ignored-fields"] == '"mood", "user"'
    for known in (body(seed=3), body(modalities=["text"]), body(logit_bias={"5": 1}),
                  body(mirostat=2, mirostat_tau=3), body(xtc_probability=0.5, dry_multiplier=0.8)):
        assert "x-ignored-fields" not in client.post(CHAT, json=known).headers
    assert client.post(PLAIN, json={"prompt": "a", "max_tokens": 2, "echo": False, "suffix": "",
                                    "best_of": 1}).status_code == 200


def test_an_answer_names_its_adapter(client: httpx.Client) -> None:
    assert client.post(CHAT, json=body(model="red")).json()["model"] == "red"


def test_the_smaller_limit_counts(client: httpx.Client) -> None:
    for limits in ({"max_tokens": 5, "max_completion_tokens": 3}, {"n_predict": 3}):
        sent = {"messages": HELLO, "temperature": 0, "ignore_eos": True} | limits
        assert client.post(CHAT, json=sent).json()["usage"]["completion_tokens"] == 3


def test_texts_may_come_in_parts_and_from_developers(client: httpx.Client) -> None:
    def prompt(*messages: dict) -> int:
        return client.post(CHAT, json=body(messages=messages)).json()["usage"]["prompt_tokens"]

    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    assert prompt({"role": "user", "content": parts}) == prompt(
        {"role": "user", "content": "Hellothere"})
    assert prompt({"role": "developer", "content": "Be kind"}, *HELLO) == prompt(
        {"role": "system", "content": "Be kind"}, *HELLO) > prompt(*HELLO)


@pytest.mark.parametrize(("schema", "shape"), [
    ({"enum": ["yes", "no"]}, '"(yes|no)"'),
    ({"type": "integer", "minimum": 3, "maximum": 4}, "[34]"),
    ({"type": "string", "pattern": "^[ab]{2}$"}, '"[ab]{2}"'),
    # No spaces between tokens: a small model would write them to the end.
    ({"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
      "additionalProperties": False}, r'\{"a":[12]\}')])
@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
def test_answers_obey_a_schema(client: httpx.Client, path: str, schema: dict, shape: str) -> None:
    asked = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    wrapped = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for options in ({"json_schema": schema}, {"response_format": wrapped}):
        choice = client.post(path, json=asked | options | {"max_tokens": 20}).json()["choices"][0]
        text = choice["text"] if path == PLAIN else choice["message"]["content"]
        assert re.fullmatch(shape, text.strip()), text


def test_tools_where_the_template_knows_them(folder: Path) -> None:
    tool, asked = {"tools": [TOOL]}, [*HELLO, {"role": "assistant", "content": None, "tool_calls":
                                               [CALL]}, {"role": "tool", "content": "sunny"}]
    other = {"type": "function", "function": {"name": "news"}}
    asked_for = functools.partial(body, model="")
    shell = {"type": "function", "function": {"name": "run", "parameters": {
        "type": "object", "properties": {"arguments": {"type": "array"}}}}}
    decoded = CALL | {"index": 7, "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    with (running(folder / "tools.gguf", "--context", "1024") as served,
          httpx.Client(base_url=served.url, timeout=60) as client):
        thought = {"role": "assistant", "content": "<think>\nHm.</think>Yes", "reasoning_content":
                   "Well"}
        for sent in ({"messages": HELLO}, {"messages": asked}, {"tool_choice": "none"},
                     {"messages": [HELLO[0] | {"tool_call_id": ""}]},
                     {"tools": [shell]}, {"messages": [*HELLO, thought, *HELLO]},
                     {"messages": [*HELLO, asked[1] | {"tool_calls": [decoded]}, *HELLO]},
                     {"chat_template_kwargs": {"polite": True}}):
            assert client.post(CHAT, json=asked_for(**tool | sent)).status_code == 200
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            reply = client.post(CHAT, json=asked_for(tool_choice=choice, **tool))
            # A random model need not come to the call, but then nobody takes its text for one.
            assert reply.status_code == 502 or reply.json()["choices"][0]["message"]["tool_calls"]
        strict = [TOOL | {"function": TOOL["function"] | {"strict": True}}]
        reply = client.post(CHAT, json=asked_for(tools=strict))
        assert reply.headers["x-ignored-fields"] == '"tools.strict"'
        paid = [*asked[:1], asked[1] | {"tool_calls": [CALL | {"function": {
            "name": "weather", "arguments": '{"city": 1.5, "size": 100000.0}'}}]}, *asked[2:]]
        assert client.post(CHAT, json=asked_for(messages=paid, **tool)).status_code == 200
        # llama.cpp would write them into the prompt with six digits.
        for number in ("48.856614", "12345678901234567890"):
            exact = json.loads(json.dumps(paid).replace("1.5", number))
            error = refusal(client.post(CHAT, json=asked_for(messages=exact, **tool)), 400)
            assert f"leaves out {number[:6]}" in error["message"]
        for wrong in ({"tool_choice": "any"}, {"tool_choice": other}, {"tools": [{"type": "web"}]},
                      {"tools": [{"type": "function", "function": None}]},
                      {"tools": [{"type": "function", "function": {
                          "name": "a", "parameters": {"type": "colour"}}}]},
                      {"messages": [HELLO[0], asked[1] | {"tool_calls": [
                          CALL, CALL | {"id": "b"}]}, *(
                              asked[2] | {"tool_call_id": n} for n in "ba")]},
                      {"tool_choice": "required", "stream": True}, {"messages": [
                          *HELLO, {"role": "assistant", "tool_calls": [{"function": {}}]}]}):
            refusal(client.post(CHAT, json=asked_for(**tool | wrong)), 400)


def test_names_of_values_must_be_in_the_prompt() -> None:
    tool = {"function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}}}
    assert [*left_out(tool, "f: a tool")] == ["city"]
    call = {"function": {"name": "f", "arguments": '{"on": true}'}}
    assert [*left_out({"arguments": '{"id": 3.14159265358}'}, "id 3.14159")] == [3.14159265358]
    assert [*left_out(call, "call f")] == ["on"] and not [*left_out(call, 'call f {"on": true}')]


@pytest.mark.parametrize("slot", [99, -7, "one"])
def test_clients_do_not_choose_the_slot(client: httpx.Client, slot: object) -> None:
    assert content(client.post(CHAT, json=body(id_slot=slot))) == content(
        client.post(CHAT, json=body()))


def test_a_body_of_50_mb(client: httpx.Client, server: Served) -> None:
    error = refusal(client.post(CHAT, content=b"x" * 50_000_000), 413)
    assert error["code"] == "request_too_large"
    address = ("127.0.0.1", httpx.URL(server.url).port)
    with socket.create_connection(address, timeout=30) as connection:  # before all has come
        connection.sendall(f"POST /v1{CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
                           "600000000\r\n\r\n".encode() + b"x" * 4_100_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    assert content(client.post(CHAT, json=body()))


def test_clients_that_disconnect(client: httpx.Client, server: Served) -> None:
    """During a stream, before an answer, and during a request: the slots are free again."""
    wanted = content(client.post(CHAT, json=body()))
    for _ in range(6):
        with client.stream("POST", CHAT, json=body(max_tokens=200, stream=True)) as reply:
            next(reply.iter_lines())
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{server.url}{CHAT}", json=body(max_tokens=200), timeout=0.01)
        with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                        b"Content-Length: 1000\r\n\r\n{")
    assert content(client.post(CHAT, json=body())) == wanted
    deadline = time.monotonic() + 20
    root = server.url.removesuffix("/v1")
    while "requests_processing 0" not in client.get(f"{root}/metrics").text:
        assert time.monotonic() < deadline, "abandoned requests are still computed"
        time.sleep(0.1)


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM there")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish(folder: Path, number: int) -> None:
    line = [sys.executable, "-m", "lib", "serve", str(folder / "tiny.gguf"), "--port", "0",
            *OPTIONS, *loras(folder)]
    with subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        sentence = process.stdout.readline()
        url = re.fullmatch(r"serving tiny, red, blue at (http\S+/v1)\n", sentence)[1]
        begun = threading.Barrier(5)

        def one(name: str) -> tuple[str, int]:
            with httpx.Client(base_url=url, timeout=60) as client, client.stream(
                    "POST", CHAT, json=body(model=name, max_tokens=200, stream=True)) as reply:
                lines = reply.iter_lines()
                first = next(lines)
                begun.wait(30)
                rest = list(lines)
            return rest[-2] if rest[-1] == "" else rest[-1], len([first, *rest])

        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(one, ("tiny", "red", "blue", "tiny"))
            begun.wait(30)
            process.send_signal(number)
            ends = list(answers)
        process.wait(30)
        assert [end for end, _ in ends] == ["data: [DONE]"] * 4
        assert all(count > 100 for _, count in ends)
        assert process.returncode == 0
        assert process.stderr.read() == ""


# A program with the options of `llama-server`, around the wheel's engine.
OWN = """#!{python}
import json, os, sys, threading
if sys.argv[1:] == ["--version"]:
    sys.exit({version!r})
sys.path.insert(0, {root!r})
from lib.serve import engine
words = [word for word in sys.argv[1:] if word not in ("--metrics", "--no-webui", "--jinja")]
pairs = [*zip(words[::2], words[1::2], strict=True)]
options = {{name[2:]: int(text) if text.isdigit() else text for name, text in pairs}}
files = [text for name, text in pairs if name == "--lora"]
class Given:
    readline = lambda self: json.dumps(["", options, files, os.environ["LLAMA_API_KEY"]])
    read = lambda self: threading.Event().wait()
sys.stdin = Given()
engine.main()
"""


def own_engine(folder: Path, version: str) -> str:
    path = folder / f"llama-server-{len(version)}"
    path.write_text(OWN.format(python=sys.executable, root=str(ROOT), version=version))
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name == "nt", reason="a script is no program there")
@pytest.mark.parametrize("version", ["", "version: 0.6.0-dev (build 11434, commit unknown)",
                                     "version: 6700 (0123abcd)"])
def test_an_engine_that_dies_is_started_again(folder: Path, version: str) -> None:
    """The wheel's, and a program of one's own."""
    options = ["--engine", own_engine(folder, version)] if version else []
    with running(folder / "tiny.gguf", *OPTIONS, *loras(folder), *options) as served, httpx.Client(
            base_url=served.url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        wanted = [content(client.post(CHAT, json=body(model=m))) for m in ("tiny", *NAMES)]
        assert len({*wanted}) == 3
        engine = psutil.Process(served.pid).children(recursive=True)[-1]
        engine.suspend()
        pending = pool.submit(client.post, CHAT, json=body())
        time.sleep(0.3)  # by now it waits for the engine
        engine.kill()
        assert "try again" in refusal(pending.result(), 502)["message"]
        deadline = time.monotonic() + 60
        while (reply := client.post(CHAT, json=body())).status_code in (502, 503):  # loading
            assert time.monotonic() < deadline, reply.text
            time.sleep(0.1)
        assert [content(client.post(CHAT, json=body(model=m))) for m in ("tiny", *NAMES)] == wanted


@pytest.mark.skipif(os.name == "nt", reason="a script is no program there")
@pytest.mark.parametrize(("version", "message"), [
    ("version: 4421 (0123abcd)", "is not a llama-server of build 6700 or newer.*version is 4421"),
    ("hello", "version is None"), (None, "No such file")])
def test_engines_that_cannot_serve(folder: Path, version: str | None, message: str) -> None:
    program = own_engine(folder, version) if version else str(folder / "none")
    with pytest.raises(UserError, match=message), running(
            folder / "tiny.gguf", *OPTIONS, "--engine", program):
        pass


def test_a_server_ends_with_the_program_that_started_it(folder: Path) -> None:
    program = ("import os, psutil; from pathlib import Path; from lib.serve import running\n"
               f"with running(Path({str(folder / 'tiny.gguf')!r})) as served:\n"
               "    front = psutil.Process(served.pid)\n"
               "    engines = front.children(recursive=True)\n"
               "    print(front.pid, *(one.pid for one in engines), flush=True)\n"
               "    os._exit(9)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 9, done.stderr
    assert len(done.stdout.split()) == 2
    for number in map(int, done.stdout.split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(number).wait(20)


def test_a_proxy_sees_no_local_traffic(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY must see neither the engine's key nor the prompts."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        with running(folder / "tiny.gguf") as served:
            assert ask_all(served.url, [question("Hello", max_tokens=4)])[0].tokens >= 1
        with pytest.raises(BlockingIOError):
            proxy.accept()


@pytest.mark.parametrize("parts", [[], ["a\u2028b\x85"]])
def test_an_answer_of_no_part_or_one(parts: list[str]) -> None:
    """A model in few bits may end at once: that is an empty answer, not a failure."""
    events = [{"choices": [{"delta": {"content": part}}]} for part in parts]
    events += [{"choices": [{"delta": {}, "finish_reason": "stop"}],
                "usage": {"completion_tokens": 1, "prompt_tokens": 3}}]
    text = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=text))
    with httpx.Client(transport=transport, base_url="http://server") as client:
        answer = ask(client, question("Hello"))
    assert answer.text == "".join(parts).strip() and answer.last >= answer.first > 0
    assert math.isnan(answer.decode) and answer.whole
    # Without figures of usage, and cut at its limit.
    bare = 'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": "length"}]}\n\n'
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=bare))
    with httpx.Client(transport=transport, base_url="http://server") as client:
        answer = ask(client, question("Hello"))
    assert answer.text == "a" and math.isnan(answer.tokens) and not answer.whole


@pytest.mark.parametrize(("status", "text", "message"), [
    (404, '{"error": {"message": "no model x"}}', "status 404.*no model x"),
    (200, 'data: {"error": {"message": "out of memory"}}\n\n', "broke off.*out of memory"),
    (200, 'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "broke off"),
    (200, '{"choices": [{"message": {"content": "a"}}]}', "no stream of events")])
def test_a_server_says_what_is_wrong(status: int, text: str, message: str) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text=text))
    with (httpx.Client(transport=transport, base_url="http://server") as client,
          pytest.raises(UserError, match=message)):
        ask(client, question("Hello"))


def test_a_server_that_dies_silently(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.serve.server.sys.executable", shutil.which("false"))
    with pytest.raises(UserError, match="ended with status 1"), running(folder / "tiny.gguf"):
        pass


def test_parity_of_the_engines(client: httpx.Client, make_tiny: Callable[[], LlamaForCausalLM],
                               tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Equal for the same model and adapter, far from equal for another."""
    records = sensors("test", 2)
    plain = compare(make_tiny(), tokenizer, client, records, name="tiny")
    assert plain.positions > 40
    assert plain.equal == 1
    assert plain.divergence < 1e-3
    assert plain.margin == 0
    adapted = load_adapter(make_tiny(), folder / "red")
    same = compare(adapted, tokenizer, client, records, name="red")
    assert same.equal > 0.95
    assert same.divergence < 1e-3
    other = compare(adapted, tokenizer, client, records, name="blue")
    assert other.equal < 0.5
    assert other.margin > 0
