"""An OpenAI-compatible server on loopback: llama.cpp behind the front."""

import _thread
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn

from lib.errors import UserError, require
from lib.files import ROOT
from lib.serve.bundle import open_bundles
from lib.serve.engine import HOST, running_engine
from lib.serve.front import application
from lib.settings import ServeSettings


@dataclass(frozen=True)
class Served:
    """A server that runs beside this process."""

    url: str
    pid: int


def serve(path: Path, settings: ServeSettings, loras: Sequence[str] = ()) -> None:
    """Serve until SIGTERM or Ctrl-C; running requests are finished first."""
    bundles = open_bundles(path, loras)
    largest = min(b.context for b in bundles)
    require(settings.context <= largest, f"context {settings.context}: use {largest} or less")
    settings = replace(settings, context=settings.context or min(2048, largest))
    require(settings.max_tokens <= max(settings.context, ServeSettings.max_tokens), f"--max-tokens "
            f"{settings.max_tokens} is above the context, {settings.context}: raise --context")
    try:
        listener = socket.create_server((HOST, settings.port))
    except OSError:
        raise UserError(f"port {settings.port} is taken or not allowed: "
                        "choose another with --port, or 0 for a free one") from None
    key = secrets.token_urlsafe()
    with listener, contextlib.ExitStack() as engines:
        urls = [engines.enter_context(running_engine(b, settings, key)) for b in bundles]
        # Connections inherit this; Nagle's algorithm would delay each part of a stream by 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        app = application(dict(zip(urls, bundles, strict=True)), key, settings)
        here = Served(f"http://{HOST}:{listener.getsockname()[1]}/v1", os.getpid())
        names = ", ".join(name for b in bundles for name in (b.name, *b.adapters))
        plain = f"serving {names} at {here.url}"
        print(json.dumps(vars(here)) if settings.until_eof else plain, flush=True)
        # Clients close idle connections sooner, so none is cut while they use it.
        config = uvicorn.Config(app, log_level="error", timeout_keep_alive=60,
                                timeout_graceful_shutdown=None, lifespan="off")  # waits
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        if settings.until_eof:  # under Windows os.kill would not stop gracefully
            threading.Thread(daemon=True, target=lambda: (
                sys.stdin.read(), _thread.interrupt_main(signal.SIGTERM))).start()
        uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def running(path: Path, *options: str) -> Iterator[Served]:
    """A server process in the block, with `options` of `serve`; UserError if it cannot start."""
    command = [sys.executable, "-P", "-X", "utf8", "-m", "lib", "serve", str(path),
               "--port", "0", "--until-eof", *options]
    # Errors go to a file: a pipe that nobody reads would fill up and block the server.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors, \
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=errors, env=os.environ | {"PYTHONPATH": os.pathsep.join(
                                 [str(ROOT), *sys.path])}, encoding="utf-8") as process:
        address = process.stdout.readline()
        try:
            if not address:
                status = process.wait()
                errors.seek(0)
                raise UserError(errors.read().strip().removeprefix("error: ") or
                                f"the server ended with status {status}: free memory, try again")
            yield Served(**json.loads(address))
        finally:
            process.stdin.close()  # asks it to stop, on every system
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)  # seconds to finish its requests
            process.kill()  # does nothing to a process that has ended
