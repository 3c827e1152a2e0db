"""`python -m jobs.gpu --out DIR`, from a bare checkout; `dailies bench gpu` is the same."""

import argparse
import sys
from pathlib import Path

from jobs.gpu.kit import PARTS, Kit


def main(arguments: list[str] | None = None) -> int:
    names = ", ".join(part.name for part in PARTS)
    parser = argparse.ArgumentParser(prog="python -m jobs.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, report.md and log.txt")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for all parts together")
    parser.add_argument("--only", default="", metavar="PART,PART", help=f"of {names}")
    parser.add_argument("--tiny", action="store_true", help="sizes for a dry run; a CPU will do")
    args = parser.parse_args(arguments)
    wanted = [name for name in args.only.split(",") if name]
    unknown = sorted(set(wanted) - {part.name for part in PARTS})
    if unknown:
        parser.error(f"--only: no part {', '.join(unknown)}; there are {names}")
    said = "".join([f" --budget {args.budget:g}", f" --only {args.only}" * bool(args.only), " --tiny" * args.tiny])
    return Kit(out=args.out, budget_s=args.budget, tiny=args.tiny, command=f"python -m jobs.gpu --out OUT{said}").run(
        [part for part in PARTS if not wanted or part.name in wanted])


if __name__ == "__main__":
    sys.exit(main())
