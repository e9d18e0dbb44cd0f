"""START, TROUBLESHOOTING and GLOSSARY: what they quote and link to is there."""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from data.evidence.notebooks import costs_table, plan, plan_table
from lib.course.run import notebooks

FOLDER = ROOT / "notebooks"
PAGES = {name: (FOLDER / f"{name}.md").read_text(encoding="utf-8")
         for name in ("START", "TROUBLESHOOTING", "GLOSSARY", "YOURS")}
PAGES["README"] = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> list[str]:
    """Names of a page's headings, by the rule of GitHub."""
    heads = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?s)```.*?```", "", text))
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


def broken(text: str, folder: Path, own: str = "") -> list[str]:
    """Links to files that are not there, or to headings that their page lacks."""
    wrong = []
    for link in LINK.findall(re.sub(r"(?s)```.*?```|`[^`]*`", "", text)):
        name, _, anchor = link.partition("#")
        if link.startswith(("https://", "attachment:")):
            continue
        file = folder / name
        page = own if not name else (
            file.read_text(encoding="utf-8") if anchor and file.is_file() else "")
        if (name and not file.exists()) or (anchor and anchor not in anchors(page)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    folder = ROOT if name == "README" else FOLDER
    assert broken(PAGES[name], folder, PAGES[name]) == []


def test_links_of_notebooks_lead_somewhere() -> None:
    for path in notebooks():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                assert broken(cell.source, FOLDER) == [], path.name


def entries() -> dict[str, str]:
    """{term: what the glossary says}."""
    parts = re.split(r"(?m)^## (.+)\n", PAGES["GLOSSARY"])[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_terms_are_sorted_and_their_anchors_unique() -> None:
    terms = re.findall(r"(?m)^## (.+)$", PAGES["GLOSSARY"])
    assert len(terms) > 50 and terms == sorted(terms)
    assert len({*anchors(PAGES["GLOSSARY"])}) == len(terms) + 1
    # Some renderers keep capitals and signs in an anchor: there must be none.
    assert [t for t in terms if not re.fullmatch(r"[a-z0-9_ -]+", t)] == []


def said_by(sources: list[Path]) -> list[str]:
    """Every text of a source; what is filled in is one NUL."""
    texts = []
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0"
                                     for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return [text.replace("{}.{}", "\0") for text in texts]


OURS = said_by(sorted((ROOT / "lib").rglob("*.py")))


def quoted() -> list[str]:
    """Our messages, as the page quotes them."""
    blocks = re.findall(r"(?s)```text\n(.*?)```", PAGES["TROUBLESHOOTING"])
    return [line for block in blocks for line in block.splitlines()]


def is_said(message: str, texts: list[str]) -> bool:
    """Some text has the parts of a message between its dots, in order."""
    parts = [re.escape(p) for p in message.removeprefix("error: ").split("...") if p]
    # A dot stands for something that is filled in, and maybe for signs around it.
    pattern = "\\W*\0.*?".join(parts)
    return any(re.search(pattern, text, re.DOTALL) for text in texts)


@pytest.mark.parametrize("message", quoted())
def test_our_messages_are_quoted_as_they_are(message: str) -> None:
    assert message.startswith(("error: ", "stopped: ")) and len(message) > 25
    assert is_said(message, OURS)


def test_every_trouble_has_a_cause_or_a_remedy() -> None:
    parts = re.split(r"(?m)^### (.+)\n", PAGES["TROUBLESHOOTING"])[1:]
    troubles = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(troubles) > 30
    for name, text in troubles.items():
        assert "**Cause.**" in text or "**Remedy.**" in text, name


@pytest.mark.parametrize(("name", "table"), [("START", costs_table), ("INSTRUCTORS", costs_table),
                                             ("INSTRUCTORS", plan_table)])
def test_pages_tell_what_the_stored_runs_took(name: str, table: Callable[[], str]) -> None:
    """`python -m lib run --store` writes them; by hand: data.evidence.notebooks.put_table."""
    assert f"-->\n{table()}\n<!-- end of" in (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def numbers_after(word: str, text: str) -> list[int]:
    """1, 2, 3 and 6 of "sections 1 to 3 and 6"."""
    named = re.search(word + r"s? ((?:\d+(?: to |, | and )?)+)", text)
    numbers: list[int] = []
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", named[1] if named else ""):
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def test_the_guide_gives_each_line_the_minutes_of_its_sections() -> None:
    guide = (FOLDER / "INSTRUCTORS.md").read_text(encoding="utf-8")
    plans = {path.name[:2]: plan(nbformat.read(path, as_version=4)) for path in notebooks()}
    lines = re.findall(r"(?m)^\| (\d+) \| .+ \| (\d\d)(, .+) \|$", guide)
    assert len(lines) >= 14
    for minutes, name, rest in lines:
        heads = ([f"{i}. " for i in numbers_after("section", rest)]
                 + [f"Exercise {i} " for i in numbers_after("exercise", rest)])
        wanted = [row[0] for title, row in plans[name].items()
                  if not heads or title.startswith(tuple(heads))]
        assert len(wanted) == (len(heads) or len(plans[name])), rest
        assert int(minutes) >= sum(wanted), f"{name}{rest} needs {sum(wanted):.0f}"
    sums = [sum(int(m) for m in re.findall(r"(?m)^\| (\d+) \|", part))
            for part in re.split(r"\| minutes \| (?:what|day \d) ", guide)[1:]]
    assert sums == [90, 300, 300]
