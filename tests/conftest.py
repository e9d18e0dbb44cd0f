"""Shared fixtures: a seeded tiny model, the real tokenizer, and no network."""

import contextlib
import copy
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# No test may reach a hub; the libraries read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# The notebooks run as tests, in their smallest size.
os.environ["COURSE_PROFILE"] = "smoke"
# Two threads in each of several workers would wait for each other. Those of llama.cpp spin
# while they wait: two servers of two threads each nearly stood still for ten minutes. So a
# worker, and what it starts, has one core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if hasattr(os, "sched_setaffinity"):  # neither under macOS nor under Windows
        cores = sorted(os.sched_getaffinity(0))
        number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        os.sched_setaffinity(0, {cores[number % len(cores)]})
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import lib.deploy.deployment  # noqa: E402
import lib.quantize.gguf  # noqa: E402
from data.evidence.tiny import tiny_model  # noqa: E402
from lib.base.embedded import quiet  # noqa: E402
from lib.base.model import best_dtype, load_tokenizer  # noqa: E402
from lib.files import sha256, writing  # noqa: E402

settings.register_profile(
    "course", deadline=None, max_examples=40, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.load_profile("course")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Workers share the base model's files: make them before the workers start."""
    if session.config.getoption("numprocesses", None):
        subprocess.run([sys.executable, "-c", "from lib.base.embedded import locate; "
                        "locate('embedded')"], cwd=ROOT, check=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which checks this machine could not make: a skipped test is easily overlooked."""
    skipped = [report for report in terminalreporter.stats.get("skipped", ())
               if "no Chromium" in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} browser tests were skipped: "
                                    "install Chromium to run them", yellow=True)


@pytest.fixture(scope="session", autouse=True)
def _silence() -> None:
    quiet()
    # The trainer collects garbage after each run: leave out the libraries' objects.
    gc.freeze()


def contents(folder: Path | str, *, but: str = "") -> tuple[tuple[str, str], ...]:
    """Names and hashes of a folder's files, without those of an ending."""
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.suffix != but]
    return tuple((p.relative_to(folder).as_posix(), sha256(p)) for p in files)


@pytest.fixture(scope="session", autouse=True)
def _read_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Folders with the same files are parsed (half a second) and converted (seconds) once.

    Tokenizers share what is written in Rust: a test that changes that part takes a deep copy.
    """
    parse, convert = transformers.AutoTokenizer.from_pretrained, lib.quantize.gguf.base_file
    parsed: dict[Any, PreTrainedTokenizerBase] = {}
    converted: dict[Any, Path] = {}
    place = tmp_path_factory.mktemp("converted")

    def parse_once(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
        key = contents(source, but=".safetensors")
        if options or not key:
            return parse(source, **options)
        if key not in parsed:
            parsed[key] = parse(source)
        one = copy.copy(parsed[key])
        one.name_or_path, one.init_kwargs = str(source), {**one.init_kwargs}
        one._special_tokens_map = {**one._special_tokens_map}
        return one

    @contextlib.contextmanager
    def convert_once(model: str, near: Path, converter: Path | None = None) -> Iterator[Path]:
        if converter or not (key := contents(model)):
            with convert(model, near, converter) as path:
                yield path
            return
        if key not in converted:
            (own := place / str(len(converted))).mkdir()
            with convert(model, own / "new") as path:
                converted[key] = path.rename(own / f"{Path(model).name}.gguf")
        yield converted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", parse_once)
        for module in (lib.quantize.gguf, lib.deploy.deployment):
            patch.setattr(module, "base_file", convert_once)
        yield


@pytest.fixture(scope="session")
def tokenizer(_read_once: None) -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer, as the course loads it."""
    return load_tokenizer()


@pytest.fixture(scope="session")
def _tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = tiny_model()
    with torch.no_grad():
        # Larger weights than a fresh initialisation has, so that attention and the adapters
        # move the logits enough for a wrong result to show.
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(6)
            elif "norm" in name:
                parameter.add_(0.3 * torch.rand_like(parameter))
    return model


@pytest.fixture
def tiny(_tiny: LlamaForCausalLM) -> LlamaForCausalLM:
    """A two-layer random Llama: a copy for this test, the same in every test."""
    return copy.deepcopy(_tiny)


@pytest.fixture
def make_tiny(_tiny: LlamaForCausalLM) -> Callable[[], LlamaForCausalLM]:
    """Fresh copies of `tiny`, for tests that need several."""
    return lambda: copy.deepcopy(_tiny)


@pytest.fixture(scope="session")
def tiny_directory(_tiny: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase,
                   tmp_path_factory: pytest.TempPathFactory) -> str:
    """`tiny` as a local model directory: goes through the real `load_model`."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    _tiny.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny_gguf(tiny_directory: str) -> Path:
    """`tiny` in F32, by llama.cpp's converter."""
    with lib.quantize.gguf.base_file(tiny_directory, Path(tiny_directory)) as path:
        return path


@pytest.fixture(scope="module")
def float32() -> Iterator[None]:
    """Compute in float32 on every machine, in 4-bit layers, too.

    On a CPU with AVX-512 bf16, Linear4bit repacks its weight for evaluation and computes in
    bfloat16. Without that a test can compare to 1e-4 everywhere.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_DTYPE", "float32")
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        best_dtype.cache_clear()
        yield
    best_dtype.cache_clear()


def with_adapter(model: PreTrainedModel, *, seed: int = 0, **options: Any) -> PeftModel:
    """peft's model with a random adapter, B included."""
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(
        **{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]} | options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def saved_adapter(model: PreTrainedModel, out: Path, **options: Any) -> Path:
    """An artifact as `train` writes it."""
    with writing(out) as part:
        with_adapter(copy.deepcopy(model), **options).save_pretrained(part)
    return out
