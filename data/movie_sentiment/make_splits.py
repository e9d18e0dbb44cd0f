"""Write the fixed splits beside this file: `python data/movie_sentiment/make_splits.py`.

A snippet is positive if its mean rating is at least 0.5, negative if it is at
most -0.5; what lies between is left out. Each split has both labels in equal
numbers. One seed decides which snippet goes where.
"""

import csv
import json
import random
from pathlib import Path

SEED = 20261122
HERE = Path(__file__).parent
THRESHOLD = 0.5
SIZES = {"test": 1000, "validation": 500}


def read_snippets() -> list[dict[str, str | float]]:
    """Labelled snippets, each text once."""
    snippets: dict[str, dict[str, str | float]] = {}
    with (HERE / "snippets.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            rating = float(row["mean_rating"])
            if abs(rating) >= THRESHOLD:
                label = "positive" if rating > 0 else "negative"
                snippets.setdefault(row["text"], {
                    "id": row["id"], "text": row["text"], "label": label, "rating": rating})
    return list(snippets.values())


def make_splits() -> dict[str, list[dict[str, str | float]]]:
    """test, validation and train, balanced; train takes what is left."""
    rng = random.Random(SEED)
    by_label = {label: [s for s in read_snippets() if s["label"] == label]
                for label in ("negative", "positive")}
    for group in by_label.values():
        rng.shuffle(group)
    smaller = min(map(len, by_label.values()))
    splits, start = {}, 0
    for name, size in [*SIZES.items(), ("train", 2 * (smaller - sum(SIZES.values()) // 2))]:
        rows = [s for group in by_label.values() for s in group[start:start + size // 2]]
        rng.shuffle(rows)
        splits[name], start = rows, start + size // 2
    return splits


def main() -> None:
    """Write every split as JSON lines."""
    for name, rows in make_splits().items():
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
