"""VAEs' decoders against diffusers': the same weights, latent, dtype and threads, each run a new process."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dailies.jobs.usage import UsageError
from dailies.model import checkpoint
from dailies.model.convolution import channels_last
from dailies.model.ltx2.codec_config import VIDEO_VAE_2_0, VIDEO_VAE_2_3
from dailies.model.ltx2.video_vae import VideoVAE, load_video_vae, only
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.vae import WanVAE, WanVAEConfig

FRAMES, HEIGHT, WIDTH = 9, 160, 256
WAN = "Wan VAE"
LTX = {"LTX-2.0 video VAE": VIDEO_VAE_2_0, "LTX-2.3 video VAE": VIDEO_VAE_2_3}
VAES = (WAN, *LTX)
# its statistics are applied outside the decoder: here they are 0 and 1
DIFFUSERS_LTX: dict[str, dict[str, Any]] = {
    "LTX-2.0 video VAE": dict(decoder_causal=False),
    "LTX-2.3 video VAE": dict(
        decoder_causal=False, block_out_channels=(256, 512, 1024, 1024), layers_per_block=(4, 6, 4, 2, 2),
        decoder_block_out_channels=(256, 512, 512, 1024), decoder_layers_per_block=(4, 6, 4, 2, 2),
        decoder_spatio_temporal_scaling=(True,) * 4, decoder_inject_noise=(False,) * 5,
        upsample_type=("spatiotemporal", "spatiotemporal", "temporal", "spatial"), upsample_residual=(False,) * 4,
        upsample_factor=(2, 2, 1, 2), decoder_spatial_padding_mode="zeros")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EQUAL = {"fp32": 1e-4, "bf16": 0.05}                    # relative rms difference at most, to count as equal output
THREADS = 2
_REPEATS = 3                                             # the two take turns, and the median counts


def rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """One case per dtype.  Raises UsageError where diffusers is not installed, ArithmeticError for unequal outputs."""
    if subprocess.run([sys.executable, "-c", "import diffusers"], capture_output=True).returncode:
        raise UsageError("bench model compares with diffusers, which is not installed: make test sets it up, or pip "
                         "install diffusers")
    for vae in VAES:
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder), vae)
            for dtype in DTYPES:
                yield f"{vae} decode, {FRAMES} frames {WIDTH}x{HEIGHT}, {dtype}", both_timed(vae, dtype, folder)


def both_timed(vae: str, dtype: str, folder: str) -> dict[str, Any]:
    """Both, in turns.  Raises ArithmeticError for unequal outputs."""
    runs = [{peer: _measured(vae, peer, dtype, folder) for peer in ("diffusers", "dailies")} for _ in range(_REPEATS)]
    ours, theirs = ({name: median(run[peer][name] for run in runs) for name in runs[0][peer]}
                    for peer in ("dailies", "diffusers"))
    a, b = (torch.load(Path(folder) / f"{peer}-{dtype}.pt") for peer in ("dailies", "diffusers"))
    difference = ((a - b).norm() / b.norm()).item()
    if not difference <= EQUAL[dtype]:
        raise ArithmeticError(f"the two outputs must be equal within {EQUAL[dtype]:g} in {dtype}; they differ by "
                              f"{difference:g}")
    return {"seconds": ours["seconds"], "diffusers_seconds": theirs["seconds"],
            "time_ratio": ours["seconds"] / theirs["seconds"],
            "cpu_time_ratio": ours["cpu_seconds"] / theirs["cpu_seconds"],     # steadier on a shared machine
            "peak_mb": ours["peak_bytes"] / 1e6, "diffusers_peak_mb": theirs["peak_bytes"] / 1e6,
            "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
            "relative_difference": difference, "threads": THREADS, "repeats": _REPEATS}


def write_inputs(folder: Path, vae: str) -> None:
    """Random weights of the full size, under the names of both, and a latent."""
    torch.manual_seed(0)
    if vae == WAN:
        model: torch.nn.Module = WanVAE(WanVAEConfig())
        theirs = checkpoint.released_state(model, wan_keys.WAN_VAE_DIFFUSERS)
        checkpoint.save(folder / "dailies.safetensors", checkpoint.released_state(model, wan_keys.WAN_VAE))
        latent = torch.randn(1, 16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    else:
        model = VideoVAE(only(LTX[vae], ["decoder"]))
        checkpoint.save(folder / "dailies.safetensors", model.state_dict())
        theirs = {diffusers_ltx_name(name): tensor for name, tensor in model.state_dict().items()}
        latent = torch.randn(1, 128, (FRAMES - 1) // 8 + 1, HEIGHT // 32, WIDTH // 32)
    checkpoint.save(folder / "diffusers.safetensors", theirs)
    checkpoint.save(folder / "latent.safetensors", {"latent": latent})


def diffusers_ltx_name(name: str) -> str:
    """Of a tensor of LTX-2's video decoder or its statistics."""
    if name.startswith("per_channel_statistics."):
        return {"mean-of-means": "latents_mean", "std-of-means": "latents_std"}[name.partition(".")[2]]
    block = re.match(r"decoder\.up_blocks\.(\d+)\.(res_blocks\.)?", name)
    if block is None:
        return name
    index, rest = int(block[1]), name[block.end():]
    inner = f"resnets.{rest}" if block[2] else f"upsamplers.0.{rest}"
    return f"decoder.mid_block.{inner}" if index == 0 else f"decoder.up_blocks.{(index - 1) // 2}.{inner}"


def _measured(vae: str, peer: str, dtype: str, folder: str) -> dict[str, Any]:
    # -P: it imports from where this process does, and not from the working directory
    done = subprocess.run([sys.executable, "-P", "-m", "dailies.jobs.bench.model", vae, peer, dtype, folder],
                          capture_output=True,
                          text=True, check=True, env=os.environ | {
                              "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
    return json.loads(done.stdout.splitlines()[-1])


def our_decoder(vae: str, dtype: str, file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    if vae == WAN:
        wan = channels_last(checkpoint.build(lambda: WanVAE(WanVAEConfig()), file, wan_keys.WAN_VAE, name="bench",
                                             device="cpu", precision=dtype))
        return lambda latent: wan.decode(latent).clamp(-1, 1)
    ltx = load_video_vae(file, name="bench", device="cpu", precision=dtype, config=LTX[vae])
    return ltx.decode


def their_decoder(vae: str, dtype: str, file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    from diffusers import AutoencoderKLLTX2Video, AutoencoderKLWan
    with torch.device("meta"):
        other = AutoencoderKLWan() if vae == WAN else AutoencoderKLLTX2Video(**DIFFUSERS_LTX[vae])
    if vae != WAN:
        del other.encoder
    stored = dict(checkpoint.views(checkpoint.stored_tensors(file)))
    other.load_state_dict({name: tensor.clone() for name, tensor in stored.items()}, assign=True)
    other.to(DTYPES[dtype]).eval()
    return lambda latent: other.decode(latent, return_dict=False)[0]


@torch.inference_mode()
def measure(vae: str, peer: str, dtype: str, folder: Path) -> dict[str, Any]:
    """Seconds of one run, and bytes above those of the loaded model at its worst moment; its output is saved."""
    torch.set_num_threads(THREADS)
    latent, = checkpoint.read_tensors(folder / "latent.safetensors", ["latent"], name="bench")
    latent = latent.to(DTYPES[dtype])
    make = our_decoder if peer == "dailies" else their_decoder
    decode = make(vae, dtype, folder / f"{peer}.safetensors")
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
    print(json.dumps(measure(*sys.argv[1:4], Path(sys.argv[4]))))
