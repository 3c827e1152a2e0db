"""Wan 2.1 image-video VAE: pixels to latents and back, causal in time.

Letters  B clips  C channels  T latent steps  F pixel frames = 4 * (T - 1) + 1  H W rows and columns
Source   Wan 2.1 release, WanVAE_; also Linum v2's decoder. Tensor names: model/keys.py.

A clip is coded in pieces that fit in memory, and its pixels and latents do not depend on the pieces:

chunk   latent steps coded together. Every convolution in time remembers the last frames it saw in a `Memory`, and the
        first frame of a clip is special in two places (`Upsample`, `Downsample`): it is one pixel frame, not four.
band    rows coded together. It is given all the rows its result depends on (`Band`), so bands meet exactly, where tiles
        that are blended only hide their seams. The attention sees whole frames: it is in the lowest stage, never cut.
slab    frames that one layer works on at a time, so that what it makes on the way stays small (`slabs`).

What stands around a convolution is torch's own operators ("eager"), which a CPU is fastest with, or on a GPU
kernels/around_conv: then a convolution runs without its bias, and what is behind it adds it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.kernels import FLOATS
from dailies.kernels import Impl as KernelImpl
from dailies.kernels.around_conv import add_bias, enlarge, norm_silu
from dailies.model.convolution import adjacent, as_clip, as_frames, convolve, empty, empty_clip, unbiased
from dailies.model.wan.config import WanVAEConfig

_Impl = Literal["auto", "eager", "reference", "triton"]     # the last two: of kernels/around_conv

SLAB = 2 ** 22                                          # elements; more at a time is no faster on a CPU
LARGEST_SLAB = 2 ** 30                                  # cuDNN counts in 31 bits, and a window is somewhat more
SLABS_AT_ONCE = 4                                       # that a layer makes on the way
SLAB_SHARE = 0.25                                       # of the memory for a clip: what these may take


class Memory:
    """One clip's way through an encoder or decoder: what its earlier chunks and slabs left behind.

    learns: gradients are wanted; then every layer takes the clip whole, and writes nothing in place.  slab: elements.
    """

    def __init__(self, *, learns: bool = False, slab: int | None = None, impl: _Impl = "eager"):
        self.learns, self.slab, self.impl = learns, slab or SLAB, impl
        self.first_chunk = self.last_chunk = True
        self.frames: dict[nn.Module, Tensor] = {}       # the last input frames of every convolution in time
        self.rooms: dict[nn.Module, Tensor] = {}        # where those of the layer at work lie, with room for a slab

    @property
    def kernel(self) -> KernelImpl:
        """Which of kernels/around_conv, where they are asked for."""
        return "auto" if self.impl == "eager" else self.impl

    def chunks(self, steps: int, size: int) -> Iterator[tuple[int, int]]:
        """Start and stop of each chunk, in latent steps; the layers are told which is the first and which the last."""
        for start in range(0, steps, size):
            stop = min(start + size, steps)
            self.first_chunk, self.last_chunk = start == 0, stop == steps
            yield start, stop

    def window(self, conv: nn.Module, x: Tensor, keep: int) -> tuple[Tensor, int]:
        """A buffer for conv's next input [B, C, past + T, H, W], and past: how many remembered frames it begins with.

        The caller writes the other T, shaped like x. past is `keep`, or where the clip begins less, for torch's own
        operators; for kernels zeros stand there.
        """
        remembered, room = self.frames.get(conv), self.rooms.get(conv)
        begins = remembered is None and self.impl != "eager"
        past = keep if begins else 0 if remembered is None else remembered.shape[2]
        frames = past + x.shape[2]
        apart = room is None or (remembered is not None and past
                                 and remembered.storage_offset() >= past * room.stride(2))
        if room is None or room.shape[2] < frames:
            room = self.rooms[conv] = empty_clip(x, keep + x.shape[2])
        if begins:
            room[:, :, :past].zero_()
        elif apart and past:
            room[:, :, :past] = remembered
        elif remembered is not None:
            for frame in range(past):                   # one by one: they move forward within the room, by less
                room[:, :, frame] = remembered[:, :, frame]
        self.frames[conv] = room[:, :, max(0, frames - keep):frames]
        return room[:, :, :frames], past

    def settle(self) -> None:
        """After a layer: keep what the clip's next chunk needs of it, and no more."""
        for conv in self.rooms:
            if self.last_chunk:
                del self.frames[conv]
            else:
                self.frames[conv] = self.frames[conv].clone()
        self.rooms.clear()


class WanVAE(nn.Module):
    """impl: "auto" is kernels on a GPU and torch's own operators elsewhere; set another to compare."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        self.impl: _Impl = "auto"
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.to_moments = nn.Conv3d(2 * channels, 2 * channels, 1)
        self.from_latent = nn.Conv3d(channels, channels, 1)
        self.decoder = VAEDecoder(config)

    def encode(self, video: Tensor, *, chunk: int | None = None, rows: int | None = None,
               slab: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent, each [B, C, T, H / 8, W / 8], not normalised.

        video [B, 3, F, H, W] in [-1, 1]; F is 4n + 1, H and W multiples of 8.  chunk: latent steps; None is what takes
        least memory.  rows: of the latent, per band; None is all.  slab: elements that a layer makes at a time; None
        is what suits the device.  The result is the same.  Where gradients are wanted, the clip is coded whole.
        Raises ValueError for other frame counts or sizes.
        """
        frames, height, width = video.shape[2:]
        time, space = self.config.time_stride, self.config.space_stride
        if (frames - 1) % time or height % space or width % space:
            raise ValueError(f"video must have {time}n + 1 frames and sides that are multiples of {space}; "
                             f"got {frames} frames of {height}x{width}. Crop or resample it first")
        steps, height, width = (frames - 1) // time + 1, height // space, width // space
        chunk, rows, slab = self.pieces(self.encoder, video, steps, height, width, chunk, rows, slab)
        lowest = None
        for band in bands(height, rows, *self.encoder.reach()):
            memory = self.memory(video, slab)
            for start, stop in memory.chunks(steps, chunk):
                seen = video[:, :, max(0, time * (start - 1) + 1):time * (stop - 1) + 1]
                part = self.encoder.begin(seen[:, :, :, space * band.top:space * band.bottom], memory)
                part = part[:, :, :, band.start - band.top:band.stop - band.top]
                if part.shape[2:4] == (steps, height):
                    lowest = part
                    continue
                if lowest is None:
                    lowest = empty_clip(part, steps, height)
                lowest[:, :, start:stop, band.start:band.stop] = part
        moments = convolve(self.to_moments, self.encoder.finish(lowest, self.memory(video, slab)))
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latent: Tensor, *, chunk: int | None = None, rows: int | None = None,
               slab: int | None = None) -> Tensor:
        """Pixels [B, 3, F, 8H, 8W], about [-1, 1], not clamped.

        latent [B, C, T, H, W], not normalised; chunk, rows, slab as in encode.
        """
        time, space = self.config.time_stride, self.config.space_stride
        steps, height, width = latent.shape[2:]
        frames, pixels = time * (steps - 1) + 1, None
        for at, top, piece in self.decode_pieces(latent, chunk=chunk, rows=rows, slab=slab):
            if piece.shape[2:4] == (frames, space * height):
                return piece
            if pixels is None:
                pixels = piece.new_empty(*piece.shape[:2], frames, space * height, space * width)
            pixels[:, :, at:at + piece.shape[2], top:top + piece.shape[3]] = piece
        return pixels

    def decode_pieces(self, latent: Tensor, *, chunk: int | None = None, rows: int | None = None,
                      slab: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """decode(), piece by piece: first frame, first row, pixels [B, 3, f, h, 8W]: a clip is never whole in memory.

        Bands come from the top, and the pieces of a band in the order of time.
        """
        steps, height, width = latent.shape[2:]
        chunk, rows, slab = self.pieces(self.decoder, latent, steps, height, width, chunk, rows, slab)
        lowest = self.decoder.begin(convolve(self.from_latent, latent), self.memory(latent, slab))
        for band in bands(height, rows, *self.decoder.reach()):
            memory = self.memory(latent, slab)
            for start, stop in memory.chunks(steps, chunk):
                seen = lowest[:, :, start:stop, band.top:band.bottom].clone(memory_format=torch.channels_last_3d)
                yield (max(0, self.config.time_stride * (start - 1) + 1), self.config.space_stride * band.start,
                       self.decoder.finish(seen, memory, band))

    def learns(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def memory(self, x: Tensor, slab: int) -> Memory:
        if self.learns(x):
            return Memory(learns=True)
        fastest: _Impl = "triton" if x.is_cuda and x.dtype in FLOATS else "eager"
        return Memory(slab=slab, impl=fastest if self.impl == "auto" else self.impl)

    def pieces(self, part: "Encoder | VAEDecoder", x: Tensor, steps: int, height: int, width: int, chunk: int | None,
               rows: int | None, slab: int | None) -> tuple[int, int, int]:
        """chunk, rows and slab as they are said, or else as they should be."""
        rows = height if self.learns(x) else rows or height
        slab = slab or self.slab_within(None, part, steps, height, width, rows)
        if self.learns(x):
            return steps, rows, slab
        return chunk or part.needs().chunk(steps, len(x) * rows * width, slab), rows, slab

    def rows_within(self, budget: int, part: "Encoder | VAEDecoder", steps: int, height: int, width: int) -> int:
        """Rows for encode or decode with which one clip takes at most `budget` bytes, as many as may be; at least 1.

        part: self.encoder or self.decoder.  steps, height, width: of the latent.  It is in slabs of SLAB elements then.
        """
        for count in range(1, height):
            rows = -(-height // count)
            if self.bytes_needed(part, steps, height, width, rows) <= budget:
                return rows
        return 1

    def slab_within(self, budget: int | None, part: "Encoder | VAEDecoder", steps: int, height: int, width: int,
                    rows: int) -> int:
        """Elements of a slab with which a clip in bands of so many rows takes at most `budget` bytes; at least SLAB.

        A CPU's is SLAB; a GPU's a power of two, so that GPUs of a kind agree, for which no clip is cut into more bands:
        they cost more than small slabs.  budget None: a quarter of a GPU's memory.
        """
        weight = self.from_latent.weight
        if not weight.is_cuda:
            return SLAB
        if budget is None:
            budget = torch.cuda.get_device_properties(weight.device).total_memory // 4
        most = int(SLAB_SHARE * budget / (SLABS_AT_ONCE * weight.itemsize))
        slab = min(2 ** (max(SLAB, most).bit_length() - 1), LARGEST_SLAB)
        while slab > SLAB and self.bytes_needed(part, steps, height, width, rows, slab) > budget:
            slab //= 2
        return slab

    def bytes_needed(self, part: "Encoder | VAEDecoder", steps: int, height: int, width: int, rows: int,
                     slab: int | None = None) -> int:
        """About what coding a clip takes at its worst moment, beside weights and pixels. Bands may take half of it."""
        cells = width * max(band.bottom - band.top for band in bands(height, rows, *part.reach()))
        lowest = self.config.width * self.config.multipliers[-1] * steps * height * width
        most = part.needs().elements(steps, cells, slab or SLAB)
        return self.from_latent.weight.itemsize * (lowest + max(2 * lowest, most))


class Encoder(nn.Module):
    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = CausalConv(3, widths[0])
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for _ in range(config.res_blocks):
                layers.append(ResBlock(channels, width))
                channels = width
            if stage < len(config.halve_time):
                layers.append(Downsample(width, halve_time=config.halve_time[stage]))
        self.down = nn.ModuleList(layers)
        self.mid = nn.ModuleList([ResBlock(channels, channels), FrameAttention(channels), ResBlock(channels, channels)])
        self.norm_out = ChannelNorm(channels, 3)
        self.conv_out = CausalConv(channels, 2 * config.latent_channels)

    def begin(self, video: Tensor, memory: Memory) -> Tensor:
        """A chunk of a band of frames, in the lowest stage: [B, C, T, H / 8, W / 8]."""
        x = self.conv_in.through(video, memory)
        for layer in self.down:
            x = layer(x, memory)
            memory.settle()
        return x

    def finish(self, x: Tensor, memory: Memory) -> Tensor:
        """A whole clip in the lowest stage, used up, to its moments' [B, 2 * latent channels, T, H / 8, W / 8]."""
        for layer in self.mid:
            x = layer(x, memory)
            memory.settle()
        return self.conv_out.through(x, memory, self.norm_out)

    def reach(self) -> tuple[int, int]:
        """How many rows of the latent above a row, and below it, `begin` needs for it."""
        above = below = 0
        for layer in (*reversed(self.down), self.conv_in):
            if isinstance(layer, Downsample):           # out row i sees in rows 2i to 2i + 2
                above, below = 2 * above, 2 * below + 1
            else:
                above, below = above + layer.reach, below + layer.reach
        space = self.config.space_stride
        return -(-above // space), -(-below // space)

    def needs(self) -> "Needs":
        return Needs.of(self.down, self.config.space_stride, self.config.time_stride)


class VAEDecoder(nn.Module):
    def __init__(self, config: WanVAEConfig):
        super().__init__()
        widths = [config.width * m for m in reversed(config.multipliers)]
        double_time = config.halve_time[::-1]
        channels = widths[0]
        self.conv_in = CausalConv(config.latent_channels, channels)
        self.mid = nn.ModuleList([ResBlock(channels, channels), FrameAttention(channels), ResBlock(channels, channels)])
        layers: list[nn.Module] = []
        for stage, width in enumerate(widths):
            for _ in range(config.res_blocks + 1):
                layers.append(ResBlock(channels, width))
                channels = width
            if stage < len(double_time):
                layers.append(Upsample(width, double_time=double_time[stage]))
                channels = width // 2
        self.up = nn.ModuleList(layers)
        self.norm_out = ChannelNorm(channels, 3)
        self.conv_out = CausalConv(channels, 3)

    def begin(self, latent: Tensor, memory: Memory) -> Tensor:
        """A whole clip in the lowest stage: [B, C, T, H, W]."""
        x = self.conv_in.through(latent, memory)
        for layer in self.mid:
            x = layer(x, memory)
            memory.settle()
        return x

    def finish(self, x: Tensor, memory: Memory, band: "Band") -> Tensor:
        """A chunk of the lowest stage's rows top to bottom of a band, used up, to the pixels of rows start to stop."""
        margins, scale, top = self.margins()[1:], 1, band.top
        for layer in self.up:
            x = layer(x, memory)
            memory.settle()
            if isinstance(layer, Upsample):             # cut off what no later layer needs
                scale, margin, above = 2 * scale, margins.pop(0), 2 * top
                top = max(above, scale * band.start - margin)
                x = x[:, :, :, top - above:scale * band.stop + margin - above]
        x = self.conv_out.through(x, memory, self.norm_out)
        return x[:, :, :, scale * band.start - top:scale * band.stop - top]

    def margins(self) -> list[int]:
        """Per stage from the lowest: how many rows above and below a band's rows of it are needed."""
        margins, rows = [], self.conv_out.reach
        for layer in reversed(self.up):
            if isinstance(layer, Upsample):             # out rows 2i and 2i + 1 see in rows i - 1 to i + 1
                margins.insert(0, rows)
                rows = (rows + 2) // 2
            else:
                rows += layer.reach
        return [rows, *margins]

    def reach(self) -> tuple[int, int]:
        """How many rows of the lowest stage above a row, and below it, `finish` needs for it."""
        return self.margins()[0], self.margins()[0]

    def needs(self) -> "Needs":
        return Needs.of(self.up, 1, 1)


class ResBlock(nn.Module):
    reach = 2                                           # rows

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = ChannelNorm(channels_in, 3)
        self.conv1 = CausalConv(channels_in, channels_out)
        self.norm2 = ChannelNorm(channels_out, 3)
        self.conv2 = CausalConv(channels_out, channels_out)
        self.shortcut = nn.Conv3d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """x is used up: the result may lie where it was."""
        if memory.impl != "eager":
            return self.by_kernels(x, memory)

        def branch(slab: Tensor) -> Tensor:
            return self.conv2(self.conv1(slab, memory, self.norm1), memory, self.norm2)

        pieces = slabs(x, memory, self.conv1.out_channels)
        if not isinstance(self.shortcut, nn.Identity):
            return _joined((convolve(self.shortcut, slab) + branch(slab) for slab in pieces), x.shape[2])
        if memory.learns:
            return x + branch(x)
        for slab in pieces:
            slab += branch(slab)
        return x

    def by_kernels(self, x: Tensor, memory: Memory) -> Tensor:
        x = adjacent(x)

        def summed(slab: Tensor) -> Tensor:
            # the first convolution's result is let go before the second runs
            window = self.conv2.entered(self.conv1.unbiased(slab, memory, self.norm1), memory, self.norm2,
                                        self.conv1.bias)
            y = unbiased(self.conv2, window)
            if isinstance(self.shortcut, nn.Identity):
                return add_bias(y, self.conv2.bias, slab, residual=slab, impl=memory.kernel)
            return add_bias(y, self.conv2.bias, y, residual=adjacent(convolve(self.shortcut, slab)), impl=memory.kernel)

        pieces = map(summed, slabs(x, memory, self.conv1.out_channels))
        if not isinstance(self.shortcut, nn.Identity):
            return _joined(pieces, x.shape[2])
        for _ in pieces:
            pass
        return x


class FrameAttention(nn.Module):
    """One head over the positions of each frame; frames do not see each other."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        made = 3 * x.shape[1]
        if memory.impl != "eager":                      # attention that keeps its weights makes as much of them
            made = max(made, x.shape[3] * x.shape[4])
        return _joined(map(self.attended, slabs(x, memory, made)), x.shape[2])

    def attended(self, x: Tensor) -> Tensor:
        frames = as_frames(x)                                                   # [B*T, C, H, W]
        q, k, v = convolve(self.to_qkv, self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(frames.shape)
        return x + as_clip(convolve(self.proj, y), len(x))


class Downsample(nn.Module):
    """Halves the picture; with halve_time also the frames, of which a clip's first passes through alone."""

    def __init__(self, channels: int, *, halve_time: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if halve_time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        x = _joined(map(self.reduced, slabs(x, memory)), x.shape[2])
        if self.time_conv is None:
            return x
        first = (x[:, :, :1],) if memory.first_chunk else ()
        if not memory.first_chunk:
            x = _joined((memory.frames.pop(self.time_conv), x), 1 + x.shape[2])
        if not memory.last_chunk:
            memory.frames[self.time_conv] = x[:, :, -1:].clone()
        if x.shape[2] < 3:
            return x
        # frame 0 is context of the first window
        return _joined((*first, convolve(self.time_conv, x)), len(first) + (x.shape[2] - 1) // 2)

    def reduced(self, x: Tensor) -> Tensor:
        return as_clip(convolve(self.conv, F.pad(as_frames(x), (0, 1, 0, 1))), len(x))


class Upsample(nn.Module):
    """Doubles the picture and halves the channels; with double_time also the frames, but for a clip's first."""

    def __init__(self, channels: int, *, double_time: bool):
        super().__init__()
        self.time_conv = CausalConv(channels, 2 * channels, (3, 1, 1)) if double_time else None
        self.conv = nn.Conv2d(channels, channels // 2, 3, padding=1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        if memory.impl != "eager":
            return self.by_kernels(x, memory)
        in_time = self.time_conv
        if in_time is None:
            return _joined(map(self.enlarged, slabs(x, memory, 4 * x.shape[1])), x.shape[2])
        first = 1 if memory.first_chunk else 0          # it never enters the convolution in time

        def pieces() -> Iterator[Tensor]:
            if first:
                yield self.enlarged(x[:, :, :1])
            for slab in slabs(x[:, :, first:], memory, 8 * x.shape[1]):
                yield self.enlarged(doubled(in_time(slab, memory)))

        return _joined(pieces(), 2 * x.shape[2] - first)

    def by_kernels(self, x: Tensor, memory: Memory) -> Tensor:
        times = 1 if self.time_conv is None else 2
        alone = 1 if times == 2 and memory.first_chunk else 0
        frames, made, whole = times * x.shape[2] - alone, 0, None
        for slab in slabs(adjacent(x), memory, 4 * times * x.shape[1]):
            y = as_clip(unbiased(self.conv, as_frames(self.larger(slab, memory, 0 if made else alone))), len(x))
            y = adjacent(y)
            if y.shape[2] == frames:
                return add_bias(y, self.conv.bias, y, impl=memory.kernel)
            whole = empty_clip(y, frames) if whole is None else whole
            add_bias(y, self.conv.bias, whole[:, :, made:made + y.shape[2]], impl=memory.kernel)
            made += y.shape[2]
        return whole

    def larger(self, x: Tensor, memory: Memory, alone: int) -> Tensor:
        """What the convolution over pictures sees.  alone: 1 where x begins with the clip's first frame, else 0."""
        batch, channels, frames, height, width = x.shape
        if self.time_conv is None:
            return enlarge(x, empty((batch, channels, frames, 2 * height, 2 * width), x), impl=memory.kernel)
        larger = empty((batch, channels, 2 * frames - alone, 2 * height, 2 * width), x)
        if alone:
            enlarge(x[:, :, :1], larger[:, :, :1], impl=memory.kernel)
        if frames > alone:
            enlarge(self.time_conv.unbiased(x[:, :, alone:], memory), larger[:, :, alone:], bias=self.time_conv.bias,
                    impl=memory.kernel)
        return larger

    def enlarged(self, x: Tensor) -> Tensor:
        # every pixel four times; F.interpolate takes as long as the convolution, and gives another layout
        frames = as_frames(x).permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
        frames = frames.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        return as_clip(convolve(self.conv, frames), len(x))


def doubled(x: Tensor) -> Tensor:
    """[B, 2C, T, H, W] to [B, C, 2T, H, W]: the first half of the channels is the even frames, the second the odd."""
    pairs = x.permute(0, 2, 3, 4, 1).unflatten(4, (2, -1))                                      # [B, T, H, W, 2, C]
    return pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).permute(0, 4, 1, 2, 3)


class CausalConv(nn.Conv3d):
    """3D convolution that sees no later frame: the remembered frames, or zeros, stand before the first."""

    def __init__(self, channels_in: int, channels_out: int, kernel: tuple[int, int, int] = (3, 3, 3)):
        super().__init__(channels_in, channels_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.reach = kernel[1] // 2                     # rows

    def forward(self, x: Tensor, memory: Memory, norm: "ChannelNorm | None" = None) -> Tensor:
        """norm: what x passes on its way in, with SiLU behind it."""
        keep = self.kernel_size[0] - 1
        if memory.learns:
            return super().forward(F.pad(F.silu(norm(x)) if norm else x, (0, 0, 0, 0, keep, 0)))
        if memory.impl != "eager":
            return convolve(self, self.entered(x, memory, norm))
        window, past = memory.window(self, x, keep)
        if norm:
            F.silu(norm(x, out=window[:, :, past:]), inplace=True)
        else:
            window[:, :, past:] = x
        if past == keep:
            return convolve(self, window)
        return _joined(self.starting(window, past), x.shape[2])

    def through(self, x: Tensor, memory: Memory, norm: "ChannelNorm | None" = None) -> Tensor:
        """forward() slab by slab, for a convolution that is a layer of its own."""
        y = _joined((self(slab, memory, norm) for slab in slabs(x, memory, self.out_channels)), x.shape[2])
        memory.settle()
        return y

    def unbiased(self, x: Tensor, memory: Memory, norm: "ChannelNorm | None" = None) -> Tensor:
        """forward() for kernels, which add the bias to what they read."""
        return unbiased(self, self.entered(x, memory, norm))

    def entered(self, x: Tensor, memory: Memory, norm: "ChannelNorm | None" = None,
                bias: Tensor | None = None) -> Tensor:
        """The window of x, for kernels.  bias: of the convolution that made x; it is added before the norm."""
        window, past = memory.window(self, x, self.kernel_size[0] - 1)
        if norm is None:
            window[:, :, past:] = x
        else:
            norm_silu(adjacent(x), norm.gamma.flatten(), window[:, :, past:], bias=bias, impl=memory.kernel)
        return window

    def starting(self, window: Tensor, past: int) -> Iterator[Tensor]:
        """Where a clip begins: the taps that would meet zeros are left out."""
        frames, keep = window.shape[2], self.kernel_size[0] - 1
        for frame in range(past, min(keep, frames)):
            yield convolve(self, window[:, :, :frame + 1], self.weight[:, :, keep - frame:])
        if frames > keep:
            yield convolve(self, window)


class ChannelNorm(nn.Module):
    """Unit length over the channels, times sqrt(C), times a learned gain: no mean, no bias; statistics in fp32."""

    def __init__(self, channels: int, spatial_dims: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * spatial_dims))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        # 1e-12 is a floor under the norm, not a term inside the root
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide).clamp_min(1e-12)
        scale, gamma = (len(self.gamma) ** 0.5 / norm).to(x.dtype), self.gamma.to(x.dtype)
        return x * scale * gamma if out is None else torch.mul(x, scale, out=out).mul_(gamma)


@dataclass(frozen=True)
class Needs:
    """Elements in memory per cell of the lowest stage, that is per row and column of a latent."""

    remembered: int                                     # between two chunks
    per_step: int                                       # of a layer's input and output, per latent step
    per_slab: int                                       # of what a layer makes on the way, for one frame

    @classmethod
    def of(cls, layers: Iterable[nn.Module], scale: int, frames: int) -> "Needs":
        """scale, frames: pixels a side and frames, for a cell and step of the lowest stage, where the layers begin."""
        remembered = per_step = per_slab = 0
        for layer in layers:
            area = scale ** 2
            if isinstance(layer, ResBlock):
                seen, made = layer.conv1.in_channels, layer.conv1.out_channels
                remembered += area * 2 * (seen + made)
                per_step = max(per_step, area * frames * (seen if seen == made else seen + made))
                per_slab = max(per_slab, area * (3 * seen + 5 * made))
                continue
            channels, in_time = layer.conv.in_channels, layer.time_conv is not None
            up = isinstance(layer, Upsample)
            remembered += (2 * area if up else area // 4) * channels * in_time
            per_step = max(per_step, area * frames * channels * (3 + 2 * (up and in_time)) // (1 if up else 2))
            per_slab = max(per_slab, area * channels * (6 if up else 2) * (2 if up and in_time else 1))
            scale = 2 * scale if up else scale // 2
            frames = frames * 2 ** in_time if up else frames // 2 ** in_time
        return cls(remembered, per_step, per_slab)

    def chunk(self, steps: int, cells: int, slab: int | None = None) -> int:
        """Latent steps to code together: all, where that takes no more memory, or else as few as are worth a call."""
        chunk = min(steps, max(1, (slab or SLAB) // (cells * self.per_step)))
        return steps if self.per_step * (steps - chunk) <= self.remembered else chunk

    def elements(self, steps: int, cells: int, slab: int) -> int:
        """All of these at their largest at once, which is somewhat more than there ever is."""
        chunk = self.chunk(steps, cells, slab)
        frame = cells * self.per_slab                   # half of it is made per frame, half is there once
        lasting = cells * (self.per_step * chunk + (self.remembered if chunk < steps else 0))
        return lasting + (frame + max(frame, 2 * SLABS_AT_ONCE * slab)) // 2


@dataclass(frozen=True)
class Band:
    """Rows of the lowest stage that are coded together, start to stop, and those they depend on, top to bottom."""

    start: int
    stop: int
    top: int
    bottom: int


def bands(height: int, rows: int, above: int, below: int) -> list[Band]:
    return [Band(start, min(start + rows, height), max(0, start - above), min(start + rows + below, height))
            for start in range(0, height, rows)]


def slabs(x: Tensor, memory: Memory, channels: int = 1) -> Iterator[Tensor]:
    """x in time, as few frames at a time as make about a slab.  channels: made on the way, if more than x's."""
    made = len(x) * max(channels, x.shape[1]) * x.shape[3] * x.shape[4]
    size = x.shape[2] if memory.learns else memory.slab // made
    yield from x.split(max(1, size), dim=2) if x.shape[2] else ()


def _joined(pieces: Iterable[Tensor], frames: int) -> Tensor:
    """Pieces of a clip, in order, as one of so many frames; each is let go before the next is made."""
    whole, at = None, 0
    for piece in pieces:
        if piece.shape[2] == frames:
            return piece
        if whole is None:
            whole = empty_clip(piece, frames)
        whole[:, :, at:at + piece.shape[2]] = piece
        at += piece.shape[2]
    return whole
