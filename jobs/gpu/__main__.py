"""`python -m dailies.jobs.gpu --out DIR`, from a bare checkout; `dailies bench gpu --out DIR` is the same."""

import argparse
import signal
import sys
from pathlib import Path

from dailies.jobs.gpu.kit import PARTS, Kit
from dailies.jobs.usage import UsageError


def run(out: str | None, *, budget: float = 540, only: str | None = None, tiny: bool = False,
        json: bool = False) -> int:
    """The kit's parts, or `only` some; 0 where all ended well, 3 otherwise.  Raises UsageError.

    json: on standard output nothing but what OUT/results.json holds.
    """
    if out is None:
        raise UsageError("a folder for what is found is needed: dailies bench gpu --out DIR")
    names = [part.name for part in PARTS]
    wanted = [name for name in (only or "").split(",") if name] or names
    if unknown := [name for name in wanted if name not in names]:
        raise UsageError(f"the kit has no part {', '.join(unknown)}. There are: {', '.join(names)}")
    if budget <= 0:
        raise UsageError(f"--budget is the seconds for all parts together; got {budget:g}")
    said = "".join([f" --budget {budget:g}", f" --only {only}" * bool(only), " --tiny" * tiny])
    kit = Kit(out=Path(out), budget_s=budget, tiny=tiny, command=f"python -m dailies.jobs.gpu --out OUT{said}",
              silent=json)
    code = kit.run([part for part in PARTS if part.name in wanted])
    if json:
        print((kit.out / "results.json").read_text())
    return code


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dailies.jobs.gpu", description=__doc__)
    parser.add_argument("--out", metavar="DIR", help="folder for results.json, report.md and log.txt")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for all parts together")
    parser.add_argument("--only", metavar="PART,PART", help=f"of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="sizes of a dry run; a CPU will do")
    parser.add_argument("--json", action="store_true", help="print what was found, and nothing else")
    signal.signal(signal.SIGTERM, signal.default_int_handler)           # so that it ends its parts too
    try:
        return run(**vars(parser.parse_args(arguments)))
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
