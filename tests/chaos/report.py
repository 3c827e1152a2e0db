"""The figures as Markdown, with where they come from."""

import argparse
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

from dailies.jobs.bench.machine import commit
from tests.chaos.night import ROLES, SAMPLERS
from tests.chaos.scenarios import CPUS, MACHINES

NIGHTS = {"folder": "folder", "s3": "S3 with faults"}


def report(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    given = [f"--{name.replace('_', '-')} {getattr(options, name)}"
             for name in ("clips", "kills", "good", "poison", "losses", "sample_s", "seed")]
    lines = [f"# Chaos, {time.strftime('%Y-%m-%d')}", "",
             f"`python -m tests.chaos {' '.join([*options.scenarios, *given])}`",
             f"Commit {commit()}, {os.cpu_count()} cores, {platform.machine()}, "
             f"Linux {platform.release().partition('-')[0]}.", "",
             f"The real `dailies render` with a fake model, of which a clip is {options.sample_s:g} s of sleep: "
             f"{SAMPLERS} samplers",
             f"on {MACHINES} Ray machines of {CPUS:g} cores each, which only count, on this one."]
    if nights := [name for name in NIGHTS if name in found]:
        lines += ["", *killed_nights({NIGHTS[name]: found[name] for name in nights})]
    for name, paragraph in (("drivers", drivers), ("poison", poison), ("disk", disk),
                            ("losses", losses)):
        if name in found:
            lines += ["", *paragraph(found[name])]
    wrong = [f"- {name}: {said}" for name, figures in found.items() for said in figures["wrong"]]
    return "\n".join([*lines, "", "**Not as promised:**" if wrong else "Everything was as promised.", *wrong])


def killed_nights(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    nights = list(found.values())

    def row(title: str, of: Any) -> str:
        cells = [str(of(night)) if "night_s" in night else "did not end" for night in nights]
        return f"| {title} | {' | '.join(cells)} |"

    yield f"| random SIGKILLs | {' | '.join(found)} |"
    yield "| --- |" + " --- |" * len(found)
    yield row("clips to make", lambda night: f"{night['clips']:,}")
    yield row("kills", lambda night: night["kills"])
    for role in ROLES:
        yield row(f"of them: {role}", lambda night: night["killed"].get(role, 0))
    yield row("drivers started", lambda night: night["drivers"])
    yield row("objects / ledger rows", lambda night: f"{night['objects']:,} / {night['rows_written']:,}")
    yield row("wrong hashes / failed rows", lambda night: f"{night['hashes_wrong']} / {night['failed']}")
    yield row("clips published twice", lambda night: night["published_twice"])
    yield row("finished latents sampled again", lambda night: night["latents_sampled_again"])
    yield row("share of sampling done twice", lambda night: f"{night['share_done_twice']:.1%}")
    for kind in dict.fromkeys(kind for night in nights for kind in night.get("faults", ())):
        yield row(f"requests hit: {kind}", lambda night: night.get("faults", {}).get(kind, "-"))
    yield row("seconds", lambda night: night["night_s"])


def drivers(figures: dict[str, Any]) -> Iterator[str]:
    for how, what in (("killed", "is killed"), ("asleep", "is stopped for more than a minute, then goes on")):
        if found := figures.get(how):
            yield (f"- Two drivers, and the first {what}: the second was refused with {found['refused_with']} before, "
                   f"and took over after; {found['objects']} objects and {found['rows_written']} rows for "
                   f"{figures['clips']} clips, {found['published_twice']} published twice.")


def poison(figures: dict[str, Any]) -> Iterator[str]:
    if "reasons" in figures:
        yield (f"- Poison among {figures['good']} good rows: {figures['done']} done, {figures['failed']} failed in "
               f"{figures['night_s']} s, by one driver that ended by itself.")
        for kind, reasons in figures["reasons"].items():
            yield f"  - {kind}: " + ", ".join(f"{count} {error_type}" for error_type, count in reasons.items())


def disk(figures: dict[str, Any]) -> Iterator[str]:
    if "skipped" in figures:
        yield f"- Disk full: not run, {figures['skipped']}"
    for kind in ("clips", "ledger", "latents"):
        if found := figures.get(kind):
            yield (f"- Disk full while writing {kind}: exit {found['exit_code']} after {found['published_before']} "
                   f"clips; with space again {found['objects']} objects, {found['rows_written']} rows.")


def losses(figures: dict[str, Any]) -> Iterator[str]:
    if "met" in figures:
        lost = ", ".join(f"{what} after {seconds} s" for what, seconds in figures["lost_after_s"].items())
        yield (f"- Of three machines one lost its room for temporary files, one its memory, one its credentials "
               f"({lost}): {figures['done']} of {figures['clips']} rows done in {figures['night_s']} s, "
               f"{figures['failed']} failed, each with one attempt; the losses were met "
               f"{sum(figures['met'].values())} times at work.")
