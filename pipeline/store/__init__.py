"""Where a run lives: `open_store` gives a folder or a bucket, behind the one interface that base.py describes."""

from collections.abc import Callable
from pathlib import Path

from dailies.pipeline.store.base import NoAccess, NotFound, ObjectInfo, Store, StoreError, TooLarge, not_a_store
from dailies.pipeline.store.folder import FolderStore
from dailies.pipeline.store.s3 import S3Store

__all__ = ["FolderStore", "NoAccess", "NotFound", "ObjectInfo", "S3Store", "Store", "StoreError", "TooLarge",
           "open_store", "plain_uri", "register_store"]

# by scheme, what makes the store of a URI; none of them touches a disk or the network
OPENERS: dict[str, Callable[[str], Store]] = {"file": FolderStore.at, "s3": S3Store.at}


def register_store(scheme: str, opener: Callable[[str], Store]) -> None:
    """Have `open_store` know URIs SCHEME://...; workers get the store itself, pickled, and import its module.

    opener: makes the store of a URI and touches nothing; raises StoreError.
    Raises ValueError for a scheme that is taken, or could not be told from another.
    """
    if scheme in OPENERS or not scheme.isalnum() or scheme != scheme.lower():
        raise ValueError(f"a store's scheme must be small letters and digits, and not {', '.join(OPENERS)}; "
                         f"got {scheme!r}")
    OPENERS[scheme] = opener


def open_store(uri: str | Path) -> Store:
    """The store at a local folder, s3://bucket/prefix or a URI of another scheme that is known; touches nothing.

    s3a://, as Spark and Hadoop write it, is s3://, in capitals or not.  Raises StoreError for any other URI.
    """
    text = plain_uri(str(uri))
    scheme, colon, _ = text.partition("://")
    if text and not colon and not text.lower().startswith("s3:"):
        return FolderStore(Path(text))
    if not colon or scheme.lower() not in OPENERS:
        raise not_a_store(text)
    return OPENERS[scheme.lower()](text)


def plain_uri(uri: str) -> str:
    """An S3 URI in the one spelling that the rest knows: s3a:// and S3:// are s3://; any other text as it is."""
    scheme, colon, rest = uri.partition("://")
    return f"s3://{rest}" if colon and scheme.lower() in ("s3", "s3a", "s3n") else uri
