"""A store that is a prefix of a bucket, on Amazon S3 or another server that speaks its protocol."""

import hashlib
import logging
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dailies.pipeline.store.base import (
    PATIENCE,
    PROBE,
    NoAccess,
    NotFound,
    ObjectInfo,
    Store,
    StoreError,
    arriving,
    checked_key,
    not_a_store,
    open_data,
    refuse_too_large,
    sha256_of,
)

T = TypeVar("T")
_log = logging.getLogger(__name__)

CONTENT_TYPES = {".mp4": "video/mp4", ".webp": "image/webp", ".html": "text/html; charset=utf-8",
                 ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml",
                 ".json": "application/json"}


# what the user's AWS configuration may say about how a store is talked to, beside its section `s3`; nothing secret
AWS_SETTINGS = ("retry_mode", "max_attempts", "request_checksum_calculation", "response_checksum_validation")
AMAZON = re.compile(r"s3([.-][a-z0-9-]+)?\.amazonaws\.com(\.cn)?")      # what everybody gets who names no endpoint


class S3Store(Store):
    """A prefix of a bucket. Credentials come from the usual AWS chain of each process, and stay there."""

    PATIENCE_S = 900.0                  # how long a busy or vanished store is waited for
    WAIT_S = 1.0                        # before our second attempt; it doubles up to 30 s
    ATTEMPTS = 4                        # of botocore, within each of ours
    SETTLE_S = 4.0                      # how long a conflict is waited for where nobody else writes

    def __init__(self, bucket: str, prefix: str, endpoint_url: str | None, region: str | None,
                 settings: dict[str, Any] | None = None):
        """endpoint_url: None for AWS itself. Every process that gets this store talks to the same one, the same way.

        settings: what `aws_settings` found.
        """
        self.bucket, self.prefix, self.endpoint_url, self.region = bucket, prefix, endpoint_url, region
        self.settings = settings or {"s3": {}}
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self.base = f"{prefix}/" if prefix else ""
        self.reached = False

    @classmethod
    def at(cls, uri: str) -> "S3Store":
        """uri: s3://bucket/prefix.  Raises StoreError."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        prefix = prefix.rstrip("/")
        if not bucket or "@" in bucket:
            raise not_a_store(uri)
        if {"", ".", ".."} & set(prefix.split("/")) and prefix:
            raise StoreError(f"{uri}: a prefix must not have empty parts, '.' or '..'; expected s3://bucket/prefix")
        return cls.open(bucket, prefix)

    @classmethod
    def open(cls, bucket: str, prefix: str) -> "S3Store":
        """As AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE and the AWS config files say, with their sections."""
        import boto3
        from botocore.exceptions import BotoCoreError

        uri = f"s3://{bucket}/{prefix}"
        try:
            session = boto3.session.Session()
            client = session.client("s3")
            settings = aws_settings(session._session)
            address = urlsplit(client.meta.endpoint_url)
            amazon = AMAZON.fullmatch(address.hostname or "") is not None
            store = cls(bucket, prefix, None if amazon else client.meta.endpoint_url, client.meta.region_name, settings)
            store.config()                              # refuses a style that there is not
        except (BotoCoreError, ValueError) as error:
            why = error if "@" not in str(error) else type(error).__name__      # an address may hold a password
            raise StoreError(f"{uri}: the AWS settings of this machine are not usable: {why}") from None
        if address.username or address.password:
            raise StoreError(f"{uri}: AWS_ENDPOINT_URL holds a user name or password. Put credentials into "
                             "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and only the address into the URL")
        store.session = session         # it has read botocore's description of S3, which takes a while
        return store

    def above(self) -> "tuple[S3Store, str] | None":
        folder, _, name = self.prefix.rpartition("/")
        return (S3Store(self.bucket, folder, self.endpoint_url, self.region, self.settings), name) if name else None

    @property
    def cache_name(self) -> str:
        host = urlsplit(self.endpoint_url or "//aws").netloc.replace(":", "-")
        return f"{host}/{self.bucket}/{self.prefix}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("session", "client")}

    @cached_property
    def session(self):
        import boto3
        return boto3.session.Session()

    @cached_property
    def client(self):
        return self.session.client("s3", endpoint_url=self.endpoint_url, region_name=self.region, config=self.config())

    def config(self):
        """What the user's configuration says, and ours where it says nothing.  Raises BotoCoreError, ValueError."""
        from botocore.config import Config
        s3, checksums = dict(self.settings["s3"]), {}
        if not self.is_amazon:
            # other stores may reject boto3's checksums, or never return them; the signature covers the body
            s3 = {"addressing_style": "path", "payload_signing_enabled": True} | s3
            checksums = {name: self.settings.get(name, "when_required") for name in AWS_SETTINGS if "checksum" in name}
        return Config(retries={"mode": self.settings.get("retry_mode", "standard"),
                               "total_max_attempts": int(self.settings.get("max_attempts", self.ATTEMPTS))},
                      max_pool_connections=32, connect_timeout=10, read_timeout=60, s3=s3, **checksums)

    @property
    def is_amazon(self) -> bool:
        """Also behind an endpoint of somebody's own network, *.vpce.amazonaws.com."""
        host = urlsplit(self.endpoint_url or "").hostname or "amazonaws.com"
        return f".{host}".endswith((".amazonaws.com", ".amazonaws.com.cn"))

    def create(self, key: str, data: bytes | Path, *, metadata: dict[str, str] | None = None) -> bool:
        attempt = secrets.token_hex(16)
        for _ in range(3):
            try:
                self.write(key, data, {**(metadata or {}), "attempt": attempt}, IfNoneMatch="*")
                return True
            except Refused:
                # A store may keep the object and then answer with an error: its own retry is what refuses us then.
                with suppress(NotFound):                # deleted meanwhile: there is room for ours again
                    return self.look(key)["Metadata"].get("attempt") == attempt
        raise StoreError(f"{self.uri_of(key)}: the store says that it exists, and that it does not. "
                         "Use a store whose answers are consistent, or a local folder")

    def put(self, key: str, data: bytes | Path, *, metadata: dict[str, str] | None = None,
            private: bool = False) -> None:
        self.write(key, data, metadata or {})

    def swap(self, key: str, old: bytes, new: bytes, *, atomic: bool = True,
             metadata: dict[str, str] | None = None) -> bool:
        def read(place: dict[str, str]) -> tuple[bytes, str]:
            answer = self.client.get_object(**place)
            return answer["Body"].read(), answer["ETag"]
        try:
            found, etag = self.patiently("read", key, read)
            if found != old:
                return False
            if atomic:
                self.write(key, new, metadata or {}, IfMatch=etag)
            else:
                self.write(key, new, metadata or {})
        except NotFound:
            return False
        except Refused:                                 # maybe by what our own first attempt has stored
            with suppress(NotFound):
                return self.get(key) == new
            return False
        return True

    def can_swap(self) -> bool:
        key = f"{PROBE}{secrets.token_hex(8)}"
        self.put(key, b"first")
        try:
            self.write(key, b"second", {}, settled=True, IfMatch=f'"{"0" * 32}"')
        except Refused:
            return self.swap(key, b"first", b"third") and self.get(key) == b"third"
        except (Unsupported, InOtherWords):
            pass
        finally:
            self.delete(key)
        return False

    def create_again(self, key: str, data: bytes) -> bool:
        try:
            self.write(key, data, {}, settled=True, IfNoneMatch="*")
            return True
        except Refused:
            return False
        except InOtherWords as error:
            raise StoreError(f"{self.uri}: this store answers {error} where an object that exists is to be created, "
                             "and not 412 Precondition Failed, so it cannot be told from a busy store. What is "
                             "missing is If-None-Match: * answered with 412. Use a store that does, or a local "
                             "folder") from None

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        def read(place: dict[str, str]) -> bytes:
            answer = self.client.get_object(**place)
            with closing(answer["Body"]) as body:       # a connection that was not read to its end is of no more use
                refuse_too_large(answer["ContentLength"], at_most)
                return body.read()
        return self.patiently("read", key, read)

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        place = {"Range": f"bytes={start}-{start + num_bytes - 1}"}
        return self.patiently("read", key, lambda of: self.client.get_object(**of, **place)["Body"].read())

    def presigned(self, key: str, lasts_s: float) -> str:
        place = {"Bucket": self.bucket, "Key": self.base + checked_key(key)}
        return self.client.generate_presigned_url("get_object", place, int(lasts_s))

    def download(self, key: str, path: Path) -> None:
        with arriving(path) as temporary:
            self.patiently("read", key, lambda place: self.client.download_file(*place.values(), str(temporary)))

    def head(self, key: str) -> ObjectInfo | None:
        try:
            there = self.look(key)
        except NotFound:
            return None
        sha256 = there["Metadata"].get("sha256")        # absent if another program wrote it
        return ObjectInfo(key=key, num_bytes=there["ContentLength"], modified_s=there["LastModified"].timestamp(),
                          sha256=sha256 or hashlib.sha256(self.get(key)).hexdigest())

    def create_from(self, other: Store, info: ObjectInfo, key: str) -> bool | None:
        """A copy within the server, of the object that was listed, if nothing has the key."""
        if not isinstance(other, S3Store) or (other.endpoint_url, other.region) != (self.endpoint_url, self.region):
            return None
        return copied(self, other, info, key) if info.etag and self.copies else None

    @cached_property
    def copies(self) -> bool:
        return can_copy(self)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        page = {"Bucket": self.bucket, "Prefix": self.base + prefix}
        while True:
            found = self.patiently("list", prefix, lambda _: self.client.list_objects_v2(**page))
            for entry in found.get("Contents", ()):
                key = entry["Key"].removeprefix(self.base)
                if key and not key.endswith("/"):       # a folder that some console has drawn
                    yield ObjectInfo(key=key, num_bytes=entry["Size"], modified_s=entry["LastModified"].timestamp(),
                                     etag=entry.get("ETag"))
            if not found.get("IsTruncated"):
                return
            page["ContinuationToken"] = found["NextContinuationToken"]

    def delete(self, key: str) -> None:
        with suppress(NotFound):
            self.patiently("delete", key, lambda place: self.client.delete_object(**place))

    def look(self, key: str) -> dict[str, Any]:
        return self.patiently("read", key, lambda place: self.client.head_object(**place))

    def write(self, key: str, data: bytes | Path, metadata: dict[str, str], *, settled: bool = False,
              **condition: str) -> None:
        metadata = {**metadata, "sha256": sha256_of(data)}
        kind = CONTENT_TYPES.get(PurePosixPath(checked_key(key)).suffix, "application/octet-stream")

        def send(place: dict[str, str]) -> None:
            with open_data(data) as body:
                self.client.put_object(**place, Body=body, Metadata=metadata, ContentType=kind, **condition)

        self.patiently("write", key, send, settled)

    def patiently(self, action: str, key: str, call: Callable[[dict[str, str]], T], settled: bool = False) -> T:
        try:
            return self.again_and_again(action, key, call, settled)
        finally:
            PATIENCE.end()

    def again_and_again(self, action: str, key: str, call: Callable[[dict[str, str]], T], settled: bool) -> T:
        """call(place of the key), and again for PATIENCE_S while the store is busy or away.

        A store that has never answered is not waited for: its address is wrong.
        settled: a write that is to be refused, of a key that nobody else writes; a conflict says nothing of being busy.
        Raises NotFound, Refused for a condition that does not hold, InOtherWords (settled) and StoreError.
        """
        from boto3.exceptions import RetriesExceededError
        from botocore.exceptions import BotoCoreError, ClientError

        began, wait_s = time.monotonic(), self.WAIT_S
        while True:
            try:
                result = call({"Bucket": self.bucket, "Key": self.base + key})
                self.reached = True
                return result
            except ClientError as error:
                self.reached = True
                code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 412 or code == "PreconditionFailed":      # some say it in the body of a 200
                    raise Refused from None
                if status == 404 and code != "NoSuchBucket":
                    raise NotFound(f"{self.uri_of(key)}: no such object") from None
                if status == 501:
                    raise Unsupported(f"{self.uri}: this store does not know conditional writes ({code}). Use one that "
                                      "does, or a local folder") from error
                why = f"{status} {code}"
                if settled and status not in AWAY and (status != 409 or time.monotonic() - began > self.SETTLE_S):
                    raise InOtherWords(why) from None
                if not (status in BUSY_ANSWERS or code in BUSY_ANSWERS) or time.monotonic() - began > self.PATIENCE_S:
                    message = str(error.response["Error"].get("Message", ""))
                    said = f"cannot {action}: {why} {message}"
                    kind = NoAccess if code in CLOSED else StoreError
                    raise kind(f"{self.uri}: {self.advice(action, status, code, message) or said}") from error
            except (BotoCoreError, RetriesExceededError) as error:
                why = type(error).__name__
                if not is_away(error):
                    raise StoreError(f"{self.uri}: cannot {action}: {advice_for(error)}") from error
                if not self.reached or time.monotonic() - began > self.PATIENCE_S:
                    raise StoreError(f"{self.uri}: {self.endpoint} does not answer ({why}). Check the network and "
                                     f"AWS_ENDPOINT_URL{self.style_hint}; the same command continues") from error
            PATIENCE.begin()
            _log.warning("%s: cannot %s now (%s); trying again in %.0f s", self.uri, action, why, wait_s)
            time.sleep(wait_s * random.uniform(0.5, 1.0))       # writers turned away together come back apart
            wait_s = min(2 * wait_s, 30.0)

    @property
    def endpoint(self) -> str:
        return self.endpoint_url or "Amazon S3"

    @property
    def style_hint(self) -> str:
        """Where the bucket is asked for as part of the host's name, which then may be unknown."""
        style = self.settings["s3"].get("addressing_style", "path")
        return "" if style == "path" or self.is_amazon else f" (and addressing_style = {style} in the AWS config)"

    def advice(self, action: str, status: int, code: str, said: str = "") -> str | None:
        return advice_of(self, action, status, code, said)


# Statuses and codes of a store that asks to be left alone for a while; 409 is a write of the same key at the same time.
AWAY = {408, 429, 500, 502, 503, 504}
BUSY_ANSWERS = {*AWAY, 409, "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"}

# SecondLevelDomainForbidden of Alibaba OSS, PathStyleDomainForbidden of Tencent COS, InvalidPathAccess of Volcengine
HOST_STYLE = re.compile(r"SecondLevelDomain|Path-?(Style|Access)|virtual[ -]?host", re.I)

CLOSED = {"NoSuchBucket", "AccessDenied", "AllAccessDisabled"}         # of this bucket; the store is well


class Refused(Exception):
    """The condition of a write does not hold: the object exists, or is not what it was."""


class InOtherWords(Exception):
    """The store refuses a write whose condition does not hold, with another answer than 412."""


class Unsupported(StoreError):
    """The store says that it has no such request."""


def advice_of(store: S3Store, action: str, status: int, code: str, said: str) -> str | None:
    """What is wrong and what to do, for an answer that no waiting will change; None where nobody knows."""
    if HOST_STYLE.search(code) or status in (400, 403) and HOST_STYLE.search(said):
        return (f"this store wants the bucket in the host's name ({code}). Set addressing_style = virtual in the "
                "section s3 of your AWS config: aws configure set default.s3.addressing_style virtual (or "
                "profile.NAME.s3.addressing_style)")
    if code == "NoSuchBucket":
        return f"{store.endpoint} has no bucket {store.bucket}. Create it first, or correct the URI"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch") or status == 401:
        return (f"{store.endpoint} refuses the credentials ({code}). Check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and that AWS_ENDPOINT_URL is the store they belong to")
    if "Expired" in code or code in ("InvalidToken", "TokenRefreshRequired"):
        return f"the credentials have expired ({code}). Renew them; the same command continues"
    if code == "RequestTimeTooSkewed":
        return "this machine's clock is wrong, so the store refuses its signature. Set the clock"
    if status == 403:
        return (f"not allowed to {action} ({code}). The credentials need s3:ListBucket, s3:GetObject, s3:PutObject "
                "and s3:DeleteObject here")
    if status == 301 or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return f"the bucket is in another region than {store.region} ({code}). Set AWS_REGION"
    return None


def copied(store: S3Store, other: S3Store, info: ObjectInfo, key: str) -> bool:
    """As create_from, on one server.  Raises NotFound, StoreError."""
    source = {"Bucket": other.bucket, "Key": other.base + info.key}
    try:
        store.patiently("copy", key, lambda place: store.client.copy_object(
            **place, CopySource=source, CopySourceIfMatch=info.etag, IfNoneMatch="*"))
        return True
    except Refused:                                     # one of the two conditions
        if any(found.key == key for found in store.list(key)):
            return False
        raise NotFound(f"{other.uri_of(info.key)}: not the object that was listed") from None


def can_copy(store: S3Store) -> bool:
    """Whether this server copies an object only where nothing has the key; tried out on objects of our own."""
    if "IfNoneMatch" not in store.client.meta.service_model.operation_model("CopyObject").input_shape.members:
        return False
    one, other = (f"{PROBE}{secrets.token_hex(8)}" for _ in range(2))
    source = {"Bucket": store.bucket, "Key": store.base + one}
    made = False
    try:
        store.put(one, b"one")
        for _ in range(2):                              # the first time there is room; some look at the source instead
            store.again_and_again("copy", other, lambda place: store.client.copy_object(
                **place, CopySource=source, IfNoneMatch="*"), settled=True)
            if made:
                return False
            made = store.get(other) == b"one"
    except Refused:
        return made
    except (NotFound, StoreError, InOtherWords):
        pass
    finally:
        store.delete(one)
        store.delete(other)
    return False


def aws_settings(core: Any) -> dict[str, Any]:
    """Of botocore's session `core`: its profile's section s3, and AWS_SETTINGS, there or in the environment."""
    profile = core.get_scoped_config()
    found = {name: os.environ.get(f"AWS_{name.upper()}") or profile.get(name) for name in AWS_SETTINGS}
    section = profile.get("s3")
    booleans = {"true": True, "false": False}
    s3 = {name: booleans.get(str(value).lower(), value) for name, value in section.items()} \
        if isinstance(section, dict) else {}
    return {"s3": s3, **{name: value for name, value in found.items() if value}}


def is_away(error: Exception) -> bool:
    """Whether it is the connection that failed, which may come back."""
    from boto3.exceptions import RetriesExceededError
    from botocore import exceptions

    lost = (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError,
            RetriesExceededError)
    return isinstance(error, lost) and not isinstance(error, exceptions.SSLError)


def advice_for(error: Exception) -> str:
    from botocore import exceptions

    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError,
                          exceptions.CredentialRetrievalError)):
        return ("no S3 credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
                "or give this machine a role")
    if isinstance(error, exceptions.SSLError):
        return "the store's certificate is not trusted. Check AWS_ENDPOINT_URL, and set AWS_CA_BUNDLE if it is your own"
    return f"{error}"
