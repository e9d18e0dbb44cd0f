"""The tables of the README and of the adapters' model card, from the stored results."""

from typing import Any

from data.evidence.compare import MAIN
from data.evidence.ledger import CLAIMS, few_at_random
from data.evidence.notebooks import put_table
from data.evidence.picture import draw
from data.evidence.pieces import ADAPTERS, RESULTS
from lib.files import ROOT, read_json

Row = tuple[str, dict[str, Any], str]


def results() -> dict[str, Any]:
    """{piece: result} of the files in `data/results` itself."""
    return {path.stem: read_json(path)["result"] for path in sorted(RESULTS.glob("*.json"))}


def score_rows(stored: dict[str, Any]) -> list[Row]:
    """(label, scores, size in MB) of every model that was scored on the whole test set."""
    best = max(stored["base"].values(), key=lambda row: row["test"]["share"])
    rows: list[Row] = [("base model, untrained", best, "-")]
    labels = {"full": "full fine-tuning", "lora": "LoRA, r = 16", "qlora": "QLoRA, r = 16"}
    rows += [(label, stored[name], f"{stored[name]['saved_mb']:.1f}")
             for name, label in labels.items()]
    files = [("pipeline", "dequantized", "QLoRA, merged"), ("pipeline", "int8", "merged, INT8"),
             ("pipeline", "nf4", "merged, NF4"), ("edge", "Q8_0", "merged, GGUF Q8_0, served"),
             ("edge", "Q8_0_lora", "GGUF Q8_0 base and adapter, served")]
    rows += [(label, stored[piece][name], f"{stored[piece][name]['mb']:.1f}")
             for piece, name, label in files]
    mixed = next(iter(stored["mixed"].values()))
    rows.append((f"merged, GGUF of mixed types ({mixed['bits']:.2g} bits), served", mixed,
                 f"{mixed['mb']:.1f}"))
    return rows + [(f"CoA-LoRA, longer trained, packed ({row['bits']:.2g} bits)", row,
                    f"{row['mb']:.1f}") for row in stored["packed"].values()]


def results_table() -> str:
    """All scored models, and the speeds."""
    stored = results()
    lines = ["| model | test | new phrasings | saved, MB |", "|---|---|---|---|"]
    for label, row, size in score_rows(stored):
        cells = [_share(row[split]) if row.get(split) else "-"
                 for split in ("test", "test_phrasings")]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {size} |")
    return "\n".join([*lines, "", *speeds(stored)])


def readme_table() -> str:
    """Four of these rows: untrained, trained, served, and the smallest."""
    by_label = {label: (row, size) for label, row, size in score_rows(results())}
    smallest = list(by_label)[-1]
    rows = {"base model": "base model, untrained",
            "after QLoRA training (the adapter alone)": "QLoRA, r = 16",
            "merged into one 8-bit file and served": "merged, GGUF Q8_0, served",
            smallest.replace("CoA-LoRA, longer trained", "another adapter"): smallest}
    lines = ["| model | right answers | size |", "|---|---|---|"]
    for label, name in rows.items():
        row, size = by_label[name]
        lines.append(f"| {label} | {_share(row['test'])} | "
                     f"{size if size == '-' else f'{size} MB'} |")
    return "\n".join(lines)


def answer_text() -> str:
    """The stored question with its two answers, for the README."""
    row = results()["answer"]
    right = "exactly the answer in the data" if row["tuned"] == row["expected"] else (
        f"the data say: {row['expected']}")
    return "\n".join([f"> **Question.** {row['question']}", ">",
                      f"> **Base model.** {row['base']}", ">",
                      f"> **After training.** {row['tuned']}", "", f"The last one is {right}."])


def claims_table() -> str:
    """The stored ledger, one line a claim."""
    lines = ["| | claim | verdict | what we found |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {c['id']} | {c['short']} | {c['verdict']} | {c['headline']} |"
                              for c in read_json(CLAIMS)])


def speeds(stored: dict[str, Any]) -> list[str]:
    """Ratios of speeds, each a line."""
    def times(row: dict[str, Any], key: str) -> str:
        low, high = row[f"{key}_spread"]
        return f"{row[key]:.1f} times ({low:.1f} to {high:.1f})"

    training, serving = stored["training_speed"], stored["serving"]
    budget, mixed = next(iter(stored["mixed"].items()))
    return [f"- Training step: {times(training, 'ratio')} the stock trainer's tokens per "
            f"second with all seven modules, {times(training, 'ratio_attention')} with "
            "attention alone, at the same loss.",
            f"- Decoding: llama.cpp's Q8_0 runs at {times(serving, 'ratio')} the speed of "
            "LLM.int8 in transformers; four clients together get "
            f"{times(serving, 'clients_ratio')} the tokens of one.",
            f"- `deploy --format gguf --budget-mb {budget}` decodes at "
            f"{times(mixed, 'ratio')} the speed of Q8_0."]


def card_table() -> str:
    """The model card's scores; of configuration-aware adapters where they were not trained."""
    lines = ["| adapter | at | right answers | held-out loss |", "|---|---|---|---|"]
    for name, piece in (("sensors_qlora", "qlora"), ("sensors_lora", "lora"),
                        ("movies_qlora", "movies")):
        row = read_json(RESULTS / f"{piece}.json")["result"]
        lines.append(f"| {name} | its own base | {_share(row['test'])} of "
                     f"{row['test']['examples']} | {row['validation_loss']:.4f} |")
    for task in ("sensors", "movies"):
        rows = read_json(RESULTS / "coa" / f"{task}-long-0.json")["result"]["plans"]
        # The configurations that were scored, and random ones of few bits.
        few = few_at_random(rows)
        for name in (name for name in rows if name in MAIN or name in few):
            score = rows[name].get("score")
            text = f"{_share(score)} of {score['examples']}" if score else "not scored"
            lines.append(f"| {task}_coa | {name} bits | {text} | {rows[name]['loss']:.4f} |")
    return "\n".join(lines)


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['share']:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def write_readme() -> None:
    """Put the tables between the marks of the README and the model card; draw the picture."""
    for name, text in (("answer", answer_text()), ("results", readme_table()),
                       ("claims", claims_table())):
        put_table(ROOT / "README.md", name, text)
    put_table(ADAPTERS / "README.md", "card", card_table())
    draw(RESULTS)
