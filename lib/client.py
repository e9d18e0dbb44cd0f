"""A client that measures streamed answers, one or many at a time."""

import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from lib.errors import UserError, require


@dataclass(frozen=True)
class Answer:
    """A streamed answer; `first` and `last`: seconds from the request to those parts."""

    text: str
    tokens: float  # NaN, as `prompt_tokens`, if the server does not count them
    first: float
    last: float
    prompt_tokens: float
    whole: bool  # neither a limit nor a filter ended it

    @property
    def decode(self) -> float:
        """Tokens per second after the first one; NaN if all came at once."""
        return (self.tokens - 1) / ((self.last - self.first) or math.nan)


def question(instruction: str, *, model: str = "", **options: Any) -> dict[str, Any]:
    """Body of a greedy chat request."""
    return {"model": model, "messages": [{"role": "user", "content": instruction}],
            "temperature": 0, "max_tokens": 56, **options}


def connect(url: str, **options: Any) -> httpx.Client:
    """A client for a server, with the key in COURSE_API_KEY; it ignores the environment's proxy."""
    headers = {"Authorization": f"Bearer {os.environ.get('COURSE_API_KEY') or 'none'}"}
    return httpx.Client(base_url=url, timeout=600, trust_env=False, headers=headers, **options)


def ask(client: httpx.Client, body: dict[str, Any]) -> Answer:
    """Stream one chat answer and time it; UserError with the server's words if it is refused."""
    times, parts, usage, ended, rest = [], [], {}, "", ""
    start = time.perf_counter()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/chat/completions", json=body | options) as reply:
        if not reply.is_success:
            said = reply.read().decode(errors="replace")[:300]
            raise UserError(f"status {reply.status_code}: {said}")
        for text in itertools.chain(reply.iter_text(), "\n"):
            *lines, rest = (rest + text).split("\n")  # an answer may have Unicode's other line ends
            for kind, _, data in (line.partition(":") for line in lines):
                if kind not in ("data", "error") or "{" not in data:
                    continue
                event = json.loads(data)
                require("choices" in event, f"the server broke off: {data.strip()[:300]}")
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    ended = choice.get("finish_reason") or ended
                    if part := choice["delta"].get("content"):
                        times.append(time.perf_counter() - start)
                        parts.append(part)
    require(ended not in ("", "abort", "error"), f"broke off {ended}, or sends no stream of events")
    times = times or [time.perf_counter() - start]  # an answer may end before any text
    whole = ended not in ("length", "content_filter")
    return Answer("".join(parts).strip(), usage.get("completion_tokens", math.nan), times[0],
                  times[-1], usage.get("prompt_tokens", math.nan), whole)


def ask_all(url: str, bodies: Sequence[dict[str, Any]], *, clients: int = 4) -> list[Answer]:
    """Answers in the order of the requests, `clients` of them at a time."""
    # Connections are not reused: a thread may close one that another has just taken.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    with connect(url, limits=limits) as client, ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda body: ask(client, body), bodies))
