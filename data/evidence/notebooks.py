"""Outputs of an executed notebook go into notebooks/, what they took into the pages.

`python -m lib run --store` calls this after each notebook.
"""

import base64
import hashlib
import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

from lib.course.run import notebooks
from lib.errors import require
from lib.files import replacing

# Rules of thumb for the plan: words and lines of code a minute, minutes for an exercise.
WORDS, LINES, EXERCISE = 110, 15, {"warm-up": 5, "core": 10, "challenge": 15}


def store(executed: Path, source: Path, run: dict[str, Any]) -> None:
    """Store the outputs of one notebook, and update the tables of what the notebooks take."""
    store_outputs(executed, source, run)
    put_table(source.with_name("START.md"), "costs", costs_table())
    put_table(source.with_name("INSTRUCTORS.md"), "costs", costs_table())
    put_table(source.with_name("INSTRUCTORS.md"), "plan", plan_table())


def announce(cell: nbformat.NotebookNode, cell_index: int) -> None:
    """Name the section that begins with this cell, above the progress bar of a terminal."""
    title = cell.cell_type == "markdown" and re.match("## (.+)", cell.source)
    if title and sys.stderr.isatty():
        print(f"\r\x1b[K      {title[1]}", file=sys.stderr, flush=True)


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the code cells: tells whether stored outputs still fit."""
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def takes(run: dict[str, Any]) -> str:
    """The opening's line on what a notebook takes, from a measured run."""
    return (f"**Takes** {run['seconds'] / 60:.1f} minutes and {run['peak_mb'] / 1000:.1f} GB of "
            f"memory on {run['cores']} cores that compute in {run['dtype']}.")


def read_executed(path: Path) -> nbformat.NotebookNode:
    """An executed copy, without the cell of parameters that papermill puts in."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells
                      if "injected-parameters" not in cell.metadata.get("tags", [])]
    return notebook


def with_outputs_of(run: Path, notebook: nbformat.NotebookNode) -> bool:
    """Take the outputs of a run's copy, if it has the same code; False if it has not."""
    if not run.is_file() or source_hash(done := read_executed(run)) != source_hash(notebook):
        return False
    outputs = (cell.outputs for cell in done.cells if cell.cell_type == "code")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = next(outputs)
    return True


def store_outputs(executed: Path, source: Path, run: dict[str, Any]) -> None:
    """Copy the outputs of an executed notebook into its source.

    `run` (profile, machine, cores, dtype, seconds, peak_mb) goes into its metadata, with the
    seconds of each code cell, and into the opening.
    """
    stored, seconds, count = nbformat.read(source, as_version=4), [], 0
    for cell, done in zip(stored.cells, read_executed(executed).cells, strict=True):
        if cell.cell_type != "code":
            continue
        count += 1
        cell.outputs, cell.execution_count = done.outputs, count
        seconds.append(round(done.metadata.get("papermill", {}).get("duration") or 0.0, 1))
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
                output.data.pop("image/svg+xml", None)  # seven times as large
    stored.cells[0].source = re.sub(r"\*\*Takes\*\*.*?(?=\n\n|\Z)",
                                    takes(run), stored.cells[0].source, flags=re.DOTALL)
    stored.metadata["course"] = run | {"source_sha256": source_hash(stored),
                                       "cell_seconds": seconds}
    with replacing(source) as part:
        nbformat.write(stored, str(part))


def costs_table() -> str:
    """What each stored run took, and all of them, as Markdown."""
    runs = {path.stem: nbformat.read(path, as_version=4).metadata.get("course")
            for path in notebooks()}
    rows = [(name, run.seconds, run.peak_mb, run.dtype) for name, run in runs.items() if run]
    rows.append(("all six", sum(r[1] for r in rows), max(r[2] for r in rows),
                 ", ".join(sorted({r[3] for r in rows}))))
    return "| notebook | minutes | memory, GB | computed in |\n|---|---|---|---|\n" + "\n".join(
        f"| {name} | {s / 60:.1f} | {peak / 1e3:.1f} | {dtype} |" for name, s, peak, dtype in rows)


def plan(notebook: nbformat.NotebookNode) -> dict[str, list[float]]:
    """{section or exercise: [minutes by the rules of thumb, seconds that its cells ran]}."""
    rows: dict[str, list[float]] = {}
    seconds = iter(notebook.metadata.get("course", {}).get("cell_seconds", []))
    section = exercise = "Opening"
    for cell in notebook.cells:
        tags = {*cell.metadata.get("tags", [])}
        if heading := re.match(r"## (.+)", cell.source):
            section = heading[1]
        if heading := re.match(r"### (Exercise \d+ \((.+?)\).*)", cell.source):
            exercise = heading[1]
            rows[exercise] = [EXERCISE[heading[2]], 0.0]
        row = rows.setdefault(exercise if tags & {"exercise", "solution"} else section, [0.0, 0.0])
        if cell.cell_type == "code":
            row[1] += next(seconds, 0.0)
        if not tags & {"solution", "instructor"}:
            words = cell.cell_type == "markdown"
            row[0] += (len(cell.source.split()) / WORDS if words
                       else cell.source.count("\n") / LINES)
    return rows


def plan_table() -> str:
    """The plan of every notebook as Markdown."""
    lines = ["| notebook | section | minutes | cells, s |", "|---|---|---|---|"]
    for path in notebooks():
        notebook = nbformat.read(path, as_version=4)
        timed = "cell_seconds" in notebook.metadata.get("course", {})
        lines += [f"| {path.name[:2]} | {name} | {math.ceil(minutes)} "
                  f"| {f'{seconds:.0f}' if timed else '-'} |"
                  for name, (minutes, seconds) in plan(notebook).items()]
    return "\n".join(lines)


def put_table(page: Path, name: str, table: str) -> None:
    """Put a table between the marks of its name in a page; UserError if they are missing."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    require(end, f"{page} lacks the marks of its table of {name}: take it from the repository")
    with replacing(page) as part:
        part.write_text(f"{before}{begin}{table}\n{end}{after}", encoding="utf-8", newline="\n")


def smaller(picture: str) -> str:
    """A PNG in base64 with at most 256 colours: half the bytes, the palette's colours kept."""
    full = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    file = io.BytesIO()
    # Other methods merge colours that cover few pixels, such as markers.
    full.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        file, "PNG", optimize=True)
    return min(base64.b64encode(file.getvalue()).decode(), picture, key=len)
