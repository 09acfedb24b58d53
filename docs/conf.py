"""Sphinx: ``make docs`` renders docs/*.md, with every warning an error."""

import re
from pathlib import Path
from typing import Any

project = "littlebit2-kernels"
author = "the littlebit2-kernels authors"
copyright = author
extensions = ["myst_parser"]
html_theme = "furo"
html_title = project

# Headings have the anchors of a repository page. A link to an anchor that is missing is a warning.
myst_heading_anchors = 4
# A block of JSON whose first line also has a name is not highlighted.
suppress_warnings = ["misc.highlighting_failure"]


def _adapt(app: Any, name: str, source: list[str]) -> None:
    """Fit a page of the repository into the site: pages outside docs/ are named without a link to them.

    The table of contents follows the links of index.md, which stays plain Markdown.
    """
    source[0] = re.sub(r"\[([^]]+)\]\(\.\./[^)]+\)", r"\1", source[0])
    if name == "index":
        pages = dict.fromkeys(
            re.findall(r"\]\(([\w./-]+)\.md", Path(app.srcdir, "index.md").read_text("utf-8"))
        )
        inside = "\n".join(page for page in pages if not page.startswith(".."))
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{inside}\n```\n"


def setup(app: Any) -> None:
    """Register what Sphinx calls."""
    app.connect("source-read", _adapt)
