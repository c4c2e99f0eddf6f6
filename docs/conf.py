"""Sphinx: the pages as they are, and the public names from their docstrings.

The pages are read by myst-parser, not by myst-nb, which is the same parser with notebooks: no page is one. The code of
the pages runs in tests/test_docs.py, that of the gallery when the site is built.
"""

import re
import textwrap

import squall

project = "squall"
author = copyright = "the squall developers"
version = release = squall.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "description"
napoleon_use_ivar = True
autodoc_member_order = "bysource"
exclude_patterns = ["_build", "**/README.rst"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "within_subsection_order": "FileNameSortKey",
    "matplotlib_animations": True,
    "min_reported_time": 10,
    "write_computation_times": False,
    "abort_on_example_error": True,
}


def to_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are written to be read as text: dollars become math, `*space` keeps its star and `|u|` its bars."""
    text = re.sub(r"(?<![\*\w])\*(?=[a-z])|(?<![\w|])\|(?=\w)", r"\\\g<0>", "\n".join(lines))
    text = re.sub(r"\n( *)\$\$(.+?)\$\$", _displayed, text, flags=re.DOTALL)
    lines[:] = re.sub(r"\$([^$\n]+)\$", r":math:`\1`", text).split("\n")


def _displayed(match):
    indent, formula = match.groups()
    return f"\n{indent}.. math::\n\n" + textwrap.indent(textwrap.dedent(formula), indent + "    ") + "\n"


def link_outside_pages(app, name, text):
    """Markdown outside of docs, such as the tables of a study, is a download: on the site it is no page."""
    text[0] = re.sub(r"\[`?([^\]`]+)`?\]\((\.\./[^)#]+\.md)\)", r"{download}`\1 <\2>`", text[0])


def setup(app):
    app.connect("source-read", link_outside_pages)
    app.connect("autodoc-process-docstring", to_restructured_text)
