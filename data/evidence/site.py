"""The course as a static site (Sphinx) and as slides (nbconvert with reveal.js).

`notebooks/conf.py` takes the sources of the site from here: the course's files, and pages made
from the stored data.
"""

import base64
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import SlidesExporter

from data.evidence.notebooks import with_outputs_of
from lib.course.run import NOTEBOOKS, notebooks
from lib.errors import require
from lib.files import ROOT, read_json, scratch, writing

# Of nbconvert's templates: MathJax beside the page, no other script, texts for figures.
DECK = """
{%- extends 'reveal/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}
<script>MathJax = {tex: {inlineMath: [["$", "$"]]}}</script>
<script src="mathjax/tex-chtml.js"></script>
{%- endblock -%}
{%- block data_svg -%}
<img src="data:image/svg+xml;base64,{{ output.data['image/svg+xml'] | text_base64 }}"
alt="{{ cell.metadata.alt }}">
{%- endblock -%}
{%- block data_png -%}
<img src="data:image/png;base64,{{ output.data['image/png'] }}" alt="{{ cell.metadata.alt }}">
{%- endblock -%}
{%- block html_head_css -%}
<style>.reveal .slides section:not(.stack) {max-height: 100%; overflow-y: auto; font-size: 22px;
text-align: left} .reveal section:not(:has(:is(.jp-CodeCell, img):not(.notes *)))
{--jp-content-font-size1: 30px}
.reveal pre, .reveal code {font-size: 20px; line-height: 1.3}
.reveal section:has(.jp-CodeCell img) pre {font-size: 18px}
.reveal .jp-RenderedMarkdown code {font-size: .85em}
.reveal .jp-Cell pre {line-height: 1.05 !important}
.reveal img {margin: 0; max-height: 420px} .reveal img[src^="data:image/svg"] {height: 320px}
.reveal img[src$=".svg"] {height: 380px}</style>
{%- endblock -%}
{#- The output of a cell waits for a key: predict first, then see. -#}
{%- block output_group -%}<div class="fragment">{{ super() }}</div>{%- endblock -%}
{%- block footer_js -%}
<script src="reveal.js/dist/reveal.js"></script>
<script src="reveal.js/dist/plugin/notes.js"></script>
<script>Reveal.initialize({width: 1280, height: 720, margin: 0.02, center: false, hash: true,
  transition: "none", slideNumber: "c/t", plugins: [RevealNotes]})</script>
{%- endblock -%}"""
CONTENTS = """
```{toctree}
:hidden:
START
YOURS
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


def build_site(out: Path, *, executed: Path = NOTEBOOKS) -> None:
    """Write the site that notebooks/conf.py describes, of notebooks that were executed before."""
    with scratch() as work, writing(out, pages="site") as part:
        (work / "source").mkdir()
        sphinx = subprocess.run(
            [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-c", NOTEBOOKS, work / "source",
             work / "html"], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace",
            env=os.environ | {"COURSE_NOTEBOOKS": str(executed.resolve())})
        require(sphinx.returncode == 0, f"Sphinx failed: {sphinx.stderr[-400:]}")
        shutil.rmtree(work / "html" / ".doctrees")
        # Not built in place: myst-nb writes a folder of its own beside the pages.
        shutil.copytree(work / "html", part, dirs_exist_ok=True)


def build_slides(out: Path, *, solutions: bool = False, executed: Path | None = None) -> None:
    """Write a deck for each notebook, with all that it loads, and an index of them.

    With `executed`, the folder of a run, they have its outputs, and its figures as vectors.
    UserError if it lacks a notebook, or ran another code.
    """
    exporter = SlidesExporter(raw_template=DECK, reveal_url_prefix="reveal.js",
                              reveal_theme="white", exclude_input_prompt=True,
                              exclude_output_prompt=True)
    index = ["<!doctype html><html lang='en'><meta charset='utf-8'><title>Slides</title>"
             "<h1>Slides</h1><ul>"]
    with writing(out, pages="slides") as part, as_file(files("pyreveal") / "revealjs") as reveal:
        for name in ("LICENSE", "dist/reveal.js", "dist/reveal.css", "dist/plugin/notes.js",
                     "dist/theme/white.css"):  # other themes load fonts from the network
            (part / "reveal.js" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(reveal / name, part / "reveal.js" / name)
        copy_mathjax(part)
        shutil.copytree(NOTEBOOKS / "diagrams", part / "diagrams")
        for path in notebooks():
            notebook = described(nbformat.read(path, as_version=4))
            if executed:
                own = with_outputs_of(executed / path.name, notebook)
                require(own, f"no run in {executed} has the code of {path.stem}: use `python -m "
                        f"lib run --only {path.stem[:2]} --profile {executed.name}`")
            title = notebook.cells[0].source.partition("\n")[0].lstrip("# ")
            notebook.cells = [*deck_cells(notebook.cells, solutions=solutions)]
            page = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})[0]
            # The pages that a notebook links to are not beside its deck.
            page = re.sub(r'(?s)<a href="\w+\.(?:md|ipynb)[^"]*">(.*?)</a>', r"\1", page)
            (part / f"{path.stem}.slides.html").write_text(page, encoding="utf-8")
            index.append(f"<li><a href='{path.stem}.slides.html'>{title}</a>")
        (part / "index.html").write_text("".join(index), encoding="utf-8")


def deck_cells(cells: Iterable[Any], *, solutions: bool = False) -> Iterator[Any]:
    """The cells of a deck: authored slides, code to run live, and the rest as speaker notes.

    Text is shown where its metadata has a "slide" of its own; the cell itself is a note. Code is
    shown where its slide type is "subslide", a page, or "fragment". Solutions are notes unless
    they are to be shown.
    """
    for cell in cells:
        kind = cell.metadata.get("slideshow", {}).get("slide_type")
        solution = "solution" in cell.metadata.get("tags", [])
        if slide := cell.metadata.get("slide"):
            kind = "slide" if re.match("##? ", slide) else "subslide"
            yield nbformat.v4.new_markdown_cell(
                slide, metadata={"slideshow": {"slide_type": kind}})
            # Only the slide has a heading, and its anchor.
            cell.source = re.sub(r"(?m)^#+ (.*)$", r"**\1**", cell.source)
        if solution:
            kind = "subslide" if solutions else "notes"
        elif cell.cell_type == "markdown":
            kind = "notes"
        elif kind not in ("subslide", "fragment"):
            continue
        cell.metadata["slideshow"] = nbformat.from_dict({"slide_type": kind})
        yield cell


def folded(path: Path) -> nbformat.NotebookNode:
    """A notebook whose setup and solutions open on a click, with texts for its figures."""
    notebook = described(nbformat.read(path, as_version=4))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code):
        cell.metadata["mystnb"] = {"image": {"alt": cell.metadata["alt"]}}
        if number < 4 or "solution" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = ["hide-cell"]
    return notebook


def shown_first(executed: Path, source: Path) -> str:
    """The first page's part on this run: the outputs of cells whose metadata has "front".

    "front" is the caption. Pictures go into the source folder, texts into the page.
    """
    parts = ["## What this run made"]
    for path in notebooks():
        if not (executed / path.name).is_file():
            continue
        notebook = described(nbformat.read(executed / path.name, as_version=4))
        for number, cell in enumerate(notebook.cells):
            if not (caption := cell.metadata.get("front")):
                continue
            parts.append(f"**{caption}** ([notebook {path.name[:2]}]({path.name}))")
            for output in cell.outputs:
                if "text" in output:
                    parts.append(f"```text\n{output.text.strip()}\n```")
                for kind in ("svg+xml", "png"):  # png: of an older run, or of a reader's own
                    if picture := output.get("data", {}).get(f"image/{kind}"):
                        file = source / f"front-{path.name[:2]}-{number}.{kind[:3]}"
                        file.write_bytes(picture.encode() if kind == "svg+xml"
                                         else base64.b64decode(picture))
                        parts.append(f"![{cell.metadata['alt']}]({file.name})")
                        break
    return "\n\n".join([*parts, "## The course", ""]) if len(parts) > 1 else ""


def copy_mathjax(folder: Path) -> None:
    """Put MathJax and its fonts into a folder of pages."""
    package = Path(importlib.import_module("sphinx-mathjax-offline").__file__).parent
    fonts = "output/chtml/fonts/woff-v2"
    shutil.copytree(package / "static/mathjax" / fonts, folder / "mathjax" / fonts,
                    dirs_exist_ok=True)
    shutil.copyfile(package / "static/mathjax/tex-chtml.js", folder / "mathjax/tex-chtml.js")


def described(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook, with the words below each figure as the figure's text alternative."""
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        words = after and re.match(r"\*+In words:\*+\s*(.+?)(?:\n\n|\Z)", after.source, re.DOTALL)
        cell.metadata["alt"] = re.sub(r'[*`$\\\s"<]+', " ", words[1]) if words else "Figure"
    return notebook


def claims() -> str:
    """The ledger of claims, each with its evidence."""
    parts = ["# Claims", "T1 to T16 are claims of the tutorial, P1 to P5 of the paper, F1 is "
             "from Biderman et al. (2024), F2 from Schulman et al. (2025). "
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
                  claim["details"],
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
    executed = Path(os.environ["COURSE_NOTEBOOKS"])
    for path in notebooks():
        if (executed / path.name).is_file():
            nbformat.write(folded(executed / path.name), source / path.name)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    card = (ROOT / "data" / "adapters" / "README.md").read_text(encoding="utf-8")
    pages = {path.stem: path.read_text(encoding="utf-8")
             for path in (ROOT / "notebooks").glob("*.md")}
    title, readme = readme.split("\n\n", 1)
    pages |= {"index": f"{title}\n\n{shown_first(executed, source)}{readme}{CONTENTS}",
              "CARD": card.split("---\n", 2)[2],  # no header
              "claims": claims(), "results": results()} | reference()
    for name, text in pages.items():
        for old, new in (("](notebooks/", "]("), ("](data/adapters/README.md", "](CARD.md"),
                         ("](data/results)", "](results.md)"), ("](../README.md", "](index.md")):
            text = text.replace(old, new)
        (source / f"{name}.md").write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "data" / "results", source / "data" / "results")
    shutil.copyfile(ROOT / "data" / "claims.json", source / "data" / "claims.json")
    shutil.copytree(ROOT / "notebooks" / "diagrams", source / "diagrams")


def escaped(*event: object) -> None:
    """Docstrings are plain text: no sign but the backquote means anything in them."""
    lines = event[-1]
    lines[:] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", line) for line in lines]
