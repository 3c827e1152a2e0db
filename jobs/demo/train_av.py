"""Trains the demo with sound from nothing, on what `dailies.jobs.demo.world_av` draws and rings: audio VAE, vocoder,
video VAE, text encoder, transformer, each in the layout of LTX-2.3, and writes them as a release of it lies.

`python -m dailies.jobs.demo.train_av --work build/demo-av` takes two or three hours of a CPU core, minutes on a GPU.
Every batch is a function of (seed, phase, step), progress is saved once a minute, and the same command continues after
an interruption. --only trains one part, so that two can be trained side by side.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.jobs.demo.codecs_av import AUDIO, SOUND_STEPS, train_audio_vae, train_video_vae, train_vocoder
from dailies.jobs.demo.learning import plain_attention
from dailies.jobs.demo.losses import noised
from dailies.jobs.demo.phases import CLIP_FRAMES, SEED, UNPROMPTED, Phase, fit, rng_of
from dailies.jobs.demo.release_av import (
    CONTEXT_ROWS,
    GEMMA_FOLDER,
    RELEASE_FILE,
    SMALL_CONNECTORS,
    SMALL_GEMMA,
    SMALL_TRANSFORMER,
    write_release,
)
from dailies.jobs.demo.train import is_said
from dailies.jobs.demo.world import ATTRIBUTES, FPS, Scene, sentence_about
from dailies.jobs.demo.world_av import Bounce
from dailies.model.ltx2.adaln import Levels
from dailies.model.ltx2.audio_vae import AudioVAE, log_mel
from dailies.model.ltx2.connectors import TextConnectors
from dailies.model.ltx2.gemma import Gemma3
from dailies.model.ltx2.rope import audio_positions, video_positions
from dailies.model.ltx2.transformer import LtxTransformer, Modality
from dailies.model.ltx2.video_vae import VideoVAE
from dailies.model.tokenizer import GemmaTokenizer, new_tokenizer

# The text: Gemma and connectors learn together to say a scene's attributes; the heads are thrown away.

GEMMA_PHASE = Phase(name="text-av", steps=500, lr=2e-3)
GEMMA_BATCH, GEMMA_PIECES = 32, 320


class Texts(nn.Module):
    """A sentence to what both streams attend to."""

    def __init__(self):
        super().__init__()
        self.gemma, self.connectors = Gemma3(SMALL_GEMMA), TextConnectors(SMALL_CONNECTORS)
        with torch.no_grad():
            for connector in (self.connectors.video_embeddings_connector, self.connectors.audio_embeddings_connector):
                connector.learnable_registers.normal_(std=0.5)
        self.heads = nn.ModuleList(nn.ModuleDict({name: nn.Linear(width, len(values) + 1)
                                                  for name, values in ATTRIBUTES.items()})
                                   for width in (SMALL_CONNECTORS.width, SMALL_CONNECTORS.audio_width))

    def contexts(self, ids: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """[B, S, D] for picture and sound."""
        rows = [self.connectors(self.gemma(each, CONTEXT_ROWS), CONTEXT_ROWS) for each in ids]
        return torch.stack([picture for picture, _ in rows]), torch.stack([sound for _, sound in rows])


def gemma_tokenizer(folder: Path) -> GemmaTokenizer:
    """Made where it is not there, of sentences about the world."""
    if not (folder / "tokenizer.json").exists():
        rng = rng_of("tokenizer", 0)
        new_tokenizer([sentence_about(Scene.draw(rng, held_out=None), rng, complete=False) for _ in range(8000)],
                      pieces=GEMMA_PIECES, folder=folder, for_gemma=True)
    return GemmaTokenizer(folder, "demo-av")


def train_texts(work: Path, device: str, tokenizer: GemmaTokenizer) -> Texts:
    torch.manual_seed(SEED)
    texts = Texts().to(device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = rng_of("text-av", step)
        scenes = [Scene.draw(rng) for _ in range(GEMMA_BATCH)]
        sentences = [sentence_about(scene, rng, complete=False) for scene in scenes]
        loss, right = torch.zeros((), device=device), 0.0
        for context, heads in zip(texts.contexts([tokenizer.ids(sentence, CONTEXT_ROWS) for sentence in sentences]),
                                  texts.heads, strict=True):
            for name, values in ATTRIBUTES.items():
                answers = torch.tensor([values.index(scene.attributes[name])
                                        if is_said(name, scene, sentence, False) else len(values)
                                        for scene, sentence in zip(scenes, sentences, strict=True)], device=device)
                said = heads[name](context.float().mean(1))
                loss = loss + F.cross_entropy(said, answers)
                right += (said.argmax(1) == answers).float().mean().item() / (2 * len(ATTRIBUTES))
        return loss, dict(right=right)

    fit(GEMMA_PHASE, texts, loss_of, work)
    return texts.requires_grad_(False).eval()


# The transformer: velocity of flow matching on both streams, at one sigma.

AV_PHASE = Phase(name="dit-av", steps=2000, lr=2e-3, ema=0.998)
AV_CLIPS, AV_BATCH, CODED_TOGETHER = 3000, 48, 100
SENTENCES = 4                                           # about each clip


def coded_clips(work: Path, device: str, video: VideoVAE, audio: AudioVAE) -> tuple[list[Bounce], Tensor, Tensor]:
    """Scenes, and their normalised latents as tokens: [N, T * H * W, C] and [N, A, z * K]; kept in `work`, some at a
    time.
    """
    rng = rng_of("clips-av", 0)
    scenes = [Bounce.draw(rng) for _ in range(AV_CLIPS)]
    coded = []
    for start in range(0, AV_CLIPS, CODED_TOGETHER):
        path = work / f"clips-av-{start:05}.pt"
        if not path.exists():
            some = [coded_clip(scene, device, video, audio) for scene in scenes[start:start + CODED_TOGETHER]]
            torch.save(tuple(map(torch.cat, zip(*some, strict=True))), path)
            print(f"\rcoded {start + len(some)} of {AV_CLIPS} clips", end="", flush=True)
        coded.append(torch.load(path, weights_only=True))
    print()
    pictures, sounds = map(torch.cat, zip(*coded, strict=True))
    return scenes, pictures, sounds


@torch.no_grad()
def coded_clip(scene: Bounce, device: str, video: VideoVAE, audio: AudioVAE) -> tuple[Tensor, Tensor]:
    shown = scene.pictures()[0][None].to(device)
    rung = scene.sound(scene.samples(AUDIO.sample_rate), AUDIO.sample_rate)[None].to(device)
    return video.encode(shown).flatten(2).transpose(1, 2).cpu(), sound_tokens(audio, rung).cpu()


def sound_tokens(audio: AudioVAE, sounds: Tensor) -> Tensor:
    """[B, A, z * K], normalised.  sounds [B, 2, samples] at the VAE's rate."""
    latent = audio.encode(log_mel(sounds, AUDIO))[:, :, :SOUND_STEPS]
    latent = F.pad(latent, (0, 0, 0, SOUND_STEPS - latent.shape[2]), mode="replicate")
    return latent.transpose(1, 2).flatten(2)


@torch.no_grad()
def told_clips(scenes: list[Bounce], texts: Texts, tokenizer: GemmaTokenizer) -> tuple[Tensor, Tensor]:
    """What both streams are told by SENTENCES about each scene, in bf16: [N * SENTENCES + 1, S, D]; at last by none."""
    rng = rng_of("sentences-av", 0)
    sentences = [sentence_about(scene, rng, complete=False) for scene in scenes for _ in range(SENTENCES)]
    ids = [tokenizer.ids(sentence, CONTEXT_ROWS) for sentence in (*sentences, "")]
    told = [texts.contexts(ids[start:start + 100]) for start in range(0, len(ids), 100)]
    pictures, sounds = (torch.cat([rows.to(torch.bfloat16) for rows in each]) for each in zip(*told, strict=True))
    return pictures, sounds


def new_transformer() -> LtxTransformer:
    """Each block starts as the identity, and the velocity as 0."""
    dit = LtxTransformer(SMALL_TRANSFORMER)
    with torch.no_grad():
        for block in dit.blocks:
            for attention in (block.attn1, block.attn2, block.audio_attn1, block.audio_attn2,
                              block.audio_to_video_attn, block.video_to_audio_attn):
                nn.init.normal_(attention.out.weight, std=0.02 / math.sqrt(SMALL_TRANSFORMER.layers))
            for layers in (block.ff, block.audio_ff):
                nn.init.normal_(layers.out.weight, std=0.02 / math.sqrt(SMALL_TRANSFORMER.layers))
            for table in (block.scale_shift_table, block.audio_scale_shift_table):
                table[[2, 5, 8]] = 1.0                  # the gates: nothing would be learnt behind closed ones
            block.scale_shift_table_a2v_ca_video[4] = block.scale_shift_table_a2v_ca_audio[4] = 1.0
        for layer in (dit.proj_out, dit.audio_proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return dit


def train_av(work: Path, device: str, video: VideoVAE, audio: AudioVAE, texts: Texts,
              tokenizer: GemmaTokenizer) -> LtxTransformer:
    torch.manual_seed(SEED)
    scenes, pictures, sounds = coded_clips(work, device, video, audio)
    dit = new_transformer().to(device)
    grid = (CLIP_FRAMES - 1) // 8 + 1, 2, 2
    places = video_positions(grid, FPS).to(device), audio_positions(SOUND_STEPS).to(device)
    told = told_clips(scenes, texts, tokenizer)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = rng_of("dit-av", step)
        picked = [rng.randrange(len(scenes)) for _ in range(AV_BATCH)]
        said = [-1 if rng.random() < UNPROMPTED else SENTENCES * i + rng.randrange(SENTENCES) for i in picked]
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        clean = pictures[picked].to(device), sounds[picked].to(device)
        both = torch.cat([x.flatten(1) for x in clean], 1)[:, None, None, None]
        noisy, sigma, noise = (x.squeeze((1, 2, 3)) if x.dim() > 1 else x for x in noised(both, generator))
        sizes = [x[0].numel() for x in clean]
        given = [Modality(x.unflatten(1, one.shape[1:]), Levels(sigma[:, None]), sigma, place, context)
                 for x, one, place, context in zip(noisy.split(sizes, 1), clean, places, (rows[said] for rows in told),
                                                   strict=True)]
        with torch.autocast(device, torch.bfloat16), plain_attention(device):
            velocities = dit(*given)
        errors = [F.mse_loss(velocity.float().flatten(1), wanted) for velocity, wanted in
                  zip(velocities, (noise - both.squeeze((1, 2, 3))).split(sizes, 1), strict=True)]
        return errors[0] + errors[1], dict(video=errors[0].item(), audio=errors[1].item())

    fit(AV_PHASE, dit, loss_of, work)
    return dit


AV_PARTS = ("audio", "video", "text", "dit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo-av"), help="where progress is kept")
    parser.add_argument("--out", type=Path, help="where the finished model goes; by default `model` in --work")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=AV_PARTS[:3], help="train this one, and write nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    out, wanted = args.out or args.work / "model", AV_PARTS if args.only is None else (args.only,)
    if "audio" in wanted:
        audio = train_audio_vae(args.work, args.device)
        vocoder = train_vocoder(args.work, args.device, audio)
    if "video" in wanted:
        video = train_video_vae(args.work, args.device)
    if "text" in wanted:
        tokenizer = gemma_tokenizer(args.work / GEMMA_FOLDER)
        texts = train_texts(args.work, args.device, tokenizer)
    if args.only is None:
        dit = train_av(args.work, args.device, video, audio, texts, tokenizer)
        write_release(out, dit=dit, video=video, audio=audio, vocoder=vocoder, gemma=texts.gemma,
                      connectors=texts.connectors, tokenizer=args.work / GEMMA_FOLDER)
        num_bytes = sum(path.stat().st_size for path in out.rglob("*.*"))
        print(json.dumps(dict(written=str(out / RELEASE_FILE), bytes=num_bytes)))


if __name__ == "__main__":
    main()
