"""Whether LTX-2's transformer has room on a GPU, known before anything is loaded."""

import math

from dailies.model.files import CheckpointError
from dailies.model.ltx2.card import LtxCard

# of 18.9 billion numbers, by their layers' precision; reckoned from the published sizes, not measured
WEIGHTS_GB = {"fp32": 76.0, "bf16": 38.0, "fp8": 22.0, "int8": 20.0}
SILENT_SHARE = 0.7                                      # of them, where nothing of sound is loaded
GB_PER_TOKEN = 2e-4                                     # of what a forward holds beside: rows of all layers' widths
FURTHER_GB = 1.0                                        # of an upsampler


def needed_gb(card: LtxCard, precision: str) -> float:
    """Of a sampler, for a clip of the model's own size and length: an estimate."""
    shape, _ = card.shape_for()
    tokens = math.prod(card.grid.of(shape)[1:])
    weights = WEIGHTS_GB[precision] * (1.0 if card.sound else SILENT_SHARE)
    return weights + GB_PER_TOKEN * tokens + (FURTHER_GB if card.two_stages else 0.0)


def check_gpu_room(card: LtxCard, precision: str, total_gb: float) -> None:
    """Raises CheckpointError, with the precisions that fit, where the GPU is too small for this one."""
    needed = needed_gb(card, precision)
    if needed <= total_gb:
        return
    fitting = [other for other in card.precisions if needed_gb(card, other) <= total_gb]
    advice = (f"--precision {' or '.join(fitting)} fits" if fitting else "none of its precisions fits: take a larger "
              "GPU")
    raise CheckpointError(f"{card.name} in {precision} takes about {needed:.0f} GB to sample a clip, and the GPU has "
                          f"{total_gb:.0f}; {advice}")
