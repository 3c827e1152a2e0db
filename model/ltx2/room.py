"""What of LTX-2's weights stays on a GPU, and what comes from host memory in turn; known before anything is loaded."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dailies.model.files import CheckpointError
from dailies.model.shapes import VideoShape

if TYPE_CHECKING:
    from dailies.model.ltx2.card import LtxCard

# reckoned from the published sizes, not measured: of 18.9 billion numbers, by the precision of the blocks' layers
WEIGHTS_GB = {"fp32": 76.0, "bf16": 38.0, "fp8": 22.0, "int8": 20.0}
OUTSIDE_GB = {"fp32": 1.8, "bf16": 0.9, "fp8": 0.9, "int8": 0.9}        # of these, what is in no block
BLOCKS = 48
SILENT_SHARE = 0.7                                      # of them, where nothing of sound is loaded
GB_PER_TOKEN = 2e-4                                     # of what a forward holds beside: rows of all layers' widths
FURTHER_GB = 1.0                                        # of an upsampler
GEMMA_GB = {"fp32": 43.0, "bf16": 21.6, "fp8": 21.6, "int8": 10.8}      # without its table, which is in host memory
GEMMA_LAYERS, GEMMA_WHOLE_GB = 48, 24.0
GPU_SHARE = 0.75                                        # of a GPU, for sampler or encoder; a decoder is beside either
WAITING_SHARE = 0.9                                     # of the machine's memory, for weights that wait in it
IN_TURN = 2                                             # layers: the one that computes, and the next


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Layers whose weights stay on the device; the others' come in turn (model/offload.py). None: all stay."""

    blocks: int | None = None                           # of the transformer
    gemma: int | None = None                            # of the text encoder
    notes: tuple[str, ...] = ()                         # for a person


@dataclass(frozen=True, kw_only=True)
class LayeredPart:
    """A model that computes layer by layer, in GB."""

    name: str
    layers: int
    each: float                                         # on average
    largest: float
    beside: float                                       # that a GPU must have whatever stays

    @property
    def whole(self) -> float:
        return self.layers * self.each + self.beside

    def resident(self, room: float) -> int | None:
        """Layers that stay within so much; None: all.  Below 0 where not even two in turn have room."""
        if self.whole <= room:
            return None
        return math.floor((room - self.beside - IN_TURN * self.largest) / self.each)

    def waiting(self, resident: int | None) -> float:
        """GB in host memory."""
        return 0.0 if resident is None else (self.layers - resident) * self.each


def sampler_part(card: "LtxCard", precision: str, largest: VideoShape | None = None) -> LayeredPart:
    """largest: of the clips to come; None: of the model's own size and length."""
    shape = largest or card.shape_for()[0]
    share, outside = 1.0 if card.sound else SILENT_SHARE, OUTSIDE_GB[precision]
    each, widest = (share * (WEIGHTS_GB[kind] - OUTSIDE_GB[kind]) / BLOCKS
                    for kind in (precision, "bf16" if precision == "fp8" else precision))    # a few of its blocks are
    beside = share * outside + GB_PER_TOKEN * math.prod(card.grid.of(shape)[1:])
    return LayeredPart(name="transformer", layers=BLOCKS, each=each, largest=widest,
                       beside=beside + (FURTHER_GB if card.two_stages else 0.0))


def encoder_part(card: "LtxCard", precision: str) -> LayeredPart:
    """Gemma; beside it the connectors, and what a text becomes."""
    each = GEMMA_GB[precision] / GEMMA_LAYERS
    return LayeredPart(name="text encoder", layers=GEMMA_LAYERS, each=each, largest=each,
                       beside=card.memory_gb["encode"] - GEMMA_WHOLE_GB)


def placed_on(card: "LtxCard", precision: str, gpu_gb: float, host_gb: float = math.inf,
              largest: VideoShape | None = None) -> Placed:
    """gpu_gb, host_gb: of all there is on the GPU, and in the machine.  largest: of the clips to come.

    Raises CheckpointError where the GPU is too small, or the machine.
    """
    parts = sampler_part(card, precision, largest), encoder_part(card, precision)
    blocks, gemma = (part.resident(GPU_SHARE * gpu_gb) for part in parts)
    for part, resident in zip(parts, (blocks, gemma), strict=True):
        if resident is not None and resident < 0:
            raise CheckpointError(too_small(card, precision, part, gpu_gb, largest))
    waiting = [part.waiting(resident) for part, resident in zip(parts, (blocks, gemma), strict=True)]
    if max(waiting) > WAITING_SHARE * host_gb:
        raise CheckpointError(f"{card.name} in {precision} keeps {max(waiting):.0f} GB of weights in host memory, "
                              f"since the GPU has {gpu_gb:.0f} GB, and this machine has {host_gb:.0f}; "
                              + (fitting(card, gpu_gb, largest) or "take a larger GPU, or more memory"))
    notes = tuple(note_of(part, resident, gpu_gb) for part, resident in zip(parts, (blocks, gemma), strict=True)
                  if resident is not None)
    if blocks is not None and (advice := fitting(card, gpu_gb, largest)):
        notes += (advice,)
    return Placed(blocks=blocks, gemma=gemma, notes=notes)


def note_of(part: LayeredPart, resident: int, gpu_gb: float) -> str:
    return (f"{resident} of the {part.layers} layers of the {part.name} stay on the GPU, which has {gpu_gb:.0f} GB; "
            f"the weights of the others, {part.waiting(resident):.0f} GB, wait in host memory and are copied in turn: "
            "the same clips, later")


def fitting(card: "LtxCard", gpu_gb: float, largest: VideoShape | None) -> str:
    """Advice: precisions in which all of the transformer's layers have room; empty where none is."""
    found = [precision for precision in card.precisions
             if sampler_part(card, precision, largest).whole <= GPU_SHARE * gpu_gb]
    return f"--precision {' or '.join(found)} has room for all of the transformer's layers there" if found else ""


def too_small(card: "LtxCard", precision: str, part: LayeredPart, gpu_gb: float, largest: VideoShape | None) -> str:
    sampled = largest is not None and part.name == "transformer"
    return (f"{card.name} in {precision}: its {part.name} takes about {part.beside + IN_TURN * part.largest:.0f} GB "
            f"with all layers but two in host memory{f', for a clip of {largest}' * sampled}, and the GPU has "
            f"{gpu_gb:.0f}, of which {GPU_SHARE:.0%} can be its own; take a larger GPU"
            + ", or ask for smaller or shorter clips" * sampled)
