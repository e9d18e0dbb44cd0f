"""Notebooks and Markdown as HTML that asks nothing of the network."""

import html
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

TEMPLATES = Path(__file__).parent / "templates"
# The words below a figure: they are also its text alternative.
WORDS = re.compile(r"\*{1,2}In words:\*{1,2}\s*(.+?)(?:\n\n|\Z)", re.DOTALL)


class Renderer(IPythonRenderer):
    """Formulas become MathML, which browsers draw without a script.

    Headings get the anchors that GitHub gives them, so that links work in both.
    """

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        words = html.unescape(re.sub(r"<[^>]+>", "", text)).lower()
        slug = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        return (f'<h{level} id="{slug}">{text}<a class="anchor-link" href="#{slug}">¶</a>'
                f"</h{level}>\n")

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        return convert(body)


def markdown(text: str) -> str:
    """Markdown with formulas as HTML."""
    return MarkdownWithMath(renderer=Renderer(escape=False)).render(text)


def exporter(template: str, kind: type[HTMLExporter] = HTMLExporter, **options: Any
             ) -> HTMLExporter:
    """nbconvert's exporter with a template of ours."""
    return kind(template_name=template, extra_template_basedirs=[str(TEMPLATES)],
                filters={"markdown2html": markdown}, **options)


def described(notebook: NotebookNode) -> NotebookNode:
    """The notebook, with the words below each figure as the figure's text alternative."""
    for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        found = WORDS.match(after.source) if after and after.cell_type == "markdown" else None
        cell.metadata["alt"] = re.sub(r"[*`$\\\s]+", " ", found[1]) if found else "Figure"
    return notebook


def notebook_page(notebook: NotebookNode, *, nav: str = "", scripts: str = "") -> str:
    """A notebook as one page, with HTML above and at the end; its first line is the title."""
    title = notebook.cells[0].source.strip().partition("\n")[0].lstrip("# ")
    resources = {"nav": nav, "scripts": scripts, "metadata": {"name": title}}
    return exporter("page").from_notebook_node(described(notebook), resources)[0]


def text_page(text: str, **options: str) -> str:
    """Markdown as a page of the same make."""
    cell = nbformat.v4.new_markdown_cell(text, id="text")
    return notebook_page(nbformat.v4.new_notebook(cells=[cell]), **options)


def relinked(text: str, pages: Collection[str] = ()) -> str:
    """A page whose links to the course's files go to their pages; without one, no link."""
    def link(found: re.Match[str]) -> str:
        name = {"README": "index"}.get(found[1], found[1])
        return (f'<a href="{name}.html{found[2] or ""}">{found[3]}</a>' if name in pages
                else found[3])

    return re.sub(r'<a href="(?:\.\./)?(?:notebooks/)?(\w+)\.(?:md|ipynb)(#[^"]*)?">(.*?)</a>',
                  link, text, flags=re.DOTALL)
