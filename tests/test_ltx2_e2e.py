"""Whole runs of LTX-2's release, from its files through the code that loads a checkpoint: contexts, steps, clip."""

import pytest
import torch
from gemma_tiny import gemma_folder
from golden import Golden, error
from ltx2_golden import card_of, draws_of, shape_of, told_of

from dailies.model.ltx2.guidance import StreamGuide
from dailies.model.ltx2.load import LTX2
from dailies.model.ltx2.sampler import as_tokens
from dailies.model.samplers import Steps

GUIDED = ["ltx2_e2e_a", "ltx2_e2e_b", "ltx2_e2e_c_25conv", "ltx2_i2v_a"]
TWO_STAGES = ["ltx2_two_stage_a", "ltx2_two_stage_b_distilled"]
CASES = [*GUIDED, "ltx2_e2e_distilled_a", *TWO_STAGES]
X = 1e-3                                                # the cases' own tolerance, of whole loops


def sampler_of(golden, card):
    sampler = LTX2.load_sampler(card, golden.folder, card.runtime())
    said = golden.config["generation"]
    if "audio_guidance" in said:                        # in one case each stream has its own: rows have one for both
        sampler.guides = lambda request, with_sound: {
            stream: StreamGuide(text=one["cfg_scale"], perturbed=one["stg_scale"], blocks=tuple(one["stg_blocks"]),
                                isolated=one["modality_scale"], rescale=one["rescale_scale"])
            for stream in ("video", "audio") for one in (said[f"{stream}_guidance"],)}
    return sampler


def image_of(golden, card):
    latent = golden.outputs.get("image_latent.0")
    return () if latent is None else (latent[0],)


class Seen(Steps):
    def __init__(self):
        self.after = []

    def done(self, step, state):
        self.after.append(state[0][0])


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_every_step_and_the_latents_of_both_streams_are_the_releases(name):
    golden = Golden(name)
    card = card_of(golden)
    sampler, seen = sampler_of(golden, card), Seen()
    told = told_of(golden, card, image_of(golden, card))
    clip, = sampler.sample([told], draws_of(golden, card), seen)
    before = "stage1." if card.two_stages else ""
    assert torch.allclose(torch.tensor(sampler.sigmas(told.request)), golden.outputs[f"{before}sigmas"], atol=1e-6)
    first = told.request.num_steps
    for step, state in enumerate(seen.after):
        stage = before if step < first else "stage2."
        for stream, x in state.items():
            assert error(as_tokens(x), golden.outputs[f"{stage}{stream}_x.{step % first}"]) < X
    assert len(seen.after) == first + card.further_steps
    video = golden.outputs["stage2.video_latent" if card.two_stages else "video_latent"]
    assert error(clip["video"][None], video) < X
    assert error(clip["audio"][None], golden.outputs["audio_latent"]) < X
    assert {stream: tuple(x.shape) for stream, x in clip.items()} == card.stream_shapes(shape_of(golden))


@pytest.mark.parametrize("name", TWO_STAGES)
@torch.inference_mode()
def test_the_latent_between_the_stages_is_the_releases(name):
    golden = Golden(name)
    refiner = sampler_of(golden, card_of(golden)).refiner
    enlarged = refiner.enlarged(golden.outputs["stage1.video_latent"][0])
    assert error(enlarged[None], golden.outputs["upsampled_latent"]) < X


@pytest.mark.parametrize("name", GUIDED)
@torch.inference_mode()
def test_every_evaluation_of_the_first_step_is_the_releases(name):
    golden = Golden(name)
    card = card_of(golden)
    sampler = sampler_of(golden, card)
    told = told_of(golden, card, image_of(golden, card))
    noise, = draws_of(golden, card)(0)
    first, = sampler.firsts([told])
    place = sampler.place(noise, first)
    start = noise if first is None else {**noise, "video": torch.cat((first, noise["video"][:, 1:]), 1)}
    for stream, x in start.items():
        assert torch.equal(as_tokens(x), golden.outputs[f"{stream}_x_init"])
        assert torch.equal(place.positions[stream], golden.outputs[f"{stream}_positions"])
    guides = sampler.guides(told.request, True)
    skips = {f"skip_{stream}": guide.blocks for stream, guide in guides.items()}
    for kind, text, how in (("cond", told.prompt, {}), ("neg", told.negative, {}), ("ptb", told.prompt, skips),
                            ("iso", told.prompt, dict(isolated=True))):
        for stream, x0 in sampler.predicted(text, start, 1.0, place, **how).items():
            assert error(as_tokens(x0), golden.outputs[f"{stream}_{kind}.0"]) < X
    for stream, x0 in sampler.clean(told, start, 1.0, place, guides).items():
        assert error(as_tokens(x0), golden.outputs[f"{stream}_x0.0"]) < X


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_the_clip_of_the_latents_is_the_releases(name):
    golden = Golden(name)
    card = card_of(golden)
    decoder = LTX2.load_decoder(card, golden.folder, card.runtime())
    video = golden.outputs["stage2.video_latent" if card.two_stages else "video_latent"]
    made = decoder({"video": video[0], "audio": golden.outputs["audio_latent"][0]}, shape_of(golden), 2**30)
    pixels = 255 * ((decoder.video_vae.decode(video) + 1) / 2).clamp(0, 1)
    frames = golden.tolerance["frames"]
    assert (pixels.mean((1, 3, 4)) - golden.outputs["frames_mean"]).abs().max() < frames
    assert (made.rgb.permute(3, 0, 1, 2) - pixels[0]).abs().max() < 0.5 + frames, "rounded to whole numbers"
    if "frames.0" in golden.outputs:
        assert (pixels[:, :, 0] - golden.outputs["frames.0"]).abs().max() < frames
    if "mel" in golden.outputs:
        assert error(decoder.audio_vae.decode(golden.outputs["audio_latent"]), golden.outputs["mel"]) < X
    assert made.audio.shape == (golden.config["samples_decoded"], 2) and decoder.sample_rate == golden.config["rate"]
    want = golden.outputs.get("waveform", golden.outputs.get("waveform_start"))
    assert error(made.audio.T[:, :want.shape[1]], want) < golden.tolerance["waveform"]


@torch.inference_mode()
def test_what_is_seen_of_an_image_is_the_releases():
    golden = Golden("ltx2_i2v_a")
    card = card_of(golden)
    images = LTX2.load_image_model(card, golden.folder, card.runtime())
    pixels, notes = images.fitted(golden.inputs["image"].float() / 127.5 - 1, shape_of(golden))
    latent, = images(pixels, shape_of(golden))
    assert error(latent[None], golden.outputs["image_latent.0"]) < 1e-4 and notes == ()


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_the_contexts_of_its_prompts_are_the_releases(name, tmp_path):
    golden = Golden(name)
    folder = gemma_folder(golden, tmp_path / "gemma")
    card = card_of(golden, text_folder=str(folder))
    encoder = LTX2.load_encoder(card, golden.folder, card.runtime())
    for side in ("positive", "negative"):
        if f"video_context.{side}" in golden.outputs:
            mask = golden.inputs[f"attention_mask.{side}"][0].bool()
            contexts = encoder.contexts(golden.inputs[f"input_ids.{side}"][0, mask].tolist())
            for stream, rows in contexts.items():
                assert error(rows, golden.outputs[f"{stream}_context.{side}"][0]) < 1e-4
