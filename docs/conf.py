"""How Sphinx makes the site: `sphinx-build -W --keep-going -n docs build/site`. Nothing is fetched, nor by a reader.

Equations become MathML while the site is built, which browsers draw without a script.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout is documented, not what is installed

project = "lightning-prune"
author = "the authors of lightning-prune"
(version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "lightning_prune" / "__init__.py").read_text("utf-8"), re.M)
release = version

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "index"
language = "en"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_inherit_docstrings = False  # a hook of Lightning's says nothing of what ours does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
default_role = "py:obj"  # single backticks in docstrings: a link where there is one, else code
# Signatures name types of torch and Lightning, and inner ones of ours.
nitpick_ignore_regex = [("py:(obj|class)", ".*")]

html_theme = "furo"
html_title = f"lightning-prune {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
pygments_style = "a11y-light"
pygments_dark_style = "a11y-dark"


def _mathml(translator: HTML5Translator, node: nodes.math | nodes.math_block, block: bool) -> None:
    """Write an equation, or a warning that says which one could not be read."""
    source = node.astext()
    try:
        translator.body.append(tex2mathml(source, as_block=block))
    except MathError as error:
        logging.getLogger(__name__).warning("equation %r: %s", source, error, location=node)
    raise nodes.SkipNode


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    _mathml(translator, node, block=False)


def _display(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="equation"))
    try:
        _mathml(translator, node, block=True)
    finally:
        translator.body.append("</div>\n")


def _methods(app: Sphinx, page: str, source: list[str]) -> None:
    """Put every method there is in place of ``<!-- methods: kind -->``."""
    from lightning_prune.methods import discover

    def entries(kind: re.Match[str]) -> str:
        names = [name for name, method in discover().items() if method.kind == kind[1]]
        lines = [f".. autoclass:: lightning_prune.{name}\n   :show-inheritance:\n   :members:\n" for name in names]
        return "\n".join(["```{eval-rst}", *lines, "```"])

    source[0] = re.sub(r"^<!-- methods: (\w+) -->$", entries, source[0], flags=re.MULTILINE)


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the renderer of equations, and the entries of methods."""
    app.connect("source-read", _methods)
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True}
