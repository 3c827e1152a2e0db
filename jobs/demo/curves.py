"""Draws the curves of a training from the logs that it left, a panel for each phase.

python -m dailies.jobs.demo.curves build/demo curves.png --log training.txt

Light: what each logged batch had; dark: the median of the nine around it. Steps to the right; of a loss, and of dB,
where a phase has them.
"""

import argparse
import math
from pathlib import Path
from statistics import median
from typing import NamedTuple

from PIL import Image, ImageDraw

from dailies.jobs.demo.pictures import FONT

PANEL_WIDTH, PANEL_HEIGHT, PANEL_EDGE, PANEL_HEAD = 420, 170, 46, 20          # pixels of a panel
DRAWN = {"loss": (200, 60, 50), "late_psnr": (40, 90, 200)}
AROUND = 4                                              # batches on each side of a median
LOG_EVERY = 100                                         # steps


class Point(NamedTuple):
    step: int
    figures: dict[str, float]


def read_log(path: Path) -> list[Point]:
    """Of a phase, in the order of its steps; of steps that were taken again after an interruption, the last."""
    points = {}
    for line in path.read_text().splitlines():
        _, step, *said = line.split()
        points[int(step)] = Point(int(step), {name: float(value) for name, value in zip(said[::2], said[1::2],
                                                                                        strict=True)})
    return [points[step] for step in sorted(points)]


def drawn_panel(title: str, points: list[Point], name: str) -> Image.Image:
    """name: of the figure.  The lowest and the highest hundredth are drawn at the edge."""
    picture = Image.new("RGB", (PANEL_WIDTH, PANEL_HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    points = [point for point in points if not math.isnan(point.figures[name])]
    steps, values = [point.step for point in points], [point.figures[name] for point in points]
    ranked = sorted(values)
    low, high = ranked[len(ranked) // 100], ranked[-1 - len(ranked) // 100]

    def at(step: int, value: float) -> tuple[float, float]:
        share = (min(max(value, low), high) - low) / max(high - low, 1e-9)
        down = PANEL_HEIGHT - 20 - (PANEL_HEIGHT - 20 - PANEL_HEAD) * share
        return PANEL_EDGE + (PANEL_WIDTH - PANEL_EDGE - 8) * step / steps[-1], down

    draw.text((PANEL_EDGE, 3), f"{title}: {name}", fill="black", font=FONT)
    for value in (low, high):
        draw.text((2, at(0, value)[1] - 7), f"{value:.3g}", fill="black", font=FONT)
    draw.text((PANEL_WIDTH - 44, PANEL_HEIGHT - 16), f"{steps[-1]:,}", fill="black", font=FONT)
    color = DRAWN[name]
    pale = tuple(255 - (255 - part) // 4 for part in color)
    draw.line([at(step, value) for step, value in zip(steps, values, strict=True)], fill=pale)
    smooth = [median(values[max(0, i - AROUND):i + AROUND + 1]) for i in range(len(values))]
    draw.line([at(step, value) for step, value in zip(steps, smooth, strict=True)], fill=color, width=2)
    return picture


def drawn_curves(logs: dict[str, list[Point]]) -> Image.Image:
    panels = [drawn_panel(phase, points, name) for phase, points in logs.items() for name in DRAWN
              if name in points[0].figures]
    sheet = Image.new("RGB", (2 * PANEL_WIDTH, -(-len(panels) // 2) * PANEL_HEIGHT), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number % 2 * PANEL_WIDTH, number // 2 * PANEL_HEIGHT))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="where the training kept its progress")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--log", type=Path, help=f"a file for every {LOG_EVERY}th step of all phases")
    args = parser.parse_args()
    paths = sorted(args.work.glob("*.log"), key=lambda path: path.stat().st_mtime)
    logs = {path.stem: read_log(path) for path in paths if path.stat().st_size}
    if not logs:
        raise SystemExit(f"{args.work} has no log of a training: a folder is needed that was its --work")
    drawn_curves(logs).save(args.picture, optimize=True)
    if args.log:
        args.log.write_text("".join(
            f"{phase} {step} " + " ".join(f"{name} {value:g}" for name, value in figures.items()) + "\n"
            for phase, points in logs.items() for step, figures in points if step % LOG_EVERY == 0))


if __name__ == "__main__":
    main()
