"""What a render will compute on: the GPUs and cores of this machine, or of a cluster that is asked."""

from functools import cache

from dailies.actors.cores import usable_cores
from dailies.jobs.settings import RenderJob
from dailies.jobs.usage import NO_GPU, UsageError
from dailies.model.ways import CAPABILITIES, Gpu
from dailies.pipeline.scheduler.placement import Node


def refuse_silent_gpu(job: RenderJob) -> None:
    """Raises UsageError for a GPU whose driver does not answer torch, before anything is read or written."""
    import torch
    if job.device == "cuda" and job.ray == "local" and not torch.cuda.is_available():
        raise UsageError(NO_GPU)


@cache
def gpus_of(ray: str) -> tuple[Gpu, ...]:
    """The kinds of GPU that will do the work."""
    if ray == "local":
        import torch
        return tuple({Gpu(name=torch.cuda.get_device_name(place), capability=torch.cuda.get_device_capability(place))
                      for place in range(torch.cuda.device_count())})
    from dailies.pipeline.scheduler import cluster
    with cluster.connect(ray):
        kinds = sorted({node.gpu for node in cluster.nodes() if node.gpus})
    return tuple(Gpu(name=kind or "a GPU without a name", capability=CAPABILITIES.get(kind)) for kind in kinds)


@cache
def device_of(ray: str) -> str:
    """What the machines that will do the work compute on."""
    if ray == "local":
        import torch
        return "cuda" if torch.cuda.is_available() else "cpu"
    from dailies.pipeline.scheduler import cluster
    with cluster.connect(ray):
        return "cuda" if any(node.gpus for node in cluster.nodes()) else "cpu"


def machines_of(job: RenderJob) -> list[Node]:
    """What the work will be done on."""
    if job.ray == "local":
        import torch
        return [Node(id="here", host="this machine", cpus=cores_of(job) or 0, gpus=torch.cuda.device_count())]
    from dailies.pipeline.scheduler import cluster
    with cluster.connect(job.ray):
        return cluster.nodes()


def cores_of(job: RenderJob) -> int | None:
    """Of this machine, for a local run; None for a cluster.  Raises UsageError."""
    if job.ray != "local":
        if job.cpus is not None:
            raise UsageError("--cpus is of a local run: a cluster's machines say themselves what they have")
        return None
    usable = usable_cores()
    if job.cpus is not None and job.cpus > usable:
        raise UsageError(f"--cpus must be at most {usable}, the cores that this process may use here; got {job.cpus}")
    return job.cpus or usable


def variant_of(job: RenderJob, device: str) -> str | None:
    """What is asked for that moves the last bits, which guidance makes more of: a part of what a clip is.

    A CPU's threads share a sum; a GPU's do not know of them.
    """
    threads = job.threads_per_sampler or 1
    said = ["compiled"] * job.compile + [f"{threads} threads"] * (threads > 1 and device == "cpu")
    return ", ".join(said) or None
