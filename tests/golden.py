"""Golden cases (tests/goldens/README.md): outputs of the released code, and the loading of a case."""

import dataclasses
import json
from pathlib import Path

import torch

from dailies.actors.messages import Request
from dailies.model import checkpoint
from dailies.model.catalog import LINUM_V2_360P
from dailies.model.shapes import VideoShape

torch.set_num_threads(1)            # the models here are tiny: threads would only wait for each other

GOLDENS = Path(__file__).parent / "goldens"


class Golden:
    def __init__(self, name):
        self.folder = GOLDENS / name
        case = json.loads((self.folder / "case.json").read_text())
        self.config, self.tolerance = case["config"], case["tolerance"]
        self.inputs, _ = checkpoint.unpack((self.folder / "inputs.safetensors").read_bytes())
        self.outputs, _ = checkpoint.unpack((self.folder / "outputs.safetensors").read_bytes())


def error(got, want):
    """Largest difference over largest value; the measure of the goldens."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def names(prefix):
    return sorted(path.name for path in GOLDENS.glob(f"{prefix}_*"))


# the published layout at tiny size, with its published file names
E2E = GOLDENS / "linum_e2e_a" / "checkpoint"
E2E_CARD = dataclasses.replace(
    LINUM_V2_360P,
    dit_fields=dict(width=48, heads=2, layers=2, ffn=64, time_features=64, text_dim=32, text_len=26),
    vae_fields=dict(width=2),
)


def e2e_request(**changes):
    said = dict(clip_id="c" * 64, model=E2E_CARD.name, weights_fingerprint="f", prompt="a red fox runs over the snow",
                negative_prompt="", seed=20, shape=VideoShape(frames=9, height=24, width=40), fps=24.0, num_steps=4,
                guidance=7.0, precision="fp32", attention="dense")
    return Request(**said | changes)
