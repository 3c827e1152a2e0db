"""LTX-2's text encoder: a prompt in, what each stream attends to out; Gemma 3, the text projection, the connectors."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dailies.kernels import processor
from dailies.model import checkpoint
from dailies.model.eight_bits import NarrowLinear
from dailies.model.files import CheckpointError, read_json
from dailies.model.layers import Linear
from dailies.model.ltx2.connectors import TextConnectors
from dailies.model.ltx2.gemma import GEMMA_TABLES, Gemma3, GemmaConfig, gemma_config
from dailies.model.ltx2.header import LtxHeader, read_ltx_header
from dailies.model.ltx2.keys import connectors_table
from dailies.model.offload import LayersInTurn, settled_on_host
from dailies.model.samplers import Streams
from dailies.model.tokenizer import GemmaTokenizer, refuse_code

_log = logging.getLogger(__name__)

TEXT_ROWS = 1024                                        # of context, and so the tokens that a prompt may have
GEMMA_CONFIG_BYTES = 1_000_000


class LtxTextEncoder:
    """Gemma 3 and the connectors of a release, loaded; a TextModel (model/family.py).

    A text is encoded alone and without padding, so its rows depend on nothing else. They are always `length`: what is
    no token of it is a register, which the transformer attends to as to the text.
    """

    def __init__(self, gemma: Path, release: Path, device: str, *, name: str, precision: str, audio: bool = True,
                 length: int = TEXT_ROWS, tokenizer: Path | None = None, resident: int | None = None):
        """gemma: a folder as published.  release: the single file, for its connectors.  tokenizer: by default gemma.
        name: of the model, for messages.  audio: False makes nothing for sound.  resident: of Gemma's layers, those
        whose weights stay on the device, where the others' come in turn (offload.py); None: all.

        precision: fp32, bf16, or int8: Gemma's weights in eight bits, computed with in bf16 (12 GB for 24).
        Raises CheckpointError.
        """
        self.device, self.max_tokens = device, length
        header = read_ltx_header(release, name)
        config = read_gemma_config(gemma, header, name)
        self.tokenizer = GemmaTokenizer(tokenizer or gemma, name)
        if self.tokenizer.largest >= config.vocabulary:
            raise CheckpointError(f"{name}: its tokenizer has a piece {self.tokenizer.largest}, and its text encoder "
                                  f"{config.vocabulary} rows: they are not of one model. Fetch both from one "
                                  "repository")
        self.connectors = load_connectors(header, release, config.width, device, precision, name, audio=audio)
        registers = self.connectors.config.registers
        if length % registers:
            raise CheckpointError(f"{name}: {release} has {registers} registers, of which {length} rows are no "
                                  "multiple. Is it another model's file?")
        self.gemma = load_gemma(config, gemma, device, precision, name, resident=resident)

    def cut(self, text: str) -> int:
        """How many tokens of the text do not fit."""
        return max(0, len(self.tokenizer.ids(text)) - self.max_tokens)

    def encode(self, text: str) -> Streams:
        """As TextModel.encode: [length, D] for "video", and for "audio" where it is wanted, on the CPU."""
        return self.contexts(self.tokenizer.ids(text, self.max_tokens))

    @torch.inference_mode()
    def contexts(self, ids: list[int]) -> Streams:
        picture, sound = self.connectors(self.gemma(ids, self.max_tokens), self.max_tokens)
        return {stream: rows.cpu() for stream, rows in (("video", picture), ("audio", sound)) if rows is not None}


def read_gemma_config(folder: Path, header: LtxHeader, name: str) -> GemmaConfig:
    """Of a folder, checked to be what the release was made with.  Raises CheckpointError."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{name}: its text encoder must be a folder with Gemma 3 12B, as google/gemma-3-12b-it "
                              f"is published; {folder} is {'a file' if folder.exists() else 'not there'}")
    said = read_json(path, GEMMA_CONFIG_BYTES)
    refuse_code(said, path)
    config = gemma_config(said, f"{name}: {path}")
    check_gemma_version(said, header, f"{name}: {path}")
    return config


def check_gemma_version(said: Mapping[str, Any], header: LtxHeader, where: str) -> None:
    """As the release: a file that names a version of Gemma needs that one.  Raises CheckpointError."""
    has = said.get("gemma_version")
    if isinstance(header.gemma, Mapping):
        wants = header.gemma.get("gemma_version")
        if wants != has:
            raise CheckpointError(f"{where} is of Gemma {str(has)[:40]!r}, and {header.where} was made with "
                                  f"{str(wants)[:40]!r}. Fetch the text encoder that it names")
    elif header.version >= (2, 4):
        if has is not None:
            raise CheckpointError(f"{header.where} does not say which Gemma it was made with, and {where} is of "
                                  f"{str(has)[:40]!r}. Fetch both again, with their headers")
        _log.warning("%s does not say which Gemma it was made with; from 2.4 on that should be checked", header.where)


def load_gemma(config: GemmaConfig, folder: Path, device: str, precision: str, name: str, *,
               resident: int | None = None) -> Gemma3:
    """Its table of pieces stays in host memory: of a text only the rows of its tokens are needed on the device.

    resident: as of LtxTextEncoder.
    """
    with torch.device("meta"):
        model = Gemma3(config)
    lower = processor.dtype_of(precision, device)
    dtypes = {f"{place}.{leaf}": lower for place, module in model.named_modules()
              if isinstance(module, (Linear, nn.Embedding)) for leaf, _ in module.named_parameters(recurse=False)}

    def settle(place: str, module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Embedding) and device != "meta":
            return module.cpu()
        return NarrowLinear(module) if precision == "int8" and isinstance(module, Linear) else module

    settle_there = settle if resident is None else settled_on_host(settle, "layers", resident)
    checkpoint.load(model, folder, *GEMMA_TABLES, name=name, device=device, dtypes=dtypes, settle=settle_there)
    if resident is not None:
        LayersInTurn(model.layers[resident:], device)
    return model.requires_grad_(False).eval()


def load_connectors(header: LtxHeader, release: Path, hidden: int, device: str, precision: str, name: str, *,
                    audio: bool = True) -> TextConnectors:
    """hidden: Gemma's width.  Raises CheckpointError."""
    config = header.connectors(hidden)
    return checkpoint.build(lambda: TextConnectors(config, audio=audio), release, connectors_table(audio=audio),
                            name=name, device=device, precision=precision)
