"""What tests share: a real S3 server, started when a test asks for it, stores in it or in a folder, and Triton."""

import os
import secrets

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes too")


def pytest_configure(config):
    import torch
    torch.set_num_threads(1)                            # as results are made; more wait for each other on two cores
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"            # before Triton is imported and a kernel defined: they ask


def pytest_collection_modifyitems(config, items):
    import torch
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run it with: make test ARGS=--slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run it there with: make test-gpu"))


@pytest.fixture(scope="session")
def triton_device():
    """Where Triton kernels run here: "cuda", or "cpu" in Triton's interpreter (no bf16: its tl.dot is wrong there)."""
    import torch
    pytest.importorskip("triton", reason="needs Triton: pip install 'dailies[dev]'")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The running server (s3/server.py). Tests that set faults ask for `s3_bucket` too, which heals it afterwards."""
    from s3.install import CannotInstall
    from s3.server import CannotStart, S3Server

    try:
        server = S3Server(tmp_path_factory.mktemp("s3"))
    except (CannotInstall, CannotStart) as error:
        pytest.skip(str(error))
    yield server
    server.stop()


@pytest.fixture
def s3_bucket(s3_server, monkeypatch):
    """s3:// URI of a fresh, empty bucket; the environment, which child processes inherit, points at its server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    name = f"test-{secrets.token_hex(6)}"
    s3_server.make_bucket(name)
    yield f"s3://{name}"
    s3_server.heal()


@pytest.fixture(params=["folder", "s3"])
def store_uri(request, tmp_path):
    """Where a store may be: a folder that does not exist yet, then a prefix in a bucket."""
    if request.param == "folder":
        return str(tmp_path / "out")
    return request.getfixturevalue("s3_bucket") + "/night/1"
