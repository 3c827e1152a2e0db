"""Prompt to frames through the three actors: the release's numbers, and a clip decided by its request alone."""

import dataclasses
import gc
import math
import shutil
import weakref
from itertools import permutations

import pytest
import torch
from golden import E2E, E2E_CARD, Golden, e2e_request, error
from graph_recorder import Recorder

from dailies.actors.decoder import Decoder
from dailies.actors.denoiser import Denoiser, noise
from dailies.actors.messages import Embedding, Latent
from dailies.actors.text_encoder import TextEncoder
from dailies.kernels import processor
from dailies.model import checkpoint
from dailies.model.family import NonFiniteFrames, NonFiniteLatent
from dailies.model.memory import free_memory, machine_memory, memory_on
from dailies.model.shapes import LatentGrid, VideoShape
from dailies.model.wan.decoder import to_uint8


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(E2E_CARD, E2E)


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser(E2E_CARD, E2E)


@pytest.fixture(scope="module")
def decoder():
    return Decoder(E2E_CARD, E2E)


def video_noise(request):
    return noise(request, {"video": LatentGrid().of(request.shape)})["video"]


def psnr(got, want):
    return 10 * math.log10(255 ** 2 / max((got.double() - want.double()).square().mean().item(), 1e-9))


@pytest.mark.parametrize("pair_guidance", [False, True])
def test_a_prompt_becomes_the_frames_of_the_release(encoder, pair_guidance):
    golden = Golden("linum_e2e_a")
    card = dataclasses.replace(E2E_CARD, pair_guidance=pair_guidance)
    denoiser = Denoiser(card, E2E, noise=lambda request, shapes: {"video": golden.inputs["noise"][0]})
    embedding, = encoder([e2e_request()])
    assert error(embedding.prompt["video"], golden.outputs["embedding"]) < golden.tolerance["embedding"]
    assert error(embedding.negative["video"], golden.outputs["embedding_negative"]) < golden.tolerance["embedding"]
    latent, = denoiser([embedding])
    assert error(latent.streams["video"], golden.outputs["x.3"][0]) < golden.tolerance["velocities, guided and x"]
    frames, = Decoder(card, E2E)([latent])
    assert frames.rgb.dtype == torch.uint8 and frames.rgb.shape == (9, 24, 40, 3)
    want = golden.outputs["frames"][0].permute(1, 2, 3, 0)
    # truncation: a float just below a whole number may fall to the one before
    assert (frames.rgb - want).max() <= golden.tolerance["frames"]
    assert (want - frames.rgb).max() < 1 + golden.tolerance["frames"]
    assert (frames.rgb == golden.outputs["frames_uint8"][0].permute(1, 2, 3, 0)).float().mean() > 0.999


def test_a_prompt_that_does_not_fit_is_cut_and_the_clip_says_so(encoder, denoiser, decoder):
    request = dataclasses.replace(e2e_request(), prompt="a red fox runs over the snow " * 20)
    embedding, = encoder([request])
    left_out = len(encoder.model.tokenizer.ids(request.prompt)) - E2E_CARD.dit_config.text_len
    said = (f"prompt cut to {E2E_CARD.dit_config.text_len} tokens, {left_out} left out",)
    assert left_out > 0 and embedding.fallbacks == said
    frames, = decoder(denoiser([embedding]))
    assert frames.fallbacks == said
    assert encoder([e2e_request()])[0].fallbacks == ()


def test_every_step_of_the_course_equals_the_release(encoder, denoiser):
    golden = Golden("linum_e2e_a")
    embedding, = encoder([e2e_request()])
    prompt, negative = (denoiser.sampler.dit.embed_text([text["video"]])
                        for text in (embedding.prompt, embedding.negative))
    guide, x = denoiser.sampler.guide(7.0), golden.inputs["noise"]
    sigmas = Golden("flow_schedule_a").outputs["sigmas.4"]
    for step in range(4):
        cond, null = (denoiser.sampler.dit(x, 1000 * sigmas[step:step + 1], text) for text in (prompt, negative))
        for got, name in ((cond, "v_cond"), (null, "v_null"), (guide(cond, null), "guided")):
            assert error(got, golden.outputs[f"{name}.{step}"]) < golden.tolerance["velocities, guided and x"]
        x = golden.outputs[f"x.{step}"]


def test_latents_are_denormalised_with_the_checkpoints_own_statistics(decoder):
    golden = Golden("linum_e2e_a")
    denormalised = (golden.outputs["x.3"][0] - decoder.streams.bias) / decoder.streams.scale
    assert error(denormalised, golden.outputs["x_denormalised"][0]) < golden.tolerance["velocities, guided and x"]
    pixels = (decoder.streams.vae.decode(golden.outputs["x_denormalised"]).clamp(-1, 1) + 1) * 127.5
    assert (pixels - golden.outputs["frames"]).abs().max() < golden.tolerance["frames"]


def test_recorded_forwards_end_in_the_same_latent_and_are_set_aside_for_a_clip_that_failed_twice(
        encoder, denoiser, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("dailies.actors.denoiser.CudaGraphs", lambda: recorder)
    embeddings = encoder([e2e_request(clip_id=f"{seed:064x}", seed=seed) for seed in (1, 2)])
    recorded = Denoiser(E2E_CARD, E2E, E2E_CARD.runtime(graphs=True))
    for embedding, made in zip(embeddings, (0, 1), strict=True):                # from the second clip of a shape on
        assert torch.equal(recorded([embedding])[0].streams["video"], denoiser([embedding])[0].streams["video"])
        assert recorder.made == made
    recorded.safe = True
    assert torch.equal(recorded(embeddings[:1])[0].streams["video"], denoiser(embeddings[:1])[0].streams["video"])
    assert recorder.made == 1 and not recorded.graphs[0].recordings


def test_on_a_cpu_nothing_is_recorded_unless_it_is_asked_for(denoiser):
    assert not denoiser.graphs


def test_noise_is_decided_by_seed_and_shape_alone_and_is_the_recorded_one():
    first = video_noise(e2e_request())
    torch.manual_seed(5)
    again = video_noise(e2e_request(prompt="other", num_steps=9, guidance=1.0))
    assert torch.equal(first, again) and first.dtype == torch.float32 and first.shape == (16, 3, 3, 5)
    assert torch.equal(first, first.bfloat16().float())
    assert first.flatten()[:6].tolist() == RECORDED


# Philox4x64-10 with key 20, then Box-Muller; a change here changes every clip there is
RECORDED = [1.6875, 1.328125, 1.0234375, -0.322265625, -1.6015625, -0.4921875]


def test_noise_is_standard_normal_and_every_bit_of_the_seed_counts():
    shape = VideoShape(frames=49, height=360, width=640)
    drawn = [video_noise(e2e_request(seed=seed, shape=shape)) for seed in (7, 7 + 2 ** 32, 2 ** 63 - 1)]
    for one in drawn:
        assert abs(one.mean()) < 0.005 and abs(one.std() - 1) < 0.005
        assert abs(one.pow(4).mean() - 3) < 0.05 and 4.5 < one.abs().max() < 7
    assert all(abs((a * b).mean()) < 0.005 for a, b in permutations(drawn, 2))


def test_a_batch_changes_no_bit_of_its_clips(encoder, denoiser):
    prompts = ("a red fox", "snow", "a", "the fox runs over")
    requests = [e2e_request(clip_id=str(i), prompt=prompt, seed=i) for i, prompt in enumerate(prompts)]
    embeddings, started = encoder(requests), {}

    def watched(request, shapes):
        start = noise(request, shapes)
        started.setdefault(request.clip_id, []).append(start["video"])
        return start

    watching = Denoiser(E2E_CARD, E2E, noise=watched)
    together = watching(embeddings)
    alone = [watching([embedding])[0] for embedding in embeddings]
    assert all(torch.equal(*starts) for starts in started.values()) and len(started) == 4
    for one, of_batch in zip(alone, together, strict=True):
        assert one.request == of_batch.request
        assert torch.equal(of_batch.streams["video"], one.streams["video"]) and of_batch.determinism == one.determinism


def test_a_clip_does_not_depend_on_what_the_worker_made_before(encoder, denoiser, decoder):
    requests = [e2e_request(clip_id=str(i), prompt=prompt, negative_prompt=negative, seed=i)
                for i, (prompt, negative) in enumerate((("a red fox", ""), ("snow", "fox"), ("", "")))]
    made = {}
    for order in permutations(requests):
        for request in order:
            frames, = decoder(denoiser(encoder([request])))
            made.setdefault(request.clip_id, []).append(frames.rgb)
    for clips in made.values():
        assert len(clips) == 6 and all(torch.equal(clip, clips[0]) for clip in clips)


def test_how_much_memory_there_is_does_not_show_in_the_frames(decoder, monkeypatch):
    request = e2e_request(shape=VideoShape(frames=21, height=144, width=40))
    latent = Latent(request=request, streams={"video": video_noise(request)})
    whole, = decoder([latent])
    for room in (0, 2 ** 21):
        monkeypatch.setattr("dailies.actors.decoder.memory_on", lambda device, room=room: room)
        frames, = decoder([latent])
        assert psnr(frames.rgb, whole.rgb) > 60 and frames.fallbacks == ()


def test_a_clip_that_failed_twice_is_decoded_in_smaller_pieces_to_the_same_frames(decoder, monkeypatch):
    request = e2e_request(shape=VideoShape(frames=5, height=144, width=40))
    latent = Latent(request=request, streams={"video": video_noise(request)})
    whole, = decoder([latent])
    asked = []
    monkeypatch.setattr("dailies.actors.decoder.memory_on", lambda device: 2 ** 30)
    monkeypatch.setattr(decoder.streams.vae, "rows_within", lambda room, *shape: asked.append(room) or 4)
    monkeypatch.setattr(decoder, "safe", True)
    frames, = decoder([latent])
    assert asked == [2 ** 28] and psnr(frames.rgb, whole.rgb) > 60


def test_a_gpu_whose_memory_runs_out_decodes_fewer_rows_at_a_time_and_the_clip_says_so(decoder, monkeypatch):
    request = e2e_request(shape=VideoShape(frames=5, height=72, width=40))
    latent = Latent(request=request, streams={"video": video_noise(request)})
    whole, = decoder([latent])
    decode_pieces, most = decoder.streams.vae.decode_pieces, 3

    def short_of_memory(video, rows, slab):
        yield next(decode_pieces(video, rows=rows, slab=slab))      # something was copied already
        if rows > most:
            raise torch.OutOfMemoryError
        yield from decode_pieces(video, rows=rows, slab=slab)

    monkeypatch.setattr(decoder.streams.vae, "decode_pieces", short_of_memory)
    frames, = decoder([latent])
    assert psnr(frames.rgb, whole.rgb) > 60
    assert frames.fallbacks == ("decoded 24 rows at a time: the GPU had no memory for more",)
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        decoder([latent])


def test_a_container_has_the_memory_of_its_limit(tmp_path):
    machine = machine_memory(tmp_path)
    for name, text in (("memory.max", "max"), ("memory/memory.limit_in_bytes", str(2 ** 63 - 4096))):
        (tmp_path / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / name).write_text(text + "\n")
        assert machine_memory(tmp_path) == machine
    for name, limit in (("memory.max", 4_000_000), ("memory/memory.limit_in_bytes", 3_000_000)):
        (tmp_path / "sys/fs/cgroup" / name).write_text(f"{limit}\n")
        assert machine_memory(tmp_path) == limit
    assert 0 < memory_on("cpu") < machine


def test_free_memory_is_what_the_kernel_says_and_no_more_than_the_containers_limit(tmp_path):
    assert free_memory(tmp_path) == machine_memory(tmp_path)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 64000 kB\nMemAvailable: 4000 kB\n")
    assert free_memory(tmp_path) == 4_096_000
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("3000000\n")
    assert free_memory(tmp_path) == 3_000_000


def test_a_text_is_encoded_once_while_it_is_remembered(monkeypatch):
    encoder, asked = TextEncoder(E2E_CARD, E2E, remember=2), []
    monkeypatch.setattr(encoder.model, "tokens", lambda text: asked.append(text) or [1])
    encoder([e2e_request(prompt="a"), e2e_request(prompt="fox"), e2e_request(prompt="snow"), e2e_request(prompt="a")])
    assert asked == ["a", "", "fox", "snow", "a"]
    assert len(encoder.recent) == 2


def test_a_released_encoder_gives_its_memory_back():
    encoder = TextEncoder(E2E_CARD, E2E)
    weight = weakref.ref(encoder.model.model.shared)
    encoder([e2e_request()])
    gc.disable()
    try:
        encoder.release()
    finally:
        gc.enable()
    assert weight() is None


@pytest.mark.parametrize("changes, said", [
    (dict(precision="bf16"), "this actor runs linum-v2-360p in fp32 with dense attention; clip "),
    (dict(attention="sage"), "asks for linum-v2-360p in fp32 with sage"),
    (dict(model="demo"), "asks for demo"),
])
def test_a_request_for_another_worker_is_refused(encoder, denoiser, changes, said):
    embedding, = encoder([e2e_request()])
    with pytest.raises(ValueError) as caught:
        denoiser([dataclasses.replace(embedding, request=e2e_request(**changes))])
    assert said in str(caught.value)


def test_a_batch_of_two_buckets_is_refused(encoder, denoiser):
    with pytest.raises(ValueError, match="of one bucket; got 40x24x9 4 steps guidance 7 and 40x24x9 5 steps"):
        denoiser(encoder([e2e_request(), e2e_request(num_steps=5)]))


def test_a_clip_that_ends_in_nan_is_an_error_that_names_it(encoder, tmp_path):
    shutil.copytree(E2E, tmp_path / "weights")
    path = tmp_path / "weights/dit/360p.safetensors"
    tensors, _ = checkpoint.unpack(path.read_bytes())
    tensors["model.head.head.bias"][3] = 3e38           # a number still, which a step makes infinite
    checkpoint.save(path, tensors)
    with pytest.raises(NonFiniteLatent, match="NaN or infinity for cccc"):
        Denoiser(E2E_CARD, tmp_path / "weights")(encoder([e2e_request()]))


def test_frames_that_are_nan_are_an_error(decoder):
    latent = torch.zeros(16, 3, 3, 5)
    latent[0, 2, 0, 0] = torch.nan
    with pytest.raises(NonFiniteFrames, match="in frames 5 to 8"):
        decoder([Latent(request=e2e_request(), streams={"video": latent})])


def test_pixels_are_truncated_as_the_release_does():
    assert to_uint8(torch.tensor([-2, -1, -0.999, 0, 0.999, 1, 7])).tolist() == [0, 0, 0, 127, 254, 255, 255]


@pytest.mark.cpu
def test_bf16_runs_the_same_path_and_stays_near(encoder):
    request = e2e_request(precision="bf16")
    embedding, = TextEncoder(E2E_CARD, E2E, E2E_CARD.runtime(precision="bf16"))([request])
    assert embedding.prompt["video"].dtype == processor.dtype_of("bf16", "cpu")
    latent, = Denoiser(E2E_CARD, E2E, E2E_CARD.runtime(precision="bf16"))([embedding])
    assert latent.streams["video"].dtype == torch.float32
    want, = Denoiser(E2E_CARD, E2E)(encoder([e2e_request()]))
    assert ((latent.streams["video"] - want.streams["video"]).norm() / want.streams["video"].norm()).item() < 0.1
    frames, = Decoder(E2E_CARD, E2E, E2E_CARD.runtime(precision="bf16"))([latent])
    assert frames.rgb.shape == (9, 24, 40, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_renders_the_same_clip(encoder, decoder, denoiser):
    latent, = denoiser(encoder([e2e_request()]))
    want, = decoder([latent])
    for precision, least in (("fp32", 45), ("bf16", 25)):
        request = e2e_request(precision=precision)
        on = E2E_CARD.runtime("cuda", precision)
        actors = [actor(E2E_CARD, E2E, on) for actor in (TextEncoder, Denoiser, Decoder)]
        got, = actors[2](actors[1](actors[0]([request])))
        assert psnr(got.rgb, want.rgb) > least


def test_embeddings_may_come_in_any_dtype(denoiser, encoder):
    embedding, = encoder([e2e_request()])
    half = Embedding(request=embedding.request, prompt={"video": embedding.prompt["video"].bfloat16()},
                     negative={"video": embedding.negative["video"].bfloat16()})
    assert denoiser([half])[0].streams["video"].isfinite().all()
