"""Two processes that train one model: what they learn is what one process learns from whole batches."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from dailies.jobs.demo import together

TRAINING = """
import sys
from pathlib import Path
import torch
from torch import nn
from dailies.jobs.demo.phases import Phase, fit, rng_of
from dailies.jobs.demo.together import process_number, share_of, training_together

work = Path(sys.argv[1])

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))

def train(phase):
    net = model()
    def loss_of(step):
        rng = rng_of(phase.name, step)
        seeds = [rng.getrandbits(32) for _ in range(6)]
        x = torch.stack([torch.randn(12, generator=torch.Generator().manual_seed(seed))
                         for seed in (share_of(seeds) if phase.shared else seeds)])
        return (net(x) - x[:, :3]).square().mean(), {}
    fit(phase, net, loss_of, work)
    return torch.cat([p.detach().flatten() for p in net.parameters()])

with training_together():
    weights = dict(shared=train(Phase(name="both", steps=30, lr=1e-2, shared=True)),
                   alone=train(Phase(name="one", steps=30, lr=1e-2)))
    torch.save(weights, work / f"weights-{process_number()}.pt")
"""


def trained(work, processes):
    work.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    if processes > 1:
        env |= dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port),
                    GLOO_SOCKET_IFNAME="lo")
    running = [subprocess.Popen([sys.executable, "-c", TRAINING, str(work)], env=env | dict(RANK=str(rank)))
               for rank in range(processes)]
    try:
        assert [each.wait(120) for each in running] == [0] * processes
    finally:
        for each in running:                            # one that waits for another waits for days
            each.kill()
    return [torch.load(work / f"weights-{rank}.pt", weights_only=True) for rank in range(processes)]


def test_two_processes_learn_what_one_learns(tmp_path):
    one, = trained(tmp_path / "one", 1)
    both = trained(tmp_path / "both", 2)
    for name in ("shared", "alone"):
        assert torch.equal(both[0][name], both[1][name])
        torch.testing.assert_close(both[0][name], one[name], rtol=1e-4, atol=1e-5)
    # the first has written what is kept, once
    assert (tmp_path / "both" / "both.log").read_text().count("\n") == 1
    assert len(list((tmp_path / "both").glob("*.pt"))) == 4


def test_a_batch_that_cannot_be_shared_evenly_is_refused(monkeypatch):
    monkeypatch.setattr(together, "num_processes", lambda: 3)
    with pytest.raises(ValueError, match="batch of 16 cannot be shared by 3 processes"):
        together.share_of(list(range(16)))


def test_several_processes_on_one_gpu_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes .* Start one, without torchrun"):
        with together.training_together("cuda"):
            pass
