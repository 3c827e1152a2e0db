"""The morning report of a run folder: one static folder, made from the bucket alone, that opens without a server.

index.html, and the page's own scripts and styles     the same for every run
data/head.js                                          figures, settings, and which files hold which rows and columns
data/<digest>.js                                      rows and columns; named by content, so what has not changed is
                                                      not written again, and a page that is open keeps what it has
Data are scripts that call one function: from a disk a page may load scripts, and no other kind of file.
"""

import hashlib
import json
import os
import posixpath
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pyarrow as pa

from dailies.pipeline.report.columns import BLOCK_ROWS, PAGE_ROWS, Sheet, sheet
from dailies.pipeline.report.figures import figures
from dailies.pipeline.report.rows import RunRows, missing_posters, one_table
from dailies.pipeline.run.layout import REPORT, SUCCESS, clip_key, poster_key
from dailies.pipeline.run.run_json import has, known_manifest
from dailies.pipeline.store import FolderStore, S3Store, Store, StoreError

PAGE = Path(__file__).parent / "page"   # index.html, styles and scripts, as they are written
FORMAT = 1                              # of the data, which the page's scripts read
HEAD_FILE = "data/head.js"
FILE_WRITERS = 8                        # files written at a time
KEPT_S = 3600.0                        # after which a file that no head names any more is removed
MOST_SAID, MOST_LENGTH = 80, 400        # settings shown of run.json, and characters of one


class NotThere(ValueError):
    """A report cannot lie there: it could not name the clips, or would be written over another page. The message says
    what would help."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A run folder that is shown."""

    store: Store
    run: Mapping[str, Any]              # its run.json

    @property
    def key(self) -> str:
        """The same wherever the folder is moved: what a browser keeps decisions under."""
        said = [self.run["identity"], self.run.get("began_at")]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A report before it lies anywhere."""

    data: Mapping[str, bytes]           # files of data, by name
    head: bytes                         # of HEAD_FILE
    figures: Mapping[str, Any]
    rows: int
    without_poster: int
    first_page: str | None              # of the data


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a report has become."""

    made: Made
    files: int                          # of this report
    new_files: int                      # of its data, those that were written now
    num_bytes: int
    first_bytes: int                    # of what a browser needs before it shows clips


def make_report(sources: Sequence[Source], bases: Sequence[str | None], *, price: float | None = None,
                presign_s: float | None = None) -> Made:
    """The report of the first source, with the clips of the others beside it; it is written nowhere.

    bases: where each source lies, as index.html sees it; None where links are signed.  price: USD per GPU hour.
    presign_s: clips and posters are named by links that anybody may follow for so long.  Raises StoreError.
    """
    first = sources[0]
    runs = [RunRows.read(source.store) for source in sources]
    rows = one_table(runs)
    made = sheet(rows, named, presigned_pages(sources, rows, presign_s) if presign_s else None)
    table = runs[0].table
    said = figures(table.filter(table["current"]), known_manifest(first.store, first.run), price_of(first.run, price),
                   spent_gpu_s=runs[0].spent_gpu_s, waiting=runs[0].waiting, dropped=runs[0].dropped)
    said |= {"unrecorded": runs[0].unrecorded}
    return Made(data=made.files, head=head_of(sources, bases, runs, said, made, presign_s), figures=said,
                rows=rows.num_rows, without_poster=missing_posters(rows), first_page=next(iter(made.pages), None))


def write_report(sources: Sequence[Source], *, to: Store | None = None, price: float | None = None,
                 presign_s: float | None = None) -> Written:
    """Make a report and store it.  to: where index.html lies; None: in the first run folder's report/.

    The others as of make_report.  Raises NotThere, StoreError.
    """
    first = sources[0]
    if to is not None:
        refuse_another_page(to)
    bases = [None if presign_s else base_of(source.store, first.store, to) for source in sources]
    made = make_report(sources, bases, price=price, presign_s=presign_s)
    assets = page_files(origins(sources, presign_s))
    try:
        new = store_files(first.store if to is None else to, f"{REPORT}/" if to is None else "", made.data, assets,
                          made.head)
    except StoreError as error:
        raise StoreError(f"{error}. --to DIR writes the report elsewhere" if to is None else str(error)) from error
    page = [made.head, *assets.values()]
    first_page = [made.data[made.first_page]] if made.first_page else []
    return Written(made=made, files=len(page) + len(made.data), new_files=new,
                   num_bytes=sum(map(len, [*page, *made.data.values()])),
                   first_bytes=sum(map(len, [*page, *first_page])))


def refuse_another_page(to: Store) -> None:
    """Raises NotThere where an index.html lies that no report of ours belongs to."""
    there = {info.key for prefix in ("index.html", HEAD_FILE) for info in to.list(prefix)}
    if "index.html" in there and HEAD_FILE not in there:
        raise NotThere(f"{to.uri_of('index.html')} is there, and is no report of dailies: it would be written "
                            "over. Give --to a folder of its own")


def page_files(elsewhere: str = "") -> dict[str, bytes]:
    """The page itself, by name.  elsewhere: origins of which it may show pictures and clips, beside its own."""
    files = {path.name: path.read_bytes() for path in sorted(PAGE.iterdir())
             if path.suffix in (".html", ".css", ".js", ".svg")}
    files["index.html"] = files["index.html"].replace(b" ORIGINS", f" {elsewhere}".rstrip().encode())
    return files


def origins(sources: Sequence[Source], presign_s: float | None) -> str:
    """scheme://host of where signed links lead, which the page must be allowed to show; empty without such links."""
    if not presign_s:
        return ""
    addresses = [urlsplit(source.store.presigned("clips", presign_s)) for source in sources]
    return " ".join(dict.fromkeys(f"{address.scheme}://{address.netloc}" for address in addresses))


def named(payload: Any) -> tuple[str, bytes]:
    """The name and the content of a data file."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"data/{digest}.js", f'dailies.put("data/{digest}.js",{text});\n'.encode()


def price_of(run: Mapping[str, Any], price: float | None) -> float | None:
    """What was said now, or when the run began."""
    job = run.get("job")
    before = job.get("price") if isinstance(job, Mapping) else None
    return price if price is not None else before if isinstance(before, (int, float)) and 0 < before < 1e6 else None


def base_of(store: Store, home: Store, to: Store | None) -> str:
    """The address of a run folder, relative to index.html.  Raises NotThere."""
    if store is home and to is None:
        return "../"
    if isinstance(store, FolderStore):
        where = to if to is not None else home
        if isinstance(where, FolderStore):
            beside = where.root if to is not None else where.root / REPORT
            return quote(os.path.relpath(store.root, beside).replace(os.sep, "/")) + "/"
    if isinstance(store, S3Store) and isinstance(home, S3Store) and to is None and \
            (store.bucket, store.endpoint_url) == (home.bucket, home.endpoint_url):
        return quote(posixpath.relpath(f"/{store.prefix}", f"/{home.base}{REPORT}")) + "/"
    raise NotThere(f"a page that lies elsewhere cannot name the clips of {store.uri} by where they lie. Give "
                   "--presign 12h, and they have links that work for so long")


def presigned_pages(sources: Sequence[Source], rows: pa.Table, presign_s: float) -> list[dict[str, Any]]:
    """For each page the links of its clips and posters: a few patterns, and what differs in each link."""
    pages = []
    for start in range(0, rows.num_rows, PAGE_ROWS):
        page = rows.slice(start, PAGE_ROWS)
        patterns: dict[str, int] = {}
        said: dict[str, list[Any]] = {"clip": [], "poster": []}
        for clip_id, number, done, poster in zip(*(page[name].to_pylist() for name in (
                "clip_id", "run", "status", "poster")), strict=True):
            for kind, wanted, key_of in (("clip", done == "done", clip_key), ("poster", poster, poster_key)):
                if not wanted or not clip_id:
                    said[kind].append(None)
                    continue
                link = sources[number].store.presigned(key_of(clip_id), presign_s)
                pattern, signature = taken_apart(link, key_of(clip_id))
                said[kind].append([patterns.setdefault(pattern, len(patterns)), signature])
        pages.append({"patterns": list(patterns), **said})
    return pages


def taken_apart(link: str, key: str) -> tuple[str, str]:
    """A link as a pattern with {key} and {signature} in it, and its signature; the link itself where it has none."""
    before, _, after = link.partition("Signature=")
    signature, _, rest = after.partition("&")
    if key not in before or not after or "{" in link:
        return link, ""
    place = before.rindex(key)
    return (f"{before[:place]}{{key}}{before[place + len(key):]}Signature={{signature}}" + (f"&{rest}" if rest else ""),
            signature)


def head_of(sources: Sequence[Source], bases: Sequence[str | None], runs: Sequence[RunRows],
            said: Mapping[str, Any], made: Sheet, presign_s: float | None) -> bytes:
    first, now = sources[0], round(time.time(), 1)
    head = {
        "format": FORMAT, "made_at": now, "links_end_at": now + presign_s if presign_s else None, "key": first.key,
        "uri": first.store.uri, "name": name_of(first.store), "finished": has(first.store, SUCCESS), "figures": said,
        "runs": [{"uri": source.store.uri, "name": name_of(source.store), "key": source.key, "base": base,
                  "rows": run.table.num_rows, "model": str(source.run["identity"].get("model"))}
                 for source, base, run in zip(sources, bases, runs, strict=True)],
        "about": about(first.run),
        "sheet": {"rows": made.rows, "page_rows": PAGE_ROWS, "block_rows": BLOCK_ROWS, "columns": made.columns,
                  "pages": made.pages}}
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"dailies.head({text});\n".encode(errors="replace")      # JSON can hold half a surrogate pair


def name_of(store: Store) -> str:
    return store.uri.rstrip("/").rpartition("/")[2] or store.uri


def about(run: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """What run.json says of how the run was made, in the order in which it is shown."""
    def lines(said: Any) -> list[tuple[str, str]]:
        if not isinstance(said, Mapping):
            return []
        words = [(str(name)[:80], value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
                 for name, value in list(said.items())[:MOST_SAID] if value not in (None, "", [], {})]
        return [(name, value[:MOST_LENGTH]) for name, value in words]

    rest = {name: run.get(name) for name in ("device", "chosen_because", "fallbacks", "roundings", "began_at")}
    return {"Identity": lines(run["identity"]), "Settings of rows": lines(run.get("settings")),
            "How it began": lines(rest) + lines(run.get("job")), "Versions": lines(run.get("versions"))}


def store_files(target: Store, prefix: str, files: Mapping[str, bytes], assets: Mapping[str, bytes],
                head: bytes) -> int:
    """Store what is not there yet, the head last, so that it names only what is; returns how many were written."""
    there = {info.key: info for info in target.list(prefix)}
    new = {name: data for name, data in files.items()
           if (info := there.get(prefix + name)) is None or info.num_bytes != len(data)}
    with ThreadPoolExecutor(FILE_WRITERS) as pool:
        list(pool.map(lambda each: target.put(prefix + each[0], each[1]), new.items()))
        list(pool.map(lambda each: target.put(prefix + each[0], each[1]), assets.items()))
    target.put(prefix + HEAD_FILE, head)
    wanted = {prefix + name for name in (*files, *assets, HEAD_FILE)}
    for key, info in there.items():
        name = key.removeprefix(f"{prefix}data/").removesuffix(".js")
        ours = key.startswith(f"{prefix}data/") and len(name) == 16 and not set(name) - set("0123456789abcdef")
        if ours and key not in wanted and info.modified_s < time.time() - KEPT_S:
            target.delete(key)
    return len(new)
