"""What must be true after a night, counted from the run folder, from the fakes' notes and by `dailies verify`."""

import json
import subprocess
import sys
from collections import Counter
from io import BytesIO
from typing import Any

import pyarrow.parquet as pq

from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import LEDGER
from dailies.pipeline.store import open_store
from tests.chaos.night import ROOT, Night


def judge(night: Night, *, clips: int, rows: int, failed: int = 0, sampled_again: int | None = 0,
          left_over: list[str] | None = None, stored: dict[str, int] | None = None) -> dict[str, Any]:
    """Figures, and under "wrong" a sentence for everything that is not as promised.

    clips, rows, failed: how many must be there.  sampled_again: None where two drivers may both have worked.
    left_over: what else the run folder holds.  stored: of a bucket's server, successful writes by path.
    """
    store = open_store(night.out)
    objects = [info.key for info in store.list("clips/")]
    table = ledger.read(store)
    statuses = Counter(table["status"].to_pylist())
    parts = [pq.read_metadata(BytesIO(store.get(info.key))).num_rows for info in store.list(f"{LEDGER}/")]
    checked = verify(night.out)
    twice = night.republished | {path for path, times in (stored or {}).items() if path.endswith(".mp4") and times > 1}
    again = sorted(set(night.tally.sampled_again))
    folders = {info.key.partition("/")[0] for info in store.list()}
    found = {
        "objects": len(objects), "rows": table.num_rows, "rows_written": sum(parts), "done": statuses["done"],
        "failed": statuses["failed"], "hashes_wrong": len(checked["wrong"]), "unrecorded": checked["unrecorded"],
        "published_twice": len(twice), "latents_sampled_again": len(again), "adopted": night.said().get("adopted"),
        "left_over": sorted(folders - {"clips", "posters", "ledger", "manifests", "lease.json", "run.json",
                                       "_SUCCESS.json"}),
    }
    wanted = {"objects": clips, "rows": rows, "rows_written": rows, "done": rows - failed, "failed": failed,
              "hashes_wrong": 0, "unrecorded": 0, "published_twice": 0, "left_over": left_over or []}
    if sampled_again is not None:
        wanted["latents_sampled_again"] = sampled_again
    found["wrong"] = [f"{name} must be {want}; got {found[name]}"
                      for name, want in wanted.items() if found[name] != want]
    return found


def verify(out: str) -> dict[str, Any]:
    """The answer of `dailies verify`."""
    done = subprocess.run([sys.executable, "-m", "dailies", "verify", out, "--json"], cwd=ROOT,
                          capture_output=True,
                          text=True, timeout=600)
    return json.loads(done.stdout)
