"""3 x 3 x 3 convolutions on a CPU with up to half the products: four frames at a time, and none twice at a clip's ends.

Letters  B clips  C channels  T frames  H W rows and columns  m frames of a group  q groups
Source   Winograd's F(m, 3) along time (Lavin and Gray 2016, sections 4.1 and 4.3); points 0, 1, -1, 2, -2, infinity.

m frames of a result are made by m + 2 convolutions over pictures instead of 3m. With d the m + 2 frames that they see
and g a weight's three taps in time, each a 3 x 3 convolution:

    y = after ((taps g) * (before d))

Of the frames that make no group of four, two are a group, and one is left at an end of the clip. There two or three of
the frames it sees are one and the same, by which their taps, summed, are multiplied once. So 4n + 1 frames take 6n + 2
convolutions over pictures instead of 12n + 3. Sums before the products want the full precision of fp32, and cost two of
its bits; with products in bf16, which are fast, nothing would be gained.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dailies.model.convolution import convolve, empty

FEWEST_CHANNELS = 96                                    # below, the sums take as long as what they save
CELLS_TOGETHER = 1 << 14                                # pixels of a frame times frames: what lies in memory at once


class Transform(NamedTuple):
    """The three matrices of F(m, 3).  before [m + 2, m + 2]  taps [m + 2, 3]  after [m, m + 2]"""

    before: Tensor
    taps: Tensor
    after: Tensor

    @property
    def frames(self) -> int:
        """m"""
        return len(self.after)


FOUR = Transform(
    before=torch.tensor([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0],
                         [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1.0]]),
    taps=torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24.0]]) / 24,
    after=torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1.0]]))
TWO = Transform(
    before=torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1.0]]),
    taps=torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2.0]]) / 2,
    after=torch.tensor([[1, 1, 1, 0], [0, 1, -1, 1.0]]))


def convolve_in_groups(conv: nn.Conv3d, window: Tensor, front: int) -> Tensor:
    """conv(window), but for rounding: [B, O, T, H, W].

    window [B, C, T + 2, H, W], fp32 on a CPU, channels adjacent: its first front + 1 frames are the same one, and with
    front 1 its last two, too.  front: 1 or 2.  H and W are two less in y where the convolution adds no zeros.
    """
    g0, g1, g2 = conv.weight.split(1, dim=2)
    frames = window.shape[2] - 2
    height, width = (side - 2 + 2 * beyond for side, beyond in zip(window.shape[3:], conv.padding[1:], strict=True))
    y = empty((len(window), len(conv.weight), frames, height, width), window)
    at, odd = 0, frames % 2
    if odd and (front == 2 or frames == 1):
        y[:, :, :1] = convolve(conv, window[:, :, :1], g0 + g1 + g2)
        at = 1
    for transform in (FOUR, TWO):
        if groups := (frames - at) // transform.frames:
            beyond = at + groups * transform.frames
            convolve_groups(conv, window[:, :, at:beyond + 2], transform, y[:, :, at:beyond])
            at = beyond
    if at < frames:
        y[:, :, at:] = convolve(conv, window[:, :, -3:-1], torch.cat((g0, g1 + g2), dim=2))
    return y


def convolve_groups(conv: nn.Conv3d, window: Tensor, transform: Transform, y: Tensor) -> None:
    """Written to y [B, O, q * m, H, W], of a window [B, C, q * m + 2, H, W]."""
    weights = [summed(conv.weight, shares) for shares in transform.taps.tolist()]
    m, cells = transform.frames, y.shape[3] * y.shape[4]
    together = m * max(1, CELLS_TOGETHER // (m * cells))
    for seen, made in zip(window, y, strict=True):
        for start in range(0, y.shape[2], together):
            stop = min(start + together, y.shape[2])
            some_groups(conv, weights, seen[:, start:stop + 2], transform, made[:, start:stop])


def some_groups(conv: nn.Conv3d, weights: list[Tensor], window: Tensor, transform: Transform, y: Tensor) -> None:
    """Of one clip: written to y [O, q * m, H, W], of a window [C, q * m + 2, H, W]."""
    m, groups = transform.frames, y.shape[1] // transform.frames
    rows = window.permute(1, 2, 3, 0)                                                   # [q * m + 2, H, W, C]
    sums = rows.new_empty((m + 2, groups, *rows.shape[1:]))
    for k in range(groups):
        torch.mm(transform.before, rows[k * m:k * m + m + 2].flatten(1), out=sums[:, k].flatten(1))
    products = rows.new_empty((m + 2, groups, *y.shape[2:], len(y)))
    for i, weight in enumerate(weights):
        bias = conv.bias if i == 1 else None                                            # which each frame takes once
        made = torch.mkldnn_convolution(sums[i].permute(3, 0, 1, 2)[None], weight, bias, conv.padding, conv.stride,
                                        conv.dilation, 1)
        products[i] = made[0].permute(1, 2, 3, 0)
    del sums
    rows = y.permute(1, 2, 3, 0)
    for k in range(groups):
        torch.mm(transform.after, products[:, k].flatten(1), out=rows[k * m:k * m + m].flatten(1))


def summed(weight: Tensor, shares: list[float]) -> Tensor:
    """[O, C, 1, 3, 3]: the three taps in time of a weight [O, C, 3, 3, 3], each so many times."""
    total = None
    for share, tap in zip(shares, weight.split(1, dim=2), strict=True):
        if share:
            total = tap * share if total is None else total.add_(tap, alpha=share)
    assert total is not None
    return total
