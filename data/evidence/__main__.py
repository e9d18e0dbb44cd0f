"""Every stored result, benchmark and generated table by its name.

`python -m data.evidence NAME ...` makes the named ones, in order; without a name it lists them.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data.evidence.bench import BENCHES, run_bench
from lib.__main__ import user_message
from lib.errors import UserError, require
from lib.files import BUILD, read_json, write_json
from lib.settings import PROFILES

if TYPE_CHECKING:
    from data.evidence.pieces import Piece

TABLES = {"claims": "write data/claims.json from the stored results",
          "results": "print the table of all scored models, and the speeds",
          "readme": "put the tables into README.md and data/adapters/README.md, draw the picture",
          "picture": "draw data/results/picture.png",
          "diagrams": "draw notebooks/diagrams",
          "front": "store the best configurations of all searches for `python -m lib deploy`"}
# The pieces of a group that have no file yet: a run that was cut off goes on where it stopped.
MISSING = {"missing": "make", "missing-coa": "coa", "missing-search": "search",
           "missing-edge": "edge", "missing-wikitext": "wikitext",
           "missing-forgetting": "forgetting", "missing-equal": "equal"}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `python -m data.evidence --help`)")


def groups() -> dict[str, dict[str, "Piece"]]:
    """{group: {name: piece}}; imports torch and the trainer."""
    from data.evidence import coa, edge_coa, equal_bytes, forgetting, make, search, wikitext

    return {"make": make.PIECES, "coa": coa.PIECES, "search": search.PIECES,
            "edge": edge_coa.PIECES, "wikitext": wikitext.PIECES,
            "forgetting": forgetting.PIECES, "equal": equal_bytes.PIECES}


def pieces() -> dict[str, "Piece"]:
    """Every piece by its name."""
    return {name: piece for group in groups().values() for name, piece in group.items()}


def aliased(command: str, *words: str) -> int:
    """A command of `python -m lib` that is kept here: bench, slides, site, search."""
    if command == "search":
        from data.evidence import front

        return front.main(words)
    return main([*words] if command == "bench" else [command, *words])


def main(argv: list[str]) -> int:
    """Make what is named; 0, or 2 after one line for the user's mistake."""
    parser = Parser(prog="python -m data.evidence", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="list the names (default)")
    parser.add_argument("--resume", action="store_true",
                        help="for all: leave out what the last round has made")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="also store the result of one benchmark")
    parser.add_argument("--engine", default="", metavar="FILE",
                        help="for serving: a llama-server to compare the wheel's engine with")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="for slides and site; default build/slides or build/site")
    parser.add_argument("--solutions", action="store_true",
                        help="for slides: show solutions below exercises")
    parser.add_argument("--run", default="", choices=sorted(PROFILES),
                        help="for slides: outputs and vector figures of your last run of a profile")
    try:
        args = parser.parse_args(argv)
        require(not args.resume or args.names == ["all"], "--resume is for all, alone")
        require(not args.engine or args.names == ["serving"], "--engine is for serving alone")
        require(not args.json or (len(args.names) == 1 and args.names[0] in BENCHES),
                f"--json is for one benchmark: use one of {', '.join(BENCHES)}")
        if args.json and args.json.exists():  # only a benchmark's figures are replaced
            own = args.json.is_file() and re.match(rb'$|{\n "machine": ', args.json.read_bytes())
            require(own, f"--json {args.json} is there, and no benchmark: name another file")
        if args.names in (["slides"], ["site"]):
            build(args.names[0], args.out or BUILD / args.names[0], args.solutions, args.run)
            return 0
        require(not (args.out or args.solutions or args.run),
                "--out is for slides or site, --solutions and --run for slides, each alone")
        if args.list or not args.names:
            print(listing())
            return 0
        if args.names == ["all"]:
            make_all(args.resume)
            return 0
        if args.engine:
            actions = [lambda: bench("serving", args.json, args.engine)]
        else:
            actions = [action(name, args.json) for name in args.names]
        for act in actions:
            act()
    except Exception as error:
        if not (message := user_message(error)):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


def build(name: str, out: Path, solutions: bool, run: str) -> None:
    """The decks, or the site, of the notebooks as they are stored; decks also as they ran."""
    from data.evidence.site import build_site, build_slides
    from lib.course.notebook import run_directory

    require(name == "slides" or not (solutions or run), "--solutions and --run are for slides")
    if name == "site":
        build_site(out)
    else:
        build_slides(out, solutions=solutions, executed=run_directory(run) if run else None)
    print(f"open {out / 'index.html'}")


def action(name: str, json: Path | None) -> Callable[[], Any]:
    """What a name does.

    Raises:
        UserError: an unknown name.
    """
    if name in BENCHES:
        return lambda: bench(name, json)
    if name in TABLES:
        return lambda: table(name)
    if name in MISSING:
        return lambda: make_missing(MISSING[name])
    known = pieces()
    require(name in known, f"unknown name {name!r}: `python -m data.evidence` lists them")
    from data.evidence.pieces import store

    return lambda: store(name, known[name])


def bench(name: str, json: Path | None, *given: str) -> None:
    """Run a benchmark, print it, and store it if a file is given."""
    result = run_bench(name, *given)
    for key, value in result.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{key:32} {shown}")
    if json:
        write_json(json, result)


def table(name: str) -> None:
    """Write what is made from stored results; trains nothing."""
    if name == "claims":
        from data.evidence.claims import write_claims

        write_claims()
    elif name == "results":
        from data.evidence.tables import results_table

        print(results_table())
    elif name == "readme":
        from data.evidence.tables import write_readme

        write_readme()
    elif name == "picture":
        from data.evidence.picture import draw
        from data.evidence.pieces import RESULTS

        draw(RESULTS)
    elif name == "diagrams":
        from data.evidence.diagrams import write_diagrams

        write_diagrams()
    else:
        from data.evidence.search import store_front

        store_front()


def make_missing(group: str) -> None:
    """Make the pieces of a group that are not stored, in order."""
    from data.evidence.pieces import RESULTS, store

    for name, piece in groups()[group].items():
        if not (RESULTS / f"{piece.file}.json").is_file():
            store(name, piece)


def make_all(resume: bool) -> None:
    """Make every piece again, in order; with `resume` those that this round lacks."""
    from data.evidence.pieces import RESULTS, WORK, store

    known, journal = pieces(), WORK / "all.json"
    done = read_json(journal) if resume and journal.is_file() else []
    left = {name: piece for name, piece in known.items() if name not in done}
    stored = [read_json(RESULTS / f"{piece.file}.json")["piece_seconds"]
              for piece in left.values() if (RESULTS / f"{piece.file}.json").is_file()]
    print(f"{len(left)} of {len(known)} pieces to make; the {len(stored)} of them that are stored "
          f"took {sum(stored) / 3600:.0f} hours")
    failed = []
    write_json(journal, done)  # a new round has begun, even if its first piece is killed
    for name, piece in left.items():
        try:
            store(name, piece)
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        done.append(name)
        write_json(journal, done)
    require(not failed, f"{', '.join(failed)} could not be made, as said above, so what reads them "
            "read old ones: mend it, and start `all` again")


def listing() -> str:
    """All names, for people."""
    lines = ["Tables and files made from stored results:"]
    lines += [f"  {name:16} {what}" for name, what in TABLES.items()]
    lines += [f"Benchmarks: {' '.join(BENCHES)}",
              "Stored results; `all` makes every one again, `all --resume` goes on:"]
    for option, group in MISSING.items():
        names = groups()[group]
        lines += [f"  `{option}` makes those of these without a file:", "  " + " ".join(names)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
