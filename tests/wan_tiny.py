"""The program with tiny Wan models: random weights, a clip takes a moment. They are not shipped; this writes them.

python tests/wan_tiny.py write wan-tiny-i2v FOLDER                writes a model's weights; the models are in CARDS
python tests/wan_tiny.py render prompts.csv --out out/ --model wan-tiny-i2v --weights FOLDER
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import tiny_program

from dailies.model.catalog import WAN21_I2V_14B, WAN21_T2V_1_3B, WAN22_I2V_A14B, WAN22_T2V_A14B
from dailies.model.wan.card import UMT5_XXL, WanCard

TOKENIZER = Path(__file__).parent / "goldens/linum_e2e_a/checkpoint/t5/tokenizer"

TINY_DIT = dict(width=48, heads=2, layers=2, ffn=64, time_features=64, text_dim=32, text_len=26)
TINY = dict(
    repo_id=None, resolutions={"32p": (32, 48)}, resolution="32p", min_side=16, max_pixels=64 * 64, num_steps=3,
    duration_s=1.0, memory_gb={}, vae_fields=dict(width=2),
    text_encoder_fields=UMT5_XXL | dict(vocab_size=137, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))

WAN_TINY = replace(WAN21_T2V_1_3B, name="wan-tiny", description="random weights, for tests", **TINY,
                   dit_fields=TINY_DIT)
WAN_TINY_A14B = replace(WAN22_T2V_A14B, name="wan-tiny-a14b", **TINY, dit_fields=TINY_DIT)
WAN_TINY_I2V = replace(
    WAN21_I2V_14B, name="wan-tiny-i2v", **TINY, dit_fields=TINY_DIT | dict(condition_channels=20, image_dim=24),
    clip_fields=dict(picture=28, patch=14, width=24, heads=2, blocks=2, mlp=48))
WAN_TINY_I2V_A14B = replace(WAN22_I2V_A14B, name="wan-tiny-i2v-a14b", **TINY,
                            dit_fields=TINY_DIT | dict(condition_channels=20))

CARDS = (WAN_TINY, WAN_TINY_A14B, WAN_TINY_I2V, WAN_TINY_I2V_A14B)


def write_weights(folder: Path, card: WanCard = WAN_TINY, layout: str = "diffusers") -> None:
    """Random weights in one of the published layouts (the original one as `dailies convert` leaves it)."""
    import torch

    from dailies.model import checkpoint, keys
    from dailies.model.text import new_encoder
    from dailies.model.wan import keys as wan_keys
    from dailies.model.wan.image_encoder import ClipVision
    from dailies.model.wan.transformer import WanDiT
    from dailies.model.wan.vae import WanVAE

    def write(model: torch.nn.Module, part: str, table: keys.KeyTable) -> None:
        for name, parameter in model.named_parameters():
            parameter.data.normal_(0, 0.15).add_(1.0 if "norm" in name and not name.endswith("bias") else 0.0)
        checkpoint.save(folder / part, checkpoint.released_state(model, table))

    original = layout == "original"
    parts = card.layouts[original]
    torch.manual_seed(1)
    for part in parts.dits:
        write(WanDiT(card.dit_config), part, wan_keys.WAN if original else wan_keys.WAN_DIFFUSERS)
    write(WanVAE(card.vae_config), parts.vae, wan_keys.WAN_VAE if original else wan_keys.WAN_VAE_DIFFUSERS)
    if parts.image_encoder:
        write(ClipVision(card.clip_config), parts.image_encoder, wan_keys.CLIP_VISION)
    encoder = new_encoder("umT5", card.text_encoder_fields)
    encoder.encoder.embed_tokens = encoder.shared
    state = {name: parameter.detach() for name, parameter in encoder.named_parameters()}
    table = keys.UMT5_WAN if original else keys.UMT5
    file = parts.text_encoder if original else f"{parts.text_encoder}/model.safetensors"
    checkpoint.save(folder / file, {table.released(name): tensor for name, tensor in state.items()})
    if not original:
        (folder / parts.text_encoder / "config.json").write_text(json.dumps(card.text_encoder_fields))
    shutil.copytree(TOKENIZER, folder / parts.tokenizer)


if __name__ == "__main__":
    tiny_program.run(CARDS, write_weights)
