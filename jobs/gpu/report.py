"""What the kit found, as Markdown."""

from typing import Any


def markdown(known: dict[str, Any]) -> str:
    """A section per part: a table where its rows have columns in common, a list where they have not."""
    about = known["about"]
    text = ["# dailies on a GPU", "", f"`{about['command']}`, {about['seconds']} s" + (
        "; sizes of a dry run, so no figure means anything" if about["tiny"] else "")]
    for part in known["parts"]:
        text += ["", f"## {part['part']}: {part['status']}, {part['seconds']} s", ""]
        text += [f"- {line(row)}" for row in part["rows"]]
        if part.get("tail"):
            text += ["", "```", part["tail"].replace("```", "'''"), "```"]
    return "\n".join(text) + "\n"


def line(row: dict[str, Any]) -> str:
    rest = ", ".join(f"{name} {shown(value)}" for name, value in row.items() if name != "what")
    return f"{row['what']}: {rest}" if "what" in row else rest


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(shown, value)) if isinstance(value, list) else str(value)
