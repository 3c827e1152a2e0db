"""How much of what a prompt says the demo model shows: prompts it never saw, rendered, and read back by the checker.

python -m dailies.jobs.demo.evaluate --model demo --precision int8 --prompts 200
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dailies.actors.decoder import Decoder
from dailies.actors.denoiser import Denoiser
from dailies.actors.messages import Frames, Request
from dailies.actors.text_encoder import TextEncoder
from dailies.jobs.demo.checker import Track, follow, read_attributes
from dailies.jobs.demo.world import ATTRIBUTES, unseen
from dailies.model.card import ModelCard
from dailies.model.catalog import CATALOG, DEMO

STRAY_PX = 2.0


def render_prompts(prompts: list[str], card: ModelCard, weights: Path, device: str, *, num_steps: int | None = None,
                   guidance: float | None = None, duration_s: float | None = None, precision: str | None = None,
                   attention: str = "dense") -> Iterator[Frames]:
    """Frames for each prompt, through the actors a night uses."""
    shape, _ = card.shape_for(duration_s=duration_s)
    on = card.runtime(device, precision, attention)
    encode, sample, decode = (actor(card, weights, on) for actor in (TextEncoder, Denoiser, Decoder))
    for i, prompt in enumerate(prompts):
        request = Request(clip_id=f"{i:064x}", model=card.name, weights_fingerprint="", prompt=prompt,
                          negative_prompt=card.negative_prompt, seed=1000 + i, shape=shape, fps=card.fps,
                          num_steps=num_steps or card.num_steps, precision=on.precision, attention=attention,
                          guidance=card.guidance if guidance is None else guidance, settings=card.settings)
        yield from decode(sample(encode([request])))


def evaluate(count: int = 200, *, weights: Path | None = None, device: str = "cpu", num_steps: int | None = None,
             guidance: float | None = None, precision: str | None = None, attention: str = "dense",
             card: ModelCard = DEMO, keep: list[torch.Tensor] | None = None) -> dict:
    """Shares of right attributes, in all, by attribute, for seen and held-out combinations; CPU seconds per 2 s clip;
    and what is seen of the shape frame by frame (`by_frame`).

    keep: is given the frames of every clip.
    """
    cases = unseen(count)
    right = {name: 0 for name in ATTRIBUTES}
    by_kind = {False: [0, 0], True: [0, 0]}
    wrong, tracks, began = [], [], time.process_time()
    frames = render_prompts([sentence for _, sentence in cases], card, weights or card.folder, device,
                            num_steps=num_steps, guidance=guidance, precision=precision, attention=attention)
    for (scene, sentence), shown in zip(cases, frames, strict=True):
        seen = read_attributes(shown.rgb)
        tracks.append((follow(shown.rgb, scene.shape), scene.color))
        if keep is not None:
            keep.append(shown.rgb)
        missed = {name: seen[name] for name, value in scene.attributes.items() if seen[name] != value}
        for name in ATTRIBUTES:
            right[name] += name not in missed
        by_kind[scene.held_out][0] += len(ATTRIBUTES) - len(missed)
        by_kind[scene.held_out][1] += len(ATTRIBUTES)
        if missed:
            wrong.append({"prompt": sentence, "shown": missed})
    return {"prompts": count, "attributes_right": sum(right.values()) / (count * len(ATTRIBUTES)),
            "by_attribute": {name: hits / count for name, hits in right.items()},
            "held_out_combinations": by_kind[True][0] / max(1, by_kind[True][1]),
            "seen_combinations": by_kind[False][0] / max(1, by_kind[False][1]),
            **by_frame(tracks), "cpu_s_per_clip": (time.process_time() - began) / count, "wrong": wrong}


def by_frame(tracks: list[tuple[Track, str]]) -> dict[str, float]:
    """Of all frames of all clips: shares with the right colour and within STRAY_PX of a straight path; the median IoU
    with the shape that was asked for, its mean in the first and in the last quarter, and that of one by the other.

    tracks: what was followed, and the colour that was asked for.
    """
    iou = torch.stack([track.iou for track, _ in tracks])                                       # [clips, frames]
    quarter = max(1, iou.shape[1] // 4)
    first, last = iou[:, :quarter].mean().item(), iou[:, -quarter:].mean().item()
    right = sum(seen == color for track, color in tracks for seen in track.colors)
    strayed = torch.stack([track.strayed for track, _ in tracks])
    return {"frames_of_right_color": right / iou.numel(), "frames_in_place": (strayed < STRAY_PX).float().mean().item(),
            "iou_median": iou.median().item(), "iou_first_quarter": first, "iou_last_quarter": last,
            "iou_last_by_first": last / max(first, 1e-6)}


def psnr(clips: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Of uint8 frames, in dB over all of them together."""
    errors = [(got.float() - want.float()).square().mean() for got, want in zip(clips, wanted, strict=True)]
    return (10 * torch.log10(255 ** 2 / torch.stack(errors).mean())).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO.name,
                        choices=[card.name for card in CATALOG.values() if card.folder == DEMO.folder])
    parser.add_argument("--weights", type=Path, default=DEMO.folder, help="a folder laid out as model/demo, whole")
    parser.add_argument("--precision", default="fp32", choices=DEMO.precisions, help="of the DiT's products")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    card = CATALOG[args.model]
    figures = evaluate(args.prompts, weights=args.weights, device=args.device, card=card, guidance=args.guidance,
                       precision=args.precision, attention=card.attentions[0])
    print(json.dumps(dict(model=card.name, precision=args.precision) | figures, indent=2))


if __name__ == "__main__":
    main()
