"""A smoke test without test tools, of whatever versions are installed: python -m tests.lowest

Imports every module, plans, renders two clips of the demo model through Ray, verifies them, and tries a store on the S3
test server. `make lowest` runs it with the lowest versions that pyproject.toml allows.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from dailies.infra.lowest import ROOT, lowest

FOLDERS = ("dailies", "kernels", "model", "actors", "pipeline", "jobs")
LACKS = {"triton"}                      # of the extra `gpu`: what cannot be imported without it is not imported
PROMPTS = ("a red circle moves left on a gray background", "a blue square grows on a white background")


def import_everything() -> int:
    count = 0
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        if path.name == "__main__.py":
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        try:
            importlib.import_module(name if name.partition(".")[0] == "dailies" else f"dailies.{name}")
            count += 1
        except ModuleNotFoundError as error:
            if error.name not in LACKS:
                raise
    return count


def dailies(*arguments: str) -> dict:
    """The JSON answer of one command, which must succeed."""
    done = subprocess.run([sys.executable, "-m", "dailies", *arguments, "--json"], capture_output=True, text=True,
                          timeout=600, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"dailies {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def two_clips(folder: Path) -> None:
    manifest = folder / "two.jsonl"
    manifest.write_text("".join(json.dumps({"prompt": prompt, "frames": 5, "steps": 2}) + "\n" for prompt in PROMPTS))
    what = [str(manifest), "--out", str(folder / "out")]
    assert dailies("plan", *what)["to_make"] == 2
    assert dailies("render", *what, "--device", "cpu")["done"] == 2
    assert dailies("verify", what[-1])["exit_code"] == 0
    assert len(list((folder / "out" / "clips").rglob("*.mp4"))) == 2


def probe_s3(folder: Path) -> None:
    from dailies.pipeline.store import open_store
    from tests.s3.server import S3Server

    server = S3Server(folder / "s3")
    try:
        os.environ.update(server.env)
        server.make_bucket("lowest")
        store = open_store("s3://lowest/night")
        store.probe()
        assert store.create("clips/a", b"one") and not store.create("clips/a", b"two")
        assert store.get("clips/a") == b"one"
    finally:
        server.stop()


def main() -> None:
    names = lowest((ROOT / "pyproject.toml").read_text())
    print("Python", sys.version.split()[0], *(f"{name} {metadata.version(name)}" for name in names), flush=True)
    with tempfile.TemporaryDirectory(prefix="dailies-lowest-") as folder:
        print(import_everything(), "modules imported", flush=True)
        two_clips(Path(folder))
        print("two clips planned, rendered and verified", flush=True)
        probe_s3(Path(folder))
        print("a store on the S3 test server answers as it must")


if __name__ == "__main__":
    main()
