"""Bad input, one row each: status 2, one line with what is wrong and what to do, nothing written.

A row is a command line, or a call of the library that the command line then shows.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, saved_adapter, with_adapter
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerBase

import lib.__main__
import lib.course
import lib.measure
from lib import slides
from lib.__main__ import main
from lib.artifacts import read_json, sha256, verified, write_json, writing
from lib.base_model import best_dtype, load_model, tiny_model
from lib.coa import CoaLora
from lib.configuration import KINDS, Configuration, Layers, Level
from lib.deploy import deploy_packed, load_deployed
from lib.deploy_gguf import deploy_gguf
from lib.gguf import export
from lib.gguf import save_model as save_gguf
from lib.joint import train_over
from lib.limits import Cost, deploy_within
from lib.lora import adapter_factors, load_adapter
from lib.merge import load_saved, merge
from lib.merge import save_model as save_merged
from lib.packing import load_packed, save_packed
from lib.plans import random_plan
from lib.profiles import TrainSettings
from lib.search import Journal
from lib.serve import running
from lib.surrogate import numbers
from lib.switchable import Switchable
from lib.tasks import held_out_loss, keyword_score, wilson
from lib.train import train

pytestmark = pytest.mark.usefixtures("float32")

GOOD = b'{"instruction": "Unit %d?", "response": "It is %d."}\n'
DATA = {
    "good.jsonl": b"".join(GOOD % (i, i) for i in range(6)),
    "text.jsonl": b"Once upon a time\n",
    "cut.jsonl": GOOD % (1, 1) + b'{"instruction": "a", "respon',
    "list.jsonl": b'["instruction", "response"]\n',
    "deep.jsonl": b"[" * 100_000 + b"\n",
    "keyless.jsonl": GOOD % (1, 1) + b'{"instruction": "a"}\n',
    "number.jsonl": b'{"instruction": "a", "response": 3}\n',
    "string.jsonl": b'"instruction, response"\n',
    "null.jsonl": b'{"instruction": null, "response": "b"}\n',
    "hollow.jsonl": b'{"instruction": "a", "response": ""}\n',
    "blank.jsonl": b'{"instruction": " ", "response": "b"}\n',
    "empty.jsonl": b"",
    "lines.jsonl": b"\xef\xbb\xbf\n\n \n",
    "latin.jsonl": b'{"instruction": "caf\xe9", "response": "b"}\n',
    "surrogate.jsonl": b'{"instruction": "\\ud800", "response": "b"}\n',
    "broken.json": b'{"layers": {',
    "taken": b"a file where a folder is wanted",
}


def remade(source: Path, target: Path, change: Callable[[Path], None]) -> None:
    """A copy of an artifact with one change, its manifest made to fit."""
    facts = {k: v for k, v in read_json(source / "manifest.json").items()
             if k not in ("files", "versions")}
    with writing(target, **facts) as part:
        shutil.copytree(source, part, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("manifest.json"))
        change(part)


def tensors_to(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(part: Path) -> None:
        file = part / "adapter_model.safetensors"
        save_file({k: change(v) for k, v in load_file(file).items()}, file)
    return apply


def config_to(**new: Any) -> Callable[[Path], None]:
    def apply(part: Path) -> None:
        file = part / "adapter_config.json"
        file.write_text(json.dumps(read_json(file) | new))
    return apply


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def add_adapters(root: Path, model: LlamaForCausalLM) -> None:
    good = saved_adapter(model, root / "adapter")
    saved_adapter(tiny_model(layers=3), root / "deeper")
    remade(good, root / "nan", tensors_to(lambda t: t * float("nan")))
    remade(good, root / "whole", tensors_to(lambda t: (100 * t).to(torch.int8)))
    remade(good, root / "ranks", config_to(r=10**9))
    remade(good, root / "prompt", config_to(peft_type="PROMPT_TUNING"))
    remade(good, root / "scale", config_to(lora_alpha="32"))
    remade(good, root / "short", lambda part: (part / "adapter_model.safetensors").write_bytes(
        b"\x40\0\0\0\0\0\0\0{"))
    for name, change in {
            "flipped": lambda p: flip(p / "adapter_model.safetensors"),
            "lacking": lambda p: (p / "adapter_config.json").unlink(),
            "unlisted": lambda p: (p / "manifest.json").write_text('{"files": []}'),
            "garbled": lambda p: (p / "manifest.json").write_bytes(b"\x80{"),
            "bare": lambda p: (p / "manifest.json").unlink()}.items():
        change(shutil.copytree(good, root / name))


def add_models(root: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    for name in ("nan_model", "cut_model", "words"):
        other = tiny_model(vocabulary=49280) if name == "words" else tiny_model()
        if name == "nan_model":
            other.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
        other.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    reworded = shutil.copytree(root / "nan_model", root / "reworded") / "tokenizer.json"
    words = read_json(reworded)
    vocabulary = words["model"]["vocab"]
    one, other = [*vocabulary][1000:1002]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    reworded.write_text(json.dumps(words))
    weights = root / "cut_model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(root / "words", root / "no_config").joinpath("config.json").write_text("{")
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=49152, n_embd=32, n_layer=1, n_head=2))
    gpt.save_pretrained(root / "gpt")
    tokenizer.save_pretrained(root / "gpt")


def add_deployed(root: Path, model: str) -> None:
    """What `deploy` reads, and what it and `export` write."""
    base = Switchable.load(model)
    plan = Configuration.uniform(base.layers, Level(2, 2, "bf16", 64, 256))
    save_packed(base, plan, root / "packed.safetensors")
    plan.save(root / "plan.json")
    coa = CoaLora(with_adapter(base.model, target_modules=list(KINDS)), base)
    coa.save_pretrained(root / "data" / "adapters" / "sensors_coa")
    saved_adapter(tiny_model(), root / "data" / "adapters" / "sensors_qlora",
                  target_modules=list(KINDS))
    front = {"base_hash": base.fingerprint,
             "adapter": sha256(root / "data/adapters/sensors_coa/manifest.json"),
             "front": [{"bits": plan.bits, "loss": 9.0,
                        "levels": " ".join(map(str, numbers(plan).tolist()))}]}
    row = front["front"][0]
    for name, value in {"data": front, "base": front | {"base_hash": "0"},
                        "other": front | {"adapter": "0"}, "list": [front],
                        "rows": front | {"front": [{"loss": 1}]},
                        "levels": front | {"front": [row | {"levels": "1 2 x"}]},
                        "number": front | {"front": [row | {"levels": "999"}]}}.items():
        write_json(root / name / "fronts" / "sensors.json", value)
        if name != "data":
            (root / name / "adapters").symlink_to(root / "data" / "adapters")
    export(root / "edge", route="original", adapters={"mine": root / "adapter"}, model=model)
    shutil.copytree(root / "edge", root / "edge_flipped")
    flip(root / "edge_flipped" / "model.gguf")
    shutil.copytree(root / "edge", root / "edge_nameless")
    facts = read_json(root / "edge" / "manifest.json")
    write_json(root / "edge_nameless" / "manifest.json",
               {k: v for k, v in facts.items() if k != "model"})
    (root / "half.gguf").write_bytes((root / "edge" / "model.gguf").read_bytes()[:100_000])


@pytest.fixture(scope="module")
def shelf(tiny_directory: str, _tiny: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase,
          tmp_path_factory: pytest.TempPathFactory, float32: None) -> Path:
    """Adapters, models and deployed files, good and bad; no row changes them."""
    root = tmp_path_factory.mktemp("shelf")
    add_adapters(root, _tiny)
    add_models(root, _tiny, tokenizer)
    add_deployed(root, tiny_directory)
    return root


class Place:
    """Where a row works, what it can use, and how it patches."""

    def __init__(self, here: Path, shelf: Path, tiny: str, patch: pytest.MonkeyPatch) -> None:
        self.here, self.shelf, self.tiny, self.patch = here, shelf, tiny, patch

    def layers(self) -> Layers:
        return Layers.of(load_model(self.tiny))

    def deploy(self, way: Callable[..., Any], budget: float, data: str = "data") -> None:
        way("sensors", budget, Path("new/out"), examples=1, model=self.tiny,
            folder=self.shelf / data)


def listing(directory: Path) -> dict[str, bytes | None]:
    """Everything below a directory: files with their bytes, folders."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() if p.is_file() else None
            for p in sorted(directory.rglob("*"))}


def marks(directory: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of everything below a directory."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in directory.rglob("*")}


@pytest.fixture
def place(tmp_path: Path, shelf: Path, tiny_directory: str, monkeypatch: pytest.MonkeyPatch
          ) -> Iterator[Place]:
    """A working directory with data, some of it bad; builds go there, too."""
    for name, content in DATA.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "locked").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    monkeypatch.setattr(lib.measure, "BUILD", tmp_path / "build")
    real = os.mkdir

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        """The superuser may write anywhere, so the right is taken away here."""
        if str(path).startswith(("locked/", str(tmp_path / "locked"))):
            raise PermissionError(13, "Permission denied")
        real(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    yield Place(tmp_path, shelf, tiny_directory, monkeypatch)
    best_dtype.cache_clear()


TRAIN = ["train", "--data", "good.jsonl", "--out", "out", "--model", "TINY", "--steps", "2"]
EXPORT = ["export", "--model", "TINY", "--out", "edge"]
DEPLOY = ["deploy", "--out", "small", "--budget-mb"]
LONG = "x" * 300
HELP = "see `python -m lib --help`"
RECORDS = [{"instruction": "Unit?", "response": "It is."}]
Call = list[str] | Callable[[Place], Any]


def data(file: str) -> list[str]:
    return ["train", "--data", file, "--out", "out", "--model", "TINY"]


def named(variable: str, value: str, call: list[str]) -> Callable[[Place], Any]:
    """A command with an environment variable."""
    def run(place: Place) -> None:
        place.patch.setenv(variable, value)
        best_dtype.cache_clear()
        typed(call, place)
    return run


def words(call: list[str], place: Place) -> list[str]:
    """A row's words with the places filled in."""
    return [place.tiny if word == "TINY" else word.replace("SHELF", str(place.shelf))
            for word in call]


def typed(call: list[str], place: Place) -> None:
    """A command as `main` runs it."""
    arguments = lib.__main__.parser().parse_args(words(call, place))
    vars(lib.__main__)[f"command_{arguments.command}"](arguments)


def port_in_use(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        typed(["serve", "SHELF/edge", "--port", str(other.getsockname()[1])], place)


def unreadable(place: Place) -> None:
    def denied(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    with place.patch.context() as patch:
        patch.setattr(Path, "read_bytes", denied)
        typed(data("good.jsonl"), place)


def no_right_to_read(place: Place) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with place.patch.context() as patch:
        patch.setattr("gguf.gguf_reader.np.memmap", denied)
        typed(["serve", "SHELF/edge/model.gguf"], place)


def _huge(place: Place) -> LlamaForCausalLM:
    model = load_model(place.tiny)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    return model


def bench_into(target: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        module = types.ModuleType("lib.bench_quick")
        vars(module)["quick"] = lambda: {}
        place.patch.setitem(sys.modules, "lib.bench_quick", module)
        place.patch.setattr("lib.bench.BENCHES", {"quick": "quick"})
        typed(["bench", "quick", "--json", target], place)
    return run


def damaged_notebook(call: Callable[[], Any], text: str = "{") -> Callable[[Place], None]:
    def run(place: Place) -> None:
        books = place.here.with_name(f"{place.here.name}-books")
        books.mkdir()
        (books / "01_one.ipynb").write_text(text)
        place.patch.setattr(lib.course, "NOTEBOOKS", books)
        call()
    return run


def build_is_a_file(place: Place) -> None:
    place.patch.setattr(lib.measure, "BUILD", place.here / "taken")
    typed(["run"], place)


def packed_for_another(place: Place) -> None:
    load_packed(tiny_model(layers=3), place.shelf / "packed.safetensors")


def no_llama(place: Place) -> None:
    Switchable.load(str(place.shelf / "gpt"))


# What is called; what the line says is wrong; what it says to do.
ROWS: dict[str, tuple[Call, str, str]] = {
    "no command": ([], "command", HELP),
    "unknown command": (["fly"], "invalid choice: 'fly'", "choose from"),
    "unknown option": ([*TRAIN, "--speed", "9"], "unrecognized arguments: --speed", HELP),
    "doctor with an argument": (["doctor", "now"], "unrecognized arguments: now", HELP),

    "run: unknown profile": (["run", "--profile", "huge"],
                             "unknown profile 'huge'", "use one of smoke, laptop"),
    "run: empty profile": (["run", "--profile", ""], "unknown profile ''", "use one of"),
    "run: unknown profile in the environment": (
        named("COURSE_PROFILE", "huge", ["run"]), "unknown profile 'huge'", "use one of"),
    "run: notebook 07": (["run", "--only", "07"], "no notebook '07'", "use one of 01, 02"),
    "run: notebook 99": (["run", "--only", "99"], "no notebook '99'", "use one of 01, 02"),
    "run: notebook by name": (["run", "--only", "lora"], "no notebook 'lora'", "use one of"),
    "run: a pattern": (["run", "--only", "0?"], "no notebook '0?'", "use one of"),
    "run: build is a file": (build_is_a_file, "cannot write .*taken", "choose another folder"),
    "run: damaged notebook": (damaged_notebook(lambda: lib.course.run("smoke")),
                              "01_one.ipynb is no notebook", "take it from the repository"),
    "run: a notebook without cells": (
        damaged_notebook(lambda: lib.course.run("smoke"), '{"nbformat": 4, "cells": 3}'),
        "01_one.ipynb is no notebook", "take it from the repository"),
    "slides: damaged notebook": (damaged_notebook(lambda: slides.build(Path("new/deck"))),
                                 "01_one.ipynb is no notebook", "take it from the repository"),

    "bench: unknown": (["bench", "nothing"], "unknown benchmark 'nothing'",
                       "use one of training"),
    "bench: none": (["bench"], "required: name", HELP),
    "bench: into a folder": (bench_into("folder"), "cannot write folder", "choose another"),
    "bench: below a file": (bench_into("taken/b.json"), "cannot write taken", "choose another"),

    "train: no data": (["train", "--out", "out"], "required: --data", HELP),
    "train: no out": (["train", "--data", "good.jsonl"], "required: --out", HELP),
    "train: missing data": (data("none.jsonl"), "none.jsonl does not exist", "check the path"),
    "train: data is a folder": (data("folder"), r"folder cannot be read \(Is a dir", "name a file"),
    "train: data may not be read": (unreadable, "good.jsonl cannot be read", "name a file"),
    "train: no JSON": (data("text.jsonl"), "text.jsonl:1 is no JSON", "one object a line"),
    "train: cut JSON": (data("cut.jsonl"), "cut.jsonl:2 is no JSON", "one object a line"),
    "train: deep JSON": (data("deep.jsonl"), "deep.jsonl:1 is no JSON", "one object a line"),
    "train: no object": (data("list.jsonl"), "list.jsonl:1 is no JSON object", "use {...}"),
    "train: a string": (data("string.jsonl"), "string.jsonl:1 is no JSON object", "use {...}"),
    "train: missing key": (data("keyless.jsonl"), "keyless.jsonl:2 lacks the text 'response'",
                           "add it"),
    "train: a number": (data("number.jsonl"), "number.jsonl:1 lacks the text", "add it"),
    "train: null": (data("null.jsonl"), "null.jsonl:1 lacks the text 'instruction'", "add it"),
    "train: empty response": (data("hollow.jsonl"), "hollow.jsonl:1 has an empty 'response'",
                              "fill it"),
    "train: blank instruction": (data("blank.jsonl"), "has an empty 'instruction'", "fill it"),
    "train: empty file": (data("empty.jsonl"), "empty.jsonl has no records", "one JSON object"),
    "train: empty lines": (data("lines.jsonl"), "lines.jsonl has no records", "one JSON object"),
    "train: not UTF-8": (data("latin.jsonl"), "latin.jsonl:1 is not UTF-8", "save the file"),
    "train: half a character": (data("surrogate.jsonl"), "surrogate.jsonl:1 is not", "save the"),
    "train: rank 0": ([*TRAIN, "--rank", "0"], "rank 0", "use a positive"),
    "train: rank -1": ([*TRAIN, "--rank", "-1"], "rank -1", "use a positive"),
    "train: rank too large": ([*TRAIN, "--rank", "999"], "rank 999 is above the width", "lower it"),
    "train: rank no number": ([*TRAIN, "--rank", "many"], "invalid int value: 'many'", HELP),
    "train: unknown target": ([*TRAIN, "--targets", "q_proj,nose"],
                              "target module 'nose' does not exist", "use down_proj"),
    "train: no target": ([*TRAIN, "--targets", ""], "target module '' does not", "use down_proj"),
    "train: tied target": ([*TRAIN, "--targets", "lm_head"], "'lm_head' does not", "use down_proj"),
    "train: unknown mode": ([*TRAIN, "--mode", "magic"], "invalid choice: 'magic'", "choose from"),
    "train: negative steps": ([*TRAIN, "--steps", "-5"], "steps -5", "use a positive"),
    "train: zero steps": ([*TRAIN, "--steps", "0"], "steps 0", "use a positive"),
    "train: half a step": ([*TRAIN, "--steps", "1.5"], "invalid int value: '1.5'", HELP),
    "train: zero learning rate": ([*TRAIN, "--learning-rate", "0"], "learning rate 0", "above 0"),
    "train: no learning rate": ([*TRAIN, "--learning-rate", "nan"], "learning rate nan", "above 0"),
    "train: endless learning rate": ([*TRAIN, "--learning-rate", "inf"], "rate inf", "above 0"),
    "train: far too high a rate": ([*TRAIN, "--steps", "4", "--mode", "lora",
                                    "--learning-rate", "1e30"],
                                   "the loss became nan", "lower the learning rate"),
    "train: zero batch": ([*TRAIN, "--batch-size", "0"], "batch size 0", "use 1 or more"),
    "train: accumulate no divisor": ([*TRAIN, "--accumulate", "3"], "accumulate 3", "a divisor"),
    "train: accumulate 0": ([*TRAIN, "--accumulate", "0"], "accumulate 0", "a divisor"),
    "train: dropout of all": ([*TRAIN, "--dropout", "1"], "dropout 1", "use 0 up to below 1"),
    "train: negative alpha": ([*TRAIN, "--alpha", "-1"], "alpha -1", "use a positive"),
    "train: negative warmup": ([*TRAIN, "--warmup", "-1"], "warmup -1", "use a share"),
    "train: warmup nan": ([*TRAIN, "--warmup", "nan"], "warmup nan", "use a share"),
    "train: no length": ([*TRAIN, "--max-length", "0"], "max length 0", "use 2 or more"),
    "train: length too short": ([*TRAIN, "--max-length", "4"], "no answer ends", "raise --max"),
    "train: length a little short": ([*TRAIN, "--max-length", "17"], "cut off|no answer", "raise"),
    "train: negative seed": ([*TRAIN, "--seed", "-1"], "seed -1", "use 0 up to"),
    "train: seed too large": ([*TRAIN, "--seed", "4294967296"], "seed 4294967296", "use 0 up to"),
    "train: unknown model": ([*TRAIN, "--model", "nobody/nothing"], "'nobody/nothing' is no local",
                             "check the name"),
    "train: model is a file": ([*TRAIN, "--model", "taken"], "'taken' is no local directory",
                               "check the name"),
    "train: model is another folder": ([*TRAIN, "--model", "folder"], "folder does not load",
                                       "check that it is a whole model"),
    "train: model cut": ([*TRAIN, "--model", "SHELF/cut_model"], "cut_model does not load",
                         "check that it is a whole model"),
    "train: model with a damaged config": ([*TRAIN, "--model", "SHELF/no_config"],
                                           "no_config does not load", "check that it is a whole"),
    "train: model that is not finite": ([*TRAIN, "--mode", "lora", "--model", "SHELF/nan_model"],
                                        "the loss is no number from the start", "take it anew"),
    "train: out is a file": ([*TRAIN, "--out", "taken"], "taken holds something", "choose another"),
    "train: out is below a file": ([*TRAIN, "--out", "taken/out"], "cannot write taken",
                                   "choose another folder"),
    "train: out is in use": ([*TRAIN, "--out", "folder"], "folder holds something", "choose"),
    "train: out is here": ([*TRAIN, "--out", "."], "is the folder you are in", "choose a new one"),
    "train: out is not mine": ([*TRAIN, "--out", "locked/out"], "cannot write locked/.*Permission",
                               "choose another folder"),
    "train: out has too long a name": ([*TRAIN, "--out", LONG], "File name too long",
                                       "choose another folder"),
    "train: dtype": (named("COURSE_DTYPE", "float16", TRAIN), "COURSE_DTYPE=float16",
                     "use float32 or bfloat16"),
    "train(): no records": (lambda p: train([], TrainSettings(), model=p.tiny),
                            "no records", "give at least one"),
    "train(): a record lacks a field": (
        lambda p: train([*RECORDS, {"instruction": "a"}], TrainSettings(), model=p.tiny),
        "record 2 lacks the text 'response'", "add it"),
    "train(): a record is no record": (lambda p: train(["a"], TrainSettings(), model=p.tiny),
                                       "record 1 is no JSON object", "use {...}"),
    "train_over(): no plans": (
        lambda p: train_over(Switchable.load(p.tiny), RECORDS, [], TrainSettings()),
        "no configurations to train over", "give at least one"),

    "export: no out": (["export"], "required: --out", HELP),
    "export: adapter without a folder": ([*EXPORT, "--adapter", "x"], "'x' is not NAME=DIR",
                                         "give both"),
    "export: adapter without a name": ([*EXPORT, "--adapter", "=x"], "'=x' is not NAME=DIR",
                                       "give both"),
    "export: adapter twice": ([*EXPORT, "--adapter", "x=a", "--adapter", "x=b"],
                              "x is given twice", "another name"),
    "export: adapter named like a path": ([*EXPORT, "--adapter", "../x=SHELF/adapter"],
                                          "name '../x' makes no file", "use letters"),
    "export: no adapter": ([*EXPORT, "--adapter", "x=none"], "none is no artifact", "check the"),
    "export: adapter of no artifact": ([*EXPORT, "--adapter", "x=SHELF/bare"],
                                       "bare is no artifact", "check the path"),
    "export: folder is no adapter": ([*EXPORT, "--merge", "folder"], "folder is no artifact",
                                     "check the path"),
    "export: artifact is no adapter": ([*EXPORT, "--merge", "SHELF/edge"],
                                       "edge is no LoRA adapter", "name the folder of one"),
    "export: artifact beside is no adapter": ([*EXPORT, "--adapter", "x=SHELF/edge"],
                                              "edge is no LoRA adapter", "name the folder"),
    "export: prompt tuning": ([*EXPORT, "--adapter", "x=SHELF/prompt"],
                              "prompt is no LoRA adapter", "name the folder"),
    "export: adapter damaged": ([*EXPORT, "--merge", "SHELF/flipped"],
                                "adapter_model.safetensors is missing or damaged", "make it again"),
    "export: adapter lacks a file": ([*EXPORT, "--adapter", "x=SHELF/lacking"],
                                     "adapter_config.json is missing", "make it again"),
    "export: manifest lists nothing": ([*EXPORT, "--merge", "SHELF/unlisted"],
                                       "manifest.json lists no files", "make it again"),
    "export: manifest is no text": ([*EXPORT, "--merge", "SHELF/garbled"],
                                    "manifest.json is not readable JSON", "make it again"),
    "export: header cut": ([*EXPORT, "--adapter", "x=SHELF/short"],
                           "adapter_model.safetensors is damaged", "train the adapter again"),
    "export: rank of another adapter": ([*EXPORT, "--merge", "SHELF/ranks"],
                                        r"does not go with .*\(rank 1000000000, there \{4\}\)",
                                        "train the adapter again"),
    "export: alpha is a text": ([*EXPORT, "--adapter", "x=SHELF/scale"], "does not go with",
                                "train the adapter again"),
    "export: adapter not finite": ([*EXPORT, "--merge", "SHELF/nan"], "no finite numbers",
                                   "train the adapter again"),
    "export: adapter beside not finite": ([*EXPORT, "--adapter", "x=SHELF/nan"],
                                          "no finite numbers", "train the adapter again"),
    "export: adapter of whole numbers": ([*EXPORT, "--adapter", "x=SHELF/whole"],
                                         "no finite numbers", "train the adapter again"),
    "export: adapter of a deeper model": ([*EXPORT, "--merge", "SHELF/deeper"],
                                          "deeper does not fit this model", "train an adapter"),
    "export: beside, of a deeper model": ([*EXPORT, "--adapter", "x=SHELF/deeper"],
                                          "no place for model.layers.2.* in a Llama of 2",
                                          "adapters that fit"),
    "export: both": ([*EXPORT, "--merge", "SHELF/adapter", "--adapter", "x=SHELF/adapter"],
                     "made for the plain base", "fold one in"),
    "export: unknown type": ([*EXPORT, "--type", "Q3_K"], "unknown tensor type 'Q3_K'",
                             "use one of F32"),
    "export: type in small letters": ([*EXPORT, "--type", "q8_0"], "unknown tensor type 'q8_0'",
                                      "use one of F32"),
    "export: unknown route": ([*EXPORT, "--route", "scenic"], "unknown route 'scenic'",
                              "use original or dequantized"),
    "export: route that is not for it": ([*EXPORT, "--route", "through_4bit"],
                                         "unknown route 'through_4bit'", "use original or"),
    "export: into use": ([*EXPORT, "--out", "folder"], "folder holds something", "choose another"),
    "export: out is not mine": ([*EXPORT, "--route", "original", "--out", "locked/edge"],
                                "cannot write locked/edge", "choose another folder"),
    "export: model not finite": (["export", "--model", "SHELF/nan_model", "--out", "edge"],
                                 "blk.1.ffn_up.weight has a weight of nan", "the weights anew"),
    "export: out is the adapter": ([*EXPORT, "--adapter", "x=SHELF/adapter", "--out",
                                    "SHELF/adapter"], "holds .*adapter, which is read",
                                   "choose another folder"),
    "export: out holds the adapter": (
        [*EXPORT, "--merge", "SHELF/edge/mine.gguf", "--out", "SHELF/edge"],
        "edge holds .*mine.gguf, which is read", "choose another folder"),
    "export: out is the model": (["export", "--model", "SHELF/words", "--out", "SHELF/words"],
                                 "words holds .*words, which is read", "choose another folder"),
    "train: out is the model": ([*TRAIN, "--model", "SHELF/words", "--out", "SHELF/words"],
                                "words holds .*words, which is read", "choose another folder"),
    "export: the same number of other words": (
        ["export", "--model", "SHELF/reworded", "--route", "original", "--out", "edge"],
        "only models with the embedded model's vocabulary", "convert others with"),
    "save_model(): too large for 16 bits": (
        lambda p: save_merged(_huge(p), Path("new/out")), "float16 cannot hold", "dtype=None"),
    "save_model() as GGUF: too large": (
        lambda p: save_gguf(_huge(p), Path("new/out"), kind="F16"), "100000, which F16 cannot hold",
        "use F32"),
    "export: other words": (["export", "--model", "SHELF/words", "--route", "original", "--out",
                             "edge"], "only models with the embedded model's vocabulary",
                            "convert others with"),
    "export: no Llama": (["export", "--model", "SHELF/gpt", "--route", "original", "--out", "edge"],
                         "only Llama models are exported", "this is 'gpt2'"),

    "deploy: no budget": (["deploy", "--out", "small"], "required: --budget-mb", HELP),
    "deploy: no out": (["deploy", "--budget-mb", "80"], "required: --out", HELP),
    "deploy: budget no number": ([*DEPLOY, "much"], "invalid float value: 'much'", HELP),
    "deploy: budget 0": ([*DEPLOY, "0"], "budget of 0 MB", "use a number above 0"),
    "deploy: budget below 0": ([*DEPLOY, "-5"], "budget of -5 MB", "use a number above 0"),
    "deploy: budget nan": ([*DEPLOY, "nan"], "budget of nan MB", "use a number above 0"),
    "deploy: unknown task": ([*DEPLOY, "80", "--task", "poems"], "unknown task 'poems'",
                             "use one of sensors, movies"),
    "deploy: no search made": ([*DEPLOY, "80", "--task", "movies"], "no search was made for movies",
                               "use --format gguf"),
    "deploy: unknown format": ([*DEPLOY, "80", "--format", "zip"], "invalid choice: 'zip'",
                               "choose from"),
    "deploy: memory 0": ([*DEPLOY, "80", "--memory-mb", "0"], "limits of 0 MB", "above 0"),
    "deploy: time nan": ([*DEPLOY, "80", "--token-ms", "nan"], "cannot be kept", "above 0"),
    "deploy: place in use": ([*DEPLOY, "80", "--out", "folder"], "folder holds something",
                             "choose another folder"),
    "deploy: an artifact is there": ([*DEPLOY, "80", "--out", "SHELF/adapter"],
                                     "adapter exists", "choose a new folder"),
    "deploy: place is a file": ([*DEPLOY, "80", "--format", "gguf", "--out", "taken"],
                                "taken holds something", "choose another folder"),
    "deploy: limits in a place in use": ([*DEPLOY, "80", "--memory-mb", "900", "--out", "folder"],
                                         "folder holds something", "choose another folder"),
    "deploy: too small": (lambda p: p.deploy(deploy_packed, 1), "below the smallest known plan",
                          "give .* MB more"),
    "deploy: too large": (lambda p: p.deploy(deploy_packed, 100), "hold the model in 16 bits",
                          "nothing need be quantised"),
    "deploy: endless": (lambda p: p.deploy(deploy_packed, float("inf")), "inf MB hold the model",
                        "nothing need be quantised"),
    "deploy: GGUF too small": (lambda p: p.deploy(deploy_gguf, 0.5), "below the smallest file",
                               "give .* MB more"),
    "deploy: GGUF too large": (lambda p: p.deploy(deploy_gguf, 300), "hold the model in 16 bits",
                               "nothing need be quantised"),
    "deploy: front missing": (lambda p: p.deploy(deploy_packed, 6, "adapter"),
                              "no search was made", "use --format gguf"),
    "deploy: front of another base": (lambda p: p.deploy(deploy_packed, 6, "base"),
                                      "front of another base", "search anew"),
    "deploy: front of another adapter": (lambda p: p.deploy(deploy_packed, 6, "other"),
                                         "front of another adapter", "search anew"),
    "deploy: front is a list": (lambda p: p.deploy(deploy_packed, 6, "list"),
                                "is no front of a search", "search anew"),
    "deploy: front lacks levels": (lambda p: p.deploy(deploy_packed, 6, "rows"),
                                   "sensors.json is damaged", "search anew"),
    "deploy: levels no numbers": (lambda p: p.deploy(deploy_packed, 6, "levels"),
                                  "sensors.json is damaged", "search anew"),
    "deploy: unknown level": (lambda p: p.deploy(deploy_packed, 6, "number"),
                              "sensors.json is damaged", "search anew"),
    "deploy_within(): no limits kept": (
        lambda p: deploy_within(lambda *a, **k: deploy_packed(*a, **k), "sensors", 1,
                                Path("new/out"), Cost(5, 5), examples=1, model=p.tiny,
                                folder=p.shelf / "data"), "below the smallest", "MB more"),
    "load_deployed(): nothing there": (lambda _: load_deployed(Path("none")), "none is no artifact",
                                       "check the path"),
    "load_deployed(): another artifact": (lambda p: load_deployed(p.shelf / "edge"),
                                          "edge is not from `deploy`", "check it"),

    "serve: too long a name": (["serve", LONG], "x does not exist", "check the path"),
    "serve: adapter's name too long": (["serve", "SHELF/edge", "--lora", f"x={LONG}"],
                                       "x does not exist", "check the path"),
    "serve: may not be read": (no_right_to_read, "model.gguf is no whole.*Permission",
                               "make it again"),
    "serve: nothing": (["serve", "nothing"], "nothing does not exist", "check the path"),
    "serve: a folder": (["serve", "folder"], "folder is no artifact", "check the path"),
    "serve: an adapter": (["serve", "SHELF/adapter"], "adapter is not from .* export", "make one"),
    "serve: a text": (["serve", "good.jsonl"], "good.jsonl is no whole GGUF file", "make it again"),
    "serve: half a file": (["serve", "SHELF/half.gguf"], "half.gguf is no whole", "make it again"),
    "serve: a damaged file": (["serve", "SHELF/edge_flipped"], "model.gguf is missing or damaged",
                              "make it again"),
    "serve: a damaged manifest": (["serve", "SHELF/edge_nameless"], "manifest.json is damaged",
                                  "export it again"),
    "serve: an adapter's file": (["serve", "SHELF/edge/mine.gguf"], "mine.gguf is an adapter",
                                 "name a model"),
    "serve: no slots": (["serve", "folder", "--slots", "0"], "0 slots serve nobody",
                        "use 1 to 1024"),
    "serve: slots past all numbers": (["serve", "folder", "--slots", "10000000000"],
                                      "slots serve nobody", "use 1 to 1024"),
    "serve: threads past all numbers": (["serve", "folder", "--threads", "3000000000"],
                                        "3000000000 threads", "to 1024"),
    "serve: no context": (["serve", "folder", "--context", "3"], "context 3 is too short",
                          "use 16 or more"),
    "serve: threads -1": (["serve", "folder", "--threads", "-1"], "-1 threads", "use 0"),
    "serve: port 70000": (["serve", "folder", "--port", "70000"], "port 70000 does not exist",
                          "use 0 to 65535"),
    "serve: port -1": (["serve", "folder", "--port", "-1"], "port -1", "use 0 to 65535"),
    "serve: port http": (["serve", "folder", "--port", "http"], "invalid int value: 'http'", HELP),
    "serve: port in use": (port_in_use, r"port \d+ is taken", "choose another with --port"),
    "serve: adapter without a file": (["serve", "SHELF/edge", "--lora", "x"],
                                      "'x' is not NAME=FILE", "NAME=FILE:SCALE"),
    "serve: adapter's scale": (["serve", "SHELF/edge", "--lora", "x=a:1.2.3"],
                               "a:1.2.3 does not exist", "check the path"),
    "serve: adapter's file missing": (["serve", "SHELF/edge", "--lora", "x=none.gguf:1"],
                                      "none.gguf does not exist", "check the path"),
    "serve: a model as adapter": (["serve", "SHELF/edge", "--lora", "x=SHELF/edge/model.gguf"],
                                  "adapter x is no LoRA file", "export it with"),
    "running(): what the server said": (lambda _: running(Path("folder")).__enter__(),
                                        "folder is no artifact", "check the path"),

    "slides: place in use": (["slides", "--out", "folder"], "folder holds something", "choose"),
    "slides: place is a file": (["slides", "--out", "taken"], "taken holds something", "choose"),
    "slides: here": (["slides", "--out", "."], "is the folder you are in", "choose a new one"),
    "slides: not mine": (["slides", "--out", "locked/deck"], "cannot write locked/deck", "choose"),
    "site: place in use": (["site", "--out", "folder"], "folder holds something", "choose"),
    "site: below a file": (["site", "--out", "taken/site"], "cannot write taken", "choose"),
    "site: too long a name": (["site", "--out", LONG], "File name too long", "choose another"),

    "configuration of another model": (
        lambda p: Configuration.load(p.shelf / "plan.json", Layers.of(tiny_model(layers=3))),
        "lacks model.layers.2", "it is for another model"),
    "configuration missing": (lambda p: Configuration.load(Path("none.json"), p.layers()),
                              "none.json does not exist", "check the path"),
    "configuration damaged": (lambda p: Configuration.load(Path("broken.json"), p.layers()),
                              "broken.json is not readable JSON", "make it again"),
    "configuration is a folder": (lambda p: Configuration.load(Path("folder"), p.layers()),
                                  "folder is not readable JSON", "make it again"),
    "configuration too deep": (lambda p: Configuration.load(Path("deep.jsonl"), p.layers()),
                               "deep.jsonl is not readable JSON", "make it again"),
    "budget of no mixture": (lambda p: random_plan(p.layers(), 1.0, None),
                             "1.0 bits a weight cannot be reached", "use 2.03 to"),
    "packed for another model": (packed_for_another, "lacks model.layers.2", "another model"),
    "packed file is none": (lambda p: load_packed(tiny_model(), p.shelf / "adapter" /
                                                  "adapter_model.safetensors"),
                            "is no packed model", "make it with save_packed"),
    "packed from weights not finite": (
        lambda p: save_packed(base := Switchable.load(str(p.shelf / "nan_model")),
                              Configuration.uniform(base.layers, Level()), Path("new/packed")),
        "a weight is not a finite number", "take it anew"),
    "switchable without blocks": (no_llama, "no Llama blocks", "use a model of that family"),
    "switchable of an unknown grid": (lambda p: Switchable.load(p.tiny, grid="log"),
                                      "unknown grid 'log'", "use nf or int"),
    "merge by an unknown route": (lambda p: merge(p.shelf / "adapter", route="x", model=p.tiny),
                                  "unknown route 'x'", "use one of original"),
    "load_saved() of no artifact": (lambda p: load_saved(p.tiny), "is no artifact", "check"),
    "load_adapter() of another model": (
        lambda p: load_adapter(load_model(p.tiny), p.shelf / "deeper"),
        "deeper does not fit this model", "train an adapter for it"),
    "adapter_factors() of nothing": (lambda _: adapter_factors(Path("none")),
                                     "none is no LoRA adapter", "name the folder of one"),
    "coa adapter without its network": (
        lambda p: CoaLora.from_pretrained(Switchable.load(p.tiny), p.shelf / "adapter"),
        "adapter has no coa.safetensors", "it is no configuration-aware"),
    "verified() of too long a name": (lambda _: verified(Path(LONG)), "x is no artifact",
                                      "check the path"),
    "verified() through a file": (lambda _: verified(Path("taken")), "taken is no artifact",
                                  "check the path"),
    "journal of something else": (
        lambda _: Journal(Path("good.jsonl"), "mine"), "good.jsonl is no journal", "remove it"),
    "journal in a place that is not mine": (lambda _: Journal(Path("locked/x/j.jsonl"), "mine"),
                                            "cannot write locked/x", "choose another folder"),
    "score of nothing": (lambda p: keyword_score(None, None, []), "no examples", "at least one"),
    "loss of nothing": (lambda p: held_out_loss(None, None, []), "no examples", "at least one"),
    "interval of nothing": (lambda _: wilson(0, 0), "no examples to score", "give at least one"),
}


def result(call: Call, place: Place) -> int:
    """Exit status of a row."""
    if isinstance(call, list):
        return main(words(call, place))
    place.patch.setattr(lib.__main__, "command_doctor", lambda _: call(place))
    return main(["doctor"])


@pytest.mark.parametrize("name", ROWS)
def test_bad_input(name: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    call, wrong, remedy = ROWS[name]
    before, kept = listing(place.here), marks(place.shelf)
    capfd.readouterr()
    assert result(call, place) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err and len(err) < 700
    for said in (wrong, remedy):
        assert re.search(said, err) or said in err, err
    # A benchmark prints what it has measured before it keeps it.
    printed = ("machine ", "versions ") if name.startswith("bench: ") else "step "
    assert all(line.startswith(printed) for line in out.splitlines())
    assert listing(place.here) == before and marks(place.shelf) == kept


def test_there_are_many() -> None:
    assert len(ROWS) >= 80
    assert sum(isinstance(call, list) for call, *_ in ROWS.values()) >= 80


@pytest.mark.parametrize("name", ["unknown command", "train: cut JSON", "export: adapter twice",
                                  "deploy: budget no number", "serve: a text",
                                  "run: notebook 07"])
def test_bad_input_as_a_real_command(name: str, place: Place) -> None:
    call, wrong, remedy = ROWS[name]
    before = listing(place.here)
    done = subprocess.run(
        [sys.executable, "-m", "lib", *words(call, place)], cwd=place.here, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert wrong in done.stderr and remedy in done.stderr
    assert listing(place.here) == before
