"""What deployed files cost where they run: peak memory and time a token, measured here."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lib.base.model import load_tokenizer
from lib.base.records import render
from lib.deploy.packed import TASKS, load_deployed, require_new
from lib.errors import require
from lib.evaluate.scores import peak_memory
from lib.files import scratch, swap
from lib.serve.client import ask, connect, question
from lib.serve.server import running

TOKENS = 32


@dataclass(frozen=True)
class Cost:
    """Peak resident memory, MB (10^6 bytes), and ms a decoded token; also limits of both."""

    memory_mb: float = math.inf
    token_ms: float = math.inf

    def __str__(self) -> str:
        return f"{self.memory_mb:.0f} MB of memory and {self.token_ms:.1f} ms a token"


def cost(folder: Path, task: str) -> Cost:
    """Cost of a folder that `deploy` wrote, in a process that answers one test question."""
    instruction = TASKS[task]("test", 1)[0]["instruction"]
    with peak_memory(children=True) as peak:
        if (folder / "model.gguf").is_file():
            body = question(instruction, max_tokens=TOKENS, ignore_eos=True)
            with running(folder) as served, connect(served.url) as client:
                ask(client, body)  # from now on the prompt is cached
                token_ms = 1e3 / ask(client, body).decode
        else:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                token_ms = pool.submit(packed_ms, folder, instruction).result()
    return Cost(peak["mb"], token_ms)


def packed_ms(folder: Path, instruction: str) -> float:
    """Time of a token of an answer, the prompt counted as its first."""
    model, tokenizer = load_deployed(folder), load_tokenizer(str(folder))
    prompt = tokenizer(render(tokenizer, instruction), return_tensors="pt",
                       add_special_tokens=False)
    start = time.perf_counter()
    model.generate(**prompt, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False,
                   pad_token_id=tokenizer.pad_token_id)
    return 1e3 * (time.perf_counter() - start) / TOKENS


def deploy_within(deploy: Callable[..., Any], task: str, budget_mb: float, out: Path,
                  limits: Cost, **options: Any) -> tuple[Any, Cost]:
    """What `deploy` returns, and the cost. UserError if above the limits: nothing is written."""
    require(limits.memory_mb > 0 and limits.token_ms > 0,
            f"limits of {limits} cannot be kept: use numbers above 0")
    require_new(task, budget_mb, out)
    with scratch(out) as work:
        deployed = deploy(task, budget_mb, work / "files", **options)
        spent = cost(work / "files", task)
        require(spent.memory_mb <= limits.memory_mb and spent.token_ms <= limits.token_ms,
                f"{deployed.actual_mb:.1f} MB of files take {spent}, more than the limits: "
                "lower --budget-mb, or raise --memory-mb or --token-ms")
        swap(work / "files", out)
    return deployed, spent
