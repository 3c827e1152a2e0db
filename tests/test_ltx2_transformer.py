"""LTX-2's transformer against the release's own output and against diffusers; its configuration, keys and sizes."""

from fractions import Fraction

import pytest
import torch
from golden import Golden, error

from dailies.model import checkpoint
from dailies.model.ltx2.config import DIT_PREFIX, transformer_config
from dailies.model.ltx2.keys import transformer_table
from dailies.model.ltx2.rope import audio_positions, video_positions
from dailies.model.ltx2.transformer import LtxTransformer, Modality

GOLDENS = ["ltx2_transformer_a", "ltx2_transformer_b_gated"]


def transformer_of(golden, *, audio=True, precision="fp32"):
    path = golden.folder / "weights.safetensors"
    shapes = {name.removeprefix(DIT_PREFIX): tensor.shape for name, tensor in checkpoint.stored_tensors(path).items()
              if audio or "audio" not in name}
    config = transformer_config(golden.config["transformer"], shapes, "golden")
    return checkpoint.build(lambda: LtxTransformer(config), path, transformer_table(audio=audio), name="golden",
                            device="cpu", precision=precision)


def streams_of(golden):
    given = golden.inputs
    return (Modality(*(given[name] for name in ("video_latent", "video_timesteps", "sigma_video", "video_positions",
                                                "video_context"))),
            Modality(*(given[name] for name in ("audio_latent", "audio_timesteps", "sigma_audio", "audio_positions",
                                                "audio_context"))))


@pytest.mark.parametrize("name", GOLDENS)
def test_velocities_equal_the_release_plain_with_skipped_attention_and_with_streams_apart(name):
    golden = Golden(name)
    dit, (video, audio) = transformer_of(golden), streams_of(golden)
    skipped = golden.config["stg_blocks"]
    for run, how in (("plain", {}), ("stg", dict(skip_video=skipped, skip_audio=skipped)),
                     ("modality", dict(isolated=True))):
        picture, sound = dit(video, audio, **how)
        assert error(picture, golden.outputs[f"video.{run}"]) < golden.tolerance["value"]
        assert error(sound, golden.outputs[f"audio.{run}"]) < golden.tolerance["value"]


@pytest.mark.parametrize("name", GOLDENS)
def test_rotary_tables_and_positions_are_those_of_the_release_to_the_last_bit(name):
    golden = Golden(name)
    video, audio = streams_of(golden)
    fps = Fraction(golden.config["fps"])
    assert torch.equal(video_positions(tuple(golden.config["video_grid"]), fps), video.positions)
    assert torch.equal(audio_positions(golden.config["audio_frames"]), audio.positions)
    picture, sound = transformer_of(golden).ropes(video, audio)
    for place, table in (("video", picture.own), ("cross_video", picture.cross), ("audio", sound.own)):
        assert torch.equal(table.cos.transpose(1, 2), golden.outputs[f"rope_{place}_cos"])
        assert torch.equal(table.sin.transpose(1, 2), golden.outputs[f"rope_{place}_sin"])
