"""The whole runs of LTX-2's release: their files as a card has them, their recorded noise as a sampler asks for it."""

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import torch

from dailies.model.catalog import CATALOG
from dailies.model.ltx2.sampler import as_latent, corner_of
from dailies.model.shapes import VideoShape

WEIGHTS = "weights.safetensors"


def card_of(golden, **changes):
    """The card of the case's release at the case's sizes, and its files by their names there."""
    said, config = golden.config, golden.config["transformer"]
    guided = "negative" in "".join(golden.inputs)
    of_20 = said["layout"] == "2.0"
    two_stages = (golden.folder / "weights_upsampler.safetensors").is_file()
    name = "ltx-2-19b" if of_20 else "ltx-2.3"
    contexts = tuple(golden.outputs[f"{stream}_context.positive"].shape[-1] for stream in ("video", "audio"))
    guide = said["generation"].get("video_guidance")
    card = CATALOG[name if guided else f"{name}-distilled"]
    lora = "weights_distilled_lora.safetensors"
    return replace(
        card, name="golden", files=(WEIGHTS,), folder=golden.folder, channels=config["in_channels"],
        fps=Fraction(said["generation"]["fps"]), text_rows=128, context_widths=contexts, min_side=32,
        audio_rate=said["rate"], upsampler="weights_upsampler.safetensors" if two_stages else None,
        lora=lora if (golden.folder / lora).is_file() else None,
        **(dict(stg_blocks=tuple(guide["stg_blocks"]), rescale=guide["rescale_scale"]) if guide else {}), **changes)


def shape_of(golden):
    said = golden.config["generation"]
    return VideoShape(frames=said["frames"], height=said["height"], width=said["width"])


def request_of(golden, card):
    said = golden.config["generation"]
    guides = {name: said.get(f"{name}_guidance") for name in ("video", "audio")}
    settings = {"audio": True}
    if guides["video"]:
        settings |= {"stg": guides["video"]["stg_scale"], "modality_guidance": guides["video"]["modality_scale"],
                     "audio_guidance": guides["audio"]["cfg_scale"]}
    return SimpleNamespace(clip_id="golden", shape=shape_of(golden), num_steps=said.get("steps", 8), settings=settings,
                           guidance=guides["video"]["cfg_scale"] if guides["video"] else 0.0)


def told_of(golden, card, image=()):
    """What the release's connectors made of its prompts."""
    texts = [{stream: golden.outputs[f"{stream}_context.{side}"][0] for stream in ("video", "audio")}
             if f"video_context.{side}" in golden.outputs else {} for side in ("positive", "negative")]
    return SimpleNamespace(request=request_of(golden, card), prompt=texts[0], negative=texts[1], image=image)


def draws_of(golden, card):
    """The recorded noise. Of two stages the first's is the corner of a larger one."""
    shapes = card.stream_shapes(shape_of(golden))

    def recorded(before, stream, shape):
        return as_latent(golden.inputs[f"{before}noise_{stream}"], torch.empty(shape))

    def draw(number):
        if not card.two_stages or number:
            before = "stage2." if card.two_stages else ""
            return [{stream: recorded(before, stream, shape) for stream, shape in shapes.items()}]
        large = torch.zeros(shapes["video"])
        small = corner_of(large).shape
        large[:, :, :small[2], :small[3]] = recorded("stage1.", "video", small)
        return [{"video": large, "audio": recorded("stage1.", "audio", shapes["audio"])}]
    return draw
