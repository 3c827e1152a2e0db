"""The images that rows name: where each lies, what it is, and its bytes, from a folder or a bucket.

A name is a path under the folder of the manifest that has it, or s3://BUCKET/KEY in the manifest's own bucket or below
a prefix that was allowed: who writes a manifest is not whose credentials read for it. Nothing above the folder is
opened, whatever links lie in it, and nothing hidden. A machine that renders reads the image from where it lies.
"""

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from dailies.actors.image_file import ALLOWED, MAX_IMAGE_BYTES, ImageSize, examine
from dailies.actors.image_parts import ImageError
from dailies.pipeline.store import NoAccess, NotFound, S3Store, Store, TooLarge, open_store, plain_uri
from dailies.pipeline.store.beneath import FileTooLong, Unfit, read_below

IN_BUCKET = re.compile(r"s3://[\w.-]{3,255}/.+", re.ASCII | re.DOTALL)
MAX_KEY_BYTES = 1024                    # S3's own limit
READERS = 16                            # images read at a time: bounds memory, too
ALLOWED_IMAGE = (f"{ALLOWED}, as a path under the manifest's folder, or s3:// in the manifest's bucket or below a "
                 "prefix of --allow-images; nothing hidden")

stores: dict[str, Store] = {}           # by bucket; for as long as the process lives
opening = Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundImage:
    uri: str                            # an absolute path without links, or s3://
    sha256: str                         # of the file's bytes
    size: ImageSize


def folder_of(file: str) -> str:
    """Of a manifest's file: what the paths in it begin at."""
    return file.rpartition("/")[0] if file.startswith("s3://") else str(Path(file).parent)


def find_images(names: Sequence[tuple[str, str]], allowed: Sequence[str] = ()) -> list[FoundImage | ImageError]:
    """Each image, read once, or what is the matter with it.  names: folder or s3:// prefix of the manifest; the cell.

    allowed: s3:// prefixes below which images may lie besides.
    Raises StoreError for a store that does not answer: no row is to blame for that.
    """
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda name: find_image(name[0], name[1], allowed), names)) if names else []


def find_image(folder: str, name: str, allowed: Sequence[str] = ()) -> FoundImage | ImageError:
    try:
        uri = locate_image(folder, name, allowed)
        data = read_image(uri, folder)
        return FoundImage(uri=uri, sha256=hashlib.sha256(data).hexdigest(), size=examine(data))
    except ImageError as error:
        return error


def locate_image(folder: str, name: str, allowed: Sequence[str] = ()) -> str:
    """What `name` means in a manifest in `folder`.  Raises ImageError for what is outside it, or hidden."""
    name = plain_uri(name)
    if name.startswith("s3://"):
        if not IN_BUCKET.fullmatch(name):
            raise ImageError("not s3://BUCKET/KEY")
        parts = name.split("/")[3:]
        if (prefix := next((prefix for prefix in allowed if is_below(name, prefix)), None)) is None:
            refuse_foreign(folder, name)
        else:                                           # the prefix itself may be hidden: a person has named it
            parts = name.removeprefix(plain_uri(prefix).rstrip("/")).split("/")
        if {".", ".."} & set(parts):                    # some servers take own/../other for another bucket
            raise ImageError("a key with . or .. in it")
        refuse_hidden(parts)
        return refuse_long_key(name)
    if "://" in name or name.lower().startswith("file:"):
        raise ImageError("neither a path nor s3://")
    if folder.startswith("s3://"):
        if {"", ".", ".."} & set(name.split("/")):
            raise ImageError("outside the manifest's folder")
        refuse_hidden(name.split("/"))
        return refuse_long_key(f"{folder.rstrip('/')}/{name}")
    base = Path(folder).resolve()                       # a folder may be called ~
    try:
        path = (base / name).resolve()
    except (OSError, RuntimeError) as error:            # a link to itself; a name too long
        raise ImageError(f"no such file: {getattr(error, 'strerror', None) or 'a link to itself'}") from error
    if not path.is_relative_to(base):
        raise ImageError("outside the manifest's folder")
    # a link may have another name than what it leads to
    refuse_hidden([*Path(name).parts[len(base.parts) if Path(name).is_relative_to(base) else 0:],
                   *path.relative_to(base).parts])
    return str(path)


def refuse_long_key(uri: str) -> str:
    """A store answers a longer one as it answers trouble of its own, which would be every row's."""
    if (num_bytes := len(uri.split("/", 3)[3].encode(errors="surrogatepass"))) > MAX_KEY_BYTES:
        raise ImageError(f"a key of {num_bytes:,} bytes; S3 allows {MAX_KEY_BYTES:,}")
    return uri


def is_below(uri: str, prefix: str) -> bool:
    """Of s3:// URIs; a prefix ends where a folder does."""
    prefix = plain_uri(prefix).rstrip("/")
    return uri.startswith(f"{prefix}/") and not {"", ".", ".."} & set(uri.removeprefix(f"{prefix}/").split("/"))


def refuse_foreign(folder: str, name: str) -> None:
    """Raises ImageError for an s3:// image that the manifest's author may not have read for him."""
    bucket = name.removeprefix("s3://").partition("/")[0]
    own = folder.removeprefix("s3://").partition("/")[0] if folder.startswith("s3://") else None
    if bucket != own:
        where = "of a manifest on a disk" if own is None else f"of a manifest in s3://{own}"
        raise ImageError(f"an s3:// image {where}, for which --allow-images s3://BUCKET/PREFIX has to allow it")


def refuse_hidden(parts: Sequence[str]) -> None:
    if any(part.startswith(".") and part not in (".", "..") for part in parts):
        raise ImageError("a hidden file, whose name or folder begins with a dot")


def read_image(uri: str, folder: str | None = None) -> bytes:
    """Raises ImageError for what is not there, or too large; StoreError for a store that does not answer.

    folder: of the manifest, below which no link is followed any more; None where the image's hash is known, and nothing
    else would be taken for it.
    """
    if not uri.startswith("s3://"):
        return read_file(Path(uri), None if folder is None else Path(folder).resolve())
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        return store_of(bucket).get(key, at_most=MAX_IMAGE_BYTES)
    except NotFound as error:
        raise ImageError("no such object") from error
    except (NoAccess, TooLarge) as error:
        raise ImageError(str(error)) from error


def read_file(path: Path, base: Path | None) -> bytes:
    """The file at `path`; links are followed above `base` alone, by default the folder that has it."""
    try:
        return read_below(path, path.parent if base is None else base, at_most=MAX_IMAGE_BYTES)
    except FileTooLong as error:
        raise ImageError(f"{error.num_bytes:,} bytes") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("no such file") from None
    except Unfit as error:                              # to open a pipe would wait for ever
        raise ImageError("not a file: " + error.what.rpartition(" is ")[2]) from None
    except OSError as error:
        raise ImageError(f"unreadable: {error.strerror}") from error


def store_of(bucket: str) -> Store:
    """One for all its images, whichever thread asks."""
    with opening:
        if bucket not in stores:
            stores[bucket] = found = open_store(f"s3://{bucket}")
            if isinstance(found, S3Store):
                _ = found.client                        # boto3 cannot make one in two threads at once
        return stores[bucket]
