"""Wan's cards: the released defaults, the published tensors and parameters, and both layouts of the files."""

import json
import shutil

import pytest
import torch
from golden import Golden
from parts import dit_of
from wan_tiny import WAN_TINY, WAN_TINY_A14B, write_weights

from dailies.model import checkpoint
from dailies.model.catalog import CATALOG
from dailies.model.family import family_of
from dailies.model.files import CheckpointError
from dailies.model.schedules import wan_sigmas, whole_timestep
from dailies.model.shapes import VideoShape
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.card import WAN_NEGATIVE_PROMPT, TurboCard, WanCard
from dailies.model.wan.images import is_of
from dailies.model.wan.load import WAN as WAN_FAMILY
from dailies.model.wan.transformer import WanDiT
from dailies.model.weights import layout_in, locate, missing_files, weights_files

WAN = {name: card for name, card in CATALOG.items() if type(card) is WanCard}
PARAMETERS = {"wan2.1-t2v-1.3b": 1_418_996_800, "wan2.1-t2v-14b": 14_288_491_584, "wan2.1-i2v-14b": 16_394_878_784,
              "wan2.2-t2v-a14b": 14_288_491_584, "wan2.2-i2v-a14b": 14_288_901_184}


def attention_names(attn, projections, norms):
    return [*(f"{attn}.{of}.{part}" for of in projections for part in ("weight", "bias")),
            *(f"{attn}.{norm}.weight" for norm in norms)]


def original_names(layers, with_image):
    """The names in the documents of the release, written out."""
    block = ["modulation", "norm3.weight", "norm3.bias", "ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias",
             *attention_names("self_attn", "qkvo", ("norm_q", "norm_k")),
             *attention_names("cross_attn", "qkvo", ("norm_q", "norm_k"))]
    outside = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
               "time_projection.1", "head.head"]
    if with_image:
        block += attention_names("cross_attn", ("k_img", "v_img"), ("norm_k_img",))
        outside += [f"img_emb.proj.{i}" for i in (0, 1, 3, 4)]
    return {"head.modulation", *(f"{name}.{part}" for name in outside for part in ("weight", "bias")),
            *(f"blocks.{i}.{name}" for i in range(layers) for name in block)}


def diffusers_names(layers, with_image):
    """The same of WanTransformer3DModel."""
    projections, norms = ("to_q", "to_k", "to_v", "to_out.0"), ("norm_q", "norm_k")
    block = ["scale_shift_table", "norm2.weight", "norm2.bias", "ffn.net.0.proj.weight", "ffn.net.0.proj.bias",
             "ffn.net.2.weight", "ffn.net.2.bias", *attention_names("attn1", projections, norms),
             *attention_names("attn2", projections, norms)]
    embedder = ["text_embedder.linear_1", "text_embedder.linear_2", "time_embedder.linear_1", "time_embedder.linear_2",
                "time_proj"]
    if with_image:
        block += attention_names("attn2", ("add_k_proj", "add_v_proj"), ("norm_added_k",))
        embedder += [f"image_embedder.{name}" for name in ("norm1", "ff.net.0.proj", "ff.net.2", "norm2")]
    outside = ["patch_embedding", "proj_out", *(f"condition_embedder.{name}" for name in embedder)]
    return {"scale_shift_table", *(f"{name}.{part}" for name in outside for part in ("weight", "bias")),
            *(f"blocks.{i}.{name}" for i in range(layers) for name in block)}


@pytest.mark.parametrize("name", WAN)
def test_the_full_model_has_the_published_tensors_in_both_layouts(name):
    config = CATALOG[name].dit_config
    with torch.device("meta"):
        state = WanDiT(config).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == PARAMETERS[name]
    assert len(state) == {30: 825, 40: 1303 if config.image_dim else 1095}[config.layers]
    for table, published in ((wan_keys.WAN, original_names), (wan_keys.WAN_DIFFUSERS, diffusers_names)):
        released = {table.released(ours): ours for ours in state}
        assert released.keys() == published(config.layers, config.image_dim is not None), table.name
        assert all(table.ours(old) == ours for old, ours in released.items())


def test_the_full_models_tensors_have_the_published_shapes():
    config = CATALOG["wan2.1-i2v-14b"].dit_config
    with torch.device("meta"):
        state = WanDiT(config).state_dict()
    for name, shape in {"patch_embedding.weight": (5120, 36, 1, 2, 2), "text_embedding.0.weight": (5120, 4096),
                        "time_embedding.0.weight": (5120, 256), "time_projection.1.weight": (30720, 5120),
                        "blocks.39.modulation": (1, 6, 5120), "blocks.0.ffn.0.weight": (13824, 5120),
                        "blocks.7.cross_attn.norm_k_img.weight": (5120,), "img_emb.proj.1.weight": (1280, 1280),
                        "img_emb.proj.3.weight": (5120, 1280), "img_emb.proj.4.bias": (5120,),
                        "head.head.weight": (64, 5120), "head.modulation": (1, 2, 5120)}.items():
        assert tuple(state[wan_keys.WAN.ours(name)].shape) == shape


@pytest.mark.parametrize("name, steps, shift, guidance, low", [
    ("wan2.1-t2v-1.3b", 50, 5.0, 5.0, 5.0), ("wan2.1-t2v-14b", 50, 5.0, 5.0, 5.0),
    ("wan2.1-i2v-14b", 40, 5.0, 5.0, 5.0),
    ("wan2.2-t2v-a14b", 40, 12.0, 4.0, 3.0), ("wan2.2-i2v-a14b", 40, 5.0, 3.5, 3.5)])
def test_defaults_are_the_releases(name, steps, shift, guidance, low):
    card = CATALOG[name]
    assert (card.solver, card.num_steps, card.shift, card.guidance, card.fps) == ("unipc", steps, shift, guidance, 16.0)
    assert card.guidance * card.low_noise_guidance == low
    assert card.negative_prompt == ("镜头晃动，" if name == "wan2.1-i2v-14b" else "") + WAN_NEGATIVE_PROMPT
    assert card.shape_for()[0].frames == 81
    assert card.shape_for("480p")[0] == VideoShape(frames=81, height=480, width=832)
    assert card.takes_image == ("i2v" in name)


def test_only_the_small_size_of_wan_21_image_to_video_has_another_shift():
    small, large = (VideoShape(frames=81, height=height, width=width) for height, width in ((832, 480), (720, 1280)))
    for name, card in WAN.items():
        assert card.shift_for(small) == (3.0 if name == "wan2.1-i2v-14b" else card.shift)
        assert card.shift_for(large) == card.shift


@pytest.mark.parametrize("name, high", [("wan2.2-t2v-a14b", 26), ("wan2.2-i2v-a14b", 15), ("wan2.1-t2v-14b", 50)])
def test_the_high_noise_expert_makes_the_first_steps(name, high):
    card = CATALOG[name]
    experts = [card.expert_at(whole_timestep(s)) for s in wan_sigmas(card.num_steps, card.shift)[:-1].tolist()]
    assert experts == [0] * high + [1] * (card.num_steps - high)


@pytest.mark.parametrize("asked, frames, note", [
    (dict(duration_s=5.0), 81, None), (dict(duration_s=2.0), 33, None), (dict(duration_s=2.25), 37, None),
    (dict(duration_s=2.1), 33, "2.1 s rounded down to 2 s (33 frames)"),
    (dict(frames=80), 77, "80 frames rounded down to 77")])
def test_durations_go_down_to_quarters_of_a_second(asked, frames, note):
    assert CATALOG["wan2.1-t2v-1.3b"].frames_for(**asked) == (frames, note)


def test_sides_are_multiples_of_16():
    with pytest.raises(ValueError, match="width must be a multiple of 16 and at least 128 for wan2.1.*; got 840"):
        CATALOG["wan2.1-t2v-1.3b"].size_for("840x480")


def test_the_latents_statistics_are_the_documented_ones():
    scale, bias = WAN_FAMILY.latent_statistics(WAN_TINY, None)
    said = Golden("wan_vae_a").config
    mu = torch.randn(16)
    mean, std = torch.tensor(said["latents_mean"]), torch.tensor(said["latents_std"])
    assert torch.allclose(mu * scale + bias, (mu - mean) / std, atol=1e-6)


@pytest.mark.parametrize("card", [WAN_TINY, WAN_TINY_A14B], ids=lambda card: card.name)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_weights_are_found_whole_in_either_layout(card, layout, tmp_path):
    write_weights(tmp_path, card, layout)
    assert locate(tmp_path, card) == tmp_path
    assert layout_in(card, tmp_path) == card.layouts[layout == "original"]
    files = weights_files(card, tmp_path)
    for name in list(files):
        if not name.endswith(".safetensors"):
            continue
        shutil.move(tmp_path / name, tmp_path / "away")
        assert missing_files(card, tmp_path) == [name]
        shutil.move(tmp_path / "away", tmp_path / name)
    for part in family_of(card).parts(card):
        part.load(tmp_path, card.runtime("meta", "bf16"))


def test_shards_are_found_by_their_index(tmp_path):
    write_weights(tmp_path, WAN_TINY, "original")
    whole = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors, _ = checkpoint.unpack(whole.read_bytes())
    whole.unlink()
    index, state = {}, WAN_TINY
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        checkpoint.save(tmp_path / file, {name: tensors[name] for name in names})
        index |= dict.fromkeys(names, file)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert missing_files(WAN_TINY, tmp_path) == []
    assert {"diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors",
            "diffusion_pytorch_model.safetensors.index.json"} < weights_files(WAN_TINY, tmp_path).keys()
    dit = dit_of(state, tmp_path, "cpu")
    assert torch.equal(dit.patch_embed.bias, tensors["patch_embedding.bias"])
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match="lacks diffusion_pytorch_model-00002-of-00002.safetensors"):
        locate(tmp_path, WAN_TINY)


TURBO = {name: card for name, card in CATALOG.items() if isinstance(card, TurboCard)}
TURBO_SIZES = {"480p": ["640x640", "640x480", "480x640", "832x480", "480x832"],
               "720p": ["960x960", "960x720", "720x960", "1280x720", "720x1280"]}


@pytest.mark.parametrize("name", TURBO)
def test_every_size_that_turbodiffusion_publishes_can_be_asked_for(name):
    for resolution in TURBO[name].resolutions:
        for size in TURBO_SIZES[resolution]:
            assert "x".join(map(str, reversed(TURBO[name].size_for(size)))) == size


def test_a_turbo_clip_has_the_images_aspect_as_the_release_rounds_it():
    card = CATALOG["turbo-wan2.2-i2v-a14b-720p"]
    for width, height in ((1280, 720), (1000, 1000), (4032, 3024), (517, 901), (1920, 800), (3001, 2003)):
        area, aspect = 1280 * 720, width / height        # the release's own steps, in floats
        wide, high = (area * aspect) ** 0.5, (area / aspect) ** 0.5
        assert card.size_for_image("720p", height, width) == (round(high / 16) * 16, round(wide / 16) * 16)
        shape = VideoShape(frames=5, height=round(high / 16) * 16, width=round(wide / 16) * 16)
        assert is_of(card, torch.empty(3, height, width), shape)            # stretched that little, and not cropped
    assert not is_of(card, torch.empty(3, 720, 1280), VideoShape(frames=5, height=480, width=480))
    with pytest.raises(ValueError, match="sides must be at least 128 .* for an image of 60000x32"):
        card.size_for_image("720p", 32, 60000)


def test_what_is_not_as_in_the_release_is_said_of_each_turbo_model_and_guidance_of_two_experts(capsys, tmp_path):
    from dailies.jobs.runs import models
    models("turbo-wan2.2-i2v-a14b-720p", str(tmp_path), json=False)
    said = capsys.readouterr().out
    assert "the release's default is SageSLA" in said and "stretches every image to 16:9" in said
    models("wan2.2-t2v-a14b", str(tmp_path), json=False)
    assert "that for low noise has 0.75 of it" in capsys.readouterr().out
    assert not CATALOG["wan2.2-i2v-a14b"].guidance_note
