"""The sources of the site: the course's files, and pages made from the stored data."""

import re
import shutil
from pathlib import Path

import nbformat

from lib.course.run import described, notebooks, read_notebook
from lib.files import ROOT, read_json

CONTENTS = """
```{toctree}
:hidden:
START
GLOSSARY
TROUBLESHOOTING
INSTRUCTORS
SCALE
```

```{toctree}
:hidden:
:caption: Notebooks
:glob:
0*
```

```{toctree}
:hidden:
:caption: Evidence
claims
results
CARD
```

```{toctree}
:hidden:
:caption: The library
:glob:
lib-*
```
"""


def folded(path: Path) -> nbformat.NotebookNode:
    """A notebook whose setup and solutions open on a click, with texts for its figures."""
    notebook = described(read_notebook(path))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code):
        cell.metadata["mystnb"] = {"image": {"alt": cell.metadata["alt"]}}
        if number < 4 or "solution" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = ["hide-cell"]
    return notebook


def claims() -> str:
    """The ledger of claims, each with its evidence."""
    parts = ["# Claims", "T1 to T16 are claims of the tutorial, P1 to P5 of the paper. "
             "[claims.json](data/claims.json) holds the same."]
    for claim in read_json(ROOT / "data" / "claims.json"):
        number = ""
        if claim["value"] is not None:
            ends = " to ".join(f"{end:.4g}" for end in claim["interval"] or [])
            number = f"{claim['value']:.4g} {claim['unit']}" + (f" ({ends})" if ends else "")
        evidence = ", ".join(f"[{name}]({name})"
                             if (ROOT / name).is_file() else f"{name} (not made yet)"
                             for name in claim["evidence"])
        commands = ", ".join(f"`{command}`" for command in claim["command"])
        parts += [f"## {claim['id']}: {claim['verdict']}", f"> {claim['claim']}",
                  f"**{claim.get('headline', '')}**", claim["finding"],
                  f"*Method:* {claim['method']}", f"*Number:* {number or 'none'}",
                  f"*Evidence:* {evidence}", f"*Commands:* {commands}"]
    return "\n\n".join(part for part in parts if part != "****")


def results() -> str:
    """A table of the stored results."""
    rows = ["# Stored results\n", "The notebooks and the claims are made of these files.\n",
            "| file | made by | on | seconds |", "|---|---|---|---|"]
    for path in sorted((ROOT / "data" / "results").rglob("*.json")):
        stored, name = read_json(path), path.relative_to(ROOT).as_posix()
        rows.append(f"| [{path.stem}]({name}) | `{stored['command']}` | {stored['made']} "
                    f"| {stored['piece_seconds']:,.0f} |")
    return "\n".join(rows)


def reference() -> dict[str, str]:
    """A page for each room of the library."""
    pages: dict[str, str] = {}
    for path in sorted((ROOT / "lib").rglob("[a-z]*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        room = path.parent.name if path.parent.name != "lib" else "ground"
        title = f"lib.{room}" if room != "ground" else "lib"
        pages.setdefault(f"lib-{room}", f"# {title}\n")
        pages[f"lib-{room}"] += (f"\n## {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n"
                                 "```\n")
    return pages


def write_sources(app: object) -> None:
    """Fill the empty source folder: the course's files, and pages from the stored data."""
    source = Path(app.srcdir)
    for path in notebooks():
        nbformat.write(folded(path), source / path.name)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    card = (ROOT / "data" / "adapters" / "README.md").read_text(encoding="utf-8")
    pages = {path.stem: path.read_text(encoding="utf-8")
             for path in (ROOT / "notebooks").glob("*.md")}
    pages |= {"index": readme + CONTENTS, "CARD": card.split("---\n", 2)[2],  # no header
              "claims": claims(), "results": results()} | reference()
    for name, text in pages.items():
        for old, new in (("](notebooks/", "]("), ("](data/adapters/README.md", "](CARD.md"),
                         ("](data/results)", "](results.md)"), ("](../README.md", "](index.md")):
            text = text.replace(old, new)
        (source / f"{name}.md").write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "data" / "results", source / "data" / "results")
    shutil.copyfile(ROOT / "data" / "claims.json", source / "data" / "claims.json")


def escaped(*event: object) -> None:
    """Docstrings are plain text: no sign but the backquote means anything in them."""
    lines = event[-1]
    lines[:] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", line) for line in lines]
