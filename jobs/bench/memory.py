"""Does memory stay flat? Renders many tiny clips and watches the resident memory of the driver and of its workers."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dailies.pipeline.run.layout import clip_key

_CLIPS = 500


def memory(clips: int = _CLIPS) -> dict[str, float]:
    """Resident megabytes at the end and their growth per 100 clips over the run's second half: driver, and all workers.

    The clips are the demo model's smallest: 5 frames, 2 steps. Raises RuntimeError when the render fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "many.csv"
        manifest.write_text("prompt,seed,frames,steps\n" + "".join(
            f"a red circle moves left on a gray background {i % 50},{i},5,2\n" for i in range(clips)))
        out = Path(folder) / "out"
        log = (Path(folder) / "log").open("w+")
        render = subprocess.Popen([sys.executable, "-m", "dailies", "render", str(manifest), "--out",
                                   str(out)],
                                  stdout=log, stderr=subprocess.STDOUT)
        seen: dict[str, list[tuple[int, float]]] = {}
        while render.poll() is None:
            time.sleep(1.0)
            done = sum(1 for _ in out.glob(clip_key("*")))
            for name, megabytes in resident(render.pid).items():
                seen.setdefault(name, []).append((done, megabytes))
        if render.returncode:
            log.seek(0)
            raise RuntimeError(f"render ended with {render.returncode}: {log.read()[-2000:]}")
    figures: dict[str, float] = {"clips": clips}
    for name, points in sorted(seen.items()):
        late = [(done, mb) for done, mb in points if done >= clips / 2 and mb > 0]     # 0: it was ending
        if len(late) >= 5:
            figures[f"{name}_mb"] = late[-1][1]
            figures[f"{name}_mb_per_100_clips"] = 100 * slope(late)
    return figures


def resident(pid: int) -> dict[str, float]:
    """Megabytes of the driver, and of the stages' processes on this machine, together."""
    parents, sizes, names = {}, {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                memory = int((folder / "statm").read_text().split()[1])
            except OSError:                             # it has ended meanwhile
                continue
            parents[int(folder.name)], sizes[int(folder.name)], names[int(folder.name)] = int(stat[1]), memory, command
    found: dict[str, float] = {"driver": sizes.get(pid, 0) * 4096 / 2**20}
    for child in parents:
        ancestor = child
        while ancestor in parents and ancestor != pid:
            ancestor = parents[ancestor]
        if ancestor == pid and names[child].startswith("ray::Process"):     # ray_executor.py: one stage's worker
            found["workers"] = found.get("workers", 0.0) + sizes[child] * 4096 / 2**20
    return found


def slope(points: list[tuple[int, float]]) -> float:
    """Least squares: megabytes per clip."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
