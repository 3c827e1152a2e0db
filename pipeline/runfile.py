"""run.json: which run a folder holds. Written once, before anything else; another run is refused.

Its `identity` decides which clips the run has (model, weights, manifest digest, defaults). Whatever else it tells, such
as versions and how the run was started, may differ when the run is continued.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from pipeline.store import NotFound, Store

RUN = "run.json"
REMOVED = "[removed]"
SECRET_NAME = re.compile(r"(^|_)(secret|password|passwd|token|credentials?|(access|api|private)_key)($|_)", re.I)


class OtherRun(ValueError):
    """The folder is another run's; the message names what differs."""


def claim_run(store: Store, identity: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Make the folder this run's, or find that it is; returns run.json as it stands.

    identity, about: JSON values. What looks like a secret is removed from both.
    Raises OtherRun when the folder is another run's, also if that one was a moment faster; StoreError.
    """
    run = without_secrets({"identity": dict(identity), **about})
    store.create(RUN, json.dumps(run, indent=2, ensure_ascii=False).encode() + b"\n")
    found = read_run(store)
    if found is None:
        raise OtherRun(f"{store.uri_of(RUN)} was removed while this run began. Start it again")
    check_run(store, found, identity)
    return found


def read_run(store: Store) -> dict[str, Any] | None:
    """run.json, None where no run has begun.  Raises OtherRun for one that is not ours; StoreError."""
    try:
        found = json.loads(store.get(RUN))
    except NotFound:
        return None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("identity"), dict):
        raise OtherRun(f"{store.uri_of(RUN)} is not one that dailies wrote. Choose another output folder")
    return found


def check_run(store: Store, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises OtherRun, naming all that differs, unless `found` is the run of this identity."""
    before, now = found["identity"], json.loads(json.dumps(without_secrets(identity)))
    names = list(dict.fromkeys([*now, *before]))
    differing = [f"{name} was {before.get(name)}, is {now.get(name)}"
                 for name in names if before.get(name) != now.get(name)]
    if differing:
        raise OtherRun(f"{store.uri} holds another run: {'; '.join(differing)}. Choose another output folder, "
                       "or repeat that run's command to continue it")


def without_secrets(value: Any) -> Any:
    """The same without what must not be written down.

    That is: values whose name says so, passwords and signatures in URLs, what the environment calls a secret.
    """
    hidden = [said for name, said in os.environ.items() if SECRET_NAME.search(name) and len(said) >= 8]

    def clean(value: Any, name: str = "") -> Any:
        if isinstance(value, Mapping):
            return {key: clean(inner, str(key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(inner, name) for inner in value]
        if value is not None and not isinstance(value, (bool, int, float)) and SECRET_NAME.search(name):
            return REMOVED
        if not isinstance(value, str):
            return value
        for secret in hidden:
            value = value.replace(secret, REMOVED)
        return re.sub(r"\w+://\S+", lambda found: plain_url(found.group()), value)

    return clean(value)


def plain_url(url: str) -> str:
    """Without user, password and query, in which presigned URLs carry their signature."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=REMOVED if parts.query else "").geturl()
