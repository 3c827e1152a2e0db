"""Linum v2's models, and the demo: the same architecture, small."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dailies.model.card import Layout, ModelCard
from dailies.model.demo_words import DEMO_WORDS
from dailies.model.linum.config import LinumConfig
from dailies.model.wan.config import WanVAEConfig


@dataclass(frozen=True, kw_only=True)
class LinumCard(ModelCard):
    """A model of the Linum v2 family: T5 text encoder, LinumDiT, Wan VAE. Its latent statistics lie beside the DiT."""

    family: str = "dailies.model.linum.load:LINUM"
    dit_file: str
    vae_file: str = "vae/vae.safetensors"
    text_encoder_folder: str = "t5/text_encoder"
    tokenizer_folder: str = "t5/tokenizer"
    frame_step: int = 24                                # whole seconds, as in the release
    guidance: float = 10.0

    # from noise to video
    solver: str = "euler"                               # or rcm, of a model that was distilled: without guidance
    sigma_max: float = 80.0                             # of rcm: noise to signal where the first step begins
    guider: str = "apg"                                 # apg, or cfg for plain classifier-free guidance
    apg_momentum: float = -0.75
    apg_max_norm: float = 20.0
    apg_parallel: float = 0.0
    shift: float = 3.0
    pair_guidance: bool = False                         # run prompt and negative prompt as one batch of two

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return Layout(dits=(self.dit_file,), vae=self.vae_file, text_encoder=self.text_encoder_folder,
                      tokenizer=self.tokenizer_folder),

    @property
    def dit_config(self) -> LinumConfig:
        return LinumConfig(**self.dit_fields)

    @property
    def vae_config(self) -> WanVAEConfig:
        return WanVAEConfig(**self.vae_fields)

    @property
    def width(self) -> int:
        return self.dit_config.width

    @property
    def text_widths(self) -> Mapping[str, int]:
        return {"video": self.dit_config.text_dim}


@dataclass(frozen=True, kw_only=True)
class StudentCard(LinumCard):
    """A model of the Linum family that was distilled to a few steps without guidance."""

    solver: str = "rcm"
    num_steps: int = 4
    max_steps: int = 4
    guidance: float = 0.0                               # distilled in: there is none to choose
    max_guidance: float = 0.0
    negative_unused: str = "negative prompt not used: guidance is distilled into this model"


LINUM_V2_360P = LinumCard(
    name="linum-v2-360p",
    description="Linum v2, 2 billion parameters, text to video at 640x360, 1 to 5 s",
    repo_id="Linum-AI/linum-v2-360p",
    least_gb=13.8,
    dit_file="dit/360p.safetensors",
    resolutions={"360p": (360, 640)},
    resolution="360p",
    max_pixels=360 * 640,
    memory_gb={"encode": 11, "sample": 12, "publish": 8},
)

LINUM_V2_720P = LinumCard(
    name="linum-v2-720p",
    description="Linum v2, 2 billion parameters, text to video at 1280x720, 1 to 5 s",
    repo_id="Linum-AI/linum-v2-720p",
    least_gb=13.8,
    dit_file="dit/720p.safetensors",
    resolutions={"720p": (720, 1280)},
    resolution="720p",
    max_pixels=720 * 1280,
    memory_gb={"encode": 11, "sample": 24, "publish": 20},
)

DEMO = LinumCard(
    name="demo",
    description="the Linum v2 architecture, small, trained on drawn clips of moving shapes; runs on a CPU",
    folder=Path(__file__).parents[1] / "demo",
    dit_file="dit/demo.safetensors",
    resolutions={"64p": (64, 64)},
    resolution="64p",
    min_side=32,
    max_pixels=128 * 128,
    num_steps=24,
    guidance=4.0,
    guider="cfg",
    pair_guidance=True,
    sparse_blocks=(16, 16),                             # a latent step is 16 tokens, and a clip has 208 of them
    dit_fields=dict(width=192, heads=3, layers=6, ffn=768, text_dim=128, text_len=40),
    vae_fields=dict(width=16, res_blocks=1),
    memory_gb={"encode": 1, "sample": 1, "publish": 1},
    words=DEMO_WORDS,
    taught="drawn shapes that move on a plain background",
)

# the two that jobs/demo/distill.py makes of it, beside its folder; they have its text encoder and VAE
DEMO_TURBO = StudentCard(
    name="demo-turbo",
    description="the demo model in one to four steps: a student, distilled from it",
    dit_file="../demo_turbo/dit.safetensors",
    **{name: getattr(DEMO, name) for name in ("folder", "resolutions", "resolution", "min_side", "max_pixels",
                                              "sparse_blocks", "dit_fields", "vae_fields", "memory_gb", "words",
                                              "taught")},
)

DEMO_SPARSE = replace(
    DEMO,
    name="demo-sparse",
    description="the demo model, tuned for sparse attention",
    dit_file="../demo_sparse/dit.safetensors",
    attentions=("sparse", "sage"),
    tuned_for_sparse=True,
)
