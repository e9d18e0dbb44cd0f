"""llama.cpp's types on the course's task, rounded plainly and by what the columns are used for."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from data.evidence.mixed import in_turn
from data.evidence.pieces import ADAPTERS, score_row
from lib.base.model import load_tokenizer
from lib.base.records import sensors
from lib.deploy.gguf import served_score
from lib.evaluate.scores import held_out_loss
from lib.files import size_mb
from lib.quantize.gguf import export
from lib.quantize.merging import merge
from lib.serve.server import running

RECORDS = 64  # training examples that say how much each column matters
# A type whose codes fit these weights exactly (Q4_1 is how they came) is biased: it is shown, too.
ROWS = (("Q8_0", 0), ("Q4_1", 0), ("Q4_0", 0), ("Q4_0", RECORDS), ("IQ4_NL", 0),
        ("IQ4_NL", RECORDS), ("Q4_K", 0), ("Q4_K", RECORDS))


def types(work: Path) -> dict[str, Any]:
    """{type: bytes, held-out loss, answers of the whole test, decode speed over Q8_0's}."""
    adapter, rows = ADAPTERS / "sensors_qlora", {}
    weights, tokenizer = merge(adapter, route="dequantized"), load_tokenizer()
    for kind, count in ROWS:
        name = kind + " with importance" * bool(count)
        out = work / "types" / name.replace(" ", "_")
        shutil.rmtree(out, ignore_errors=True)
        kinds = export(out, gguf_type=kind, merged=adapter, weights=weights, route="dequantized",
                       records=sensors("train", count))
        # transformers' own reader of GGUF: it shares no code with our writer.
        model = AutoModelForCausalLM.from_pretrained(
            out, gguf_file="model.gguf", dtype=torch.float32).eval()
        with running(out) as served, running(work / "types" / "Q8_0") as other:
            speeds = in_turn((served.url, ""), (other.url, ""))
        rows[name] = {
            "mb": size_mb(out / "model.gguf"),
            "types": {key: sorted(names) for key, names in kinds.items()},
            "loss": held_out_loss(model, tokenizer, sensors("validation", 200)),
            "test": score_row(served_score(out, sensors("test")))} | speeds
        row = rows[name]
        print(f"  {name}: {row['mb']:.1f} MB, loss {row['loss']:.4f}, {row['test']['share']:.1%}, "
              f"{row['ratio']:.2f} times Q8_0", flush=True)
    return rows
