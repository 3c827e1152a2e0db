"""All that is used of Ray's private modules, in one place, for the versions of Ray that it is known to fit.

    2.59, 2.60   known: the tests and `make lowest` run with them
    older        refused by pyproject.toml: they have no token that is looked for where a cluster is joined
    newer        tried; `unknown_version` says so, and where a name is gone the import does

Why each is used is said where it is; a public way, where Ray gets one, is to be preferred.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.job_config import JobConfig

from dailies.pipeline.scheduler import local_ray
from dailies.pipeline.scheduler.executor import ClusterError

KNOWN = ("2.59", "2.60")                # the first is pyproject's lower bound

try:
    from ray._private import ray_constants, services
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled
except ImportError as error:
    raise ClusterError(f"Ray {ray.__version__} is installed, and dailies does not know it: {error}. Install one that "
                       f"it knows: pip install 'ray[default]=={KNOWN[-1]}.*'") from error


def unknown_version() -> str | None:
    """What is to be said of the Ray that is installed, where it is not one of KNOWN."""
    if ".".join(ray.__version__.split(".")[:2]) in KNOWN:
        return None
    return (f"Ray {ray.__version__} is not one that dailies was tested with ({', '.join(KNOWN)}); where it does not do "
            f"as it should, install ray[default]=={KNOWN[-1]}.*")


def quiet_workers() -> None:
    """What workers write stays in their logs: deaths are in Progress.notes, not across the terminal."""
    ray._private.worker._worker_logs_enabled = False


@contextmanager
def on_loopback() -> Iterator[None]:
    """Ray takes 127.0.0.1 for this machine's address, and listens there only, where it believes that there are no other
    machines; its own switch for that is read when it is imported."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def forget_token() -> None:
    """Ray keeps the token that it has read in an earlier cluster of this process."""
    AuthenticationTokenLoader.instance().reset_cache()


def use_token() -> None:
    """Where this user has a token, Ray shows it to the cluster that is joined."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def full_address(address: str) -> str:
    """HOST:PORT, as Ray itself reads an address.  Raises ValueError or OSError."""
    return services.canonicalize_bootstrap_address_or_die(address)


def latest_address() -> str | None:
    """Of the cluster that the last `ray start` on this machine began or joined, by a file that anybody may write."""
    return services.find_bootstrap_address(None)


def processes() -> Iterator[Any]:
    """Those of this machine, with `info`: cmdline and uids. By Ray's psutil, which it brings along."""
    return services.psutil.process_iter(["cmdline", "uids"])


class Job(JobConfig):
    """Workers import from where the driver does. Ray would add the folder that the driver was started in: a file
    there of the name of one of our modules, or of a library's, would be imported in its place."""

    _py_driver_sys_path: list[str]

    def _serialize(self) -> str:
        self._py_driver_sys_path = local_ray.paths_kept(self._py_driver_sys_path)
        return super()._serialize()
