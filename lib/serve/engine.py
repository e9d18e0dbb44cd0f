"""llama.cpp in a process beside the front, started again if it dies: the wheel's or one's own."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

import httpx

from lib.errors import UserError
from lib.host import cores
from lib.serve.bundle import Bundle
from lib.settings import ServeSettings

HOST = "127.0.0.1"
OLDEST = 6700  # the first build of llama.cpp with all the options that are used here
COMMAND = [sys.executable, "-P", "-X", "utf8", "-m", __name__]


@contextlib.contextmanager
def running_engine(bundle: Bundle, settings: ServeSettings, key: str) -> Iterator[str]:
    """The address of an engine on loopback, for holders of the key; UserError if it fails."""
    with socket.create_server((HOST, 0)) as probe:  # the engine does not take port 0
        port = probe.getsockname()[1]
    options = {"model": str(bundle.model), "alias": bundle.name, "host": HOST, "port": port,
               "ctx-size": settings.context * settings.slots, "parallel": settings.slots,
               "threads": settings.threads or cores(), "cache-ram": 0}  # or up to 8 GB
    adapters = [str(file) for file, _ in bundle.adapters.values()]
    given = json.dumps([settings.engine, options, adapters, key])
    lines, stopping, process, ready = deque[str](maxlen=60), threading.Event(), None, False

    def keep() -> None:
        nonlocal process
        while True:
            process = subprocess.Popen(
                COMMAND, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                encoding="utf-8", errors="replace", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, start_new_session=True)  # Ctrl-C is for the front
            print(given, file=process.stdin, flush=True)  # all users could see an argument
            lines.extend(process.stdout)  # to its end; a pipe that nobody reads would block it
            process.wait()
            if not ready or stopping.wait(1):
                return
            print("the engine died and is started again", file=sys.stderr, flush=True)

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        with httpx.Client(base_url=f"http://{HOST}:{port}", timeout=600, trust_env=False) as client:
            while not ready:
                with contextlib.suppress(httpx.HTTPError):
                    ready = client.get("/health").is_success
                if not keeper.is_alive():
                    said = [line.strip() for line in lines if re.search(r" E |[Ee]rror", line)]
                    raise UserError(f"llama.cpp does not start ({''.join(said[:1])[:200]}): check "
                                    "--engine, make the files again, or lower --context")
                time.sleep(0.02)
        yield str(client.base_url)
    finally:
        stopping.set()
        if process:
            process.stdin.close()  # asks it to stop
            process.wait()


def main() -> None:
    """Be the engine that the first line of standard input describes, until that ends."""
    program, options, adapters, key = json.loads(sys.stdin.readline())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if program:
        said = subprocess.run([program, "--version"], capture_output=True, timeout=60,
                              stdin=subprocess.DEVNULL, encoding="utf-8", errors="replace")
        version = re.search(r"(?:version: |build )(\d+)\b(?!\.)", said.stdout + said.stderr)
        if not version or 0 < int(version[1]) < OLDEST:  # 0: built without git
            sys.exit(f"error: {program} is not a llama-server of build {OLDEST} or newer, which "
                     f"choose adapters for each request; its version is {version and version[1]}")
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        words += [word for file in adapters for word in ("--lora", file)]
        os.environ["LLAMA_API_KEY"] = key
        child = subprocess.Popen([program, *words, "--metrics", "--no-webui", "--jinja"],
                                 stdin=subprocess.DEVNULL)
        threading.Thread(daemon=True, target=lambda: (sys.stdin.read(), child.terminate())).start()
        sys.exit(child.wait())
    import xllamacpp  # not where another engine runs
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = options["model"], {options["alias"]}
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 0) for file in adapters]
    params.hostnames, params.port, params.api_keys = [options["host"]], options["port"], [key]
    params.n_ctx, params.n_parallel = options["ctx-size"], options["parallel"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    params.endpoint_metrics, params.ui, params.verbosity = True, False, 1
    params.cache_ram_mib = options["cache-ram"]
    _ = xllamacpp.Server(params)  # which serves for as long as it is held
    sys.stdin.read()
    os._exit(0)  # at once: the front has finished its requests


if __name__ == "__main__":
    main()
