"""Where and how the parts of a model compute."""

from dataclasses import dataclass

from dailies.model.shapes import VideoShape

EVERY_PRECISION = ("fp32", "bf16", "int8", "fp8")       # a card has some of them
EVERY_ATTENTION = ("dense", "sage", "sparse")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What plan and machine have settled, all of it said: `ModelCard.runtime` fills in the model's own."""

    device: str                                         # as torch names it
    precision: str                                      # one of EVERY_PRECISION
    attention: str                                      # one of EVERY_ATTENTION
    decode_precision: str                               # of the VAE: fp32 or bf16
    threads: int = 1                                    # torch's, for the whole process; they count in the last bits
    compiled: bool = False                              # the transformer, at the first clip of each shape
    graphs: bool | None = None                          # its forward is recorded (graphs.py); None: where it can be
    largest: VideoShape | None = None                   # of the clips to come; None: as large as who says nothing gets
