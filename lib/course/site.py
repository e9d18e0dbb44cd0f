"""The course as a static site (Sphinx) and as slides (nbconvert with reveal.js)."""

import re
import shutil
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter

from lib.course.run import NOTEBOOKS, OFFLINE, copy_mathjax, described, notebooks, read_notebook
from lib.errors import require
from lib.files import ROOT, scratch, writing

DECK = "{%- extends 'reveal/index.html.j2' -%}" + OFFLINE + """
{%- block html_head_css -%}
<style>.reveal .slides section:not(.stack) {max-height: 100%; overflow-y: auto; font-size: 22px;
text-align: left} .reveal pre, .reveal code {font-size: 18px; line-height: 1.3}
.reveal img {margin: 0; max-height: 420px}</style>
{%- endblock -%}
{#- The output of a cell waits for a key: predict first, then see. -#}
{%- block output_group -%}<div class="fragment">{{ super() }}</div>{%- endblock -%}
{%- block footer_js -%}
<script src="reveal.js/dist/reveal.js"></script>
<script src="reveal.js/dist/plugin/notes.js"></script>
<script>Reveal.initialize({width: 1280, height: 720, margin: 0.02, center: false, hash: true,
  transition: "none", slideNumber: "c/t", plugins: [RevealNotes]})</script>
{%- endblock -%}"""


def build_site(out: Path) -> None:
    """Write the site that notebooks/conf.py describes: outputs as stored, nothing is executed."""
    with scratch() as source, writing(out) as part:
        sphinx = subprocess.run(
            [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-c", NOTEBOOKS, source, part],
            cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
        require(sphinx.returncode == 0, f"Sphinx failed: {sphinx.stderr[-400:]}")
        shutil.rmtree(part / ".doctrees")


def build_slides(out: Path, *, solutions: bool = False) -> None:
    """Write a deck for each notebook, with all that it loads, and an index of them.

    Steps follow the slide metadata of the cells. Cells tagged `instructor` are speaker
    notes, and so are solutions unless they are to be shown.
    """
    exporter = SlidesExporter(raw_template=DECK, reveal_url_prefix="reveal.js",
                              reveal_theme="white", exclude_input_prompt=True,
                              exclude_output_prompt=True)
    index = ["<!doctype html><html lang='en'><meta charset='utf-8'><title>Slides</title>"
             "<h1>Slides</h1><ul>"]
    with writing(out) as part, as_file(files("pyreveal") / "revealjs") as reveal:
        for name in ("LICENSE", "dist/reveal.js", "dist/reveal.css", "dist/plugin/notes.js",
                     "dist/theme/white.css"):  # other themes load fonts from the network
            (part / "reveal.js" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(reveal / name, part / "reveal.js" / name)
        copy_mathjax(part)
        for path in notebooks():
            notebook = described(read_notebook(path))
            for cell in notebook.cells:
                tags = cell.metadata.get("tags", [])
                if "instructor" in tags or "solution" in tags:
                    shown = solutions and "solution" in tags
                    cell.metadata["slideshow"] = nbformat.from_dict(
                        {"slide_type": "subslide" if shown else "notes"})
            title = notebook.cells[0].source.partition("\n")[0].lstrip("# ")
            page = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})[0]
            # The pages that a notebook links to are not beside its deck.
            page = re.sub(r'(?s)<a href="\w+\.(?:md|ipynb)[^"]*">(.*?)</a>', r"\1", page)
            (part / f"{path.stem}.slides.html").write_text(page, encoding="utf-8")
            index.append(f"<li><a href='{path.stem}.slides.html'>{title}</a>")
        (part / "index.html").write_text("".join(index), encoding="utf-8")
