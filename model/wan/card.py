"""Wan 2.1 and 2.2, and what TurboDiffusion distilled of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dailies.model.card import Layout, ModelCard, too_narrow
from dailies.model.shapes import VideoShape
from dailies.model.wan.config import ClipVisionConfig, WanConfig, WanVAEConfig

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")

# as transformers names the fields; the original file says nothing of itself
UMT5_XXL = dict(model_type="umt5", vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
                feed_forward_proj="gated-gelu")


@dataclass(frozen=True, kw_only=True)
class WanCard(ModelCard):
    """A model of the Wan 2.1 and 2.2 family: umT5 text encoder, one or two WanDiT, Wan VAE, CLIP for 2.1's images.

    The VAE is Linum's: pixels in and out are in [-1, 1], cut off there. Only the statistics of its latents differ, and
    here they are constants of the family.
    """

    family: str = "dailies.model.wan.load:WAN"
    fps: float = 16.0
    duration_s: float = 5.0
    side_step: int = 16                                 # the transformer pads nothing
    frame_step: int = 4                                 # quarters of a second
    guidance: float = 5.0                               # of the high-noise expert, where there are two
    negative_prompt: str = WAN_NEGATIVE_PROMPT

    # from noise to video
    solver: str = "unipc"                               # dpm++, or rcm, of a model that was distilled: without guidance
    sigma_max: float = 80.0                             # of rcm: noise to signal where the first step begins
    shift: float = 5.0
    small_shift: tuple[int, float] | None = None        # a clip of at most so many pixels: its shift
    boundary: int | None = None                         # timestep from which on the high-noise expert runs, of two
    low_noise_guidance: float = 1.0                     # of the low-noise expert, as a share of guidance

    smooth_images: bool = False                         # resize bilinear and antialiased, not bicubic and unsmoothed

    text_encoder_fields: Mapping[str, Any] = field(default_factory=lambda: UMT5_XXL)
    clip_fields: Mapping[str, Any] | None = None        # of the image encoder; None: this model has none

    # of the normalised latents, (latent - mean) / std; mean and log-variance as the VAE gives them
    latent_mean: tuple[float, ...] = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                                      0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
    latent_std: tuple[float, ...] = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                                     3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Diffusers', and the original one, whose .pth files `dailies convert` has made safetensors."""
        two, clip = self.boundary is not None, self.clip_fields is not None
        weights = "diffusion_pytorch_model.safetensors"
        return (
            Layout(dits=tuple(f"{folder}/{weights}" for folder in ("transformer", "transformer_2")[:1 + two]),
                   vae=f"vae/{weights}", text_encoder="text_encoder", tokenizer="tokenizer",
                   image_encoder="image_encoder/model.safetensors" if clip else None),
            Layout(dits=(f"high_noise_model/{weights}", f"low_noise_model/{weights}") if two else (weights,),
                   vae="Wan2.1_VAE.safetensors", text_encoder="models_t5_umt5-xxl-enc-bf16.safetensors",
                   tokenizer="google/umt5-xxl",
                   image_encoder="models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors" if clip else None),
        )

    @property
    def dit_config(self) -> WanConfig:
        return WanConfig(**self.dit_fields)

    @property
    def vae_config(self) -> WanVAEConfig:
        return WanVAEConfig(**self.vae_fields)

    @property
    def clip_config(self) -> ClipVisionConfig:
        return ClipVisionConfig(**(self.clip_fields or {}))

    @property
    def width(self) -> int:
        return self.dit_config.width

    @property
    def text_widths(self) -> Mapping[str, int]:
        return {"video": self.dit_config.text_dim}

    @property
    def num_experts(self) -> int:
        return 1 if self.boundary is None else 2

    def expert_at(self, timestep: float) -> int:
        """Which expert runs: 0, the only one or that for high noise, or 1."""
        return 0 if self.boundary is None or timestep >= self.boundary else 1

    def shift_for(self, shape: VideoShape) -> float:
        if self.small_shift is not None and shape.height * shape.width <= self.small_shift[0]:
            return self.small_shift[1]
        return self.shift

    def vae_precision(self, precision: str) -> str:
        """fp32 whatever the precision of the rest, as the releases run it."""
        return "fp32"


TURBO_ATTENTION = (
    "attention is sparse in bf16; the release's default is SageSLA, which --attention sage is here, with INT8 queries "
    "and keys as there, and values in bf16 where the release has FP8")
TURBO_SIZES = (
    "a named size is an area in the image's aspect, as with the release's --adaptive_resolution; without that option "
    "the release stretches every image to 16:9. WIDTHxHEIGHT is cropped to, never stretched")


@dataclass(frozen=True, kw_only=True)
class TurboCard(WanCard):
    """A Wan model that TurboDiffusion distilled to a few steps without guidance and tuned for sparse attention.

    Its transformers alone were published; text encoder, tokenizer and VAE are those of Wan 2.1.
    """

    family: str = "dailies.model.wan.load:TURBO"
    release: str                                        # of the file, {} standing for high or low where there are two
    solver: str = "rcm"
    num_steps: int = 4
    max_steps: int = 4
    guidance: float = 0.0                               # distilled in: there is none to choose
    max_guidance: float = 0.0
    negative_prompt: str = ""
    negative_unused: str = "negative prompt not used: guidance is distilled into this model"
    smooth_images: bool = True
    attentions: tuple[str, ...] = ("sparse", "sage")
    keep_ratio: float = 0.1
    tuned_for_sparse: bool = True
    differs: tuple[str, ...] = (TURBO_ATTENTION,)

    def size_for_image(self, resolution: str, height: int, width: int) -> tuple[int, int]:
        """As the release's --adaptive_resolution: the area of a named size in the image's aspect, each side rounded to
        a multiple of 16; so there may be a few pixels more than in the named size.
        """
        if resolution not in self.resolutions:
            return self.size_for(resolution)
        area, step = math.prod(self.resolutions[resolution]), self.side_step
        sides = [step * round(math.sqrt(area * side / other) / step)
                 for side, other in ((height, width), (width, height))]
        if min(sides) < self.min_side:
            raise too_narrow(self, resolution, height, width, sides)
        return sides[0], sides[1]

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The released file or the -quant one, beside the parts of Wan in either of its layouts."""
        two = self.boundary is not None
        diffusers, original = super().layouts
        names = [self.release.format(expert) for expert in ("high", "low")[:1 + two]]
        return tuple(replace(base, dits=tuple(f"{name}{quant}.safetensors" for name in names))
                     for base in (original, diffusers) for quant in ("", "-quant"))

    def vae_precision(self, precision: str) -> str:
        """bf16 unless all is fp32: TurboDiffusion does not run it in fp32 as Wan does."""
        return ModelCard.vae_precision(self, precision)


WAN_14B = dict(width=5120, heads=40, layers=40, ffn=13824)
_WAN_SIZES = {"480p": (480, 832), "720p": (720, 1280)}

WAN21_T2V_1_3B = WanCard(
    name="wan2.1-t2v-1.3b",
    description="Wan 2.1, 1.4 billion parameters, text to video at 832x480, up to 5 s",
    repo_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    least_gb=14.5,
    resolutions={"480p": (480, 832)},
    resolution="480p",
    max_pixels=480 * 832,
    memory_gb={"encode": 13, "sample": 8, "publish": 10},
)

WAN21_T2V_14B = WanCard(
    name="wan2.1-t2v-14b",
    description="Wan 2.1, 14 billion parameters, text to video at 832x480 or 1280x720, up to 5 s",
    repo_id="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    least_gb=40.2,
    resolutions=_WAN_SIZES,
    resolution="720p",
    max_pixels=720 * 1280,
    dit_fields=WAN_14B,
    memory_gb={"encode": 13, "sample": 42, "publish": 16},
)

WAN21_I2V_14B = replace(
    WAN21_T2V_14B,
    name="wan2.1-i2v-14b",
    description="Wan 2.1, 16 billion parameters, image to video at 832x480, up to 5 s (its 720p weights: --weights)",
    repo_id="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    least_gb=45.7,
    resolution="480p",
    takes_image=True,
    negative_prompt="镜头晃动，" + WAN_NEGATIVE_PROMPT,
    num_steps=40,
    small_shift=(480 * 832, 3.0),
    dit_fields=WAN_14B | dict(condition_channels=20, image_dim=1280),
    clip_fields={},
    memory_gb={"encode": 24, "sample": 46, "publish": 16},
)

WAN22_T2V_A14B = replace(
    WAN21_T2V_14B,
    name="wan2.2-t2v-a14b",
    description="Wan 2.2, two experts of 14 billion parameters, text to video at 832x480 or 1280x720, up to 5 s",
    repo_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    least_gb=68.8,
    num_steps=40,
    shift=12.0,
    guidance=4.0,
    low_noise_guidance=0.75,                            # 3.0
    guidance_note="guidance is of the expert for high noise, and that for low noise has 0.75 of it, as in the "
                  "release's own 4 and 3; its command line gives one number to both",
    boundary=875,
    clips_per_turn=4,
)

WAN22_I2V_A14B = replace(
    WAN22_T2V_A14B,
    name="wan2.2-i2v-a14b",
    description="Wan 2.2, two experts of 14 billion parameters, image to video at 832x480 or 1280x720, up to 5 s",
    repo_id="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    least_gb=68.8,
    takes_image=True,
    shift=5.0,
    guidance=3.5,
    low_noise_guidance=1.0,
    guidance_note="",
    boundary=900,
    dit_fields=WAN_14B | dict(condition_channels=20),
    memory_gb={"encode": 22, "sample": 42, "publish": 16},
)


def turbo_sources(repository: str, *files: str) -> dict[str, tuple[str, ...]]:
    """Where the transformers of a turbo model are published, and where the rest of it."""
    return {f"TurboDiffusion/{repository}": files,
            "Wan-AI/Wan2.1-T2V-1.3B": ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/")}


TURBO_WAN21_T2V_1_3B = TurboCard(
    name="turbo-wan2.1-t2v-1.3b-480p",
    description="Wan 2.1 1.3B by TurboDiffusion: 1 to 4 steps, sparse attention, text to video at 832x480 or 640x640, "
                "up to 5 s",
    release="TurboWan2.1-T2V-1.3B-480P",
    sources=turbo_sources("TurboWan2.1-T2V-1.3B-480P", "TurboWan2.1-T2V-1.3B-480P.pth or -quant.pth"),
    resolutions={"480p": (480, 832)},
    resolution="480p",
    max_pixels=640 * 640,                               # published too, and a little more than 832x480
    memory_gb=WAN21_T2V_1_3B.memory_gb,
)

TURBO_WAN21_T2V_14B_480P = replace(
    TURBO_WAN21_T2V_1_3B,
    name="turbo-wan2.1-t2v-14b-480p",
    description="Wan 2.1 14B by TurboDiffusion: 1 to 4 steps, sparse attention, text to video at 832x480 or 640x640, "
                "up to 5 s",
    release="TurboWan2.1-T2V-14B-480P",
    sources=turbo_sources("TurboWan2.1-T2V-14B-480P", "TurboWan2.1-T2V-14B-480P.pth or -quant.pth"),
    dit_fields=WAN_14B,
    memory_gb=WAN21_T2V_14B.memory_gb,
)

TURBO_WAN21_T2V_14B_720P = replace(
    TURBO_WAN21_T2V_14B_480P,
    name="turbo-wan2.1-t2v-14b-720p",
    description="Wan 2.1 14B by TurboDiffusion: 1 to 4 steps, sparse attention, text to video at 1280x720, up to 5 s",
    release="TurboWan2.1-T2V-14B-720P",
    sources=turbo_sources("TurboWan2.1-T2V-14B-720P", "TurboWan2.1-T2V-14B-720P.pth or -quant.pth"),
    resolutions=_WAN_SIZES,
    resolution="720p",
    max_pixels=720 * 1280,
)

TURBO_WAN22_I2V_A14B = replace(
    TURBO_WAN21_T2V_14B_720P,
    name="turbo-wan2.2-i2v-a14b-720p",
    description="Wan 2.2 A14B by TurboDiffusion: 1 to 4 steps, sparse attention, image to video at 1280x720, up to 5 s",
    release="TurboWan2.2-I2V-A14B-{}-720P",
    sources=turbo_sources("TurboWan2.2-I2V-A14B-720P", "TurboWan2.2-I2V-A14B-high-720P.pth or -quant.pth",
                          "TurboWan2.2-I2V-A14B-low-720P.pth or -quant.pth"),
    takes_image=True,
    differs=(TURBO_ATTENTION, TURBO_SIZES),
    sigma_max=200.0,
    boundary=900,
    clips_per_turn=4,
    dit_fields=WAN22_I2V_A14B.dit_fields,
    memory_gb=WAN22_I2V_A14B.memory_gb,
)
