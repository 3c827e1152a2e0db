"""From an image to what a Wan model sees of it: the release's condition and CLIP rows, each image encoded once."""

import hashlib
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import error
from image_files import jpeg, png
from wan_tiny import WAN_TINY_I2V, WAN_TINY_I2V_A14B, write_weights

from dailies.actors.image_encoder import ImageTextEncoder
from dailies.actors.image_file import decode_image
from dailies.actors.image_parts import ImageError
from dailies.actors.messages import FirstFrame, Request
from dailies.model.catalog import CATALOG, TURBO_WAN22_I2V_A14B
from dailies.model.shapes import VideoShape
from dailies.model.wan.images import cropped

SHAPE = VideoShape(frames=9, height=32, width=48)


def request_for(card, data, uri="a.png", **changes):
    said = dict(clip_id="c" * 64, model=card.name, weights_fingerprint="f", prompt="a red fox", negative_prompt="",
                seed=20, shape=SHAPE,
                fps=16.0, num_steps=4, guidance=card.guidance, precision="fp32", attention="dense",
                image=FirstFrame(sha256=hashlib.sha256(data).hexdigest(), uri=uri))
    return Request(**said | changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with weights, by the model's name."""
    made = {}
    for card in (WAN_TINY_I2V, WAN_TINY_I2V_A14B):
        made[card.name] = tmp_path_factory.mktemp(card.name)
        write_weights(made[card.name], card)
    return made


@pytest.fixture
def files():
    return {"a.png": png(), "b.jpg": jpeg(60, 40)}


@pytest.fixture
def encoder(folders, files):
    return ImageTextEncoder(WAN_TINY_I2V, folders["wan-tiny-i2v"], read=files.__getitem__)


def test_the_condition_is_a_mask_and_the_latent_of_the_image_and_then_grey(encoder, files):
    """Section by section as the release's WanI2V.generate writes it."""
    condition, _ = encoder([request_for(WAN_TINY_I2V, files["a.png"])])[0].image
    image = F.interpolate(decode_image(files["a.png"])[None], size=(32, 48), mode="bicubic").transpose(0, 1)
    with torch.no_grad():
        mu, _ = encoder.pictures.vae.encode(torch.cat((image, torch.zeros(3, 8, 32, 48)), dim=1)[None])
    mean, std = (torch.tensor(said).view(16, 1, 1, 1) for said in (WAN_TINY_I2V.latent_mean, WAN_TINY_I2V.latent_std))
    mask = torch.ones(1, 9, 4, 6)
    mask[:, 1:] = 0
    mask = torch.concat([torch.repeat_interleave(mask[:, 0:1], repeats=4, dim=1), mask[:, 1:]], dim=1)
    mask = mask.view(1, mask.shape[1] // 4, 4, 4, 6).transpose(1, 2)[0]
    assert condition.shape == (20, 3, 4, 6) and condition.dtype == torch.float32
    assert torch.equal(condition[:4], mask)
    assert error(condition[4:], (mu[0] - mean) * (1.0 / std)) < 1e-5


def test_turbodiffusion_makes_images_smaller_as_pillow_does(folders, files, monkeypatch):
    """Its transform is torchvision's default, which smooths as Pillow's bilinear filter does; Wan's does not."""
    from PIL import Image
    assert TURBO_WAN22_I2V_A14B.smooth_images and not WAN_TINY_I2V.smooth_images
    card = replace(WAN_TINY_I2V, smooth_images=True)
    encoder, seen = ImageTextEncoder(card, folders["wan-tiny-i2v"], read=files.__getitem__), []
    encode = encoder.pictures.vae.encode
    monkeypatch.setattr(encoder.pictures.vae, "encode",
                        lambda video, **said: seen.append(video) or encode(video, **said))
    large = torch.randint(0, 256, (128, 192, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8).numpy()
    file = BytesIO()
    Image.fromarray(large).save(file, "png")
    files["large.png"] = file.getvalue()
    encoder([request_for(card, files["large.png"], "large.png")])
    small = torch.from_numpy(np.array(Image.fromarray(large).resize((48, 32), Image.Resampling.BILINEAR)))
    assert (seen[0][0, :, 0].permute(1, 2, 0) * 127.5 + 127.5 - small.float()).abs().max() < 1.01


def test_the_condition_is_that_of_diffusers(folders, files):
    """At the clip's own size, where the other resampling of diffusers has nothing to do."""
    diffusers = pytest.importorskip("diffusers")
    from dailies.model import checkpoint
    files["a.png"] = png(32, 48)
    encoder = ImageTextEncoder(WAN_TINY_I2V_A14B, folders["wan-tiny-i2v-a14b"], read=files.__getitem__)
    vae = diffusers.AutoencoderKLWan(base_dim=2, z_dim=16)
    stored, _ = checkpoint.unpack((folders["wan-tiny-i2v-a14b"] / WAN_TINY_I2V_A14B.layouts[0].vae).read_bytes())
    vae.load_state_dict(stored)
    pipeline = SimpleNamespace(vae_scale_factor_temporal=4, vae_scale_factor_spatial=8, vae=vae.eval(),
                               config=SimpleNamespace(expand_timesteps=False))
    with torch.no_grad():
        _, want = diffusers.WanImageToVideoPipeline.prepare_latents(
            pipeline, decode_image(files["a.png"])[None], 1, 16, 32, 48, 9, dtype=torch.float32, device="cpu")
    embedding, = encoder([request_for(WAN_TINY_I2V_A14B, files["a.png"])])
    assert len(embedding.image) == 1                    # Wan 2.2 has no CLIP
    assert error(embedding.image[0], want[0]) < 1e-4


def test_clip_sees_the_image_in_its_own_size(encoder, files):
    _, rows = encoder([request_for(WAN_TINY_I2V, files["a.png"])])[0].image
    with torch.no_grad():
        want = encoder.pictures.clip(decode_image(files["a.png"])[None])[0]
    assert rows.shape == (5, 24) and torch.equal(rows, want)


def test_each_image_is_encoded_once_at_each_shape(encoder, files, monkeypatch):
    encoded = []
    monkeypatch.setattr(encoder, "encode_image", lambda image, shape:
                        encoded.append((image.uri, shape.frames)) or ((torch.zeros(1),), ()))
    short = VideoShape(frames=5, height=32, width=48)
    for prompt in ("one", "two"):
        for uri, shape in (("a.png", SHAPE), ("b.jpg", SHAPE), ("a.png", short)):
            encoder([request_for(WAN_TINY_I2V, files[uri], uri, prompt=prompt, shape=shape)])
    encoder([request_for(WAN_TINY_I2V, files["a.png"], "the same under another name.png")])
    assert encoded == [("a.png", 9), ("b.jpg", 9), ("a.png", 5)]


def test_embeddings_are_shared_by_content_and_shape_of_the_image(files):
    key = request_for(WAN_TINY_I2V, files["a.png"]).embedding_key
    assert key == request_for(WAN_TINY_I2V, files["a.png"], "b.png", seed=1, num_steps=9).embedding_key
    others = [request_for(WAN_TINY_I2V, files["b.jpg"]),
              request_for(WAN_TINY_I2V, files["a.png"], shape=VideoShape(frames=5, height=32, width=48)),
              request_for(WAN_TINY_I2V, files["a.png"], image=None)]
    assert len({key, *(other.embedding_key for other in others)}) == 4


def test_an_image_that_changed_since_the_plan_is_refused(encoder, files):
    request = request_for(WAN_TINY_I2V, files["a.png"])
    files["a.png"] = files["b.jpg"]
    with pytest.raises(ImageError, match="a.png has changed since this run was planned: put the old image back"):
        encoder([request])
    with pytest.raises(ValueError, match="makes video from an image; clip c+ comes without one"):
        encoder([request_for(WAN_TINY_I2V, files["a.png"], image=None)])


def test_an_image_of_another_aspect_is_cropped_in_the_middle_and_that_is_told(encoder, files):
    embedding, = encoder([request_for(WAN_TINY_I2V, files["b.jpg"], "b.jpg")])
    assert embedding.fallbacks[-1] == "image 40x60 cropped to 40x27"
    whole = decode_image(files["b.jpg"])
    assert torch.equal(cropped(whole, SHAPE, 16), whole[:, 16:43])
    wide = VideoShape(frames=1, height=16, width=64)
    assert cropped(whole, wide, 16).shape == (3, 10, 40)
    tall = VideoShape(frames=1, height=64, width=16)
    assert cropped(whole, tall, 16).shape == (3, 60, 15)


def test_a_size_that_follows_the_image_never_crops_it():
    card = CATALOG["wan2.1-i2v-14b"]
    for height in range(300, 4000, 371):
        for width in range(300, 4000, 293):
            try:
                size = card.size_for_image("480p", height, width)
            except ValueError:
                continue
            shape = VideoShape(frames=1, height=size[0], width=size[1])
            whole = torch.empty(1, 1, 1).expand(3, height, width)
            assert cropped(whole, shape, card.side_step).shape == whole.shape
