"""Looks at a clip's frames and sound before they are encoded: what nobody would want to look at is not published.

Every limit is far from what a person may have asked for: a dark scene, a still picture, a strobe now and then all pass.
What is measured goes into the ledger (quality.*) for all clips; a night's own limits can be drawn from it afterwards.

Measured on the 24 clips of examples/prompts.parquet and four still or dark prompts with the demo model, 0 to 255:
contrast 12 to 75, motion 1.3 to 4.8, flicker 0 to 0.5, and no two frames of any clip were equal.
"""

from dataclasses import replace

import numpy as np
from torch import Tensor

from dailies.actors.messages import Failure, Frames

# Levels of 0 to 255. A decoder's rounding makes 1 or 2, and 16 is where video's black begins.
BLACKEST = 16                           # black: but for a thousandth, no sample of any frame is above this
FLATTEST = 1.0                          # flat: no channel's standard deviation over the whole clip is above this
FLICKER = 16.0                          # flicker: half of all frames are this far off both neighbours, to one side
STRAY_SHARE = 1e-3

QUIETEST = 1e-4                         # silent: but for STRAY_SHARE, -80 dB, below the last bit of 13
LOUDEST, CLIPPED_SHARE = 0.999, 0.05    # clipped: a twentieth of the samples at full scale; loud music has a thousandth
HIGHEST_DC = 0.1                        # dc: the mean of a channel is this far from 0; recordings and music have 0.01

FRAMES_LOOKED_AT = 4096                 # pixels of a frame, evenly spread; a frozen clip is looked at whole

REJECTED = "Rejected"


class Gate:
    """Frames in; the same with their measures out, or a Failure of type Rejected that says why."""

    def __call__(self, batch: list[Frames]) -> list[Frames | Failure]:
        return [self.look(frames) for frames in batch]

    def look(self, frames: Frames) -> Frames | Failure:
        verdict, reason, measures = judge(frames)
        quality: dict[str, float | str] = {"verdict": verdict, **measures}
        if verdict == "ok":
            return replace(frames, quality=quality)
        return Failure(request=frames.request, stage="publish", error_type=REJECTED, error=f"{verdict}: {reason}",
                       quality=quality, about_row=True)


def judge(frames: Frames) -> tuple[str, str, dict[str, float]]:
    """ok, size, black, flat, frozen, flicker, no audio, silent, clipped, dc or nan; why; what was measured."""
    shape = frames.request.shape
    wanted, got = [shape.frames, shape.height, shape.width, 3], list(frames.rgb.shape)
    if got != wanted:
        return "size", f"frames must be {wanted}, as the request says; got {got}", {}
    step = max(1, int((shape.height * shape.width / FRAMES_LOOKED_AT) ** 0.5))
    rgb = np.ascontiguousarray(frames.rgb[:, ::step, ::step].cpu().numpy())
    levels = rgb.mean((1, 2), dtype=np.float32)                                        # [frames, 3]
    measures = {
        "brightness": float(levels.mean()), "contrast": contrast(rgb, levels.mean(0)),
        "motion": float(np.abs(np.diff(rgb.astype(np.int16), axis=0)).mean()) if len(rgb) > 1 else 0.0,
        "flicker": flicker(levels.mean(1))}
    if np.count_nonzero(rgb > BLACKEST) <= STRAY_SHARE * rgb.size:
        most = f"{100 * (1 - STRAY_SHARE):g} %"
        return "black", f"every frame is black: {most} of it is at most {BLACKEST} of 255", measures
    if measures["contrast"] < FLATTEST:
        colour = levels.mean(0).round().astype(int).tolist()
        return "flat", f"one colour, {colour}, from the first frame to the last", measures
    if len(rgb) > 1 and all(bool((frame == frames.rgb[0]).all()) for frame in frames.rgb[1:]):
        return "frozen", f"all {len(rgb)} frames are equal in every pixel, which no still scene is", measures
    if measures["flicker"] > FLICKER:
        return "flicker", f"half of the frames differ from both neighbours by {measures['flicker']:.0f}", measures
    if frames.audio is None:
        if frames.request.settings.get("audio") is True:
            return "no audio", "its row asks for sound, and none was made", measures
        return "ok", "", measures
    verdict, reason, of_sound = judge_sound(frames.audio)
    return verdict, reason, measures | of_sound


def judge_sound(audio: Tensor) -> tuple[str, str, dict[str, float]]:
    """ok, silent, clipped, dc or nan; why; what was measured.

    audio [samples, 2] as it was made: the silence that makes it as long as the pictures is no part of it.
    """
    sound = audio.float().cpu().numpy()
    if not np.isfinite(sound).all():
        return "nan", "NaN or infinity in its sound", {}
    size = np.abs(sound)
    means = sound.mean(0, dtype=np.float64) if len(sound) else np.zeros(2)
    measures = {"audio_peak": float(size.max(initial=0.0)), "audio_dc": float(np.abs(means).max(initial=0.0)),
                "audio_clipped": float((size >= LOUDEST).mean()) if size.size else 0.0,
                "audio_rms": float(np.sqrt(np.square(sound, dtype=np.float64).mean())) if size.size else 0.0}
    if (heard := np.count_nonzero(size >= QUIETEST)) <= STRAY_SHARE * size.size:
        which = f"no more than {heard} of {size.size:,} samples" if heard else "no sample"
        return "silent", f"{which} of its sound {'are' if heard else 'is'} above {QUIETEST:g} of 1", measures
    if np.abs(sound - means).max() < QUIETEST:
        return "silent", f"its sound is one level, {measures['audio_dc']:.3f} of 1, from beginning to end", measures
    if measures["audio_clipped"] > CLIPPED_SHARE:
        return "clipped", f"{100 * measures['audio_clipped']:.0f} % of its sound is at full scale", measures
    if measures["audio_dc"] > HIGHEST_DC:
        off = measures["audio_dc"]
        return "dc", f"its sound is {off:.2f} of 1 off the middle, which it must swing around", measures
    return "ok", "", measures


def contrast(rgb: np.ndarray, means: np.ndarray) -> float:
    """The largest standard deviation of a channel, over all frames."""
    apart = rgb.reshape(-1, 3) - means
    return float(np.sqrt(np.einsum("ij,ij->j", apart, apart) / len(apart)).max())


def flicker(levels: np.ndarray) -> float:
    """How far a frame stands out from both its neighbours, the median of all.  levels: mean brightness of each."""
    if len(levels) < 3:
        return 0.0
    before, after = levels[1:-1] - levels[:-2], levels[1:-1] - levels[2:]
    return float(np.median(np.where(before * after > 0, np.minimum(np.abs(before), np.abs(after)), 0.0)))
