"""Published weights, pickles among them, to checked safetensors in a layout that the catalogue loads.

A pickle is read with weights_only, so nothing in it can run, and by a process that has no credentials. Every tensor
keeps its name and its bits, but for CLIP's, whose query, key and value come apart, and for those that are to become
INT8. Nothing is published before names, shapes and kinds have been checked.
"""

import json as jsonlib
import os
import re
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import torch
from torch import Tensor

from dailies import HOME
from dailies.jobs import sandbox
from dailies.jobs.answer import answer
from dailies.jobs.progress import say
from dailies.jobs.usage import UsageError, card_named
from dailies.kernels.int8_linear import quantize_rows
from dailies.model import checkpoint, keys, turbo
from dailies.model.card import Layout, ModelCard
from dailies.model.family import ModelPart, family_of
from dailies.model.files import (
    INDEX,
    PICKLES,
    CheckpointError,
    json_in,
    listed,
    read_small,
    refuse_outside,
    weight_map,
    weights_file,
)
from dailies.model.private import at_home, cache_folder
from dailies.model.tokenizer import Tokenizer
from dailies.model.weights import SMALL_BYTES, SMALL_KINDS, is_file
from dailies.pipeline.store import Store, open_store
from dailies.pipeline.store.fetch import bring

SAID_BYTES = 8000                                       # of what the reader of a pickle says
EXPERTS = ("high", "low")                               # for noise, in the order of a layout's dits
SHARD_BYTES = 4_000_000_000                             # a bucket takes 5 GB in one request
# what lies beside weights and is copied: a published model's files have these names, and a stranger's have any
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "preprocessor_config.json", "vocab.json", "spiece.model", "tokenizer.model",
          "sentencepiece.bpe.model")
# of our environment, all that the process gets which opens a pickle
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")


@dataclass(frozen=True, kw_only=True)
class FoundPart:
    """One model of several: what it is, where a layout wants it, and where it was found."""

    kind: str                                           # as ModelPart.kind
    place: int                                          # of several dits
    target: str                                         # a .safetensors file, below the output
    source: Path


def convert(source: str, model: str, to: str, *, precision: str | None = None, json: bool) -> int:
    """Convert a folder, or one file of it.  Raises UsageError, CheckpointError, StoreError.

    precision: int8 makes the transformer's layers INT8, about half the bytes of bf16; None leaves them.
    """
    if precision not in (None, "int8"):
        raise UsageError(f"--precision must be int8, or not given to leave the weights as they are; got {precision}")
    card = card_named(model)
    if card.as_published:
        where = card.fetched_by_hand() if card.sources else "they come with dailies"
        raise UsageError(f"{card.name}: there is nothing to convert, its files are read as they are published, header "
                         f"and all: {where}")
    store = open_store(to)
    path = bring(source, cache_folder() / "weights") if "://" in source else at_home(source)
    layout, parts = found_parts(card, path)
    refuse_links_out(parts, path)
    if path.is_dir() and layout.tokenizer and (path / layout.tokenizer).is_dir():
        Tokenizer(path / layout.tokenizer, card.name)   # which is copied as it is: it must be one that can be read
    small = small_files(layout, path) if path.is_dir() else {}
    written = []

    def tell(name: str, num_bytes: int, file: Path) -> None:
        written.append({"file": name, "num_bytes": num_bytes, "from": str(file)})
        if not json:
            size = f"{num_bytes / 1e6:,.1f} MB" if num_bytes > 50_000 else f"{num_bytes:,} bytes"
            say(f"{store.uri_of(name)}  {size}  from {file}", stream=sys.stdout)

    for part in parts:
        tensors = dict(published_tensors(part.source, room_beside(store)))
        if rewritten := _described(card, part.kind).rewritten:
            tensors = rewritten(tensors, part.source)
        if part.kind == "dit" and precision == "int8":
            tensors = quantized_part(card, tensors, part.source)
        with tempfile.TemporaryDirectory(prefix=".dailies-convert-", dir=room_beside(store)) as folder:
            files = write_shards(Path(folder), part.target, tensors)
            check_converted(card, part, Path(folder))
            for name, file in files.items():
                publish(store, name, file, file)
                tell(name, file.stat().st_size, part.source)
    for name, data in small.items():
        publish(store, name, data, path / name)
        tell(name, len(data), path / name)
    return answer({"model": card.name, "to": store.uri, "files": written}, lambda: None, json=json)


def found_parts(card: ModelCard, path: Path) -> tuple[Layout, list[FoundPart]]:
    """What there is to convert, in the layout of which the most is there.  Raises UsageError."""
    if not path.exists():
        raise UsageError(f"SRC must be a file or a folder of published weights; {path} is not there")
    if path.is_file():
        return one_part(card, path)
    found = []
    for layout in card.layouts:
        parts = [FoundPart(kind=kind, place=place, target=target, source=source)
                 for kind, place, target in wanted(layout)
                 if (source := source_of(path, target))]
        found.append((layout, parts))
    layout, parts = max(found, key=lambda option: len(option[1]))
    if not parts:
        names = [target for _, _, target in wanted(layout)]
        raise UsageError(f"{path} has no weights of {card.name}: looked for {listed(names)}, "
                         f"also as {', '.join(PICKLES)}")
    return layout, parts


def one_part(card: ModelCard, path: Path) -> tuple[Layout, list[FoundPart]]:
    """A single file: known by its name, or else by the names of its tensors."""
    stem = path.name.removesuffix(path.suffix)
    # the original layouts first: they are what single files come from
    layouts = sorted(card.layouts, key=lambda layout: not is_file(layout.text_encoder))
    options = [[FoundPart(kind=kind, place=place, target=target, source=path) for kind, place, target in wanted(layout)]
               for layout in layouts]
    for layout, parts in zip(layouts, options, strict=True):
        named = [part for part in parts if PurePosixPath(part.target).stem == stem
                 and PurePosixPath(part.target).parent.name in ("", path.parent.name)]
        if len(named) == 1:
            return layout, named
    names = [name for name, _ in published_tensors(path)]
    known = [part for part in options[0] if not keys.table_of(names, _described(card, part.kind).tables).unknown(names)]
    # of two experts the file's name may say which: wan2.2_t2v_high_noise_14B_fp16.safetensors
    noise = [part for part in known if part.kind == "dit"
             and re.search(rf"(?i)(?<![a-z]){EXPERTS[part.place]}(?![a-z])", stem)]
    known = noise if len(known) > 1 and len(noise) == 1 else known
    if len(known) != 1:
        raise UsageError(f"{path} is " + ("none" if not known else "one of several") + f" of the parts of {card.name}: "
                         f"{listed(part.target for part in known or options[0])}. Name the folder that it belongs to")
    return layouts[0], known


def wanted(layout: Layout) -> Iterator[tuple[str, int, str]]:
    """kind, place and file of every part."""
    for kind, place, target in layout.placed():
        yield kind, place, target if is_file(target) else f"{target}/model.safetensors"


def source_of(folder: Path, target: str) -> Path | None:
    """The file that will become `target`: itself, its index of shards, or a pickle of its name."""
    stem = target.removesuffix(".safetensors")
    names = [target, target + INDEX, *(stem + suffix + index for suffix in PICKLES for index in ("", INDEX))]
    if PurePosixPath(target).name == "model.safetensors":                   # transformers calls its pickles so
        pickled = str(PurePosixPath(target).with_name("pytorch_model.bin"))
        names += [pickled, pickled + INDEX]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def published_tensors(path: Path, room: Path | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, which stay in the mapped file until they are used.  Raises CheckpointError.

    room: a folder where a pickle's tensors fit; None: the one for temporary files.
    """
    if path.name.removesuffix(INDEX).endswith(PICKLES) and path.name.endswith(INDEX):
        index = weight_map(path, PICKLES)
        for shard in sorted(set(index.values())):
            yield from ((name, tensor) for name, tensor in published_tensors(path.with_name(shard), room)
                        if index.get(name) == shard)
        return
    if path.suffix not in PICKLES:
        yield from checkpoint.views(checkpoint.stored_tensors(path))
        return
    with tempfile.TemporaryDirectory(prefix=".dailies-unpickle-", dir=room) as folder:
        target = Path(folder) / "model.safetensors"
        unpickle(path, target)
        yield from checkpoint.views(checkpoint.stored_tensors(target))      # the system keeps what is mapped


def unpickle(path: Path, target: Path) -> None:
    """The pickle's tensors as safetensors, by a process without our credentials that the kernel shuts in.

    target: a file that is not there yet.  Raises CheckpointError.
    """
    environment = child_environment(target.parent)
    if path.exists() and not path.is_file():            # a pipe would be waited for, a device read without end
        raise CheckpointError(f"{path} is no regular file; a pickle of weights is needed there")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(target, "wb", opener=lambda name, _: os.open(name, flags, 0o600)) as made, \
            tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors, sandbox.undumpable():
        child = subprocess.run([sys.executable, sandbox.__file__, "dailies.jobs.unpickle", path.absolute(),
                                str(made.fileno())],
                               env=environment, cwd=target.parent, stdin=subprocess.DEVNULL, stdout=out, stderr=errors,
                               pass_fds=[made.fileno()], start_new_session=True)
        said, complaint = (end_of_text(file) for file in (out, errors))
    for sentence in said.splitlines():
        warn_once(sentence)
    if child.returncode == 2:
        raise CheckpointError(" ".join(complaint.splitlines()))
    if child.returncode:
        raise CheckpointError(f"{path}: the process that reads it ended with {child.returncode}. Is there enough "
                              f"memory, and disk for its tensors? {complaint[-300:]}")


def child_environment(home: Path) -> dict[str, str]:
    """Of the process that reads a pickle: nothing that is secret; Python's libraries are where they are for us."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    libraries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)
                 if Path(entry).name in ("site-packages", "dist-packages")]
    # what pip install --user has put below the home, which is another
    if site.ENABLE_USER_SITE:
        kept["PYTHONUSERBASE"] = site.getuserbase()
    return kept | {"HOME": str(home), "PYTHONPATH": os.pathsep.join([str(HOME), *libraries]), "PYTHONSAFEPATH": "1",
                   # a thread for each of many cores takes memory, of which there is little, and reading needs none
                   "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                   "PYTHONDONTWRITEBYTECODE": "1"}


def end_of_text(file: BinaryIO) -> str:
    """The beginning of what a process has said, which may be anything."""
    file.seek(0)
    return "".join(char if char.isprintable() or char == "\n" else "?"
                   for char in file.read(SAID_BYTES).decode(errors="replace")).strip()


@cache
def warn_once(sentence: str) -> None:
    say(f"note: pickles are read by a process that is not shut in as it should be: {sentence}", stream=sys.stderr)


def quantized_part(card: ModelCard, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """With the weights of the blocks' linear layers in INT8, a scale per row: the names are those of model/turbo.py."""
    dit = _described(card, "dit")
    if dit.new is None:
        raise UsageError(f"--precision int8 is not for {card.name}; leave it out")
    with torch.device("meta"):
        wanted = {f"{place}.weight" for place, _ in turbo.linears_of_blocks(dit.new())}
    table = keys.table_of(tensors, dit.tables)
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if table.ours(name) in wanted:
            layer = name.removesuffix("weight")
            made[f"{layer}int8_weight"], made[f"{layer}scale"] = quantize_rows(tensor.float())
        else:
            made[name] = tensor
    if len(made) != len(tensors) + len(wanted):
        raise CheckpointError(f"{path}: {len(made) - len(tensors)} of the {len(wanted)} layers to be INT8 have a "
                              "weight; are they INT8 already? Then leave --precision out")
    return made


def write_shards(folder: Path, target: str, tensors: Mapping[str, Tensor]) -> dict[str, Path]:
    """The tensors as one file, or as shards with their index; what was written, by its name below the output.

    Raises CheckpointError for NaN and infinity.
    """
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"{target}: NaN or infinity in {listed(broken)}; is the file damaged?")
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(map(tensor_bytes, shards[-1].values())) + tensor_bytes(tensor) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    stem = target.removesuffix(".safetensors")
    names = [target] if len(shards) == 1 else [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
                                               for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        checkpoint.save(folder / name, shard)
    files = {name: folder / name for name in names}
    if len(shards) > 1:
        where = {tensor: PurePosixPath(name).name for name, shard in zip(names, shards, strict=True)
                 for tensor in shard}
        index = folder / (target + INDEX)
        index.write_text(jsonlib.dumps({"metadata": {}, "weight_map": where}, indent=1))
        files[target + INDEX] = index
    return files


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def check_converted(card: ModelCard, part: FoundPart, folder: Path) -> None:
    """That the model which the card describes can be loaded from what was written.  Raises CheckpointError."""
    path, config = folder / part.target, part.source.with_name("config.json")
    _described(card, part.kind).check(path if path.is_file() else folder / (part.target + INDEX),
                                     config if config.is_file() else None)


def _described(card: ModelCard, kind: str) -> ModelPart:
    """By its family; experts are all alike."""
    return next(part for part in family_of(card).parts(card) if part.kind == kind)


def refuse_links_out(parts: list[FoundPart], path: Path) -> None:
    """Raises CheckpointError where a folder's weights are links to what lies elsewhere. A file that was named itself
    may be a link, but not the shards that it names.
    """
    for part in parts:
        files = [part.source] if path.is_dir() else []
        if part.source.name.endswith(INDEX):
            kinds = PICKLES if part.source.name.removesuffix(INDEX).endswith(PICKLES) else (".safetensors",)
            files += [part.source.with_name(shard) for shard in sorted(set(weight_map(part.source, kinds).values()))]
        for file in files:
            with weights_file(file) as opened:
                refuse_outside(opened, file, path if path.is_dir() else path.parent)


def small_files(layout: Layout, folder: Path) -> dict[str, bytes]:
    """The tokenizer, and the config of a text encoder that is a folder, by their names in the output: what was checked
    is what is published.

    Raises CheckpointError for what is no regular file in that folder, larger than such files are, or not of its kind.
    """
    found = {}
    for part in (*filter(None, [layout.tokenizer]),
                 *(part for part in layout.parts if not part.endswith(".safetensors"))):
        beside = sorted(file.name for file in (folder / part).glob("*")
                        if file.suffix in SMALL_KINDS and not file.name.endswith(INDEX))
        if others := [name for name in beside if name not in COPIED]:
            say(f"note: not copied from {folder / part}, since no model has files of these names: {listed(others)}",
                stream=sys.stderr)
        for name in beside:
            if name in COPIED:
                found[f"{part}/{name}"] = checked(folder / part / name, folder)
    return found


def checked(path: Path, folder: Path) -> bytes:
    """Raises CheckpointError for what is not a table in JSON, or SentencePiece's model."""
    data = read_small(path, SMALL_BYTES, inside=folder)
    if path.suffix == ".json":
        if not isinstance(json_in(data, path), dict):
            raise CheckpointError(f"{path} must be a JSON table, as such a file of a model is. Fetch it again")
    elif not data.startswith(b"\n"):                    # its first field, the pieces
        raise CheckpointError(f"{path} must be a SentencePiece model. Fetch it again")
    return data


def room_beside(store: Store) -> Path | None:
    """A folder on the disk that the weights go to; None, the one for temporary files, where they go to a bucket."""
    root = getattr(store, "root", None)
    return next((folder for folder in (root, *root.parents) if folder.is_dir()), None) if root is not None else None


def publish(store: Store, name: str, made: bytes | Path, source: Path) -> None:
    """What is there already is replaced, unless it is the source itself."""
    target = getattr(store, "root", None)
    if target is not None and (Path(target) / name).exists() and (Path(target) / name).samefile(source):
        return
    store.put(name, made)
