"""A hook of MkDocs: what pages link to outside of docs/ is named on the site, where there is no such file."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)]*)\)")


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Replaces a link to a file of the repository by its text and, where that is not the same, the file's path."""

    def named(found: re.Match[str]) -> str:
        text, path = found[1], found[2].partition("#")[0]
        return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"

    return _OUTSIDE.sub(named, markdown)
