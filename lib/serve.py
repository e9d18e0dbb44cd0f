"""An OpenAI-compatible server on loopback: llama.cpp behind the front."""

import _thread
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
import xllamacpp

from lib.artifacts import ROOT
from lib.bundle import Bundle, open_bundle
from lib.doctor import cores
from lib.errors import UserError
from lib.front import application
from lib.profiles import ServeSettings

HOST = "127.0.0.1"
# Seconds that requests under way get to finish when the server stops.
GRACE = 20


def start_engine(bundle: Bundle, settings: ServeSettings, context: int, key: str) -> Any:
    """llama.cpp's own server on a free loopback port, closed to whoever lacks the key."""
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(bundle.model), {bundle.name}
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), scale)
                            for file, scale in bundle.adapters.values()]
    params.hostnames, params.port, params.api_keys = [HOST], free_port(), [key]
    params.n_ctx, params.n_parallel = context * settings.slots, settings.slots
    threads = settings.threads or cores()
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.endpoint_metrics, params.ui, params.verbosity = True, False, 0
    # Prompts kept beside the slots would grow to 8 GB.
    params.cache_ram_mib = 0
    try:
        return xllamacpp.Server(params)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"llama.cpp could not load {bundle.model} ({error}): "
                        "make it again, or lower --context or --slots") from None


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def serve(path: Path, settings: ServeSettings, loras: Sequence[str] = (), *,
          until_eof: bool = False) -> None:
    """Serve until SIGTERM or Ctrl-C; requests under way are finished first.

    With `until_eof` also until standard input ends, as it does when the
    program that started the server is no more.

    Raises:
        UserError: a bad file, or a port that is taken.
    """
    bundle = open_bundle(path, loras)
    # Named as TCP, or asyncio leaves Nagle's delay of 40 ms on its connections.
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        if os.name == "posix":  # on Windows it would share the port with another server
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, settings.port))
        except (OSError, OverflowError):
            raise UserError(f"port {settings.port} is taken or not allowed: "
                            "choose another with --port, or 0 for a free one") from None
        key = secrets.token_urlsafe()
        context = min(settings.context, bundle.context)
        engine = start_engine(bundle, settings, context, key)
        app = application(bundle, engine.listening_address, key, context, settings.slots)
        listener.listen()  # whoever reads the next line may connect at once
        print(f"serving {', '.join((bundle.name, *bundle.adapters))} at "
              f"http://{HOST}:{listener.getsockname()[1]}/v1", flush=True)
        # Kept longer than clients keep a connection, so that none is cut as it is used.
        config = uvicorn.Config(app, log_level="error", timeout_keep_alive=60,
                                timeout_graceful_shutdown=GRACE)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        if until_eof:
            threading.Thread(target=_stop_at_eof, daemon=True).start()
        uvicorn.Server(config).run(sockets=[listener])


def _stop_at_eof() -> None:
    sys.stdin.read()
    _thread.interrupt_main(signal.SIGTERM)  # os.kill would end it on the spot under Windows


@dataclass(frozen=True)
class Served:
    """A server that runs beside this process."""

    url: str
    pid: int


@contextlib.contextmanager
def running(path: Path, *options: str) -> Iterator[Served]:
    """A server process for as long as the block runs.

    Args:
        options: as `serve` has them; files in them by their whole paths.

    Raises:
        UserError: what the server said when it could not start.
    """
    command = [sys.executable, "-X", "utf8", "-m", "lib", "serve", str(Path(path).resolve()),
               "--port", "0", "--until-eof", *options]
    # Not a pipe: it would fill up, and a server that cannot write stands still.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said, \
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
                             cwd=ROOT, encoding="utf-8", errors="replace") as process:
        line = process.stdout.readline()
        try:
            if not line:
                status = process.wait()
                said.seek(0)
                raise UserError(said.read().strip().removeprefix("error: ") or
                                f"the server ended with status {status}: is there memory enough?")
            yield Served(line.split()[-1], process.pid)
        finally:
            process.stdin.close()  # asks it to stop, on every system
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2 * GRACE)
            process.kill()  # nothing to one that has ended
