"""The decks: every cell is there, nothing is remote, and each step fits a screen."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from browser import ask, needs_browser
from bs4 import BeautifulSoup
from conftest import ROOT
from links import faults

from lib import course, measure, pages, slides
from lib.artifacts import verified
from lib.course import cell_seconds, notebooks, source_hash
from lib.pages import described
from lib.slides import plan, steps

ALL = notebooks()
each = pytest.mark.parametrize("path", ALL, ids=[p.stem for p in ALL])
FIGURE = nbformat.v4.new_output("display_data", {"image/png": "AAAA", "text/plain": "<Figure>"})


def text(source, slide="-", *tags):
    return nbformat.v4.new_markdown_cell(
        source, metadata={"slideshow": {"slide_type": slide}, "tags": list(tags)})


def code(source, *tags, printed="", figure=False):
    outputs = [nbformat.v4.new_output("stream", text=printed)] if printed else []
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)},
                                     outputs=outputs + [FIGURE] * figure)


def shown(*cells, **options):
    """The sources on each step, with what kind of a step it is."""
    made = steps(nbformat.v4.new_notebook(cells=[text("# T", "slide"), *cells]), **options)
    return [(s.cells[0].metadata.slideshow.slide_type, *(c.source for c in s.shown))
            for s in made[1:]]


def letters(words: str) -> str:
    return re.sub(r"[\s¶]", "", words)


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    """All decks, and their pages as (slides, notes)."""
    out = tmp_path_factory.mktemp("deck") / "slides"
    slides.build(out)
    found = {}
    for path in ALL:
        soup = BeautifulSoup((out / f"{path.stem}.slides.html").read_text(), "html.parser")
        notes = "".join(note.extract().get_text() for note in soup.select("aside.notes"))
        found[path.stem] = letters(soup.select_one(".slides").get_text()), letters(notes)
    return out, found


def test_nothing_is_remote_and_no_link_is_dead(decks):
    out, _ = decks
    assert faults(out) == []
    assert (out / "reveal.js" / "LICENSE").is_file()
    assert verified(out)


@each
def test_every_cell_is_in_the_deck(path, decks):
    out, found = decks
    visible, notes = found[path.stem]
    raw = (out / f"{path.stem}.slides.html").read_text()
    at = 0
    for cell in nbformat.read(path, as_version=4).cells:
        own = (pages.relinked(pages.markdown(cell.source)) if cell.cell_type == "markdown"
               else None)
        wanted = letters(BeautifulSoup(own, "html.parser").get_text() if own else cell.source)
        if {"solution", "instructor"} & set(cell.metadata.get("tags", [])):
            assert wanted in notes
            assert cell.cell_type == "markdown" or wanted not in visible
            continue
        at = visible.find(wanted, at)
        assert at >= 0, cell.source
        at += len(wanted)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                assert data["image/png"].strip() in raw
            elif "text" in output:
                assert letters(output.text) in visible[at:]


def test_formulas_are_drawn_without_a_script(decks):
    out, _ = decks
    for path in ALL:
        page = BeautifulSoup((out / f"{path.stem}.slides.html").read_text(), "html.parser")
        assert all(s["src"].startswith(("reveal.js/", "deck.js"))
                   for s in page.select("script[src]"))
        assert not re.search(r"(?<!\\)\$[A-Za-z\\][^$\n]*\$",
                             " ".join(p.get_text() for p in page.select("p, li")))
    first = BeautifulSoup((out / "01_lora_math.slides.html").read_text(), "html.parser")
    assert len(first.select("math")) > 50 and first.select("math mfrac")


def test_a_text_leads_to_its_code_and_a_heading_opens_a_section():
    assert shown(text("## One", "slide"), code("a"), text("Then"), code("b"),
                 text("Done.")) == [("slide", "## One", "a"), ("subslide", "Then", "b", "Done.")]
    # A heading within a cell opens one as well.
    assert shown(code("a"), text("So.\n\n## Two\n\nText"), code("b")) == [
        ("subslide", "a", "So."), ("slide", "## Two\n\nText", "b")]


def test_what_is_too_long_goes_on_below():
    long = "\n".join(f"x{i} = {i}" for i in range(15))
    assert shown(text("Look"), code(long), code(long)) == [
        ("subslide", "Look", long), ("subslide", long)]
    # A figure has a step of its own, with its words; what follows them does not stay.
    assert shown(text("Draw"), code("plot", figure=True), text("*In words:* up.\n\nNext we"),
                 code("c")) == [
        ("subslide", "Draw", "plot"), ("subslide", "plot", "*In words:* up."),
        ("subslide", "Next we", "c")]


def test_solutions_are_notes_unless_they_are_asked_for():
    cells = [text("## S", "slide"), code("a"),
             text("### Exercise 1 (core): do", "slide", "exercise"), code("stub", "exercise"),
             text("**A solution.**", "skip", "solution"),
             code("solved", "solution"), text("We go on"), code("b")]
    hidden = shown(*cells)
    assert hidden[1:] == [("slide", "### Exercise 1 (core): do", "stub"),
                          ("slide", "We go on", "b")]
    assert shown(*cells, solutions=True)[2] == ("subslide", "**A solution.**", "solved")
    made = steps(nbformat.v4.new_notebook(cells=[text("# T"), *cells]))
    # After an exercise the section before it goes on.
    assert [s.head for s in made] == ["T", "S", "Exercise 1 (core): do", "S"]


def test_an_instructors_cell_is_a_note():
    made = steps(nbformat.v4.new_notebook(cells=[
        text("first of all", "-", "instructor"), text("# T"), text("mind this", "-", "instructor"),
        text("## S"), code("a")]))
    assert [[c.source for c in s.cells] for s in made] == [
        ["# T", "first of all", "mind this"], ["## S", "a"]]
    page = slides.deck(nbformat.v4.new_notebook(), made)
    notes = [n.get_text() for n in BeautifulSoup(page, "html.parser").select("aside.notes")]
    assert "first of all" in notes[0] and any("mind this" in note for note in notes)


def test_the_plan_counts_talk_exercises_and_measured_cells():
    cells = [text("## S", "slide"), code("a"), text("### Exercise 1 (core): do", "-", "exercise")]
    short = plan(steps(nbformat.v4.new_notebook(cells=cells)))
    cells[1].metadata["seconds"] = 600.0
    long = plan(steps(nbformat.v4.new_notebook(cells=cells)))
    assert [row[:2] for row in long] == [("S", 1), ("Exercise 1 (core): do", 1)]
    assert short[0][2] < 1 and long[0][2:] == (10, 600)
    assert short[1] == long[1] and slides.EXERCISE["core"] <= long[1][2] < 12
    page = slides.deck(nbformat.v4.new_notebook(), steps(nbformat.v4.new_notebook(cells=cells)))
    assert 'data-timing="600"' in page


def test_seconds_of_cells_are_those_of_this_very_code(tmp_path, monkeypatch):
    books = tmp_path / "notebooks"
    books.mkdir()
    monkeypatch.setattr(course, "NOTEBOOKS", books)
    monkeypatch.setattr(measure, "BUILD", tmp_path / "build")
    notebook = nbformat.v4.new_notebook(cells=[
        text("# One\n\n## Slow", "slide"), code("wait()"), text("## Fast"), code("go()")])
    nbformat.write(notebook, books / "01_one.ipynb")
    assert cell_seconds(books / "01_one.ipynb") == []
    figures = tmp_path / "build" / "course" / "laptop" / "01.json"
    figures.parent.mkdir(parents=True)
    figures.write_text(json.dumps({"cells": {
        "source_sha256": source_hash(notebook), "seconds": [90.0, 0.1]}}))
    assert cell_seconds(books / "01_one.ipynb") == [90.0, 0.1]
    slides.build(tmp_path / "deck")
    assert "<td>Slow</td>\n<td>1</td>\n<td>2</td>\n<td>90</td>" in (
        tmp_path / "deck" / "index.html").read_text()
    notebook.cells[1].source = "wait(2)"
    nbformat.write(notebook, books / "01_one.ipynb")
    assert cell_seconds(books / "01_one.ipynb") == []


def test_the_guide_says_what_the_notebooks_took():
    guide = (ROOT / "notebooks" / "INSTRUCTORS.md").read_text(encoding="utf-8")
    runs = {path.stem: nbformat.read(path, as_version=4).metadata.course for path in ALL}
    rows = [f"| {name} | {run.seconds / 60:.1f} | {run.peak_mb / 1e3:.1f} | {run.dtype} |"
            for name, run in runs.items()]
    assert "\n".join(rows) in guide
    # The plans add up.
    sums = [sum(int(m) for m in re.findall(r"(?m)^\| (\d+) \|", part))
            for part in re.split(r"\| minutes \| (?:what|day \d) ", guide)[1:]]
    assert sums == [90, 300, 300]


def numbers_after(word: str, text: str) -> list[int]:
    """1, 2, 3 and 6 of "sections 1 to 3 and 6"."""
    named = re.search(word + r"s? ((?:\d+(?: to |, | and )?)+)", text)
    found = []
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", named[1] if named else ""):
        found += range(int(first), int(last or first) + 1)
    return found


def test_the_guide_gives_each_line_the_minutes_of_its_sections():
    guide = (ROOT / "notebooks" / "INSTRUCTORS.md").read_text(encoding="utf-8")
    planned = {path.stem[:2]: plan(steps(described(nbformat.read(path, as_version=4))))
               for path in ALL}
    checked = 0
    for minutes, name, rest in re.findall(r"(?m)^\| (\d+) \| .+ \| (\d\d)(, .+) \|$", guide):
        heads = ([f"{i}. " for i in numbers_after("section", rest)]
                 + [f"Exercise {i} " for i in numbers_after("exercise", rest)])
        assert heads or "with its exercises" in rest
        wanted = [row[2] for row in planned[name]
                  if not heads or row[0].startswith(tuple(heads))]
        assert len(wanted) == (len(heads) or len(planned[name])), rest
        assert int(minutes) >= sum(wanted), f"{name}{rest} needs {sum(wanted):.0f}"
        checked += 1
    assert checked == len(re.findall(r"(?m)^\| \d+ \| .+ \| \d\d\b", guide)) >= 14


MEASURE = """
const faults = [];
for (const slide of deck.getSlides()) {
  const {h, v} = deck.getIndices(slide);
  deck.slide(h, v || 0, 999);
  const box = slide.getBoundingClientRect(), at = `${h}.${v}: `;
  if (box.width < 1270 || box.height < 710) faults.push(at + "drawn small");
  const first = slide.querySelector("p, h1, h2, h3, pre, img").getBoundingClientRect();
  const seen = document.elementFromPoint(first.left + 3, first.top + 3);
  if (!slide.contains(seen)) faults.push(at + "not seen");
  if (parseFloat(getComputedStyle(slide).fontSize) < 0.65 * 26) faults.push(at + "tiny");
  for (const part of slide.querySelectorAll("*:not(aside, aside *)")) {
    const {left, right, top, bottom} = part.getBoundingClientRect();
    if (left < box.left || top < box.top || right > box.left + 1280 || bottom > box.top + 720)
      faults.push(at + "cut off: " + part.textContent.slice(0, 40));
    if (part.localName === "pre" && part.scrollWidth > part.clientWidth + 1)
      faults.push(at + "too wide: " + part.textContent.slice(0, 40));
  }
}
return [faults, deck.getTotalSlides()];
"""


@needs_browser
@each
def test_no_step_is_cut_off_in_a_browser(path, decks):
    out, _ = decks
    found, count = ask(out / f"{path.stem}.slides.html", MEASURE,
                       ready="document.body && document.body.dataset.fitted")
    assert found == []
    assert count > 10


@needs_browser
def test_the_browser_test_can_fail(decks):
    out, _ = decks
    page = out / "06_evaluation.slides.html"
    worse = out / "worse.slides.html"
    worse.write_text(page.read_text().replace(
        "</h2>", "</h2><p style='width:1400px;height:900px'>Too large.</p>", 1))
    found, _ = ask(worse, MEASURE, ready="document.body && document.body.dataset.fitted")
    worse.unlink()
    assert any("cut off" in fault for fault in found)


def test_a_killed_build_leaves_the_old_decks(decks, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(slides, "deck", stop)
    with pytest.raises(KeyboardInterrupt):
        slides.build(tmp_path / "out")
    assert [p.name for p in Path(tmp_path).rglob("*")] == ["out"]
