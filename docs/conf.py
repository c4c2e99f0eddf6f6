"""Sphinx: the pages as they are, and the public names from their docstrings."""

import re
import textwrap

import squall

project = "squall"
author = "the squall developers"
version = release = squall.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]
html_theme = "furo"


def to_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are written to be read as text: dollars become math, and the star of `*space` a star."""
    text = re.sub(r"(?<![\*\w])\*(?=[a-z])", r"\\*", "\n".join(lines))
    text = re.sub(r"\n( *)\$\$(.+?)\$\$", _displayed, text, flags=re.DOTALL)
    lines[:] = re.sub(r"\$([^$\n]+)\$", r":math:`\1`", text).split("\n")


def _displayed(match):
    indent, formula = match.groups()
    return f"\n{indent}.. math::\n\n" + textwrap.indent(textwrap.dedent(formula), indent + "    ") + "\n"


def setup(app):
    app.connect("autodoc-process-docstring", to_restructured_text)
