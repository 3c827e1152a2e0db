"""LTX-2: released tensor names -> our names, which are theirs behind a prefix (model/keys.py).

One file holds all parts, so the table of a part says what it leaves to the others.
"""

from dailies.model.keys import KeyTable, nested
from dailies.model.ltx2.config import DIT_PREFIX

CONNECTORS = ("video_embeddings_connector.", "audio_embeddings_connector.")
PROJECTION = "text_embedding_projection."
OTHER_PARTS = {
    "vae.": "the video VAE",
    "audio_vae.": "the audio VAE",
    "vocoder.": "the vocoder",
    "duration_head.": "of 2.5, which tells a prompt's length",
}
SOUND = (
    "audio_patchify_proj.", "audio_adaln_single.", "audio_prompt_adaln_single.", "audio_caption_projection.",
    "audio_scale_shift_table", "audio_proj_out.", "av_ca_", "transformer_blocks.{}.audio_",
    "transformer_blocks.{}.video_to_audio_attn.", "transformer_blocks.{}.scale_shift_table_a2v_ca_",
)
PICTURE = (
    "patchify_proj.", "adaln_single.", "prompt_adaln_single.", "caption_projection.", "scale_shift_table", "proj_out.",
    "keyframes_abs_pos_embedding", "transformer_blocks.",
)
_UNASKED = "of sound, which was not asked for"


def transformer_table(*, audio: bool = True) -> KeyTable:
    """audio: False leaves out what sound alone needs."""
    texts = dict.fromkeys((PROJECTION, *(DIT_PREFIX + name for name in CONNECTORS)), "the connectors")
    silent = {} if audio else dict.fromkeys((DIT_PREFIX + name for name in SOUND), _UNASKED)
    return KeyTable(name="LTX2_TRANSFORMER", rules={DIT_PREFIX: ""}, dropped={**OTHER_PARTS, **texts, **silent})


def connectors_table(*, audio: bool = True) -> KeyTable:
    """As transformer_table."""
    transformer = dict.fromkeys((DIT_PREFIX + name for name in (*PICTURE, *SOUND)), "the transformer")
    silent = {} if audio else dict.fromkeys(
        (DIT_PREFIX + CONNECTORS[1], f"{PROJECTION}audio_aggregate_embed."), _UNASKED)
    return KeyTable(name="LTX2_CONNECTORS",
                    rules={PROJECTION: PROJECTION, **{DIT_PREFIX + name: name for name in CONNECTORS}},
                    dropped={**OTHER_PARTS, **transformer, **silent})


# as diffusers saves the transformer, by itself
_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
LTX2_DIFFUSERS = KeyTable(
    name="LTX2_DIFFUSERS",
    rules={
        "proj_in.": "patchify_proj.",
        "audio_proj_in.": "audio_patchify_proj.",
        "time_embed.": "adaln_single.",
        "audio_time_embed.": "audio_adaln_single.",
        "prompt_adaln.": "prompt_adaln_single.",
        "audio_prompt_adaln.": "audio_prompt_adaln_single.",
        "av_cross_attn_video_scale_shift.": "av_ca_video_scale_shift_adaln_single.",
        "av_cross_attn_audio_scale_shift.": "av_ca_audio_scale_shift_adaln_single.",
        "av_cross_attn_video_a2v_gate.": "av_ca_a2v_gate_adaln_single.",
        "av_cross_attn_audio_v2a_gate.": "av_ca_v2a_gate_adaln_single.",
        **nested({f"transformer_blocks.{{}}.{name}.": f"transformer_blocks.{{}}.{name}." for name in _ATTENTIONS},
                 {"norm_q.": "q_norm.", "norm_k.": "k_norm."}),
        "transformer_blocks.{}.video_a2v_cross_attn_scale_shift_table":
            "transformer_blocks.{}.scale_shift_table_a2v_ca_video",
        "transformer_blocks.{}.audio_a2v_cross_attn_scale_shift_table":
            "transformer_blocks.{}.scale_shift_table_a2v_ca_audio",
        **{name: name for name in (
            "transformer_blocks.{}.", "caption_projection.", "audio_caption_projection.", "keyframes_abs_pos_embedding",
            "scale_shift_table", "audio_scale_shift_table", "proj_out.", "audio_proj_out.")},
    },
)
LTX2_CONNECTORS_DIFFUSERS = KeyTable(
    name="LTX2_CONNECTORS_DIFFUSERS",
    rules={
        "text_proj_in.": f"{PROJECTION}aggregate_embed.",
        **{f"{stream}_text_proj_in.": f"{PROJECTION}{stream}_aggregate_embed." for stream in ("video", "audio")},
        **nested({f"{stream}_connector.": f"{stream}_embeddings_connector." for stream in ("video", "audio")}, {
            "transformer_blocks.{}.attn1.norm_q.": "transformer_1d_blocks.{}.attn1.q_norm.",
            "transformer_blocks.{}.attn1.norm_k.": "transformer_1d_blocks.{}.attn1.k_norm.",
            "transformer_blocks.{}.": "transformer_1d_blocks.{}.",
            "learnable_registers": "learnable_registers"}),
    },
)
