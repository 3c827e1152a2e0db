"""Creates tonight's RayJob from its template: python -m dailies.infra.nightly rayjob.yaml, run by the CronJob in
nightly.yaml.

Does nothing while an earlier night still runs (a CronJob's own concurrencyPolicy sees only this short script), and
nothing when tonight's RayJob exists already, so it may be run again at any time.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

POD_IDENTITY = Path("/var/run/secrets/kubernetes.io/serviceaccount")
OURS = "app.kubernetes.io/part-of=dailies"
ENDED = {"Complete", "Failed", "ValidationFailed"}      # of status.jobDeploymentStatus
TIMEOUT_S = 30.0


class Api:
    """The RayJobs of one namespace, at the Kubernetes API server."""

    def __init__(self, server: str, namespace: str, token: str, tls: ssl.SSLContext | None = None):
        self.url, self.token, self.tls = f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs", token, tls

    @classmethod
    def of_this_pod(cls) -> "Api":
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", (POD_IDENTITY / "namespace").read_text(),
                   (POD_IDENTITY / "token").read_text(), ssl.create_default_context(cafile=POD_IDENTITY / "ca.crt"))

    def running(self) -> list[str]:
        """Names of our RayJobs that have not ended."""
        jobs = self.call("GET", f"{self.url}?labelSelector={OURS}")["items"]
        return [job["metadata"]["name"] for job in jobs
                if job.get("status", {}).get("jobDeploymentStatus") not in ENDED]

    def create(self, job: dict[str, Any]) -> bool:
        """True: it is there now; False: there was one of this name."""
        try:
            self.call("POST", self.url, json.dumps(job).encode())
        except urllib.error.HTTPError as error:
            if error.code == 409:
                return False
            raise
        return True

    def call(self, method: str, url: str, body: bytes | None = None) -> dict[str, Any]:
        request = urllib.request.Request(url, body, method=method, headers={
            "Authorization": f"Bearer {self.token}", "Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=self.tls) as answer:
            return json.load(answer)


def start_tonight(api: Api, template: str, date: str) -> str:
    """Create the RayJob of `date` (2026-01-31) unless one runs; says what was done.  Raises urllib.error.URLError."""
    job = yaml.safe_load(template.replace("{date}", date))
    if running := api.running():
        return f"not started: {', '.join(running)} still runs"
    name = job["metadata"]["name"]
    return f"created {name}" if api.create(job) else f"not started: {name} exists already"


def main() -> int:
    template = Path(sys.argv[1]).read_text(encoding="utf-8")
    try:
        print(start_tonight(Api.of_this_pod(), template, time.strftime("%Y-%m-%d")))
    except urllib.error.HTTPError as error:
        print(f"the API server refused: {error.code} {error.read().decode(errors='replace')}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"the API server cannot be reached: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
