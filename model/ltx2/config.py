"""What the parts of LTX-2 are made by, as the header of a published file says it, or its keys where there is none.

A release is one file of transformer, connectors, VAEs and vocoder. Its header has a `config` in JSON, and the version.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dailies.model.files import CheckpointError, first_line

# Which time a stream's cross-modal scale, shift and gate are told: `vendor`, its own for scale and shift, the other
# stream's sigma for the gate; `own`, its own for all (January 2026, TurboT2AV); `other`, the other's sigma for all.
CrossTime = Literal["vendor", "own", "other"]
DIT_PREFIX = "model.diffusion_model."
REGISTERS = 128                                         # of a connector: no header says it
# Of what the release has always had, the value that this program computes with; another one is another model.
FIXED: Mapping[str, Any] = dict(
    dropout=0, attention_bias=True, num_vector_embeds=None, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
    use_linear_projection=False, only_cross_attention=False, double_self_attention=False, upcast_attention=False,
    share_ff=False, norm_elementwise_affine=False, cross_attention_norm=True, standardization_norm="rms_norm",
    qk_norm="rms_norm", positional_embedding_type="rope", use_audio_video_cross_attention=True, av_cross_ada_norm=True,
    use_middle_indices_grid=True, causal_temporal_positioning=True, timestep_scale_multiplier=1000)
# where all four are there and so, the text is normed by tokens and has a projection for each stream (2.3)
PER_TOKEN: Mapping[str, Any] = dict(caption_proj_before_connector=True, caption_projection_first_linear=False,
                                    caption_projection_second_linear=False, caption_proj_input_norm=False)
NORM_OF_TOKENS = "per_token_rms"
MOST_WIDTH = 1 << 16                                    # layers, heads, channels: a number must not keep us busy


@dataclass(frozen=True, kw_only=True)
class LtxConfig:
    """Of the transformer; by default LTX-2 19B."""

    layers: int = 48
    channels: int = 128                                 # of the video latent
    heads: int = 32
    width: int = 4096
    audio: bool = True                                  # False: no module of sound is made
    audio_channels: int = 128
    audio_heads: int = 32
    audio_width: int = 2048
    caption_width: int | None = 3840                    # of text that is projected here; None: it comes in our widths
    gated: bool = False                                 # attention, per head
    modulated_text: bool = False                        # nine modulation rows for six, and two for the text
    prompt_adaln: bool = True                           # those two depend on sigma
    ff_bias: bool = True
    audio_ff_bias: bool = True
    keyframes: bool = False                             # has a vector for tokens of a single frame
    rope_halves: bool = True
    rope_exact: bool = True
    theta: float = 10000.0
    most: tuple[float, float, float] = (20, 2048, 2048)         # seconds, pixels, pixels
    audio_most: float = 20
    gate_time_scale: float = 1.0                        # of the time that the cross-modal gates are told
    norm_eps: float = 1e-6
    cross_time: CrossTime = "vendor"

    @property
    def rows(self) -> int:
        return 9 if self.modulated_text else 6


@dataclass(frozen=True, kw_only=True)
class ConnectorsConfig:
    """Of the text projection and the two connectors; by default LTX-2 19B."""

    hidden: int = 3840                                  # of the text encoder
    stack: int = 49                                     # its hidden states
    layers: int = 2
    heads: int = 30
    width: int = 3840
    audio_heads: int = 30
    audio_width: int = 3840
    registers: int = REGISTERS
    per_token: bool = False                             # V2: normed by tokens, a projection for each stream
    gated: bool = False
    ff_bias: bool = True
    most: float = 4096                                  # positions are divided by it
    theta: float = 10000.0
    rope_halves: bool = True
    rope_exact: bool = True
    norm_eps: float = 1e-6


def ltx_version(text: str | None) -> tuple[int, ...]:
    """Numbers of a version up to the first part that is none: "2.3.rc1" -> (2, 3); () for what has none.

    text: as a header has it, which may be with the quotes of JSON.
    """
    numbers = []
    for part in (text or "").strip('" ').replace("-", ".").split("."):
        if not re.fullmatch(r"[0-9]{1,9}", part):
            break
        numbers.append(int(part))
    return tuple(numbers)


def header_object(metadata: Mapping[str, str], name: str, where: str) -> dict[str, Any] | None:
    """The JSON object under this name; None where there is none.  Raises CheckpointError where it is something else."""
    text = metadata.get(name)
    if text is None:
        return None
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {name} in its header is not JSON ({first_line(error)[:200]}). Fetch it "
                              "again") from error
    if not isinstance(said, dict):
        raise CheckpointError(f"{where}: {name} in its header is not a table. Fetch it again")
    return said


class Said:
    """Fields of a part of the config, each of its kind and in its range.  Raises CheckpointError."""

    def __init__(self, fields: Mapping[str, Any], where: str):
        self.fields, self.where = fields, where

    def wrong(self, name: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} in its header must be {wanted}; got "
                               f"{str(self.fields.get(name))[:60]!r}. Is it another model's file?")

    def integer(self, name: str, default: int, most: int = MOST_WIDTH) -> int:
        number = self.fields.get(name, default)
        if type(number) is not int or not 1 <= number <= most:
            raise self.wrong(name, f"a whole number from 1 to {most:,}")
        return number

    def number(self, name: str, default: float) -> float:
        number = self.fields.get(name, default)
        if type(number) not in (int, float) or not math.isfinite(number) or not 0 < number <= 1e9:
            raise self.wrong(name, "a number above 0")
        return float(number)

    def truth(self, name: str, default: bool) -> bool:
        value = self.fields.get(name, default)
        if type(value) is not bool:
            raise self.wrong(name, "true or false")
        return value

    def most(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        numbers = self.fields.get(name, list(default))
        if not isinstance(numbers, list) or len(numbers) != len(default) or not all(
                type(n) in (int, float) and 0 < n <= MOST_WIDTH for n in numbers):
            raise self.wrong(name, f"{len(default)} numbers above 0")
        return tuple(numbers)

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.fields.get(name, default)
        if value not in choices:
            raise self.wrong(name, " or ".join(filter(None, choices)))
        return value

    def check_fixed(self) -> None:
        for name, value in FIXED.items():
            got = self.fields.get(name, value)
            if got != value or isinstance(got, bool) is not isinstance(value, bool):      # 1 is not true here
                raise self.wrong(name, f"{value!r}, as in every release")


    def check_seen(self, seen: Mapping[str, Any]) -> None:
        """seen: of what tensors decide, the values that they have."""
        for name, value in seen.items():
            if name in self.fields and self.fields[name] != value:
                raise self.wrong(name, f"{value}, as its tensors are")

    def is_double(self) -> bool:
        """Whether the positions' grid is in fp64: where it is said; anything else is fp32, and no header fp64."""
        precision = self.fields.get("frequencies_precision", "float32" if self.fields else "float64")
        if not isinstance(precision, str):
            raise self.wrong("frequencies_precision", "text, such as float64")
        return precision == "float64"


def transformer_config(fields: Mapping[str, Any], keys: Mapping[str, tuple[int, ...]], where: str) -> LtxConfig:
    """Of the header's `transformer`, {} where it is lost, and of the shapes of the file's tensors.

    keys: names below DIT_PREFIX, and shapes.  What the tensors decide is taken from them: a file is repacked more often
    than its weights are changed; where the header says otherwise the file is refused.  Raises CheckpointError.
    """
    said = Said(fields, where)
    said.check_fixed()
    width, channels = matrix(keys, "patchify_proj.weight", where)
    audio = "audio_patchify_proj.weight" in keys
    audio_width, audio_channels = matrix(keys, "audio_patchify_proj.weight", where) if audio else (
        said.integer("audio_num_attention_heads", 32) * said.integer("audio_attention_head_dim", 64), 128)
    block = "transformer_blocks.0."
    gates = keys.get(block + "attn1.to_gate_logits.weight")
    heads = said.integer("num_attention_heads", gates[0] if gates else 32)
    audio_heads = said.integer("audio_num_attention_heads", heads)
    modulated = matrix(keys, block + "scale_shift_table", where)[0] == 9
    config = LtxConfig(
        layers=count_of(keys, "transformer_blocks."),
        channels=channels, heads=heads, width=width, audio=audio, audio_channels=audio_channels,
        audio_heads=audio_heads, audio_width=audio_width,
        caption_width=matrix(keys, "caption_projection.linear_1.weight", where)[1]
        if "caption_projection.linear_1.weight" in keys else None,
        gated=gates is not None, modulated_text=modulated, prompt_adaln=not modulated or any(
            name.startswith("prompt_adaln_single.") for name in keys),
        ff_bias=block + "ff.net.2.bias" in keys, audio_ff_bias=not audio or block + "audio_ff.net.2.bias" in keys,
        keyframes="keyframes_abs_pos_embedding" in keys,
        rope_halves=said.choice("rope_type", "split", ("split", "interleaved")) == "split",
        rope_exact=said.is_double(), theta=said.number("positional_embedding_theta", 10000.0),
        most=said.most("positional_embedding_max_pos", (20, 2048, 2048)),              # type: ignore[arg-type]
        audio_most=said.most("audio_positional_embedding_max_pos", (20,))[0],
        # a header without it means 1, no header the releases' 1000
        gate_time_scale=said.number("av_ca_timestep_scale_multiplier", 1 if fields else 1000) / 1000,
        norm_eps=said.number("norm_eps", 1e-6))
    check_agrees(said, config)
    return config


def check_agrees(said: Said, config: LtxConfig) -> None:
    """Raises CheckpointError where the header describes another transformer than the tensors are of."""
    if config.width % config.heads or config.audio_width % config.audio_heads or config.heads != config.audio_heads:
        raise CheckpointError(f"{said.where}: {config.width} and {config.audio_width} channels must be of equally many "
                              f"heads; got {config.heads} and {config.audio_heads}")
    seen = dict(num_attention_heads=config.heads, attention_head_dim=config.width // config.heads,
                num_layers=config.layers, in_channels=config.channels, out_channels=config.channels,
                cross_attention_dim=config.width, apply_gated_attention=config.gated,
                cross_attention_adaln=config.modulated_text, ff_bias=config.ff_bias,
                use_prompt_adaln_single=config.prompt_adaln)
    if config.audio:
        seen |= dict(audio_attention_head_dim=config.audio_width // config.audio_heads,
                     audio_in_channels=config.audio_channels, audio_out_channels=config.audio_channels,
                     audio_cross_attention_dim=config.audio_width,
                     audio_ff_bias=config.audio_ff_bias)
    said.check_seen(seen)


def connectors_config(fields: Mapping[str, Any], keys: Mapping[str, tuple[int, ...]], hidden: int,
                      where: str) -> ConnectorsConfig:
    """Of the header's `transformer`, {} where it is lost, and of the file's tensors under their full names.

    hidden: the text encoder's width.  Raises CheckpointError.
    """
    said = Said(fields, where)
    there = [name for name in PER_TOKEN if name in fields]
    per_token = "text_embedding_projection.video_aggregate_embed.weight" in keys
    if there and (len(there) < len(PER_TOKEN) or any(fields[name] != PER_TOKEN[name] for name in there)):
        raise CheckpointError(f"{where}: of {', '.join(PER_TOKEN)} its header must have all, or none, with the values "
                              f"{', '.join(str(value).lower() for value in PER_TOKEN.values())}; it has "
                              f"{', '.join(f'{name} {fields[name]}' for name in there)}")
    video, sound = (f"{DIT_PREFIX}{stream}_embeddings_connector." for stream in ("video", "audio"))
    embed = f"text_embedding_projection.{'video_aggregate_embed' if per_token else 'aggregate_embed'}.weight"
    projected, flat = matrix(keys, embed, where)
    registers, width = matrix(keys, video + "learnable_registers", where)
    audio_width = matrix(keys, sound + "learnable_registers", where)[1]
    if flat % hidden or flat // hidden < 2:
        raise CheckpointError(f"{where}: its text projection takes {flat} numbers of a token, which are not the hidden "
                              f"states of a text encoder of width {hidden}. Is the text encoder another model's?")
    block = video + "transformer_1d_blocks.0."
    gates, audio_gates = (keys.get(f"{prefix}transformer_1d_blocks.0.attn1.to_gate_logits.weight")
                          for prefix in (video, sound))
    heads = said.integer("connector_num_attention_heads", gates[0] if gates else max(1, width // 128))
    config = ConnectorsConfig(
        hidden=hidden, stack=flat // hidden, width=width, audio_width=audio_width, registers=registers, heads=heads,
        layers=count_of(keys, video + "transformer_1d_blocks."),
        audio_heads=said.integer("audio_connector_num_attention_heads", audio_gates[0] if audio_gates else heads),
        per_token=per_token, gated=gates is not None, ff_bias=block + "ff.net.2.bias" in keys,
        most=said.most("connector_positional_embedding_max_pos", (1 if fields else 4096,))[0],
        theta=said.number("positional_embedding_theta", 10000.0),
        rope_halves=said.choice("rope_type", "split", ("split", "interleaved")) == "split",
        rope_exact=said.is_double(), norm_eps=said.number("norm_eps", 1e-6))
    if config.width % config.heads or config.audio_width % config.audio_heads or projected != width:
        raise CheckpointError(f"{where}: its connectors' {width} and {audio_width} channels must be of whole heads and "
                              f"as wide as the text projection; got {config.heads} and {config.audio_heads} heads, "
                              f"{projected} projected")
    check_connectors(said, config)
    return config


def check_connectors(said: Said, config: ConnectorsConfig) -> None:
    """Raises CheckpointError where the header describes other connectors than the tensors are of."""
    if "caption_proj_before_connector" in said.fields and not config.per_token:
        raise said.wrong("caption_proj_before_connector", "left out: its tensors have one text projection, not two")
    norm = said.fields.get("text_encoder_norm_type")
    if norm is not None and (norm == NORM_OF_TOKENS) is not config.per_token:
        raise said.wrong("text_encoder_norm_type",
                         f"{'' if config.per_token else 'another than '}{NORM_OF_TOKENS}, as its tensors are")
    said.check_seen(dict(
        connector_num_layers=config.layers, connector_ff_bias=config.ff_bias,
        connector_attention_head_dim=config.width // config.heads, connector_apply_gated_attention=config.gated,
        audio_connector_attention_head_dim=config.audio_width // config.audio_heads))
    if said.fields.get("caption_channels", config.hidden) != config.hidden:
        raise said.wrong("caption_channels", f"{config.hidden}, the width of the text encoder that is there")
    if said.fields.get("connector_norm_output", True) is not True:
        raise said.wrong("connector_norm_output", "true, as in every release")


def count_of(keys: Mapping[str, tuple[int, ...]], blocks: str) -> int:
    """How many blocks there are under this name, at most 1,000; that none is missing is seen when they are loaded, and
    what is named as one beyond."""
    numbers = [name.removeprefix(blocks).partition(".")[0] for name in keys if name.startswith(blocks)]
    return 1 + max((int(number) for number in numbers if re.fullmatch(r"[0-9]{1,3}", number)), default=0)


def matrix(keys: Mapping[str, tuple[int, ...]], name: str, where: str) -> tuple[int, int]:
    """The two sizes of a tensor.  Raises CheckpointError."""
    shape = keys.get(name, ())
    if len(shape) != 2 or not all(1 <= side <= 1 << 24 for side in shape):
        what = f"is {list(shape)}, where a matrix is needed" if shape else "is missing"
        raise CheckpointError(f"{where}: {name} {what}. Is it an LTX-2 checkpoint?")
    return shape[0], shape[1]
