"""Bad weather at the S3 server: a rule for its next requests, now and then, of every kind that real stores show."""

import random
import time
from collections.abc import Callable
from typing import Any

from tests.s3.server import S3Server

EVERY_S = (0.5, 3.0)
MOST = 2                                # rules that wait for their requests: a driver that starts makes few
EXPIRED_S = (0.3, 1.5)                  # credentials are refused for so long

METHODS = ("PUT", "GET", "HEAD", "DELETE")
KINDS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "503 bursts": lambda rng: dict(method=rng.choice(METHODS), status=503, times=rng.randint(3, 12)),
    "500 before the store": lambda rng: dict(method=rng.choice(("PUT", "GET")), status=500, times=rng.randint(1, 3)),
    "500 after the store": lambda rng: dict(method="PUT", status=500, after=True, times=rng.randint(1, 3)),
    "connections reset": lambda rng: dict(method=rng.choice(("PUT", "GET")), drop=True, after=rng.random() < 0.5,
                                          times=rng.randint(1, 3)),
    "stalls of 2 s": lambda rng: dict(method=rng.choice(("PUT", "GET")), stall_s=2.0, times=rng.randint(1, 3)),
    "truncated reads": lambda rng: dict(method="GET", cut=rng.randint(0, 2000), times=rng.randint(1, 3)),
}
EXPIRED = "expired credentials"


class Weather:
    """Asked again and again (`blow`), it lets something happen when its time has come."""

    def __init__(self, server: S3Server, rng: random.Random):
        self.server, self.rng = server, rng
        self.next_at, self.expired_until = time.monotonic(), 0.0

    def blow(self) -> None:
        now = time.monotonic()
        if self.expired_until and now >= self.expired_until:
            self.server.heal()
            self.expired_until = 0.0
        if now >= self.next_at and not self.expired_until:
            self.next_at = now + self.rng.uniform(*EVERY_S)
            if sum(rule["times"] > 0 for rule in self.server.faults()) < MOST:
                kind = self.rng.choice(list(KINDS))
                self.server.fault(kind=kind, **KINDS[kind](self.rng))

    def expire(self) -> None:
        """The credentials are refused for a moment, whatever the request."""
        self.expired_until = time.monotonic() + self.rng.uniform(*EXPIRED_S)
        code = self.rng.choice(("ExpiredToken", "InvalidAccessKeyId"))
        self.server.heal()
        self.server.fault(kind=EXPIRED, method="*", status=403, code=code, times=10**9)

    def struck(self) -> dict[str, int]:
        """How many requests each kind has hit."""
        counts = self.server.counts()["struck"]
        return {kind: counts.get(kind, 0) for kind in (*KINDS, EXPIRED)}
