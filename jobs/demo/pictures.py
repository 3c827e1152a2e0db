"""Draws the pictures of README and docs from a run folder of a demo model.

python -m dailies.jobs.demo.pictures out docs/demo.png
python -m dailies.jobs.demo.pictures out-sound docs/demo-av.png --sound --rows 3

A row of frames for each clip; with --sound its spectrogram below, over the same time.
"""

import argparse
import io
import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dailies import Store, open_store, read_ledger
from dailies.actors.clip_file import OPENED, pictures_of

FRAMES_SHOWN = (0, 16, 32, 48)
FRAMES_WITH_SOUND = tuple(range(0, 49, 6))               # each as wide as the time that it stands for
SCALE = 1.5                                             # pixels of the picture for one of a clip
MARGIN, LINE, BETWEEN = 8, 18, 24                       # pixels
MOST_HZ, FLOOR_DB = 1500, -60                           # of a spectrogram: its top, and what is black
SPECTROGRAM_HEIGHT = 96
FONT = ImageFont.load_default(size=11)


def drawn_clip(store: Store, row: dict[str, Any], shown: tuple[int, ...], width: int, *, sound: bool) -> Image.Image:
    """Its prompt, frames side by side, and what is heard."""
    data = store.get(row["path"])
    size = {name: row[name] for name in ("width", "height", "frames")}
    frames = [Image.fromarray(frame) for frame in pictures_of(data, shown, **size)]
    side = width // len(shown)
    height = round(side * row["height"] / row["width"])
    picture = Image.new("RGB", (width, LINE + height + (SPECTROGRAM_HEIGHT + 2 if sound else 0)), "white")
    ImageDraw.Draw(picture).text((2, 1), told_in(row["prompt"], width - 4), fill="black", font=FONT)
    for place, frame in enumerate(frames):
        picture.paste(frame.resize((side, height), Image.Resampling.NEAREST), (place * side, LINE))
    if sound:
        heard = spectrogram(*sound_of_clip(data), width=side * len(shown))
        picture.paste(heard, (0, LINE + height + 2))
    return picture


def told_in(text: str, width: int) -> str:
    """As much of it, in whole words, as that many pixels hold."""
    if FONT.getlength(text) <= width:
        return text
    words = text.split()
    while words and FONT.getlength(" ".join(words) + " …") > width:
        words.pop()
    return " ".join(words) + " …"


def sound_of_clip(data: bytes) -> tuple[Tensor, int]:
    """Samples [samples] of both ears together, in [-1, 1], and their rate."""
    with av.open(io.BytesIO(data), format="mp4", options=OPENED) as container:
        stream = container.streams.audio[0]
        parts = [frame.to_ndarray() for frame in container.decode(stream)]
        return torch.from_numpy(np.concatenate(parts, axis=1)).float().mean(0), stream.rate


def spectrogram(samples: Tensor, rate: int, *, width: int) -> Image.Image:
    """Time to the right, frequencies from 0 to MOST_HZ upwards, decibels of full scale as light."""
    window = torch.hann_window(size := 2048)
    # of full scale: a sine of amplitude 1 has half of the window's sum in its bin
    loud = torch.stft(samples, size, size // 16, window=window, return_complex=True).abs() / (window.sum() / 2)
    bins = math.ceil(MOST_HZ / rate * size)
    light = (1 - 20 * loud[:bins].clamp_min(1e-9).log10() / FLOOR_DB).clamp(0, 1).flip(0)
    red, green, blue = (light * 1.6).clamp(0, 1), (light * 2 - 0.8).clamp(0, 1), (0.5 * light + light ** 4 / 2)
    colored = (torch.stack((red, green, blue), dim=2) * 255).to(torch.uint8).numpy()
    picture = Image.fromarray(colored).resize((width, SPECTROGRAM_HEIGHT), Image.Resampling.BILINEAR)
    for hertz in (500, 1000):
        height = round(SPECTROGRAM_HEIGHT * (1 - hertz / MOST_HZ))
        ImageDraw.Draw(picture).line((0, height, 4, height), fill="white")
        ImageDraw.Draw(picture).text((7, height - 7), f"{hertz} Hz", fill="white", font=FONT)
    return picture


def drawn_sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * width + (columns - 1) * BETWEEN + 2 * MARGIN,
                              rows * (height + MARGIN) + MARGIN), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(picture, (MARGIN + column * (width + BETWEEN), MARGIN + row * (height + MARGIN)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder, or its address in a bucket")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--sound", action="store_true", help="draw spectrograms too")
    parser.add_argument("--rows", type=int, help="so many clips, the first by id; all when not given")
    args = parser.parse_args()
    store = open_store(args.run)
    done = [row for row in read_ledger(store, ["id", "status", "path", "prompt", "width", "height", "frames"])
            .sort_by("id").to_pylist() if row["status"] == "done"]
    if not done:
        raise SystemExit(f"{args.run} has no clip: render into it first")
    shown = FRAMES_WITH_SOUND if args.sound else FRAMES_SHOWN
    width = round(done[0]["width"] * SCALE) * len(shown)
    pictures = [drawn_clip(store, row, shown, width, sound=args.sound) for row in done[:args.rows]]
    drawn_sheet(pictures, 1 if args.sound else 2).save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
