"""Where a model's weights are: a folder in the published layout, found or fetched, complete, fingerprinted."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from dailies.model.card import Layout, ModelCard
from dailies.model.files import (
    INDEX,
    PICKLES,
    CheckpointError,
    first_line,
    listed,
    weight_map,
    weights_file,
    write_atomically,
)
from dailies.model.private import at_home, cache_folder, open_regular, private_folder

HUB_PATIENCE_S = 5.0                                    # for a size
SMALL_KINDS, SMALL_BYTES = (".json", ".model"), 64_000_000     # that lie beside the weights; the largest has 34 MB
MOST_BYTES = 200_000_000_000                            # of one file; the largest has 57 GB
CACHE_BYTES = 100_000_000
UNCHECKED_BYTES = 2**30                                 # that are hashed without a further look: a second or two
TEXT_ENCODER_SHARDS = "model.safetensors" + INDEX


def locate(weights: str | Path | None, card: ModelCard, fetch: Callable[[str, Path], Path] | None = None) -> Path:
    """The folder that holds the card's weights, complete.

    weights: a folder, `s3://bucket/prefix`, or None for the weights that come with dailies or, for a published model,
    the Hugging Face cache, or the hub itself.
    fetch: brings what is at a URI into a cache folder (dailies.pipeline.store.fetch.bring).
    Raises CheckpointError, naming what is missing and where it was looked for; and what fetch raises.
    """
    if weights is None:
        folder = card.folder or from_hub(card)
    elif "://" in str(weights):
        if fetch is None:
            raise CheckpointError(f"{card.name}: weights must be in a folder here; got {weights}. Copy them")
        folder = fetch(str(weights), cache_folder() / "weights")
    else:
        folder = at_home(weights)
        if folder.is_file() and folder.suffix in PICKLES:
            raise CheckpointError(f"{card.name}: {folder} is a pickle, and only safetensors are read at run time. "
                                  f"Convert once: dailies convert {folder} --model {card.name} --to FOLDER")
        if not folder.is_dir():
            raise CheckpointError(f"{card.name}: weights must be a folder in the published layout; {folder} is "
                                  f"{'a file' if folder.exists() else 'not there'}")
    complain_about_missing(card, folder)
    return folder


def weights_here(weights: str | Path | None, card: ModelCard) -> Path | None:
    """As `locate`, but nothing is fetched: None for weights in a bucket or on the hub, or that have to be converted."""
    if weights is None and card.folder is None:
        return in_hub_cache(card) if card.repo_id else None
    return None if "://" in str(weights) else locate(weights, card)


def complain_about_missing(card: ModelCard, folder: Path) -> None:
    missing = missing_files(card, folder)
    if not missing:
        return
    there = sorted(path.relative_to(folder).as_posix() for path in files_below(folder))
    pickles = [name for name in there if name.endswith(PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{card.name}: {folder} has {listed(pickles)}, but only safetensors are read at run time, and "
            f"{listed(missing)} missing. Convert once: dailies convert {folder} --model {card.name} --to FOLDER")
    known = {part for layout in card.layouts for part in layout.parts}
    others = [name for name in there if name.endswith(".safetensors") and name not in known
              and not any(name.startswith((f"{part}/", part.removesuffix(".safetensors") + "-")) for part in known)]
    ggufs = [name for name in there if name.endswith(".gguf")]
    advice = ""
    if card.as_published:
        beside = f"; there is {listed(others)}" if others else ""
        advice = f"{beside}. To have it, {card.fetched_by_hand()}"
    elif others:
        advice = (f". There is {listed(others)}, by other names than this model's: dailies convert FILE --model "
                  f"{card.name} --to FOLDER for each of them gives it its place there")
    elif ggufs:
        advice = (f". There is {listed(ggufs)}, quantised for llama.cpp and ComfyUI: fetch the .safetensors files "
                  "instead")
    raise CheckpointError(f"{card.name}: {folder} lacks {listed(missing)}{advice}")


def files_below(folder: Path, depth: int = 3, at_most: int = 10_000) -> Iterator[Path]:
    """For a message: regular files of a folder that may be anything, `/` too; not behind links, nor without end."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in islice(entries, at_most):
            if entry.is_file():
                yield Path(entry.path)
            elif depth > 1 and entry.is_dir(follow_symlinks=False):
                yield from files_below(Path(entry.path), depth - 1, at_most // 10)


def layout_in(card: ModelCard, folder: Path) -> Layout:
    """How the weights lie in the folder: of the card's layouts, the one of which the least is missing."""
    return min(card.layouts, key=lambda layout: len(missing_of(layout, folder)))


def missing_files(card: ModelCard, folder: Path) -> list[str]:
    """Names, relative to the folder, of the files that it lacks of the layout that it has most of."""
    return missing_of(layout_in(card, folder), folder)


def missing_of(layout: Layout, folder: Path) -> list[str]:
    missing = []
    for part in layout.parts:
        if is_file(part):
            missing += missing_shards(folder, part)
            continue
        if not (folder / part / "config.json").is_file():
            missing.append(f"{part}/config.json")
        if (folder / part / TEXT_ENCODER_SHARDS).is_file() or not any((folder / part).glob("*.safetensors")):
            missing += missing_shards(folder, f"{part}/model.safetensors")
    if layout.tokenizer and not (folder / layout.tokenizer / "tokenizer.json").is_file():
        missing.append(f"{layout.tokenizer}/tokenizer.json")
    return missing


def missing_shards(folder: Path, part: str) -> list[str]:
    """What is missing of a file, or of its shards if there is an index of them."""
    index = folder / (part + INDEX)
    if not index.is_file():
        return [] if (folder / part).is_file() else [part]
    beside = PurePosixPath(part).parent
    return [(beside / shard).as_posix() for shard in sorted(set(weight_map(index).values()))
            if not (index.parent / shard).is_file()]


def weights_files(card: ModelCard, folder: Path) -> dict[str, Path]:
    """Every file that decides what the model computes, by its name relative to the folder."""
    layout, files = layout_in(card, folder), []
    for part in layout.parts:
        stored = stored_at(folder, part)
        if stored.is_dir():
            files += [p for p in stored.glob("*") if p.suffix in (".safetensors", ".json")]
        elif stored.name.endswith(INDEX):
            files += [stored, *(stored.parent / shard for shard in set(weight_map(stored).values()))]
        else:
            files.append(stored)
    if layout.tokenizer:
        files += [p for p in (folder / layout.tokenizer).glob("*") if p.suffix in (".json", ".model")]
    return {p.relative_to(folder).as_posix(): p for p in sorted(files)}


def stored_at(folder: Path, part: str) -> Path:
    """The file or folder of a part of a layout, or the index of its shards where it is in shards."""
    index = folder / (part + INDEX)
    return index if is_file(part) and index.is_file() else folder / part


def is_file(part: str) -> bool:
    return part.endswith(".safetensors")


def fingerprint(files: Mapping[str, Path], check: Callable[[], None] | None = None) -> str:
    """SHA-256 over the sorted (name, SHA-256 of content); a file is read again only when size, time or inode differ.

    check: is called before the first is read, where there is much to read.
    Raises CheckpointError for what is no regular file, and what `check` raises.
    """
    cache = cache_folder() / "sha256.json"
    known: dict[str, str] = {}
    with suppress(OSError, ValueError, TypeError, RecursionError):      # no cache of ours: everything is read
        private_folder(cache.parent)
        with open_regular(cache) as file:
            known = dict(json.loads(file.read(CACHE_BYTES)))
    before, total = dict(known), hashlib.sha256()
    found = {name: identity(files[name]) for name in sorted(files)}
    unread = {name: num_bytes for name, (_, key, num_bytes) in found.items() if not isinstance(known.get(key), str)}
    for name, num_bytes in unread.items():
        check_size(files[name], num_bytes)
    if check is not None and sum(unread.values()) > UNCHECKED_BYTES:
        check()
    for name, (path, key, _) in found.items():
        if name in unread:
            with weights_file(path) as file:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{name}\0{known[key]}\n".encode())
    if known != before:
        with suppress(OSError):                         # a home that cannot be written costs time, not the run
            private_folder(cache.parent)
            write_atomically(cache, json.dumps(known).encode())
    return total.hexdigest()


def identity(path: Path) -> tuple[Path, str, int]:
    """The file itself, by which it is known, and its bytes.  Raises CheckpointError."""
    try:
        path = path.resolve()
        stat = path.stat()
    except (OSError, RuntimeError) as error:            # links in a circle are a RuntimeError before Python 3.13
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    return path, f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}", stat.st_size


def check_size(path: Path, num_bytes: int) -> None:
    """Before it is read to its end: a file that is all holes takes no disk, and hours.  Raises CheckpointError."""
    most = SMALL_BYTES if path.suffix in SMALL_KINDS else MOST_BYTES
    if num_bytes > most:
        raise CheckpointError(f"{path} has {num_bytes:,} bytes; a {path.suffix} file of a model has at most {most:,}")
    if path.suffix == ".safetensors":
        from dailies.model.checkpoint import read_header  # brings torch
        read_header(path)


def from_hub(card: ModelCard) -> Path:
    """The repository's snapshot from the Hugging Face cache; what the cache lacks is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if card.sources:
        raise CheckpointError(f"{card.name}: its weights are published in pieces: {card.fetched_by_hand()}")
    if card.repo_id is None:
        raise CheckpointError(f"{card.name}: no weights come with it; name their folder with --weights")
    if (folder := in_hub_cache(card)) is not None:
        return folder
    disable_progress_bars()
    try:
        return Path(snapshot_download(**hub_files(card)))
    except Exception as error:                          # the client raises many kinds: offline, gated, gone, disk full
        raise CheckpointError(
            f"{card.name}: the weights ({', '.join(hub_files(card)['allow_patterns'])}) are neither in the Hugging "
            f"Face cache {hub_folder()} nor could {card.repo_id} be downloaded ({type(error).__name__}: "
            f"{first_line(error)}). Download the repository and name its folder with --weights") from error


def hub_files(card: ModelCard) -> dict[str, Any]:
    """What to ask the hub for."""
    layout = card.layouts[0]
    wanted = [part if is_file(part) else f"{part}/*" for part in (*layout.parts, layout.tokenizer) if part]
    shards = [form for part in layout.parts if is_file(part)
              for form in (part + INDEX, part.removesuffix(".safetensors") + "-*-of-*.safetensors")]
    return dict(repo_id=card.repo_id, allow_patterns=wanted + shards, cache_dir=hub_folder(),
                ignore_patterns=[f"*{suffix}" for suffix in PICKLES])


def in_hub_cache(card: ModelCard) -> Path | None:
    """The repository's snapshot in the Hugging Face cache, if it is complete there."""
    from huggingface_hub import snapshot_download
    with suppress(OSError):                             # nothing of it in the cache
        folder = Path(snapshot_download(**hub_files(card), local_files_only=True))
        return None if missing_files(card, folder) else folder
    return None


def hub_folder() -> Path:
    """Where what the hub sends is kept: its own cache, but for a user without a home, whose ~ it would give up on."""
    from huggingface_hub.constants import HF_HUB_CACHE
    return cache_folder() / "hub" if HF_HUB_CACHE.startswith("~") else Path(HF_HUB_CACHE)


def hub_bytes(card: ModelCard) -> int | None:
    """What the hub would have to send; None where it does not say, or does not answer soon."""
    from huggingface_hub import HfApi
    ask = hub_files(card)
    try:
        found = HfApi().model_info(card.repo_id, files_metadata=True, timeout=HUB_PATIENCE_S).siblings or []
    except Exception:                                   # the client raises many kinds, and a size is not worth any
        return None
    return sum(file.size or 0 for file in found
               if any(fnmatch(file.rfilename, wanted) for wanted in ask["allow_patterns"])
               and not any(fnmatch(file.rfilename, ignored) for ignored in ask["ignore_patterns"])) or None
