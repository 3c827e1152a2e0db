"""What the kit found, as Markdown: all of it, or one table for the README.

    python -m dailies.jobs.gpu.report docs/measurements/RESULTS.json README.md

writes that table between the README's two marks.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures of a GPU: made by dailies.jobs.gpu.report -->", "<!-- end of the figures of a GPU -->"
# of which parts the README shows which lines, by what they say, and what their figures are called there
SHOWN = {"machine": ("copy", "bf16 8192"), "parity": ("bf16, dense", "int8, dense"),
         "clip": ("int8, sparse", "bf16, sparse", "int8, sage", "umT5"), "night": ("prompt to MP4",),
         "decode": ("its choice", "slabs of 4194304")}
UNITS = {"eager_ms": "{:.0f} ms", "ms": "{:.0f} ms", "seconds": "{:.2f} s", "clips_an_hour": "{:,.0f} clips an hour",
         "tb_s": "{:.1f} TB/s", "tflops": "{:.0f} TFLOP/s", "of_fp32": "{:.2%} from fp32",
         "peak_gb": "{:.1f} GB at most"}


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
    return f"{row['what']}: " + ", ".join(f"{name} {figure(value)}" for name, value in row.items() if name != "what")


def figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(figure, value)) if isinstance(value, list) else str(value)


def table(known: Mapping[str, Any]) -> str:
    """The figures that a reader of the README wants, with device, versions, date and command."""
    rows = {part["part"]: part["rows"] for part in known["parts"]}
    device = next(row for row in rows["machine"] if "capability" in row)
    versions = next(row for row in rows["machine"] if row["what"] == "versions")
    lines = [f"{device['what']}, torch {versions['torch']}, Triton {versions['triton']}, {known['about']['on']}, "
             f"commit {known['about']['commit']}; random weights at the published sizes:", "", "| | |", "| --- | --- |"]
    for part, wanted in SHOWN.items():
        for row in rows.get(part, []):
            figures = [unit.format(row[name]) for name, unit in UNITS.items() if name in row]
            if figures and any(words in row["what"] for words in wanted):
                lines.append(f"| {row['what']} | {', '.join(figures)} |")
    return "\n".join(lines)


def put_into(document: str, made: str) -> str:
    """The document with another table between its marks.  Raises ValueError where they are not there."""
    before, _, rest = document.partition(BEGIN)
    old, _, after = rest.partition(END)
    if not rest or END not in rest:
        raise ValueError(f"a line {BEGIN} and a line {END} are needed; write them where the table is to be")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    results, document = map(Path, arguments)
    document.write_text(put_into(document.read_text(encoding="utf-8"), table(json.loads(results.read_text()))),
                        encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
