"""What deployed files cost where they run: peak memory, and time for a token.

Both are measured, in a process that does nothing else, on the machine at hand.
"""

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lib.artifacts import ROOT, swap
from lib.base_model import load_tokenizer
from lib.client import ask, connect, question
from lib.deploy import TASKS, load_deployed, require_new
from lib.errors import UserError, require
from lib.measure import peak_memory
from lib.scratch import scratch
from lib.serve import running
from lib.tasks import render

TRIES, REPEATS, TOKENS = 6, 3, 16


class Made(Protocol):
    """What a way to deploy tells of its files."""

    actual_mb: float


Kind = TypeVar("Kind", bound=Made)


@dataclass(frozen=True)
class Cost:
    """Peak resident memory, MB (10^6 bytes), and decoding time, ms a token.

    As a limit, infinity is none.
    """

    memory_mb: float = math.inf
    token_ms: float = math.inf

    def __str__(self) -> str:
        return f"{self.memory_mb:.0f} MB of memory and {self.token_ms:.1f} ms a token"


def cost(folder: Path, task: str) -> Cost:
    """Cost of a folder that `deploy` wrote, by answers to the task's first test example."""
    with peak_memory(children=True) as peak:
        if (folder / "model.gguf").is_file():
            token_ms = _served(folder, task)
        else:
            command = [sys.executable, "-m", "lib.limits", str(folder.resolve()), task]
            child = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8",
                                   errors="replace", check=False)
            require(child.returncode == 0, f"{folder} could not be run: {child.stderr[-200:]}")
            token_ms = float(child.stdout)
    return Cost(peak["mb"], token_ms)


def _served(folder: Path, task: str) -> float:
    name = task if (folder / f"{task}.gguf").is_file() else ""
    body = question(TASKS[task]("test", 1)[0]["instruction"], model=name, max_tokens=TOKENS,
                    ignore_eos=True)
    with running(folder) as served, connect(served.url) as client:
        ask(client, body)  # the prompt is in the cache from now on
        return statistics.median(1e3 / ask(client, body).decode for _ in range(REPEATS))


def _packed(folder: Path, task: str) -> float:
    model, tokenizer = load_deployed(folder), load_tokenizer(str(folder))
    asked = tokenizer(render(tokenizer, TASKS[task]("test", 1)[0]["instruction"]),
                      return_tensors="pt", add_special_tokens=False)

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(**asked, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False,
                       pad_token_id=tokenizer.pad_token_id)
        return time.perf_counter() - start

    # The prompt's own time is in both.
    return 1e3 * statistics.median(
        seconds(1 + TOKENS) - seconds(1) for _ in range(REPEATS)) / TOKENS


def deploy_within(deploy: Callable[..., Kind], task: str, budget_mb: float, out: Path,
                  limits: Cost, **options: Any) -> tuple[Kind, Cost]:
    """Deploy under a budget and measured limits: files shrink until they keep within.

    Args:
        deploy: `deploy_packed` or `deploy_gguf`; `options` are for it.

    Raises:
        UserError: what `deploy` refuses, or limits that no files keep; nothing is written.
    """
    require(limits.memory_mb > 0 and limits.token_ms > 0,
            f"limits of {limits} cannot be kept: use numbers above 0")
    require_new(task, budget_mb, out)
    tried: list[Cost] = []
    with scratch(out) as work:
        for place in (work / str(i) for i in range(TRIES)):
            try:
                made = deploy(task, budget_mb, place, **options)
            except UserError as error:
                if not tried:
                    raise
                raise UserError(f"no known files keep within {limits}: the last tried took "
                                f"{tried[-1]} ({error})") from None
            tried.append(cost(place, task))
            spare, slow = (limits.memory_mb - tried[-1].memory_mb,
                           tried[-1].token_ms / limits.token_ms)
            if spare >= 0 and slow <= 1:
                swap(place, out)
                return made, tried[-1]
            # A MB less on the disk is about one less in memory; time goes with bytes read.
            budget_mb = min(made.actual_mb + min(spare, -1.0), made.actual_mb / max(slow, 1.0))
    raise UserError(f"no files within {limits} in {TRIES} tries: the last took {tried[-1]}: "
                    "raise the limits or lower the budget")


if __name__ == "__main__":
    print(_packed(Path(sys.argv[1]), sys.argv[2]))
