"""What the VAEs, the vocoder and the upsampler of an LTX-2 file look like: said by its header, or seen in its tensors.

Files that were packed again often lose their header; then names and shapes decide, and what those leave open is as in
the releases. Both come from outside: numbers are bounded, and what is not known is refused by name.
Source   LTX-2 releases 2.0 to 2.5, header key `config`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dailies.model.files import CheckpointError
from dailies.model.ltx2.config import MOST_WIDTH, Said

TensorShapes = Mapping[str, tuple[int, ...]]                  # by published name, relative to the part's prefix

MOST_BLOCKS = 64                                        # several times those of any release
# of what the releases have always had, the value that this program computes with
VIDEO_FIXED: dict[str, bool | int | str] = dict(
    dims=3, in_channels=3, out_channels=3, norm_layer="pixel_norm", latent_log_var="uniform",
    timestep_conditioning=False, causal_decoder=False)
STRIDES = {"space": (1, 2, 2), "time": (2, 1, 1), "all": (2, 2, 2)}
MEL_FLOOR = 1e-5                                        # of a mel magnitude, before the logarithm


class CodecFields(Said):
    """Fields of a part of the header's config, with objects and lists in them.  Every method raises CheckpointError."""

    def part(self, *names: str) -> "CodecFields":
        """An object within; an empty one where it is not there."""
        said = self
        for name in names:
            within = said.fields.get(name, {})
            if not isinstance(within, dict):
                raise said.wrong(name, "an object")
            said = CodecFields(within, f"{said.where}: {name}")
        return said

    def integers(self, name: str, default: tuple[int, ...], most: int = MOST_WIDTH) -> tuple[int, ...]:
        value = self.fields.get(name, list(default))
        if not isinstance(value, list) or not 1 <= len(value) <= MOST_BLOCKS or not all(
                type(n) is int and 1 <= n <= most for n in value):
            raise self.wrong(name, f"a list of whole numbers from 1 to {most:,}")
        return tuple(value)

    def must_be(self, name: str, value: bool | int | str) -> None:
        """Where it is said at all: there is one value that this program computes with."""
        got = self.fields.get(name, value)
        if got != value or type(got) is not type(value):
            raise self.wrong(name, json.dumps(value))


@dataclass(frozen=True, kw_only=True)
class VideoStage:
    """Residual blocks, or one change of size."""

    layers: int = 0                                     # residual blocks; 0 where it changes the size
    stride: tuple[int, int, int] = (1, 1, 1)            # along T, H, W
    multiplier: int = 1                                 # upwards channels are divided by it, downwards multiplied
    residual: bool = False                              # upwards: the input is added, rearranged


def _stages(*said: int | str) -> tuple[VideoStage, ...]:
    """As in _stages(4, "space2", 6): residual blocks, and halvings or doublings with their multiplier.

    A "+" behind the multiplier: residual.
    """
    def stage(word: int | str) -> VideoStage:
        if isinstance(word, int):
            return VideoStage(layers=word)
        found = re.fullmatch(r"([a-z]+)(\d)(\+?)", word)
        assert found is not None, word
        kind, multiplier, plus = found.groups()
        return VideoStage(stride=STRIDES[kind], multiplier=int(multiplier), residual=bool(plus))
    return tuple(map(stage, said))


@dataclass(frozen=True, kw_only=True)
class VideoVAEConfig:
    """Stages are in the order in which they are applied; an encoder or decoder without any is not there."""

    latent_channels: int = 128
    patch: int = 4                                      # pixels a side that are one cell for the convolutions
    encoder_width: int = 128                            # channels of the encoder's first stage
    decoder_width: int = 1024                           # of the decoder's first
    encoder: tuple[VideoStage, ...] = ()
    decoder: tuple[VideoStage, ...] = ()
    encoder_padding: str = "zeros"                      # beyond a picture's edges: "zeros" or "reflect"
    decoder_padding: str = "zeros"

    @property
    def strides(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels to a latent cell."""
        time, rows, columns = (math.prod(stage.stride[axis] for stage in self.decoder or self.encoder)
                               for axis in range(3))
        return time, rows * self.patch, columns * self.patch

    @classmethod
    def of_header(cls, config: CodecFields) -> "VideoVAEConfig":
        """From header `config`.  Raises CheckpointError for what no release has and this code does not know."""
        said = config.part("vae")
        for name, value in VIDEO_FIXED.items():
            said.must_be(name, value)
        latent = said.integer("latent_channels", 128)
        decoder = _header_stages(said, "decoder_blocks", "")[::-1]          # listed from the pixels' end
        paddings = ("zeros", "reflect")
        both = said.choice("spatial_padding_mode", "", ("", *paddings))
        width = said.integer("decoder_base_channels", 128) * math.prod(stage.multiplier for stage in decoder)
        if width > MOST_WIDTH:
            raise said.wrong("decoder_blocks", f"blocks of at most {MOST_WIDTH:,} channels")
        return cls(latent_channels=latent, patch=said.integer("patch_size", 4, 16), encoder_width=latent,
                   decoder_width=width, encoder=_header_stages(said, "encoder_blocks", "_res"), decoder=decoder,
                   encoder_padding=both or said.choice("encoder_spatial_padding_mode", "zeros", paddings),
                   decoder_padding=both or "reflect")

    @classmethod
    def of_shapes(cls, shapes: TensorShapes) -> "VideoVAEConfig":
        """From the names and shapes of `encoder.`, `decoder.` and `per_channel_statistics.`: four doublings are 2.3's.

        Raises CheckpointError where they are no such VAE's.
        """
        encoder, decoder = (_seen_stages(shapes, half, blocks) for half, blocks in
                            (("encoder", "down_blocks"), ("decoder", "up_blocks")))
        later = sum(stage.layers == 0 for stage in decoder) >= 4
        if not later:                                   # 2.0: no later release adds the input
            decoder = tuple(VideoStage(layers=s.layers, stride=s.stride, multiplier=s.multiplier,
                                       residual=s.layers == 0) for s in decoder)
        latent = _rows(shapes, "per_channel_statistics.mean-of-means")
        pixels = shapes["decoder.conv_out.conv.weight"][0] if decoder else shapes["encoder.conv_in.conv.weight"][1]
        if math.isqrt(pixels // 3) ** 2 * 3 != pixels:
            raise CheckpointError(f"a video VAE has 3 channels for each pixel of a square patch; got {pixels}")
        return cls(latent_channels=latent, patch=math.isqrt(pixels // 3), encoder=encoder, decoder=decoder,
                   encoder_width=_rows(shapes, "encoder.conv_in.conv.weight") if encoder else latent,
                   decoder_width=_rows(shapes, "decoder.conv_in.conv.weight") if decoder else latent,
                   decoder_padding="zeros" if later else "reflect")


VIDEO_VAE_2_0 = VideoVAEConfig(
    decoder_padding="reflect",
    encoder=_stages(4, "space2", 6, "time2", 6, "all2", 2, "all2", 2),
    decoder=_stages(5, "all2+", 5, "all2+", 5, "all2+", 5))
VIDEO_VAE_2_3 = VideoVAEConfig(                         # and 2.5's, where it is the convolutional one
    encoder=_stages(4, "space2", 6, "time2", 4, "all2", 2, "all1", 2),
    decoder=_stages(2, "all2", 2, "all1", 4, "time2", 6, "space2", 4))


def _header_stages(said: CodecFields, name: str, suffix: str) -> tuple[VideoStage, ...]:
    """suffix: of the names of blocks that change the size."""
    blocks = said.fields.get(name, [])
    if not isinstance(blocks, list) or len(blocks) > MOST_BLOCKS or not all(
            isinstance(block, list) and len(block) == 2 for block in blocks):
        raise said.wrong(name, f"at most {MOST_BLOCKS} pairs of a name and an object")
    stages = []
    for kind, params in blocks:
        one = CodecFields(params if isinstance(params, dict) else {"num_layers": params, "multiplier": params},
                   f"{said.where}.{name}.{str(kind)[:40]}")
        change = re.fullmatch(f"compress_(space|time|all){suffix}", str(kind))
        if one.truth("inject_noise", False):
            raise one.wrong("inject_noise", "false")
        if kind == "res_x":
            stages.append(VideoStage(layers=one.integer("num_layers", 1, MOST_BLOCKS)))
        elif change:
            stages.append(VideoStage(stride=STRIDES[change[1]], multiplier=one.integer("multiplier", 1, 64),
                                     residual=not suffix and one.truth("residual", False)))
        else:
            raise CheckpointError(f"{said.where}.{name} has a block {str(kind)[:40]!r}; known are res_x and "
                                  f"compress_space{suffix}, compress_time{suffix}, compress_all{suffix}")
    return tuple(stages)


def _seen_stages(shapes: TensorShapes, half: str, blocks: str) -> tuple[VideoStage, ...]:
    """half: "encoder" or "decoder".  Raises CheckpointError."""
    stages: list[VideoStage] = []
    ends = f"{half}.conv_out.conv.weight"
    for index in range(MOST_BLOCKS):
        at, after = (f"{half}.{blocks}.{n}." for n in (index, index + 1))
        layers = _count(shapes, at + "res_blocks.{}.conv1.conv.weight")
        if layers:
            stages.append(VideoStage(layers=layers))
            continue
        if (here := shapes.get(at + "conv.conv.weight")) is None:
            break
        follows = (after + "res_blocks.0.conv1.conv.weight", after + "conv.conv.weight", ends)
        wide = next((shapes[name][1] for name in follows if name in shapes), 0)
        out, seen = here[:2]
        cells, multiplier = (out, wide) if half == "decoder" else (wide, out)
        cells = cells // multiplier if multiplier and cells % multiplier == 0 else 0
        kind = {4: "space", 2: "time", 8: "all"}.get(cells)
        larger, smaller = (seen, wide) if half == "decoder" else (wide, seen)
        if kind is None or larger % smaller:
            raise CheckpointError(f"{at}conv.conv.weight of {out} rows before {wide} channels is none that halves or "
                                  "doubles; is it another model's file?")
        stages.append(VideoStage(stride=STRIDES[kind], multiplier=larger // smaller))
    return tuple(stages)


def _count(shapes: TensorShapes, name: str) -> int:
    """How many of the names there are, with 0, 1, ... for {}."""
    return next((n for n in range(MOST_BLOCKS) if name.format(n) not in shapes), MOST_BLOCKS)


def _rows(shapes: TensorShapes, name: str) -> int:
    if not shapes.get(name):
        raise CheckpointError(f"{name} is missing. Is it another model's file?")
    return shapes[name][0]


@dataclass(frozen=True, kw_only=True)
class AudioVAEConfig:
    """Defaults: of every release."""

    width: int = 128                                    # channels of the level that has all mel bins
    multipliers: tuple[int, ...] = (1, 2, 4)            # of width, per level; each further level halves
    blocks: int = 2                                     # per level of the encoder; the decoder has one more
    latent_channels: int = 8
    mel_bins: int = 64
    channels: int = 2                                   # left and right
    sample_rate: int = 16000                            # of the sound whose spectrogram it is
    hop: int = 160                                      # samples between two mel frames
    window: int = 1024

    @property
    def latent_bins(self) -> int:
        return self.mel_bins >> (len(self.multipliers) - 1)

    @classmethod
    def of_header(cls, config: CodecFields) -> "AudioVAEConfig":
        said = config.part("audio_vae", "model", "params", "ddconfig")
        said.must_be("norm_type", "pixel")
        said.must_be("causality_axis", "height")
        said.must_be("mid_block_add_attention", False)
        stft = config.part("audio_vae", "preprocessing", "stft")
        return cls(width=said.integer("ch", 128), multipliers=said.integers("ch_mult", (1, 2, 4), 64),
                   blocks=said.integer("num_res_blocks", 2, MOST_BLOCKS),
                   latent_channels=said.integer("z_channels", 8), mel_bins=said.integer("mel_bins", 64),
                   channels=said.integer("out_ch", 2, 64),
                   sample_rate=config.part("audio_vae", "model", "params").integer("sampling_rate", 16000, 1 << 20),
                   hop=stft.integer("hop_length", 160), window=stft.integer("filter_length", 1024))

    @classmethod
    def of_shapes(cls, shapes: TensorShapes) -> "AudioVAEConfig":
        """From the names and shapes of `encoder.`, `decoder.` and `per_channel_statistics.`.  Raises CheckpointError"""
        if "decoder.conv_in.conv.weight" not in shapes:
            raise CheckpointError("decoder.conv_in.conv.weight is missing. Is it another model's file?")
        width = shapes["decoder.conv_out.conv.weight"][1]
        levels = _count(shapes, "decoder.up.{}.block.0.conv1.conv.weight")
        multipliers = tuple(_rows(shapes, f"decoder.up.{n}.block.0.conv1.conv.weight") // width for n in range(levels))
        latent = shapes["decoder.conv_in.conv.weight"][1]
        bins = _rows(shapes, "per_channel_statistics.mean-of-means") // latent
        return cls(width=width, multipliers=multipliers, latent_channels=latent, mel_bins=bins << (levels - 1),
                   blocks=_count(shapes, "decoder.up.0.block.{}.conv1.conv.weight") - 1,
                   channels=_rows(shapes, "decoder.conv_out.conv.weight"))


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """A generator of waveforms from mel frames; defaults: HiFi-GAN of 2.0."""

    width: int = 1024                                   # channels before the first upsampling; each halves them
    rates: tuple[int, ...] = (6, 5, 2, 2, 2)            # samples for one, of each upsampling
    kernels: tuple[int, ...] = (16, 15, 8, 4, 4)
    block_kernels: tuple[int, ...] = (3, 7, 11)         # of the residual blocks behind each
    dilations: tuple[int, ...] = (1, 3, 5)
    anti_aliased: bool = False                          # BigVGAN: snake activations between two resamplings
    final_tanh: bool = True                             # or else what is beyond -1 and 1 is cut off
    final_bias: bool = True
    channels: int = 2
    mel_bins: int = 64

    @classmethod
    def of_header(cls, said: CodecFields, default: "GeneratorConfig") -> "GeneratorConfig":
        kind = said.choice("resblock", "AMP1" if default.anti_aliased else "1", ("1", "AMP1"))
        said.must_be("stereo", True)
        if kind == "AMP1":
            said.must_be("activation", "snakebeta")
        kernels = said.integers("resblock_kernel_sizes", default.block_kernels)
        rows = said.fields.get("resblock_dilation_sizes", [list(default.dilations)] * len(kernels))
        if not isinstance(rows, list) or len(rows) != len(kernels) or any(row != rows[0] for row in rows):
            raise said.wrong("resblock_dilation_sizes", "the same dilations for each of resblock_kernel_sizes")
        dilations = CodecFields({"dilations": rows[0]}, said.where).integers("dilations", default.dilations, 1024)
        rates = said.integers("upsample_rates", default.rates, 1024)
        sizes = said.integers("upsample_kernel_sizes", default.kernels, 1024)
        if len(rates) != len(sizes):
            raise said.wrong("upsample_kernel_sizes", f"one for each of the {len(rates)} upsample_rates")
        return cls(width=said.integer("upsample_initial_channel", default.width), rates=rates, kernels=sizes,
                   block_kernels=kernels, dilations=dilations, anti_aliased=kind == "AMP1",
                   final_tanh=said.truth("use_tanh_at_final", default.final_tanh),
                   final_bias=said.truth("use_bias_at_final", default.final_bias))

    @classmethod
    def of_shapes(cls, shapes: TensorShapes, prefix: str = "") -> "GeneratorConfig":
        """Rates are not in shapes: a release has these kernels, or else CheckpointError."""
        ups = _count(shapes, prefix + "ups.{}.weight")
        kernels = tuple(shapes[f"{prefix}ups.{n}.weight"][2] for n in range(ups))
        rates = {default.kernels: default.rates for default in (HIFI_GAN, BIG_VGAN, EXTENSION)}.get(kernels)
        if rates is None:
            raise CheckpointError(f"a vocoder with upsampling kernels {list(kernels)} is of no release; its file must "
                                  "have its header, which says its rates")
        blocks = _count(shapes, prefix + "resblocks.{}.convs1.0.weight") // ups
        return cls(width=_rows(shapes, prefix + "conv_pre.weight"), rates=rates, kernels=kernels,
                   block_kernels=tuple(shapes[f"{prefix}resblocks.{n}.convs1.0.weight"][2] for n in range(blocks)),
                   anti_aliased=prefix + "act_post.act.alpha" in shapes,
                   final_tanh=prefix + "act_post.act.alpha" not in shapes,
                   final_bias=prefix + "conv_post.bias" in shapes)


HIFI_GAN = GeneratorConfig()
BIG_VGAN = GeneratorConfig(width=1536, rates=(5, 2, 2, 2, 2, 2), kernels=(11, 4, 4, 4, 4, 4), anti_aliased=True,
                           final_tanh=False, final_bias=False)
EXTENSION = GeneratorConfig(width=512, rates=(6, 5, 2, 2, 2), kernels=(12, 11, 4, 4, 4), anti_aliased=True,
                            final_tanh=False, final_bias=False)


@dataclass(frozen=True, kw_only=True)
class VocoderConfig:
    """Defaults: 2.0's."""

    generator: GeneratorConfig = HIFI_GAN
    extension: GeneratorConfig | None = None            # of the bandwidth, from 2.3 on
    generator_rate: int = 24000                         # samples a second
    sample_rate: int = 24000                            # of what comes out
    hop: int = 80                                       # of the spectrogram that the extension sees
    window: int = 512

    @classmethod
    def of_header(cls, config: CodecFields) -> "VocoderConfig":
        said = config.part("vocoder")
        if "bwe" not in said.fields:
            rate = said.integer("output_sampling_rate", 24000, 1 << 20)
            return cls(generator=GeneratorConfig.of_header(said, HIFI_GAN), generator_rate=rate, sample_rate=rate)
        bwe = said.part("bwe")
        bwe.must_be("num_mels", 64)
        first, last = bwe.integer("input_sampling_rate", 16000, 1 << 20), bwe.integer("output_sampling_rate", 48000,
                                                                                      1 << 20)
        if last % first:
            raise bwe.wrong("output_sampling_rate", f"a multiple of {first}")
        return cls(generator=GeneratorConfig.of_header(said.part("vocoder"), BIG_VGAN),
                   extension=GeneratorConfig.of_header(bwe, EXTENSION), generator_rate=first, sample_rate=last,
                   hop=bwe.integer("hop_length", 80), window=bwe.integer("n_fft", 512))

    @classmethod
    def of_shapes(cls, shapes: TensorShapes) -> "VocoderConfig":
        if "bwe_generator.conv_pre.weight" not in shapes:
            return cls(generator=GeneratorConfig.of_shapes(shapes))
        return cls(generator=GeneratorConfig.of_shapes(shapes, "vocoder."),
                   extension=GeneratorConfig.of_shapes(shapes, "bwe_generator."), generator_rate=16000,
                   sample_rate=48000, window=shapes["mel_stft.stft_fn.forward_basis"][2])


VOCODER_2_0 = VocoderConfig()
VOCODER_2_3 = VocoderConfig(generator=BIG_VGAN, extension=EXTENSION, generator_rate=16000, sample_rate=48000)

RATIOS = {0.75: (3, 4), 1.5: (3, 2), 2.0: (2, 1), 4.0: (4, 1)}


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """Of latents; defaults: as the class of the release has them."""

    channels: int = 128
    width: int = 512
    blocks: int = 4                                     # before the upsampling, and as many behind it
    spatial: bool = True
    temporal: bool = False
    rational: bool = False                              # `scale` by an upsampling, then a blur and a stride
    scale: float = 2.0                                  # of a side

    @classmethod
    def of_header(cls, said: CodecFields) -> "UpsamplerConfig":
        said.must_be("dims", 3)
        config = cls(channels=said.integer("in_channels", 128), width=said.integer("mid_channels", 512),
                     blocks=said.integer("num_blocks_per_stage", 4, MOST_BLOCKS),
                     spatial=said.truth("spatial_upsample", True), temporal=said.truth("temporal_upsample", False),
                     rational=said.truth("rational_resampler", False),
                     scale=said.number("spatial_scale", 2.0))
        if config.rational and config.scale not in RATIOS:
            raise said.wrong("spatial_scale", " or ".join(map(str, RATIOS)))
        if not (config.spatial or config.temporal):
            raise said.wrong("spatial_upsample", "true, where temporal_upsample is false")
        return config

    @classmethod
    def of_shapes(cls, shapes: TensorShapes) -> "UpsamplerConfig":
        """3 x 3 places of a rational one are taken for x1.5, which has been released, and not for x0.75."""
        channels, width = _rows(shapes, "final_conv.weight"), _rows(shapes, "initial_conv.weight")
        said = cls(channels=channels, width=width, blocks=_count(shapes, "res_blocks.{}.conv1.weight"))
        if rows := shapes.get("upsampler.conv.weight", (0,))[0]:
            scale = {4: 2.0, 9: 1.5, 16: 4.0}.get(rows // width)
            if scale is not None:
                return replace(said, rational=True, scale=scale)
        plain = shapes.get("upsampler.0.weight", (0,))
        kind = {(4, 4): (True, False), (5, 2): (False, True), (5, 8): (True, True)}.get((len(plain), plain[0] // width))
        if kind is None:
            raise CheckpointError("upsampler.0.weight or upsampler.conv.weight must be there, with 2, 4 or 8 times the "
                                  f"{width} channels; is it another model's file?")
        return replace(said, spatial=kind[0], temporal=kind[1])
