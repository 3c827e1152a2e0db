"""Random small LTX-2 transformers and connectors against diffusers, another implementation, where both agree by design.

They differ by design in which time the cross-modal modulation is told (LtxConfig.cross_time): theirs are our `own` and
`other`; the release's own rule is in no release of theirs, and equal to both where all tokens have one sigma.
"""

import random

import pytest
import torch
from golden import error
from parity import randomise, with_weights_of

from dailies.model.ltx2.config import ConnectorsConfig, LtxConfig
from dailies.model.ltx2.connectors import TextConnectors
from dailies.model.ltx2.keys import LTX2_CONNECTORS_DIFFUSERS, LTX2_DIFFUSERS
from dailies.model.ltx2.rope import audio_positions, video_positions
from dailies.model.ltx2.transformer import LtxTransformer, Modality

diffusers = pytest.importorskip("diffusers")
from_pipelines = pytest.importorskip("diffusers.pipelines.ltx2.connectors")
SEEDS = range(10)


def described(pick):
    """A configuration of ours and of theirs: of the layout of 2.0, 2.3 or 2.5."""
    layout = pick.choice(["2.0", "2.3", "2.5"])
    heads, head_dim, sound = pick.choice([2, 4]), pick.choice([10, 16, 20]), pick.choice([6, 8, 10])
    newer = layout != "2.0"
    config = LtxConfig(
        layers=2, channels=pick.choice([8, 16]), heads=heads, width=heads * head_dim, audio_channels=16,
        audio_heads=heads, audio_width=heads * sound, caption_width=None if newer else 24, gated=newer,
        modulated_text=newer, ff_bias=layout != "2.5", keyframes=layout == "2.5",
        rope_halves=pick.random() < 0.6, rope_exact=pick.random() < 0.7, cross_time=pick.choice(["own", "other"]))
    theirs = diffusers.LTX2VideoTransformer3DModel(
        in_channels=config.channels, out_channels=config.channels, num_attention_heads=heads,
        attention_head_dim=head_dim, cross_attention_dim=config.width, gated_attn=newer, cross_attn_mod=newer,
        audio_in_channels=16, audio_out_channels=16, audio_num_attention_heads=heads, audio_attention_head_dim=sound,
        audio_cross_attention_dim=config.audio_width, audio_gated_attn=newer, audio_cross_attn_mod=newer, num_layers=2,
        caption_channels=24, rope_type="split" if config.rope_halves else "interleaved",
        rope_double_precision=config.rope_exact, use_prompt_embeddings=not newer, perturbed_attn=True,
        ff_bias=config.ff_bias, use_keyframes_abs_pos_embedding=config.keyframes)
    return config, theirs


@pytest.mark.parametrize("seed", SEEDS)
def test_both_velocities_are_those_of_diffusers(seed, tmp_path):
    pick = random.Random(seed)
    config, theirs = described(pick)
    randomise(theirs, seed)
    dit = with_weights_of(theirs, lambda: LtxTransformer(config), tmp_path, LTX2_DIFFUSERS)
    batch, grid, count = pick.choice([1, 2]), (pick.choice([1, 3]), 2, 3), pick.choice([4, 5])
    tokens, fps = grid[0] * 6, pick.choice([24.0, 25.0])
    widths = (24, 24) if config.caption_width else (config.width, config.audio_width)
    latents = [torch.randn(batch, n, size) for n, size in ((tokens, config.channels), (count, 16))]
    contexts = [torch.randn(batch, 8, width) for width in widths]
    sigmas = torch.rand(2, batch)
    # some tokens are told less noise than the rest, some the same: image tokens, or none
    times = [sigma[:, None] * torch.tensor([pick.choice([0.0, 0.4, 1.0]) for _ in range(n)])
             for sigma, n in zip(sigmas, (tokens, count), strict=True)]
    places = [video_positions(grid, fps), audio_positions(count)]
    marked = (torch.arange(tokens) < 6).float().expand(batch, -1) if config.keyframes else None
    video, audio = (Modality(latent, time, sigma, place, context, marks) for latent, time, sigma, place, context, marks
                    in zip(latents, times, sigmas, places, contexts, (marked, None), strict=True))
    skipped, isolated = pick.choice([(), (0,), (0, 1)]), pick.random() < 0.3
    want = theirs(*latents, *contexts, timestep=1000 * times[0], audio_timestep=1000 * times[1],
                  sigma=1000 * sigmas[0], audio_sigma=1000 * sigmas[1], num_frames=grid[0], height=2, width=3, fps=fps,
                  audio_num_frames=count, spatio_temporal_guidance_blocks=list(skipped), isolate_modalities=isolated,
                  use_cross_timestep=config.cross_time == "other",
                  video_keyframes_mask=None if marked is None else marked[..., None], return_dict=False)
    got = dit(video, audio, skip_video=skipped, skip_audio=skipped, isolated=isolated)
    assert error(got[0], want[0]) < 1e-4 and error(got[1], want[1]) < 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_the_contexts_of_a_text_are_those_of_diffusers(seed, tmp_path):
    pick = random.Random(seed)
    newer, heads = pick.random() < 0.5, pick.choice([2, 4])
    widths = (heads * 10, heads * 6) if newer else (24, 24)
    config = ConnectorsConfig(
        hidden=24, stack=3, layers=pick.choice([1, 2]), heads=heads, width=widths[0], audio_heads=heads,
        audio_width=widths[1], registers=4, per_token=newer, gated=newer, most=pick.choice([16, 4096]),
        rope_halves=pick.random() < 0.6, rope_exact=pick.random() < 0.7)
    theirs = randomise(from_pipelines.LTX2TextConnectors(
        caption_channels=24, text_proj_in_factor=3, per_modality_projections=newer, proj_bias=newer,
        video_hidden_dim=widths[0], audio_hidden_dim=widths[1], connector_rope_base_seq_len=config.most,
        rope_type="split" if config.rope_halves else "interleaved", rope_double_precision=config.rope_exact,
        **{f"{stream}_{name}": value for stream, width in zip(("video", "audio"), widths, strict=True)
           for name, value in (("connector_num_attention_heads", heads), ("gated_attn", newer),
                               ("connector_attention_head_dim", width // heads),
                               ("connector_num_layers", config.layers),
                               ("connector_num_learnable_registers", 4))}), seed)
    connectors = with_weights_of(theirs, lambda: TextConnectors(config), tmp_path, LTX2_CONNECTORS_DIFFUSERS)
    length, count = 16, pick.randint(1, 16)
    stack, mask = torch.randn(1, length, 24, 3), (torch.arange(length) >= length - count)[None].long()
    want = theirs(stack, mask)
    for got, theirs_rows in zip(connectors(stack[0, -count:], length), want, strict=False):
        assert error(got, theirs_rows[0]) < 1e-4
