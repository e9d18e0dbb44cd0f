"""The server under load and faults: 16 clients, streams that are cut, a stop, a dead engine, hours.

Two adapters, or two budgets of one, and two lengths of answers are mixed; where it says `same`,
every answer is compared with the one that an idle server gave.
"""

import itertools
import os
import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from data.evidence.bench_serving import resident_mb
from lib.base.records import movies, sensors
from lib.client import Answer, ask, ask_all, connect, question
from lib.deploy.deployment import deploy, shipped
from lib.errors import UserError
from lib.serve.bundle import open_bundles
from lib.serve.server import Served, running

CLIENTS, SLOTS = 16, ("--slots", "8")
WORDS = ("positive", "negative")
SOAK, EVERY = 7200, 10  # seconds in all, and between two requests


def questions(count: int) -> list[dict[str, Any]]:
    """Bodies of so many requests: a machine and a film in turn, short and long answers."""
    tasks = {"sensors": sensors("test", count // 2), "movies": movies("test", count // 2)}
    asked = [(name, record) for pair in zip(*tasks.values(), strict=True)
             for name, record in zip(tasks, pair, strict=True)]
    return [question(record["instruction"], model=name, max_tokens=(56, 8)[i // 2 % 2])
            for i, (name, record) in enumerate(asked)]


def own(body: dict[str, Any], answer: Answer) -> bool:
    """Whether the answer has its adapter's form: a verdict on a film, or a machine's name."""
    return (answer.text.strip(".").lower() in WORDS) == (body["model"] == "movies")


def cut(url: str, body: dict[str, Any]) -> None:
    """Begin to read a stream, and leave."""
    with connect(url) as client, client.stream(
            "POST", "/chat/completions", json=body | {"stream": True}) as reply:
        next(reply.iter_lines())


def seconds_until_idle(served: Served) -> float:
    """How long abandoned requests are still computed."""
    start = time.monotonic()
    with connect(served.url.removesuffix("/v1")) as client:
        while "requests_processing 0" not in client.get("/metrics").text:
            time.sleep(0.05)
    return time.monotonic() - start


def load(folder: Path) -> dict[str, Any]:
    """500 requests from 16 clients to two adapters, while 8 more cut 250 streams."""
    bodies = questions(500)
    with running(folder, *SLOTS) as served:
        row, answers = under_load(served, bodies)
        row["seconds_until_idle"] = seconds_until_idle(served)
    return row | {"with_own_adapter": sum(map(own, bodies, answers))}


def load_budgets(folder: Path) -> dict[str, Any]:
    """As `load`, of two files of one adapter, NAME@80mb and NAME@105mb, each in its own engine."""
    if not folder.is_dir():
        deploy(budgets=(80.0, 105.0), out=folder, **shipped("sensors", "gguf"))
    names = [bundle.name for bundle in open_bundles(folder)]
    bodies = [question(record["instruction"], model=names[i % 2], max_tokens=(56, 8)[i // 2 % 2])
              for i, record in enumerate(sensors("test", 500))]
    with running(folder, *SLOTS) as served:
        alone = ask_all(served.url, bodies, clients=1)
        row, answers = under_load(served, bodies)
    same = sum(a.text == b.text for a, b in zip(alone, answers, strict=True))
    return row | {"models": names, "same": same}


def under_load(served: Served, bodies: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Answer]]:
    """Answers to all bodies, and what they took while every second one was also asked and cut."""
    with ThreadPoolExecutor(CLIENTS // 2) as cutters:
        ask_all(served.url, bodies[:64], clients=CLIENTS)
        before, start = resident_mb(served.pid), time.monotonic()
        cuts = [cutters.submit(cut, served.url, body) for body in bodies[:len(bodies) // 2]]
        answers = ask_all(served.url, bodies, clients=CLIENTS)
        seconds = time.monotonic() - start
        for one in cuts:
            one.result()
    return {"requests": len(bodies), "clients": CLIENTS, "answered": len(answers),
            "cut": len(cuts), "seconds": seconds,
            "tokens_per_s": sum(a.tokens for a in answers) / seconds,
            "memory_growth_mb": resident_mb(served.pid) - before}, answers


def faults(folder: Path) -> dict[str, Any]:
    """A stop and a dead engine, under load."""
    bodies = questions(200)
    with running(folder, *SLOTS) as served:
        alone = [answer.text for answer in ask_all(served.url, bodies, clients=1)]
    return {"stopped": stopped(folder, bodies, alone), "killed": killed(folder, bodies, alone)}


def stopped(folder: Path, bodies: list[dict[str, Any]], alone: list[str]) -> dict[str, Any]:
    """SIGTERM while 16 clients are asking: what was begun is finished, the rest is refused."""
    def one(body: dict[str, Any]) -> str | None:
        try:
            with connect(served.url) as client:
                return ask(client, body).text
        except (httpx.ConnectError, httpx.ReadError) as error:  # no connection was made
            return type(error).__name__

    with running(folder, *SLOTS) as served, ThreadPoolExecutor(CLIENTS) as pool:
        pending = [pool.submit(one, body) for body in bodies]
        while sum(p.done() for p in pending) < 50:
            time.sleep(0.01)
        start = time.monotonic()
        os.kill(served.pid, signal.SIGTERM)
        texts = [p.result() for p in pending]
        psutil.Process(served.pid).wait()
        seconds = time.monotonic() - start
    refused = [text in ("ConnectError", "ReadError") for text in texts]
    same = sum(text == wanted for text, wanted in zip(texts, alone, strict=True))
    return {"requests": len(bodies), "answered": len(bodies) - sum(refused), "same": same,
            "refused": {kind: texts.count(kind) for kind in ("ConnectError", "ReadError")},
            "seconds": seconds}


def killed(folder: Path, bodies: list[dict[str, Any]], alone: list[str]) -> dict[str, Any]:
    """SIGKILL for the engine while 16 clients are asking; each asks again until it is answered."""
    counts: dict[str, int] = {}
    lock, times = threading.Lock(), {"dead": 0.0, "again": 0.0}

    def one(body: dict[str, Any]) -> str:
        while True:
            begun = time.monotonic()
            try:
                with connect(served.url) as client:
                    answer = ask(client, body)
                kind = "answered"
            except (UserError, httpx.HTTPError) as error:
                kind = str(error)[:10] if str(error).startswith("status") else "stream broken"
            with lock:
                counts[kind] = counts.get(kind, 0) + 1
                if kind == "answered":
                    if begun > times["dead"] > 0 and not times["again"]:
                        times["again"] = time.monotonic()
                    return answer.text
            time.sleep(0.1)

    with running(folder, *SLOTS) as served, ThreadPoolExecutor(CLIENTS) as pool:
        pending = [pool.submit(one, body) for body in bodies]
        while sum(p.done() for p in pending) < 50:
            time.sleep(0.01)
        psutil.Process(served.pid).children(recursive=True)[-1].kill()
        with lock:
            times["dead"] = time.monotonic()
        texts = [p.result() for p in pending]
        idle = seconds_until_idle(served)
    same = sum(text == wanted for text, wanted in zip(texts, alone, strict=True))
    return {"requests": len(bodies), "tries": counts, "same": same, "seconds_until_idle": idle,
            "seconds_until_answered": times["again"] - times["dead"]}


def soak(folder: Path) -> dict[str, Any]:
    """A request every few seconds for two hours, every fourth one cut; memory by the minute."""
    bodies, wrong, cuts, texts = questions(400), 0, 0, dict[int, str]()
    rows: list[tuple[float, float, float]] = []
    with running(folder, *SLOTS) as served, connect(served.url) as client:
        front, start = psutil.Process(served.pid), time.monotonic()
        for number in itertools.count():
            due = start + number * EVERY
            if due - start > SOAK:
                break
            time.sleep(max(0, due - time.monotonic()))
            at = number % len(bodies)
            if number % 4 == 3:
                cut(served.url, bodies[at])
                cuts += 1
            else:
                text = ask(client, bodies[at]).text
                wrong += text != texts.setdefault(at, text)
            if number % 6 == 0:
                mb = front.memory_info().rss / 1e6
                rows.append((time.monotonic() - start, mb, resident_mb(served.pid) - mb))
    seconds, ours, engine = np.array(rows).T
    late = seconds > SOAK / 6  # caches are full by then

    def slope(mb: np.ndarray) -> float:
        return float(np.polyfit(seconds[late] / 3600, mb[late], 1)[0])

    return {"seconds": SOAK, "requests": number, "cut": cuts, "other_text": wrong,
            "front_mb": statistics.median(ours), "engine_mb": statistics.median(engine),
            "front_mb_an_hour": slope(ours), "engine_mb_an_hour": slope(engine),
            "samples": [[round(x, 1) for x in row] for row in rows[::5]]}
