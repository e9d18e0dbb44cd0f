"""The site, by Sphinx: `python -m lib site` starts it in the root of the repository."""

from data.evidence.site import escaped, write_sources

project = html_title = "From LoRA to the edge"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]
nb_execution_mode = "off"  # the stored outputs are shown
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
default_role = "literal"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # of torch, say
autodoc_preserve_defaults = True  # a default as it is written, not as it is on this machine
html_theme = "sphinx_book_theme"
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
html_show_sphinx = html_show_copyright = html_copy_source = False
# README and the model card are pages for GitHub: some headings skip a step.
suppress_warnings = ["myst.header", "misc.highlighting_failure"]


def setup(app: object) -> None:
    """Write the sources first; make plain text of docstrings before napoleon reads them."""
    app.connect("builder-inited", write_sources)
    app.connect("autodoc-process-docstring", escaped, priority=1)
