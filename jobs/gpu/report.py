"""What the kit found, as Markdown: all of it, or one table for the README.

    python -m jobs.gpu.report docs/measurements/RESULTS.json README.md

writes that table between the README's two marks.
"""

import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpu figures: made by jobs.gpu.report -->", "<!-- end of gpu figures -->"


def markdown(known: dict[str, Any]) -> str:
    """A section per part, a line per figure."""
    about = known["about"]
    text = ["# dailies on a GPU", "", f"`{about['command']}`, commit {about['commit']}, {about['seconds']} s" + (
        "; sizes of a dry run, so no figure means anything" if about["tiny"] else "")]
    for part in known["parts"]:
        text += ["", f"## {part['part']}: {part['status']}, {part['seconds']} s", ""]
        text += [f"- {line(row)}" for row in part["rows"]]
        if part.get("tail"):
            text += ["", "```", part["tail"].replace("```", "'''"), "```"]
    return "\n".join(text) + "\n"


def line(row: dict[str, Any]) -> str:
    return f"{row['what']}: " + ", ".join(f"{name} {shown(value)}" for name, value in row.items() if name != "what")


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(shown, value)) if isinstance(value, list) else str(value)
