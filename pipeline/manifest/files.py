"""Where a manifest's files are: on a disk, in a bucket, behind https://, on stdin, or typed as prompts.

In a folder every file that is one of ours is read, in its sub-folders too; what is not read is named. Folders called
name=value are columns, as Spark, pandas, Polars and DuckDB write them.
"""

import glob
import io
import json
import os
import re
import sys
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

from dailies.model.private import at_home
from dailies.pipeline.manifest.raw_bytes import MAX_MANIFEST_BYTES
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.run import layout
from dailies.pipeline.run.masking import names_a_secret
from dailies.pipeline.store import open_store

_FORMATS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl",
            ".ndjson": "jsonl", ".json": "json", ".txt": "txt"}
SUFFIXES = ", ".join(_FORMATS)
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
# data that is not read: of a folder with some of it, no night is made without asking
OTHER_DATA = (".xlsx", ".xls", ".ods", ".arrow", ".feather", ".ipc", ".orc", ".avro", ".pkl", ".pickle", ".npy", ".npz")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")             # the first frames of rows, mostly
NO_ROWS = re.compile(r"(readme|licen[sc]e|notice|changelog|requirements|copying|dataset_infos?)\b.*", re.I)
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
STDIN, TYPED = "-", "--prompt"
SECRETS = "as they are called like keys or credentials (to read one as rows, name the file itself)"
_LISTED = 20
_MAX_DEPTH = 32                      # of folders in a manifest's folder
CONNECT_S = 30.0
SECRET = re.compile(r"://[^/\s]*@|[?&](X-Amz-\w+|AWSAccessKeyId|Signature|sig|token|key)=", re.I)


@dataclass(frozen=True, kw_only=True)
class ManifestFile:
    name: str                       # as a person knows it
    format: str                     # a value of _FORMATS, or "" for a suffix that is not there
    open: Callable[[], io.BufferedReader | io.BytesIO]     # the bytes as they lie there; can be sought in
    partition: dict[str, str | None] = field(default_factory=dict)     # columns that its folders are called by


@dataclass(kw_only=True)
class Found:
    """What there is of a manifest, and what lies beside it and is not read."""

    files: list[ManifestFile] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)   # name and reason
    unreadable: list[str] = field(default_factory=list)                # data of other formats

    def notes(self) -> list[str]:
        """What is not read, by reason, for a person."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.passed_over:
            by_reason.setdefault(reason, []).append(name)
        return [f"not read, {reason}: {_listed(names)}" for reason, names in by_reason.items()]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more + (f" ({len(names):,} in all)" if len(names) > 3 else "")


def find_files(uri: str, base: Path | None = None) -> Found:
    """The manifest's files in order of name: one file, those of a folder and its sub-folders, or those a glob matches.

    base: where folders called name=value begin to be columns of a single file; where it lies itself, unless it is said.

    uri: a local path, s3://bucket/key (s3a:// is the same), https:// of one file, or "-" for stdin.  Of a folder or
    glob only files whose suffix is known are taken; names that begin with "." or "_", and images, are not mentioned.
    Raises FileNotFoundError where there is none, or where data of another format lies beside them; StoreError for a
    bucket.
    """
    scheme, is_uri, rest = uri.partition("://")
    if uri == STDIN:
        return Found(files=[from_stdin()])
    if is_uri and scheme.lower() in ("s3", "s3a"):
        found = _in_bucket(f"s3://{rest}")
    elif is_uri and scheme.lower() == "https":
        return Found(files=[from_web(uri)])
    elif is_uri and not Path(uri).exists():
        raise FileNotFoundError(f"a manifest is a local path, s3://BUCKET/KEY, https:// of one file, or - for stdin, "
                                f"and not {shown(scheme)}://")
    else:
        found = _on_disk(uri, base)
    if found.unreadable:
        raise FileNotFoundError(f"data of formats that are not read: {_listed(found.unreadable)}; write it as Parquet "
                                "or CSV, or name the files to read, as a glob")
    if not found.files:
        is_folder = at_home(uri).is_dir()
        missing = f"a folder without a file in it that ends in {SUFFIXES}" if is_folder else "no such file"
        raise FileNotFoundError("; ".join([missing, *found.notes()]))
    return found


def common_folder(uris: Sequence[str]) -> Path | None:
    """What the files lie in that a shell made of a glob."""
    paths = [at_home(uri).absolute() for uri in uris]
    return Path(os.path.commonpath([path.parent for path in paths])) if all(path.is_file() for path in paths) else None


def _on_disk(uri: str, base: Path | None) -> Found:
    path = at_home(uri)
    if path.is_file():
        parts = path.absolute().parent.relative_to(base).parts if base else ()
        found = Found(files=[_local(path, partition_of(parts))])
        _say_lost_columns(base or path.parent, found)
        return found
    if path.is_dir():
        return _sorted(path, _walked(path))
    if path.exists():
        raise FileNotFoundError("not a file: what comes through a pipe is read from stdin, as -")
    matches = sorted(_globbed(path))
    base = Path(*_fixed(path.parts)) if _fixed(path.parts) else Path()
    found = _sorted(base, [match for match in matches if match.is_file()])
    holding = {folder for file in found.files for folder in (Path(file.name), *Path(file.name).parents)}
    for match in matches if path.name != "**" else ():
        if match.is_dir() and match.name[0] not in "._" and match not in holding:
            found.passed_over.append((str(match), "folders"))
    _say_lost_columns(base, found)
    return found


def _fixed(parts: Sequence[str]) -> list[str]:
    """Of a glob's parts those before the first that matches."""
    return list(parts[:next((at for at, part in enumerate(parts) if glob.has_magic(part)), len(parts))])


def _globbed(pattern: Path) -> list[Path]:
    """What a glob matches. "**" goes into no link: two that lead back to where they lie would make it endless."""
    parts = pattern.parts
    if "**" not in parts:
        return list(map(Path, glob.glob(str(pattern))))
    at = parts.index("**")
    bases = map(Path, glob.glob(str(Path(*parts[:at])))) if at else [Path()]
    return [path for base in bases if base.is_dir() for path in _walked(base)
            if _matches(list(path.relative_to(base).parts), list(parts[at:]))]


def _walked(base: Path) -> list[Path]:
    """All files below a folder, but what is hidden, and what a run has made."""
    paths = []
    for folder, inner, names in os.walk(base):
        here = Path(folder)
        if len(here.parts) - len(base.parts) > _MAX_DEPTH:
            raise FileNotFoundError(f"folders that lie more than {_MAX_DEPTH} deep in each other; name the files to "
                                    "read")
        if here != base and layout.RUN in names and {layout.LEDGER, layout.CLIPS} & {*inner}:
            inner.clear()
            paths.append(here)
            continue
        linked = [name for name in inner if (here / name).is_symlink()]
        paths += [here / name for name in linked]
        inner[:] = [name for name in inner if name[0] not in "._" and name not in linked]
        paths += [here / name for name in names]
    return sorted(paths)


def _sorted(base: Path, paths: Iterable[Path]) -> Found:
    """Each path to where it belongs."""
    found, root = Found(), base.resolve()
    # of a glob a folder on the way may be a link, too; a folder is asked once for all its files
    is_inside = cache(lambda path: path.resolve().is_relative_to(root))
    for path in paths:
        kind = _kind(path.relative_to(base).parts)
        if kind == "silent":
            continue
        if path.is_dir():
            reason = "links to folders" if path.is_symlink() else "folders of runs"
            found.passed_over.append((str(path), reason))
        elif not path.is_file():
            found.passed_over.append((str(path), "no files"))
        elif not is_inside(path if path.is_symlink() else path.parent):
            found.passed_over.append((str(path), "links that lead out of the folder (name the file itself to read it)"))
        elif kind == "ours":
            found.files.append(_local(path, partition_of(path.relative_to(base).parts[:-1])))
        elif kind == "data":
            found.unreadable.append(str(path))
        else:
            found.passed_over.append((str(path), SECRETS if kind == "secret" else "no format of ours"))
    return found


def _kind(parts: Sequence[str]) -> str:
    """Of a file below a folder, by its name: ours, data, secret, other, or silent for what nobody misses."""
    name = parts[-1]
    suffix, compression = suffixes(name)
    if any(part[0] in "._" and "=" not in part for part in parts if part) or suffix == ".crc" or suffix in IMAGES:
        return "silent"
    if any(names_a_secret(part) for part in parts if "=" not in part):
        return "secret"
    if NO_ROWS.fullmatch(name) and suffix not in (".parquet", ".csv", ".tsv", ".jsonl"):
        return "other"
    if suffix in _FORMATS:
        return "ours"
    return "data" if suffix in OTHER_DATA or compression and not suffix else "other"


def suffixes(name: str) -> tuple[str, str]:
    """What a name says of the format and of the compression: m.csv.gz is (".csv", ".gz")."""
    path = PurePosixPath(name.lower())
    if path.suffix in COMPRESSIONS:
        return PurePosixPath(path.stem).suffix, path.suffix
    return path.suffix, ""


def format_of(name: str) -> str:
    return _FORMATS.get(suffixes(name)[0], "")


def partition_of(folders: Iterable[str]) -> dict[str, str | None]:
    """The columns in folders called name=value; a later one of the same name counts."""
    pairs = (folder.partition("=") for folder in folders)
    return {unquote(name): None if value == NO_VALUE else unquote(value)
            for name, sign, value in pairs if name and sign}


def _say_lost_columns(folder: Path, found: Found) -> None:
    """Folders called name=value above what was given are no columns."""
    if lost := partition_of(folder.parts):
        said = ", ".join(f"{name}={value}" for name, value in lost.items())
        found.passed_over.append((said, "as what is read begins below (give the folder above to have it as a column)"))


def _local(path: Path, partition: dict[str, str | None] | None = None) -> ManifestFile:
    return ManifestFile(name=str(path), format=format_of(path.name), open=lambda: path.open("rb"),
                        partition=partition or {})


def _in_bucket(uri: str) -> Found:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    parts = key.rstrip("/").split("/")
    store, names = open_store("/".join(["s3://" + bucket, *parts[:-1]])), parts[-1:]
    found, patterns = Found(), []
    if key == "" or key.endswith("/") or names[0] not in (info.key for info in store.list(names[0])):
        fixed = _fixed(parts)
        patterns = parts[len(fixed):]                  # a glob: what lies under its fixed beginning
        store = open_store("/".join(["s3://" + bucket, *fixed]) if patterns else uri.rstrip("/"))
        names = sorted(info.key for info in store.list(""))
        names = [name for name in names if not patterns or _matches(name.split("/"), patterns)]

    def remote(name: str, partition: dict[str, str | None]) -> ManifestFile:
        return ManifestFile(name=store.uri_of(name), format=format_of(name), partition=partition,
                            open=lambda: io.BytesIO(store.get(name, at_most=MAX_MANIFEST_BYTES)))

    if names == parts[-1:] and not patterns and not key.endswith("/") and key:
        found.files.append(remote(names[0], {}))
        _say_lost_columns(Path(*parts[:-1]), found)
        return found
    for name in names:
        kind = _kind(name.split("/")) if not name.endswith("/") else "silent"           # a folder's own object
        if kind == "ours":
            found.files.append(remote(name, partition_of(name.split("/")[:-1])))
        elif kind == "data":
            found.unreadable.append(store.uri_of(name))
        elif kind != "silent":
            found.passed_over.append((store.uri_of(name), SECRETS if kind == "secret" else "no format of ours"))
    return found


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """Whether a key, cut at its slashes, fits a glob cut the same way; "**" stands for any number of folders.

    Takes parts x patterns comparisons: pattern by pattern, it follows how many parts may have been used up so far.
    """
    used = {0}
    for pattern in patterns:
        if pattern == "**":
            used = set(range(min(used), len(parts) + 1))
        else:
            used = {at + 1 for at in used if at < len(parts) and fnmatchcase(parts[at], pattern)}
        if not used:
            return False
    return len(parts) in used


def from_stdin() -> ManifestFile:
    """All that comes on stdin, in the format that its beginning shows.  Raises FileNotFoundError for a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        raise FileNotFoundError("- reads what another program writes: ... | dailies render - --out URI")
    data = sys.stdin.buffer.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise FileNotFoundError(f"more than {MAX_MANIFEST_BYTES:,} bytes on stdin; write them to a file")
    return ManifestFile(name=STDIN, format="", open=lambda: io.BytesIO(data))


def from_prompts(prompts: Sequence[str]) -> ManifestFile:
    """Prompts that were typed, one row each."""
    data = typed_rows(prompts)
    return ManifestFile(name=TYPED, format="jsonl", open=lambda: io.BytesIO(data))


def typed_rows(prompts: Sequence[str]) -> bytes:
    """As JSON lines: the same bytes, and so the same manifest, wherever they are read."""
    return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode()


def from_web(url: str) -> ManifestFile:
    """One file behind https://, fetched now.  Raises FileNotFoundError."""
    if SECRET.search(url):
        raise FileNotFoundError("an https:// address that carries a password or a signature, which would be written "
                                "into the run folder; download the file and give its path")
    try:
        with urllib.request.build_opener(HttpsOnly).open(url, timeout=CONNECT_S) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise FileNotFoundError("a web page and not a file; give the address of the raw file")
            data = answer.read(MAX_MANIFEST_BYTES + 1)
    except HTTPError as error:
        raise FileNotFoundError(f"the server says {error.code} {error.reason}") from None
    except (URLError, TimeoutError, ValueError) as error:
        raise FileNotFoundError(f"not to be fetched: {getattr(error, 'reason', error)}") from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise FileNotFoundError(f"more than {MAX_MANIFEST_BYTES:,} bytes")
    return ManifestFile(name=url, format=format_of(unquote(urlsplit(url).path)), open=lambda: io.BytesIO(data))


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows no redirection that gives up what https:// promises."""

    def redirect_request(self, request, answer, code, message, headers, url):
        if not url.lower().startswith("https://"):
            raise URLError(f"it leads on to {urlsplit(url).scheme}://, which is not https://")
        return super().redirect_request(request, answer, code, message, headers, url)
