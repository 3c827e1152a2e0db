"""The morning's commands: keep what a person decided, have clips made once more, take rows out, delete what is left."""

import sys
from pathlib import Path

from dailies.jobs.answer import answer
from dailies.jobs.progress import printable, say
from dailies.jobs.runs import open_run, rows_meant
from dailies.jobs.usage import UsageError, card_named
from dailies.pipeline.run import ledger
from dailies.pipeline.run.lease import Lease
from dailies.pipeline.run.picks import DECISIONS, MAX_PICKS_BYTES, BadPicks, Picks, write_picks
from dailies.pipeline.run.redo import NewSeed, ask_for_takes, bring_back, drop_rows
from dailies.pipeline.run.sweep import leftovers, sweep
from dailies.pipeline.run.where import Filter, all_of, column_is
from dailies.pipeline.store import Store
from dailies.pipeline.wording import counted

SHOWN_LEFTOVERS = 20


def pick(uri: str, source: str, *, json: bool) -> int:
    """Keep the decisions of a file about rows that are there."""
    try:
        with sys.stdin.buffer if source == "-" else Path(source).open("rb") as file:
            data = file.read(MAX_PICKS_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--from {source}: {error.strerror}") from None
    try:
        picks = Picks.parsed(data)
    except BadPicks as error:
        raise UsageError(f"--from {source}: {error}") from None
    store, _ = open_run(uri)
    rows = ledger.read(store, ["id", "seed", "clip_id"], every_take=True)
    ours = picks.only(ledger.values_of(rows, "id", "seed", "clip_id"))
    key = write_picks(store, ours)
    strange, last = len(picks.picks) - len(ours.picks), ours.last()
    kinds = {kind: sum(pick.decision == kind for pick in last) for kind in DECISIONS}
    said = {"exit_code": 0, "out": store.uri, "kept": len(last), "not_here": strange, "file": key, **kinds}
    sentence = (f"{counted(len(last), 'decision')} kept: {kinds['pick']:,} pick, {kinds['reject']:,} reject, "
                f"{kinds['redo']:,} redo" + (f"; {strange:,} about clips that are not in this run" if strange else ""))

    def tell() -> None:
        say(sentence)
        if kinds["redo"]:
            say(f"Have other takes made with: dailies redo {uri} --picks, then the render command")

    return answer(said, tell, json=json)


def redo(uri: str, *, picks: bool, where: list[str], seed: str, revert: bool, wait: bool, json: bool) -> int:
    """Have other takes of clips made by the next render.  revert: have earlier ones count again instead."""
    if revert:
        return bring_earlier_back(uri, picks=picks, where=where, wait=wait, json=json)
    if not picks and not where:
        raise UsageError("Say which: --picks for those that a person wants made again, or --where \"EXPR\"")
    chosen, new_seed = chosen_by(where, picks), NewSeed.parsed(seed)
    store, run = open_run(uri)
    card = card_named(str(run["identity"].get("model")))
    with held_folder(store, wait):
        found = ask_for_takes(store, run, card, chosen, new_seed)

    def tell() -> None:
        say(f"{counted(found.rows, 'other take')} to make"
            + (f"; {found.waiting:,} were to be made already" if found.waiting else "")
            + ("; the next render makes them, and what they replace stays until dailies gc" if found.rows else ""))
        for sentence in found.refused[:SHOWN_LEFTOVERS]:
            say(printable(f"  not: {sentence}"))
        if more := len(found.refused[SHOWN_LEFTOVERS:]):
            say(f"  and {more:,} more cannot be made again")

    return answer({"exit_code": 0, "out": store.uri, "to_make": found.rows, "waiting": found.waiting,
                   "refused": found.refused}, tell, json=json)


def bring_earlier_back(uri: str, *, picks: bool, where: list[str], wait: bool, json: bool) -> int:
    """Have earlier takes that a person picked count again."""
    if picks:
        raise UsageError("--revert is of earlier takes that a person picked, --picks of clips to be made again")
    store, _ = open_run(uri)
    with held_folder(store, wait):
        found = bring_back(store, chosen_by(where))

    def tell() -> None:
        say(f"{counted(found.rows, 'earlier take')} {'counts' if found.rows == 1 else 'count'} again"
            + ("; what was in place of them stays until dailies gc" if found.rows else
               ": none is picked whose newer take is not"))
        for sentence in found.refused[:SHOWN_LEFTOVERS]:
            say(printable(f"  not: {sentence}"))
        if more := len(found.refused[SHOWN_LEFTOVERS:]):
            say(f"  and {more:,} more")

    return answer({"exit_code": 0, "out": store.uri, "reverted": found.rows, "refused": found.refused}, tell, json=json)


def drop(uri: str, *, where: list[str], wait: bool, json: bool) -> int:
    """Take rows out of the run; their clips stay until gc."""
    if not where:
        raise UsageError("Say which rows: --where \"EXPR\"")
    chosen = chosen_by(where)
    store, _ = open_run(uri)
    with held_folder(store, wait):
        count = drop_rows(store, chosen)
    return answer({"exit_code": 0, "out": store.uri, "dropped": count}, lambda: say(
        f"{counted(count, 'row')} dropped" + (f"; dailies gc {uri} lists what lies there for no row now" if count else
                                              ": none is so")), json=json)


def gc(uri: str, *, yes: bool, wait: bool, json: bool) -> int:
    """List, or delete, what lies in the run folder and no current row names."""
    store, _ = open_run(uri)
    if yes:
        with held_folder(store, wait) as lease:
            found = list(sweep(store, lease))
    else:
        found = list(leftovers(store))
    num_bytes = sum(each.info.num_bytes for each in found)

    def tell() -> None:
        for each in found[:SHOWN_LEFTOVERS]:
            say(printable(f"  {each.info.key}: {each.what}, {each.info.num_bytes:,} bytes"))
        if more := len(found[SHOWN_LEFTOVERS:]):
            say(f"  and {more:,} more")
        what = f"{counted(len(found), 'object')}, {num_bytes / 1e6:,.1f} MB"
        say(f"{what} deleted" if yes else f"{what} that no row names" + ("; --yes deletes them" if found else ""))

    return answer({"exit_code": 0, "out": store.uri, "deleted": yes, "objects": len(found), "bytes": num_bytes,
                   "keys": [each.info.key for each in found]}, tell, json=json)


def chosen_by(where: list[str], picks: bool = False) -> Filter:
    return all_of([*map(rows_meant, where), *([column_is("decision", "redo")] if picks else [])])


def held_folder(store: Store, wait: bool) -> Lease:
    """The folder, with no driver at work.  Raises LeaseError."""
    return Lease.take(store, queue=wait, tell=lambda text: print(printable(text), file=sys.stderr))
