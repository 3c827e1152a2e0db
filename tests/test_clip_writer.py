"""Frames to MP4 and back: the file is what people expect, and the same bytes every time."""

import ctypes
import hashlib
import io
import re
import resource
import tempfile
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from dailies.actors.clip_file import coded_size, read_clip
from dailies.actors.clip_writer import ClipWriter, nameless_file
from dailies.actors.messages import Frames, Request
from dailies.model.shapes import VideoShape
from dailies.pipeline.run.layout import clip_key


class MemoryStore:
    """A store in a dict; the clip writer's own behaviour is under test, not the store's."""

    def __init__(self):
        self.objects = {}

    def create(self, key, data, *, metadata=None):
        if key in self.objects:
            return False
        self.objects[key] = data.read_bytes()
        return True

    def get(self, key, *, at_most=None):
        if at_most is not None and len(self.objects[key]) > at_most:
            raise ValueError(f"{len(self.objects[key])} bytes")
        return self.objects[key]

    def replace(self, key, old, new, *, metadata=None):
        if self.objects.get(key) != old:
            return False
        self.objects[key] = new
        return True

    def delete(self, key):
        del self.objects[key]

    def uri_of(self, key):
        return f"memory://run/{key}"


def request(frames=9, height=64, width=64, *, fps=24.0, prompt="a red circle moves left", clip_id="ab" * 32, **kwargs):
    settings = dict(model="demo", weights_fingerprint="f" * 64, negative_prompt="", seed=2**62 + 1, num_steps=4,
                    guidance=7.5, precision="fp32", attention="dense")
    return Request(clip_id=clip_id, prompt=prompt, fps=fps,
                   shape=VideoShape(frames=frames, height=height, width=width), **(settings | kwargs))


def moving_disc(frames=9, height=64, width=64):
    """uint8 [frames, height, width, 3]: a disc crosses a gradient."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pictures = []
    for index in range(frames):
        picture = torch.stack([x * 255 // width, y * 255 // height, torch.full_like(x, 128)], dim=-1)
        picture[(x - width // 4 - 2 * index) ** 2 + (y - height // 2) ** 2 < (height // 5) ** 2] = 240
        pictures.append(picture.to(torch.uint8))
    return torch.stack(pictures)


def write(request, rgb, audio=None, store=None, determinism=(), **kwargs):
    store = store or MemoryStore()
    clip, = ClipWriter(store, clip_key,
                       **kwargs)([Frames(request=request, rgb=rgb, audio=audio, determinism=determinism)])
    return clip, store.objects[clip_key(request.clip_id)]


def decode(data, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    with av.open(str(path)) as container:
        return list(container.decode(video=0)), container


def psnr(got, want):
    return 10 * np.log10(255**2 / np.mean((got.astype(float) - want.astype(float)) ** 2))


def test_a_clip_is_h264_yuv420p_with_its_rate_and_length(tmp_path):
    clip, data = write(request(frames=49), moving_disc(49))
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert video.average_rate == 24 and video.frames == 49
        assert container.duration / av.time_base == pytest.approx(49 / 24, abs=1e-3)
        assert not container.streams.audio
    assert clip.sha256 == hashlib.sha256(data).hexdigest() and clip.num_bytes == len(data)
    assert clip.duration_s == 49 / 24 and not clip.has_audio and clip.fallbacks == ()
    assert clip.uri == f"memory://run/clips/ab/{'ab' * 32}.mp4"


def test_every_frame_comes_back_in_order_as_it_went_in(tmp_path):
    rgb = moving_disc(25)
    frames, _ = decode(write(request(frames=25), rgb)[1], tmp_path)
    assert [frame.pts * frame.time_base for frame in frames] == [Fraction(index, 24) for index in range(25)]
    for frame, want in zip(frames, rgb.numpy(), strict=True):
        assert psnr(frame.to_ndarray(format="rgb24"), want) > 28


def test_the_index_stands_in_front_of_the_pictures():
    data = write(request(), moving_disc())[1]
    assert data[4:8] == b"ftyp" and 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (90, 140, 30)])
def test_the_colour_tags_say_what_was_done_to_the_pixels(colour, tmp_path):
    rgb = torch.tensor(colour, dtype=torch.uint8).expand(5, 64, 64, 3)
    frames, _ = decode(write(request(frames=5), rgb)[1], tmp_path)
    frame = frames[2]
    assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    red, green, blue = (value / 255 for value in colour)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    want = [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748]
    got = [np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, :plane.width].mean() for plane in frame.planes]
    assert got == pytest.approx(want, abs=1.01)


@pytest.mark.parametrize("fps", [24.0, 16.0, 30000 / 1001, 8.0, 23.976])
def test_the_rate_of_the_request_is_the_rate_of_the_file(fps):
    found = read_clip(write(request(frames=17, fps=fps), moving_disc(17))[1])
    assert found.fps == pytest.approx(fps, rel=1e-5) and found.frames == 17


def test_a_single_frame_is_a_clip():
    clip, data = write(request(frames=1), moving_disc(1))
    assert read_clip(data).frames == 1 and clip.duration_s == 1 / 24


@pytest.mark.parametrize("prompt", [
    "a red\nfox\truns", "日本の猫 🦊 العربية", "é\u0301", "💡" * 2048, "x" * 8192, "", "  spaces  ", "a=b;c#d\\e",
    '{"json": "no"}', "key=value\n[section]",
], ids=lambda text: ascii(text[:12]))
def test_what_made_the_clip_is_in_the_file(prompt):
    made = request(prompt=prompt, negative_prompt="blurry, 低画質")
    found = read_clip(write(made, moving_disc())[1]).metadata
    assert found.get("prompt", "") == prompt and found["negative_prompt"] == "blurry, 低画質"
    assert (found["seed"], found["model"], found["clip_id"]) == (str(2**62 + 1), "demo", "ab" * 32)
    assert (found["steps"], found["guidance"]) == ("4", "7.5")
    assert not {"encoder", "creation_time"} & found.keys()


def test_control_characters_in_a_prompt_become_visible_and_cut_nothing_off():
    found = read_clip(write(request(prompt="a\0b\x1b[31mc\x7fd\x9be\ud800f\r\n"), moving_disc())[1]).metadata
    assert found["prompt"] == "a\u2400b\u241b[31mc\u2421d\ufffde\ufffdf\u240d\n"


@pytest.mark.parametrize("size", [(48, 48), (64, 64), (64, 96), (96, 160), (120, 200)], ids=str)
def test_equal_frames_give_equal_bytes_whatever_lies_in_memory(size):
    """glibc fills what it hands out with another value each time: with mbtree, small clips then differ."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("needs glibc's mallopt(M_PERTURB)")
    noise = torch.randn(25, *size, 3, generator=torch.Generator().manual_seed(0)) * 12
    rgb = (moving_disc(25, *size) + noise).clamp(0, 255).to(torch.uint8)
    made = request(25, *size)
    try:
        written = {(libc.mallopt(-6, fill), write(made, rgb.clone())[1])[1] for fill in (1, 77, 128, 200, 255)}
    finally:
        libc.mallopt(-6, 0)
    assert len(written) == 1


def test_the_machine_the_time_and_the_row_leave_no_trace_in_the_bytes(monkeypatch):
    before = write(request(), moving_disc())[1]
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert write(request(), moving_disc())[1] == before
    for trace in (b"Lavf", b"Lavc", tempfile.gettempdir().encode()):
        assert trace not in before


def test_an_odd_size_repeats_its_edge_and_says_so(tmp_path):
    rgb = moving_disc(5, 63, 65)
    clip, data = write(request(frames=5, height=63, width=65), rgb)
    assert clip.fallbacks == ("edge repeated to 66x64: H.264 yuv420p has even sides",)
    found = read_clip(data)
    assert (found.width, found.height) == coded_size(65, 63) == (66, 64)
    frames, _ = decode(data, tmp_path)
    assert psnr(frames[2].to_ndarray(format="rgb24")[:63, :65], rgb[2].numpy()) > 28


def test_sound_goes_along_as_aac():
    t = torch.arange(48_000) / 24_000
    audio = torch.stack([torch.sin(2 * torch.pi * 440 * t), torch.sin(2 * torch.pi * 660 * t)], dim=1)
    made = request(frames=49)
    clip, data = write(made, moving_disc(49), audio=audio, audio_rate=24_000)
    assert clip.has_audio and read_clip(data).has_audio and read_clip(data).frames == 49
    assert write(made, moving_disc(49), audio=audio, audio_rate=24_000)[1] == data


def test_decoded_sound_is_the_sound_that_went_in(tmp_path):
    t = torch.arange(48_000) / 24_000
    audio = torch.stack([0.5 * torch.sin(2 * torch.pi * 440 * t), torch.zeros_like(t)], dim=1)
    path = tmp_path / "clip.mp4"
    path.write_bytes(write(request(frames=49), moving_disc(49), audio=audio, audio_rate=24_000)[1])
    with av.open(str(path)) as container:
        sound = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    spectrum = np.abs(np.fft.rfft(sound[0, 4_000:28_000]))
    assert spectrum.argmax() == 440 and abs(np.abs(sound[0, 4_000:28_000]).max() - 0.5) < 0.05
    assert np.abs(sound[1]).max() < 0.05


@pytest.mark.parametrize("audio", [torch.zeros(48_000, 2), torch.zeros(2, 98_000), torch.zeros(98_000)])
def test_sound_that_is_not_as_long_as_its_pictures_is_refused(audio):
    with pytest.raises(ValueError, match=r"sound must be \[samples, 2\] and last as long as the pictures, 2.04 s; got"):
        write(request(frames=49), moving_disc(49), audio=audio)


def test_the_clip_that_was_there_first_wins():
    store, other = MemoryStore(), moving_disc()
    other[0, 0, 0] = 0                                  # as another kind of CPU may make it
    first = write(request(), other, store=store)[1]
    clip, data = write(request(), moving_disc(), store=store)
    assert data == first != write(request(), moving_disc())[1] and clip.num_bytes == len(data)
    assert clip.sha256 == hashlib.sha256(data).hexdigest() and clip.notes == ()


def test_the_determinism_class_is_that_of_the_frames_in_the_file():
    store, other = MemoryStore(), moving_disc()
    other[0, 0, 0] = 0
    assert write(request(), other, store=store, determinism=("one CPU",))[0].determinism == ("one CPU",)
    assert write(request(), other, store=store, determinism=("one CPU",))[0].determinism == ("one CPU",)
    # another machine's clip was there first: what made that, nobody knows here
    assert write(request(), moving_disc(), store=store, determinism=("another CPU",))[0].determinism == ()


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


NOT_THE_CLIP = {
    "html": (lambda data: b"<html>", "undecodable"),
    "nothing": (lambda data: b"", "undecodable"),
    "an SDP text": (lambda data: b"v=0\r\nc=IN IP4 127.0.0.1\r\nm=video 5555 RTP/AVP 96\r\n", "undecodable"),
    "a playlist": (lambda data: b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n", "undecodable"),
    "half of it": (lambda data: data[:len(data) // 2], "undecodable"),
    "all but its end": (lambda data: data[:-56], "its end is missing"),
    "two bytes changed": (lambda data: flipped(flipped(data, -1000), -900), "its own digest"),
    "a byte more": (lambda data: data + b"\0", "its end is missing|undecodable"),
    "another prompt": (lambda data: write(request(prompt="a cat"), moving_disc())[1], "made from another prompt"),
    "another clip": (lambda data: write(request(clip_id="cd" * 32), moving_disc())[1], "made from another clip_id"),
    "fewer frames": (lambda data: write(request(5), moving_disc(5))[1], "5 frames at 24 fps, where 9"),
    "more frames": (lambda data: write(request(13), moving_disc(13))[1], "9 frames of 64x64 were wanted; frame 10"),
    "another size": (lambda data: write(request(width=96), moving_disc(width=96))[1], "64x64 was wanted; it is 96x64"),
    "another rate": (lambda data: write(request(fps=12.0), moving_disc())[1], "12 fps, where 9 at 24"),
    "more bytes than any clip": (lambda data: b"\0" * 3_000_000, "3000000 bytes"),
}


@pytest.mark.parametrize("what", NOT_THE_CLIP)
def test_a_file_under_the_clips_name_that_is_not_the_clip_is_replaced_and_the_clip_says_so(what):
    make, why = NOT_THE_CLIP[what]
    store, whole = MemoryStore(), write(request(), moving_disc())[1]
    store.objects[clip_key("ab" * 32)] = make(whole)
    clip, data = write(request(), moving_disc(), store=store)
    assert data == whole and clip.sha256 == hashlib.sha256(whole).hexdigest() and clip.num_bytes == len(whole)
    note, = clip.notes
    assert re.search(why, note) and note.endswith("was replaced")


def test_a_file_that_is_known_not_to_be_what_was_published_is_replaced_though_it_is_a_clip():
    store, other = MemoryStore(), moving_disc()
    other[0, 0, 0] = 0
    first = write(request(), other, store=store)[1]
    spoilt = {"ab" * 32: hashlib.sha256(first).hexdigest()}
    clip, data = write(request(), moving_disc(), store=store, spoilt=spoilt)
    assert data != first and "not the file that the ledger names" in clip.notes[0]


def test_of_two_who_replace_the_same_file_one_takes_the_others_clip():
    class Raced(MemoryStore):
        def replace(self, key, old, new, *, metadata=None):
            other = moving_disc()
            other[0, 0, 0] = 0
            self.objects[key] = write(request(), other)[1]
            return super().replace(key, old, new, metadata=metadata)

    store = Raced()
    store.objects[clip_key("ab" * 32)] = b"<html>"
    clip, data = write(request(), moving_disc(), store=store)
    assert clip.sha256 == hashlib.sha256(data).hexdigest() and data != write(request(), moving_disc())[1]


def test_a_name_that_is_taken_by_what_cannot_be_read_ends_in_an_error_and_not_in_a_loop():
    class Taken(MemoryStore):
        def create(self, key, data, *, metadata=None):
            return False

    with pytest.raises(KeyError):
        write(request(), moving_disc(), store=Taken())


@pytest.mark.parametrize("fps, frames", [(24.0, 97), (16.0, 81), (29.97, 61), (1.0, 3)])
def test_a_keyframe_comes_at_least_every_second(fps, frames):
    data = write(request(frames, fps=fps), moving_disc(frames))[1]
    with av.open(io.BytesIO(data), format="mp4") as container:
        at = [float(packet.pts * packet.time_base) for packet in container.demux(video=0) if packet.is_keyframe]
    assert at[0] == 0 and max(np.diff([*at, frames / fps])) <= 1 + 1.5 / fps


def test_title_and_description_are_what_players_show():
    long = "a red circle moves left on a gray background, " * 10
    found = read_clip(write(request(prompt=f"{long}\nand then right"), moving_disc())[1]).metadata
    assert found["title"] == long[:79] + "…"
    assert found["description"] == (f"{long}\nand then right\ndemo, seed {2**62 + 1}, 4 steps, guidance 7.5, fp32, "
                                    "dense attention")
    empty = read_clip(write(request(prompt=""), moving_disc())[1]).metadata
    assert not empty.get("title") and empty["description"].startswith("demo, seed")


def test_no_temporary_file_is_left_after_success_or_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Broken(MemoryStore):
        def create(self, key, data, *, metadata=None):
            assert data.exists()
            raise OSError("disk full")

    write(request(), moving_disc())
    with pytest.raises(OSError, match="disk full"):
        write(request(), moving_disc(), store=Broken())
    with pytest.raises(ValueError, match=r"frames must be \[9, 64, 64, 3\] as the request says; got \[5, 64, 64, 3\]"):
        write(request(), moving_disc(5))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_clip_is_said_to_be_none(monkeypatch):
    data = write(request(frames=25), moving_disc(25))[1]
    for broken in (b"", b"not a video", data[:200], data[: len(data) // 2]):
        with pytest.raises(ValueError, match="no clip: an MP4 as dailies writes it is needed, and this is none: "):
            read_clip(broken)
    assert data.count(b"avc1") == 2                     # the brand of the file, and the codec of its stream
    brand, stream, rest = data.split(b"avc1")
    unknown = b"avc1".join((brand, stream)) + b"zz9\xff" + rest
    with pytest.raises(ValueError, match="no clip: .* this is none: a box 'zz9ÿ' in stsd"):
        read_clip(unknown)
    monkeypatch.setattr("dailies.actors.clip_file.check_boxes", lambda file, **options: None)
    with pytest.raises(ValueError, match="in a codec that nobody knows"):
        read_clip(unknown)


def test_encoding_holds_no_second_copy_of_the_clip():
    rgb = moving_disc(1, 360, 640).expand(600, 360, 640, 3)     # 415 MB if anything copied it
    write(request(frames=9, height=360, width=640), moving_disc(9, 360, 640))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(request(frames=600, height=360, width=640), rgb)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 150


def test_a_clip_that_is_being_made_has_no_name_that_could_stay_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with nameless_file() as path:
        path.write_bytes(b"12")
        with path.open("ab") as file:
            file.write(b"3")
        assert path.read_bytes() == b"123" and path.stat().st_size == 3 and not list(tmp_path.iterdir())
    assert not path.exists()
