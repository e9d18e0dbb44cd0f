"""Run the notebooks in order and keep what came out."""

import base64
import hashlib
import html
import io
import os
import re
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from PIL import Image
from traitlets.config import Config

from lib.artifacts import ROOT, read_json, write_json
from lib.base_model import machine
from lib.doctor import course_files, stored_costs
from lib.errors import UserError, require
from lib.measure import peak_memory, run_directory
from lib.pages import notebook_page
from lib.profiles import get_profile
from lib.scratch import replacing, saving, scratch

NOTEBOOKS = ROOT / "notebooks"
CELL_TIMEOUT = 3600


def notebooks(only: str = "") -> list[Path]:
    """The course's notebooks in order, or the one whose number is `only`."""
    found = course_files(NOTEBOOKS)
    if only:
        numbers = ", ".join(p.name[:2] for p in found)
        found = [p for p in found if p.name.startswith(f"{only:0>2}_")]
        require(found, f"no notebook {only!r}: use one of {numbers}")
    return found


def run(profile: str, *, only: str = "", store: bool = False) -> Path:
    """Execute the notebooks; executed copies, index.html and NN.json in a folder.

    Args:
        profile: size of the run, see `lib.profiles`.
        only: number of a single notebook.
        store: also write the outputs back into notebooks/.

    Raises:
        UserError: unknown profile or number, or a cell that failed.
    """
    get_profile(profile)
    # The kernels read it, too: one name for the whole run.
    os.environ["COURSE_PROFILE"] = profile
    out = run_directory(profile)
    chosen = notebooks(only)
    for source in chosen:
        read_notebook(source)  # a damaged one shows before the first has run
    with saving(out):
        out.mkdir(parents=True, exist_ok=True)
        for number, source in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {source.stem} ...", flush=True)
            start = time.monotonic()
            with peak_memory(0.5, children=True) as peak:
                execute(source, out / source.name, profile)
            cost = {"seconds": round(time.monotonic() - start), "peak_mb": round(peak["mb"])}
            print(f"      done in {cost['seconds']} s, peak {cost['peak_mb']} MB", flush=True)
            keep_cost(out / f"{source.name[:2]}.json", cost, source, out / source.name)
            if store:
                keep_outputs(out / source.name, source, {"profile": profile} | machine() | cost)
        if store:
            for name in ("START.md", "INSTRUCTORS.md"):
                keep_table(NOTEBOOKS / name)
        for page in NOTEBOOKS.glob("*.md"):  # what the notebooks link to
            with replacing(out / page.name) as part:
                part.write_bytes(page.read_bytes())
        write_index(out)
    return out


def execute(source: Path, target: Path, profile: str) -> None:
    """Run one notebook with papermill into `target`, then as HTML beside it."""
    part = target.with_name(f".{target.name}")
    try:
        with scratch() as place:  # else a killed run leaves its file among Jupyter's own
            papermill.execute_notebook(
                source, part, parameters={"PROFILE": profile}, cwd=str(source.parent),
                kernel_name="python3", progress_bar=False, execution_timeout=CELL_TIMEOUT,
                config=Config(KernelManager={"connection_file": str(place / "kernel.json")}),
                # Kernels talk over loopback, and warn that it is not encrypted.
                extra_arguments=["--IPKernelApp.log_level=40"])
    except papermill.PapermillExecutionError as error:
        last = error.evalue.strip().splitlines()[-1:] or [""]
        raise UserError(
            f"{source.name}, cell {error.cell_index}: {error.ename}: {last[0][:200]} "
            f"(the executed copy is {part})") from error
    except DeadKernelError as error:
        raise UserError(
            f"{source.name}: its kernel died, most often for lack of memory: close other "
            f"programs and go on with --only {source.name[:2]}") from error
    except CellTimeoutError as error:
        raise UserError(f"{source.name}: a cell took over {CELL_TIMEOUT} s: "
                        "use a smaller --profile") from error
    part.replace(target)
    made = notebook_page(read_notebook(target))
    with replacing(target.with_suffix(".html")) as page:
        page.write_text(made, encoding="utf-8")


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook; UserError names the file that is none."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # of many kinds
        raise UserError(f"{path} is no notebook ({' '.join(str(error).split())[:80]}): "
                        "take it from the repository") from error


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the code cells: tells whether stored outputs still fit."""
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def keep_cost(figures: Path, cost: dict[str, int], source: Path, executed: Path) -> None:
    """What the whole notebook and each cell took, beside what it measured itself."""
    if figures.is_file():
        took = [round(c.metadata.get("papermill", {}).get("duration") or 0.0, 3)
                for c in own_cells(read_notebook(executed))
                if c.cell_type == "code"]
        digest = source_hash(read_notebook(source))
        write_json(figures, read_json(figures) | {
            "whole_run": cost, "cells": {"source_sha256": digest, "seconds": took}})


def cell_seconds(source: Path) -> list[float]:
    """What each code cell took in the last laptop run of this very code; empty without one."""
    figures = run_directory("laptop") / f"{source.name[:2]}.json"
    kept = read_json(figures).get("cells", {}) if figures.is_file() else {}
    same = kept.get("source_sha256") == source_hash(read_notebook(source))
    return kept["seconds"] if same else []


def own_cells(executed: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells of an executed copy without the one that papermill put in."""
    return [c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])]


def takes(run: dict[str, Any]) -> str:
    """The opening's line on what a notebook takes, from a measured run."""
    return (f"**Takes** {run['seconds'] / 60:.1f} minutes and {run['peak_mb'] / 1000:.1f} GB of "
            f"memory on {run['cores']} cores that compute in {run['dtype']}.")


def keep_outputs(executed: Path, source: Path, run: dict[str, Any]) -> None:
    """Copy outputs of an executed notebook into its source; of the rest only `run` stays.

    It (profile, machine, cores, dtype, seconds, peak_mb) goes into metadata and opening.
    """
    made, kept = read_notebook(executed), read_notebook(source)
    for cell, done in zip(kept.cells, own_cells(made), strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
    for count, cell in enumerate((c for c in kept.cells if c.cell_type == "code"), 1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    kept.cells[0].source = re.sub(r"\*\*Takes\*\*.*?(?=\n\n|\Z)",
                                  takes(run), kept.cells[0].source, flags=re.DOTALL)
    kept.metadata["course"] = run | {"source_sha256": source_hash(kept)}
    with replacing(source) as part:
        nbformat.write(kept, str(part))


def costs_table() -> str:
    """What each stored run took, and all of them, as Markdown."""
    costs = stored_costs(NOTEBOOKS)
    rows = [(name, c["seconds"], c["peak_mb"], c["dtype"]) for name, c in costs.items()]
    rows.append(("all six", sum(r[1] for r in rows), max(r[2] for r in rows),
                 ", ".join(sorted({r[3] for r in rows}))))
    return "| notebook | minutes | memory, GB | computed in |\n|---|---|---|---|\n" + "\n".join(
        f"| {name} | {s / 60:.1f} | {peak / 1e3:.1f} | {dtype} |" for name, s, peak, dtype in rows)


def keep_table(page: Path) -> None:
    """Put `costs_table` in its place in a page, if there is one."""
    if page.is_file():
        put_table(page, "costs", costs_table())


def put_table(page: Path, name: str, table: str) -> None:
    """Put a table between the marks of its name in a page.

    Raises:
        UserError: a page without the marks; it stays as it is.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    require(end, f"{page} lacks the marks of its table of {name}: take it from the repository")
    with replacing(page) as part:
        part.write_text(f"{before}{begin}{table}\n{end}{after}", encoding="utf-8", newline="\n")


def smaller(picture: str) -> str:
    """A PNG in base64 with at most 256 colours: half the bytes, the palette's colours kept."""
    full = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    file = io.BytesIO()
    # Other ways to choose them merge colours that cover few pixels, such as markers.
    full.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        file, "PNG", optimize=True)
    made = base64.b64encode(file.getvalue()).decode()
    return min(made, picture, key=len)


def write_index(out: Path) -> None:
    """One page that links the executed notebooks and lists what they measured."""
    parts = ["<!doctype html><html lang='en'><meta charset='utf-8'>"
             "<title>From LoRA to the edge</title><style>body{font:16px sans-serif;"
             "max-width:60rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}"
             "td,th{padding:.2rem .8rem;border-bottom:1px solid #ccc;text-align:left}"
             "</style><h1>From LoRA to the edge</h1>"
             f"<p>Profile: {html.escape(out.name)}</p>"]
    for page in sorted(out.glob("[0-9][0-9]_*.html")):
        parts.append(f"<h2><a href='{page.name}'>{page.stem}</a></h2>")
        figures = out / f"{page.name[:2]}.json"
        if figures.is_file():
            measured = read_json(figures)
            if cost := measured.get("whole_run"):
                parts.append(f"<p>{cost['seconds']} s, peak {cost['peak_mb']:,} MB</p>")
            parts.append(_table(measured["measured"]))
    target = out / "index.html"
    with replacing(target) as part:
        part.write_text("".join(parts), encoding="utf-8")


def _table(rows: list[dict[str, object]]) -> str:
    body = "".join(
        f"<tr><td>{html.escape(str(r['name']))}<td>{_number(r['value'])}"
        f"<td>{html.escape(str(r['unit']))}" for r in rows)
    return f"<table><tr><th>figure<th>value<th>unit{body}</table>"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
