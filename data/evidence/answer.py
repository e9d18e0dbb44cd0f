"""One question with the base model's and the tuned model's answers, as the README shows it."""

from typing import Any

from data.evidence.pieces import ADAPTERS
from lib.base.model import load_model, load_tokenizer
from lib.base.records import sensors
from lib.evaluate.scores import generate
from lib.quantize.merging import merge

# The test set's second example. Its first is a machine in good order, which shows less.
EXAMPLE = 1


def answer() -> dict[str, Any]:
    """Greedy answers in the course's template, and the answer of the data."""
    record = sensors("test")[EXAMPLE]
    base = load_model()
    tuned = merge(ADAPTERS / "sensors_qlora", route="dequantized")
    return {"example": EXAMPLE, "question": record["instruction"]} | {
        name: generate(model, load_tokenizer(), [record["instruction"]])[0]
        for name, model in (("base", base), ("tuned", tuned))} | {"expected": record["response"]}
