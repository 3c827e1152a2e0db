"""LTX-2 and LTX-2.3: picture and sound by one transformer, in one stage or in two."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dailies.model.card import Layout, ModelCard
from dailies.model.demo_words import DEMO_WORDS
from dailies.model.shapes import LatentGrid, VideoShape

# as diffusers has it (Apache-2.0), behind the five tags that the vendor's pipelines put in front from 1.2.0 on
LTX2_NEGATIVE_PROMPT = (
    "has_subtitles, has_blurbox, transition from black, transition to black, speech_ending_short, blurry, out of "
    "focus, overexposed, underexposed, low contrast, washed out colors, excessive noise, grainy texture, poor "
    "lighting, flickering, motion blur, distorted proportions, unnatural skin tones, deformed facial features, "
    "asymmetrical face, missing facial features, extra limbs, disfigured hands, wrong hand count, artifacts around "
    "text, inconsistent perspective, camera shake, incorrect depth of field, background too sharp, background "
    "clutter, distracting reflections, harsh shadows, inconsistent lighting direction, color banding, cartoonish "
    "rendering, 3D CGI look, unrealistic materials, uncanny valley effect, incorrect ethnicity, wrong gender, "
    "exaggerated expressions, wrong gaze direction, mismatched lip sync, silent or muted audio, distorted voice, "
    "robotic voice, echo, background noise, off-sync audio, incorrect dialogue, added dialogue, repetitive speech, "
    "jittery movement, awkward pauses, incorrect timing, unnatural transitions, inconsistent framing, tilted "
    "camera, flat lighting, inconsistent tone, cinematic oversaturation, stylized filters, or AI artifacts.")

GEMMA = "gemma-3-12b-it-qat-q4_0-unquantized"
LATENTS_PER_SECOND = 25                                 # of sound
REFINING_STEPS = 3                                      # of the second of two stages
_TERMS = ("LTX-2.x Community License Agreement: free, also commercially, below 10,000,000 USD of annual revenue, and a "
          "model trained on its clips falls under it too; Gemma under Google's Gemma terms, to be accepted on its "
          "page before it can be downloaded")
_GUIDANCE = ("guidance is of the picture, as video_guidance; the sound has its own, audio_guidance, and what is "
             "between them modality_guidance")


@dataclass(frozen=True, kw_only=True)
class LtxCard(ModelCard):
    """A model of the LTX-2 family: Gemma 3 and connectors, one transformer of two streams, two VAEs, a vocoder.

    All but Gemma is one published file, and what parts are made by is in its header; here is what a plan must know.
    """

    family: str = "dailies.model.ltx2.load:LTX2"
    files: tuple[str, ...]                              # either of which is the release: in bf16, in fp8
    upsampler: str | None = None                        # of two stages: what enlarges the first one's latent
    lora: str | None = None                             # that the second stage takes, where it is not distilled
    lora_strength: float = 1.0
    text_folder: str = GEMMA
    encoder_share: float = 0.75                         # Gemma has 12 billion numbers

    duration_s: float = 5.0
    side_step: int = 32                                 # 64 of two stages
    frame_step: int = 8
    max_duration_s: float = 20.0                        # positions that the model was trained with
    takes_image: bool = True
    needs_image: bool = False
    negative_prompt: str = LTX2_NEGATIVE_PROMPT
    guidance_note: str = _GUIDANCE
    as_published: bool = True
    terms: str = _TERMS
    precisions: tuple[str, ...] = ("bf16", "fp32", "int8", "fp8")

    # from noise to clip
    solver: str = "euler"                               # ancestral or res_2s; euler with the fixed sigmas: distilled
    distilled: bool = False                             # to fixed sigmas, without guidance
    stg_blocks: tuple[int, ...] = (29,)
    rescale: float = 0.7
    image_crf: int = 33                                 # an image is compressed so, as the frames of its training were
    sound: bool = True                                  # False: nothing of it is loaded, for runs that want none

    # of the streams
    text_rows: int = 1024                               # of a context, and tokens of a text
    context_widths: tuple[int, int] = (3840, 3840)      # of the connectors, for picture and sound
    channels: int = 128
    audio_channels: int = 8
    audio_bins: int = 16
    dit_width: int = 4096

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The released file beside Gemma's folder as Google publishes it, or as diffusers lays it out."""
        texts = ((self.text_folder, self.text_folder), ("text_encoder", "tokenizer"))
        return tuple(self.layout(file, *text) for text in texts for file in self.files)

    def layout(self, file: str, text_encoder: str, tokenizer: str) -> Layout:
        others = {"connectors": file, "vocoder": file if self.sound else None, "upsampler": self.upsampler,
                  "lora": self.lora}
        return Layout(dits=(file,), vae=file, audio_vae=file if self.sound else None, text_encoder=text_encoder,
                      tokenizer=tokenizer, others={kind: part for kind, part in others.items() if part})

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid(channels=self.channels, time_stride=8, space_stride=32)

    @property
    def width(self) -> int:
        return self.dit_width

    @property
    def text_widths(self) -> Mapping[str, int]:
        return dict(zip(("video", "audio")[:1 + self.sound], self.context_widths, strict=False))

    @property
    def two_stages(self) -> bool:
        return self.upsampler is not None

    @property
    def further_steps(self) -> int:
        return REFINING_STEPS if self.two_stages else 0

    def stream_shapes(self, shape: VideoShape) -> dict[str, tuple[int, ...]]:
        """The sound has 25 latents a second, rounded half to even, as the release rounds them."""
        sound = self.audio_channels, round(shape.frames / float(self.fps) * LATENTS_PER_SECOND), self.audio_bins
        return {"video": self.grid.of(shape), **({"audio": sound} if self.sound else {})}

    def image_grid(self, shape: VideoShape) -> tuple[int, ...]:
        """One latent step, which becomes the clip's first."""
        return 1, *self.grid.of(shape)[2:]

    def size_for_image(self, resolution: str, height: int, width: int) -> tuple[int, int]:
        """The size that was asked for: the image is cropped to its aspect, as the release's pipelines do."""
        return self.size_for(resolution)

    def frames_for(self, duration_s: float | None = None, frames: int | None = None) -> tuple[int, str | None]:
        """As every card, but a count that is not 8n + 1 is refused: sound is timed by it."""
        found, note = super().frames_for(duration_s, frames)
        if frames is not None and found != frames:
            most = int(self.fps * self.max_duration_s) + 1
            near = [count for count in (found, found + self.grid.time_stride) if count <= most]
            raise ValueError(f"frames must be {self.grid.time_stride}n + 1 for {self.name} (nearest: "
                             f"{' or '.join(map(str, near))}); got {frames}")
        return found, note

    def without_sound(self) -> "LtxCard":
        return replace(self, sound=False)


_SIZES = {"512p": (512, 768), "704p": (704, 1280), "1088p": (1088, 1920)}
_GUIDED = {"audio": True, "video_guidance": 3.0, "audio_guidance": 7.0, "modality_guidance": 3.0, "stg": 1.0}
_UNGUIDED: dict[str, Any] = dict(
    distilled=True, num_steps=8, min_steps=8, max_steps=8, guidance=0.0, max_guidance=0.0, settings={"audio": True},
    negative_prompt="", negative_unused="negative prompt not used: guidance is distilled into this model",
    guidance_note="")


def _sources(repository: str, *files: str, or_fp8: str = "") -> dict[str, tuple[str, ...]]:
    """or_fp8: a file of the repository of 2.3's fp8 files that takes the place of the first."""
    gemma = f"all of it (24 GB) as {GEMMA}/, once its terms are accepted there"
    in_fp8 = {f"{repository}-fp8": (f"{or_fp8} (29 GB) in place of the first",)} if or_fp8 else {}
    return {repository: files, **in_fp8, f"google/{GEMMA}": (gemma,)}


_LTX2, _LTX23 = "Lightricks/LTX-2", "Lightricks/LTX-2.3"
_UPSAMPLER = "ltx-2-spatial-upscaler-x2-1.0.safetensors"
_UPSAMPLER_23 = "ltx-2.3-spatial-upscaler-x2-1.1.safetensors"
_LORA = "ltx-2-19b-distilled-lora-384.safetensors"
_LORA_23 = "ltx-2.3-22b-distilled-lora-384-1.1.safetensors"
_DEV = "ltx-2-19b-dev.safetensors (43 GB) or ltx-2-19b-dev-fp8.safetensors (27 GB)"
_DISTILLED = "ltx-2-19b-distilled.safetensors (43 GB) or ltx-2-19b-distilled-fp8.safetensors (27 GB)"
_DEV_23, _DEV_FP8_23 = "ltx-2.3-22b-dev.safetensors", "ltx-2.3-22b-dev-fp8.safetensors"
_DISTILLED_23, _DISTILLED_FP8_23 = "ltx-2.3-22b-distilled-1.1.safetensors", "ltx-2.3-22b-distilled-fp8.safetensors"
_FIRST_DISTILLED_23 = "ltx-2.3-22b-distilled.safetensors"
_FETCHED_DISTILLED_23 = f"{_DISTILLED_23} (46 GB) or the earlier {_FIRST_DISTILLED_23} (46 GB)"

LTX2_19B = LtxCard(
    name="ltx-2-19b",
    description="LTX-2, 19 billion parameters, text or an image to video with sound, up to 1920x1088 and 20 s",
    files=("ltx-2-19b-dev.safetensors", "ltx-2-19b-dev-fp8.safetensors"),
    sources=_sources(_LTX2, _DEV),
    resolutions=_SIZES,
    resolution="512p",
    max_pixels=1088 * 1920,
    num_steps=40,
    guidance=3.0,
    settings=_GUIDED,
    audio_rate=24_000,
    memory_gb={"encode": 31, "sample": 46, "publish": 16},
)

LTX2_19B_DISTILLED = replace(
    LTX2_19B, **_UNGUIDED,
    name="ltx-2-19b-distilled",
    description="LTX-2 distilled to 8 steps, text or an image to video with sound, up to 1920x1088 and 20 s",
    files=("ltx-2-19b-distilled.safetensors", "ltx-2-19b-distilled-fp8.safetensors"),
    sources=_sources(_LTX2, _DISTILLED),
)

_TWO_STAGES: dict[str, Any] = dict(
    upsampler=_UPSAMPLER, side_step=64, resolution="1024p", max_pixels=1088 * 1920,
    resolutions={"704p": (704, 1280), "1024p": (1024, 1536), "1088p": (1088, 1920)})

LTX2_19B_TWO_STAGE = replace(
    LTX2_19B, **_TWO_STAGES,
    name="ltx-2-19b-two-stage",
    description="LTX-2 at half size, then enlarged and refined in 3 more steps, with sound, at 1536x1024",
    lora=_LORA,
    precisions=("bf16", "fp32", "fp8"),                 # a LoRA is not added to INT8
    sources=_sources(_LTX2, _DEV, f"{_UPSAMPLER} (1 GB)", f"{_LORA} (8 GB)"),
    memory_gb={"encode": 31, "sample": 58, "publish": 16},
)

LTX2_19B_DISTILLED_TWO_STAGE = replace(
    LTX2_19B_DISTILLED, **_TWO_STAGES,
    name="ltx-2-19b-distilled-two-stage",
    description="LTX-2 distilled to 8 steps at half size and 3 at full size, with sound, at 1536x1024",
    sources=_sources(_LTX2, _DISTILLED, f"{_UPSAMPLER} (1 GB)"),
    memory_gb={"encode": 31, "sample": 50, "publish": 16},
)

_OF_23: dict[str, Any] = dict(context_widths=(4096, 2048), stg_blocks=(28,), audio_rate=48_000)

LTX23 = replace(
    LTX2_19B, **_OF_23,
    name="ltx-2.3",
    description="LTX-2.3, 22 billion parameters, text or an image to video with sound, up to 1920x1088 and 20 s",
    files=(_DEV_23, _DEV_FP8_23),
    sources=_sources(_LTX23, f"{_DEV_23} (46 GB)", or_fp8=_DEV_FP8_23),
    num_steps=30,
    memory_gb={"encode": 34, "sample": 46, "publish": 16},
)

LTX23_DISTILLED = replace(
    LTX2_19B_DISTILLED, **_OF_23,
    name="ltx-2.3-distilled",
    description="LTX-2.3 distilled to 8 steps, text or an image to video with sound, up to 1920x1088 and 20 s",
    files=(_DISTILLED_23, _FIRST_DISTILLED_23, _DISTILLED_FP8_23),
    sources=_sources(_LTX23, _FETCHED_DISTILLED_23, or_fp8=_DISTILLED_FP8_23),
    memory_gb=LTX23.memory_gb,
)

LTX23_TWO_STAGE = replace(
    LTX23, **{**_TWO_STAGES, "upsampler": _UPSAMPLER_23},
    name="ltx-2.3-two-stage",
    description="LTX-2.3 at half size, then enlarged and refined in 3 more steps, with sound, at 1536x1024",
    lora=_LORA_23,
    precisions=("bf16", "fp32", "fp8"),
    sources=_sources(_LTX23, f"{_DEV_23} (46 GB)", f"{_UPSAMPLER_23} (1 GB)", f"{_LORA_23} (8 GB)",
                     or_fp8=_DEV_FP8_23),
    memory_gb={"encode": 34, "sample": 58, "publish": 16},
)

LTX23_DISTILLED_TWO_STAGE = replace(
    LTX23_DISTILLED, **{**_TWO_STAGES, "upsampler": _UPSAMPLER_23},
    name="ltx-2.3-distilled-two-stage",
    description="LTX-2.3 distilled to 8 steps at half size and 3 at full size, with sound, at 1536x1024",
    sources=_sources(_LTX23, _FETCHED_DISTILLED_23, f"{_UPSAMPLER_23} (1 GB)", or_fp8=_DISTILLED_FP8_23),
    memory_gb={"encode": 34, "sample": 50, "publish": 16},
)

# LTX-2.3's architecture small, with weights of our own: jobs/demo/train_av.py trains it. Without memory_gb, as room.py
# reckons by the published sizes alone: it has room on every GPU.
DEMO_AV = LtxCard(
    name="demo-av",
    description="the LTX-2.3 architecture, small, trained on drawn shapes whose touch is heard; runs on a CPU",
    folder=Path(__file__).parents[1] / "demo_av",
    files=("demo-av.safetensors",),
    text_folder="gemma",
    encoder_share=0.25,
    terms="",
    takes_image=False,
    precisions=("fp32", "bf16", "int8"),
    resolutions={"64p": (64, 64)},
    resolution="64p",
    min_side=64,
    max_pixels=64 * 64,
    duration_s=2.0,
    max_duration_s=2.0,
    audio_rate=24_000,
    num_steps=24,
    guidance=3.0,
    negative_prompt="",
    settings={"audio": True, "video_guidance": 3.0, "audio_guidance": 3.0, "modality_guidance": 1.0, "stg": 0.0},
    stg_blocks=(3,),
    rescale=0.0,
    text_rows=40,
    context_widths=(128, 64),
    channels=32,
    audio_channels=2,
    dit_width=128,
    words=DEMO_WORDS,
    taught="drawn shapes that move to the border of a plain background and back, and ring as they touch it",
)
