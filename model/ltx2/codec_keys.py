"""Names of the tensors of LTX-2's VAEs, vocoder and upsampler: in a release's single file, or in a file of their own.

Our names are the released ones, so a table is a prefix and what is left out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from dailies.model.files import CheckpointError
from dailies.model.keys import KeyTable
from dailies.model.ltx2.codec_config import AudioVAEConfig, CodecFields, UpsamplerConfig, VideoVAEConfig, VocoderConfig
from dailies.model.ltx2.config import DIT_PREFIX
from dailies.model.ltx2.header import read_ltx_header
from dailies.model.ltx2.keys import OTHER_PARTS, PROJECTION

Config = TypeVar("Config", VideoVAEConfig, AudioVAEConfig, VocoderConfig, UpsamplerConfig)
STATISTICS = "per_channel_statistics."
UNREAD = {f"{STATISTICS}{name}": "statistics nobody reads" for name in (
    "mean-of-stds", "std-of-stds", "channel")}


def codec_tables(name: str, prefix: str, names: Sequence[str], dropped: dict[str, str]) -> tuple[KeyTable, ...]:
    """For a part of the single file, and for a file of the part alone.

    prefix: of the part in the single file.  names: how the tensors of the part begin, relative to it.
    """
    rules = {begin: begin for begin in names}
    alone = KeyTable(name=name, rules=rules, dropped=dropped)
    others = {DIT_PREFIX: "the transformer", PROJECTION: "the connectors"} | {
        part: why for part, why in OTHER_PARTS.items() if part != prefix}
    within = alone.prefixed(prefix)
    return KeyTable(name=name, rules=within.rules, dropped=dict(within.dropped) | others), alone


def video_vae_tables(halves: Sequence[str]) -> tuple[KeyTable, ...]:
    """halves: "encoder", "decoder" or both; the other is left out by name."""
    unread = {f"{half}.": "not wanted here" for half in ("encoder", "decoder") if half not in halves}
    return codec_tables("video_vae_tables", "vae.", [*(f"{half}." for half in halves), STATISTICS], UNREAD | unread)


def audio_vae_tables(halves: Sequence[str]) -> tuple[KeyTable, ...]:
    """As video_vae_tables; a file of 2.5 with the audio VAE alone has the vocoder too."""
    unread = {f"{half}.": "not wanted here" for half in ("encoder", "decoder") if half not in halves}
    within, alone = codec_tables("audio_vae_tables", "audio_vae.", [*(f"{half}." for half in halves), STATISTICS],
                                 UNREAD | unread)
    return within, KeyTable(name=alone.name, rules=alone.rules,
                            dropped=dict(alone.dropped) | {"vocoder.": "beside it in its file"})


def vocoder_tables() -> tuple[KeyTable, ...]:
    """Of either vocoder; a file of 2.5 has it beside the audio VAE alone."""
    names = ["conv_pre.", "conv_post.", "ups.", "resblocks.", "act_post.", "vocoder.", "bwe_generator.", "mel_stft."]
    unread = {"mel_stft.stft_fn.inverse_basis": "the way back, which is not gone"}
    within, alone = codec_tables("vocoder_tables", "vocoder.", names, unread)
    beside = {part: "the audio VAE" for part in ("encoder.", "decoder.", STATISTICS)}
    return KeyTable(name=within.name, rules=within.rules, dropped=dict(within.dropped) | beside), alone


def upsampler_tables() -> tuple[KeyTable, ...]:
    """It is always alone in its file."""
    names = ["initial_conv.", "initial_norm.", "res_blocks.", "upsampler.", "post_upsample_res_blocks.", "final_conv."]
    return KeyTable(name="upsampler_tables", rules={name: name for name in names},
                    dropped={"upsampler.blur_down.kernel": "the same in every file"}),


def config_in(kind: type[Config], path: Path, prefix: str, name: str) -> Config:
    """Of a part in a file: by the header's config, or where it is lost by the shapes of its tensors.

    prefix: of its tensors' names; a file of the part alone has none.  name: of the model, for messages.
    Raises CheckpointError.
    """
    header = read_ltx_header(path, name)
    if header.config:
        return kind.of_header(CodecFields(header.config, header.where))
    try:
        return kind.of_shapes(header.shapes(prefix) or header.shapes())
    except CheckpointError as error:
        raise CheckpointError(f"{header.where}: {error}") from error
