"""The header of an LTX-2 file: what it says of its parts, its version, and its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dailies.model import checkpoint
from dailies.model.checkpoint import StoredTensor
from dailies.model.files import CheckpointError
from dailies.model.ltx2.config import (
    DIT_PREFIX,
    ConnectorsConfig,
    LtxConfig,
    connectors_config,
    header_object,
    ltx_version,
    transformer_config,
)


@dataclass(frozen=True, kw_only=True)
class LtxHeader:
    where: str                                          # model and file, for messages
    config: Mapping[str, Any]                           # by part; {} where it is lost
    version: tuple[int, ...]                            # () where it is lost
    gemma: Mapping[str, Any] | None                     # which text encoder it was made with, where it says so
    stored: Mapping[str, StoredTensor]

    def part(self, name: str) -> Mapping[str, Any]:
        """What the header's config says of a part; {} where it says nothing.  Raises CheckpointError."""
        said = self.config.get(name, {})
        if not isinstance(said, dict):
            raise CheckpointError(f"{self.where}: {name} in its header's config must be a table; got "
                                  f"{str(said)[:60]!r}")
        return said

    def shapes(self, prefix: str = "") -> dict[str, tuple[int, ...]]:
        """Of the tensors with this prefix, by what is behind it."""
        return {name.removeprefix(prefix): tensor.shape for name, tensor in self.stored.items()
                if name.startswith(prefix)}

    def transformer(self) -> LtxConfig:
        """Raises CheckpointError."""
        return transformer_config(self.part("transformer"), self.shapes(DIT_PREFIX), self.where)

    def connectors(self, hidden: int) -> ConnectorsConfig:
        """hidden: width of the text encoder.  Raises CheckpointError."""
        return connectors_config(self.part("transformer"), self.shapes(), hidden, self.where)


def read_ltx_header(path: Path, name: str) -> LtxHeader:
    """Of a single file.  name: of the model, for messages.  Raises CheckpointError."""
    stored, metadata = checkpoint.read_header(path)
    where = f"{name}: {path}"
    return LtxHeader(where=where, config=header_object(metadata, "config", where) or {}, stored=stored,
                     gemma=header_object(metadata, "gemma_source_checkpoint", where),
                     version=ltx_version(metadata.get("model_version")))
