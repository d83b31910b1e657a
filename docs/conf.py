"""How Sphinx builds these pages: `make docs`, or `python -m sphinx -W docs OUTPUT` from the root.

`make docs SPHINXOPTS="-t online"` also links into the documentation of Python, torch and Lightning,
whose indices are fetched for that. Without it nothing is fetched.
"""

import re
from typing import Any

from docutils.core import publish_doctree
from docutils.nodes import system_message
from sphinx.application import Sphinx

from unclip_pl import __version__

project = "unclip_pl"
author = "the authors of unclip_pl"
copyright = "the authors of unclip_pl, Apache-2.0"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
myst_heading_anchors = 3
highlight_language = "text"  # of blocks that name no language: commands

autosummary_generate = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
add_module_names = False
suppress_warnings = ["ref.python"]  # an annotation whose name two of our classes have

if tags.has("online"):  # noqa: F821  Sphinx puts `tags` here
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
    }

html_theme = "pydata_sphinx_theme"
html_title = f"unclip_pl {release}"
html_theme_options = {
    "logo": {"text": "unclip_pl"},
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "header_links_before_dropdown": 5,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"*": ["globaltoc.html"], "index": []}
html_show_sourcelink = False

# Docstrings are plain prose with `code` in single backticks and Google's sections. The functions
# below let reST read them so: marks that are meant as they stand are escaped before napoleon reads
# the sections, and a docstring that reST would still stumble over is shown as it is.
napoleon_use_ivar = True
CODE = re.compile(r"`{1,2}[^`\n]+`{1,2}")
MARKS = re.compile(r"[\\*|]|(?<=\w)_(?!\w)")
originals: dict[str, list[str]] = {}


def as_rest(line: str) -> str:
    """A line of prose with every reST mark escaped, and `code` as a literal."""
    parts, end = [], 0
    for found in CODE.finditer(line):
        parts.append(MARKS.sub(r"\\\g<0>", line[end : found.start()]).replace("`", r"\`"))
        parts.append(f"``{found[0].strip('`')}``")
        end = found.end()
    parts.append(MARKS.sub(r"\\\g<0>", line[end:]).replace("`", r"\`"))
    return "".join(parts)


def stumbles(text: str) -> bool:
    """Whether reST has something to say about the text."""
    silent = {"report_level": 5, "halt_level": 5, "file_insertion_enabled": False}
    document = publish_doctree(text, settings_overrides=silent)
    messages = [*document.findall(system_message), *document.transform_messages]
    return any(message["level"] >= 2 for message in messages)


def escape_marks(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Before napoleon: a docstring as reST of the same text."""
    originals[name] = list(lines)
    escaped = [as_rest(line) for line in lines]
    if what in ("attribute", "data", "property"):
        escaped.insert(0, "")  # else napoleon takes "Noise of DDIM: 0 ..." for a type and a text
    lines[:] = escaped


def show_as_it_is(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """After napoleon: a docstring that is no reST becomes a literal block of itself."""
    if stumbles("\n".join(lines)):
        lines[:] = ["::", "", *(f"   {line}" for line in originals[name]), ""]


def name_other_files(app: Sphinx, page: str, source: list[str]) -> None:
    """[text](../FILE): a link in the repository; the site has no such page and names the file."""
    source[0] = re.sub(r"\[([^\]]*)\]\(\.\./([^)\s]+)\)", r"\1 (`\2`)", source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", name_other_files)
    app.connect("autodoc-process-docstring", escape_marks, priority=400)
    app.connect("autodoc-process-docstring", show_as_it_is, priority=900)
