"""The same `render` as a Ray job: ships code and manifest to a running cluster, follows the log, returns the exit code.

What travels is a small folder (parcel.py). Credentials never do. A job's entrypoint and runtime environment can be read
by everybody who can open the dashboard, so the workers take theirs from the cluster's own environment, and settings go
one by one, not as the file that they stand in.
"""

import asyncio
import logging
import os
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import urlsplit

from dailies.jobs.answer import answer
from dailies.jobs.parcel import pack_parcel
from dailies.jobs.progress import say
from dailies.jobs.usage import UsageError
from dailies.model.errors import DailiesError
from dailies.model.private import at_home
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.run.masking import without_secrets

CONNECT_TIMEOUT_S = 10.0
JOB_POLL_S = 5.0
HEAD_PATIENCE_S = 120.0         # how long --wait tries to get back to a head that stopped answering

EXIT_INTERRUPTED = 130


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
    about: dict[str, Any] = {"address": address, "out": out}
    try:
        refuse_secrets([manifest, out, address, *render_args])
        refuse_local("--out", out)
        refuse_local("--weights", value_of("--weights", render_args))
        with tempfile.TemporaryDirectory(prefix="dailies-submit-") as folder:
            render = ["render", *pack_parcel(Path(folder), manifest, render_args), "--out", out, "--ray", "auto"]
            client = connect_to_head(address)
            job_id = start_job(client, address, shlex.join(["python", "-m", "dailies", *render]), folder)
    except HeadError as error:
        return stopped(about, error.exit_code, str(error), json=json)

    about = {"job_id": job_id, **about}

    def tell() -> None:
        say(f"{job_id} runs on {address}. Look with: dailies status {out}", stream=sys.stdout)

    if not wait:
        return answer(about | {"status": "SUBMITTED", "exit_code": None}, tell, json=json)
    if not json:
        tell()
    try:
        status, exit_code, message = asyncio.run(follow_job(client, job_id, sys.stderr if json else sys.stdout))
    except KeyboardInterrupt:
        return stopped(about, EXIT_INTERRUPTED, f"No longer following {job_id}; the job goes on. Stop it with: "
                       f"ray job stop {job_id} --address {address}", json=json)
    except HeadError as error:
        return stopped(about, error.exit_code, f"{error} The job may still run: dailies status {out}", json=json)
    for line in message.splitlines():
        say(line, stream=sys.stderr)
    return answer(about | {"status": status, "exit_code": exit_code}, lambda: None, json=json)


def value_of(option: str, args: list[str]) -> str | None:
    """The value behind an option of a command line that is written in words, `--option value`."""
    return args[args.index(option) + 1] if option in args[:-1] else None


def refuse_secrets(values: list[str]) -> None:
    """Raises UsageError for a value that may not be written down: user:password@host, a presigned link, a key."""
    for value in values:
        if (masked := without_secrets(value)) != value:
            raise UsageError(f"a job can be read by everybody on the cluster, so it must not carry keys; got "
                             f"{shown(masked)}. Give the plain URI and let the workers find their credentials in their "
                             "own environment")


def refuse_local(name: str, value: str | None) -> None:
    """Raises UsageError for a relative folder: on the cluster that would be the job's own folder, which is deleted."""
    if value is not None and "://" not in value and not Path(value).is_absolute():
        raise UsageError(f"{name} must be s3://BUCKET/PREFIX or an absolute path that every node has; got {value!r}")


def connect_to_head(address: str) -> JobClient:
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


def start_job(client: JobClient, address: str, entrypoint: str, folder: str) -> str:
    """Upload `folder` and start `entrypoint` in it; returns the job id.

    A head that has just started answers before its job agent does: it is given HEAD_PATIENCE_S.  Raises HeadError.
    """
    job_id = f"dailies-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    until = time.monotonic() + HEAD_PATIENCE_S
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env={"working_dir": folder},
                                     metadata={"submitted_by": "dailies"})
        except (OSError, RuntimeError, ValueError) as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise HeadError(f"the Ray head at {address} did not take the job: {error}") from error
            time.sleep(JOB_POLL_S)


async def follow_job(client: JobClient, job_id: str, log: TextIO) -> tuple[str, int, str]:
    """Copy the job's log to `log` until it ends: its status, exit code, and a message if there is something to say.

    The job is asked for its state besides, because a dead connection can look like a quiet log. A connection that
    breaks is made again, without repeating what was shown; HeadError after HEAD_PATIENCE_S without an answer.
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
            await asyncio.wait({copying}, timeout=JOB_POLL_S)
            try:
                info = await asyncio.to_thread(client.get_job_info, job_id)
            except (OSError, RuntimeError, ValueError) as error:
                if time.monotonic() - last_answer > HEAD_PATIENCE_S:
                    raise HeadError(f"the head has not answered for {HEAD_PATIENCE_S:.0f} s: {error}.") from error
            else:
                last_answer = time.monotonic()
                if info.status.is_terminal():
                    await asyncio.wait({copying}, timeout=JOB_POLL_S)
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
    return end_of_job(info)


def end_of_job(info: Any) -> tuple[str, int, str]:
    """Status, exit code and message of a job that has ended."""
    status = info.status.value
    if status == "SUCCEEDED":
        return status, 0, ""
    if status == "STOPPED":
        return status, EXIT_INTERRUPTED, "The job was stopped; the same command continues."
    code = info.driver_exit_code
    if code is None:
        return status, HeadError.exit_code, f"The job did not get as far as rendering: {info.message}"
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):         # from the driver, or from the shell that ran it
        return status, 128 + signal.SIGKILL, "The job's driver was killed; the same command continues."
    return status, code, ""


def stopped(about: Mapping[str, Any], exit_code: int, message: str, *, json: bool) -> int:
    """Why nothing more is done here.  about: what is known of the job."""
    for line in message.splitlines():
        say(line, stream=sys.stderr)
    return answer({**about, "error": message, "exit_code": exit_code}, lambda: None, json=json)
