"""How well the demo with sound hears what it shows: prompts it never saw, rendered, seen and listened to.

python -m dailies.jobs.demo.evaluate_av --prompts 100
python -m dailies.jobs.demo.evaluate_av --codecs build/demo-av --prompts 100

A clip's tone must begin within 60 ms of the moment at which its own shape, as it is shown, turns at the border; its
pitch is that of the colour that was asked for. With --codecs the world's own clips are coded and decoded by what is
trained in a folder of `train_av`: no sampler can do better.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dailies.jobs.demo import codecs_av
from dailies.jobs.demo.checker import follow, read_attributes
from dailies.jobs.demo.ear import color_heard, onset_s, size_heard, turn_s
from dailies.jobs.demo.evaluate import render_prompts
from dailies.jobs.demo.phases import is_trained
from dailies.jobs.demo.world_av import AUDIO_RATE, Bounce, unseen_bounces
from dailies.model.card import ModelCard
from dailies.model.ltx2.audio_vae import log_mel
from dailies.model.ltx2.card import DEMO_AV

TOLERANCE_S = 0.06
SEEN = ("shape", "color", "background", "size")         # what pictures tell of a scene that turns


def judged_clip(scene: Bounce, rgb: Tensor, sound: Tensor | None, rate: int) -> dict[str, Any]:
    """What is right of a clip, and how far the onset is from the turn, in seconds; None where nothing is heard.

    rgb uint8 [frames, 64, 64, 3].  sound [samples, 2]; None is silence.
    """
    seen = read_attributes(rgb)
    turn = turn_s(follow(rgb, scene.shape).centres, scene.direction)
    heard = None if sound is None else onset_s(sound, rate)
    late = None if heard is None else heard - turn
    return {"late_s": late, "onset": late is not None and abs(late) <= TOLERANCE_S,
            "pitch": sound is not None and color_heard(sound, rate) == scene.color,
            "loudness": sound is not None and size_heard(sound) == scene.size,
            **{name: seen[name] == getattr(scene, name) for name in SEEN}}


def shares(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all clips: shares of what is right, and quartiles of how late the tones are."""
    late = sorted(verdict["late_s"] for verdict in verdicts if verdict["late_s"] is not None)
    quarters = [round(late[round(share * (len(late) - 1))], 3) for share in (0.25, 0.5, 0.75)] if late else None
    return {"clips": len(verdicts), "silent": len(verdicts) - len(late), "late_s_quartiles": quarters,
            **{name: round(sum(bool(verdict[name]) for verdict in verdicts) / len(verdicts), 3)
               for name in ("onset", "pitch", "loudness", *SEEN)}}


def evaluated(cases: Iterable[tuple[Bounce, Tensor, Tensor | None]], rate: int) -> dict[str, Any]:
    return shares([judged_clip(scene, rgb, sound, rate) for scene, rgb, sound in cases])


@torch.inference_mode()
def through_codecs(work: Path, scenes: Iterable[Bounce], device: str) -> Iterator[tuple[Bounce, Tensor, Tensor]]:
    """Scenes, and their pictures and sound as they come back; pictures as they are drawn while the video VAE is not
    trained.  Raises FileNotFoundError where the audio VAE and the vocoder are not.
    """
    for phase in (codecs_av.AUDIO_PHASE, codecs_av.VOCODER_PHASE):
        if not is_trained(phase, work):
            raise FileNotFoundError(f"{work} must have {phase.name}.pt with all its {phase.steps:,} steps: "
                                    f"python -m dailies.jobs.demo.train_av --work {work} --only audio")
    with torch.inference_mode(False):
        audio = codecs_av.train_audio_vae(work, device)
        vocoder = codecs_av.train_vocoder(work, device, audio)
        video = codecs_av.train_video_vae(work, device) if is_trained(codecs_av.VIDEO_PHASE, work) else None
    for scene in scenes:
        pictures = scene.pictures()[0][None].to(device)
        if video is not None:
            pictures = video.decode(video.encode(pictures)).clamp(-1, 1)
        rgb = ((pictures[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()
        rung = scene.sound(scene.samples(rate := codecs_av.AUDIO.sample_rate), rate)[None].to(device)
        latent = audio.encode(log_mel(rung, codecs_av.AUDIO))
        yield scene, rgb, vocoder(audio.decode(latent[:, :, :codecs_av.SOUND_STEPS]))[0].T.cpu()


def evaluate_sound(count: int = 100, *, weights: Path | None = None, device: str = "cpu", num_steps: int | None = None,
                   guidance: float | None = None, precision: str = "fp32", card: ModelCard = DEMO_AV) -> dict[str, Any]:
    """What `shares` says of so many unseen prompts, rendered as a night renders them, and CPU seconds a clip."""
    scenes, began = unseen_bounces(count), time.process_time()
    frames = render_prompts([sentence for _, sentence in scenes], card, weights or card.folder, device,
                            num_steps=num_steps, guidance=guidance, precision=precision, attention=card.attentions[0])
    cases = ((scene, shown.rgb, shown.audio) for (scene, _), shown in zip(scenes, frames, strict=True))
    said = evaluated(cases, card.audio_rate)
    return said | {"cpu_s_per_clip": round((time.process_time() - began) / count, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a model that train_av has written; by default what is shipped")
    parser.add_argument("--codecs", type=Path, help="a folder of train_av: no model, what is trained there")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float, help="of the picture")
    parser.add_argument("--precision", default="fp32", choices=DEMO_AV.precisions)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.codecs:
        scenes = [scene for scene, _ in unseen_bounces(args.prompts)]
        said = evaluated(through_codecs(args.codecs, scenes, args.device), AUDIO_RATE)
    else:
        said = evaluate_sound(args.prompts, weights=args.weights, device=args.device, num_steps=args.steps,
                              guidance=args.guidance, precision=args.precision)
    print(json.dumps(dict(model=DEMO_AV.name) | said, indent=2))


if __name__ == "__main__":
    main()
