"""What the trainings of the demo model have in common: losses, noise, and how weights are written."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.model import checkpoint, keys
from dailies.model.wan.vae import WanVAE

KL_WEIGHT, SHAPE_WEIGHT = 5e-4, 6.0


def autoencode(vae: WanVAE, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The video [N, 3, T, H, W] decoded again, and mean and log variance of its latents."""
    mean, log_variance = vae.encode(video)
    # at least this much noise: a sampler's small errors must be borne
    log_variance = log_variance.clamp(-4, 4)
    return vae.decode(mean + (0.5 * log_variance).exp() * noise.to(mean.dtype)), mean, log_variance


def weighted_errors(error: Tensor, coverage: Tensor, squares: float) -> Tensor:
    """Of pixels [N, 3, T, H, W].  coverage [N, T, H, W] of the moving shape, which is few pixels: without weight its
    colour comes last.  squares: how much they count beside the absolute error.
    """
    near = F.max_pool2d(coverage, 5, stride=1, padding=2)[:, None]
    return (1 + SHAPE_WEIGHT * near) * (error.abs() + squares * error.square())


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of the latents' distribution from the normal one, a mean over its elements."""
    return 0.5 * (mean.float().square() + log_variance.float().exp() - 1 - log_variance.float()).mean()


def noised(data: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents [B, C, T, H, W], sigmas [B] and the noise.

    Where a thing is and moves shows in thousands of latent cells, so it is decided at high noise: most is there.
    generator: of the CPU, for what is to be the same on every device.
    """
    drawn_on = data.device if generator is None else "cpu"
    noise = torch.randn(data.shape, generator=generator, device=drawn_on).to(data.device)
    normal = torch.randn(len(data), generator=generator, device=drawn_on)
    sigma = torch.sigmoid(normal * 1.4 + 1.1).to(data.device)
    return torch.lerp(data, noise, per_clip(sigma)), sigma, noise


def per_clip(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1, 1)


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in bf16, as they are released."""
    return {name: tensor.to(torch.bfloat16) if tensor.ndim > 1 else tensor for name, tensor in state.items()}


def save_released(model: nn.Module, table: keys.KeyTable, path: Path) -> None:
    """In bf16, under the tensor names of a release."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, halved(checkpoint.released_state(model, table)))
