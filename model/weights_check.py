"""Whether a folder of weights is a card's, by the headers of its files: before anything in it is read to its end."""

from pathlib import Path

from dailies.model.card import ModelCard
from dailies.model.family import ModelPart, family_of
from dailies.model.files import CheckpointError
from dailies.model.keys import table_of
from dailies.model.runtime import Runtime
from dailies.model.weights import layout_in, stored_at, weights_files

SPARE_BYTES = 10**9                                     # of a folder, beside twice what its tensors take


def check_parts(card: ModelCard, folder: Path, on: Runtime) -> None:
    """Names, shapes and dtypes of every weight.  on: of the device "meta".  Raises CheckpointError."""
    for part in family_of(card).parts(card):
        part.load(folder, on)


def check_before_reading(card: ModelCard, folder: Path, on: Runtime) -> None:
    """That the files have no more bytes than the model takes, then check_parts: holes cost no disk, and hours to read.

    What is not loaded may be there as well, a T5's decoder or a second copy of a part.  Raises CheckpointError.
    """
    files = weights_files(card, folder)
    there = sum(path.stat().st_size for path in files.values())
    needed = sum(loaded_bytes(card, folder, part) for part in family_of(card).parts(card))
    if there > 2 * needed + SPARE_BYTES:
        largest = max(files, key=lambda name: files[name].stat().st_size)
        raise CheckpointError(
            f"{card.name}: the weights in {folder} must have at most {2 * needed + SPARE_BYTES:,} bytes, twice what "
            f"the model's tensors take; they have {there:,}, the most of them in {largest}. Fetch it again, or move "
            "away what is not this model's")
    check_parts(card, folder, on)                       # which maps the files, as large as they are


def loaded_bytes(card: ModelCard, folder: Path, part: ModelPart) -> int:
    """What the tensors of a part take in its file, without those that are not loaded.  Raises CheckpointError."""
    from dailies.model.checkpoint import stored_tensors  # brings torch
    stored = stored_tensors(stored_at(folder, layout_in(card, folder).part_of(part.kind, part.place)))
    table = table_of(stored, part.tables)
    return sum(tensor.num_bytes for name, tensor in stored.items() if not table.drops(name))
