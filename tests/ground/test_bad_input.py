"""Bad input, one row each: status 2, one line with what is wrong and what to do, nothing written.

A row is a command line, or a call of the library that the command line then reports.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, saved_adapter
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

import lib.__main__
import lib.course.notebook
from data.evidence.tiny import tiny_model
from lib.__main__ import dispatch, main, parser
from lib.base.model import best_dtype
from lib.evaluate.scores import wilson
from lib.files import writing
from lib.quantize.gguf import export

pytestmark = pytest.mark.usefixtures("float32")

GOOD = b'{"instruction": "Unit %d?", "response": "It is %d."}\n'
DATA = {
    "good.jsonl": b"".join(GOOD % (i, i) for i in range(6)),
    "text.jsonl": b"Once upon a time\n",
    "cut.jsonl": GOOD % (1, 1) + b'{"instruction": "a", "respon',
    "keyless.jsonl": GOOD % (1, 1) + b'{"instruction": "a"}\n',
    "hollow.jsonl": b'{"instruction": "a", "response": " "}\n',
    "empty.jsonl": b"",
    "latin.jsonl": b'{"instruction": "caf\xe9", "response": "b"}\n',
    "taken": b"a file where a folder is wanted",
}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def shelf(tiny_directory: str, _tiny: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase,
          tmp_path_factory: pytest.TempPathFactory, float32: None) -> Path:
    """Adapters, models and exported files, good and bad; no row changes them."""
    root = tmp_path_factory.mktemp("shelf")
    adapter = saved_adapter(_tiny, root / "adapter")
    with writing(root / "own", settings={}) as part:
        shutil.copy(adapter / "adapter_config.json", part)
    flip(shutil.copytree(adapter, root / "flipped") / "adapter_model.safetensors")

    torch.manual_seed(0)
    damaged = tiny_model()
    damaged.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    damaged.save_pretrained(root / "nan_model")
    tokenizer.save_pretrained(root / "nan_model")
    weights_file = shutil.copytree(tiny_directory, root / "cut_model") / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])

    export(root / "edge", route="original", adapters={"mine": adapter}, model=tiny_directory)
    flip(shutil.copytree(root / "edge", root / "edge_flipped") / "model.gguf")
    (root / "half.gguf").write_bytes((root / "edge" / "model.gguf").read_bytes()[:100_000])
    return root


class Place:
    """Where a row works, what it can use, and how it patches."""

    def __init__(self, here: Path, shelf: Path, tiny: str, patch: pytest.MonkeyPatch) -> None:
        self.here, self.shelf, self.tiny, self.patch = here, shelf, tiny, patch


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
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "locked").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    monkeypatch.setattr(lib.course.notebook, "BUILD", tmp_path / "build")
    real = os.mkdir

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        """The superuser may write anywhere, so the right is taken away here."""
        if str(path).startswith(("locked/", str(tmp_path / "locked"))):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    yield Place(tmp_path, shelf, tiny_directory, monkeypatch)
    best_dtype.cache_clear()


TRAIN = ["train", "--data", "good.jsonl", "--out", "out", "--model", "TINY", "--steps", "2"]
EXPORT = ["export", "--model", "TINY", "--out", "edge"]
DEPLOY = ["deploy", "--out", "small", "--budget-mb"]
SENSORS = ["deploy", "--task", "sensors", "--out", "small", "--budget-mb"]
HELP, OPTIONS = "see `python -m lib --help`", "see `python -m lib deploy --help`"
Call = list[str] | Callable[[Place], Any]


JOINT = [*TRAIN, "--method", "coa"]


def data(file: str) -> list[str]:
    return ["train", "--data", file, "--out", "out", "--model", "TINY"]


def words(call: list[str], place: Place) -> list[str]:
    """A row's words with the places filled in; of an option that a row repeats the last one."""
    once = [word for i, word in enumerate(call) if not (
        {word, call[i - 1]} & {"--steps", "--model", "--out"} & {*call[i + 1:]})]
    return [place.tiny if word == "TINY" else word.replace("SHELF", str(place.shelf))
            for word in once]


def typed(call: list[str], place: Place) -> None:
    """A command as `main` runs it."""
    dispatch(parser().parse_args(words(call, place)))


def named(variable: str, value: str, call: list[str]) -> Callable[[Place], Any]:
    """A command with an environment variable."""
    def run(place: Place) -> None:
        place.patch.setenv(variable, value)
        best_dtype.cache_clear()
        typed(call, place)
    return run


def port_in_use(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        typed(["serve", "SHELF/edge", "--port", str(other.getsockname()[1])], place)


# What is called; what the line says is wrong; what it says to do.
ROWS: dict[str, tuple[Call, str, str]] = {
    "no command": ([], "command", HELP),
    "unknown command": (["fly"], "invalid choice: 'fly'", "choose from"),
    "unknown option": ([*TRAIN, "--speed", "9"], "unrecognized arguments: --speed", HELP),
    "run: unknown profile": (["run", "--profile", "huge"], "unknown profile 'huge'", "use one of"),
    "run: notebook 07": (["run", "--only", "07"], "notebook '07'", "use one of 01, 02"),
    "bench: unknown": (["bench", "nothing"], "'nothing'", "python -m data.evidence"),

    "train: no data": (["train", "--out", "out"], "required: --data", "lib train --help`"),
    "train: report to nobody": ([*TRAIN, "--report-to", "nobody"], "report to 'nobody'", "install"),
    "train: missing data": (data("none.jsonl"), "none.jsonl", "check the path"),
    "train: data is a folder": (data("folder"), "folder", "give a .jsonl"),
    "train: not JSON": (data("text.jsonl"), "text.jsonl:1 is no", "one object|one JSON object"),
    "train: cut JSON": (data("cut.jsonl"), "cut.jsonl:2 is no", "one object|one JSON object"),
    "train: missing key": (data("keyless.jsonl"), "keyless.jsonl:2 .*'response'", "add it"),
    "train: empty response": (data("hollow.jsonl"), "hollow.jsonl:1 .*'response'", "fill it"),
    "train: empty file": (data("empty.jsonl"), "empty.jsonl has no records", "at least one"),
    "train: not UTF-8": (data("latin.jsonl"), "latin.jsonl:1 is not UTF-8", "save the file"),
    "train: rank 0": ([*TRAIN, "--rank", "0"], "rank 0", "use 1 or more"),
    "train: rank without an adapter": ([*TRAIN, "--mode", "full", "--rank", "8", "--rslora"],
                                       "rank 8", "leave it out"),
    "train: longer than the context": ([*TRAIN, "--max-length", "4096"],
                                       "4096 is above the model's context", "use 2048 or less"),
    "train: a folder named as a file": (data("folder.parquet"), "Is a directory", "check the path"),
    "train: unknown target": ([*TRAIN, "--targets", "q_proj,nose"], "no target module 'nose'",
                              "use down_proj"),
    "train: unknown mode": ([*TRAIN, "--mode", "magic"], "invalid choice: 'magic'", "choose from"),
    "train: far too high a rate": (
        [*TRAIN, "--steps", "4", "--mode", "lora", "--learning-rate", "1e30"],
        "the loss became nan", "lower the learning rate"),
    "train: accumulate not a divisor": ([*TRAIN, "--accumulate", "3"], "accumulate 3", "a divisor"),
    "train: length too short": ([*TRAIN, "--max-length", "4"], "good.jsonl:1 has", "raise"),
    "train: unknown model": ([*TRAIN, "--model", "nobody/nothing"], "'nobody/nothing'", "check"),
    "train: model cut": ([*TRAIN, "--model", "SHELF/cut_model"], "cut_model does not load",
                         "check that it is"),
    "train: model not finite": ([*TRAIN, "--mode", "lora", "--model", "SHELF/nan_model"],
                                "the loss became nan at step 1", "replace the model"),
    "train: out is a file": ([*TRAIN, "--out", "taken"], "taken is a file", "choose another"),
    "train: out is below a file": ([*TRAIN, "--out", "taken/out"], "Not a directory: .*taken",
                                   "check the path"),
    "train: out is in use": ([*TRAIN, "--out", "folder"], "thesis.txt would be lost", "choose"),
    "train: out is of another kind": ([*TRAIN, "--out", "SHELF/edge"], "another kind", "choose"),
    "export: out is an adapter": (["export", "--out", "SHELF/own"], "another kind", "choose"),
    "slides: out is an adapter": (["slides", "--out", "SHELF/own"], "another kind", "choose"),
    "bench: not my file": (["bench", "dtypes", "--json", "good.jsonl"], "no benchmark", "name"),
    "bench: no name": (["bench", "--json", "new.json"], "--json is for one bench", "use one of"),
    "slides: engine": (["slides", "--engine", "x"], "--engine is for serving", "alone"),
    "train: out is here": ([*TRAIN, "--out", "."], "is the folder you are in", "choose a new one"),
    "train: out is not mine": ([*TRAIN, "--out", "locked/out"], "Permission denied: .*locked",
                               "check the path"),
    "train: out has too long a name": ([*TRAIN, "--out", "x" * 300], "File name too long",
                                       "check the path"),
    "train: out is the model": ([*TRAIN, "--model", "SHELF/nan_model", "--out", "SHELF/nan_model"],
                                "nan_model holds .*, which is read", "choose another folder"),
    "train: dtype": (named("COURSE_DTYPE", "float16", TRAIN), "COURSE_DTYPE=float16",
                     "use float32 or bfloat16"),

    "export: adapter without a folder": ([*EXPORT, "--adapter", "x"], "--adapter x",
                                         "use NAME=DIR"),
    "export: adapter twice": ([*EXPORT, "--adapter", "x=a", "--adapter", "x=b"],
                              "--adapter x=b", "each name once"),
    "export: adapter missing": ([*EXPORT, "--adapter", "x=none"], "none", "check the path|name"),
    "train: joint, held out": ([*JOINT, "--eval-share", "0.5"], "no one held-out loss",
                               "leave out"),
    "train: joint, patience": ([*JOINT, "--patience", "3"], "no one held-out loss", "leave out"),
    "train: joint, some layers": ([*JOINT, "--targets", "minimal"], "targets aggressive", "train"),
    "train: joint, qlora": ([*JOINT, "--mode", "qlora"], "mode lora", "train"),
    "train: types of what": ([*TRAIN, "--formats", "gguf"], "formats gguf", "use it with --method"),
    "train: for no configuration": ([*TRAIN, "--method", "dedicated"], "--configuration FILE",
                                    "give both"),
    "train: no such method": ([*TRAIN, "--method", "best"], "'best'", "use one of plain, coa"),
    "train: no configuration": ([*TRAIN, "--method", "dedicated", "--configuration",
                                 "good.jsonl"], "JSON", "make it again"),
    "export: not an adapter": ([*EXPORT, "--merge", "SHELF/edge"], "edge is no", "name the folder"),
    "export: adapter damaged": ([*EXPORT, "--merge", "SHELF/flipped"],
                                "adapter_model.safetensors is missing or damaged", "make it again"),
    "export: both": ([*EXPORT, "--merge", "SHELF/adapter", "--adapter", "x=SHELF/adapter"],
                     "an unmerged base", "use --merge or --adapter"),
    "export: unknown type": ([*EXPORT, "--type", "Q4_K_M"], "'Q4_K_M'", "use F32"),
    "export: no llama.cpp": ([*EXPORT, "--converter", "SHELF"], "convert_hf_to_gguf.py does not",
                             "name a checkout of llama.cpp"),
    "export: importance of nothing": ([*EXPORT, "--importance", "good.jsonl"],
                                      "changes nothing in Q8_0", "use another type"),
    "export: converter of the embedded": (["export", "--out", "edge", "--converter", "SHELF"],
                                          "--converter", "leave it out"),
    "export: ignore nothing": ([*EXPORT, "--ignore", "a"], "--ignore", "name both"),
    "evaluate: out over the records": (["evaluate", "TINY", "--data", "good.jsonl", "--out",
                                        "./good.jsonl"], "and no evaluation", "name another"),
    "evaluate: out a folder": (["evaluate", "TINY", "--data", "good.jsonl", "--out", "."],
                               "is there, and no evaluation", "name another"),
    "evaluate: an export": (["evaluate", "SHELF/edge", "--data", "good.jsonl"], "is an export",
                            "serve it"),
    "train: an option twice": ([*TRAIN, "--targets", "q_proj", "--targets", "v_proj"],
                               "--targets is given twice", "once"),
    "serve: empty key": (["serve", "SHELF/edge", "--api-key", ""], "empty value", "leave it out"),
    "serve: empty key after =": (["serve", "SHELF/edge", "--api-key="], "empty", "leave it out"),
    "serve: context of another": (["serve", "SHELF/edge", "--context", "102400"],
                                  "context 102400", "or less"),
    "serve: longer answers than the context": ([
        "serve", "SHELF/edge", "--context", "256", "--max-tokens", "2000"], "--max-tokens 2000",
        "raise --context"),
    "serve: pages without a scheme": (["serve", "SHELF/edge", "--cors", "a.example"],
                                      "cors 'a.example'", "use https://"),
    "serve: pages with a space": (["serve", "SHELF/edge", "--cors", "http://a, http://b"],
                                  "cors", "use https://"),
    "serve: adapter twice": (["serve", "SHELF/edge", "--lora", "mine=a.gguf"], "mine=a.gguf",
                             "each name once"),
    "export: no records": ([*EXPORT, "--importance", "none.csv"], "none.csv", "check the"),
    "export: out is the adapter": ([*EXPORT, "--adapter", "x=SHELF/adapter", "--out",
                                    "SHELF/adapter", "--route", "original"],
                                   "holds .*adapter, which is read", "choose another folder"),

    "deploy: no budget": (["deploy", "--out", "small"], "required: --budget-mb", OPTIONS),
    "deploy: budget 0": ([*SENSORS, "0"], "budget of 0 MB", "use numbers above 0"),
    "deploy: unknown task": ([*DEPLOY, "80", "--task", "poems"], "'poems'", "use one of"),
    "deploy: no number": ([*SENSORS, "80MB"], "budget-mb", OPTIONS),
    "deploy: twice": ([*SENSORS, "80,80"], "budget of 80, 80 MB", "each once"),
    "deploy: several times": ([*SENSORS, "80", "--budget-mb", "0"], "of 80, 0 MB", "above 0"),
    "deploy: route of a task": ([*DEPLOY, "80", "--route", "original"], "--route", "--task alone"),
    "deploy: no adapter": ([*DEPLOY, "80"], "name --adapter DIR", "or --task alone"),
    "deploy: two adapters": ([*DEPLOY, "80", "--task", "movies", "--adapter", "SHELF/adapter"],
                             "or --task", "name --adapter"),
    "deploy: no records": ([*DEPLOY, "80", "--adapter", "SHELF/adapter"], "its records",
                           "name --data FILE"),
    "deploy: not an adapter": ([*DEPLOY, "80", "--adapter", "SHELF/edge", "--data", "good.jsonl"],
                               "edge is not a LoRA adapter", "name the folder of one"),
    "deploy: memory 0": ([*SENSORS, "80", "--memory-mb", "0"], "0 MB", "above 0"),
    "deploy: place in use": ([*SENSORS, "80", "--out", "folder"], "thesis.txt would be lost",
                             "choose another folder"),

    "serve: nothing": (["serve", "nothing"], "nothing does not exist", "check the path"),
    "serve: a folder": (["serve", "folder"], "folder is not an artifact", "check the path"),
    "serve: an adapter": (["serve", "SHELF/adapter"], "adapter has no GGUF model", "make one"),
    "serve: a text": (["serve", "good.jsonl"], "good.jsonl", "make it again"),
    "serve: half a file": (["serve", "SHELF/half.gguf"], "half.gguf", "make it again"),
    "serve: a damaged file": (["serve", "SHELF/edge_flipped"], "model.gguf is missing or damaged",
                              "make it again"),
    "serve: an adapter's file": (["serve", "SHELF/edge/mine.gguf"], "mine.gguf is an adapter",
                                 "name a model"),
    "serve: context 300": (["serve", "folder", "--context", "300"], "context 300",
                          "use a multiple of 256"),
    "serve: port 70000": (["serve", "folder", "--port", "70000"], "port 70000", "use 0 to 65535"),
    "serve: port in use": (port_in_use, r"port \d+ is taken|in use", "choose another"),
    "serve: adapter without a file": (["serve", "SHELF/edge", "--lora", "x"], "'x'", "NAME=FILE"),
    "serve: adapter's file missing": (["serve", "SHELF/edge", "--lora", "x=none.gguf:1"],
                                      "none.gguf does not exist", "check the path"),
    "serve: a model as adapter": (["serve", "SHELF/edge", "--lora", "x=SHELF/edge/model.gguf"],
                                  "expect general.type to be 'adapter'", "make the files"),

    "slides: place in use": (["slides", "--out", "folder"], "thesis.txt would be lost", "choose"),
    "site: not mine": (["site", "--out", "locked/site"], "Permission denied", "check the path"),

    "interval of nothing": (lambda _: wilson(0, 0), "no examples", "at least one"),
}


def status(call: Call, place: Place) -> int:
    """Exit status of a row."""
    if isinstance(call, list):
        return main(words(call, place))
    place.patch.setattr(lib.__main__, "dispatch", lambda _: call(place))
    return main(["doctor"])


@pytest.mark.parametrize("name", ROWS)
def test_bad_input(name: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    call, wrong, remedy = ROWS[name]
    files_before, shelf_before = listing(place.here), marks(place.shelf)
    capfd.readouterr()
    assert status(call, place) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err and len(err) < 700
    for text in (wrong, remedy):
        assert re.search(text, err) or text in err, err
    progress = r"step |the first example|  prompt|  learned|\d+ records to learn"
    assert all(re.match(progress, line) for line in out.splitlines())
    if "loss became" in err:  # found at the end: the checkpoint stays
        shutil.rmtree(place.here / ".out.work", ignore_errors=True)
    assert listing(place.here) == files_before and marks(place.shelf) == shelf_before


@pytest.mark.parametrize("name", ["unknown command", "train: cut JSON", "serve: a text"])
def test_bad_input_as_a_real_command(name: str, place: Place) -> None:
    call, wrong, remedy = ROWS[name]
    done = subprocess.run(
        [sys.executable, "-m", "lib", *words(call, place)], cwd=place.here, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert re.search(wrong, done.stderr) and re.search(remedy, done.stderr)
