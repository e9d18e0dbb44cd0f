"""The command line, `python -m lib COMMAND`: doctor, run, train, evaluate, export, serve, ..."""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lib.base.records import Records
from lib.errors import UserError, require
from lib.files import MANIFEST, read_json, size_mb, write_json
from lib.host import is_main_process, process_count
from lib.settings import MODES, PROFILES, ServeSettings, TrainSettings

# Commands import what they need: torch takes seconds, and a mistake should show at once.
DIR: dict[str, Any] = {"type": Path, "metavar": "DIR"}
ALIASES = {"search": "find the front of an adapter for all configurations", "bench": "run a "
           "benchmark: python -m data.evidence", "slides": "build a deck for each notebook",
           "site": "build the course as a static site"}
REPEATED = ("--lora", "--ignore", "--budget-mb", "--budgets")
FIELDS: dict[str, Any] = {"action": "extend", "type": lambda text: text.split(","), "default": [],
                          "metavar": "FIELD", "help": "fields of the records to leave out"}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.replace('<lambda>', 'number')} (see `{self.prog} --help`)")


def parser() -> Parser:
    """Every command and its options."""
    root = Parser(prog="python -m lib", description="From LoRA to the edge.")
    commands = root.add_subparsers(  # an option cut short could be given twice, unseen
        dest="command", required=True, parser_class=lambda **o: Parser(allow_abbrev=False, **o))
    commands.add_parser("doctor", help="check this machine and say what to expect")

    add = commands.add_parser("run", help="execute the notebooks in order").add_argument
    add("--profile", default=os.environ.get("COURSE_PROFILE", "laptop"), help=", ".join(PROFILES))
    add("--only", default="", metavar="NN", help="one notebook, by number")
    add("--store", action="store_true", help="also keep the outputs in notebooks/")

    add = (train := commands.add_parser("train", help="train on your own records")).add_argument
    add("--data", required=True, metavar="FILE", help="JSONL, JSON, CSV, TSV, Parquet, or a hub id")
    add("--ignore", **FIELDS)
    add("--eval-data", default="", metavar="FILE", help="records for validation along the way")
    add("--out", required=True, **DIR)
    add("--model", default="embedded", help="hub id or directory")
    add("--mode", choices=MODES, help="default qlora, or lora over configurations")
    add_fields(train, TrainSettings, omit=("mode", "plain", "learning_rate"))
    add("--learning-rate", type=float, help="default 0.003, with --mode full 0.0003")

    add = commands.add_parser("evaluate", help="score one or two systems on records").add_argument
    add("systems", nargs="+", metavar="SYSTEM", help="embedded, folder, hub id, http://HOST/v1#NAME")
    add("--data", required=True, metavar="FILE", help="records, as for train")
    add("--learn", default="all", choices=("all", "last"), help="as in train; default all")
    add("--divergence", action="store_true", help="also the KL of two models, both in memory")
    add("--limit", type=int, default=1 << 62, metavar="N", help="only the first N records")
    add("--new-tokens", type=int, default=0, metavar="N", help="longest answer, default by FILE")
    add("--out", type=Path, metavar="FILE", help="also write the figures as JSON")

    add = commands.add_parser("export", help="write GGUF files that `serve` serves").add_argument
    add("--out", required=True, **DIR)
    add("--merge", help="adapter to merge", **DIR)
    add("--adapter", action="append", default=[], metavar="NAME=DIR", help="kept beside it")
    add("--type", default="Q8_0", help="Q8_0 (default), F16, IQ4_NL, Q4_K, ...")
    add("--importance", metavar="FILE", help="records that say which columns matter")
    add("--converter", help="a checkout of llama.cpp to convert with", **DIR)

    add = commands.add_parser("deploy", help="from a budget to files that run").add_argument
    add("--adapter", help="any adapter; with --data", **DIR)
    add("--data", default="", metavar="FILE", help="records (256) that choose; default its own")
    add("--task", default="", help="a shipped adapter and its records: sensors, movies")
    add("--format", default="", choices=("", "packed", "gguf"), help="default by the adapter")
    add("--converter", help="as for export", **DIR)
    add("--budget-mb", "--budgets", required=True, metavar="MB", action="extend", type=lambda t: [
        *map(float, t.split(","))], help="size of all files, MB (10^6 bytes); or several: 75,90")
    for limit, unit in (("--memory-mb", "MB"), ("--token-ms", "MS")):
        add(limit, type=float, default=math.inf, metavar=unit, help="limit, measured here")
    add("--out", required=True, **DIR)

    for name in ("evaluate", "export", "deploy"):
        add = commands.choices[name].add_argument
        add("--ignore", **FIELDS)
        add("--route", default="", choices=("original", "dequantized"), help="default as trained")
        add("--model", default="", help="hub id or directory; default the adapter's base")

    add = (serve := commands.add_parser("serve", help="serve a model here")).add_argument
    add("path", help="from `export`, or a GGUF file", **DIR)
    add("--lora", action="append", default=[], metavar="NAME=FILE[:SCALE]")
    add_fields(serve, ServeSettings)

    for name, what in ALIASES.items():
        commands.add_parser(name, help=what)
    return root


def add_fields(command: Parser, settings: type, omit: tuple[str, ...] = ()) -> None:
    """An option for each field of a dataclass of settings."""
    for field in dataclasses.fields(settings):
        options = {"action": "store_true"} if field.type is bool else {
            "type": field.type, "default": field.default, "help": f"default {field.default}"}
        if field.name not in omit:
            command.add_argument(f"--{field.name.replace('_', '-')}", **options)


def from_fields(settings: type, args: argparse.Namespace) -> Any:
    """The dataclass of settings that the options of `add_fields` describe."""
    names = {field.name for field in dataclasses.fields(settings)} & vars(args).keys()
    return settings(**{name: getattr(args, name) for name in names})


def first_records(source: str, ignore: list[str]) -> list[Any]:
    """The first 256 records of a source."""
    return [*itertools.islice(Records(source, ignore=ignore), 256)]


def dispatch(args: argparse.Namespace) -> None:
    """Run the chosen command."""
    match args.command:
        case "doctor":
            from lib.course.doctor import examine
            problems = []
            for state, name, text in examine():
                print(f"{state:8} {name:10} {text}", flush=True)
                problems += [name] * (state == "problem")
            require(not problems, f"fix {' and '.join(problems)} first, as described above")
            print("this machine can run the course: python -m lib run")
        case "run":
            from lib.course.run import run
            print(f"open {run(args.profile, only=args.only, store=args.store) / 'index.html'}")
        case "train":
            args.mode = args.mode or ("qlora" if args.method == "plain" else "lora")
            # Full fine-tuning needs a tenth of LoRA's (claim T7).
            if args.learning_rate is None:
                args.learning_rate = 3e-4 if args.mode == "full" else TrainSettings.learning_rate
            settings, ignore = from_fields(TrainSettings, args), args.ignore
            records = Records(args.data, ignore=ignore)
            held = Records(args.eval_data, ignore=ignore) if args.eval_data else None
            for source in filter(None, (records, held)):
                next(iter(source))  # a wrong file is reported before torch is loaded
            if args.method == "plain":
                from lib.train.training import train
            else:
                from lib.coa.adapter import train_joint as train
            done = train(records, settings, model=args.model, out=args.out, say_every=10, held=held)
            if is_main_process():
                print(f"{args.out}: {done.trainable:,} of {done.parameters:,} parameters "
                      f"trained, {done.seconds:.0f} s, peak {done.peak_mb:.0f} MB"
                      + f", {process_count()} processes" * (process_count() > 1))
        case "evaluate":
            require(len({*args.systems}) == len(args.systems) <= 2 and args.limit > 0 and
                    args.new_tokens >= 0, "name one system, or two to compare, and give --limit "
                    "and --new-tokens above 0")
            records = Records(args.data, ignore=args.ignore)
            places, records = zip(*((records.where, record) for record
                                    in itertools.islice(records, args.limit)), strict=True)
            require(not (args.route or args.model) or any(
                Path(system, "adapter_config.json").is_file() for system in args.systems),
                "--route and --model are for adapters: none is named")
            if args.out and args.out.exists():  # only an evaluation's figures are replaced
                own = args.out.is_file() and re.match(rb'$|{\n "data": ', args.out.read_bytes())
                require(own, f"--out {args.out} is there, and no evaluation: name another file")
            models = args.systems[1:] and "://" not in " ".join(args.systems)
            require(models or not args.divergence, "--divergence compares two models: name two")
            from lib.deploy.evaluation import differences, divergences, evaluate
            options = dict(learn=args.learn, route=args.route, base=args.model, places=places)
            apart = divergences(*args.systems, records, **options) if args.divergence else {}
            done = [evaluate(system, records, new_tokens=args.new_tokens, **options)
                    for system in args.systems]
            rows = [(system, row.figures()) for system, row in zip(args.systems, done, strict=True)]
            rows += [("the second less the first", differences(*done))] if done[1:] else []
            rows += [("the second beside the first", apart)] if apart else []
            for name, row in rows:
                print(f"{name}, {len(records)} records")
                for figure, value in row.items():
                    middle, *ends = value if isinstance(value, list | tuple) else [value]
                    interval = " [{:.4g}, {:.4g}]".format(*ends) if ends else ""
                    print(f"  {figure:14} {middle:.4g}{interval}")
            if args.out:
                write_json(args.out, {"data": args.data, "records": len(records),
                                      "systems": dict(rows)})
        case "export":
            adapters: dict[str, Path] = {}
            for text in args.adapter:
                name, _, directory = text.partition("=")
                require(name and directory and name not in adapters,
                        f"--adapter {text}: use NAME=DIR, and each name once")
                adapters[name] = Path(directory)
            require(args.importance or not args.ignore, "--ignore is for --importance: name both")
            records = first_records(args.importance, args.ignore) if args.importance else ()
            from lib.quantize.gguf import commands, export
            kinds = export(args.out, gguf_type=args.type, route=args.route, merged=args.merge,
                           adapters=adapters, model=args.model, records=records,
                           converter=args.converter)
            sizes = [f"{f.name} {size_mb(f):.1f} MB" for f in sorted(args.out.glob("*.gguf"))]
            print(f"{args.out}: {', '.join(sizes)}")
            for kind in kinds.keys() - {args.type, "F32"}:
                print(f"in {kind}, because {args.type} does not divide their rows: "
                      f"{', '.join(sorted(kinds[kind]))}")
            print("serve it with one of", *commands(args.out), sep="\n  ")
        case "deploy":
            adapter, source = args.adapter, args.data
            more = source or args.route or args.ignore or args.model
            require(not args.task if adapter else args.task and not more, "name --adapter DIR, "
                    "perhaps with --data, --ignore, --route and --model, or --task alone")
            if adapter and not source and (adapter / MANIFEST).is_file():
                source = read_json(adapter / MANIFEST).get("data")
            require(source or not adapter, f"{adapter} does not say its records: name --data FILE")
            records = first_records(source, args.ignore) if adapter else ()
            from lib.deploy.deployment import HELD, Cost, deploy, shipped
            what = {"adapter": adapter, "form": args.format, "route": args.route,
                    "records": records, "held": records[-HELD:]} if adapter else shipped(
                        args.task, args.format or "packed")
            done = deploy(**what, budgets=args.budget_mb, out=args.out, model=args.model,
                          limits=Cost(args.memory_mb, args.token_ms), converter=args.converter)
            for budget, deployed in done.items():
                print(f"{args.out}, {budget:g} MB, by {len(what['held'])} records: {deployed}")
            if any(args.out.rglob("model.gguf")):
                print(f"start it with `python -m lib serve {shlex.quote(str(args.out))}`")
        case "serve":
            from lib.serve.server import serve
            with contextlib.suppress(KeyboardInterrupt):  # the ordinary way to stop it
                serve(args.path, from_fields(ServeSettings, args), args.lora)


def user_message(error: Exception) -> str:
    """One line for an error that the user can correct; empty for a fault of the program."""
    text = " ".join(str(error).splitlines())
    if isinstance(error, UserError):
        return text
    if isinstance(error, ModuleNotFoundError) and (error.name or "lib").split(".")[0] != "lib":
        return f"{error.name} is not installed in {sys.executable}: run `python -m lib doctor`"
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", text):
        return "memory is short: close other programs; `train` has --accumulate and --max-length"
    # A full disk, a read-only folder, ...: safetensors reports them as an error of its own.
    system = isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError)
    if system or "os error " in text:
        return f"{text}: check the path, the permissions and the free space"
    return ""


def require_once(words: Sequence[str]) -> None:
    """UserError for an option given twice, of which argparse takes the last, or an empty value."""
    named = [word.partition("=")[0] for word in words if word.startswith("--")]
    for option in {*named} - {*REPEATED, *["--adapter"] * (words[:1] == ["export"])}:
        require(named.count(option) == 1, f"{option} is given twice: give it once")
    require(all(word and not re.fullmatch("--[a-z-]+=", word) for word in words),
            "an option has an empty value: give it one, or leave it out")


def main(argv: list[str] | None = None) -> int:
    """Run a command; return 0, 2 after one line for a user's mistake, or 130 for Ctrl-C."""
    try:
        words = sys.argv[1:] if argv is None else argv
        require_once(words)
        if words[:1] and words[0] in ALIASES:  # by name, because `lib` does without `data`
            return importlib.import_module("data.evidence.__main__").aliased(*words)
        dispatch(parser().parse_args(words))
        return 0
    except KeyboardInterrupt:
        print("stopped: `train` and `search` go on if run again; after `run`, use --only NN for "
              "each notebook left", file=sys.stderr)
        return 130
    except Exception as error:
        if not (message := user_message(error)):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
