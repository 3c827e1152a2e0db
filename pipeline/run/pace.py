"""How fast a night goes, from what the ledger says."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from dailies.pipeline.run.ledger_row import ALL_OTHER_STAGES, there

RATE_OVER = timedelta(hours=1)                          # clips per hour is what was made in the last hour of work
LEAST_RATE_S = 1.0                                      # what was made in one moment makes no rate
# all of a clip's seconds
WAIT_AND_WORK = ("queue_s", "encode_s", "sample_s", "decode_s", "publish_s", ALL_OTHER_STAGES)


def pace(columns: Mapping[str, Sequence[Any]]) -> tuple[float | None, datetime | None]:
    """Clips per hour over the last hour of work, and when the last row was written.

    Only clips that were made count, not failed rows and not what was found published; and only the time in which they
    were: from when a clip's row was taken up to when it was done, not what lay between two commands.
    columns: of the ledger: clip_id, status, worker, finished_at and WAIT_AND_WORK.
    """
    last = max((at for at in columns["finished_at"] if at), default=None)
    made = [number for number, (status, worker, at) in
            enumerate(zip(columns["status"], columns["worker"], columns["finished_at"], strict=True))
            if status == "done" and worker and at]
    if not made:
        return None, last
    spent = list(there(WAIT_AND_WORK, list(columns)))
    since = max(columns["finished_at"][number] for number in made) - RATE_OVER
    clips: dict[str, tuple[datetime, datetime]] = {}
    for number in made:
        if (ended := columns["finished_at"][number]) > since:
            took = timedelta(seconds=sum(columns[name][number] or 0.0 for name in spent))
            clips[columns["clip_id"][number]] = max(since, ended - took), ended
    seconds, until = 0.0, since
    for began, ended in sorted(clips.values()):
        seconds += max(0.0, (ended - max(began, until)).total_seconds())
        until = max(until, ended)
    return (len(clips) * 3600 / seconds if seconds >= LEAST_RATE_S else None), last
