"""Chaos nights, from the command line: python -m tests.chaos [folder s3 ... losses] [--kills 100 --clips 2000]

Runs the real `dailies render` with a fake model (fakes.py) on a Ray cluster of several machines on this one, does to it
what a bad night does, and counts what is left. Exit code 0: everything is as promised; 3: something is not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = ("folder", "s3", "drivers", "poison", "disk", "losses")
IN_NAMESPACE = "CHAOS_IN_NAMESPACE"


def main() -> int:
    options = arguments()
    if {"disk", "losses"} & set(options.scenarios) and os.geteuid() and IN_NAMESPACE not in os.environ:
        from tests.chaos.full_disk import in_a_namespace
        os.environ[IN_NAMESPACE] = "1"                  # only tried once
        command = in_a_namespace([sys.executable, "-m", "tests.chaos", *sys.argv[1:]])
        os.execvp(command[0], command)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that what was started is ended
    found: dict[str, Any] = {}
    with workplace(options.keep) as folder:
        for name in options.scenarios:
            began = time.monotonic()
            say(f"{name} ...")
            found[name] = run(name, folder / name, options)
            found[name]["seconds"] = round(time.monotonic() - began)
            say(f"{name}: {verdict(found[name])} ({found[name]['seconds']} s)")
    from tests.chaos.report import report
    text = report(found, options)
    print(json.dumps(found) if options.json else text)
    if options.write:
        path = ROOT / "docs" / "measurements" / f"{time.strftime('%Y-%m-%d')}-chaos.md"
        path.write_text(text + "\n")
        say(f"written: {path}")
    return 3 if any(each["wrong"] for each in found.values()) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--clips", type=int, default=2000, help="of the nights with kills; default: %(default)s")
    parser.add_argument("--kills", type=int, default=100, help="of each of them; default: %(default)s")
    parser.add_argument("--good", type=int, default=500, help="rows of the poison night; default: %(default)s")
    parser.add_argument("--poison", type=int, default=10, help="rows of each kind; default: %(default)s")
    parser.add_argument("--losses", type=int, default=200, help="rows of the night of losses; default: %(default)s")
    parser.add_argument("--sample-s", type=float, default=0.5, help="seconds of sampling a clip; default: %(default)s")
    parser.add_argument("--overlap", action="store_true",
                        help="as on GPUs: several calls in a process at once, clips written by processes of their own")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of tables")
    parser.add_argument("--write", action="store_true", help="the tables also into docs/measurements/")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there and leave everything behind")
    options = parser.parse_args()
    options.scenarios = options.scenarios or list(SCENARIOS)
    if unknown := set(options.scenarios) - set(SCENARIOS):
        parser.error(f"scenarios are {', '.join(SCENARIOS)}; got {', '.join(sorted(unknown))}")
    if options.keep and options.keep.exists():
        parser.error(f"--keep needs a folder that is not there yet; {options.keep} is")
    if options.kills >= options.clips:
        parser.error(f"kills are spread over the clips, so there must be more clips; got {options.kills} kills, "
                     f"{options.clips} clips")
    return options


def run(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one scenario, and under "wrong" what is not as promised."""
    from tests.chaos import scenarios  # Ray reads the environment when it is imported
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return getattr(scenarios, name)(folder, options, random.Random(f"{options.seed} {name}"))
    except (scenarios.GaveUp, scenarios.CannotStart) as error:
        return {"wrong": [str(error)]}


@contextmanager
def workplace(kept: Path | None) -> Iterator[Path]:
    """A folder for everything, and an environment that every process below has: our modules, one thread each."""
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = kept.absolute() if kept else Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        yield folder
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def verdict(figures: dict[str, Any]) -> str:
    return "; ".join(figures["wrong"]) or figures.get("skipped") or "as promised"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
