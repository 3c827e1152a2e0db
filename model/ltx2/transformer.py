"""LTX-2's transformer: video and audio latents in, the velocities of both out; two streams that attend to each other.

Letters  B clips  N tokens  C channels  D width of a stream  S rows of text  A axes of positions
Source   LTX-2, ltx-core 1.2, LTXModel; for 2.0, 2.3 and 2.5. Modules have the published names below
         `model.diffusion_model.`: keys.py has prefixes alone.

The residual streams, modulation and heads are fp32; other linear layers compute in the dtype of their weights.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.model.block import TORCH_OPS
from dailies.model.layers import FullPrecisionLinear, Linear
from dailies.model.ltx2.adaln import AdaLayerNormSingle, Levels, Modulation, levels_of
from dailies.model.ltx2.attention import FeedForward, LtxAttention, RootMeanSquare
from dailies.model.ltx2.config import LtxConfig
from dailies.model.ltx2.rope import RotaryTable, middles, rotary
from dailies.model.offload import LayersInTurn


@dataclass(frozen=True)
class Modality:
    """What the transformer is told of one stream."""

    latent: Tensor                                      # [B, N, C] normalised
    timesteps: Tensor | Levels                          # [B, N] in [0, 1]: sigma * mask; or [B, 1], the same for all
    sigma: Tensor                                       # [B] in [0, 1], 1 is noise
    positions: Tensor                                   # [B or 1, A, N, 2], as rope.py gives them
    context: "Tensor | TextKeys"                        # [B, S, E] of the connectors, or of LtxTransformer.read
    keyframes: Tensor | None = None                     # [B, N], above 0 for tokens of a single frame (2.5)


class TextKeys(NamedTuple):
    """Keys and values of a text in every block, each [B, S, heads, head_dim]."""

    pairs: tuple[tuple[Tensor, Tensor], ...]


class Ropes(NamedTuple):
    """Rotary tables of a stream, for its own attention and for that between streams; once per clip will do."""

    own: RotaryTable
    cross: RotaryTable | None


class Conditions(NamedTuple):
    """What the blocks take of one stream beside its tokens."""

    context: Any                                        # [B, S, D], or what attention makes of it
    ropes: Any                                          # Ropes
    rows: Modulation                                    # [.., 6 or 9, D]
    time: Modulation                                    # [.., 1, D] for the head
    text_rows: Tensor | float                           # [B, 1, 2, D] of the context, or 0
    cross_rows: Any                                     # Modulation [.., 4, D], or None where streams are apart
    cross_gate: Any                                     # Modulation [.., 1, D], or None


class LtxTransformer(nn.Module):
    ops = TORCH_OPS
    always_refitted = True                              # by turbo.py, in fp32 too
    in_turn: LayersInTurn | None = None                 # of blocks whose weights are there in their turn alone

    def __init__(self, config: LtxConfig):
        super().__init__()
        self.config = config
        width, sound = config.width, config.audio_width
        self.patchify_proj = Linear(config.channels, width)
        self.adaln_single = AdaLayerNormSingle(width, config.rows)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.proj_out = FullPrecisionLinear(width, config.channels)
        if config.keyframes:
            self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, width))
        if config.caption_width:
            self.caption_projection = CaptionProjection(config.caption_width, width)
        if config.modulated_text and config.prompt_adaln:
            self.prompt_adaln_single = AdaLayerNormSingle(width, 2)
        if config.audio:
            self.audio_patchify_proj = Linear(config.audio_channels, sound)
            self.audio_adaln_single = AdaLayerNormSingle(sound, config.rows)
            self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, sound))
            self.audio_proj_out = FullPrecisionLinear(sound, config.audio_channels)
            self.av_ca_video_scale_shift_adaln_single = AdaLayerNormSingle(width, 4)
            self.av_ca_audio_scale_shift_adaln_single = AdaLayerNormSingle(sound, 4)
            self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(width, 1)
            self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(sound, 1)
            if config.caption_width:
                self.audio_caption_projection = CaptionProjection(config.caption_width, sound)
            if config.modulated_text and config.prompt_adaln:
                self.audio_prompt_adaln_single = AdaLayerNormSingle(sound, 2)
        self.transformer_blocks = nn.ModuleList(LtxBlock(config) for _ in range(config.layers))
        self.norm_out, self.audio_norm_out = (
            nn.LayerNorm(size, eps=1e-6, elementwise_affine=False) for size in (width, sound))

    @property
    def blocks(self) -> nn.ModuleList:
        """As turbo.py calls them."""
        return self.transformer_blocks

    def forward(self, video: Modality, audio: Modality | None = None, *, skip_video: Collection[int] = (),
                skip_audio: Collection[int] = (), isolated: bool = False,
                ropes: tuple[Ropes, Ropes | None] | None = None) -> tuple[Tensor, Tensor | None]:
        """Velocities d latent / d sigma (noise minus data) of both streams, shaped like their latents, fp32.

        audio: None leaves the other stream out, whose picture is then another.  skip_video, skip_audio: blocks in which
        a stream's attention to itself gives each token its own value (STG).  isolated: the streams do not attend to
        each other.  ropes: of self.ropes, where they are kept.
        Raises ValueError for sound that this model was made without.
        """
        if audio is not None and not self.config.audio:
            raise ValueError("this transformer was made without sound: give it no audio, or set LtxConfig.audio")
        both = audio is not None and not isolated
        tables = ropes or self.ropes(video.positions, None if audio is None else audio.positions)
        told = self.told(video, audio if both else None, tables[0])
        x = self.embedded(video)
        y = heard = None
        if audio is not None:
            heard = self.told(audio, video if both else None, tables[1], sound=True)
            y = self.audio_patchify_proj(audio.latent).float()
        for place, block in enumerate(self.transformer_blocks):
            x, y = block(x, y, of_block(told, place), of_block(heard, place), skip_video=place in skip_video,
                         skip_audio=place in skip_audio, both=both)
        velocity = self.head(x, told, self.scale_shift_table, self.norm_out, self.proj_out)
        if heard is None:
            return velocity, None
        return velocity, self.head(y, heard, self.audio_scale_shift_table, self.audio_norm_out, self.audio_proj_out)

    def read(self, context: Tensor, *, audio: bool = False) -> Tensor | TextKeys:
        """A context [B, S, E] for Modality: keys and values of every block where they depend on no time (2.0), so once
        per clip will do; elsewhere the context itself, of which each block makes them.  audio: it is the sound's."""
        if self.config.modulated_text or self.in_turn is not None:
            return context
        rows = (self.audio_caption_projection if audio else self.caption_projection)(
            context) if self.config.caption_width else context
        layers = [block.audio_attn2 if audio else block.attn2 for block in self.transformer_blocks]
        return TextKeys(tuple(layer.key_value(rows) for layer in layers))

    def embedded(self, video: Modality) -> Tensor:
        """[B, N, D]"""
        x = self.patchify_proj(video.latent).float()
        if self.config.keyframes and video.keyframes is not None:
            x = x + (video.keyframes > 0)[..., None] * self.keyframes_abs_pos_embedding
        return x

    def told(self, own: Modality, other: Modality | None, ropes: Ropes | None, *, sound: bool = False) -> Conditions:
        """Of the picture, or the sound.  other: the stream that it attends to, if any."""
        before, stream, gate = ("audio_", "audio", "v2a") if sound else ("", "video", "a2v")
        levels = as_levels(own.timesteps)
        rows, time = self.get_submodule(f"{before}adaln_single")(levels)
        context, text_rows = own.context, 0.0
        cross: tuple[Any, Any] = (None, None)
        if self.config.caption_width and isinstance(context, Tensor):
            context = self.get_submodule(f"{before}caption_projection")(context)
        if self.config.modulated_text and self.config.prompt_adaln:
            text_rows = self.get_submodule(f"{before}prompt_adaln_single")(Levels(own.sigma[:, None]))[0].rows
        if other is not None:
            cross = self.crossing(levels, other.sigma,
                                  self.get_submodule(f"av_ca_{stream}_scale_shift_adaln_single"),
                                  self.get_submodule(f"av_ca_{gate}_gate_adaln_single"))
        return Conditions(context, ropes, rows, time, text_rows, *cross)

    def crossing(self, own: Levels, other: Tensor, rows: nn.Module, gate: nn.Module) -> tuple[Modulation, Modulation]:
        """Scale and shift, and the gate, of a stream in the attention between both; other: the other's sigma [B]."""
        sigma = Levels(other[:, None])
        rule = self.config.cross_time
        return (rows(sigma if rule == "other" else own)[0],
                gate(own if rule == "own" else sigma, self.config.gate_time_scale)[0])

    def ropes(self, video: Tensor, audio: Tensor | None) -> tuple[Ropes, Ropes | None]:
        """The tables of both streams' positions, as Modality has them."""
        config = self.config
        given: dict[str, Any] = dict(theta=config.theta, halves=config.rope_halves, exact=config.rope_exact)
        most = (max(config.most[0], config.audio_most),)
        tables: list[Any] = []
        for positions, limits, width, heads in ((video, config.most, config.width, config.heads),
                                                (audio, (config.audio_most,), config.audio_width, config.audio_heads)):
            if positions is None:
                tables.append(None)
                continue
            places = middles(positions.float())
            cross = None if audio is None else rotary(places[:, :1], most, config.audio_width, config.audio_heads,
                                                      **given)
            tables.append(Ropes(rotary(places, limits, width, heads, **given), cross))
        return tables[0], tables[1]

    def head(self, x: Any, told: Conditions, table: Tensor, norm: nn.LayerNorm, out: Linear) -> Tensor:
        """x: what the last block returned."""
        shift, scale = told.time.added(table)
        return out(self.ops.norm(x, norm, out, scale, shift)[1]).float()


def of_block(told: Conditions | None, place: int) -> Conditions | None:
    """With the block's own keys and values where they are made already."""
    if told is None or not isinstance(told.context, TextKeys):
        return told
    return told._replace(context=told.context.pairs[place])


def as_levels(timesteps: Tensor | Levels) -> Levels:
    return timesteps if isinstance(timesteps, Levels) else levels_of(timesteps)


class CaptionProjection(nn.Module):
    """The connectors' rows as rows of a stream's width (2.0)."""

    def __init__(self, caption_width: int, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = Linear(caption_width, width), Linear(width, width)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(rows), approximate="tanh"))


class Side(NamedTuple):
    """A stream's modules of a block."""

    attn: LtxAttention
    text: LtxAttention
    ff: FeedForward
    table: Tensor
    text_table: Tensor | None
    cross_table: Any                                    # Tensor, or None in a model without sound


class LtxBlock(nn.Module):
    """A stream attends to itself, then to its text; the streams attend to each other; each goes through its layers."""

    ops = TORCH_OPS

    def __init__(self, config: LtxConfig):
        super().__init__()
        width, heads, gated = config.width, config.heads, config.gated
        self.norm = RootMeanSquare(config.norm_eps)
        self.attn1 = LtxAttention(width, width, width, heads, gated=gated, spread=True)
        self.attn2 = LtxAttention(width, width, width, heads, gated=gated)
        self.ff = FeedForward(width, bias=config.ff_bias)
        self.scale_shift_table = nn.Parameter(torch.zeros(config.rows, width))
        if config.modulated_text:
            self.prompt_scale_shift_table = nn.Parameter(torch.zeros(2, width))
        if config.audio:
            sound, heads = config.audio_width, config.audio_heads
            self.audio_attn1 = LtxAttention(sound, sound, sound, heads, gated=gated)
            self.audio_attn2 = LtxAttention(sound, sound, sound, heads, gated=gated)
            self.audio_to_video_attn = LtxAttention(width, sound, sound, heads, gated=gated)
            self.video_to_audio_attn = LtxAttention(sound, width, sound, heads, gated=gated)
            self.audio_ff = FeedForward(sound, bias=config.audio_ff_bias)
            self.audio_scale_shift_table = nn.Parameter(torch.zeros(config.rows, sound))
            self.scale_shift_table_a2v_ca_video = nn.Parameter(torch.zeros(5, width))
            self.scale_shift_table_a2v_ca_audio = nn.Parameter(torch.zeros(5, sound))
            if config.modulated_text:
                self.audio_prompt_scale_shift_table = nn.Parameter(torch.zeros(2, sound))

    def sides(self, *, with_sound: bool) -> tuple[Side, Side | None]:
        text, cross = (getattr(self, name, None) for name in ("prompt_scale_shift_table",
                                                              "scale_shift_table_a2v_ca_video"))
        video = Side(self.attn1, self.attn2, self.ff, self.scale_shift_table, text, cross)
        return video, Side(
            self.audio_attn1, self.audio_attn2, self.audio_ff, self.audio_scale_shift_table,
            getattr(self, "audio_prompt_scale_shift_table", None), self.scale_shift_table_a2v_ca_audio,
        ) if with_sound else None

    def forward(self, x: Any, y: Any, video: Conditions, audio: Any, *, skip_video: bool,
                skip_audio: bool, both: bool) -> tuple[Any, Any]:
        """x, y: the streams of picture and sound [B, N, D] fp32, or what the block before returned.
        audio: Conditions, or None.

        skip_video, skip_audio: see LtxTransformer.forward.  both: the streams attend to each other.
        """
        picture, sound = self.sides(with_sound=audio is not None)
        x, seen, x_rows = self.own_and_text(picture, x, video, skip_video)
        if sound is None:
            x, h = self.ops.join(x, seen, picture.text.out, text_gate(x_rows), self.norm, picture.ff.into, x_rows[4],
                                 x_rows[3], last=True)
            return self.ops.feed_forward(x, h, picture.ff.into, picture.ff.out, x_rows[5]), None
        y, heard, y_rows = self.own_and_text(sound, y, audio, skip_audio)
        x_gate, y_gate, x_out, y_out = text_gate(x_rows), text_gate(y_rows), picture.text.out, sound.text.out
        if both:
            to_video, to_audio = self.audio_to_video_attn, self.video_to_audio_attn
            v, a = video.cross_rows.added(picture.cross_table[:4]), audio.cross_rows.added(sound.cross_table[:4])
            # both norms of each stream are taken before either is changed; rows are scale, then shift
            x, x_query = self.ops.join(x, seen, x_out, x_gate, self.norm, to_video.to_q, v[0], v[1])
            y, y_source = self.ops.join(y, heard, y_out, y_gate, self.norm, to_video.to_k, a[0], a[1])
            x, x_source = self.ops.norm(x, self.norm, to_audio.to_k, v[2], v[3])
            y, y_query = self.ops.norm(y, self.norm, to_audio.to_q, a[2], a[3])
            seen = to_video(x_query, y_source, video.ropes.cross, audio.ropes.cross)
            heard = to_audio(y_query, x_source, audio.ropes.cross, video.ropes.cross)
            x_out, y_out = to_video.out, to_audio.out
            x_gate, = video.cross_gate.added(picture.cross_table[4:])
            y_gate, = audio.cross_gate.added(sound.cross_table[4:])
        x, h = self.ops.join(x, seen, x_out, x_gate, self.norm, picture.ff.into, x_rows[4], x_rows[3], last=True)
        x = self.ops.feed_forward(x, h, picture.ff.into, picture.ff.out, x_rows[5])
        y, h = self.ops.join(y, heard, y_out, y_gate, self.norm, sound.ff.into, y_rows[4], y_rows[3], last=True)
        return x, self.ops.feed_forward(y, h, sound.ff.into, sound.ff.out, y_rows[5])

    def own_and_text(self, side: Side, x: Any, told: Conditions, skip: bool) -> tuple[Any, Tensor, tuple[Tensor, ...]]:
        """The stream, what its text gives it (but for the layer behind), and its modulation rows."""
        rows = told.rows.added(side.table)
        x, h = self.ops.norm(x, self.norm, side.attn.to_q, rows[1], rows[0])
        own = side.attn(h, h, told.ropes.own, told.ropes.own, skip=skip)
        context, shift_scale = told.context, (None, None)
        if side.text_table is not None:
            shift, scale = (side.text_table + told.text_rows).unbind(-2)
            context, shift_scale = context_modulated(context, scale, shift, side.text.to_k), (rows[6], rows[7])
        x, h = self.ops.join(x, own, side.attn.out, rows[2], self.norm, side.text.to_q, shift_scale[1], shift_scale[0])
        return x, side.text(h, context), rows


def context_modulated(context: Tensor, scale: Tensor, shift: Tensor, before: Linear) -> Tensor:
    """In fp32, and rounded once for the two layers that take it."""
    modulated = torch.addcmul(shift, context.float(), 1 + scale)
    return modulated if isinstance(before.takes, str) else modulated.to(before.takes)


def text_gate(rows: tuple[Tensor, ...]) -> Tensor | None:
    return rows[8] if len(rows) == 9 else None
