"""What a row may ask of a model, and what a card says of itself."""

import pickle
import subprocess
import sys

import pytest

from dailies.jobs.demo.codecs_av import VIDEO as DEMO_AV_VIDEO
from dailies.model.catalog import CATALOG, DEMO, LINUM_V2_360P, LINUM_V2_720P
from dailies.model.ltx2.card import DEMO_AV, LtxCard
from dailies.model.ltx2.codec_config import VIDEO_VAE_2_0, VIDEO_VAE_2_3
from dailies.model.shapes import LatentGrid, VideoShape


def test_importing_the_catalogue_imports_nothing_heavy():
    heavy = {"torch", "transformers", "safetensors", "numpy", "huggingface_hub"}
    code = f"import sys, dailies.model.catalog, dailies.model.weights; print(sorted({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_cards_are_found_by_their_names_and_travel():
    assert list(CATALOG)[:10] == [
        "demo", "demo-turbo", "demo-sparse", "linum-v2-360p", "linum-v2-720p", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b",
        "wan2.1-i2v-14b", "wan2.2-t2v-a14b", "wan2.2-i2v-a14b"]
    for name, card in CATALOG.items():
        assert card.name == name
        assert pickle.loads(pickle.dumps(card)) == card


@pytest.mark.parametrize("card, shape", [
    (LINUM_V2_360P, VideoShape(frames=49, height=360, width=640)),
    (LINUM_V2_720P, VideoShape(frames=49, height=720, width=1280)),
    (DEMO, VideoShape(frames=49, height=64, width=64)),
])
def test_a_row_that_says_nothing_gets_the_models_own_size(card, shape):
    assert card.shape_for() == (shape, None)


@pytest.mark.parametrize("duration_s, frames", [(1, 25), (2.0, 49), (3, 73), (4, 97), (5, 121)])
def test_whole_seconds_give_24_frames_each_and_one(duration_s, frames):
    assert LINUM_V2_720P.frames_for(duration_s) == (frames, None)


def test_other_durations_go_down_to_whole_seconds_and_say_so():
    assert LINUM_V2_720P.frames_for(2.9) == (49, "2.9 s rounded down to 2 s (49 frames)")
    assert LINUM_V2_720P.frames_for(1.999) == (25, "1.999 s rounded down to 1 s (25 frames)")


def test_frames_go_down_to_4n_plus_1_and_say_so():
    assert LINUM_V2_720P.frames_for(frames=49) == (49, None)
    assert LINUM_V2_720P.frames_for(frames=48) == (45, "48 frames rounded down to 45")
    assert LINUM_V2_720P.frames_for(frames=3) == (1, "3 frames rounded down to 1")


@pytest.mark.parametrize("asked, said", [
    (dict(duration_s=0.5), "duration_s must be 1 to 5 for linum-v2-720p; got 0.5"),
    (dict(duration_s=-2.0), "duration_s must be 1 to 5 for linum-v2-720p; got -2"),
    (dict(duration_s=float("nan")), "duration_s must be 1 to 5 for linum-v2-720p; got nan"),
    (dict(duration_s=float("inf")), "duration_s must be 1 to 5 for linum-v2-720p; got inf"),
    (dict(duration_s=5.01), "duration_s must be 1 to 5 for linum-v2-720p; got 5.01"),
    (dict(frames=0), "frames must be 1 to 121 for linum-v2-720p; got 0"),
    (dict(frames=122), "frames must be 1 to 121 for linum-v2-720p; got 122"),
    (dict(frames=25, duration_s=1), "give duration_s or frames, not both"),
    (dict(resolution="7x7"), "width must be a multiple of 8 and at least 128 for linum-v2-720p; got 7 (nearest: 128)"),
    (dict(resolution="640x365"),
     "height must be a multiple of 8 and at least 128 for linum-v2-720p; got 365 (nearest: 368)"),
    (dict(resolution="1280x728"),
     "width x height must be at most 921600 pixels for linum-v2-720p; got 1280x728 = 931840"),
    (dict(resolution="480p"), "resolution must be 720p or WIDTHxHEIGHT for linum-v2-720p; got '480p'"),
    (dict(resolution="x"), "resolution must be"),
    (dict(resolution="-640x360"), "resolution must be"),
    (dict(resolution="640x360x2"), "resolution must be"),
    (dict(resolution="٦٤٠x360"), "resolution must be"),
    (dict(resolution="9" * 5000 + "x360"), "resolution must be"),
])
def test_what_the_model_cannot_make_is_refused_with_what_it_can(asked, said):
    with pytest.raises(ValueError) as caught:
        LINUM_V2_720P.shape_for(**asked)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("resolution", ["360p", "640x360", "640X360", (640, 360)])
def test_a_size_is_a_name_or_width_x_height(resolution):
    assert LINUM_V2_360P.size_for(resolution) == (360, 640)


def test_a_portrait_of_the_same_area_is_allowed():
    assert LINUM_V2_360P.size_for("360x640") == (640, 360)


def test_defaults_of_the_published_models_are_the_releases():
    for card in (LINUM_V2_360P, LINUM_V2_720P):
        assert (card.num_steps, card.guidance, card.negative_prompt, card.fps, card.shift) == (50, 10.0, "", 24.0, 3.0)
        assert (card.guider, card.apg_momentum, card.apg_max_norm, card.apg_parallel) == ("apg", -0.75, 20.0, 0.0)


def test_the_latent_grid_of_every_card_is_its_vaes():
    for card in CATALOG.values():
        if isinstance(card, LtxCard):                   # of which the file's header says it all
            for vae in (DEMO_AV_VIDEO,) if card is DEMO_AV else (VIDEO_VAE_2_0, VIDEO_VAE_2_3):
                assert vae.strides == (card.grid.time_stride, *2 * (card.grid.space_stride,))
                assert vae.latent_channels == card.grid.channels
            continue
        vae, dit = card.vae_config, card.dit_config
        assert card.grid == LatentGrid(channels=vae.latent_channels, time_stride=vae.time_stride,
                                       space_stride=vae.space_stride)
        assert dit.latent_channels == vae.latent_channels and dit.width % (2 * dit.heads) == 0


def test_precision_is_exact_on_a_cpu_and_the_releases_on_a_gpu():
    assert LINUM_V2_360P.precision_on("cpu") == "fp32"
    assert LINUM_V2_360P.precision_on("cuda") == LINUM_V2_360P.precision_on("cuda:1") == "bf16"


def test_the_full_text_encoder_has_the_published_parameters():
    """As text.py builds it, from the config of T5-XXL v1.1."""
    import torch
    from transformers import T5Config, T5EncoderModel

    from dailies.model import keys
    config = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                      feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        model = T5EncoderModel(config)
    names = [name for name, _ in model.named_parameters()]
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656
    assert len(names) == 219 and keys.T5.unknown(names) == []
