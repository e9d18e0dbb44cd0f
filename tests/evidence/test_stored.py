"""What is stored: the ledger, the README, the model card and the picture fit the results."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT

import data.evidence.claims  # noqa: F401 (enters every rule)
from data.evidence import __main__ as evidence
from data.evidence import claims_paper as paper
from data.evidence import claims_tutorial as tutorial
from data.evidence import ledger, picture, search, tables
from data.evidence.ledger import NOT_YET, RULES, Stored
from data.evidence.pieces import ADAPTERS, RESULTS, Piece, store
from lib.errors import require
from lib.files import read_json

IDS = [*(f"T{i}" for i in range(1, 17)), *(f"P{i}" for i in range(1, 6)), "F1", "F2"]
KEYS = ["id", "source", "claim", "short", "method", "value", "unit", "interval", "headline",
        "finding", "details", "verdict", "evidence", "command"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def claims() -> list[dict[str, Any]]:
    return read_json(ledger.CLAIMS)


def test_every_claim_is_in_the_ledger_once(claims):
    assert [c["id"] for c in claims] == IDS
    for c in claims:
        assert list(c) == KEYS
        assert c["verdict"] in ledger.VERDICTS
        assert all(c[key].endswith(".") for key in ("claim", "method", "finding"))
        assert len(c["headline"]) <= 90 and len(c["short"]) <= 50
        assert "not run" not in c["headline"] + c["finding"]
        assert c["interval"] is None or c["interval"][0] <= c["value"] <= c["interval"][1]


def test_the_ledger_fits_the_results(claims):
    """Made again by `python -m data.evidence claims` when this fails."""
    assert claims == json.loads(json.dumps(ledger.entries(Stored())))


def test_every_stored_result_names_the_command_that_makes_it(claims):
    by_file = {piece.file: name for name, piece in evidence.pieces().items()}
    for path in RESULTS.rglob("*.json"):
        file = path.relative_to(RESULTS).with_suffix("").as_posix()
        stored = read_json(path)
        assert stored["command"] == f"python -m data.evidence {by_file[file]}"
        assert stored["piece"] == path.stem
    for c in claims:
        assert c["evidence"] or c["verdict"] == NOT_YET
        assert c["command"] == [read_json(ROOT / file)["command"] for file in c["evidence"]]


def test_the_last_notebook_shows_the_ledger(claims):
    """Stored again by `python -m lib run --only 06 --store` when this fails."""
    book = nbformat.read(ROOT / "notebooks" / "06_evaluation.ipynb", as_version=4)
    shown = "\n".join(output.get("data", {}).get("text/markdown", "")
                      for cell in book.cells for output in cell.get("outputs", []))
    for c in claims:
        row = f"| {c['id']} | {c['claim']} | **{c['verdict']}** | {c['finding']} |"
        assert row in shown, c["id"]


@pytest.mark.parametrize(("name", "text"), [
    ("answer", tables.answer_text), ("results", tables.readme_table),
    ("claims", tables.claims_table)])
def test_the_readme_shows_the_stored_results(name, text):
    """Written again by `python -m data.evidence readme` when this fails."""
    assert f"<!-- {name} -->\n{text()}\n<!-- end of {name} -->" in README


def test_the_readme_is_short_and_shows_the_course_working_first():
    assert len(README.encode()) < 9000
    order = ("<!-- answer -->", "python -m lib run", "results/picture.png", "<!-- results -->",
             "notebooks/START.md", "<!-- claims -->")
    assert [*map(README.index, order)] == sorted(map(README.index, order))
    assert len(tables.readme_table().splitlines()) == 6


def test_the_model_card_has_every_adapter_and_the_stored_scores():
    card = (ADAPTERS / "README.md").read_text(encoding="utf-8")
    assert f"<!-- card -->\n{tables.card_table()}\n<!-- end of card -->" in card
    shipped = {path.name for path in ADAPTERS.iterdir() if path.is_dir()}
    assert shipped == set(re.findall(r"`(\w+_(?:coa|lora|qlora))`", card))
    for word in ("**Data.**", "**Use.**", "**Not for**", "**Limits.**", "license: apache-2.0"):
        assert word in card


def test_the_picture_shows_the_stored_results(tmp_path):
    """Drawn again by `python -m data.evidence picture` when this fails."""
    numbers = picture.drawn_numbers(RESULTS)
    assert picture.stamp() == picture.digest(numbers)
    picture.draw(RESULTS, tmp_path / "again.png")
    assert picture.stamp(tmp_path / "again.png") == picture.stamp()
    assert picture.digest(numbers | {"files": {}}) != picture.stamp()


def test_rules_name_pieces_that_can_be_made():
    files = {piece.file for piece in evidence.pieces().values()}
    for one in RULES.values():
        assert {*one.needs, *one.also} <= files, one.id
        assert one.needs and not {*one.needs} & {*one.also}
    assert (paper.METHODS, paper.SEARCHES) == (search.METHODS, search.ALL_SEEDS)


def test_the_modes_are_compared_at_the_best_rates_of_the_first_sweep():
    """It had these rates; those between came after the modes had been trained."""
    first = {"lora": (3e-4, 1e-3, 3e-3, 1e-2), "full": (3e-5, 1e-4, 3e-4, 1e-3)}
    rows = read_json(RESULTS / "sweeps.json")["result"]["learning_rate"].values()
    for mode in ("lora", "full"):
        losses = {row["settings"]["learning_rate"]: row["validation_loss"] for row in rows
                  if row["settings"]["mode"] == mode and row["validation_loss"]}
        for name in tutorial.of_seeds(mode):
            settings = read_json(RESULTS / f"{name}.json")["result"]["settings"]
            assert settings["learning_rate"] == min(first[mode], key=lambda x: losses[x]), name


def test_the_notebooks_verdicts_are_those_of_the_ledger():
    claims = {c["id"]: c["verdict"] for c in read_json(ledger.CLAIMS)}
    seen = set()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            text = "".join(o.get("text", "") for o in cell.get("outputs", []))
            for name, verdict in re.findall(r"(?m)^([TPF]\d+): ([a-z ]+)$", text):
                assert verdict == claims[name], (path.name, name)
                seen.add(name)
    assert len(seen) > 5


def test_the_command_makes_what_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.evidence.pieces.RESULTS", tmp_path)
    monkeypatch.setattr(evidence, "groups", lambda: {
        "make": {"one": Piece("a/one", lambda: {"x": 1}), "two": Piece("two", lambda: {"x": 2})}})
    monkeypatch.setattr("data.evidence.pieces.store", lambda name, piece: store(
        name, piece, tmp_path))
    assert evidence.main(["one"]) == 0
    stored = read_json(tmp_path / "a" / "one.json")
    assert (stored["command"], stored["result"]) == ("python -m data.evidence one", {"x": 1})
    (tmp_path / "a" / "one.json").write_text("{}")
    assert evidence.main(["missing"]) == 0  # only what has no file
    assert read_json(tmp_path / "a" / "one.json") == {} and (tmp_path / "two.json").is_file()
    monkeypatch.setattr(evidence, "run_bench", lambda name: {"bench": name, "ratio": 1.23456})
    assert evidence.main(["dtypes", "--json", str(tmp_path / "bench.json")]) == 0
    assert read_json(tmp_path / "bench.json") == {"bench": "dtypes", "ratio": 1.23456}
    assert "1.235" in capsys.readouterr().out


def stopped(name: str, piece: Piece) -> None:
    raise KeyboardInterrupt


def test_all_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    made, ready = list[str](), list[str]()

    def make(name: str) -> dict[str, Any]:
        require(name != "two" or ready, "two needs what is not installed: install it")
        made.append(name)
        return {"x": len(made)}

    for name in ("RESULTS", "WORK"):
        monkeypatch.setattr(f"data.evidence.pieces.{name}", tmp_path)
    monkeypatch.setattr("data.evidence.pieces.store", lambda name, piece: store(
        name, piece, tmp_path))
    monkeypatch.setattr(evidence, "groups", lambda: {"make": {
        name: Piece(name, functools.partial(make, name)) for name in ("one", "two", "three")}})
    assert evidence.main(["all"]) == 2  # the rest was made
    error = capsys.readouterr().err
    assert made == ["one", "three"] and "two could not be made" in error
    ready.append("two")
    assert evidence.main(["all", "--resume"]) == 0
    assert made == ["one", "three", "two"]
    assert evidence.main(["all", "--resume"]) == evidence.main(["all"]) == 0
    assert made == ["one", "three", "two", "one", "two", "three"]
    monkeypatch.setattr("data.evidence.pieces.store", stopped)
    with pytest.raises(KeyboardInterrupt):
        evidence.main(["all"])  # a new round, killed in its first piece
    assert read_json(tmp_path / "all.json") == []


@pytest.mark.parametrize(("words", "message"), [
    (["nothing"], "unknown name 'nothing'"), (["claims", "--json", "x"], "--json is for one"),
    (["--what"], "unrecognized arguments"), (["one", "--resume"], "--resume is for all"),
    (["all", "qlora"], "unknown name 'all'")])
def test_mistakes_are_one_line(words: list[str], message: str, capsys, monkeypatch,
                               tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert evidence.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not any(tmp_path.iterdir())


def test_without_a_name_it_lists_what_there_is(capsys):
    assert evidence.main([]) == evidence.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("qlora", "search-ours-4", "sensors-coa-0", "serving"))
    names = [name for group in evidence.groups().values() for name in group]
    names += [*evidence.BENCHES, *evidence.TABLES, *evidence.MISSING]
    assert len(names) == len({*names})  # none means two things
