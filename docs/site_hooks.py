"""What mkdocs.yml cannot say: the list of decisions, and what becomes of links to files that are no documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent


def on_config(config: Any) -> Any:
    """Lists every decision."""
    decisions = [f"decisions/{path.name}" for path in sorted((DOCS / "decisions").glob("*.md"))]
    for entry in config["nav"]:
        if "Decisions" in entry:
            entry["Decisions"] = decisions
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A link to a file of the repository outside of docs becomes its text; there is no such page."""
    folder = (DOCS / page.file.src_uri).parent

    def outside(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        return link[0] if target.is_relative_to(DOCS) or not target.exists() else link[1]

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)#:]+)\)", outside, markdown)
