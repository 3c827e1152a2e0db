"""What it costs to begin a night in a run folder that is full: rows appended to many that are done, of fake clips."""

import json
import tempfile
import time
from pathlib import Path

from dailies.actors.messages import Clip
from dailies.model.catalog import CATALOG
from dailies.model.weights import locate
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.run.layout import clip_key
from dailies.pipeline.run.ledger import ROWS_IN_PART, Ledger
from dailies.pipeline.run.ledger_row import row_of
from dailies.pipeline.run.run import Run, prepare
from dailies.pipeline.store import open_store


def append_cost(done: int = 100_000, more: int = 1_000) -> dict[str, float]:
    """Seconds until the first of `more` new rows could be sampled, in a folder where `done` rows are done."""
    with tempfile.TemporaryDirectory(prefix="dailies-bench-") as folder:
        for name, rows in (("before", done), ("after", done + more)):
            lines = (f"a red circle {number} moves left\n" for number in range(rows))
            Path(folder, f"{name}.txt").write_text("".join(lines))
        run = run_in(folder, "before")
        run.begin()
        fill_with_rows(run)
        began, cpu_before = time.perf_counter(), time.process_time()
        run = run_in(folder, "after")
        run.begin()
        checked_s = time.perf_counter() - began
        with run.open() as bookkeeper:
            requests, count = next(bookkeeper.rounds())
            next(iter(requests))
            first_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_before
        return {"rows_done": done, "rows_new": count, "checked_after_s": checked_s, "first_request_after_s": first_s,
                "cpu_s": cpu_s}


def run_in(folder: str, name: str) -> Run:
    card = CATALOG["demo"]
    return prepare(Manifest.read(str(Path(folder) / f"{name}.txt")), open_store(f"{folder}/out"), card,
                   weights=locate(None, card))


def fill_with_rows(run: Run) -> None:
    """A row and a file of one byte for each clip."""
    root, keys, rows = Path(str(run.store.path)), run.plan.keys(), []
    names = dict(zip(keys["clip_id"].to_pylist(), keys["id"].to_pylist(), strict=True))
    with Ledger.open(run.store) as ledger:
        for request in run.plan.requests():
            clip = Clip(request=request, uri="none", sha256="0" * 64, num_bytes=1, duration_s=1.0)
            path = root / clip_key(request.clip_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
            rows.append(row_of(names[request.clip_id], clip))
            if len(rows) == ROWS_IN_PART:
                ledger.append(rows)
                rows = []
        ledger.append(rows)


if __name__ == "__main__":
    print(json.dumps(append_cost()))
