"""Wan prompts to frames through the actors: two experts as in the release, and clips decided by requests alone."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from golden import Golden, error
from wan_tiny import WAN_TINY, WAN_TINY_A14B, WAN_TINY_I2V_A14B, write_weights

from dailies.actors.decoder import Decoder
from dailies.actors.denoiser import Denoiser, noise
from dailies.actors.messages import Embedding, Latent, Request
from dailies.actors.text_encoder import TextEncoder
from dailies.kernels import processor
from dailies.model.offload import HostCopy
from dailies.model.shapes import VideoShape
from dailies.model.wan.sampler import Experts


def request_for(card, **changes):
    said = dict(clip_id="c" * 64, model=card.name, weights_fingerprint="f", prompt="a red fox runs over the snow",
                negative_prompt="",
                seed=20, shape=VideoShape(frames=9, height=32, width=48), fps=16.0, num_steps=4, guidance=card.guidance,
                precision="fp32", attention="dense")
    return Request(**said | changes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders with the tiny models' weights, by name."""
    folders = {}
    for card in (WAN_TINY, WAN_TINY_A14B):
        folders[card.name] = tmp_path_factory.mktemp(card.name)
        write_weights(folders[card.name], card)
    return folders


@pytest.fixture(scope="module")
def a14b(tmp_path_factory):
    """The golden's two experts in the published layout, its card and its embedding."""
    golden, folder = Golden("wan_a14b_i2v_a"), tmp_path_factory.mktemp("a14b")
    for expert in ("high_noise_model", "low_noise_model"):
        (folder / expert).mkdir()
        weights = golden.folder / f"weights_{expert}.safetensors"
        (folder / expert / "diffusion_pytorch_model.safetensors").write_bytes(weights.read_bytes())
    said = golden.config["model"]
    card = replace(WAN_TINY_I2V_A14B, guidance=golden.config["guide_scale"][1], shift=golden.config["shift"],
                   boundary=int(1000 * golden.config["boundary"]),
                   dit_fields=dict(width=said["dim"], heads=said["num_heads"], layers=said["num_layers"],
                                   ffn=said["ffn_dim"],
                                   time_features=said["freq_dim"], text_dim=said["text_dim"], text_len=said["text_len"],
                                   condition_channels=20))
    request = request_for(card, num_steps=golden.config["sampling_steps"],
                          shape=VideoShape(frames=5, height=32, width=48))
    embedding = Embedding(request=request, prompt={"video": golden.inputs["context"]},
                          negative={"video": golden.inputs["context_null"]}, image=(golden.inputs["y"],))
    return golden, folder, card, embedding


def denoiser_of(golden, folder, card, **options):
    return Denoiser(card, folder, noise=lambda request, shapes: {"video": golden.inputs["noise"]}, **options)


def test_two_experts_sample_as_the_release(a14b):
    golden, folder, card, embedding = a14b
    denoiser, seen, used = denoiser_of(golden, folder, card), [], []
    for place, expert in enumerate(denoiser.sampler.transformers):
        expert.register_forward_pre_hook(lambda _, inputs, place=place: seen.append(inputs[0][0]))
        expert.register_forward_pre_hook(lambda _, inputs, place=place: used.append((place, inputs[1].item())))
    latent, = denoiser([embedding])
    allowed = golden.tolerance["value"]
    for step, x in enumerate([*seen[2::2], latent.streams["video"]]):      # a prompt and a negative prompt per step
        assert error(x, golden.outputs[f"latent.{step}"]) < allowed
    assert [timestep for _, timestep in used[::2]] == golden.outputs["timesteps"].tolist()
    assert [1 - place for place, _ in used[::2]] == golden.outputs["used_high_noise"].tolist()


def test_every_velocity_equals_the_release(a14b):
    golden, folder, card, embedding = a14b
    denoiser = denoiser_of(golden, folder, card)
    x = golden.inputs["noise"][None]
    for step, timestep in enumerate(golden.outputs["timesteps"].tolist()):
        sampler = denoiser.sampler
        dit = sampler.experts.turn(card.expert_at(timestep))
        prompt, negative = (sampler.context(dit, embedding, text) for text in (embedding.prompt, embedding.negative))
        for context, name in ((prompt, "v_cond"), (negative, "v_null")):
            got = dit(x, torch.tensor([timestep]), context, sampler.condition(embedding))
            assert error(got[0], golden.outputs[f"{name}.{step}"]) < golden.tolerance["value"]
        x = golden.outputs[f"latent.{step}"][None]


def test_experts_that_do_not_fit_together_take_turns_once_per_batch_and_give_the_same_clips(a14b, monkeypatch):
    golden, folder, card, embedding = a14b
    want, = denoiser_of(golden, folder, card)([embedding])
    denoiser = denoiser_of(golden, folder, card)
    moves = []
    for place, expert in enumerate(denoiser.sampler.transformers):
        monkeypatch.setattr(expert, "to", lambda device, place=place: moves.append((place, str(device))))
    got = denoiser([embedding] * 3)
    assert moves == [(0, "cpu"), (1, "cpu")]            # from the first to the second, for all three clips
    assert all(torch.equal(latent.streams["video"], want.streams["video"]) for latent in got)
    denoiser([embedding] * 2)
    assert [place for place, _ in moves] == [0, 1, 1, 0, 0, 1]


def test_experts_that_take_turns_are_copied_from_host_memory_and_never_back(a14b, monkeypatch):
    golden, folder, card, embedding = a14b
    want, = denoiser_of(golden, folder, card)([embedding])
    monkeypatch.setattr(Experts, "fit", lambda self, dit, card: False)
    denoiser = denoiser_of(golden, folder, card)
    experts = denoiser.sampler.experts
    assert denoiser.sampler.weights_move and experts.running == 1 and len(experts.kept) == 2
    kept = [[host.clone() for _, host in copy.pairs] for copy in experts.kept]
    moves = []
    for place, copy in enumerate(experts.kept):
        for way in ("bring", "leave"):
            def move(*device, place=place, way=way, copy=copy):
                moves.append((place, way))
                getattr(HostCopy, way)(copy, *device)
            monkeypatch.setattr(copy, way, move)
    for latent in denoiser([embedding] * 3):
        assert torch.equal(latent.streams["video"], want.streams["video"])
    assert moves == [(1, "leave"), (0, "bring"), (0, "leave"), (1, "bring")]
    for copy, before in zip(experts.kept, kept, strict=True):
        for (weight, host), values in zip(copy.pairs, before, strict=True):
            assert torch.equal(host, values) and torch.equal(weight, values)
    assert all(weight.data_ptr() == host.data_ptr() for weight, host in experts.kept[0].pairs)     # it waits there


def test_without_room_on_the_host_experts_are_moved(a14b, monkeypatch):
    golden, folder, card, embedding = a14b
    want, = denoiser_of(golden, folder, card)([embedding])
    monkeypatch.setattr(Experts, "fit", lambda self, dit, card: False)
    monkeypatch.setattr("dailies.model.wan.sampler.free_memory", lambda: 1000)
    denoiser = denoiser_of(golden, folder, card)
    assert denoiser.sampler.weights_move and not denoiser.sampler.experts.kept
    assert torch.equal(denoiser([embedding])[0].streams["video"], want.streams["video"])


def test_a_host_copy_holds_weights_of_any_kind_side_by_side():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3).bfloat16(), torch.nn.LayerNorm(3), torch.nn.Linear(3, 7))
    model.register_buffer("codes", torch.randint(-128, 127, (3, 5), dtype=torch.int8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = HostCopy(model)
    assert len({host.untyped_storage().data_ptr() for _, host in copy.pairs}) == 1
    with torch.inference_mode():
        for turn in (copy.leave, lambda: copy.bring("cpu")):
            turn()
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model[0].weight, torch.nn.Parameter) and not model[0].weight.is_inference()


@pytest.mark.gpu
def test_a_host_copy_is_pinned_and_comes_back_to_the_gpu():
    model = torch.nn.Linear(300, 200).cuda()
    before, copy = model.weight.detach().clone(), HostCopy(model)
    used = torch.cuda.memory_allocated()
    copy.leave()
    assert model.weight.is_cpu and model.weight.is_pinned() and torch.cuda.memory_allocated() < used
    copy.bring("cuda")
    assert torch.equal(model.weight, before)


def test_guidance_of_the_low_noise_expert_is_a_share_of_the_rows(weights, monkeypatch):
    denoiser = Denoiser(WAN_TINY_A14B, weights["wan-tiny-a14b"])
    asked = []
    monkeypatch.setattr("dailies.model.wan.sampler.classifier_free",
                        lambda cond, uncond, scale: asked.append(scale) or cond)
    encoder = TextEncoder(WAN_TINY_A14B, weights["wan-tiny-a14b"])
    denoiser(encoder([request_for(WAN_TINY_A14B, num_steps=8, guidance=4.0)]))
    assert asked == sorted(asked, reverse=True) and set(asked) == {4.0, 3.0}


def test_a_batch_changes_no_bit_of_a_clip(weights):
    folder = weights["wan-tiny"]
    encoder, denoiser, decoder = TextEncoder(WAN_TINY, folder), Denoiser(WAN_TINY, folder), Decoder(WAN_TINY, folder)
    embeddings = encoder([request_for(WAN_TINY, clip_id=str(i), prompt=prompt, seed=i)
                          for i, prompt in enumerate(("a red fox", "snow", ""))])
    together = decoder(denoiser(embeddings))
    alone = [decoder(denoiser([embedding]))[0] for embedding in reversed(embeddings)][::-1]
    assert all(torch.equal(one.rgb, other.rgb) for one, other in zip(together, alone, strict=True))
    assert together[0].rgb.shape == (9, 32, 48, 3) and not torch.equal(together[0].rgb, together[1].rgb)


def test_both_layouts_give_the_same_clip(weights, tmp_path):
    write_weights(tmp_path, WAN_TINY, "original")
    clips = []
    for folder in (weights["wan-tiny"], tmp_path):
        embeddings = TextEncoder(WAN_TINY, folder)([request_for(WAN_TINY)])
        clips += Decoder(WAN_TINY, folder)(Denoiser(WAN_TINY, folder)(embeddings))
    assert torch.equal(clips[0].rgb, clips[1].rgb)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_solver_and_shift_are_the_cards(solver, weights):
    card = replace(WAN_TINY, solver=solver)
    embeddings = TextEncoder(card, weights["wan-tiny"])([request_for(card)])
    latents = [Denoiser(replace(card, shift=shift), weights["wan-tiny"])(embeddings)[0].streams["video"]
               for shift in (5.0, 3.0)]
    assert all(latent.isfinite().all() for latent in latents) and not torch.equal(*latents)


def test_latents_are_decoded_with_wans_statistics(weights):
    decoder = Decoder(WAN_TINY, weights["wan-tiny"])
    request = request_for(WAN_TINY)
    latent = noise(request, WAN_TINY.stream_shapes(request.shape))["video"]
    frames, = decoder([Latent(request=request, streams={"video": latent})])
    mean, std = (torch.tensor(said).view(16, 1, 1, 1) for said in (WAN_TINY.latent_mean, WAN_TINY.latent_std))
    pixels = (decoder.streams.vae.decode((latent * std + mean)[None]).clamp(-1, 1) + 1) * 127.5
    want = pixels[0].permute(1, 2, 3, 0)
    assert (frames.rgb.float() - want).abs().max() < 1.01


@pytest.mark.cpu
def test_bf16_runs_the_same_path_and_stays_near(weights):
    folder = weights["wan-tiny"]
    request = request_for(WAN_TINY, precision="bf16")
    embeddings = TextEncoder(WAN_TINY, folder, WAN_TINY.runtime(precision="bf16"))([request])
    assert embeddings[0].prompt["video"].dtype == processor.dtype_of("bf16", "cpu")
    latent, = Denoiser(WAN_TINY, folder, WAN_TINY.runtime(precision="bf16"))(embeddings)
    want, = Denoiser(WAN_TINY, folder)(TextEncoder(WAN_TINY, folder)([request_for(WAN_TINY)]))
    assert ((latent.streams["video"] - want.streams["video"]).norm() / want.streams["video"].norm()).item() < 0.1
    assert Decoder(WAN_TINY, folder,
                   WAN_TINY.runtime(precision="bf16")).streams.vae.decoder.conv_in.weight.dtype == torch.float32


def test_a_model_of_images_needs_one_and_a_model_of_text_takes_none(a14b, weights):
    golden, folder, card, embedding = a14b
    with pytest.raises(ValueError, match="makes video from an image; clip c+ comes without one"):
        denoiser_of(golden, folder, card)([dataclasses.replace(embedding, image=())])
    encoder, denoiser = (actor(WAN_TINY, weights["wan-tiny"]) for actor in (TextEncoder, Denoiser))
    embedding, = encoder([request_for(WAN_TINY)])
    with pytest.raises(ValueError, match="makes video from text alone; clip c+ comes with one"):
        denoiser([dataclasses.replace(embedding, image=(torch.zeros(20, 3, 4, 6),))])
