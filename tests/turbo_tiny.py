"""Tiny turbo models, with random weights as TurboDiffusion publishes them: pickles, plain or with INT8 layers."""

from dataclasses import replace
from pathlib import Path

import torch
from parts import new_dit
from wan_tiny import TINY, TINY_DIT, WAN_TINY, write_weights

from dailies.kernels.int8_linear import quantize_blocks
from dailies.model import checkpoint, turbo
from dailies.model.catalog import TURBO_WAN21_T2V_1_3B, TURBO_WAN22_I2V_A14B
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.card import TurboCard

DIT = TINY_DIT | dict(width=64)                         # heads of 32 channels: attention kernels take 16 or more
SAID = TINY | dict(num_steps=4, keep_ratio=0.4, sparse_blocks=(16, 16))
TURBO_TINY = replace(TURBO_WAN21_T2V_1_3B, name="turbo-tiny", release="TurboTiny", **SAID, dit_fields=DIT)
TURBO_TINY_I2V = replace(TURBO_WAN22_I2V_A14B, name="turbo-tiny-i2v", release="TurboTiny-{}", **SAID,
                         dit_fields=DIT | dict(condition_channels=20))


def new_tensors(card: TurboCard, quant: bool = False) -> dict[str, torch.Tensor]:
    """One transformer under its published names, bf16 but for scales and norms."""
    dit = new_dit(card)
    turbo.refit(dit, "sparse", card.sparsity)
    for name, parameter in dit.named_parameters():
        parameter.data.normal_(0, 0.15).add_(1.0 if "norm" in name and not name.endswith("bias") else 0.0)
    layers = [place for place, _ in turbo.linears_of_blocks(dit)]
    tensors = {}
    for name, tensor in checkpoint.released_state(dit, wan_keys.TURBO_WAN).items():
        layer = name.removesuffix(".weight")
        if name == "patch_embedding.weight":
            tensor = tensor.flatten(1)
        if quant and wan_keys.TURBO_WAN.ours(name) in [f"{place}.weight" for place in layers]:
            tensors[f"{layer}.int8_weight"], tensors[f"{layer}.scale"] = quantize_blocks(tensor.bfloat16())
        else:
            tensors[name] = tensor if "norm" in name else tensor.bfloat16()
    return tensors


def publish(folder: Path, card: TurboCard, quant: bool = False) -> Path:
    """Two repositories, as they are downloaded: folder/turbo with the transformers, folder/wan with the rest."""
    torch.manual_seed(2)
    (folder / "turbo").mkdir(parents=True)
    for part in card.layouts[int(quant)].dits:
        torch.save(new_tensors(card, quant), folder / "turbo" / part.replace(".safetensors", ".pth"))
    write_weights(folder / "wan", WAN_TINY, "original")
    for part in (WAN_TINY.layouts[1].vae, WAN_TINY.layouts[1].text_encoder):
        tensors, _ = checkpoint.unpack((folder / "wan" / part).read_bytes())
        (folder / "wan" / part).unlink()
        if "decoder.head.2.weight" in tensors:
            tensors["decoder.head.2.weight"] *= 0.3     # or what random weights make flickers, which is not published
        torch.save(tensors, (folder / "wan" / part).with_suffix(".pth"))
    return folder
