"""How well the demo's VAE shows what it codes: dB on the moving shape's own pixels, by quarter of the clip.

python -m dailies.jobs.demo.vae_quality --weights model/demo --clips 200 --device cpu

A sampler can do no better than its VAE, and a VAE that has learnt short clips decodes long ones worse towards the end.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dailies.jobs.demo.world import SPEEDS, Painter, unseen
from dailies.model.catalog import DEMO
from dailies.model.linum.load import LINUM
from dailies.model.wan.vae import WanVAE

BATCH = 8


@torch.inference_mode()
def vae_quality(vae: WanVAE, clips: int = 200, *, frames: int = 49, device: str = "cpu") -> dict[str, Any]:
    """Of so many unseen clips, coded and decoded, slow and fast: dB of the shape's pixels in each quarter.

    db: of all clips' pixels together; mean_db: mean of the clips' own; worst_db: of the worst clip.
    """
    painter, scenes = Painter(device), [scene for scene, _ in unseen(clips)]
    errors: dict[str, list[Tensor]] = {speed: [] for speed in SPEEDS}
    for start in range(0, clips, BATCH):
        some = scenes[start:start + BATCH]
        video, coverage = painter.render(*painter.of(some), frames)
        decoded = vae.decode(vae.encode(video)[0]).clamp(-1, 1)
        error, inside = (decoded - video).square().mean(dim=1), coverage > 0.5                   # [B, F, H, W]
        bounds = [round(quarter * frames / 4) for quarter in range(5)]
        of_quarters = torch.stack([(error * inside)[:, a:b].sum(dim=(1, 2, 3)) / inside[:, a:b].sum(dim=(1, 2, 3))
                                   for a, b in zip(bounds, bounds[1:], strict=False)], dim=1).cpu()      # [B, 4]
        for scene, row in zip(some, of_quarters, strict=True):
            errors[scene.speed].append(row)
    return {speed: dict(clips=len(rows), db=decibels(torch.stack(rows).mean(dim=0)),
                        mean_db=[round(of_clips, 2) for of_clips in
                                 (10 * (4 / torch.stack(rows)).log10()).mean(dim=0).tolist()],
                        worst_db=decibels(torch.stack(rows).amax(dim=0)))
            for speed, rows in errors.items() if rows}


def decibels(squared_errors: Iterable[Tensor]) -> list[float]:
    """Of pixels in [-1, 1]."""
    return [round(10 * math.log10(4 / max(float(error), 1e-12)), 2) for error in squared_errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=DEMO.folder, help="a folder laid out as model/demo")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    began = time.monotonic()
    quality = vae_quality(LINUM.load_vae(DEMO, args.weights, DEMO.runtime(args.device, "fp32")), args.clips,
                          device=args.device)
    print(json.dumps(dict(clips=args.clips, seconds=round(time.monotonic() - began, 1), **quality), indent=2))


if __name__ == "__main__":
    main()
