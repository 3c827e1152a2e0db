"""A real S3 server for the tests: installed on first use, started on loopback, told to fail on demand."""

import json
import os
import selectors
import subprocess
import urllib.request
from functools import cached_property
from pathlib import Path

import boto3
from botocore.config import Config

from .install import install

ACCESS_KEY, SECRET_KEY = "test:tester", "testing"
START_S = 60


class CannotStart(RuntimeError):
    """The server is installed but does not run on this machine; the message says why."""


class S3Server:
    """OpenStack Swift's S3 door. `stop` and `start` keep the objects and the address."""

    def __init__(self, folder: Path):
        """folder: where its objects lie.  Raises CannotInstall or CannotStart."""
        self.folder, self.port = folder, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.python = install()
        try:
            os.setxattr(self.folder, "user.dailies", b"1")
        except OSError as error:
            raise CannotStart(f"The S3 test server needs a disk with user xattrs; {folder}: {error}") from error
        self.start()

    def start(self) -> None:
        script = Path(__file__).with_name("swift_server.py")
        with open(self.folder / "server.log", "ab") as errors:
            # its standard input is ours to hold: when this process ends, however it ends, the server does too
            self.process = subprocess.Popen([self.python, "-W", "ignore", script, self.folder, str(self.port)],
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            said = self.process.stdout.readline() if selector.select(START_S) else ""
        if not said.startswith("ready"):
            self.stop()
            log = (self.folder / "server.log").read_text().strip().splitlines()
            raise CannotStart(f"The S3 test server did not start: {log[-1] if log else 'it said nothing'}")
        self.port = int(said.split()[1])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """The environment in which any AWS client talks to this server and to no other."""
        return {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
                "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "NO_PROXY": "127.0.0.1"}

    def make_bucket(self, name: str) -> None:
        self.client.create_bucket(Bucket=name)

    def open_to_all(self, bucket: str) -> str:
        """Let everybody read a bucket; returns its address, at which nobody is asked for a key."""
        self.client.put_bucket_acl(Bucket=bucket, ACL="public-read")
        return f"{self.url}/v1/AUTH_test/{bucket}"      # Swift's own door: its S3 door serves nobody without a key

    @cached_property
    def client(self):
        """An S3 client of the tests' own, to look at objects without the code under test."""
        return boto3.session.Session().client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY, config=Config(s3={"addressing_style": "path"}))

    def fault(self, *, method: str, match: str = "", times: int = 1, **what) -> None:
        """The next `times` requests of `method` ("*" is any) with `match` in their path fail; rules add up.

        what: status=503 (code="SlowDown"), drop=True, stall_s=1.5, cut=100 or strip="If-None-Match"; with after=True a
        status or a drop comes after the request was served, and with on=412 a status only in place of that one;
        header="If-Match": only requests that carry it; kind="resets": what `counts` names it.
        """
        if "status" in what:
            what.setdefault("code", {500: "InternalError", 501: "NotImplemented", 503: "SlowDown",
                                     409: "ConditionalRequestConflict"}
                            .get(what["status"], "ByRule"))
        left = [rule for rule in self.faults() if rule["times"] > 0 or not rule.get("kind")]
        rules = [*left, {"method": method, "match": match, "times": times, **what}]
        self.ask("POST", "/.faults", json.dumps(rules).encode()).close()

    def faults(self) -> list[dict]:
        """The rules as they stand; `times` counts what is left."""
        with self.ask("GET", "/.faults") as answer:
            return json.load(answer)

    def counts(self) -> dict[str, dict[str, int]]:
        """struck: requests that rules of each kind have hit.  stored: successful writes of each path."""
        with self.ask("GET", "/.counts") as answer:
            return json.load(answer)

    def heal(self) -> None:
        self.ask("POST", "/.faults", b"[]").close()

    def ask(self, method: str, path: str, data: bytes | None = None):
        request = urllib.request.Request(self.url + path, data, method=method)
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)
