"""Hook of MkDocs: pages of docs/ link to files elsewhere in the repository, which the site does not have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(((?:\.\./)+[^)#\s]*)")


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """Relative links out of docs/, which work on GitHub, as links to GitHub."""
    folder = Path(config.docs_dir, page.file.src_uri).parent

    def absolute(found: re.Match[str]) -> str:
        target = (folder / found[1]).resolve()
        if target.is_relative_to(config.docs_dir):
            return found[0]
        return f"]({config.repo_url}/{'tree' if target.is_dir() else 'blob'}/main/{target.relative_to(ROOT)}"

    return OUTSIDE.sub(absolute, markdown)
