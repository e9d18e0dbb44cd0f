"""A deck for each notebook: steps that fit a screen, speaker notes, a plan of the time."""

import copy
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from itertools import groupby
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter
from nbformat import NotebookNode

from lib.artifacts import writing
from lib.course import cell_seconds, notebooks, read_notebook
from lib.pages import TEMPLATES, described, exporter, relinked, text_page

REVEAL = ("reveal.js", "reveal.css", "plugin/notes.js", "theme/white.css")
# Lines that a screen takes without shrinking, and shrunk a little so that a text
# stays with its code; letters in a line.
ROWS, FULL, COLUMNS = 21, 26, 92
FIGURE = 16             # lines as high as a figure
# Rules of thumb for the plan, not measurements: words and lines of code in a
# minute of talk, the least seconds of a step, minutes for an exercise of each level.
WORDS, LINES, LEAST = 110, 15, 30
EXERCISE = {"warm-up": 5, "core": 10, "challenge": 15}
# Headings, one below the other, with the text to the next heading.
PIECES = re.compile(r"\s*(?:^##+ [^\n]*\n+)*.+?(?=\n##+ |\Z)", re.MULTILINE | re.DOTALL)


@dataclass
class Step:
    """What is on the screen at one time: its cells, and the section it belongs to."""

    cells: list[NotebookNode]
    head: str
    opens: bool
    practice: bool

    @property
    def shown(self) -> list[NotebookNode]:
        """Its cells without the speaker's."""
        return [c for c in self.cells if c.metadata.slideshow.slide_type != "notes"]

    @property
    def measured(self) -> float:
        """Seconds that its cells ran."""
        return sum(c.metadata.get("seconds", 0) for c in self.shown)

    @property
    def planned(self) -> float:
        """Seconds to plan. One talks while a cell runs: the longer of the two counts."""
        talk = sum(60 * (len(c.source.split()) / WORDS if c.cell_type == "markdown" else
                         c.source.count("\n") / LINES) for c in self.shown)
        level = re.match(r"### Exercise \d+ \((.+?)\)", self.cells[0].source)
        return max(talk, self.measured, LEAST) + 60 * (EXERCISE.get(level[1], 0) if level else 0)


def height(cell: NotebookNode) -> float:
    """Lines that a cell takes on the screen, roughly; the browser settles the rest."""
    def lines(text: str) -> float:
        return sum(max(1, math.ceil(len(x) / COLUMNS)) for x in text.splitlines())

    if cell.cell_type == "markdown":
        # Lists and tables keep their lines, other paragraphs flow.
        return sum(lines(part if part[:1] in "|-1" else " ".join(part.split())) + 0.5
                   for part in cell.source.split("\n\n"))
    made = 0.0 if cell.metadata.get("transient") else lines(cell.source) + 1
    for output in cell.outputs:
        data = output.get("data", {})
        made += FIGURE if "image/png" in data else lines(
            output.get("text") or data.get("text/markdown") or data.get("text/plain", ""))
    return made


def pieces(cell: NotebookNode) -> Iterator[NotebookNode]:
    """A cell, cut before headings, after the words to a figure, and before a figure."""
    parts = [copy.deepcopy(cell)]
    if cell.cell_type == "markdown":
        texts = PIECES.findall(cell.source)
        if _is_words(cell):
            texts[:1] = texts[0].partition("\n\n")[::2]
        texts = [text.strip() for text in texts if text.strip()]
        parts = [copy.deepcopy(cell) for _ in texts]
        for part, text in zip(parts, texts, strict=True):
            part.source = text
    elif any("image/png" in output.get("data", {}) for output in cell.outputs):
        parts.append(copy.deepcopy(cell))
        parts[0].outputs = []
        parts[1].metadata |= {"transient": {"remove_source": True}, "seconds": 0}
    for number, part in enumerate(parts):
        part.id = f"{cell.id}-{number}" if number else cell.id
        yield part


def _is_words(cell: NotebookNode | None) -> bool:
    return cell is not None and bool(re.match(r"\*+In words", cell.source))


def steps(notebook: NotebookNode, *, solutions: bool = False) -> list[Step]:
    """The notebook's cells, a screen of them at a time.

    A heading opens a section (to the right); a text, a figure or a full screen
    the next step (downward). Cells tagged `instructor` are speaker notes, and
    so are solutions, unless they are wanted below their exercises.
    """
    made: list[Step] = []
    waiting: list[NotebookNode] = []  # notes that stand before the first slide
    cells = [piece for cell in notebook.cells for piece in pieces(cell)]
    for cell, after in zip(cells, [*cells[1:], None], strict=True):
        tags, stored = cell.metadata.get("tags", []), cell.metadata.get("slideshow", {})
        if "instructor" in tags or ("solution" in tags and not solutions):
            cell.metadata["slideshow"] = nbformat.from_dict({"slide_type": "notes"})
            (made[-1].cells if made else waiting).append(cell)
            continue
        practice = bool({"exercise", "solution"} & set(tags))
        heading = re.match(r"(?:##? |### Exercise )", cell.source)
        heading = heading if cell.cell_type == "markdown" else None
        opens = bool(not made or heading or stored.get("slide_type") == "slide"
                     or (made[-1].practice and not practice))
        joins = not opens and _joins(cell, after, made[-1])
        cell.metadata["slideshow"] = nbformat.from_dict({
            "slide_type": "slide" if opens else "subslide" if not joins else
            "fragment" if cell.cell_type == "markdown" else "-"})
        if joins:
            made[-1].cells.append(cell)
            continue
        before = [s.head for s in made if s.practice == practice] or [""]
        head = cell.source.splitlines()[0].lstrip("# ") if heading else before[-1]
        made.append(Step([cell, *waiting], head, opens, practice))
        waiting = []
    return made


def _joins(cell: NotebookNode, after: NotebookNode | None, step: Step) -> bool:
    """Whether a cell goes on the screen that is there."""
    figure = bool(step.shown[-1].metadata.get("transient"))
    if figure or cell.metadata.get("transient"):
        return figure and _is_words(cell)
    # A text before code leads to it. Another one closes what is on the screen.
    leads = cell.cell_type == "markdown" and after is not None and after.cell_type == "code"
    if step.cells[0].source.startswith("# ") and cell.cell_type == "code":
        return False  # the title stands alone
    alone = all(c.cell_type == "markdown" for c in step.shown)
    most = FULL if alone or cell.cell_type == "markdown" else ROWS
    return not leads and sum(map(height, [*step.shown, cell])) <= most


def deck(notebook: NotebookNode, found: list[Step]) -> str:
    """The page of a deck. Each step carries its section's name and its planned seconds."""
    cells = []
    for step in found:
        step.cells[0].metadata.slideshow["data"] = {"head": step.head,
                                                    "timing": str(round(step.planned))}
        cells += step.cells
        if step.opens:
            row = next(r for r in plan(found) if r[0] == step.head)
            note = nbformat.v4.new_markdown_cell(
                f"Section: {row[1]} steps, about {row[2]:.0f} minutes.",
                metadata={"slideshow": {"slide_type": "notes"}})
            cells.append(note)
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # else random where a cell was cut: every build differs
    made = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    return exporter("deck", SlidesExporter, reveal_url_prefix="reveal.js", reveal_theme="white",
                    exclude_input_prompt=True, exclude_output_prompt=True,
                    ).from_notebook_node(made, {"metadata": {"name": found[0].head}})[0]


def plan(found: list[Step]) -> list[tuple[str, int, float, float]]:
    """(section, steps, planned minutes, measured seconds of its cells) in order."""
    order = list(dict.fromkeys(step.head for step in found))
    parts = groupby(sorted(found, key=lambda s: order.index(s.head)), key=lambda s: s.head)
    rows = ((head, list(group)) for head, group in parts)
    return [(head, len(group), sum(s.planned for s in group) / 60,
             sum(s.measured for s in group)) for head, group in rows]


def build(out: Path, *, solutions: bool = False) -> dict[str, float]:
    """Write the decks, with all that they load, and an index with the plan of the time.

    Returns:
        {notebook: planned minutes}.
    """
    minutes, text = {}, ["# Slides\n"]
    with writing(out) as part, as_file(files("pyreveal") / "revealjs") as reveal:
        for name in ("LICENSE", *(f"dist/{file}" for file in REVEAL)):
            (part / "reveal.js" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(reveal / name, part / "reveal.js" / name)
        shutil.copyfile(TEMPLATES / "deck" / "static" / "deck.js", part / "deck.js")
        for path in notebooks():
            notebook = described(read_notebook(path))
            seconds = cell_seconds(path)
            code = (c for c in notebook.cells if c.cell_type == "code")
            for cell, took in zip(code, seconds, strict=False):
                cell.metadata["seconds"] = took
            found = steps(notebook, solutions=solutions)
            name = f"{path.stem}.slides.html"
            (part / name).write_text(relinked(deck(notebook, found)), encoding="utf-8")
            rows = plan(found)
            minutes[path.stem] = sum(row[2] for row in rows)
            text.append(_plan_table(name, rows, notebook, bool(seconds)))
        (part / "index.html").write_text(text_page("\n".join(text)), encoding="utf-8")
    return minutes


def _plan_table(name: str, rows: list[tuple[str, int, float, float]], notebook: NotebookNode,
                measured: bool) -> str:
    """A notebook's plan in Markdown."""
    course = notebook.metadata.get("course", {})
    took = (f" Its cells ran {course.seconds / 60:.1f} minutes in the {course.profile} profile."
            if course else "")
    lines = [f"\n## [{rows[0][0]}]({name})\n",
             f"About {sum(row[2] for row in rows):.0f} minutes.{took}\n",
             "| section | steps | minutes | cells, s |", "|---|---|---|---|"]
    lines += [f"| {head} | {count} | {planned:.0f} | {f'{ran:.0f}' if measured else '-'} |"
              for head, count, planned, ran in rows]
    return "\n".join(lines)
