"""Frames in, Clip out: an MP4 that every browser plays, published once.

The bytes of a clip come from its frames and its request alone: no clock, host, worker or row id goes in, and the
encoder's thread count is fixed, because x264 makes other bytes with another count.
"""

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from torch import Tensor

from dailies.actors.clip_file import (
    OPENED,
    NotThisClip,
    append_digest,
    check_clip,
    coded_size,
    labels,
    most_clip_bytes,
    provenance,
)
from dailies.actors.messages import Clip, Frames, Request
from dailies.actors.poster import poster, shown_frames, store_poster
from dailies.actors.soundtrack import BadSound, add_track, as_long_as_pictures, audio_frame, correlation, heard
from dailies.model.files import first_line
from dailies.model.shapes import frame_rate

# mbtree off: for pictures under some 100 pixels, x264's macroblock tree reads memory that nobody wrote, and equal
# frames give unequal bytes.
VIDEO_OPTIONS = {"crf": "18", "preset": "medium", "mbtree": "0"}
VIDEO_THREADS = 4

# Bit-exact: the same planes on every CPU, whatever vector instructions it has.
TO_YUV = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


# What was encoded is decoded again and compared, 16,384 pixels of each frame. The worst frames of the demo's clips have
# 40 dB and more and pure noise has 27; frames that come one too late have less than 10.
_LOOKED_AT = 16_384
BT709_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
WORST_PSNR_DB = 20.0

MOST_TRIES = 20                                         # at a name that is taken, though nothing can be read there


class BadEncoding(ValueError):
    """The encoded clip, decoded again, does not show the frames that it was made from."""


class ClipStore(Protocol):
    """What publishing needs of a store; pipeline/store/base.py says what each of these promises."""

    def create(self, key: str, data: bytes | Path, *, metadata: dict[str, str] | None = None) -> bool: ...
    def get(self, key: str, *, at_most: int | None = None) -> bytes: ...
    def replace(self, key: str, old: bytes, new: bytes, *, metadata: dict[str, str] | None = None) -> bool: ...
    def delete(self, key: str) -> None: ...
    def uri_of(self, key: str) -> str: ...


class ClipWriter:
    """Encodes frames to a temporary file and publishes it by one conditional create; holds nothing between clips.

    What lies under the clip's name already is taken if it is this clip, and replaced if it is not.
    """

    def __init__(self, store: ClipStore, key_of: Callable[[str], str], audio_rate: int = 48_000,
                 spoilt: Mapping[str, str] = {}, poster_key_of: Callable[[str], str] | None = None):
        """key_of: where a clip of this clip_id lies in the store.  spoilt: clip_id -> SHA-256 of a file under its name
        that is known not to be what was published.  poster_key_of: where its poster lies; None: none is made.

        Raises av.codec.codec.UnknownCodecError where this PyAV cannot write such a clip.
        """
        self.store, self.key_of, self.audio_rate, self.spoilt = store, key_of, audio_rate, spoilt
        self.poster_key_of = poster_key_of
        for name in ("libx264", "aac"):
            av.codec.Codec(name, "w")

    def __call__(self, batch: list[Frames]) -> list[Clip]:
        return [self.publish(frames) for frames in batch]

    def publish(self, frames: Frames) -> Clip:
        """Raises ValueError for frames that are not what the request asked for, BadEncoding for a file that does not
        show them, and whatever the store raises.
        """
        frames, padding_ms = with_whole_sound(frames, self.audio_rate)
        request = frames.request
        with nameless_file() as path:
            write_mp4(path, frames, self.audio_rate)
            measures = {"psnr_db": check_encoding(path, frames), **check_sound(path, frames)}
            with path.open("rb") as made:
                mine = hashlib.file_digest(made, "sha256").hexdigest()
            sha256, num_bytes, notes = self.store_once(path, mine, request)
        notes += self.show(frames, anew=bool(notes))
        return Clip(request=request, uri=self.store.uri_of(self.key_of(request.clip_id)), sha256=sha256,
                    num_bytes=num_bytes, duration_s=float(request.shape.frames / frame_rate(request.fps)),
                    has_audio=frames.audio is not None, audio_padding_ms=padding_ms,
                    fallbacks=frames.fallbacks + padding_note(request),
                    # where another's file is the clip, nobody knows what that was made on
                    determinism=frames.determinism if sha256 == mine else (),
                    quality={**frames.quality, **measures}, notes=notes)

    def show(self, frames: Frames, *, anew: bool) -> tuple[str, ...]:
        """Make the clip's poster of the frames that are in memory; what is to be told of it. It never costs the clip.

        anew: as of store_poster.
        """
        if self.poster_key_of is None:
            return ()
        request = frames.request
        try:
            pictures = [frames.rgb[index].cpu().numpy() for index in shown_frames(request.shape.frames)]
            store_poster(self.store, self.poster_key_of(request.clip_id), poster(pictures), anew=anew)
            return ()
        except Exception as error:                      # `dailies report` makes it of the clip
            return (f"without a poster: {first_line(error) or type(error).__name__}",)

    def store_once(self, path: Path, mine: str, request: Request) -> tuple[str, int, tuple[str, ...]]:
        """SHA-256 and size of the clip's object, and what is to be told of it: this file, or the one that was there
        first, whoever stored it, if it is this clip. Another is replaced, and stays until this one is there.

        mine: SHA-256 of the file at `path`.
        """
        key, metadata = self.key_of(request.clip_id), {"clip-id": request.clip_id}
        notes: tuple[str, ...] = ()
        shape, tries = request.shape, count(1)
        at_most = most_clip_bytes(width=shape.width, height=shape.height, frames=shape.frames)
        while not self.store.create(key, path, metadata=metadata):
            try:
                there = self.store.get(key, at_most=at_most)
            except KeyError:                            # removed meanwhile
                if next(tries) > MOST_TRIES:
                    raise
                continue
            except ValueError as error:                 # too large to be read
                notes = (f"another file lay under its name ({error}), and was replaced",)
                self.store.delete(key)
                continue
            sha256 = hashlib.sha256(there).hexdigest()
            try:
                if sha256 == self.spoilt.get(request.clip_id):
                    raise NotThisClip("it is not the file that the ledger names")
                check_clip(there, request)
                return sha256, len(there), notes
            except NotThisClip as error:
                notes = (f"another file lay under its name ({error}), and was replaced",)
            if self.store.replace(key, there, path.read_bytes(), metadata=metadata):
                break
        return mine, path.stat().st_size, notes


@contextmanager
def nameless_file() -> Iterator[Path]:
    """A path to a file that is gone when this process is, however it ends: nobody else can open it by a name. Where a
    system has no such paths it lies among the temporary files until the block ends.
    """
    with tempfile.TemporaryFile(prefix="dailies-", suffix=".mp4") as file:
        path = Path(f"/proc/self/fd/{file.fileno()}")
        if path.exists():
            yield path
            return
    with tempfile.NamedTemporaryFile(prefix="dailies-", suffix=".mp4") as file:
        yield Path(file.name)


def with_whole_sound(frames: Frames, audio_rate: int) -> tuple[Frames, float | None]:
    """The frames with sound as long as they are, and the milliseconds of silence behind it; as they are without sound.

    Raises ValueError.
    """
    if frames.audio is None:
        return frames, None
    audio, padding_ms = as_long_as_pictures(frames.audio, frames.request.shape, frames.request.fps, audio_rate)
    return replace(frames, audio=audio), padding_ms


def write_mp4(path: Path, frames: Frames, audio_rate: int) -> None:
    """H.264 yuv420p with the index in front and a keyframe at least every second, so that a player can go to any place
    at once, and AAC where there is sound. Frames are converted one at a time.
    """
    request = frames.request
    wanted = (request.shape.frames, request.shape.height, request.shape.width, 3)
    if tuple(frames.rgb.shape) != wanted:
        raise ValueError(f"frames must be {list(wanted)} as the request says; got {list(frames.rgb.shape)}")
    rate = frame_rate(request.fps)
    width, height = coded_size(request.shape.width, request.shape.height)
    # use_metadata_tags: our own key names; bitexact: no library versions in the file.
    options = {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"}
    if frames.audio is not None:
        options["movie_timescale"] = str(audio_rate)    # the edit list says to a sample where the sound ends
    with av.open(str(path), "w", format="mp4", options=options) as container:
        container.metadata.update(labels(request) | provenance(request))
        video = container.add_stream("libx264", rate=rate, width=width, height=height, pix_fmt="yuv420p",
                                     options=VIDEO_OPTIONS | {"g": str(max(1, round(rate)))})
        video.thread_count = VIDEO_THREADS
        # The planes are made with the BT.709 matrix in limited range (yuv_frames), and the file says so.
        video.codec_context.colorspace = Colorspace.ITU709
        video.codec_context.color_range = ColorRange.MPEG
        video.codec_context.color_primaries = ColorPrimaries.BT709
        video.codec_context.color_trc = ColorTrc.BT709
        if frames.audio is not None:
            sound = add_track(container, audio_rate)
            # Sound first: the muxer then holds a few small packets until their pictures come, not the other way round.
            container.mux(sound.encode(audio_frame(frames.audio, audio_rate)))
            container.mux(sound.encode())
        for frame in yuv_frames(frames.rgb, rate, width, height):
            container.mux(video.encode(frame))
        container.mux(video.encode())
    append_digest(path)


def check_encoding(path: Path, frames: Frames) -> float:
    """Decodes the file again and compares brightness, pixel by pixel: peak signal to noise of the worst frame, in dB.

    Raises BadEncoding.
    """
    shape = frames.request.shape
    step = max(1, int((shape.height * shape.width / _LOOKED_AT) ** 0.5))
    count, worst = 0, 0.0
    try:
        with path.open("rb") as file, av.open(file, format="mp4", options=OPENED) as container:
            for decoded in container.decode(video=0):
                if count < len(frames.rgb):
                    plane = decoded.planes[0]
                    luma = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
                    luma = luma[:shape.height:step, :shape.width:step].astype(np.float32)
                    shown = (luma - 16) * (255 / 219)                          # BT.709, limited range
                    wanted = frames.rgb[count, ::step, ::step].cpu().numpy() @ BT709_LUMA
                    worst = max(worst, float(np.square(shown - wanted).mean()))
                count += 1
    except av.FFmpegError as error:
        raise BadEncoding(f"the encoded clip does not decode: {error}") from error
    if count != len(frames.rgb):
        raise BadEncoding(f"the encoded clip must have {len(frames.rgb)} frames; decoded again it has {count}")
    psnr_db = 10 * math.log10(255 ** 2 / max(worst, 1e-3))
    if psnr_db < WORST_PSNR_DB:
        raise BadEncoding(f"every frame of the encoded clip must show what was encoded with {WORST_PSNR_DB:g} dB or "
                          f"more; the worst has {psnr_db:.1f} dB")
    return psnr_db


def check_sound(path: Path, frames: Frames) -> dict[str, float]:
    """Decodes the file's sound again and compares: audio_correlation, where there is any.  Raises BadEncoding."""
    if frames.audio is None:
        return {}
    try:
        with path.open("rb") as file, av.open(file, format="mp4", options=OPENED) as container:
            return {"audio_correlation": correlation(heard(container), frames.audio)}
    except (av.FFmpegError, BadSound) as error:
        raise BadEncoding(f"the sound of the encoded clip is not what was made: {error}") from error


def yuv_frames(rgb: Tensor, rate: Fraction, width: int, height: int) -> Iterator[av.VideoFrame]:
    """rgb uint8 [frames, height, width, 3] on any device, as yuv420p frames; an odd side gets its edge once more."""
    reformat = VideoReformatter().reformat
    for index, picture in enumerate(rgb):
        pixels = picture.cpu().numpy()
        pad = (height - pixels.shape[0], width - pixels.shape[1])
        if any(pad):
            pixels = np.pad(pixels, ((0, pad[0]), (0, pad[1]), (0, 0)), mode="edge")
        frame = reformat(av.VideoFrame.from_ndarray(pixels, format="rgb24"), format="yuv420p", interpolation=TO_YUV,
                         src_color_range=ColorRange.JPEG, dst_color_range=ColorRange.MPEG,
                         dst_colorspace=Colorspace.ITU709, dst_color_primaries=ColorPrimaries.BT709,
                         dst_color_trc=ColorTrc.BT709, threads=1)
        frame.pts, frame.time_base = index, 1 / rate
        yield frame


def padding_note(request: Request) -> tuple[str, ...]:
    """What to say of a clip whose file is larger than was asked; nothing for even sizes."""
    asked = (request.shape.width, request.shape.height)
    coded = coded_size(*asked)
    if coded == asked:
        return ()
    return (f"edge repeated to {coded[0]}x{coded[1]}: H.264 yuv420p has even sides",)
