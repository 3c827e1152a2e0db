"""The VAE's decoder against diffusers': the same weights, latent, dtype and threads, each run a new process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dailies.jobs.usage import UsageError
from dailies.model import checkpoint
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.vae import WanVAE, WanVAEConfig, channels_last

FRAMES, HEIGHT, WIDTH = 9, 160, 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EQUAL = {"fp32": 1e-4, "bf16": 0.05}                    # relative rms difference at most, to count as equal output
THREADS = 2
_REPEATS = 3                                             # the two take turns, and the median counts


def rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """One case per dtype.  Raises UsageError where diffusers is not installed, ArithmeticError for unequal outputs."""
    if subprocess.run([sys.executable, "-c", "import diffusers"], capture_output=True).returncode:
        raise UsageError("bench model compares with diffusers, which is not installed: make test sets it up, or pip "
                         "install diffusers")
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        for dtype in DTYPES:
            runs = [{peer: _measured(peer, dtype, folder) for peer in ("diffusers", "dailies")}
                    for _ in range(_REPEATS)]
            ours, theirs = ({name: median(run[peer][name] for run in runs) for name in runs[0][peer]}
                            for peer in ("dailies", "diffusers"))
            a, b = (torch.load(Path(folder) / f"{peer}-{dtype}.pt") for peer in ("dailies", "diffusers"))
            difference = ((a - b).norm() / b.norm()).item()
            if not difference <= EQUAL[dtype]:
                raise ArithmeticError(f"the two outputs must be equal within {EQUAL[dtype]:g} in {dtype}; "
                                      f"they differ by {difference:g}")
            yield f"Wan VAE decode, {FRAMES} frames {WIDTH}x{HEIGHT}, {dtype}", {
                "seconds": ours["seconds"], "diffusers_seconds": theirs["seconds"],
                "time_ratio": ours["seconds"] / theirs["seconds"],
                "cpu_time_ratio": ours["cpu_seconds"] / theirs["cpu_seconds"],     # steadier on a shared machine
                "peak_mb": ours["peak_bytes"] / 1e6, "diffusers_peak_mb": theirs["peak_bytes"] / 1e6,
                "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
                "relative_difference": difference, "threads": THREADS, "repeats": _REPEATS}


def write_inputs(folder: Path) -> None:
    """Random weights of the full size, under the names of both, and a latent."""
    torch.manual_seed(0)
    vae = WanVAE(WanVAEConfig())
    checkpoint.save(folder / "dailies.safetensors", checkpoint.released_state(vae, wan_keys.WAN_VAE))
    checkpoint.save(folder / "diffusers.safetensors", checkpoint.released_state(vae, wan_keys.WAN_VAE_DIFFUSERS))
    latent = torch.randn(1, 16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    checkpoint.save(folder / "latent.safetensors", {"latent": latent})


def _measured(peer: str, dtype: str, folder: str) -> dict[str, Any]:
    # -P: it imports from where this process does, and not from the working directory
    done = subprocess.run([sys.executable, "-P", "-m", "dailies.jobs.bench.model", peer, dtype, folder],
                          capture_output=True,
                          text=True, check=True, env=os.environ | {
                              "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def measure(peer: str, dtype: str, folder: Path) -> dict[str, Any]:
    """Seconds of one run, and bytes above those of the loaded model at its worst moment; its output is saved."""
    torch.set_num_threads(THREADS)
    latent, = checkpoint.read_tensors(folder / "latent.safetensors", ["latent"], name="bench")
    latent = latent.to(DTYPES[dtype])
    if peer == "dailies":
        vae = channels_last(checkpoint.build(lambda: WanVAE(WanVAEConfig()), folder / "dailies.safetensors",
                                             wan_keys.WAN_VAE, name="bench", device="cpu", precision=dtype))

        def decode(latent: torch.Tensor) -> torch.Tensor:
            return vae.decode(latent).clamp(-1, 1)
    else:
        from diffusers import AutoencoderKLWan
        with torch.device("meta"):
            other = AutoencoderKLWan()
        stored = dict(checkpoint.views(checkpoint.stored_tensors(folder / "diffusers.safetensors")))
        other.load_state_dict({name: tensor.clone() for name, tensor in stored.items()}, assign=True)
        other.to(DTYPES[dtype]).eval()

        def decode(latent: torch.Tensor) -> torch.Tensor:
            return other.decode(latent, return_dict=False)[0]
    decode(latent[..., :2, :2])                         # what is made once is made
    before = reset_peak()
    began, cpu_began = time.perf_counter(), time.process_time()
    pixels = decode(latent)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    peak = _memory("VmHWM") - before
    torch.save(pixels.float(), folder / f"{peer}-{dtype}.pt")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}


def reset_peak() -> int:
    """Make the process's peak what it holds now, and tell that.  Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
