"""What the morning report costs: to write it, to open it, and to go from clip to clip; with Chromium, without a window.

The clips are synthetic, their posters and files are real ones: a few, under many names.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dailies.actors.clip_writer import ClipWriter
from dailies.actors.messages import Frames
from dailies.actors.poster import poster, shown_frames
from dailies.jobs.bench.chromium import Browser, NoBrowser
from dailies.jobs.bench.pretend import pretend_request
from dailies.model.shapes import VideoShape
from dailies.pipeline.run.layout import RUN, clip_key, poster_key
from dailies.pipeline.run.ledger import Ledger
from dailies.pipeline.store import FolderStore

FEW, MANY = 10_000, 100_000
DIFFERENT = 64                          # posters
LATENCY_S = 0.05                        # of a store, each answer
PRESSES = 500
PART = 1000                             # rows
SCENES = ("a fox runs through snow at dawn, slow dolly, film grain, soft light",
         "an old harbour in fog, a red boat rocks, gulls, wide shot, muted colours",
         "close-up of hands that knead dough on a floured table, warm light, shallow focus",
         "a glass city at night after rain, neon in puddles, a tram passes, low angle",
         "two children fly a kite on a dune, wind in the grass, handheld, late afternoon")
MEASURED_CHILD = """import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"wall_s": time.perf_counter() - began, "cpu_s": used.ru_utime + used.ru_stime,
                  "peak_mb": used.ru_maxrss / 1024}))
print(done.stdout.strip())"""
BEGUN = "document.body.classList.contains('begun')"
PICTURES_SEEN = """(async () => {
  const shown = [...document.querySelectorAll('.picture')].map(each => each.style.backgroundImage.slice(5, -2));
  await Promise.all(shown.map(src => { const image = new Image(); image.src = src; return image.decode(); }));
  return performance.now();
})()"""
# after a key until the poster of another clip is decoded and two frames are drawn
WATCH = """window.pressed = []; addEventListener('keydown', () => {
  const began = performance.now();
  const look = () => {
    const src = document.querySelector('.stage .picture').style.backgroundImage;
    if (src === window.last) { requestAnimationFrame(look); return; }
    window.last = src;
    const image = new Image();
    image.src = src.slice(5, -2);
    image.decode().then(() => requestAnimationFrame(() => requestAnimationFrame(() =>
      window.pressed.push(performance.now() - began))));
  };
  look();
})"""


def rows() -> Iterator[tuple[str, dict[str, Any]]]:
    with tempfile.TemporaryDirectory(prefix="dailies-bench-") as folder:
        night = Path(folder) / "night"
        make_night(night, FEW)
        yield f"write it, {FEW:,} clips", written(night)
        yield f"write it again, {FEW:,} clips", written(night)
        try:
            yield f"open it from a disk, {FEW:,} clips", opened(f"file://{night}/report/index.html")
            with slow_server(night) as address:
                yield f"open it from a store with 50 ms latency, {FEW:,} clips", opened(address)
            yield f"from key to next picture, {PRESSES} keys", keyed(f"file://{night}/report/index.html")
            yield f"sort, filter and search, {FEW:,} clips", asked(f"file://{night}/report/index.html")
        except NoBrowser as error:
            yield "not measured", {"not installed": str(error)}
    with tempfile.TemporaryDirectory(prefix="dailies-bench-") as folder:
        night = Path(folder) / "night"
        make_night(night, MANY)
        yield f"write it, {MANY:,} clips", written(night)
        try:
            yield f"open it from a disk, {MANY:,} clips", opened(f"file://{night}/report/index.html")
            yield f"sort, filter and search, {MANY:,} clips", asked(f"file://{night}/report/index.html")
        except NoBrowser:
            return


def make_night(folder: Path, clips: int) -> None:
    """A run folder of so many clips, with posters and files that are links to a few."""
    store = FolderStore(folder)
    store.put(RUN, json.dumps({
        "identity": {"model": "pretend"}, "rows": clips, "planned_rows": clips, "invalid_rows": 0, "clips": clips,
        "buckets": [], "more_buckets": 0, "job": {"price": 2.5}, "began_at": "2026-11-29T21:00:00+00:00"}).encode())
    how = np.random.default_rng(7)
    made = Path(folder) / "made"
    made.mkdir()
    request = pretend_request(0)
    pictures = [moving(how, frames=17) for _ in range(DIFFERENT)]
    for number, rgb in enumerate(pictures):
        (made / f"{number}.webp").write_bytes(poster([rgb[index] for index in shown_frames(len(rgb))]))
    shape = VideoShape(frames=17, height=270, width=480)
    keep = FolderStore(made / "clip")
    ClipWriter(keep, clip_key).publish(Frames(request=type(request)(**vars(request) | {"shape": shape}),
                                              rgb=torch.from_numpy(pictures[0])))
    clip = (made / "clip" / clip_key(request.clip_id)).read_bytes()
    for number in range(DIFFERENT):                     # a file has 65,000 names at most
        (made / f"{number}.mp4").write_bytes(clip)
    names = [how.bytes(32).hex() for _ in range(clips)]
    for key_of in (clip_key, poster_key):
        for shard in range(256):
            (folder / key_of(f"{shard:02x}")).parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        os.link(made / f"{number % DIFFERENT}.webp", folder / poster_key(name))
        os.link(made / f"{number % DIFFERENT}.mp4", folder / clip_key(name))
    with Ledger.open(store) as ledger:
        for start in range(0, clips, PART):
            ledger.append(rows_of_part(how, names, start, min(PART, clips - start)))


def moving(how: np.random.Generator, *, frames: int, height: int = 270, width: int = 480) -> np.ndarray:
    """uint8 [frames, height, width, 3]: smooth colours that drift, with grain, about as hard to compress as a film."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    phase, speed = how.uniform(0, 6, (6, 3)), how.uniform(-0.4, 0.4, 6)
    waves = how.uniform(0.004, 0.05, (6, 2))
    found = []
    for frame in range(frames):
        light = sum(np.sin(x * waves[k, 0] + y * waves[k, 1] + frame * speed[k])[..., None] * np.sin(phase[k])
                    for k in range(6))
        found.append(np.clip(120 + 28 * light + how.normal(0, 4, (height, width, 1)), 0, 255).astype(np.uint8))
    return np.stack(found)


def rows_of_part(how: np.random.Generator, names: list[str], start: int, count: int) -> list[dict[str, Any]]:
    """Rows of the ledger, as a night would have written them."""
    began = datetime(2026, 11, 29, 21, tzinfo=UTC)
    same = {"status": "done", "width": 480, "height": 270, "frames": 17, "fps": 24.0, "duration_s": 17 / 24,
            "has_audio": False, "steps": 50, "guidance": 7.5, "model": "pretend", "negative_prompt": "blurry, text",
            "device": "NVIDIA H200", "fallbacks": []}
    measured = {f"quality.{name}": how.uniform(0, 100, count).tolist()
                for name in ("brightness", "contrast", "motion", "flicker", "psnr_db")}
    measured |= {f"{stage}_s": how.uniform(0.5, 1.5, count).tolist()
                 for stage in ("encode", "sample", "decode", "publish")}
    measured |= {"queue_s": how.uniform(0, 60, count).tolist(), "gpu_s": how.uniform(10, 20, count).tolist(),
                 "seed": how.integers(0, 2**62, count).tolist(), "bytes": how.integers(4e5, 4e6, count).tolist(),
                 "attempts": how.integers(1, 3, count).tolist()}
    return [same | {name: values[place] for name, values in measured.items()} | {
        "id": f"shot-{number:06d}", "clip_id": names[number], "sha256": names[number][::-1],
        "prompt": f"{SCENES[number // 4 % len(SCENES)]}, take {number // 4}", "worker": f"publish-{number % 8}@node",
        "finished_at": began + timedelta(seconds=2.0 * number)}
        for place, number in enumerate(range(start, start + count))]


def written(folder: Path) -> dict[str, Any]:
    """`dailies report` in a process of its own; its memory is asked of a small process between, which starts it."""
    command = [sys.executable, "-c", MEASURED_CHILD, sys.executable, "-m", "dailies", "report", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cost, said = map(json.loads, done.stdout.splitlines())
    return cost | {"files": said["files"], "new_files": said["new_files"], "mb_beside_posters": said["bytes"] / 1e6,
                   "first_data_mb": said["first_bytes"] / 1e6}


def opened(address: str) -> dict[str, Any]:
    """Until the first tiles are there, and until all pictures in sight are decoded; milliseconds since the address was
    given; the median of three."""
    found = []
    for _ in range(3):
        with Browser(1440, 900) as browser:
            browser.open(address, until=BEGUN)
            begun = browser.run("dailies.begunAt")
            found.append({"tiles_ms": begun, "pictures_ms": browser.run(PICTURES_SEEN),
                          "requests": len(browser.requested())})
    middle = sorted(found, key=lambda each: each["pictures_ms"])[1]
    return middle | {"slowest_ms": max(each["pictures_ms"] for each in found)}


def keyed(address: str) -> dict[str, Any]:
    with Browser(1440, 900) as browser:
        browser.open(address, until=BEGUN)
        browser.key("ArrowRight")
        browser.key("Enter")
        browser.wait("!document.querySelector('#viewer').hidden")
        browser.run(f"window.last = document.querySelector('.stage .picture').style.backgroundImage; {WATCH}; 1")
        for number in range(PRESSES):
            browser.key(("p", "x", "ArrowRight", "r", "j")[number % 5])
            browser.wait(f"window.pressed.length === {number + 1}")
        took = browser.run("window.pressed")
    cuts = statistics.quantiles(took, n=100)
    return {"median_ms": statistics.median(took), "p95_ms": cuts[94], "slowest_ms": max(took)}


def asked(address: str) -> dict[str, Any]:
    """Milliseconds from the question to the new contact sheet, columns fetched on the way."""
    questions = {"sort_ms": "Object.assign(dailies.query.wanted, {sort: 'quality.motion'})",
                 "filter_ms": "dailies.query.wanted.filters = [{column: 'quality.contrast', how: '>=', value: '50'}]",
                 "search_ms": "dailies.query.wanted.words = 'red boat'",
                 "group_ms": "dailies.query.wanted.grouped = true"}
    with Browser(1440, 900) as browser:
        browser.open(address, until=BEGUN)
        return {name: browser.run(f"(async () => {{ const began = performance.now(); {question}; "
                                  "await dailies.controls.again(); return performance.now() - began; })()")
                for name, question in questions.items()}


class Slowly(SimpleHTTPRequestHandler):
    """A store that answers each request after a while."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(LATENCY_S)
        with suppress(ConnectionError):                 # a browser that closes waits for nothing
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def slow_server(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Slowly, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/report/index.html"
    finally:
        server.shutdown()
        server.server_close()
