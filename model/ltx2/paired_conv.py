"""3 x 3 x 3 convolutions on a CPU with a third fewer products: two frames at a time, and none twice at a clip's ends.

Letters  B clips  C channels  T frames  H W rows and columns. g0 g1 g2: a weight's taps in time, each [O, C, 1, 3, 3]
Source   Winograd's F(2, 3) along time (Lavin and Gray 2016, section 4.1).

Of frames d0 to d3 two frames of a result are made by four convolutions over pictures instead of six:

    m0 = (d0 - d2) * g0    m1 = (d1 + d2) * (g0 + g1 + g2) / 2    m2 = (d2 - d1) * (g0 - g1 + g2) / 2
    m3 = (d1 - d3) * g2    y0 = m0 + m1 + m2    y1 = m1 - m2 - m3

Where T is odd, a frame at an end is left. There two or three of the frames it sees are one and the same, by which
their taps, summed, are multiplied once. So T frames take 2T convolutions over pictures instead of 3T. Sums before the
products want the full precision of fp32; with products in bf16, which are fast, nothing would be gained.
"""

import torch
from torch import Tensor, nn

from dailies.model.convolution import convolve, empty_clip

FEWEST_CHANNELS = 96                                    # below, the sums take as long as what they save


def convolve_in_pairs(conv: nn.Conv3d, window: Tensor, front: int) -> Tensor:
    """conv(window), but for rounding: [B, O, T, H, W].

    window [B, C, T + 2, H, W], fp32 on a CPU, channels adjacent: its first front + 1 frames are the same one, and with
    front 1 its last two, too.  front: 1 or 2.
    """
    g0, g1, g2 = conv.weight.split(1, dim=2)
    frames = window.shape[2] - 2
    if frames == 1:
        return convolve(conv, window[:, :, :1], g0 + g1 + g2)
    begin = frames % 2 if front == 2 else 0             # where the pairs begin
    pairs = frames // 2
    seen = window[:, :, begin:]
    d0, d1, d2, d3 = (seen[:, :, k:k + 2 * pairs - 1:2] for k in range(4))
    outer = g0 + g2
    m1 = convolve(conv, d1 + d2, (outer + g1).mul_(0.5))
    m2 = product(conv, d2 - d1, (outer - g1).mul_(0.5))
    y = empty_clip(m1, frames)
    even, odd = (y[:, :, begin + k:begin + k + 2 * pairs - 1:2] for k in range(2))
    torch.add(m1, m2, out=even)
    torch.sub(m1, m2, out=odd)
    del m1, m2
    even += product(conv, d0 - d2, g0)
    odd -= product(conv, d1 - d3, g2)
    if frames % 2 and front == 2:
        y[:, :, :1] = convolve(conv, window[:, :, :1], g0 + g1 + g2)
    elif frames % 2:
        y[:, :, -1:] = convolve(conv, window[:, :, -3:-1], torch.cat((g0, g1 + g2), dim=2))
    return y


def product(conv: nn.Conv3d, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of x by `weight`, without a bias."""
    return torch.mkldnn_convolution(x, weight, None, conv.padding, conv.stride, conv.dilation, 1)
