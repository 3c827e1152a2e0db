"""One forward of LTX-2's transformer against diffusers': the same random weights, latents, texts and threads, in turns.

Two blocks of the published widths, 1,024 tokens of picture and 126 of sound, 1,024 rows of text each; on a CPU.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dailies.jobs.bench.dit import in_turns
from dailies.jobs.usage import UsageError
from dailies.model import checkpoint, turbo
from dailies.model.card import Sparsity
from dailies.model.layers import takes_low_precision
from dailies.model.ltx2.adaln import Levels
from dailies.model.ltx2.config import LtxConfig
from dailies.model.ltx2.keys import LTX2_DIFFUSERS
from dailies.model.ltx2.rope import audio_positions, video_positions
from dailies.model.ltx2.transformer import LtxTransformer, Modality

RELEASES = {"ltx-2-19b": LtxConfig(layers=2), "ltx-2.3": LtxConfig(layers=2, gated=True, modulated_text=True,
                                                                  caption_width=None)}
GRID, SOUND_TOKENS, ROWS_OF_TEXT = (4, 16, 16), 126, 1024
EQUAL_OUTPUTS = {"fp32": 1e-4, "bf16": 0.03}            # relative rms difference at most
WANTED_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@torch.inference_mode()
def ltx2_rows(name: str, repeats: int = 3) -> Iterator[tuple[str, dict[str, Any]]]:
    """A line for each precision; the processor's seconds are the steadier ones where other programs run too.

    name: of a release.  Raises UsageError for another, ArithmeticError for unequal outputs.
    """
    if name not in RELEASES:
        raise UsageError(f"bench model compares LTX-2 as {' and '.join(RELEASES)}; got {name}")
    for precision in WANTED_DTYPES:
        ours, given = random_model(RELEASES[name], precision), inputs_of(RELEASES[name], WANTED_DTYPES[precision])
        calls = {("dailies",): our_call(ours, given), ("diffusers",): their_call(ours, given, precision)}
        results = {who: call() for who, call in calls.items()}
        differences = [((a - b).norm() / b.norm()).item() for a, b in zip(*results.values(), strict=True)]
        if not max(differences) <= EQUAL_OUTPUTS[precision]:
            raise ArithmeticError(f"the outputs must be equal within {EQUAL_OUTPUTS[precision]:g} in {precision}; they "
                                  f"differ by {max(differences):g}")
        wall, cpu = in_turns({who: lambda call=call: call()[0] for who, call in calls.items()}, "cpu", repeats)
        mine, theirs = ("dailies",), ("diffusers",)
        yield f"{name} forward, 2 blocks, 1,024 and {SOUND_TOKENS} tokens, {precision}", {
            "seconds": wall[mine], "diffusers_seconds": wall[theirs], "time_ratio": wall[mine] / wall[theirs],
            "cpu_time_ratio": cpu[mine] / cpu[theirs], "relative_difference": max(differences),
            "threads": torch.get_num_threads(), "repeats": repeats}
        del ours, calls


def random_model(config: LtxConfig, precision: str) -> LtxTransformer:
    """Refitted, as turbo.build leaves it."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LtxTransformer(config)
    for name, module in model.named_modules():
        dtype = WANTED_DTYPES[precision] if takes_low_precision(module) else torch.float32
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=dtype).normal_(0, 0.02)
            module.register_parameter(leaf, nn.Parameter(values.add_(1) if "norm" in name else values, False))
    turbo.refit(model, "dense", Sparsity(keep_ratio=1.0))
    return model.eval()


def inputs_of(config: LtxConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    widths = [config.caption_width or width for width in (config.width, config.audio_width)]
    tokens = GRID[0] * GRID[1] * GRID[2]
    shapes = {"video": (tokens, config.channels), "audio": (SOUND_TOKENS, config.audio_channels),
              "video_text": (ROWS_OF_TEXT, widths[0]), "audio_text": (ROWS_OF_TEXT, widths[1])}
    return {name: torch.randn(1, *shape).to(dtype) for name, shape in shapes.items()}


def our_call(dit: LtxTransformer, given: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A step, as a sampler takes it: what depends on no time is made once a clip."""
    sigma = torch.tensor([0.7])
    video, audio = (
        Modality(given[stream], Levels(sigma[:, None]), sigma, places,
                 dit.read(given[f"{stream}_text"], audio=stream == "audio"))
        for stream, places in (("video", video_positions(GRID, 24.0)), ("audio", audio_positions(SOUND_TOKENS))))
    ropes = dit.ropes(video.positions, audio.positions)
    return lambda: dit(video, audio, ropes=ropes)


def their_call(ours: LtxTransformer, given: dict[str, Tensor], precision: str) -> Callable[[], tuple[Tensor, ...]]:
    """Of the weights of ours, in one dtype, as their pipeline has it."""
    import diffusers
    diffusers.logging.set_verbosity_error()
    config, newer = ours.config, ours.config.gated
    with torch.device("meta"):
        dit = diffusers.LTX2VideoTransformer3DModel(
            num_layers=config.layers, gated_attn=newer, cross_attn_mod=newer, audio_gated_attn=newer,
            audio_cross_attn_mod=newer, rope_type="split", use_prompt_embeddings=not newer)
    dit.load_state_dict({name: tensor.to(WANTED_DTYPES[precision]) for name, tensor in
                         checkpoint.released_state(ours, LTX2_DIFFUSERS).items()}, assign=True)
    dit.eval()
    time = torch.tensor([700.0])
    return lambda: tuple(part.float() for part in dit(
        given["video"], given["audio"], given["video_text"], given["audio_text"], timestep=time, sigma=time,
        num_frames=GRID[0], height=GRID[1], width=GRID[2], fps=24.0, audio_num_frames=SOUND_TOKENS, return_dict=False))
