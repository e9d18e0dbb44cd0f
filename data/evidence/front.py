"""`python -m lib search`: the Pareto front of a configuration-aware adapter, on its own records.

It becomes `front.json` in the adapter's folder, where `python -m lib deploy` looks for it. Every
evaluation is added to `front.jsonl` beside it, so a search that was cut off goes on from there.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.evidence.alternate import from_numbers, loss_with
from lib.__main__ import FIELDS, Parser, first_records
from lib.base.model import load_tokenizer
from lib.base.records import Record
from lib.coa.adapter import FELT_BY, CoaLora
from lib.coa.configuration import Configuration, Switchable, sensitivities
from lib.coa.pareto import Evaluated, Features, Journal, front_by_segment, search
from lib.deploy.deployment import HELD
from lib.errors import UserError, require
from lib.files import MANIFEST, read_json, replacing, sha256, verified
from lib.train.lora import settled

SAY_EVERY = 10  # evaluations


class JournalFile(Journal):
    """A journal as lines of JSON, so that a search that was cut off goes on where it stopped.

    The first line is the key that says what the evaluations belong to.
    """

    def __init__(self, path: Path, key: str) -> None:
        super().__init__()
        self.path, lines = path, [json.dumps(key)]
        try:
            if path.is_file():
                lines = path.read_text("utf-8").split("\n")[:-1]  # a line cut short has no end
            header, *rows = map(json.loads, lines)
            require(header == key, "it is of other records, or of another --seed or adapter")
            self.update((tuple(positions), float(loss)) for loss, positions in rows)
        except (UserError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not the journal of this search ({error}): remove it, "
                            "or search as before") from None
        with replacing(path) as part:
            part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def __setitem__(self, numbers: tuple[int, ...], loss: float) -> None:
        """As in a `Journal`; it goes into the file as well."""
        super().__setitem__(numbers, loss)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([loss, numbers]) + "\n")


def write_front(adapter: Path, base: Switchable, features: Features,
                known: dict[tuple[int, ...], float], *, command: str) -> int:
    """Write the best configurations of each segment as the adapter's front; their number."""
    evaluated, losses = torch.tensor([*known]), torch.tensor([*known.values()]).double()
    points = torch.stack([features.bits(evaluated), losses], 1)
    rows = sorted(front_by_segment(points), key=lambda i: float(points[i, 0]))
    header = {"command": command, "base_hash": base.fingerprint,
              "adapter": sha256(adapter / MANIFEST), "evaluated": len(evaluated)}
    lines = []
    for i in rows:
        configuration = from_numbers(base.layers, evaluated[i].tolist(), features.family)
        lines.append(json.dumps({"loss": float(losses[i]),
                                 "configuration": configuration.to_json()},
                                separators=(",", ":")))
    with replacing(adapter / "front.json") as part:  # one configuration a line
        part.write_text(json.dumps(header)[:-1] + ', "front": [\n' + ",\n".join(lines) + "\n]}\n",
                        encoding="utf-8", newline="\n")
    return len(rows)


def find_front(adapter: Path, records: Sequence[Record], *, evaluations: int, seed: int = 0,
               model: str = "") -> tuple[int, int]:
    """Search from a training set's configurations; (points of the front, all evaluated).

    The first records say which layers feel errors, the last `HELD` judge a configuration.
    `model` is where its base is, by default where that was in training. UserError for an
    adapter that is not configuration-aware, or a journal of another search.
    """
    require((adapter / "coa.safetensors").is_file(), f"{adapter} serves one configuration only: "
            "train one for all of them with `python -m lib train --method coa`")
    require(evaluations > 0, f"{evaluations} evaluations: use 1 or more")
    require(0 <= seed < 2**32, f"seed {seed}: use 0 to 4294967295")
    manifest = verified(adapter)
    base = Switchable.load(settled(adapter, model, "original", rounded=True)[0], cache_mb=1500)
    options: dict[str, Any] = {"tokenizer": load_tokenizer(str(adapter), base=base.name),
                               "learn": manifest.get("settings", {}).get("learn", "all")}
    family, felt_by, held = manifest["grid"], records[:FELT_BY], records[-HELD:]
    features = Features.of(base, sensitivities(base, felt_by, **options), family)
    first = base.training_set(felt_by, family, seed=seed, **options)
    coa = CoaLora.from_pretrained(base, adapter)
    digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
    journal = JournalFile(adapter / "front.jsonl", " ".join(
        [base.fingerprint[:12], sha256(adapter / MANIFEST)[:12], digest[:12], str(seed)]))
    total, began, calls = len(first) + evaluations, time.monotonic(), itertools.count(1)
    left = total - len(journal)
    judge = loss_with(coa, held, family=family, **options)

    def evaluate(positions: Tensor) -> float:
        loss = judge(positions)
        if (done := next(calls)) % SAY_EVERY == 0:
            seconds = (time.monotonic() - began) / done * (left - done)
            bits = base.configuration.bits
            print(f"evaluation {total - left + done}/{total}  {bits:.2f} bits  loss "
                  f"{loss:.4f}  about {seconds:.0f} s left", flush=True)
        return loss

    with torch.inference_mode():
        start = Evaluated.at(numbers_of(first), features, evaluate, journal)
        search(start, features, evaluate, evaluations=evaluations, seed=seed, journal=journal)
    command = f"python -m lib search --evaluations {evaluations} --seed {seed}"
    return write_front(adapter, base, features, journal, command=command), len(journal)


def numbers_of(configurations: Sequence[Configuration]) -> Tensor:
    """(n, layers): the format numbers of configurations, each once."""
    return torch.stack([c.numbers for c in dict.fromkeys(configurations)])


def main(argv: Sequence[str]) -> int:
    """The command; UserError for a mistake of the user."""
    parser = Parser(prog="python -m lib search", description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR",
                        help="from `train --method coa` or `paper`")
    parser.add_argument("--data", default="", metavar="FILE", help="records (the first 256) that "
                        "judge configurations; default those that the adapter was trained on")
    parser.add_argument("--ignore", **FIELDS)
    parser.add_argument("--model", default="", help="hub id or directory; default the "
                        "adapter's base")
    parser.add_argument("--evaluations", type=int, default=60, metavar="N",
                        help="after those of the start (some thirty); default 60")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    args = parser.parse_args(argv)
    file = args.adapter / MANIFEST
    require(file.is_file(), f"{args.adapter} is not an adapter from `python -m lib train`: check "
            "the path")
    source = args.data or read_json(file).get("data")
    require(source, f"{args.adapter} does not say its records: name --data FILE")
    points, evaluated = find_front(args.adapter, first_records(source, args.ignore),
                                   evaluations=args.evaluations, seed=args.seed,
                                   model=args.model)
    print(f"{args.adapter / 'front.json'}: {points} configurations, the best of {evaluated}; "
          "`python -m lib deploy` takes from them")
    return 0
