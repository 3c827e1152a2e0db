"""What tests share: a real S3 server, started when a test asks for it, stores in it or in a folder, and Triton.

What can run where little is installed does: a file that needs an absent library is skipped, and says which one.
"""

import os
import secrets
import signal
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes too")


def pytest_configure(config):
    import torch
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:      # begun in the background: children would ignore it too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)                            # as results are made; more wait for each other on two cores
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False         # what is called fp32 is compared as fp32
    else:
        os.environ["TRITON_INTERPRET"] = "1"            # before Triton is imported and a kernel defined: they ask


def pytest_ignore_collect(collection_path, config):
    """With `-m gpu`, files without such a test are not imported: it takes longer than the tests."""
    if config.option.markexpr == "gpu" and collection_path.match("test_*.py"):
        text = collection_path.read_text(encoding="utf-8")
        return True if "mark.gpu" not in text and "triton_device" not in text else None
    return None


def pytest_pycollect_makemodule(module_path, parent):
    return Module.from_parent(parent, path=module_path)


class Module(pytest.Module):
    """A file of tests; where a library from outside is absent, its tests are skipped."""

    def collect(self):
        try:
            return list(super().collect())
        except self.CollectError as error:
            if not isinstance(error.__cause__, ModuleNotFoundError) or is_ours(absent := error.__cause__.name):
                raise
            library = absent.partition(".")[0]
            return pytest.skip(f"needs {library}, which is not installed: make test installs it",
                               allow_module_level=True)


def is_ours(module):
    """Whether it would lie in this repository: then its absence is a mistake."""
    root, here = module.partition(".")[0], Path(__file__).parent
    return root == "dailies" or any((folder / root).is_dir() or (folder / f"{root}.py").exists()
                                    for folder in (here, here.parent))


@pytest.hookimpl(tryfirst=True)                         # before -m chooses
def pytest_collection_modifyitems(config, items):
    import torch
    for item in items:
        if torch.cuda.is_available() and runs_triton(item):
            item.add_marker(pytest.mark.gpu)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run it with: make test ARGS=--slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run it there with: make test-gpu"))


def runs_triton(item):
    """Whether it would launch a kernel: one that compares implementations does for Triton's alone."""
    of = item.callspec.params.get("impl", "triton") if hasattr(item, "callspec") else "triton"
    return "triton_device" in getattr(item, "fixturenames", ()) and of == "triton"


@pytest.fixture(scope="session")
def triton_device():
    """Where Triton kernels run here: "cuda", or "cpu" in Triton's interpreter (no bf16: its tl.dot is wrong there)."""
    import torch
    pytest.importorskip("triton", reason="needs Triton: make test installs it")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def memory_full_of_nan(request):
    """For tests of kernels fresh memory holds NaN, or the largest whole number: a hole that a kernel leaves is seen."""
    if "triton_device" not in request.fixturenames and not request.path.name.startswith("test_kernels"):
        yield
        return
    import torch
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)        # without it torch leaves memory as it finds it
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


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
