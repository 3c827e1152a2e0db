"""Trains the demo model from nothing, on clips that `dailies.jobs.demo.world` draws: tokenizer, text encoder, VAE, DiT,
in this order.

`torchrun --nproc-per-node 2 -m dailies.jobs.demo.train --work build/demo` takes some hours on 2 CPU cores, a process
for each; `python -m` does in one process. Every batch is a function of (seed, phase, step) and of how many processes
share it, progress is saved once a minute, and the same command continues after an interruption.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.jobs.demo.distill import distill, tune_sparse
from dailies.jobs.demo.learning import convolutions_for_learning, learn_compiled, plain_attention
from dailies.jobs.demo.losses import KL_WEIGHT, autoencode, divergence, halved, noised, save_released, weighted_errors
from dailies.jobs.demo.phases import (
    BATCHES,
    CLIP_FRAMES,
    CLIPS_MOSTLY,
    DIT_CLIPS,
    DIT_IMAGES,
    SEED,
    UNPROMPTED,
    Phase,
    encode_scenes,
    fit,
    rng_of,
)
from dailies.jobs.demo.together import alone, noise_for, process_number, share_of, training_together
from dailies.jobs.demo.world import ATTRIBUTE_WORDS, ATTRIBUTES, SIDE, Scene, sentence_about
from dailies.model import checkpoint
from dailies.model.catalog import CATALOG
from dailies.model.convolution import channels_last
from dailies.model.linum import keys as linum_keys
from dailies.model.linum.transformer import LinumDiT
from dailies.model.text import new_t5
from dailies.model.tokenizer import Tokenizer, new_tokenizer
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.vae import WanVAE

CARD = CATALOG["demo"]
VAE = CARD.vae_config


# The VAE: images first, then images and clips, then clips as long as the demo's longest.

VAE_PHASE = Phase(name="vae", steps=2700, lr=2.5e-3, ema=0.995)
IMAGES_FIRST, SHORT_UNTIL = 500, 1400                   # steps before the first clip, and before the first longer one
# The convolutions in time reach about 18 latent steps back: after short clips alone, later frames fall apart.
REFERENCE_ELEMENTS = 4 * 3 * 9 * SIDE * SIDE            # what every summed loss is divided by, image or clip
IMAGE_WEIGHT = 1.5

WHOLE_CLIPS_PHASE = Phase(name="vae-whole-clips", steps=4000, lr=2e-3, ema=0.998)
CROP = 32                                               # pixels a side: a quarter of the work, most of the shape
CROPS_AT_ONCE, IMAGES_AT_ONCE = 4, 32                   # about the work of one clip that is seen whole
SQUARES = 4                                             # what a squared error counts beside the absolute one


def train_vae(work: Path, device: str) -> WanVAE:
    torch.manual_seed(SEED)
    vae = channels_last(WanVAE(VAE)).to(device)
    # little noise at first, or the decoder learns to ignore the latent
    with torch.no_grad():
        vae.to_moments.weight[VAE.latent_channels:] = 0
        vae.to_moments.bias[VAE.latent_channels:] = -4.0

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = rng_of("vae", step)
        still = step < IMAGES_FIRST or step % 4 == 0
        clips, frames = (16, 1) if still else (5, 9) if step < SHORT_UNTIL else (1, 49) if step % 4 == 2 else (2, 25)
        drawn = [Scene.draw(rng).render(frames, start=rng.randint(0, CLIP_FRAMES - frames), total=CLIP_FRAMES)
                 for _ in range(clips)]
        errors, kl, seen = coded_errors(vae, drawn, rng, device, squares=1)
        # from the start it would erase the latent
        kl_weight = KL_WEIGHT * min(1.0, max(0.0, step / IMAGES_FIRST - 0.5))
        return errors.sum() / REFERENCE_ELEMENTS * (IMAGE_WEIGHT if still else 1) + kl_weight * kl, seen

    fit(VAE_PHASE, vae, loss_of, work)
    return train_vae_on_whole_clips(work, vae, device)


def train_vae_on_whole_clips(work: Path, vae: WanVAE, device: str) -> WanVAE:
    """Every frame of a clip, so that the last are learnt like the first; of most clips the part where the shape is."""

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = rng_of(WHOLE_CLIPS_PHASE.name, step)
        if step % 16 == 0:
            drawn = [Scene.draw(rng).render(1, start=rng.randrange(CLIP_FRAMES), total=CLIP_FRAMES)
                     for _ in range(IMAGES_AT_ONCE)]
        elif step % 4 == 0:
            drawn = [Scene.draw(rng).render(CLIP_FRAMES)]
        else:
            drawn = [around_shape(*Scene.draw(rng).render(CLIP_FRAMES), rng) for _ in range(CROPS_AT_ONCE)]
        errors, kl, seen = coded_errors(vae, drawn, rng, device, squares=SQUARES)
        return errors.mean() + KL_WEIGHT * kl, seen

    with convolutions_for_learning(vae, "inductor" if device == "cpu" else None):
        fit(WHOLE_CLIPS_PHASE, vae, loss_of, work)
    return vae


def around_shape(video: Tensor, coverage: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
    """CROP pixels a side of a clip and its coverage, with the middle about where the shape is in one of its frames."""
    shown = coverage[rng.randrange(len(coverage))]
    corner = [round((shown.sum(dim=1 - side) @ torch.arange(SIDE).float() / shown.sum()).item()) - CROP // 2
              + rng.randint(-6, 6) for side in (0, 1)]
    top, left = (min(max(0, at), SIDE - CROP) for at in corner)
    return (video[..., top:top + CROP, left:left + CROP], coverage[..., top:top + CROP, left:left + CROP])


def coded_errors(vae: WanVAE, drawn: list[tuple[Tensor, Tensor]], rng: random.Random, device: str,
                 squares: float) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Weighted errors of the pixels of clips that are coded and decoded, the divergence of their latents, and figures
    to watch."""
    video = torch.stack([v for v, _ in drawn]).to(device, memory_format=torch.channels_last_3d)
    coverage = torch.stack([c for _, c in drawn]).to(device)
    clips, _, frames, height, width = video.shape
    noise = torch.randn(clips, VAE.latent_channels, (frames - 1) // 4 + 1, height // 8, width // 8,
                        generator=torch.Generator().manual_seed(rng.getrandbits(62))).to(device)
    with torch.autocast(device, torch.bfloat16):
        decoded, mean, log_variance = autoencode(vae, video, noise)
    error = decoded.float() - video
    kl = divergence(mean, log_variance)
    with torch.no_grad():
        inside, late = coverage > 0.5, -max(1, frames // 4)
        squared = error.square()
        seen = dict(frames=frames, side=width, psnr=mean_psnr(squared),
                    shape_psnr=mean_psnr(squared.mean(dim=1)[inside]),
                    late_psnr=mean_psnr(squared.mean(dim=1)[:, late:][inside[:, late:]]), kl=kl.item(),
                    std=mean.std().item())
    return weighted_errors(error, coverage, squares=squares), kl, seen


def mean_psnr(squared: Tensor) -> float:
    """Of squared errors of pixels in [-1, 1]; NaN of none."""
    return 10 * torch.log10(4 / squared.mean()).item()


# The text encoder: learns to say a scene's attributes from a sentence about it. The heads are thrown away.

TEXT_PHASE = Phase(name="text", steps=400, lr=2e-3)
TEXT_BATCH = 96


def train_tokenizer(folder: Path) -> None:
    """A byte-pair tokenizer of at most 384 pieces over sentences about the world, in the T5 manner: pad 0, end 1,
    unknown 2."""
    rng = rng_of("tokenizer", 0)
    sentences = [sentence_about(Scene.draw(rng, held_out=None), rng, still=rng.random() < 0.3, complete=False)
                 for _ in range(8000)]
    new_tokenizer(sentences, pieces=384, folder=folder)


class AttributeReader(nn.Module):
    """The T5 encoder, and one linear head per attribute on the mean of its rows; the last answer of each is `not
    said`."""

    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values) + 1) for name, values in ATTRIBUTES.items()})

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        rows = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (rows * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return {name: head(mean) for name, head in self.heads.items()}


def train_text(work: Path, device: str, tokenizer: Tokenizer) -> nn.Module:
    torch.manual_seed(SEED)
    width = CARD.dit_config.text_dim
    encoder = new_t5(d_model=width, d_kv=32, d_ff=2 * width, num_layers=3, num_heads=4,
                     vocab_size=tokenizer.largest + 1)
    reader = AttributeReader(encoder, width).to(device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = rng_of("text", step)
        scenes = [Scene.draw(rng) for _ in range(TEXT_BATCH)]
        stills = [rng.random() < 0.2 for _ in scenes]
        sentences = [sentence_about(scene, rng, still=still, complete=False)
                     for scene, still in zip(scenes, stills, strict=True)]
        said = reader(*tokenizer.padded(sentences, device))
        loss, right = torch.zeros((), device=device), 0.0
        for name, values in ATTRIBUTES.items():
            unsaid = len(values)
            answers = torch.tensor([values.index(scene.attributes[name]) if is_said(name, scene, sentence, still)
                                    else unsaid
                                    for scene, sentence, still in zip(scenes, sentences, stills, strict=True)],
                                   device=device)
            loss = loss + F.cross_entropy(said[name], answers)
            right += (said[name].argmax(dim=1) == answers).float().mean().item() / len(ATTRIBUTES)
        return loss, dict(right=right)

    fit(TEXT_PHASE, reader, loss_of, work)
    return encoder


def is_said(name: str, scene: Scene, sentence: str, still: bool) -> bool:
    if still and name in ("direction", "speed"):
        return False
    value = scene.attributes[name]
    return any(word in sentence for word in ATTRIBUTE_WORDS.get(value, (value,)))


# The DiT: velocity of flow matching on the VAE's latents; the latent of a clip's start is the latent of a shorter clip,
# and its first step that of a single image, so images and clips train together.

DIT_PHASE = Phase(name="dit", steps=9000, lr=2e-3, ema=0.998, shared=True)
IMAGES_MOSTLY = (1, 1, 13, 1, 1, 7, 1, 5)
CLIPS_FROM = 1950                                       # the step at which clips become most of the work


def train_dit(work: Path, device: str, vae: WanVAE, encoder: nn.Module, tokenizer: Tokenizer) -> LinumDiT:
    torch.manual_seed(SEED)
    scenes, latents = encode_scenes(vae, work, device, "clips", DIT_CLIPS, CLIP_FRAMES)
    pictured, images = encode_scenes(vae, work, device, "images", DIT_IMAGES, 1)
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    dit = LinumDiT(CARD.dit_config).to(device)
    dit.latent_scale.copy_(0.5 / std)                   # mean 0 and standard deviation 0.5, as Linum's latents
    dit.latent_bias.copy_(-mean * 0.5 / std)
    latents, images = (x * dit.latent_scale.cpu().view(-1, 1, 1, 1) + dit.latent_bias.cpu().view(-1, 1, 1, 1)
                       for x in (latents, images))
    with torch.no_grad():                               # each block starts as the identity
        for block in dit.blocks:
            for layer in (block.attn.o, block.cross.o, block.ffn_out):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(CARD.dit_config.layers))
        nn.init.zeros_(dit.head.linear.weight)
        nn.init.zeros_(dit.head.linear.bias)
    encoder.eval()

    @torch.no_grad()
    def embed(sentences: list[str]) -> list[Tensor]:
        ids, mask = tokenizer.padded(sentences, device, CARD.dit_config.text_len)
        rows = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return [row[:n] for row, n in zip(rows, mask.sum(dim=1).tolist(), strict=True)]

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = rng_of("dit", step)
        length = (IMAGES_MOSTLY if step < CLIPS_FROM else CLIPS_MOSTLY)[step % 8]
        clips, still = BATCHES[length], length == 1
        known, coded = (pictured, images) if still else (scenes, latents)
        picked = share_of([rng.randrange(len(known)) for _ in range(clips)])
        sentences = ["" if rng.random() < UNPROMPTED else sentence_about(known[i], rng, still=still, complete=False)
                     for i in picked]
        data = coded[picked, :, :length].to(device)
        noisy, sigma, noise = noised(data, noise_for(rng.getrandbits(62)))
        with torch.autocast(device, torch.bfloat16), plain_attention(device):
            velocity = dit(noisy, 1000 * sigma, dit.embed_text(embed(sentences)))
        loss = F.mse_loss(velocity.float(), noise - data)
        return loss, dict(length=length)

    learn_compiled(dit, device)
    fit(DIT_PHASE, dit, loss_of, work)
    return dit


def export(folder: Path, dit: LinumDiT, vae: WanVAE, encoder: nn.Module) -> None:
    """The layout and tensor names of a Linum release, in bf16; the tokenizer is there already."""
    save_released(dit, linum_keys.LINUM, folder / CARD.dit_file)
    save_released(vae, wan_keys.WAN_VAE, folder / CARD.vae_file)
    state = {name: t for name, t in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}     # tied
    checkpoint.save(folder / CARD.text_encoder_folder / "model.safetensors", halved(state))
    (folder / CARD.text_encoder_folder / "config.json").write_text(encoder.config.to_json_string())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="where progress is kept")
    parser.add_argument("--out", type=Path, default=CARD.folder, help="where the finished model goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--distill", action="store_true",
                        help="train the few-step student of the model in --out instead")
    parser.add_argument("--tune-sparse", action="store_true",
                        help="tune the model in --out for sparse attention instead")
    parser.add_argument("--only", choices=("text", "vae", "dit"), help="train this one, and export nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)                      # a CPU is slow at what is nearly 0
    with training_together(args.device):
        if args.distill:
            distill(args.work, args.out, args.device)
        elif args.tune_sparse:
            tune_sparse(args.work, args.out, args.device)
        else:
            train_from_nothing(args.work, args.out, args.device, args.only)


def train_from_nothing(work: Path, out: Path, device: str, only: str | None) -> None:
    """only: one of text, vae and dit; nothing is exported then."""
    tokenizer_folder = out / CARD.tokenizer_folder
    with alone() as first:
        if first and not (tokenizer_folder / "tokenizer.json").exists():
            train_tokenizer(tokenizer_folder)
    tokenizer = Tokenizer(tokenizer_folder, CARD.name)
    vae = train_vae(work, device) if only != "text" else None
    encoder = train_text(work, device, tokenizer) if only != "vae" else None
    if vae is not None and encoder is not None:
        dit = train_dit(work, device, vae.eval(), encoder, tokenizer)
        if only is None and process_number() == 0:
            export(out, dit, vae, encoder)
            sizes = {str(p.relative_to(out)): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
            print(json.dumps(dict(written=str(out), bytes=sizes, total=sum(sizes.values())), indent=2))


if __name__ == "__main__":
    main()
