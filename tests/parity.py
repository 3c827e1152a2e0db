"""Random models of diffusers, and ours with the same weights."""

import torch

from dailies.model import checkpoint


def randomise(model, seed):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.15)
        if "norm" in name and name.endswith(("weight", "gamma")):
            parameter.data.add_(1)
    return model.requires_grad_(False).eval()


def with_weights_of(theirs, make, folder, *tables):
    """Our model, through a file as diffusers saves it."""
    checkpoint.save(folder / "theirs.safetensors", theirs.state_dict())
    return checkpoint.build(make, folder / "theirs.safetensors", *tables, name="parity", device="cpu", precision="fp32")
