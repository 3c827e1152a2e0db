"""The sound of a clip: it begins with the pictures and ends with them to a millisecond, is heard as it was made, and is
missed where it is not there."""

import base64
import hashlib
import io
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType

import av
import numpy as np
import pytest
import torch
from test_clip_writer import MemoryStore, moving_disc, request
from test_new_family import duet, plan_of, rendered  # noqa: F401

from dailies.actors import soundtrack
from dailies.actors.clip_file import DIGEST_BYTES, DIGEST_HEAD, NotThisClip, check_clip, check_file
from dailies.actors.clip_writer import BadEncoding, ClipWriter, check_sound, write_mp4
from dailies.actors.decoder import NO_SOUND
from dailies.actors.gate import Gate
from dailies.actors.messages import Failure, Frames
from dailies.actors.soundtrack import wanted_samples
from dailies.actors.strict import NotAsAsked, StrictSound
from dailies.jobs.bench.chromium import Browser, NoBrowser
from dailies.jobs.verify import problem_of
from dailies.model.shapes import VideoShape, frame_rate
from dailies.pipeline.run.adoption import Spoilt, judged
from dailies.pipeline.run.layout import clip_key
from dailies.pipeline.run.ledger_row import row_of
from dailies.pipeline.stages import run_local
from dailies.pipeline.store import open_store
from dailies.pipeline.text_to_video import text_to_video

NTSC = Fraction(24000, 1001)


def tone(samples, rate, *, click=None):
    """Two pitches, one in each ear, in [samples, 2]; and a click at a sample."""
    t = torch.arange(samples)[:, None] / rate
    sound = 0.3 * torch.sin(2 * torch.pi * t * torch.tensor([440.0, 660.0]))
    if click is not None:
        sound[click] = 0.95
    return sound


def published(made, audio, rate):
    store = MemoryStore()
    frames = Frames(request=made, rgb=moving_disc(made.shape.frames), audio=audio)
    (clip,) = ClipWriter(store, clip_key, audio_rate=rate)([frames])
    return clip, store.objects[clip_key(made.clip_id)]


@pytest.fixture(scope="module")
def sung():
    """A clip of 9 frames with sound: what was asked for, and its file."""
    made = request()
    return made, published(made, tone(9_000, 24_000), 24_000)[1]


def rewritten(data, change):
    """Its digest made again, of what `change` makes of it: as somebody would who forges a clip."""
    changed = change(data[:-DIGEST_BYTES])
    return changed + DIGEST_HEAD + hashlib.sha256(changed).digest()


@pytest.mark.parametrize("said, rate", [
    (24.0, 24), (16, 16), (1.0, 1), (NTSC, NTSC), (24000 / 1001, NTSC), (23.976, NTSC), (23.98, NTSC),
    (29.97, Fraction(30000, 1001)), (59.94, Fraction(60000, 1001)), (12.5, Fraction(25, 2))])
def test_a_frame_rate_is_a_fraction_also_where_it_was_written_out(said, rate):
    assert frame_rate(said) == rate


# samples as the release's decoder makes them: 4 round(25 frames / fps) - 3 frames of 10 ms
@pytest.mark.parametrize("frames, fps, rate, made, wanted", [
    (121, 24.0, 24_000, 120_240, 121_000), (121, NTSC, 48_000, 240_480, 242_242),
    (17, Fraction(50), 24_000, 6_960, 8_160), (25, 25.0, 16_000, 15_520, 16_000), (49, 24.0, 24_000, 50_000, 49_000)])
def test_sound_begins_with_the_pictures_and_ends_with_them(frames, fps, rate, made, wanted):
    asked, at = request(frames, fps=fps), made // 3
    audio = tone(made, rate, click=at)
    clip, data = published(asked, audio, rate)
    assert wanted_samples(asked.shape, fps, rate) == wanted and clip.has_audio
    assert clip.audio_padding_ms == pytest.approx(1000 * (wanted - made) / rate)
    with av.open(io.BytesIO(data)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert video.average_rate == frame_rate(fps) and not video.start_time and sound.start_time == 0
        assert abs(sound.duration * sound.time_base - frames / frame_rate(fps)) < Fraction(1, 1000)
        assert (sound.codec_context.name, sound.rate, sound.codec_context.channels) == ("aac", rate, 2)
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(sound)], axis=1)
    assert clip.duration_s == pytest.approx(wanted / rate, abs=1e-3)
    assert 0 <= heard.shape[1] - wanted < 1024                      # what is behind is the rest of the last packet
    assert abs(int(np.abs(heard[0, :wanted]).argmax()) - at) <= rate // 1000
    kept = min(made, wanted)
    assert np.corrcoef(heard[0, :kept], audio[:kept, 0])[0, 1] > 0.99
    assert np.abs(heard[:, kept + 512:]).max(initial=0) < 0.02, "silence was put at the end, and nowhere else"
    assert clip.quality["audio_correlation"] > 0.99


def test_the_ledger_has_the_frame_rate_as_a_number_and_how_much_silence_was_put_behind():
    made = request(25, fps=NTSC)
    row = row_of("a", published(made, tone(49_920, 48_000), 48_000)[0])
    assert type(row["fps"]) is float and row["fps"] == pytest.approx(23.976024)
    assert row["has_audio"] and row["duration_s"] == pytest.approx(25 * 1001 / 24000)
    assert row["audio_padding_ms"] == pytest.approx(1000 * 130 / 48_000)
    assert request(25, fps=NTSC).identity() == request(25).identity()
    assert row_of("b", replace(published(made, tone(50_050, 48_000), 48_000)[0]))["audio_padding_ms"] == 0


def listened(audio, settings=MappingProxyType({})):
    rng = np.random.default_rng(5)
    rgb = torch.from_numpy(rng.integers(0, 255, (9, 64, 64, 3), np.uint8))
    (result,) = Gate()([Frames(request=replace(request(), settings=settings), rgb=rgb, audio=audio)])
    return result


def clipped(samples=9_000):
    return (9 * tone(samples, 24_000)).clamp(-1, 1)


@pytest.mark.parametrize("audio, verdict, why", [
    (torch.zeros(9_000, 2), "silent", "no sample of its sound is above"),
    (torch.zeros(9_000, 2).index_fill(0, torch.tensor([700]), 0.5), "silent", "no more than 2 of 18,000 samples"),
    (torch.full((9_000, 2), 0.4), "silent", "its sound is one level, 0.400 of 1"),
    (clipped(), "clipped", "at full scale"), (3 * clipped(), "clipped", "at full scale"),
    (tone(9_000, 24_000) + torch.tensor([0.0, 0.2]), "dc", "its sound is 0.20 of 1 off the middle"),
    (tone(9_000, 24_000) * torch.tensor([1, float("nan")]), "nan", "NaN or infinity in its sound")],
    ids=["silence", "one click", "one level", "clipped", "beyond full scale", "direct current", "nan"])
def test_the_gate_hears_what_nobody_wants_to_hear(audio, verdict, why):
    refused = listened(audio)
    assert isinstance(refused, Failure) and refused.error_type == "Rejected" and refused.quality["verdict"] == verdict
    assert refused.error.startswith(f"{verdict}: ") and why in refused.error


@pytest.mark.parametrize("audio", [
    tone(9_000, 24_000), 0.001 * tone(9_000, 24_000),
    torch.cat((torch.zeros(8_000, 2), tone(1_000, 24_000))),        # nearly all of it is silent
    tone(9_000, 24_000) * torch.tensor([1.0, 0.0]),
    tone(9_000, 24_000, click=17) + 0.02], ids=["tones", "faint", "a sound at the end", "one ear", "a little off"])
def test_the_gate_lets_through_what_may_have_been_asked_for_and_says_how_loud_it_is(audio):
    passed = listened(audio)
    assert isinstance(passed, Frames) and passed.quality["verdict"] == "ok"
    assert {"audio_peak", "audio_rms", "audio_dc", "audio_clipped"} <= passed.quality.keys()


def test_the_gate_misses_sound_only_where_its_row_asks_for_it():
    missed = listened(None, {"audio": True})
    assert isinstance(missed, Failure) and missed.error == "no audio: its row asks for sound, and none was made"
    assert isinstance(listened(None), Frames) and isinstance(listened(None, {"audio": False}), Frames)


def test_strict_refuses_a_clip_without_the_sound_that_was_sampled():
    frames = Frames(request=request(), rgb=moving_disc(), audio=tone(9_000, 24_000), fallbacks=("decoded in strips",))
    assert StrictSound()([frames]) == [frames]
    with pytest.raises(NotAsAsked, match="--strict, and without sound"):
        StrictSound()([replace(frames, audio=None, fallbacks=(NO_SOUND,))])


def test_what_was_encoded_is_decoded_again_and_compared(tmp_path):
    path, frames = tmp_path / "clip.mp4", Frames(request=request(), rgb=moving_disc(), audio=tone(9_000, 24_000))
    write_mp4(path, frames, 24_000)
    assert check_sound(path, frames)["audio_correlation"] > 0.99
    for other, why in ((tone(7_000, 24_000), "must have 7000 samples"), (torch.zeros(9_000, 2), "as loud as")):
        with pytest.raises(BadEncoding, match=why):
            check_sound(path, replace(frames, audio=other))


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
def test_a_burst_in_one_packet_is_heard_although_the_whole_is_as_it_was(rate):
    """The sound begins and ends at once, which an encoder smears: that is none."""
    audio = 0.5 * tone(2 * rate, rate)
    audio[rate // 2:rate] = 0
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        track = soundtrack.add_track(container, rate)
        container.mux([*track.encode(soundtrack.audio_frame(audio, rate)), *track.encode(None)])
    file.seek(0)
    with av.open(file) as container:
        decoded = soundtrack.heard(container)
    assert soundtrack.correlation(decoded, audio) > 0.99
    for start in (rate // 2 + 5000, 2 * rate - 600):
        spoilt = decoded.copy()
        spoilt[start:start + 500] = np.sign(np.sin(np.arange(500)))[:, None][:len(spoilt) - start]
        with pytest.raises(soundtrack.BadSound, match="are a burst that nobody wrote"):
            soundtrack.correlation(spoilt, audio)


def without_sound(made):
    return published(made, None, 24_000)[1]


def garbled(data):
    """Every packet of sound overwritten."""
    with av.open(io.BytesIO(data)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(audio=0) if packet.size]
    data = bytearray(data)
    for place, size in places:
        data[place:place + size] = b"\xff" * size
    return bytes(data)


def edited(data, *, offset, value):
    """A number of the second track's edit: 8 its length, 12 where it begins."""
    place = data.index(b"elst", data.index(b"elst") + 4) + 4 + offset
    return data[:place] + value.to_bytes(4) + data[place + 4:]


@pytest.mark.parametrize("change, why", [
    (garbled, "undecodable"),
    (lambda data: edited(data, offset=8, value=4_500), "its sound goes from 0.000 s on for 0.188 s"),
    (lambda data: data.replace(b"mp4a", b"mp3a"), "undecodable")], ids=["garbled", "half of it", "another codec"])
def test_a_clip_whose_sound_is_not_there_is_wrong_for_verify_and_adoption(change, why, sung, tmp_path):
    made, data = sung
    forged = rewritten(data, change)
    with pytest.raises(NotThisClip, match=why):
        check_clip(forged, made)
    store = open_store(str(tmp_path))
    assert isinstance(judged(store, made, forged, None), Spoilt)


def test_a_clip_has_sound_if_its_row_says_so_and_not_if_not(sung, tmp_path):
    made, data = sung
    assert rewritten(data, bytes) == data and check_clip(data, made).has_audio
    silent, store = without_sound(made), open_store(str(tmp_path))
    assert not check_clip(silent, made).has_audio                   # a row that says nothing has either
    for file, asked in ((silent, True), (data, False)):
        wants = replace(made, settings={"audio": asked})
        with pytest.raises(NotThisClip, match="sound is wanted"):
            check_file(file, width=64, height=64, frames=9, fps=24.0, has_audio=asked)
        assert isinstance(judged(store, wants, file, None), Spoilt)
    store.create(clip_key(made.clip_id), data)
    row = dict(clip_id=made.clip_id, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), width=64, height=64,
               frames=9, fps=24.0, has_audio=True)
    assert problem_of(store, row) is None and problem_of(store, row | {"has_audio": None}) is None
    assert problem_of(store, row | {"has_audio": False}) == (
        "not what the ledger says: with sound, where a clip without sound is wanted")


def test_a_family_with_sound_at_a_rate_that_no_float_is_renders_and_strict_minds_a_missing_sound(duet, tmp_path):  # noqa: F811
    duet = replace(duet, duration_s=1.05)               # 25 frames at either rate
    card = replace(duet, fps=NTSC)
    rows, _ = rendered(card, open_store(str(tmp_path / "out")))
    assert {row["clip_id"] for row in rows} == {request.clip_id for request in plan_of(duet).requests()}
    for row in rows:
        assert row["has_audio"] and row["audio_padding_ms"] == pytest.approx(1000 * 25 / 24_000)
        assert row["fps"] == float(NTSC) and row["duration_s"] == 25 * 1001 / 24000
        assert row["quality.audio_correlation"] > 0.9 and row["quality.audio_rms"] > 0.01
    mute, store = replace(card, mute=True), open_store(str(tmp_path / "strict"))
    strict = text_to_video(mute, None, store, mute.runtime(), strict=True)
    (outcome,) = run_local(strict, [next(iter(plan_of(mute).requests()))])
    assert outcome.value.error_type == "NotAsAsked" and NO_SOUND in outcome.value.error
    assert not list(store.list("clips/"))
    assert plan_of(card).summary()["settings"]["fps"] == float(NTSC)


def test_a_row_that_wants_no_sound_gets_none_and_misses_none(duet):  # noqa: F811
    from dailies.actors.decoder import Decoder
    from dailies.actors.messages import Latent
    made = replace(next(iter(plan_of(duet).requests())), shape=VideoShape(frames=25, height=32, width=48))
    streams = {name: torch.zeros(size) for name, size in duet.stream_shapes(made.shape).items()}
    decoder = Decoder(duet, duet.folder)
    for asked, has_sound in ((None, True), (True, True), (False, False)):
        settings = {} if asked is None else {"audio": asked}
        (frames,) = decoder([Latent(request=replace(made, settings=settings), streams=streams)])
        assert (frames.audio is not None) == has_sound and frames.fallbacks == ()


HEARD = """(async () => {
  const bytes = Uint8Array.from(atob("%s"), each => each.charCodeAt(0));
  const sound = await new OfflineAudioContext(2, 1, %d).decodeAudioData(bytes.slice().buffer);
  const video = document.createElement("video");
  const shown = new Promise((done, failed) => {
    video.onended = done; video.onerror = () => failed(video.error.message);
  });
  video.src = URL.createObjectURL(new Blob([bytes], {type: "video/mp4"}));
  video.muted = true; video.playbackRate = 4; await video.play(); await shown;
  const written = channel => {
    const raw = new Uint8Array(sound.getChannelData(channel).buffer);
    let text = "";
    for (let at = 0; at < raw.length; at += 8192) text += String.fromCharCode(...raw.subarray(at, at + 8192));
    return btoa(text);
  };
  return {rate: sound.sampleRate, ears: [written(0), written(1)], lasts_s: video.duration, ended_s: video.currentTime};
})()"""


def test_chromium_plays_it_and_hears_what_was_written():
    try:
        browser = Browser()
    except NoBrowser as error:
        pytest.skip(str(error))
    with browser as page:
        for frames, fps, rate in ((49, 24.0, 24_000), (25, NTSC, 48_000)):
            wanted = wanted_samples(request(frames).shape, fps, rate)
            at = wanted // 3
            audio = tone(wanted - rate // 20, rate, click=at)
            _, data = published(request(frames, fps=fps), audio, rate)
            found = page.run(HEARD % (base64.b64encode(data).decode(), rate))
            heard = np.stack([np.frombuffer(base64.b64decode(ear), np.float32) for ear in found["ears"]])
            assert found["rate"] == rate and heard.shape == (2, wanted), "to the sample: it goes by the edit list"
            assert abs(found["lasts_s"] - wanted / rate) < 1e-3 and abs(found["ended_s"] - wanted / rate) < 2e-3
            assert np.abs(heard[0]).argmax() == at
            for ear, written in zip(heard, audio.T.numpy(), strict=True):
                assert np.corrcoef(ear[:len(written)], written)[0, 1] > 0.99
                assert np.abs(ear[len(written) + 512:]).max() < 0.02
