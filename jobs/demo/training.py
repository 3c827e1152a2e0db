"""One training that ends when its time is up, on a device that does not wait for the host.

A step draws its data, learns and averages on the device alone, so the host only sends it off: as kernels, or, where
they are so many and small that sending them takes longer than running them, as one CUDA graph. The learning rate
follows the share of the time that is gone, so that it has come down when the training ends, however fast the device is.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dailies.jobs.demo.phases import is_inner

Loss = Callable[[], Tensor]                             # draws a batch, and gives its loss
WARM_UP, LOWEST = 0.04, 0.02                            # share of the time, share of the rate
RECENT = 0.9                                            # share that a running mean of losses keeps
CHECK_S = 0.3                                           # how often the host waits for the device, and looks at the loss
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)               # as torch.optim.Muon


class Learner:
    """Muon for the weights of inner layers, AdamW for the rest, clipping, and a running average of the weights.

    The same steps as `phases.Optimizers`, but matrices of one shape are one batch, the rates are tensors, and nothing
    waits for the device.
    """

    MOMENTUM, BETAS, EPS = 0.95, (0.9, 0.99), 1e-9

    def __init__(self, model: nn.Module):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.params = list(trained.values())
        place = {name: i for i, name in enumerate(trained)}
        self.groups: dict[tuple[int, int], list[int]] = {}                      # shape of the matrix -> of params
        for name, p in trained.items():
            if is_inner(name, p):
                self.groups.setdefault((len(p), p[0].numel()), []).append(place[name])
        self.rest = [place[name] for name, p in trained.items() if not is_inner(name, p)]
        device = self.params[0].device
        self.momenta = {shape: torch.zeros(len(at), *shape, device=device) for shape, at in self.groups.items()}
        self.first, self.second = ([torch.zeros_like(self.params[i]) for i in self.rest] for _ in range(2))
        self.average = [p.detach().clone() for p in self.params]
        self.muon_rate, self.adam_rate, self.share = (torch.zeros((), device=device) for _ in range(3))
        self.steps = 0

    def set_rate(self, rate: float) -> None:
        """Before every step: what it learns by."""
        self.steps += 1
        unbiased = math.sqrt(1 - self.BETAS[1] ** self.steps) / (1 - self.BETAS[0] ** self.steps)
        self.muon_rate.fill_(rate)
        self.adam_rate.fill_(rate * unbiased)

    def average_over(self, steps: float) -> None:
        self.share.fill_(1 / max(1.0, steps))

    @torch.no_grad()
    def step(self) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_mul_(grads, (1 / norm).clamp_max(1))
        for shape, at in self.groups.items():
            grad, momentum = torch.stack([grads[i].flatten(1) for i in at]), self.momenta[shape]
            momentum.lerp_(grad, 1 - self.MOMENTUM)
            update = orthogonal(grad.lerp(momentum, self.MOMENTUM)).float()
            update *= self.muon_rate * (0.2 * math.sqrt(max(shape)))            # as large as AdamW's
            torch._foreach_sub_([self.params[i] for i in at],
                                [u.view(self.params[i].shape) for u, i in zip(update, at, strict=True)])
        rest = [grads[i] for i in self.rest]
        torch._foreach_lerp_(self.first, rest, 1 - self.BETAS[0])
        torch._foreach_mul_(self.second, self.BETAS[1])
        torch._foreach_addcmul_(self.second, rest, rest, 1 - self.BETAS[1])
        root = torch._foreach_sqrt(self.second)
        torch._foreach_add_(root, self.EPS)
        update = torch._foreach_div(self.first, root)
        torch._foreach_mul_(update, self.adam_rate)
        torch._foreach_sub_([self.params[i] for i in self.rest], update)
        away = torch._foreach_sub(self.params, self.average)
        torch._foreach_mul_(away, self.share)
        torch._foreach_add_(self.average, away)

    @torch.no_grad()
    def take(self, weights: list[Tensor]) -> None:
        """Make these the weights: `average`, or a copy of it."""
        torch._foreach_copy_(self.params, weights)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: five steps of Newton-Schulz.  [G, m, n] -> bf16 [G, m, n].

    Source   Jordan et al., Muon (2024); torch.optim.Muon.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).bfloat16()
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


def rate_at(share: float) -> float:
    """Of the highest rate, when this share of the time is gone: a linear warm-up, then a cosine."""
    share = min(1.0, share)
    return min(1.0, (share + 0.002) / WARM_UP) * (LOWEST + (1 - LOWEST) * (0.5 + 0.5 * math.cos(math.pi * share)))


class TimedTraining:
    """The training of one model: its losses, taken in turn, each a step of its own that can be recorded."""

    def __init__(self, name: str, model: nn.Module, losses: Sequence[tuple[str, Loss]], rate: float):
        """losses: names and losses; what has the same name is the same."""
        self.name, self.model, self.rate = name, model, rate
        self.turns = [name for name, _ in losses]
        self.learner = Learner(model)
        self.seen = {name: torch.zeros((), device=self.learner.share.device) for name, _ in losses}
        self.taken: Counter[str] = Counter()
        self.runs = {name: self.as_step(name, loss_of) for name, loss_of in dict(losses).items()}
        self.recorded = False

    def as_step(self, name: str, loss_of: Loss) -> Callable[[], None]:
        def step() -> None:
            loss = loss_of()
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            self.learner.step()
            self.seen[name].lerp_(loss.detach(), 1 - RECENT)
        return step

    def take_step(self, name: str, share: float) -> None:
        self.learner.set_rate(self.rate * rate_at(share))
        self.runs[name]()
        self.taken[name] += 1

    def losses(self) -> dict[str, float]:
        """Running means of the last ten or so of each.  Waits for the device."""
        means = torch.stack(list(self.seen.values())).tolist()
        return {name: mean / (1 - RECENT ** self.taken[name]) for name, mean in zip(self.seen, means, strict=True)
                if self.taken[name]}

    def record(self) -> None:
        """Each step as one CUDA graph.  It is taken twice before, at the lowest rate, so that kernels are chosen."""
        stream = torch.cuda.Stream()
        for name, run in self.runs.items():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.take_step(name, 1.0)
            torch.cuda.current_stream().wait_stream(stream)
            self.model.zero_grad(set_to_none=True)       # the recording's gradients lie where only it writes
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            self.runs[name] = graph.replay
        self.recorded = True

    def run(self, until: float, *, most_steps: int | None = None, between: Callable[[], None] | None = None,
            may_record: Callable[[], bool] | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
        """Train until time.monotonic() is `until`; the model then has the average of its weights.

        between: called whenever the host has waited for the device.  may_record: asked then, whether steps can be
        recorded.  A loss that is no number ends the training with the weights of the last look before it.  Returns what
        was done.
        """
        began, at_a_time, share, trouble = time.monotonic(), 1, 0.0, None
        self.learner.average_over(10)
        kept, step, looked_at = [weight.clone() for weight in self.learner.average], 0, (0.0, 0)
        while True:
            for _ in range(at_a_time):
                self.take_step(self.turns[step % len(self.turns)], share)
                step += 1
            means = self.losses()
            if not all(map(math.isfinite, means.values())):
                trouble = f"a loss is no number after step {step}"
                self.learner.average = kept
                break
            torch._foreach_copy_(kept, self.learner.average)
            if between is not None:
                between()
            gone = time.monotonic() - began
            share, a_step = gone / max(until - began, 1e-3), (gone - looked_at[0]) / (step - looked_at[1])
            looked_at = gone, step
            at_a_time = max(1, min(50, int(CHECK_S / a_step)))
            self.learner.average_over(min(200.0, (until - began) / a_step / 12))             # a twelfth of all steps
            said = " ".join(f"{name} {value:.4f}" for name, value in means.items())
            say(f"{self.name} step {step} at {gone:.1f} s, {share:.0%}: {said}")
            if gone + at_a_time * a_step / 2 >= until - began or (most_steps and step >= most_steps):
                break
            if not self.recorded and may_record is not None and may_record():
                self.record()
                looked_at = time.monotonic() - began, step
        self.learner.take(self.learner.average)
        self.model.zero_grad(set_to_none=True)
        return dict(steps=step, seconds=round(time.monotonic() - began, 2), recorded=self.recorded,
                    losses={name: round(value, 5) for name, value in means.items()}, trouble=trouble)
