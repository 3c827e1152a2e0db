"""The same `render` as a Ray job: ships code and manifest to a running cluster, follows the log, returns the exit code.

What travels is a small folder made for the occasion: our packages and, where it is local, the files of the manifest that
its reader reads, and those images named by its rows that are images; nothing hidden, nothing behind a link that leads out.
It is listed before it goes. Credentials never travel. A job's entrypoint and runtime environment can be read by everybody
who can open the dashboard, so the workers take theirs from the cluster's own environment, and settings go one by one, not
as the file that they stand in.
"""

import asyncio
import glob
import io
import json as jsonlib
import logging
import os
import posixpath
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO
from urllib.parse import urlsplit

from dailies import HOME
from dailies.jobs.progress import printable
from dailies.jobs.settings import RenderJob, parsed_map
from dailies.jobs.usage import UsageError
from dailies.model.errors import DailiesError
from dailies.model.private import at_home
from dailies.pipeline.manifest.files import IMAGES, STDIN, ManifestFile, find_files, from_stdin, typed_rows
from dailies.pipeline.manifest.raw_bytes import unfolded
from dailies.pipeline.manifest.text import sniffed
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.run.masking import names_a_secret, without_secrets
from dailies.pipeline.store.beneath import TooLong, Unfit, read_below

if TYPE_CHECKING:
    from dailies.pipeline.manifest.manifest import Manifest

PACKAGES = ("kernels", "model", "actors", "pipeline", "jobs")
SHIPPED = (".py", ".safetensors", ".json", ".yaml", ".model")          # what our packages are made of
LISTED = 100                    # names of what is sent
MAX_BYTES = 100_000_000         # Ray's dashboard takes no larger upload
CONNECT_TIMEOUT_S = 10.0
POLL_S = 5.0
PATIENCE_S = 120.0              # how long --wait tries to get back to a head that stopped answering

EXIT_UNUSABLE, EXIT_INTERRUPTED = 5, 130


class HeadError(DailiesError, RuntimeError):
    """The cluster's head does not answer, or does not let us in; the message says what to do."""

    exit_code = 5


class JobClient(Protocol):
    """The part of Ray's job client that is used here."""

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any],
                   metadata: dict[str, str]) -> str: ...
    def get_job_info(self, job_id: str) -> Any: ...
    def get_job_logs(self, job_id: str) -> str: ...
    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...


def submit(manifest: str, out: str, address: str, render_args: list[str], wait: bool, json: bool) -> int:
    """Submit `dailies render MANIFEST --out OUT --ray auto RENDER_ARGS` to the Ray head at `address`.

    manifest     local file, folder or glob (shipped), or a URI that the cluster can read.
    out          s3://..., or an absolute path that every node shares.
    address      of the head's dashboard: http://HEAD:8265.
    render_args  further options of `render`.
    wait         follow the log; the log goes to stdout, or to stderr when `json` is set.
    json         one JSON object on stdout: job_id, address, out, status, exit_code.

    Returns render's own exit code with `wait`, else 0 once the job is accepted; 5 for a cluster that is not usable,
    130 when the wait was interrupted (the job goes on).  Raises UsageError for a command that cannot work,
    ManifestError for a manifest of which no row can be relied on.
    """
    try:
        refuse_secrets([manifest, out, address, *render_args])
        refuse_local("--out", out)
        refuse_local("--weights", value_of("--weights", render_args))
        with tempfile.TemporaryDirectory(prefix="dailies-submit-") as folder:
            render = ["render", *pack(Path(folder), manifest, render_args), "--out", out, "--ray", "auto"]
            client = connect(address)
            job_id = start(client, address, shlex.join(["python", "-m", "dailies.jobs.cli", *render]), folder)
    except HeadError as error:
        return stop(EXIT_UNUSABLE, str(error), json=json, address=address, out=out)

    if not wait:
        print_job(job_id, address, out, json=json, status="SUBMITTED")
        return 0
    if not json:
        print_job(job_id, address, out, json=False, status="SUBMITTED")
    try:
        status, exit_code, message = asyncio.run(follow(client, job_id, sys.stderr if json else sys.stdout))
    except KeyboardInterrupt:
        return stop(EXIT_INTERRUPTED, f"No longer following {job_id}; the job goes on. Stop it with: "
                    f"ray job stop {job_id} --address {address}", json=json, job_id=job_id, address=address, out=out)
    except HeadError as error:
        return stop(EXIT_UNUSABLE, f"{error} The job may still run: dailies status {out}",
                    json=json, job_id=job_id, address=address, out=out)
    if message:
        print(message, file=sys.stderr)
    if json:
        print_job(job_id, address, out, json=True, status=status, exit_code=exit_code)
    return exit_code


def homes() -> dict[str, Path]:
    """Where the files of our packages lie, in a checkout or installed, by the folder in which the cluster imports them."""
    return {"dailies": HOME / "dailies"} | {
        f"dailies/{package}": Path(import_module(f"dailies.{package}").__path__[0]) for package in PACKAGES}


def pack(folder: Path, manifest: str, render_args: list[str]) -> list[str]:
    """Fill `folder` with what the cluster needs: our packages, the manifest and its images; says on stderr what that is.

    Each file is read once: the bytes that were checked are those that are sent, whatever takes its place meanwhile.
    Returns manifest and arguments as the job, whose working folder this is, has to name them.
    Raises UsageError for a manifest that is not there, or more than MAX_BYTES, ManifestError for a manifest that cannot
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
    """What is sent: names in the job's working folder and bytes, together never more than MAX_BYTES."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def sizes(self) -> dict[str, int]:
        return {name: len(data) for name, data in self.files.items()}

    def read(self, name: str, path: Path, base: Path) -> None:
        """Add the file at `path`; links may lead to another below `base`.  Raises UsageError for what cannot be read."""
        room = MAX_BYTES - sum(self.sizes().values())
        if not (real := path.resolve()).is_relative_to(base):
            raise UsageError(f"{path} is a link that leads out of {base}, and what it leads to is not sent. Put the file "
                             "itself there, or name the files that are to be sent")
        try:
            data = read_below(real, base, at_most=room)     # from here on no link is followed
        except TooLong as error:
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

    print(f"sent to the cluster: dailies ({size(ours)})" + (f"; manifest and images ({size(theirs)}):" if theirs else ""),
          file=sys.stderr)
    for name in sorted(theirs)[:LISTED]:
        print(printable(f"  {name.removeprefix('manifest/')}"), file=sys.stderr)
    if len(theirs) > LISTED:
        print(f"  and {len(theirs) - LISTED:,} more", file=sys.stderr)


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
            content = io.BufferedReader(unfolded(io.BytesIO(data)))
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
    images_of(parcel, Manifest.read(str(source), mapping=mapping, files=list(held.values())), held)
    return named


def local_manifest(source: Path) -> tuple[str, Path, dict[str, ManifestFile]]:
    """What a file, folder or glob is called in the job's working folder, what it lies below, its files by name there.

    Those are the files that the manifest's reader reads.  Raises UsageError where there is none.
    """
    try:
        found = find_files(str(source))
    except OSError as error:
        raise UsageError(f"no such manifest: {source} ({error}). Give a file, a folder, a glob or an s3:// URI") from None
    if source.is_file():                                # its own name may be a link: who names it means what it leads to
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


def images_of(parcel: Parcel, read: "Manifest", shipped: dict[str, ManifestFile]) -> None:
    """Add the images under the manifest's folder that its rows name, by the name that each row's path has on the cluster.

    shipped: the manifest's own files, by their name there.  What is in a bucket, missing, hidden, outside the folder or
    no image stays behind: render says so.  Raises UsageError for an absolute path.
    """
    from dailies.actors.image_file import examine
    from dailies.actors.image_parts import ImageError
    from dailies.pipeline.manifest.images import folder_of, locate, read_file

    there = {file.name: posixpath.dirname(name) for name, file in shipped.items()}
    ends = [first for _, first in read.files[1:]] + [read.table.num_rows]
    wanted: dict[str, tuple[Path, Path]] = {}           # the file, and what it lies below
    sizes = parcel.sizes()
    for (file, first), end in zip(read.files, ends, strict=True):
        for name in read.table["image"].slice(first, end - first).unique().drop_null().to_pylist():
            try:
                path = Path(locate(folder_of(file), name))
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
            print(printable(f"not sent, because they are {why}: {', '.join(sorted(names)[:LISTED])}"), file=sys.stderr)


def refuse_too_much(sizes: dict[str, int]) -> None:
    """Raises UsageError for more than the head takes.  sizes: bytes by name."""
    if sum(sizes.values()) > MAX_BYTES:
        raise too_much(sizes)


def too_much(sizes: dict[str, int]) -> UsageError:
    largest = max(sizes, key=sizes.__getitem__)
    return UsageError(f"what is shipped to the cluster must be at most {MAX_BYTES / 1e6:.0f} MB; this is "
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


def value_of(option: str, args: list[str]) -> str | None:
    """The value behind an option of a command line that is written in words, `--option value`."""
    return args[args.index(option) + 1] if option in args[:-1] else None


def refuse_secrets(values: list[str]) -> None:
    """Raises UsageError for a value that may not be written down: user:password@host, a presigned link, a key."""
    for value in values:
        if (masked := without_secrets(value)) != value:
            raise UsageError(f"a job can be read by everybody on the cluster, so it must not carry keys; got "
                             f"{shown(masked)}. Give the plain URI and let the workers find their credentials in their own "
                             "environment")


def refuse_local(name: str, value: str | None) -> None:
    """Raises UsageError for a relative folder: on the cluster that would be the job's own folder, which is deleted."""
    if value is not None and "://" not in value and not Path(value).is_absolute():
        raise UsageError(f"{name} must be s3://BUCKET/PREFIX or an absolute path that every node has; got {value!r}")


def connect(address: str) -> JobClient:
    """A client of the job server at `address`, with the token of this environment.

    Raises UsageError for an address that is none, HeadError for a head that is away, refuses us or lets everybody in.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--address must be that of the head's dashboard, http://HEAD:8265; got {address!r}")
    token = find_token()
    unreachable = (f"no Ray head answers at {address}. Check that it runs and that this machine reaches the "
                   "dashboard port (through `kubectl port-forward` or an SSH tunnel)")
    if not urllib.request.getproxies():
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise HeadError(f"{unreachable}: {error}") from error

    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    from dailies.pipeline.scheduler.cluster import answers_anyone, open_to_everybody
    if answers_anyone(address):
        raise HeadError(open_to_everybody(address))

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    # Ray lets these two override the address that it is given, and the job would quietly run elsewhere
    overrides = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    except AuthenticationError as error:
        given = "it refused the token of this environment" if token else "no token was found in this environment"
        raise HeadError(f"the Ray head at {address} asks for a token, and {given}. Set RAY_AUTH_TOKEN_PATH to a "
                        "file with the cluster's token, or RAY_AUTH_TOKEN") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:      # KeyError: it answers, but is no Ray head
        raise HeadError(f"{unreachable}: {error}") from error
    finally:
        os.environ.update(overrides)


def find_token() -> str | None:
    """The cluster's token, from where Ray looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    Unlike Ray's own client, an unset RAY_AUTH_MODE is no reason to leave a token unused.
    Raises HeadError where a token is demanded or named, but missing.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = at_home(named or "~/.ray/auth_token")
    try:
        token = path.read_text().strip()
    except OSError as error:
        token = ""
        reason = error.strerror
    else:
        reason = "it is empty"
    if token:
        return token
    if named or mode == "token":
        raise HeadError(f"a token is needed, and {path} gives none: {reason}. Set RAY_AUTH_TOKEN_PATH to a file "
                        "with the cluster's token, or RAY_AUTH_TOKEN")
    return None


def start(client: JobClient, address: str, entrypoint: str, folder: str) -> str:
    """Upload `folder` and start `entrypoint` in it; returns the job id.

    A head that has just started answers before its job agent does: it is given PATIENCE_S.  Raises HeadError.
    """
    job_id = f"dailies-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env={"working_dir": folder},
                                     metadata={"submitted_by": "dailies"})
        except (OSError, RuntimeError, ValueError) as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise HeadError(f"the Ray head at {address} did not take the job: {error}") from error
            time.sleep(POLL_S)


async def follow(client: JobClient, job_id: str, log: TextIO) -> tuple[str, int, str]:
    """Copy the job's log to `log` until it ends: its status, exit code, and a message if there is something to say.

    The job is asked for its state besides, because a dead connection can look like a quiet log. A connection that
    breaks is made again, without repeating what was shown; HeadError after PATIENCE_S without an answer.
    """
    shown = 0

    async def copy_log() -> None:
        nonlocal shown
        offset = 0
        async for text in client.tail_job_logs(job_id):         # from the log's beginning, each time
            log.write(text[max(0, shown - offset):])
            log.flush()
            offset += len(text)
            shown = max(shown, offset)

    last_answer = time.monotonic()
    copying = asyncio.create_task(copy_log())
    try:
        while True:
            await asyncio.wait({copying}, timeout=POLL_S)
            try:
                info = await asyncio.to_thread(client.get_job_info, job_id)
            except (OSError, RuntimeError, ValueError) as error:
                if time.monotonic() - last_answer > PATIENCE_S:
                    raise HeadError(f"the head has not answered for {PATIENCE_S:.0f} s: {error}.") from error
            else:
                last_answer = time.monotonic()
                if info.status.is_terminal():
                    await asyncio.wait({copying}, timeout=POLL_S)
                    break
            if copying.done():
                copying.exception()                             # seen; the job itself has just been asked
                await asyncio.sleep(1.0)
                copying = asyncio.create_task(copy_log())
    finally:
        copying.cancel()
    await asyncio.wait({copying})
    with suppress(OSError, RuntimeError, ValueError):           # lines that the copy did not live to see
        log.write((await asyncio.to_thread(client.get_job_logs, job_id))[shown:])
    return outcome(info)


def outcome(info: Any) -> tuple[str, int, str]:
    """Status, exit code and message of a job that has ended."""
    status = info.status.value
    if status == "SUCCEEDED":
        return status, 0, ""
    if status == "STOPPED":
        return status, EXIT_INTERRUPTED, "The job was stopped; the same command continues."
    code = info.driver_exit_code
    if code is None:
        return status, EXIT_UNUSABLE, f"The job did not get as far as rendering: {info.message}"
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):         # from the driver, or from the shell that ran it
        return status, 128 + signal.SIGKILL, "The job's driver was killed; the same command continues."
    return status, code, ""


def print_job(job_id: str, address: str, out: str, *, json: bool, status: str, exit_code: int | None = None) -> None:
    if json:
        print(jsonlib.dumps({"job_id": job_id, "address": address, "out": out, "status": status,
                             "exit_code": exit_code}))
    else:
        print(f"{job_id} runs on {address}. Look with: dailies status {out}", flush=True)


def stop(exit_code: int, message: str, *, json: bool, **known: Any) -> int:
    """Say why nothing more is done here, and return the exit code."""
    if json:
        print(jsonlib.dumps({**known, "error": message, "exit_code": exit_code}))
    print(message, file=sys.stderr)
    return exit_code
