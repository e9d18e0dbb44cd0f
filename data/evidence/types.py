"""llama.cpp's types on the course's task, rounded plainly and by what the columns are used for."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from data.evidence.mixed import in_turn
from data.evidence.pieces import ADAPTERS, score_row, served_score
from lib.base.model import load_tokenizer
from lib.base.records import sensors
from lib.evaluate.scores import held_out_loss
from lib.files import size_mb, verified
from lib.quantize.gguf import export
from lib.serve.server import running

RECORDS = 64  # training examples that say how much each column matters
# A type whose codes fit these weights exactly (Q4_1 is how they came) is biased: it is shown, too.
ROWS = {kind + " with importance" * bool(count): (kind, count) for kind, count in (
    ("Q8_0", 0), ("Q4_1", 0), ("Q4_0", 0), ("Q4_0", RECORDS), ("IQ4_NL", 0), ("IQ4_NL", RECORDS),
    ("Q4_K", 0), ("Q4_K", RECORDS))}


def exported(work: Path, name: str) -> Path:
    """The folder of one row: the course's adapter, merged and exported, unless it is there."""
    out, (kind, count) = work / "types" / name.replace(" ", "_"), ROWS[name]
    if not (out / "manifest.json").is_file():
        export(out, gguf_type=kind, merged=ADAPTERS / "sensors_qlora",
               records=sensors("train", count))
    verified(out)
    return out


def types(work: Path) -> dict[str, Any]:
    """{type: bytes, held-out loss, answers of the whole test}."""
    rows, tokenizer = {}, load_tokenizer()
    for name in ROWS:
        out = exported(work, name)
        # transformers' own reader of GGUF: it shares no code with our writer.
        model = AutoModelForCausalLM.from_pretrained(
            out, gguf_file="model.gguf", dtype=torch.float32).eval()
        rows[name] = {
            "mb": size_mb(out / "model.gguf"),
            "loss": held_out_loss(model, tokenizer, sensors("validation", 200)),
            "test": score_row(served_score(out, sensors("test")))}
        row = rows[name]
        print(f"  {name}: {row['mb']:.1f} MB, loss {row['loss']:.4f}, {row['test']['share']:.1%}",
              flush=True)
    return rows


def types_speed(work: Path) -> dict[str, Any]:
    """{type: decode speed and its ratio to that of Q8_0, asked in turn}."""
    rows = {}
    for name in ROWS:
        with running(exported(work, name)) as one, running(exported(work, "Q8_0")) as other:
            rows[name] = in_turn((one.url, ""), (other.url, ""))
        print(f"  {name}: {rows[name]['ratio']:.2f} times Q8_0", flush=True)
    return rows
