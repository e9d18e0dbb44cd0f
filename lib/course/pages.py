"""What the pages of notebooks and the slides share: formulas and figures without a network."""

import importlib
import re
import shutil
from pathlib import Path

from nbformat import NotebookNode

# Blocks of nbconvert's templates: MathJax beside the page, no other script, texts for figures.
OFFLINE = """
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}
<script>MathJax = {tex: {inlineMath: [["$", "$"]]}}</script>
<script src="mathjax/tex-chtml.js"></script>
{%- endblock -%}
{%- block data_png -%}
<img src="data:image/png;base64,{{ output.data['image/png'] }}" alt="{{ cell.metadata.alt }}">
{%- endblock -%}"""


def copy_mathjax(folder: Path) -> None:
    """Put MathJax and its fonts into a folder of pages."""
    package = Path(importlib.import_module("sphinx-mathjax-offline").__file__).parent
    fonts = "output/chtml/fonts/woff-v2"
    shutil.copytree(package / "static/mathjax" / fonts, folder / "mathjax" / fonts,
                    dirs_exist_ok=True)
    shutil.copyfile(package / "static/mathjax/tex-chtml.js", folder / "mathjax/tex-chtml.js")


def described(notebook: NotebookNode) -> NotebookNode:
    """The notebook, with the words below each figure as the figure's text alternative."""
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        words = after and re.match(r"\*+In words:\*+\s*(.+?)(?:\n\n|\Z)", after.source, re.DOTALL)
        cell.metadata["alt"] = re.sub(r'[*`$\\\s"<]+', " ", words[1]) if words else "Figure"
    return notebook
