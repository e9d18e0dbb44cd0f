"""Run the notebooks in order, and make a site of the executed copies."""

import importlib
import os
import re
import time
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from traitlets.config import Config

from lib.base.model import machine
from lib.course.notebook import run_directory
from lib.errors import UserError, require
from lib.evaluate.scores import peak_memory
from lib.files import ROOT, read_json, scratch, write_json
from lib.settings import get_profile

NOTEBOOKS = ROOT / "notebooks"


def notebooks(only: str = "") -> list[Path]:
    """The course's notebooks in order, or the one whose number is `only`; no copies of them."""
    paths = sorted(path for path in NOTEBOOKS.glob("*.ipynb")
                   if re.fullmatch(r"\d\d(_[a-z0-9]+)+", path.stem))
    if only:
        numbers = ", ".join(p.name[:2] for p in paths)
        paths = [p for p in paths if p.name.startswith(f"{only:0>2}_")]
        require(paths, f"no notebook {only!r}: use one of {numbers}")
    return paths


def run(profile: str, *, only: str = "", store: bool = False) -> Path:
    """Execute the notebooks; the site of all that were executed, beside the copies and NN.json.

    `store` also writes the outputs back into notebooks/. UserError for a cell that fails.
    """
    get_profile(profile)
    os.environ["COURSE_PROFILE"] = profile  # the kernels read it, too
    out = run_directory(profile)
    selected = notebooks(only)
    for source in selected:
        read_notebook(source)  # report a damaged one before the first is run
    out.mkdir(parents=True, exist_ok=True)
    for number, source in enumerate(selected, 1):
        print(f"[{number}/{len(selected)}] {source.stem} ...", flush=True)
        start = time.monotonic()
        with peak_memory(0.5, children=True) as peak:
            execute(source, out / source.name, profile)
        cost = {"seconds": round(time.monotonic() - start), "peak_mb": round(peak["mb"])}
        print(f"      done in {cost['seconds']} s, peak {cost['peak_mb']} MB", flush=True)
        figures = out / f"{source.name[:2]}.json"
        if figures.is_file():
            write_json(figures, read_json(figures) | {"whole_run": cost})
        if store:  # how the notebooks' own outputs were made is evidence
            importlib.import_module("data.evidence.notebooks").store(
                out / source.name, source, {"profile": profile} | machine() | cost)
    importlib.import_module("data.evidence.site").build_site(out / "site", executed=out)
    return out / "site"


def execute(source: Path, target: Path, profile: str) -> None:
    """Run one notebook with papermill into `target`."""
    part = target.with_name(f".{target.name}")
    try:
        with scratch() as place:  # a killed run would leave its file among Jupyter's own
            papermill.execute_notebook(
                source, part, parameters={"PROFILE": profile}, cwd=str(source.parent),
                kernel_name="python3", progress_bar=False, execution_timeout=3600,
                config=Config(KernelManager={"connection_file": str(place / "kernel.json")}),
                # Kernels talk over loopback, and warn that it is not encrypted.
                extra_arguments=["--IPKernelApp.log_level=40"])
    except papermill.PapermillExecutionError as error:
        last = error.evalue.strip().splitlines()[-1:] or [""]
        raise UserError(f"{source.name}, cell {error.cell_index}: {error.ename}: {last[0][:200]} "
                        f"(the executed copy is {part})") from error
    except DeadKernelError as error:
        raise UserError(f"{source.name}: its kernel died, most often for lack of memory: close "
                        f"other programs and go on with --only {source.name[:2]}") from error
    part.replace(target)


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook; UserError names a file that is not one."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # of many kinds
        raise UserError(f"{path} is not a notebook ({' '.join(str(error).split())[:80]}): "
                        "take it from the repository") from error
