"""Run the notebooks in order, and make a site of the executed copies."""

import importlib
import re
import time
from pathlib import Path

import papermill
from nbclient.exceptions import DeadKernelError

from lib.base.model import machine
from lib.course.notebook import run_directory
from lib.errors import UserError, require
from lib.evaluate.scores import peak_memory
from lib.files import ROOT, read_json
from lib.settings import get_profile

NOTEBOOKS = ROOT / "notebooks"


def notebooks(only: str = "") -> list[Path]:
    """The course's notebooks in order, or the one whose number is `only`; no copies of them."""
    paths = sorted(path for path in NOTEBOOKS.glob("*.ipynb")
                   if re.fullmatch(r"\d\d(_[a-z0-9]+)+", path.stem))
    chosen = [path for path in paths if not only or path.name.startswith(f"{only:0>2}_")]
    require(chosen, f"no notebook {only!r}: use one of {', '.join(p.name[:2] for p in paths)}")
    return chosen


def run(profile: str, *, only: str = "", store: bool = False) -> Path:
    """Execute the notebooks; the site of all that were executed, beside the copies and NN.json.
    `store` also writes the outputs back into notebooks/. UserError for a cell that fails."""
    get_profile(profile)
    out, selected = run_directory(profile), notebooks(only)
    out.mkdir(parents=True, exist_ok=True)
    stored = [read_json(path)["metadata"].get("course", {}).get("seconds", 0) for path in selected]
    for number, source in enumerate(selected, 1):
        left = f", {sum(stored[number - 1:]) / 60:.0f} min to go" * (profile == "laptop")
        print(f"[{number}/{len(selected)}] {source.stem}{left} ...", flush=True)
        start = time.monotonic()
        with peak_memory(0.5, children=True) as peak:
            execute(source, out / source.name, profile)
        cost = {"seconds": round(time.monotonic() - start), "peak_mb": round(peak["mb"])}
        print(f"      done in {cost['seconds']} s, peak {cost['peak_mb']} MB", flush=True)
        if store:  # how the notebooks' own outputs were made is evidence
            importlib.import_module("data.evidence.notebooks").store(
                out / source.name, source, {"profile": profile} | machine() | cost)
    importlib.import_module("data.evidence.site").build_site(out / "site", executed=out)
    return out / "site"


def execute(source: Path, target: Path, profile: str) -> None:
    """Run one notebook with papermill into `target`."""
    part = target.with_name(f".{target.name}")
    try:
        papermill.execute_notebook(
            source, part, {"PROFILE": profile}, cwd=str(source.parent), execution_timeout=3600,
            kernel_name="python3", progress_bar={"desc": source.stem, "disable": None},  # if a tty
            on_cell_start=importlib.import_module("data.evidence.notebooks").announce,
            extra_arguments=["--IPKernelApp.log_level=50", *(  # or it warns, also of its own end
                f"--InlineBackend.figure_formats={kind}" for kind in ("png", "svg"))])
    except papermill.PapermillExecutionError as error:
        last = error.evalue.strip().splitlines()[-1:] or [""]
        raise UserError(f"{source.name}, cell {error.cell_index}: {error.ename}: {last[0][:200]} "
                        f"(the executed copy is {part})") from error
    except DeadKernelError as error:
        raise UserError(f"{source.name}: its kernel died, most often for lack of memory: close "
                        f"other programs and go on with --only {source.name[:2]}") from error
    part.replace(target)
