"""What a submitted job brings: a small folder made for the occasion, our packages and, where it is local, the manifest.

Of that the files that its reader reads, and those images named by its rows that are images; nothing hidden, nothing
behind a link that leads out. It is listed before it goes.
"""

import glob
import io
import posixpath
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dailies import HOME
from dailies.actors.image_parts import ImageError
from dailies.jobs.progress import printable, say
from dailies.jobs.settings import RenderJob, parsed_map
from dailies.jobs.usage import UsageError
from dailies.model.private import at_home
from dailies.pipeline.manifest.files import IMAGES, STDIN, ManifestFile, find_files, from_stdin, typed_rows
from dailies.pipeline.manifest.raw_bytes import unfolded
from dailies.pipeline.manifest.text import sniffed
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.run.masking import names_a_secret
from dailies.pipeline.store.beneath import FileTooLong, Unfit, read_below

if TYPE_CHECKING:
    from dailies.pipeline.manifest.manifest import Manifest

PACKAGES_SHIPPED = ("kernels", "model", "actors", "pipeline", "jobs")
SHIPPED = (".py", ".safetensors", ".json", ".yaml", ".model")          # what our packages are made of
LISTED_NAMES = 100              # of what is sent
MAX_PARCEL_BYTES = 100_000_000  # Ray's dashboard takes no larger upload


def homes() -> dict[str, Path]:
    """Where our packages lie, in a checkout or installed, by the folder in which the cluster imports them."""
    return {"dailies": HOME / "dailies"} | {
        f"dailies/{package}": Path(import_module(f"dailies.{package}").__path__[0]) for package in PACKAGES_SHIPPED}


def pack_parcel(folder: Path, manifest: str, render_args: list[str]) -> list[str]:
    """Fill `folder` with what the cluster needs: our packages, the manifest, its images; says on stderr what that is.

    Each file is read once: the bytes that were checked are those that are sent, whatever takes its place meanwhile.
    Returns manifest and arguments as the job, whose working folder this is, has to name them.
    Raises UsageError for a manifest that is not there, or more than MAX_PARCEL_BYTES, ManifestError for one that cannot
    be read; nothing is copied then.
    """
    parcel = Parcel()
    for package, home in homes().items():
        for name, file in files_under(home):
            if file.suffix in SHIPPED:
                parcel.read(f"{package}/{name}", file, home.resolve())
    ours, named = parcel.sizes(), manifest
    if "://" not in manifest:
        named = pack_manifest(parcel, at_home(manifest), mapping_in(render_args))
    tell_shipped(ours, {name: size for name, size in parcel.sizes().items() if name not in ours})
    for name, data in parcel.files.items():
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)
    return [named, *render_args]


class Parcel:
    """What is sent: names in the job's working folder and bytes, together never more than MAX_PARCEL_BYTES."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def sizes(self) -> dict[str, int]:
        return {name: len(data) for name, data in self.files.items()}

    def read(self, name: str, path: Path, base: Path) -> None:
        """Add the file at `path`; links may lead to another below `base`.  Raises UsageError if it is unreadable."""
        room = MAX_PARCEL_BYTES - sum(self.sizes().values())
        if not (real := path.resolve()).is_relative_to(base):
            raise UsageError(f"{path} is a link that leads out of {base}, and what it leads to is not sent. Put the "
                             "file itself there, or name the files that are to be sent")
        try:
            data = read_below(real, base, at_most=room)     # from here on no link is followed
        except FileTooLong as error:
            raise too_much(self.sizes() | {name: error.num_bytes}) from None
        except (OSError, Unfit) as error:
            why = error.what if isinstance(error, Unfit) else error.strerror
            raise UsageError(f"{path} cannot be sent: {why}. Files must not change while they are sent") from None
        self.add(name, data)

    def add(self, name: str, data: bytes) -> None:
        refuse_too_much(self.sizes() | {name: len(data)})
        self.files[name] = data


def tell_shipped(ours: dict[str, int], theirs: dict[str, int]) -> None:
    def size(files: dict[str, int]) -> str:
        return f"{len(files):,} file{'' if len(files) == 1 else 's'}, {sum(files.values()) / 1e6:,.1f} MB"

    say(f"sent to the cluster: dailies ({size(ours)})" + (f"; manifest and images ({size(theirs)}):" if theirs else ""),
        stream=sys.stderr)
    for name in sorted(theirs)[:LISTED_NAMES]:
        print(printable(f"  {name.removeprefix('manifest/')}"), file=sys.stderr)
    if len(theirs) > LISTED_NAMES:
        say(f"  and {len(theirs) - LISTED_NAMES:,} more", stream=sys.stderr)


@contextmanager
def one_manifest(job: RenderJob) -> Iterator[str]:
    """The job's manifest as one that can be shipped: prompts that were typed, and what comes on stdin, become a file.

    Raises UsageError for several, ManifestError for what cannot be read.
    """
    if isinstance(job.manifest, str) and job.manifest != STDIN:
        yield job.manifest
        return
    if job.manifest != STDIN and not job.prompt:
        raise UsageError("submit ships one manifest: a file, a folder or a glob; put the files into one folder")
    with tempfile.TemporaryDirectory(prefix="dailies-manifest-") as folder:
        if job.prompt:
            path, data = Path(folder, "prompts.jsonl"), typed_rows(job.prompt)
        else:
            with from_stdin().open() as stream:
                data = stream.read()
            content: io.BufferedReader = io.BufferedReader(cast(Any, unfolded(io.BytesIO(data))))
            path = Path(folder, f"stdin.{'parquet' if content.peek(4)[:4] == b'PAR1' else sniffed(content)}")
        path.write_bytes(data)
        yield str(path)


def mapping_in(render_args: list[str]) -> dict[str, str]:
    """What --map says, as render will read it."""
    return parsed_map([value for option, value in pairwise(render_args) if option == "--map"])


def pack_manifest(parcel: Parcel, source: Path, mapping: dict[str, str]) -> str:
    """Add a manifest's files and the images that its rows name; returns what it is called in the job's working folder.

    Raises UsageError, ManifestError.
    """
    from dailies.pipeline.manifest.manifest import Manifest

    named, base, files = local_manifest(source)
    held = {}
    for name, file in files.items():
        parcel.read(name, Path(file.name), base)
        held[name] = replace(file, open=partial(io.BytesIO, parcel.files[name]))
    add_images(parcel, Manifest.read(str(source), mapping=mapping, files=list(held.values())), held)
    return named


def local_manifest(source: Path) -> tuple[str, Path, dict[str, ManifestFile]]:
    """What a file, folder or glob is called in the job's working folder, what it lies below, its files by name there.

    Those are the files that the manifest's reader reads.  Raises UsageError where there is none.
    """
    try:
        found = find_files(str(source))
    except OSError as error:
        raise UsageError(f"no such manifest: {source} ({error}). Give a file, a folder, a glob or an s3:// "
                         "URI") from None
    if source.is_file():                                # its own name may be a link: what it leads to is meant
        return f"manifest/{source.name}", source.resolve().parent, {f"manifest/{source.name}": found.files[0]}
    if source.is_dir():
        base, named = source, f"manifest/{source.resolve().name}"
        inside = named
    else:
        base = Path(*takewhile(lambda part: not glob.has_magic(part), source.parts))
        named, inside = f"manifest/{source.relative_to(base)}", "manifest"
    files = {}
    for file in found.files:
        inner = Path(file.name).relative_to(base)
        if not any(part.startswith(".") for part in inner.parts):
            files[f"{inside}/{inner.as_posix()}"] = file
    return named, base.resolve(), files


def add_images(parcel: Parcel, read: "Manifest", shipped: dict[str, ManifestFile]) -> None:
    """Add the images under the manifest's folder that its rows name, by the name that each path has on the cluster.

    shipped: the manifest's own files, by their name there.  What is in a bucket, missing, hidden, outside the folder or
    no image stays behind: render says so.  Raises UsageError for an absolute path.
    """
    from dailies.actors.image_file import examine
    from dailies.pipeline.manifest.images import folder_of, locate_image, read_file

    there = {file.name: posixpath.dirname(name) for name, file in shipped.items()}
    ends = [first for _, first in read.files[1:]] + [read.table.num_rows]
    wanted: dict[str, tuple[Path, Path]] = {}           # the file, and what it lies below
    sizes = parcel.sizes()
    for (file, first), end in zip(read.files, ends, strict=True):
        for name in read.table["image"].slice(first, end - first).unique().drop_null().to_pylist():
            try:
                path = Path(locate_image(folder_of(file), name))
            except ImageError:
                continue
            inner = posixpath.normpath(name)
            if name.startswith("s3://") or inner.startswith("../") or not path.is_file():
                continue
            if posixpath.isabs(name):
                raise UsageError(f"{file}: the image {shown(name)} is an absolute path, and on the cluster that is "
                                 "another place. Give a path under the manifest's folder, or put it into the bucket")
            with suppress(OSError):                     # gone meanwhile
                sizes[key := f"{there[file]}/{inner}"] = path.stat().st_size
                wanted[key] = path, Path(folder_of(file)).resolve()
    refuse_too_much(sizes)                              # before they are read
    unfit, keys = [], []
    for key, (path, base) in wanted.items():
        try:
            data = read_file(path, base)
            examine(data)
        except ImageError:
            unfit.append(key)
            continue
        if any(names_a_secret(part) and Path(part).suffix.lower() not in IMAGES
               for part in (*posixpath.relpath(key, "manifest").split("/"), path.name)):
            keys.append(key)                            # a key may stand behind an image's first bytes
        else:
            parcel.add(key, data)
    for names, why in ((unfit, "no images"), (keys, "called like keys or credentials")):
        if names:
            said = f"not sent, because they are {why}: {', '.join(sorted(names)[:LISTED_NAMES])}"
            print(printable(said), file=sys.stderr)


def refuse_too_much(sizes: dict[str, int]) -> None:
    """Raises UsageError for more than the head takes.  sizes: bytes by name."""
    if sum(sizes.values()) > MAX_PARCEL_BYTES:
        raise too_much(sizes)


def too_much(sizes: dict[str, int]) -> UsageError:
    largest = max(sizes, key=sizes.__getitem__)
    return UsageError(f"what is shipped to the cluster must be at most {MAX_PARCEL_BYTES / 1e6:.0f} MB; this is "
                      f"{sum(sizes.values()) / 1e6:.0f} MB in {len(sizes):,} files, of which the largest is {largest} "
                      f"({sizes[largest] / 1e6:.0f} MB). Put the manifest, and the images that it names, into the "
                      "bucket and submit s3://BUCKET/PATH instead")


def files_under(folder: Path) -> list[tuple[str, Path]]:
    """A folder's files with their names in it; hidden ones, compiled Python and links that lead out are left out."""
    root = folder.resolve()
    files = [(path.relative_to(folder), path) for path in sorted(folder.rglob("*"))
             if path.is_file() and path.resolve().is_relative_to(root)]
    return [(name.as_posix(), path) for name, path in files
            if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)]
