"""A client that measures: streamed answers of the server, one or many at a time."""

import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

Body = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A streamed answer, and when its parts came (seconds from the request)."""

    text: str
    tokens: int
    first: float
    last: float
    prompt_tokens: int

    @property
    def decode(self) -> float:
        """Tokens a second after the first one; not a number if all came at once."""
        return (self.tokens - 1) / ((self.last - self.first) or math.nan)


def question(instruction: str, *, model: str = "", **options: Any) -> Body:
    """Body of a greedy chat request."""
    return {"model": model, "messages": [{"role": "user", "content": instruction}],
            "temperature": 0, "max_tokens": 56, **options}


def connect(url: str, **options: Any) -> httpx.Client:
    """A client of a server on this machine; a proxy of the environment is not for it."""
    return httpx.Client(base_url=url, timeout=600, trust_env=False, **options)


def ask(client: httpx.Client, body: Body) -> Answer:
    """Stream one chat answer and time it.

    Raises:
        httpx.HTTPStatusError: the server refused the request.
    """
    marks, parts, usage = [], [], {}
    start = time.perf_counter()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/chat/completions", json=body | options) as reply:
        if reply.is_error:
            reply.read()
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    marks.append(time.perf_counter() - start)
                    parts.append(piece)
    marks = marks or [time.perf_counter() - start]  # an answer may end before it begins
    return Answer("".join(parts).strip(), usage["completion_tokens"], marks[0], marks[-1],
                  usage["prompt_tokens"])


def ask_all(url: str, bodies: Sequence[Body], *, clients: int = 4) -> list[Answer]:
    """Answers in the order of the requests, `clients` of them at a time."""
    # No connection is used twice: threads that share a pool of kept ones may
    # close one that another thread has just taken.
    fresh = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    with connect(url, limits=fresh) as client, ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda body: ask(client, body), bodies))
