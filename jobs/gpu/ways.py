"""The kit's forwards as model/ways.json, which `--precision auto` and `--attention auto` read.

    python -m dailies.jobs.gpu.ways docs/measurements/RESULTS.json

replaces what the table says of that GPU.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dailies.model.ways import MEASURED


def entries_of(known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An entry per model that was timed in more than one way; the first line of a way counts, which is eager."""
    rows = [row for part in known["parts"] for row in part["rows"] if "failed" not in row]
    gpu = next(row["what"] for row in rows if "capability" in row)
    versions = next(row for row in rows if row["what"] == "versions")
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        if "eager_ms" in row and "model" in row:
            entry = found.setdefault((row["model"], row["tokens"]), dict(
                gpu=gpu, on=known["about"]["on"], versions=f"torch {versions['torch']}, triton {versions['triton']}",
                model=row["model"], width=row["width"], tokens=row["tokens"], tuned=row["tuned"], ms={}))
            entry["ms"].setdefault(f"{row['precision']} {row['attention']}", round(row["eager_ms"], 2))
    return [entry for entry in found.values() if len(entry["ms"]) > 1]


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    fresh = entries_of(json.loads(Path(arguments[0]).read_text()))
    kept = [entry for entry in json.loads(MEASURED.read_text()) if entry["gpu"] not in {one["gpu"] for one in fresh}]
    MEASURED.write_text(json.dumps(kept + fresh, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
