"""OpenStack Swift with its S3 door on loopback: one process, one disk, one replica; in the environment of install.py.

    python swift_server.py FOLDER [PORT]       prints "ready PORT"; stops on SIGTERM or when its standard input closes

Access key test:tester, secret testing. FOLDER needs user xattrs; started again on it, the server has its objects back.
POST /.faults takes a JSON list of rules (see Faults), GET /.faults tells how many times each is still to strike.
GET /.counts tells how often rules of each kind have struck, and how often each path was stored.
"""

import sys
import types

import eventlet
import eventlet.tpool
from swift.common import utils

utils.monkey_patch()
eventlet.hubs.use_hub("poll")

import errno  # noqa: E402  everything below must see the patched sockets
import json  # noqa: E402
import os  # noqa: E402
import secrets  # noqa: E402
import socket  # noqa: E402
from collections import Counter, defaultdict  # noqa: E402
from pathlib import Path  # noqa: E402

from eventlet import wsgi  # noqa: E402
from eventlet.semaphore import Semaphore  # noqa: E402
from swift.common.constraints import MAX_HEADER_SIZE, MAX_REQUEST_LINE  # noqa: E402
from swift.common.http_protocol import SwiftHttpProtocol  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402
from swift.common.wsgi import loadapp  # noqa: E402

PIPELINE = "catch_errors gatekeeper healthcheck bulk s3api tempauth copy slo dlo versioned_writes symlink"
OPTIONS = {
    "s3api": "location = us-east-1\ns3_acl = false\nforce_swift_request_proxy_log = false",
    "tempauth": "user_test_tester = testing .admin",
    "versioned_writes": "allow_object_versioning = true",
}


class Faults:
    """Stands before Swift: makes its conditional create atomic, adds If-Match, and fails requests by rule.

    Swift looks at If-None-Match only when a request starts, so writers of one key take turns here, as they do in S3.
    A write with If-Match is answered with 501 by Swift; here its turn compares it with the ETag that was told last.
    A rule has `method` ("*" is any), `match` (part of the path), `times`, perhaps `header` (only requests that carry
    it) and `kind` (what it is counted as), and one of
        status   answer with this status and `code`; with after = true the request is served first; with on = 412
                 besides, only where that was the answer
        drop     close the connection without an answer; `after` as above
        stall_s  wait this long, then serve
        cut      close the connection after so many bytes of the answer to a GET; the headers promise all of it
        strip    forget this header of the request ("If-None-Match"), then serve
    """

    def __init__(self, app):
        self.app, self.rules, self.etags = app, [], {}
        self.struck, self.stored = Counter(), Counter()
        self.turns = defaultdict(lambda: [0, Semaphore(1)])

    def __call__(self, env, start_response):
        if env["PATH_INFO"] in ("/.faults", "/.counts"):
            return self.control(env, start_response)
        rule = self.rule_for(env)
        if "stall_s" in rule:
            eventlet.sleep(rule["stall_s"])
        if "strip" in rule:
            env.pop("HTTP_" + rule["strip"].upper().replace("-", "_"), None)
        strikes = "status" in rule or rule.get("drop", False)
        if strikes and not rule.get("after"):
            return self.strike(rule, env, start_response)
        if "cut" in rule and env["REQUEST_METHOD"] == "GET":
            return self.cut(rule["cut"], env, start_response)
        if env["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self.app(env, lambda *said: self.remember(env, said[1]) or start_response(*said))
        turn = self.turns[env["PATH_INFO"]]
        turn[0] += 1
        try:
            with turn[1]:
                wanted = env.pop("HTTP_IF_MATCH", None)
                if wanted is not None and wanted != self.etags.get(env["PATH_INFO"]):
                    refusal = {"status": 412, "code": "PreconditionFailed"}
                    return self.strike(rule if rule.get("on") == 412 else refusal, env, start_response)
                said = []
                body = self.app(env, lambda status, headers, exc_info=None: said.append((status, headers)))
                answer = b"".join(body)
                if hasattr(body, "close"):
                    body.close()
                self.remember(env, said[-1][1])
                self.stored[env["PATH_INFO"]] += env["REQUEST_METHOD"] == "PUT" and said[-1][0].startswith("2")
        finally:
            turn[0] -= 1
            if not turn[0]:
                self.turns.pop(env["PATH_INFO"], None)
        status = int(said[-1][0].split()[0])
        if strikes and rule.get("on", status) == status:
            return self.strike(rule, env, start_response)
        start_response(*said[-1])
        return [answer]

    def remember(self, env, headers) -> None:
        """The object's ETag as this answer tells it; none after a DELETE."""
        self.etags[env["PATH_INFO"]] = next((value for name, value in headers if name.lower() == "etag"), None)

    def rule_for(self, env) -> dict:
        for rule in self.rules:
            if rule["times"] > 0 and rule["method"] in ("*", env["REQUEST_METHOD"]) \
                    and rule["match"] in env["PATH_INFO"] \
                    and "HTTP_" + rule.get("header", "Host").upper().replace("-", "_") in env:
                rule["times"] -= 1
                self.struck[rule.get("kind", "")] += 1
                return rule
        return {}

    def strike(self, rule, env, start_response):
        if rule.get("drop"):
            self.hang_up(env)
        body = f"<?xml version='1.0'?><Error><Code>{rule['code']}</Code><Message>by rule</Message></Error>".encode()
        start_response(f"{rule['status']} By Rule", [("Content-Type", "application/xml"), ("Connection", "close"),
                                                     ("Content-Length", str(len(body)))])
        return [body]

    def cut(self, num_bytes, env, start_response):
        body = b"".join(self.app(env, start_response))
        yield body[:num_bytes]
        if len(body) > num_bytes:
            self.hang_up(env)

    def hang_up(self, env):
        env["eventlet.input"].get_socket().shutdown(socket.SHUT_RDWR)
        raise OSError(errno.EPIPE, "connection dropped by rule")

    def control(self, env, start_response):
        if env["REQUEST_METHOD"] == "POST":
            self.rules = json.loads(env["wsgi.input"].read())
        counts = {"struck": self.struck, "stored": self.stored}
        body = json.dumps(counts if env["PATH_INFO"] == "/.counts" else self.rules).encode()
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


def configure(folder: Path, ports: dict[str, int]) -> None:
    """Writes the configuration of the four servers, and rings that hold one device each."""
    (folder / "disk" / "d1").mkdir(parents=True, exist_ok=True)
    (folder / "cache").mkdir(exist_ok=True)
    if not (folder / "swift.conf").exists():
        (folder / "swift.conf").write_text(f"[swift-hash]\nswift_hash_path_suffix = {secrets.token_hex(8)}\n"
                                           "[storage-policy:0]\nname = default\ndefault = yes\n")
    common = (f"[DEFAULT]\nswift_dir = {folder}\ndevices = {folder / 'disk'}\nmount_check = false\n"
              f"recon_cache_path = {folder / 'cache'}\nfallocate_reserve = 0\ndisable_fallocate = true\n"
              "log_level = WARNING\n")
    for kind, port in ports.items():
        if kind == "proxy":
            sections = "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n{OPTIONS.get(name, '')}\n"
                               for name in PIPELINE.split())
            text = (f"{common}[pipeline:main]\npipeline = {PIPELINE} proxy-server\n[app:proxy-server]\n"
                    f"use = egg:swift#proxy\nallow_account_management = true\naccount_autocreate = true\n{sections}")
        else:
            text = f"{common}[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n"
            builder = RingBuilder(part_power=6, replicas=1, min_part_hours=0)
            builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d1", "weight": 1.0,
                             "meta": "", "replication_ip": "127.0.0.1", "replication_port": port})
            builder.rebalance()
            builder.get_ring().save(str(folder / f"{kind}.ring.gz"))
        (folder / f"{kind}-server.conf").write_text(text)


def main(folder: Path, port: int) -> None:
    os.environ["TZ"] = "UTC+0"
    listeners = {kind: eventlet.listen(("127.0.0.1", port if kind == "proxy" else 0), backlog=128)
                 for kind in ("account", "container", "object", "proxy")}
    ports = {kind: listener.getsockname()[1] for kind, listener in listeners.items()}
    configure(folder, ports)
    utils.set_swift_dir(str(folder))
    wsgi.MAX_HEADER_LINE = MAX_HEADER_SIZE
    silent = types.SimpleNamespace(write=lambda text: None)
    for kind, listener in listeners.items():
        app = loadapp(str(folder / f"{kind}-server.conf"), global_conf={"log_name": kind})
        app = Faults(app) if kind == "proxy" else app
        # Swift's names of headers are exact ("ETag"), so eventlet must not capitalise them
        eventlet.spawn(wsgi.server, listener, app, silent, protocol=SwiftHttpProtocol, debug=False,
                       capitalize_response_headers=False, url_length_limit=MAX_REQUEST_LINE)
    print("ready", ports["proxy"], flush=True)
    eventlet.tpool.execute(os.read, 0, 1)               # returns when the pipe's other end is gone
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
