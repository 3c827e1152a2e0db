"""The models by name: what each renders by default and at most, which files it is made of, and how it is built.

Importing this costs nothing heavy; torch and transformers come in when a card builds a model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.shapes import LatentGrid, VideoShape

if TYPE_CHECKING:
    from torch import Tensor

    from model.linum import LinumConfig, LinumDiT
    from model.text import T5TextEncoder
    from model.wan_vae import WanVAE, WanVAEConfig


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One model of the Linum v2 family: T5 text encoder, LinumDiT, Wan VAE; plain values, so a card can be pickled."""

    name: str
    description: str

    # where the weights are: under a folder in the published layout
    dit_file: str
    vae_file: str = "vae/vae.safetensors"
    text_encoder_folder: str = "t5/text_encoder"
    tokenizer_folder: str = "t5/tokenizer"
    repo_id: str | None = None                          # on the Hugging Face hub
    folder: Path | None = None                          # weights that come with dailies

    # what a row may ask for, and what it gets when it does not say
    fps: float = 24.0
    resolutions: Mapping[str, tuple[int, int]]          # name -> (height, width)
    resolution: str
    duration_s: float = 2.0
    num_steps: int = 50
    guidance: float = 10.0
    negative_prompt: str = ""
    min_side: int = 128                                 # pixels
    max_pixels: int                                     # height * width
    max_duration_s: float = 5.0
    max_steps: int = 1000
    max_guidance: float = 100.0
    precisions: tuple[str, ...] = ("bf16", "fp32")
    attentions: tuple[str, ...] = ("dense",)

    # the course of sampling
    guider: str = "apg"                                 # apg, or cfg for plain classifier-free guidance
    apg_momentum: float = -0.75
    apg_max_norm: float = 20.0
    apg_parallel: float = 0.0
    shift: float = 3.0
    pair_guidance: bool = False                         # run prompt and negative prompt as one batch of two
    decode_chunk: int | None = 1                        # latent steps decoded at a time; None is the whole clip

    # fields that differ from the released sizes
    dit_fields: Mapping[str, Any] = field(default_factory=dict)
    vae_fields: Mapping[str, Any] = field(default_factory=dict)

    # stage -> peak on a GPU in bf16 at max_pixels and 5 s; estimates
    memory_gb: Mapping[str, float] = field(default_factory=dict)

    @property
    def dit_config(self) -> "LinumConfig":
        from model.linum import LinumConfig
        return LinumConfig(**self.dit_fields)

    @property
    def vae_config(self) -> "WanVAEConfig":
        from model.wan_vae import WanVAEConfig
        return WanVAEConfig(**self.vae_fields)

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid()

    def precision_on(self, device: str) -> str:
        """What runs when nobody says: fp32 on a CPU, where it is exact; bf16 on a GPU, as the release runs."""
        return "fp32" if device.startswith("cpu") else "bf16"

    def shape_for(self, resolution: str | tuple[int, int] | None = None, duration_s: float | None = None,
                  frames: int | None = None) -> tuple[VideoShape, str | None]:
        """The shape to render, and a note when it is not quite what was asked for.

        resolution: a name in `resolutions`, "WIDTHxHEIGHT" or (width, height).  Give duration_s or frames or neither.
        Raises ValueError, saying what is allowed.
        """
        height, width = self.size_for(resolution if resolution is not None else self.resolution)
        frames, note = self.frames_for(duration_s, frames)
        return VideoShape(frames=frames, height=height, width=width), note

    def size_for(self, resolution: str | tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels.  Raises ValueError, saying what is allowed."""
        if isinstance(resolution, str):
            if resolution in self.resolutions:
                return self.resolutions[resolution]
            width, _, height = resolution.lower().partition("x")
            # isdecimal alone would let other scripts' digits and very long numbers through
            if not all(side.isascii() and side.isdecimal() and len(side) <= 5 for side in (width, height)):
                raise ValueError(f"resolution must be {', '.join(self.resolutions)} or WIDTHxHEIGHT for {self.name}; "
                                 f"got {resolution!r}")
            resolution = int(width), int(height)
        width, height = resolution
        stride = self.grid.space_stride
        for side, name in ((width, "width"), (height, "height")):
            if side < self.min_side or side % stride:
                nearest = max(math.ceil(self.min_side / stride), round(side / stride)) * stride
                raise ValueError(f"{name} must be a multiple of {stride} and at least {self.min_side} for {self.name}; "
                                 f"got {side} (nearest: {nearest})")
        if width * height > self.max_pixels:
            raise ValueError(f"width x height must be at most {self.max_pixels} pixels for {self.name}; "
                             f"got {width}x{height} = {width * height}")
        return height, width

    def frames_for(self, duration_s: float | None = None, frames: int | None = None) -> tuple[int, str | None]:
        """Frame count and a note when it was rounded.  Raises ValueError, saying what is allowed.

        A duration goes down to whole seconds, as in the release, and gives fps * seconds + 1 frames; a frame count goes
        down to 4n + 1.
        """
        most = int(self.fps * self.max_duration_s) + 1
        if frames is not None and duration_s is not None:
            raise ValueError(f"give duration_s or frames, not both; got {duration_s} and {frames}")
        if frames is not None:
            if not 1 <= frames <= most:
                raise ValueError(f"frames must be 1 to {most} for {self.name}; got {frames}")
            whole = self.grid.nearest_frames(frames)
            return whole, None if whole == frames else f"{frames} frames rounded down to {whole}"
        duration_s = self.duration_s if duration_s is None else duration_s
        if not 1 <= duration_s <= self.max_duration_s:                  # false for NaN too
            raise ValueError(f"duration_s must be 1 to {self.max_duration_s:g} for {self.name}; got {duration_s:g}")
        seconds = int(self.fps * duration_s) // int(self.fps)
        frames = int(self.fps) * seconds + 1
        if seconds == duration_s:
            return frames, None
        return frames, f"{duration_s:g} s rounded down to {seconds} s ({frames} frames)"

    def text_encoder(self, weights: Path, device: str, precision: str | None = None) -> "T5TextEncoder":
        """The text encoder, loaded.  Raises CheckpointError."""
        from model.text import T5TextEncoder
        return T5TextEncoder(weights / self.text_encoder_folder, weights / self.tokenizer_folder, device,
                             name=self.name, precision=precision or self.precision_on(device),
                             max_tokens=self.dit_config.text_len, width=self.dit_config.text_dim)

    def dit(self, weights: Path, device: str, precision: str | None = None) -> "LinumDiT":
        """The diffusion transformer, loaded, in eval mode.  Raises CheckpointError."""
        from model import checkpoint, keys
        from model.linum import LinumDiT
        return checkpoint.build(lambda: LinumDiT(self.dit_config), weights / self.dit_file, keys.LINUM,
                                name=self.name, device=device, precision=precision or self.precision_on(device))

    def vae(self, weights: Path, device: str, precision: str | None = None) -> "WanVAE":
        """The VAE, loaded, in eval mode; either published key layout.  Raises CheckpointError."""
        from model import checkpoint, keys
        from model.wan_vae import WanVAE, channels_last
        vae = checkpoint.build(lambda: WanVAE(self.vae_config), weights / self.vae_file,
                               keys.WAN_VAE, keys.WAN_VAE_DIFFUSERS,
                               name=self.name, device=device, precision=precision or self.precision_on(device))
        return channels_last(vae) if device.startswith("cpu") else vae

    def latent_statistics(self, weights: Path) -> tuple["Tensor", "Tensor"]:
        """scale and bias, each [C] fp32: normalised latent = latent * scale + bias.  Raises CheckpointError."""
        from model import checkpoint
        scale, bias = checkpoint.read(weights / self.dit_file, ("video_data_scale", "video_data_bias"), name=self.name)
        return scale.float(), bias.float()


LINUM_V2_360P = ModelCard(
    name="linum-v2-360p",
    description="Linum v2, 2 billion parameters, text to video at 640x360, 1 to 5 s",
    repo_id="Linum-AI/linum-v2-360p",
    dit_file="dit/360p.safetensors",
    resolutions={"360p": (360, 640)},
    resolution="360p",
    max_pixels=360 * 640,
    memory_gb={"encode": 11, "sample": 12, "publish": 8},
)

LINUM_V2_720P = ModelCard(
    name="linum-v2-720p",
    description="Linum v2, 2 billion parameters, text to video at 1280x720, 1 to 5 s",
    repo_id="Linum-AI/linum-v2-720p",
    dit_file="dit/720p.safetensors",
    resolutions={"720p": (720, 1280)},
    resolution="720p",
    max_pixels=720 * 1280,
    memory_gb={"encode": 11, "sample": 24, "publish": 20},
)

DEMO = ModelCard(
    name="demo",
    description="the Linum v2 architecture, small, trained on drawn clips of moving shapes; runs on a CPU",
    folder=Path(__file__).parent / "demo",
    dit_file="dit/demo.safetensors",
    resolutions={"64p": (64, 64)},
    resolution="64p",
    min_side=32,
    max_pixels=128 * 128,
    num_steps=20,
    guidance=3.0,
    guider="cfg",
    pair_guidance=True,
    decode_chunk=None,
    dit_fields=dict(width=192, heads=3, layers=6, ffn=768, text_dim=128, text_len=40),
    vae_fields=dict(width=16, res_blocks=1),
    memory_gb={"encode": 1, "sample": 1, "publish": 1},
)

CATALOG: dict[str, ModelCard] = {card.name: card for card in (DEMO, LINUM_V2_360P, LINUM_V2_720P)}
