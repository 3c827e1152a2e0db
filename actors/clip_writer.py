"""Frames in, Clip out: an MP4 that every browser plays, published once.

The bytes of a clip come from its frames and its request alone: no clock, host, worker or row id goes in, and the
encoder's thread count is fixed, because x264 makes other bytes with another count.
"""

import hashlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from torch import Tensor

from actors.messages import Clip, Frames, Request

# mbtree off: for pictures under some 100 pixels, x264's macroblock tree reads memory that nobody wrote, and equal
# frames give unequal bytes.
VIDEO_OPTIONS = {"crf": "18", "preset": "medium", "mbtree": "0"}
VIDEO_THREADS = 4
AUDIO_BITS_PER_S = 192_000

# Bit-exact: the same planes on every CPU, whatever vector instructions it has.
TO_YUV = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


# What was encoded is decoded again and compared, 16,384 pixels of each frame. The worst frames of the demo's clips have
# 40 dB and more and pure noise has 27; frames that come one too late have less than 10.
LOOKED_AT = 16_384
BT709_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
WORST_PSNR_DB = 20.0


class BadEncoding(ValueError):
    """The encoded clip, decoded again, does not show the frames that it was made from."""


class StoredObject(Protocol):
    num_bytes: int
    sha256: str


class ClipStore(Protocol):
    """What publishing needs of a store; pipeline/store.py says what each of these promises."""

    def create(self, key: str, data: bytes | Path, *, metadata: dict[str, str] | None = None) -> bool: ...
    def head(self, key: str) -> StoredObject | None: ...
    def uri_of(self, key: str) -> str: ...


def clip_key(clip_id: str) -> str:
    """Where a clip lies in its run folder; the two characters spread a listing over many prefixes."""
    return f"clips/{clip_id[:2]}/{clip_id}.mp4"


class ClipWriter:
    """Encodes frames to a temporary file and publishes it by one conditional create; holds nothing between clips."""

    def __init__(self, store: ClipStore, audio_rate: int = 48_000):
        """Raises av.codec.codec.UnknownCodecError where this PyAV cannot write such a clip."""
        self.store, self.audio_rate = store, audio_rate
        for name in ("libx264", "aac"):
            av.codec.Codec(name, "w")

    def __call__(self, batch: list[Frames]) -> list[Clip]:
        return [self.publish(frames) for frames in batch]

    def publish(self, frames: Frames) -> Clip:
        """Raises ValueError for frames that are not what the request asked for, BadEncoding for a file that does not
        show them, and whatever the store raises.
        """
        request = frames.request
        with tempfile.NamedTemporaryFile(prefix="dailies-", suffix=".mp4") as file:
            path = Path(file.name)
            write_mp4(path, frames, self.audio_rate)
            psnr_db = check_encoding(path, frames)
            sha256, num_bytes = self.store_once(clip_key(request.clip_id), path, request.clip_id)
        return Clip(request=request, uri=self.store.uri_of(clip_key(request.clip_id)), sha256=sha256,
                    num_bytes=num_bytes, duration_s=request.shape.frames / request.fps,
                    has_audio=frames.audio is not None, fallbacks=frames.fallbacks + padding_note(request),
                    determinism=frames.determinism,
                    quality={**frames.quality, "psnr_db": psnr_db})

    def store_once(self, key: str, path: Path, clip_id: str) -> tuple[str, int]:
        """SHA-256 and size of the object under `key`: this file, or the one that was there first, whoever stored it."""
        while not self.store.create(key, path, metadata={"clip-id": clip_id}):
            if there := self.store.head(key):
                return there.sha256, there.num_bytes
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size


def write_mp4(path: Path, frames: Frames, audio_rate: int) -> None:
    """H.264 yuv420p with the index in front, and AAC where there is sound; frames are converted one at a time."""
    request = frames.request
    wanted = (request.shape.frames, request.shape.height, request.shape.width, 3)
    if tuple(frames.rgb.shape) != wanted:
        raise ValueError(f"frames must be {list(wanted)} as the request says; got {list(frames.rgb.shape)}")
    rate = Fraction(request.fps).limit_denominator(1001)
    width, height = coded_size(request.shape.width, request.shape.height)
    # use_metadata_tags: our own key names; bitexact: no library versions in the file.
    options = {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        container.metadata.update(provenance(request))
        video = container.add_stream("libx264", rate=rate, width=width, height=height, pix_fmt="yuv420p",
                                     options=VIDEO_OPTIONS)
        video.thread_count = VIDEO_THREADS
        # The planes are made with the BT.709 matrix in limited range (yuv_frames), and the file says so.
        video.codec_context.colorspace = Colorspace.ITU709
        video.codec_context.color_range = ColorRange.MPEG
        video.codec_context.color_primaries = ColorPrimaries.BT709
        video.codec_context.color_trc = ColorTrc.BT709
        sound = None
        if frames.audio is not None:
            sound = container.add_stream("aac", rate=audio_rate, layout="stereo", bit_rate=AUDIO_BITS_PER_S,
                                         options={"flags": "+bitexact"})
            # Sound first: the muxer then holds a few small packets until their pictures come, not the other way round.
            container.mux(sound.encode(audio_frame(frames.audio, audio_rate)))
            container.mux(sound.encode())
        for frame in yuv_frames(frames.rgb, rate, width, height):
            container.mux(video.encode(frame))
        container.mux(video.encode())


def check_encoding(path: Path, frames: Frames) -> float:
    """Decodes the file again and compares brightness, pixel by pixel: peak signal to noise of the worst frame, in dB.

    Raises BadEncoding.
    """
    shape = frames.request.shape
    step = max(1, int((shape.height * shape.width / LOOKED_AT) ** 0.5))
    count, worst = 0, 0.0
    try:
        with av.open(str(path)) as container:
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


def audio_frame(audio: Tensor, rate: int) -> av.AudioFrame:
    """audio [samples, 2] in [-1, 1], as the planar float frame that the AAC encoder takes."""
    samples = np.ascontiguousarray(audio.float().clamp(-1, 1).cpu().numpy().T)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    return frame


def coded_size(width: int, height: int) -> tuple[int, int]:
    """Width and height in the file: yuv420p halves its colour planes, so both are rounded up to even."""
    return width + width % 2, height + height % 2


def padding_note(request: Request) -> tuple[str, ...]:
    """What to say of a clip whose file is larger than was asked; nothing for even sizes."""
    asked = (request.shape.width, request.shape.height)
    coded = coded_size(*asked)
    if coded == asked:
        return ()
    return (f"edge repeated to {coded[0]}x{coded[1]}: H.264 yuv420p has even sides",)


def provenance(request: Request) -> dict[str, str]:
    """What the file says about itself: only what decides the pixels, so rows that share a clip share its bytes."""
    said = {"prompt": request.prompt, "negative_prompt": request.negative_prompt, "seed": str(request.seed),
            "steps": str(request.num_steps), "guidance": f"{request.guidance:g}", "model": request.model,
            "weights_fingerprint": request.weights_fingerprint, "precision": request.precision,
            "attention": request.attention, "clip_id": request.clip_id}
    if request.image is not None:
        said["image_sha256"] = request.image.sha256
    if request.decode_precision is not None:
        said["decode_precision"] = request.decode_precision
    return {key: readable(value) for key, value in said.items()}


def readable(text: str) -> str:
    """The text with every control character as its visible picture (NUL as U+2400): an MP4 value ends at a NUL.

    Tab and newline stay. What UTF-8 cannot hold (half a surrogate pair) becomes U+FFFD.
    """
    pictures = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    pictures |= {0x7F: 0x2421} | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
    return text.translate(pictures)


@dataclass(frozen=True, kw_only=True)
class ClipFile:
    """What decoding a whole MP4 found."""

    frames: int
    width: int
    height: int
    fps: float
    duration_s: float
    has_audio: bool
    metadata: dict[str, str] = field(default_factory=dict)


def read_clip(data: bytes | Path) -> ClipFile:
    """Decodes every frame.  Raises ValueError for a file that is no video or breaks on the way."""
    try:
        with av.open(BytesIO(data) if isinstance(data, bytes) else str(data)) as container:
            if not container.streams.video:
                raise ValueError("a file with a video stream is needed; got one without")
            video = container.streams.video[0]
            frames = sum(1 for _ in container.decode(video=0))
            return ClipFile(frames=frames, width=video.codec_context.width, height=video.codec_context.height,
                            fps=float(video.average_rate), duration_s=frames / float(video.average_rate),
                            has_audio=bool(container.streams.audio), metadata=dict(container.metadata))
    except av.FFmpegError as error:
        raise ValueError(f"the clip does not decode: {error}") from error
