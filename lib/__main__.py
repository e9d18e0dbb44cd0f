"""The command line: `python -m lib doctor | run | train | export | deploy | serve | ...`."""

import argparse
import contextlib
import dataclasses
import importlib
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from lib.errors import UserError, require
from lib.files import BUILD, size_mb
from lib.host import is_main_process, process_count
from lib.settings import MODES, PROFILES, ServeSettings, TrainSettings

# Commands import what they need: torch takes seconds, and a mistake should show at once.
DIR: dict[str, Any] = {"type": Path, "metavar": "DIR"}
LIMIT: dict[str, Any] = {"type": float, "default": math.inf}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `python -m lib --help`)")


def parser() -> Parser:
    """Every command and its options."""
    root = Parser(prog="python -m lib", description="From LoRA to the edge.")
    commands = root.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands.add_parser("doctor", help="check this machine and say what to expect")

    run = commands.add_parser("run", help="execute the notebooks in order")
    profile = os.environ.get("COURSE_PROFILE", "laptop")
    run.add_argument("--profile", default=profile, help=", ".join(PROFILES))
    run.add_argument("--only", default="", metavar="NN", help="one notebook, by number")
    run.add_argument("--store", action="store_true", help="also keep the outputs in notebooks/")

    train = commands.add_parser("train", help="train an adapter on your own JSONL")
    train.add_argument("--data", required=True, type=Path, metavar="FILE.jsonl")
    train.add_argument("--out", required=True, **DIR)
    train.add_argument("--model", default="embedded", help="hub id or directory")
    train.add_argument("--mode", default="qlora", choices=MODES)
    _add_fields(train, TrainSettings, omit=("mode", "plain"))

    export = commands.add_parser("export", help="write GGUF files that `serve` serves")
    export.add_argument("--out", required=True, **DIR)
    export.add_argument("--merge", help="adapter to merge", **DIR)
    export.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR",
                        help="adapter to keep beside the model; may be repeated")
    export.add_argument("--type", default="Q8_0", help="Q8_0 (default), F16, Q4_1, ...")
    export.add_argument("--route", default="dequantized",
                        help="base: dequantized (for QLoRA, default) or original")
    export.add_argument("--model", default="embedded", help="hub id or directory")

    deploy = commands.add_parser("deploy", help="from a budget of bytes to files that run")
    deploy.add_argument("--task", default="sensors", help="sensors (default); for gguf movies, too")
    deploy.add_argument("--format", default="packed", choices=("packed", "gguf"))
    deploy.add_argument("--budget-mb", type=float, required=True, metavar="MB",
                        help="size of all files, MB (10^6 bytes)")
    deploy.add_argument("--memory-mb", metavar="MB", help="limit, measured here", **LIMIT)
    deploy.add_argument("--token-ms", metavar="MS", help="limit, measured here", **LIMIT)
    deploy.add_argument("--out", required=True, **DIR)

    serve = commands.add_parser("serve", help="serve a model on this machine")
    serve.add_argument("path", help="from `export`, or a GGUF file", **DIR)
    serve.add_argument("--lora", action="append", default=[], metavar="NAME=FILE[:SCALE]")
    serve.add_argument("--until-eof", action="store_true", help="also stop when stdin ends")
    _add_fields(serve, ServeSettings)

    bench = commands.add_parser("bench", help="run a benchmark: python -m data.evidence")
    bench.add_argument("words", nargs=argparse.REMAINDER, metavar="NAME [--json FILE]")
    slides = commands.add_parser("slides", help="build a deck for each notebook")
    slides.add_argument("--out", default=BUILD / "slides", help="default build/slides", **DIR)
    slides.add_argument("--solutions", action="store_true", help="show solutions below exercises")
    site = commands.add_parser("site", help="build the course as a static site")
    site.add_argument("--out", default=BUILD / "site", help="default build/site", **DIR)
    return root


def _add_fields(command: Parser, settings: type, omit: tuple[str, ...] = ()) -> None:
    """An option for each field of a dataclass of settings."""
    for field in dataclasses.fields(settings):
        flag = f"--{field.name.replace('_', '-')}"
        if field.type is bool and field.name not in omit:
            command.add_argument(flag, action="store_true")
        elif field.name not in omit:
            command.add_argument(flag, type=field.type, default=field.default,
                                 help=f"default {field.default}")


def _from_fields(settings: type, args: argparse.Namespace) -> Any:
    names = {field.name for field in dataclasses.fields(settings)}
    return settings(**{name: value for name, value in vars(args).items() if name in names})


def _doctor(_: argparse.Namespace) -> None:
    from lib.course.doctor import examine

    problems = []
    for finding in examine():
        print(finding, flush=True)
        if finding.state == "problem":
            problems.append(finding.name)
    require(not problems, f"fix {' and '.join(problems)} first, as described above")
    print("this machine can run the course: python -m lib run")


def _run(args: argparse.Namespace) -> None:
    from lib.course.run import run

    start = time.monotonic()
    out = run(args.profile, only=args.only, store=args.store)
    print(f"open {out / 'index.html'} ({time.monotonic() - start:.0f} s in all)")


def _train(args: argparse.Namespace) -> None:
    from lib.base.records import read_jsonl

    settings, records = _from_fields(TrainSettings, args), read_jsonl(args.data)
    from lib.train.training import train

    result = train(records, settings, model=args.model, out=args.out, say_every=10)
    if is_main_process():
        processes = f", {process_count()} processes" if process_count() > 1 else ""
        print(f"{args.out}: {result.trainable:,} of {result.parameters:,} parameters trained, "
              f"{result.seconds:.0f} s, peak {result.peak_mb:.0f} MB{processes}")


def _export(args: argparse.Namespace) -> None:
    adapters: dict[str, Path] = {}
    for text in args.adapter:
        name, _, directory = text.partition("=")
        require(name and directory and name not in adapters,
                f"--adapter {text}: use NAME=DIR, and each name once")
        adapters[name] = Path(directory)
    from lib.quantize.gguf import export

    export(args.out, gguf_type=args.type, route=args.route, merged=args.merge,
           adapters=adapters, model=args.model)
    sizes = ", ".join(f"{f.name} {size_mb(f):.1f} MB" for f in sorted(args.out.glob("*.gguf")))
    print(f"{args.out}: {sizes}; start it with `python -m lib serve {args.out}`")


def _deploy(args: argparse.Namespace) -> None:
    from lib.deploy.cost import Cost, deploy_within
    from lib.deploy.gguf import deploy_gguf
    from lib.deploy.packed import deploy_packed

    deploy = deploy_gguf if args.format == "gguf" else deploy_packed
    deployed, cost = deploy_within(deploy, args.task, args.budget_mb, args.out,
                                   Cost(args.memory_mb, args.token_ms))
    print(f"{args.out}: {deployed.actual_mb:.1f} MB ({deployed.predicted_mb:.1f} predicted, "
          f"{args.budget_mb:g} allowed)\n{deployed}\nmeasured here: {cost}")
    if args.format == "gguf":
        print(f"start it with `python -m lib serve {args.out}`")


def _serve(args: argparse.Namespace) -> None:
    from lib.serve.server import serve

    with contextlib.suppress(KeyboardInterrupt):  # the ordinary way to stop it
        serve(args.path, _from_fields(ServeSettings, args), args.lora, until_eof=args.until_eof)


def _bench(args: argparse.Namespace) -> int:
    # By name, because `lib` does without `data`.
    return importlib.import_module("data.evidence.__main__").main(args.words)


def _slides(args: argparse.Namespace) -> None:
    from lib.course.site import build_slides

    build_slides(args.out, solutions=args.solutions)
    print(f"open {args.out / 'index.html'}")


def _site(args: argparse.Namespace) -> None:
    from lib.course.site import build_site

    build_site(args.out)
    print(f"open {args.out / 'index.html'}")


def user_message(error: Exception) -> str:
    """One line for an error that the user can correct; empty for a fault of the program."""
    text = " ".join(str(error).splitlines())
    if isinstance(error, UserError):
        return text
    if isinstance(error, ModuleNotFoundError) and (error.name or "lib").split(".")[0] != "lib":
        return (f"{error.name} is not installed in {sys.executable}: "
                "`python -m lib doctor` says what is missing")
    # A full disk, a read-only folder, ...: safetensors reports them as an error of its own.
    system = isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError)
    if system or "os error " in text:
        return f"{text}: check the path, the permissions and the free space"
    return ""


def main(argv: list[str] | None = None) -> int:
    """Run a command; return 0, 2 after one line for a user's mistake, or 130 for Ctrl-C."""
    try:
        args = parser().parse_args(argv)
        return globals()[f"_{args.command}"](args) or 0
    except KeyboardInterrupt:
        print("stopped: run the same command again; `train` goes on from its last checkpoint, "
              "`run --only NN` with one notebook", file=sys.stderr)
        return 130
    except Exception as error:
        if not (message := user_message(error)):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
