"""A clip's file, read as one that anybody may have written: what it says of itself is checked against what it holds.

Layout  an MP4 as write_mp4 makes it (clip_writer.py), then one box of type uuid with the SHA-256 of all bytes before
        it. Players pass over a box that they do not know; who reads a clip can tell that no byte of it has changed.
"""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from dailies.actors.messages import Request
from dailies.actors.mp4_boxes import BadBoxes, check_boxes
from dailies.model.settings import SIZE, sampling_of

DIGEST_HEAD = (56).to_bytes(4, "big") + b"uuid" + bytes.fromhex("5b1c7a0e6d8f4c3f9a55f0d2b7e41c86")     # then 32 bytes
DIGEST_BYTES = 56
MAX_CLIP_BYTES = 2**31                                  # of a clip's file

# Only what we write is opened: H.264 and AAC in MP4, from bytes; no other codec, format or protocol is even tried.
OPENED = {"protocol_whitelist": "none", "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2", "codec_whitelist": "h264,aac"}
TITLE_CHARACTERS = 80
SOUND_APART_S = 1e-3                                    # of its beginning and its end from those of the pictures
SOUND_BEHIND_S = 1.0                                    # more of it than of pictures is not even decoded


class NotThisClip(ValueError):
    """A file is not the clip that it should be; the message says in what."""


@dataclass(frozen=True, kw_only=True)
class ClipFile:
    """What decoding a whole MP4 found."""

    frames: int
    width: int
    height: int
    fps: float
    duration_s: float
    has_audio: bool
    audio_start_s: float = 0.0                          # of the sound, by the file's edit list
    audio_s: float = 0.0                                # of it, as the edit list says and as far as it decodes
    metadata: dict[str, str] = field(default_factory=dict)


def coded_size(width: int, height: int) -> tuple[int, int]:
    """Width and height in the file: yuv420p halves its colour planes, so both are rounded up to even."""
    return width + width % 2, height + height % 2


def most_clip_bytes(*, width: int, height: int, frames: int) -> int:
    """More than a clip's file of this shape can have: twice its raw pictures, sound, prompt and index."""
    width, height = coded_size(width, height)
    return min(MAX_CLIP_BYTES, 2**20 + frames * (3 * width * height + 100_000))


def provenance(request: Request) -> dict[str, str]:
    """What the file says about itself: only what decides the pixels, so rows that share a clip share its bytes. Its
    shape is in the file anyway.
    """
    said = {name: f"{value:g}" if isinstance(value, float) else str(value)
            for name, value in request.identity().items() if name not in SIZE}
    return {name: readable(value) for name, value in (said | {"clip_id": request.clip_id}).items()}


def labels(request: Request) -> dict[str, str]:
    """title and description, which players and file managers show."""
    line = " ".join(readable(request.prompt).split())
    title = line if len(line) <= TITLE_CHARACTERS else line[:TITLE_CHARACTERS - 1] + "…"
    settings = ", ".join((request.model, f"seed {request.seed}", *sampling_of(request.sampling), request.precision,
                          f"{request.attention} attention"))
    return {"title": title, "description": f"{readable(request.prompt)}\n{settings}".lstrip("\n")}


def readable(text: str) -> str:
    """The text with every control character as its visible picture (NUL as U+2400): an MP4 value ends at a NUL.

    Tab and newline stay. What UTF-8 cannot hold (half a surrogate pair) becomes U+FFFD.
    """
    pictures = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    pictures |= {0x7F: 0x2421} | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
    return text.translate(pictures)


def append_digest(path: Path) -> None:
    with path.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        file.write(DIGEST_HEAD + digest)                # file_digest has read to the end


def holds_digest(data: bytes) -> bool | None:
    """Whether no byte has changed since the digest was written; None for a file that ends in none."""
    if not data[-DIGEST_BYTES:].startswith(DIGEST_HEAD):
        return None
    return hashlib.sha256(memoryview(data)[:-DIGEST_BYTES]).digest() == data[-32:]


def read_clip(data: bytes | Path, *, wanted: tuple[int, int, int] | None = None,
              look: Callable[[int, av.VideoFrame], None] = lambda index, frame: None) -> ClipFile:
    """Decodes every frame and all sound.  Raises ValueError for a file that is no video or breaks on the way.

    wanted: width, height and frames in the file; one of another size is refused before it is decoded, and one with more
    frames after the first that is too many.  look: gets each frame and its number, from 0.
    """
    try:
        # from an open file, never by a name that FFmpeg could take for a protocol
        with BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file, \
                opened_clip(file, wanted) as container:
            if not container.streams.video:
                raise ValueError("a file with a video stream is needed; got one without")
            video = container.streams.video[0]
            if video.codec_context is None:             # FFmpeg knows of no codec by the name that the file gives
                raise ValueError("a video stream in H.264 is needed; got one in a codec that nobody knows")
            size = video.codec_context.width, video.codec_context.height
            options = {"err_detect": "explode"}         # a damaged frame is an error, not one that is patched up
            if wanted:
                if size != wanted[:2]:
                    raise ValueError(f"{wanted[0]}x{wanted[1]} was wanted; it is {size[0]}x{size[1]}")
                # a stream may change its size on the way; H.264 pads it to blocks
                options["max_pixels"] = str((size[0] + 64) * (size[1] + 64))
            video.codec_context.options = options
            fps = float(video.average_rate or 0)
            sound = sound_of(container)
            frames, audio_s = 0, 0.0
            for frame in container.decode([video, sound] if sound else video):
                if isinstance(frame, av.AudioFrame):
                    audio_s += frame.samples / max(1, frame.sample_rate)
                    if wanted and audio_s > wanted[2] / max(1.0, fps) + SOUND_BEHIND_S:
                        raise ValueError("its sound goes on long after its pictures")
                    continue
                frames += 1
                if wanted and (frames > wanted[2] or (frame.width, frame.height) != size):
                    raise ValueError(f"{wanted[2]} frames of {size[0]}x{size[1]} were wanted; frame {frames} is "
                                     f"{frame.width}x{frame.height}")
                look(frames - 1, frame)
            start_s, listed_s = lasting(sound)
            return ClipFile(frames=frames, width=size[0], height=size[1], fps=fps,
                            duration_s=frames / fps if fps else 0.0, has_audio=audio_s > 0, audio_start_s=start_s,
                            audio_s=min(audio_s, listed_s), metadata=dict(container.metadata))
    except (av.FFmpegError, OverflowError, MemoryError) as error:
        raise ValueError(f"the clip does not decode: {str(error) or type(error).__name__}") from error


def sound_of(container: av.container.InputContainer) -> av.AudioStream | None:
    """A file's track of sound, None where it has none.  Raises ValueError for one that nobody can decode."""
    if not container.streams.audio:
        return None
    sound = container.streams.audio[0]
    if sound.codec_context is None:
        raise ValueError("sound in AAC is needed; got it in a codec that nobody knows")
    sound.codec_context.options = {"err_detect": "explode"}
    return sound


def lasting(sound: av.AudioStream | None) -> tuple[float, float]:
    """Where a track begins and how long it is, in seconds, as its edit list says."""
    if sound is None or sound.time_base is None:
        return 0.0, 0.0
    return float((sound.start_time or 0) * sound.time_base), float((sound.duration or 0) * sound.time_base)


def pictures_of(data: bytes, numbers: Collection[int], *, width: int, height: int, frames: int) -> list[np.ndarray]:
    """These frames of a clip, in the order of `numbers`, uint8 [height, width, 3]; all are decoded, a few are kept.

    width, height: as asked.  Raises ValueError as read_clip.
    """
    kept: dict[int, np.ndarray] = {}

    def look(index: int, frame: av.VideoFrame) -> None:
        if index in numbers:
            rgb = frame.reformat(format="rgb24", src_colorspace=Colorspace.ITU709, src_color_range=ColorRange.MPEG,
                                 dst_color_range=ColorRange.JPEG)
            kept[index] = rgb.to_ndarray()[:height, :width]

    read_clip(data, wanted=(*coded_size(width, height), frames), look=look)
    if absent := [number for number in numbers if number not in kept]:
        raise ValueError(f"the clip has {len(kept)} of the frames that are wanted, and not frame {absent[0]}")
    return [kept[number] for number in numbers]


def opened_clip(file: BinaryIO, wanted: tuple[int, int, int] | None) -> av.container.InputContainer:
    """FFmpeg's view of a file that has passed check_boxes.  Raises ValueError, FFmpegError."""
    try:
        check_boxes(file, frames=wanted[2] if wanted else None, ours=DIGEST_HEAD[8:])
    except BadBoxes as error:
        raise ValueError(f"no clip: an MP4 as dailies writes it is needed, and this is none: {error}") from error
    return av.open(file, format="mp4", options=OPENED, metadata_errors="replace")


def check_file(data: bytes, *, width: int, height: int, frames: int, fps: float | Fraction,
               has_audio: bool | None = None) -> ClipFile:
    """Decodes a clip's file and compares.  width, height: as asked.  has_audio: None where both will do.

    Sound, where there is any, must begin with the pictures and end with them.  Raises NotThisClip.
    """
    coded = coded_size(width, height)
    if holds_digest(data) is False:
        raise NotThisClip("its bytes are not those that its own digest was made of")
    try:
        found = read_clip(data, wanted=(*coded, frames))
    except ValueError as error:
        raise NotThisClip(f"undecodable: {error}") from error
    if found.frames != frames or not abs(found.fps - fps) <= 0.01:      # of a forged row it may be NaN
        raise NotThisClip(f"{found.frames} frames at {found.fps:g} fps, where {frames} at {float(fps):g} fps are "
                          "wanted")
    if has_audio is not None and found.has_audio != has_audio:
        raise NotThisClip(f"{'with' if found.has_audio else 'without'} sound, where a clip "
                          f"{'with' if has_audio else 'without'} sound is wanted")
    apart_s = max(abs(found.audio_start_s), abs(found.audio_start_s + found.audio_s - found.duration_s))
    if found.has_audio and apart_s > SOUND_APART_S:
        raise NotThisClip(f"its sound goes from {found.audio_start_s:.3f} s on for {found.audio_s:.3f} s, where its "
                          f"pictures go from 0 for {found.duration_s:.3f} s")
    # the files of older versions have neither
    if found.metadata.get("description") and holds_digest(data) is None:
        raise NotThisClip("its end is missing")
    return found


def check_clip(data: bytes, request: Request) -> ClipFile:
    """What the file of a request's clip holds: size, frames, rate, and what it says that it was made from.

    Raises NotThisClip.
    """
    shape = request.shape
    found = check_file(data, width=shape.width, height=shape.height, frames=shape.frames, fps=request.fps,
                       has_audio=None if (audio := request.settings.get("audio")) is None else bool(audio))
    differing = [name for name, said in provenance(request).items() if found.metadata.get(name, "") != said]
    if differing:
        raise NotThisClip(f"it says that it was made from another {', '.join(differing)}")
    return found
