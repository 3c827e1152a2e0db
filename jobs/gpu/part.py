"""One part of the kit, in its own process: `python -m dailies.jobs.gpu.part NAME --found FILE`."""

import argparse
import os
from pathlib import Path

import torch

from dailies.jobs.gpu import checks, timings
from dailies.jobs.gpu.ground import Ground


def main(arguments: list[str] | None = None) -> int:
    parts = {**checks.PARTS, **timings.PARTS}
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=parts)
    parser.add_argument("--found", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(arguments)
    # children of this one (compilers) must not each take all cores
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    with args.found.open("w") as file:
        ground = Ground(device="cuda" if torch.cuda.is_available() else "cpu", tiny=args.tiny, file=file)
        with torch.inference_mode():
            parts[args.part](ground)
    return 1 if ground.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
