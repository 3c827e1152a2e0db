"""`dailies report --serve`: the report for a browser of this machine, which may also store decisions in the run folder.

Who listens   127.0.0.1 alone. Every address begins with a token of 256 random bits, made for this command.
Who may ask   who knows the token, by the name 127.0.0.1 or localhost, and no page of another origin.
What is given the page from this package, the report's data, clips and posters by their names, whole or in ranges.
What is taken decisions (docs/morning.md) about rows of this run; nothing else is written.
"""

import getpass
import hmac
import json as jsonlib
import re
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from dailies.jobs.progress import say
from dailies.jobs.usage import UsageError
from dailies.pipeline.report.writer import HEAD_FILE, Made, Source, make_report, page_files
from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import clip_id_in, poster_id_in
from dailies.pipeline.run.picks import MAX_PICKS_BYTES, BadPicks, Picks, write_picks
from dailies.pipeline.store import NotFound, Store, StoreError

KINDS_OF_FILES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
                  ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml", ".mp4": "video/mp4",
                  ".webp": "image/webp"}
PIECE_BYTES = 2**20                     # of a clip, read and sent at a time
FRESH_S, FRESH_SHARE = 10.0, 10.0       # a report is made anew after so long, or after so many times what it takes
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
GUARDS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "private, no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
                               "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'"}


class RunObject(NamedTuple):
    """A file of a run: of which store, and its key there."""

    store: Store
    key: str


class Refusal(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, status: HTTPStatus, why: str):
        super().__init__(why)
        self.status = status


class ReportServer(ThreadingHTTPServer):
    """Listens on loopback until it is shut down; makes the report anew where the page is loaded again."""

    daemon_threads = True

    def __init__(self, sources: Sequence[Source], *, price: float | None = None, port: int | None = None):
        """Raises OSError for a port that is taken."""
        self.sources, self.price = sources, price
        self.token = secrets.token_urlsafe(32)
        self.decided_by = user_name()
        self.lock = threading.Lock()
        self.made: Made | None = None
        self.made_at, self.took_s = 0.0, 0.0
        self.known: set[tuple[Any, ...]] = set()        # id, seed and clip_id of each row
        self.page = page_files()
        self.page["index.html"] = self.page["index.html"].replace(b'<html lang="en">',
                                                                  b'<html lang="en" data-served="yes">')
        super().__init__(("127.0.0.1", port or 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{self.token}/report/"

    def report(self, *, fresh: bool = False) -> Made:
        """As it is now, or as it was some seconds ago.  Raises StoreError."""
        with self.lock:
            age = time.monotonic() - self.made_at
            if self.made is None or fresh and age > max(FRESH_S, FRESH_SHARE * self.took_s):
                began = time.monotonic()
                bases = ["../", *(f"../beside/{number}/" for number in range(1, len(self.sources)))]
                self.made = make_report(self.sources, bases, price=self.price)
                rows = ledger.read(self.sources[0].store, ["id", "seed", "clip_id"], every_take=True)
                self.known = set(ledger.values_of(rows, "id", "seed", "clip_id"))
                self.made_at, self.took_s = time.monotonic(), time.monotonic() - began
            return self.made

    def keep(self, data: bytes) -> int:
        """Store decisions about rows of this run; returns how many.  Raises BadPicks, StoreError."""
        self.report()
        picks = Picks.parsed(data).only(self.known).model_copy(update={"decided_by": self.decided_by})
        write_picks(self.sources[0].store, picks)
        return len(picks.picks)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dailies", ""
    timeout = 60
    server: ReportServer

    def log_message(self, *_: Any) -> None:             # addresses hold the token
        pass

    def do_GET(self) -> None:
        self.answered(self.give)

    def do_HEAD(self) -> None:
        self.answered(self.give)

    def do_POST(self) -> None:
        self.answered(self.take)

    def answered(self, answer: Any) -> None:
        try:
            answer(self.checked_path())
        except Refusal as refusal:
            self.close_connection = True                # what it sent may not have been read
            self.send(str(refusal).encode(), "text/plain; charset=utf-8", status=refusal.status)
        except (StoreError, NotFound) as error:
            absent = isinstance(error, NotFound)
            self.close_connection = True
            self.send(str(error).encode(), "text/plain; charset=utf-8",
                      status=HTTPStatus.NOT_FOUND if absent else HTTPStatus.BAD_GATEWAY)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True                # a player that has enough

    def checked_path(self) -> str:
        """What is asked for, behind the token.  Raises Refusal."""
        port = self.server.server_address[1]
        hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        host = self.headers.get("Host", "")
        if host not in hosts:                           # a name that somebody made to lead here
            raise Refusal(HTTPStatus.FORBIDDEN, "this page is asked for as 127.0.0.1")
        origin = self.headers.get("Origin")
        if origin not in (None, f"http://{host}") or origin is None and self.command == "POST":
            raise Refusal(HTTPStatus.FORBIDDEN, "a page of another origin may not ask here")
        opened = self.command == "GET" and self.headers.get("Sec-Fetch-Mode") == "navigate"     # a link, followed
        if not opened and self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise Refusal(HTTPStatus.FORBIDDEN, "a page of another origin may not ask here")
        token, _, path = self.path.partition("?")[0].removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refusal(HTTPStatus.FORBIDDEN, "the address that `dailies report --serve` printed is needed, whole")
        return path

    def give(self, path: str) -> None:
        if path in ("", "report"):
            self.send(b"", "text/plain", status=HTTPStatus.FOUND, Location=f"/{self.server.token}/report/")
            return
        folder, _, name = path.partition("/")
        if folder == "report":
            self.send(self.of_report(name or "index.html"), media_type(name or "index.html"))
            return
        asked = self.of_run(path)
        self.send_object(asked)

    def of_report(self, name: str) -> bytes:
        if name in self.server.page:
            return self.server.page[name]
        made = self.server.report(fresh=name == HEAD_FILE)
        if name == HEAD_FILE:
            return made.head
        if name not in made.data:
            raise Refusal(HTTPStatus.NOT_FOUND, "the report has no such file, or has it no more: load the page again")
        return made.data[name]

    def of_run(self, path: str) -> RunObject:
        """A clip or a poster of this run, or of one beside it.  Raises Refusal."""
        number = 0
        if beside := re.fullmatch(r"beside/(\d{1,3})/(.*)", path):
            number, path = int(beside[1]), beside[2]
        if number >= len(self.server.sources) or not (clip_id_in(path) or poster_id_in(path)) or \
                not re.fullmatch(r"[a-z]+/[0-9a-f]{2}/[0-9a-f]{64}\.(mp4|webp)", path):
            raise Refusal(HTTPStatus.NOT_FOUND, "there are a run's clips and posters here, and its report")
        return RunObject(self.server.sources[number].store, path)

    def send_object(self, asked: RunObject) -> None:
        info = next((info for info in asked.store.list(asked.key) if info.key == asked.key), None)
        if info is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "it is not in the run folder")
        start, end, status = span_of(self.headers.get("Range"), info.num_bytes)
        headers = {"Accept-Ranges": "bytes"}
        if status is HTTPStatus.PARTIAL_CONTENT:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{info.num_bytes}"
        self.begin(status, media_type(asked.key), end - start, headers)
        if self.command == "HEAD":
            return
        self.close_connection = True                    # unless all of it is sent: it may be gone in the middle
        for place in range(start, end, PIECE_BYTES):
            with suppress(StoreError, NotFound):
                self.wfile.write(asked.store.get_range(asked.key, place, min(PIECE_BYTES, end - place)))
                continue
            return
        self.close_connection = self.headers.get("Connection", "").lower() == "close"

    def take(self, path: str) -> None:
        if path != "report/picks":
            raise Refusal(HTTPStatus.NOT_FOUND, "decisions go to report/picks")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal() or self.headers.get("Transfer-Encoding"):
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "decisions come with their length")
        if len(length) > 12 or int(length) > MAX_PICKS_BYTES:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MAX_PICKS_BYTES:,} bytes are taken at a time")
        if self.headers.get_content_type() != "application/json":
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "decisions come as application/json")
        try:
            kept = self.server.keep(self.rfile.read(int(length)))
        except BadPicks as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
        self.send(jsonlib.dumps({"kept": kept}).encode(), "application/json")

    def send(self, body: bytes, kind: str, *, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> None:
        self.begin(status, kind, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, status: HTTPStatus, kind: str, num_bytes: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(num_bytes), **GUARDS, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()


def media_type(name: str) -> str:
    return KINDS_OF_FILES.get(PurePosixPath(name).suffix, "application/octet-stream")


def span_of(asked: str | None, num_bytes: int) -> tuple[int, int, HTTPStatus]:
    """First byte, byte behind the last, and 200 or 206.  Raises Refusal for a range that the object does not have.

    What is no range of one piece is answered with the whole, as HTTP allows.
    """
    found = RANGE.fullmatch(asked or "")
    if not found or not (found[1] or found[2]):
        return 0, num_bytes, HTTPStatus.OK
    if not found[1]:
        start, end = max(0, num_bytes - int(found[2])), num_bytes
    else:
        start, end = int(found[1]), min(num_bytes, int(found[2]) + 1 if found[2] else num_bytes)
    if start >= end:
        raise Refusal(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"it has {num_bytes:,} bytes")
    return start, end, HTTPStatus.PARTIAL_CONTENT


def user_name() -> str:
    """Who decides, as the ledger will say: the name of this machine's user."""
    try:
        return getpass.getuser()[:100]
    except (OSError, KeyError, ImportError):            # a container without a name for its user
        return ""


def serve_report(sources: Sequence[Source], *, price: float | None, port: int | None, json: bool) -> int:
    """Serve until Ctrl-C; 0 then.  Raises UsageError for a port that is taken."""
    try:
        server = ReportServer(sources, price=price, port=port)
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror or error}. Leave it out, and one that is free is taken"
                         ) from None
    server.report()
    if json:
        print(jsonlib.dumps({"exit_code": 0, "address": server.address, "out": sources[0].store.uri}))
    else:
        say(f"{server.address}")
        say("Open this address, whole, in a browser of this machine; whoever has it may look and decide. Decisions go "
            f"into {sources[0].store.uri}. Ctrl-C ends it.")
    sys.stdout.flush()                                  # a pipe or a file has it now too
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0
