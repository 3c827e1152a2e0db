"""The sound of a clip: as long as its pictures, written as AAC, and read back.

AAC begins with 1,024 samples that no one hears and ends on a whole packet; an edit list in the file says which samples
are the sound. FFmpeg's decoder leaves out those before, and gives what is behind in the last packet as silence.
"""

from fractions import Fraction

import av
import numpy as np
import torch
from torch import Tensor

from dailies.model.shapes import VideoShape, frame_rate

BITS_PER_S = 192_000
APART_S = Fraction(1, 4)                # sound ends where pictures do, but for a model's coarse steps
PACKET = 1024                           # samples
# Of what is decoded with what was written. Noise of all pitches has 0.55 at 48 kHz, where the encoder makes its own of
# what is too high to be told apart, and more at lower rates; tones and speech have 0.99.
LEAST_RMS_RATIO = 0.25                  # -12 dB; and no more than its inverse
AUDIBLE = 1e-3                          # of full scale: what is fainter is not compared
# Of one packet, over the loudest of the three around it that were written: noise, tones, sweeps, clicks and what begins
# and ends at once had 1.04 at most, at 16, 24 and 48 kHz.
MOST_BURST, BURST_OVER = 2.0, 0.01


class BadSound(ValueError):
    """The encoded sound, decoded again, is not the sound that it was made from."""


def wanted_samples(shape: VideoShape, fps: float | Fraction, rate: int) -> int:
    """How many samples are as long as a clip's pictures."""
    return round(shape.frames / frame_rate(fps) * rate)


def as_long_as_pictures(audio: Tensor, shape: VideoShape, fps: float | Fraction, rate: int) -> tuple[Tensor, float]:
    """The sound, as long as the pictures: with silence behind it, or cut; and the milliseconds of that silence, below 0
    where it was cut. It is neither stretched nor moved: sound and pictures begin together.

    audio [samples, 2].  Raises ValueError for sound that is far from as long: at another rate it would be heard at
    another pitch.
    """
    wanted = wanted_samples(shape, fps, rate)
    if audio.dim() != 2 or audio.shape[1] != 2 or abs(len(audio) - wanted) > APART_S * rate:
        raise ValueError(f"sound must be [samples, 2] and last as long as the pictures, {wanted / rate:.2f} s; got "
                         f"{list(audio.shape)}, which at {rate} samples per second are {len(audio) / rate:.2f} s. The "
                         "model's card says its audio_rate")
    missing = wanted - len(audio)
    silence = audio.new_zeros(max(0, missing), 2)
    return torch.cat((audio[:wanted], silence)), 1000 * missing / rate


def add_track(container: av.container.OutputContainer, rate: int) -> av.AudioStream:
    """A track of stereo AAC; libraries' versions are not written into it."""
    return container.add_stream("aac", rate=rate, layout="stereo", bit_rate=BITS_PER_S, options={"flags": "+bitexact"})


def audio_frame(audio: Tensor, rate: int) -> av.AudioFrame:
    """audio [samples, 2] in [-1, 1], as the planar float frame that the AAC encoder takes."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(as_written(audio).T), format="fltp", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    return frame


def as_written(audio: Tensor) -> np.ndarray:
    return audio.float().clamp(-1, 1).cpu().numpy()


def heard(container: av.container.InputContainer) -> np.ndarray:
    """What the decoder of an open file gives, [samples, channels].  Raises FFmpegError."""
    return np.concatenate([frame.to_ndarray().T for frame in container.decode(audio=0)])


def correlation(decoded: np.ndarray, audio: Tensor) -> float:
    """Correlation, 0 to 1, of what was decoded with what was written, both [samples, 2]; 1 for what is too faint.

    Raises BadSound for another length or loudness.
    """
    written = as_written(audio)
    if not 0 <= len(decoded) - len(written) < PACKET:
        raise BadSound(f"the encoded sound must have {len(written)} samples, and at most a packet of {PACKET} more; "
                       f"decoded again it has {len(decoded)}")
    decoded = decoded[:len(written)]
    loud, again = (float(np.sqrt(np.square(sound, dtype=np.float64).mean())) for sound in (written, decoded))
    if max(loud, again) < AUDIBLE:
        return 1.0
    if not LEAST_RMS_RATIO <= again / max(loud, 1e-9) <= 1 / LEAST_RMS_RATIO:
        raise BadSound(f"the encoded sound must be as loud as what was encoded, {loud:.4f} of full scale; decoded "
                       f"again it is {again:.4f}")
    if (found := burst(decoded, written)) is not None:
        raise BadSound(f"the encoded sound must be as loud as what was encoded everywhere; decoded again, samples "
                       f"{found * PACKET} to {(found + 1) * PACKET} are a burst that nobody wrote")
    return float(max(0.0, (written * decoded).mean(dtype=np.float64) / (loud * again)))


def burst(decoded: np.ndarray, written: np.ndarray) -> int | None:
    """The packet that is far louder than what was written there and beside it; both [samples, 2]."""
    once, again = (np.sqrt(np.add.reduceat(np.square(sound, dtype=np.float64).mean(1),
                                           np.arange(0, len(sound), PACKET)) / PACKET) for sound in (written, decoded))
    beside = np.pad(once, 1)
    allowed = MOST_BURST * np.maximum.reduce([beside[:-2], once, beside[2:]]) + BURST_OVER
    found = np.flatnonzero(again > allowed)
    return int(found[0]) if len(found) else None
