"""The command line: `python -m lib doctor | run | train | export | deploy | serve | ...`."""

import argparse
import contextlib
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from lib.artifacts import BUILD, write_json
from lib.errors import UserError, require


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `python -m lib --help`)")


def parser() -> Parser:
    """Every command and its options."""
    from lib.profiles import MODES, PROFILES, ServeSettings, TrainSettings, default_profile

    root = Parser(prog="python -m lib", description="From LoRA to the edge.")
    commands = root.add_subparsers(dest="command", required=True, parser_class=Parser)

    commands.add_parser("doctor", help="check this machine and say what to expect")

    run = commands.add_parser("run", help="execute the notebooks in order")
    run.add_argument("--profile", default=default_profile(), help=", ".join(PROFILES))
    run.add_argument("--only", default="", metavar="NN", help="one notebook, by number")
    run.add_argument("--store", action="store_true", help="also keep the outputs in notebooks/")

    train = commands.add_parser("train", help="train an adapter on your own JSONL")
    train.add_argument("--data", required=True, type=Path, metavar="FILE.jsonl")
    train.add_argument("--out", required=True, type=Path, metavar="DIR")
    train.add_argument("--model", default="embedded", help="hub id or directory")
    train.add_argument("--mode", default="qlora", choices=MODES)
    _add_fields(train, TrainSettings, but=("mode", "plain"))

    export = commands.add_parser("export", help="write GGUF files that `serve` serves")
    export.add_argument("--out", required=True, type=Path, metavar="DIR")
    export.add_argument("--merge", type=Path, metavar="DIR", help="adapter to fold in")
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
                        help="of all files, MB (10^6 bytes)")
    deploy.add_argument("--memory-mb", type=float, default=math.inf, metavar="MB",
                        help="limit of the memory in use, measured here")
    deploy.add_argument("--token-ms", type=float, default=math.inf, metavar="MS",
                        help="limit of the time to decode a token, measured here")
    deploy.add_argument("--out", required=True, type=Path, metavar="DIR")

    serve = commands.add_parser("serve", help="serve a model on this machine")
    serve.add_argument("path", type=Path, metavar="DIR", help="from `export`, or a GGUF file")
    serve.add_argument("--lora", action="append", default=[], metavar="NAME=FILE[:SCALE]")
    serve.add_argument("--until-eof", action="store_true",
                       help="also stop when standard input ends")
    _add_fields(serve, ServeSettings)

    bench = commands.add_parser("bench", help="run a benchmark")
    bench.add_argument("name")
    bench.add_argument("--json", type=Path, metavar="FILE")

    slides = commands.add_parser("slides", help="build a deck for each notebook")
    slides.add_argument("--out", type=Path, metavar="DIR", default=BUILD / "slides",
                        help="default build/slides")
    slides.add_argument("--solutions", action="store_true",
                        help="show solutions below their exercises, not only as notes")

    site = commands.add_parser("site", help="build the course as a static site")
    site.add_argument("--out", type=Path, metavar="DIR", default=BUILD / "site",
                      help="default build/site")
    return root


def _add_fields(command: argparse.ArgumentParser, settings: type, but: tuple[str, ...] = ()
                ) -> None:
    """An option for each field of a dataclass of settings."""
    for field in dataclasses.fields(settings):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name in but:
            continue
        if field.type is bool:
            command.add_argument(flag, action="store_true")
        else:
            command.add_argument(flag, type=field.type, default=field.default,
                                 help=f"default {field.default}")


def _from_fields(settings: type, args: argparse.Namespace) -> Any:
    names = {f.name for f in dataclasses.fields(settings)}
    return settings(**{k: v for k, v in vars(args).items() if k in names})


def command_doctor(_: argparse.Namespace) -> None:
    """Say what this machine has, line by line, and what must be mended."""
    from lib.doctor import examine

    wrong = []
    for finding in examine():
        print(finding, flush=True)
        if finding.state == "problem":
            wrong.append(finding.name)
    require(not wrong, f"mend {' and '.join(wrong)} first, as said above")
    print("this machine can run the course: python -m lib run")


def command_run(args: argparse.Namespace) -> None:
    """Execute the notebooks and say where the pages are."""
    from lib.course import run

    start = time.monotonic()
    out = run(args.profile, only=args.only, store=args.store)
    print(f"open {out / 'index.html'} ({time.monotonic() - start:.0f} s in all)")


def command_train(args: argparse.Namespace) -> None:
    """Train on the user's own JSONL."""
    from lib.profiles import TrainSettings
    from lib.records import read_jsonl

    settings = _from_fields(TrainSettings, args)
    records = read_jsonl(args.data)
    from lib.processes import count, first  # seconds: a mistake shows before
    from lib.train import train

    result = train(records, settings, model=args.model, out=args.out, say_every=10)
    if first():
        print(f"{args.out}: {result.trainable:,} of {result.parameters:,} parameters trained, "
              f"{result.seconds:.0f} s, peak {result.peak_mb:.0f} MB"
              + (f", {count()} processes" if count() > 1 else ""))


def command_export(args: argparse.Namespace) -> None:
    """Write a model and its adapters as GGUF files."""
    adapters: dict[str, Path] = {}
    for text in args.adapter:
        name, _, directory = text.partition("=")
        require(name and directory, f"--adapter {text!r} is not NAME=DIR: give both")
        require(name not in adapters, f"--adapter {name} is given twice: use another name")
        adapters[name] = Path(directory)
    from lib.gguf import export  # seconds: a mistake shows before

    export(args.out, kind=args.type, route=args.route, merged=args.merge,
           adapters=adapters, model=args.model)
    sizes = ", ".join(f"{f.name} {f.stat().st_size / 1e6:.1f} MB"
                      for f in sorted(args.out.glob("*.gguf")))
    print(f"{args.out}: {sizes}; start it with `python -m lib serve {args.out}`")


def command_deploy(args: argparse.Namespace) -> None:
    """Write the best known configuration under a budget, and measured limits if asked."""
    from lib.deploy import deploy_packed
    from lib.deploy_gguf import deploy_gguf
    from lib.limits import Cost, deploy_within

    way = deploy_gguf if args.format == "gguf" else deploy_packed
    limits = Cost(args.memory_mb, args.token_ms)
    if limits == Cost():
        made = way(args.task, args.budget_mb, args.out)
    else:
        made, found = deploy_within(way, args.task, args.budget_mb, args.out, limits)
        print(f"measured here: {found}")
    print(f"{args.out}: {made.actual_mb:.1f} MB ({made.predicted_mb:.1f} predicted, "
          f"{args.budget_mb:g} allowed)\n{made}")
    if args.format == "gguf":
        print(f"start it with `python -m lib serve {args.out}`")


def command_serve(args: argparse.Namespace) -> None:
    """Serve until it is stopped."""
    from lib.profiles import ServeSettings
    from lib.serve import serve

    with contextlib.suppress(KeyboardInterrupt):  # the ordinary way to stop it
        serve(args.path, _from_fields(ServeSettings, args), args.lora, until_eof=args.until_eof)


def command_bench(args: argparse.Namespace) -> None:
    """Run a benchmark; print it, and keep it as JSON."""
    from lib.bench import run_bench

    result: dict[str, Any] = run_bench(args.name)
    for key, value in result.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{key:32} {shown}")
    if args.json:
        write_json(args.json, result)


def command_slides(args: argparse.Namespace) -> None:
    """Build the decks and say how long each is planned to take."""
    from lib.slides import build

    for name, minutes in build(args.out, solutions=args.solutions).items():
        print(f"{name:24} about {minutes:.0f} minutes")
    print(f"open {args.out / 'index.html'}")


def command_site(args: argparse.Namespace) -> None:
    """Build the site and say where it is."""
    from lib.site import build

    print(f"{build(args.out)} pages; open {args.out / 'index.html'}")


STOPPED = {"train": "stopped: run the same command again to go on from the last checkpoint",
           "run": "stopped: go on with `--only NN`, one notebook at a time"}


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, or 2 with one line for the user's mistake, 130 for Ctrl-C."""
    typed = sys.argv[1:] if argv is None else argv
    try:
        args = parser().parse_args(typed)
        globals()[f"command_{args.command}"](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "lib").partition(".")[0] == "lib":
            raise
        print(f"error: {error.name} is not installed in {sys.executable}: "
              "`python -m lib doctor` says what is missing", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(STOPPED.get(typed[0] if typed else "", "stopped: start it again"), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
