"""The determinism class: what the bits of a clip depend on beside its request.

A request decides a clip; the last bits of its products are decided by who computes them, and a sampler's guidance can
make those visible. Of one clip_id and one class the pixels are the same to the last bit. Of two classes the clips show
the same, and may differ where somebody looks closely. What belongs to a class: the model of the device, a CPU's
instructions and threads, compilation, the versions of the libraries that make the products. (Threads and compilation
that were asked for are in the request too, so in clip_id.) What does not, because it changes no bit: the batch, the
worker, the order, the time, and where a clip was stopped and continued.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from dailies.kernels import processor


def class_on(device: str, *, threads: int, compiled: bool = False) -> str:
    """Of what is computed in this process.  threads: torch's; they count on a CPU alone."""
    if device.startswith("cpu"):
        found = [processor.described(), f"{threads} thread{'s' if threads != 1 else ''}", f"torch {torch.__version__}"]
    else:
        found = [torch.cuda.get_device_name(device), f"torch {torch.__version__}",
                 f"cuDNN {torch.backends.cudnn.version()}", f"Triton {triton_version()}"]
    return ", ".join(found + ["compiled"] * compiled)


@cache
def triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"
