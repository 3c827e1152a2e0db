"""The images that rows name: where each lies, what it is, and its bytes, from a folder or a bucket.

A name is s3://BUCKET/KEY or a path under the folder of the manifest that has it; nothing above that folder is opened,
whatever links lie in it. A machine that renders reads the image from where it lies.
"""

import hashlib
import re
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from actors.image_file import ALLOWED, MAX_BYTES, ImageError, ImageSize, examine
from model.private import at_home
from pipeline.store import NoAccess, NotFound, S3Store, TooLarge, open_store

READERS = 16                            # images read at a time: bounds memory, too
ALLOWED_IMAGE = f"{ALLOWED}, as a path under the manifest's folder or s3://BUCKET/KEY"

stores: dict[str, S3Store] = {}         # by bucket; for as long as the process lives
opening = Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundImage:
    uri: str                            # an absolute path without links, or s3://
    sha256: str                         # of the file's bytes
    size: ImageSize


def folder_of(file: str) -> str:
    """Of a manifest's file: what the paths in it begin at."""
    return file.rpartition("/")[0] if file.startswith("s3://") else str(Path(file).parent)


def find_images(names: Sequence[tuple[str, str]]) -> list[FoundImage | ImageError]:
    """Each image, read once, or what is the matter with it.  names: folder or s3:// prefix of the manifest; the cell.

    Raises StoreError for a store that does not answer: no row is to blame for that.
    """
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(find_image, *zip(*names, strict=True))) if names else []


def find_image(folder: str, name: str) -> FoundImage | ImageError:
    try:
        uri = locate(folder, name)
        data = read_image(uri)
        return FoundImage(uri=uri, sha256=hashlib.sha256(data).hexdigest(), size=examine(data))
    except ImageError as error:
        return error


def locate(folder: str, name: str) -> str:
    """What `name` means in a manifest in `folder`.  Raises ImageError for what is outside it."""
    if name.startswith("s3://"):
        return name
    if "://" in name or name.lower().startswith("file:"):
        raise ImageError("neither a path nor s3://")
    if folder.startswith("s3://"):
        if {"", ".", ".."} & set(name.split("/")):
            raise ImageError("outside the manifest's folder")
        return f"{folder.rstrip('/')}/{name}"
    base = at_home(folder).resolve()
    try:
        path = (base / name).resolve()
    except (OSError, RuntimeError) as error:            # a link to itself; a name too long
        raise ImageError(f"no such file: {error}") from error
    if not path.is_relative_to(base):
        raise ImageError("outside the manifest's folder")
    return str(path)


def read_image(uri: str) -> bytes:
    """Raises ImageError for what is not there, or too large; StoreError for a store that does not answer."""
    if not uri.startswith("s3://"):
        return read_file(Path(uri))
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not re.fullmatch(r"[\w.-]{3,255}", bucket, re.ASCII) or not key:
        raise ImageError("not s3://BUCKET/KEY")
    try:
        return store_of(bucket).get(key, at_most=MAX_BYTES)
    except NotFound as error:
        raise ImageError("no such object") from error
    except (NoAccess, TooLarge) as error:
        raise ImageError(str(error)) from error


def read_file(path: Path) -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):             # to open a pipe would wait for ever
            raise ImageError("not a file")
        if found.st_size > MAX_BYTES:
            raise ImageError(f"{found.st_size:,} bytes")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("no such file") from None
    except OSError as error:
        raise ImageError(f"unreadable: {error.strerror}") from error


def store_of(bucket: str) -> S3Store:
    """One for all its images, whichever thread asks."""
    with opening:
        if bucket not in stores:
            stores[bucket] = open_store(f"s3://{bucket}")
            _ = stores[bucket].client                   # boto3 cannot make one in two threads at once
        return stores[bucket]
