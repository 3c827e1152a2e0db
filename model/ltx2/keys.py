"""LTX-2: released tensor names -> our names, which are theirs behind a prefix (model/keys.py).

One file holds all parts, so each part's table says what it leaves to the others.
"""

from collections.abc import Iterable

from dailies.model.keys import KeyTable
from dailies.model.ltx2.config import DIT_PREFIX

CONNECTORS = ("video_embeddings_connector.", "audio_embeddings_connector.")
OTHER_PARTS = {
    "text_embedding_projection.": "of the text",
    "vae.": "the video VAE",
    "audio_vae.": "the audio VAE",
    "vocoder.": "the vocoder",
    "duration_head.": "of 2.5, which tells a prompt's length",
}
SOUND = {
    "audio_patchify_proj.", "audio_adaln_single.", "audio_prompt_adaln_single.", "audio_caption_projection.",
    "audio_scale_shift_table", "audio_proj_out.", "av_ca_", "transformer_blocks.{}.audio_",
    "transformer_blocks.{}.video_to_audio_attn.", "transformer_blocks.{}.scale_shift_table_a2v_ca_",
}


def transformer_table(*, audio: bool = True) -> KeyTable:
    """audio: False leaves out what sound alone needs."""
    dropped = {DIT_PREFIX + name: "of the text" for name in (*CONNECTORS, "embeddings_connector.")}
    silent = {} if audio else dict.fromkeys((DIT_PREFIX + name for name in sorted(SOUND)), "of sound, not asked for")
    return KeyTable(name="LTX2_TRANSFORMER", rules={DIT_PREFIX: ""}, dropped={**OTHER_PARTS, **dropped, **silent})


def connectors_table(parts: Iterable[str]) -> KeyTable:
    """parts: the first names of the transformer's own tensors below DIT_PREFIX, which are not loaded here."""
    projection = "text_embedding_projection."
    return KeyTable(
        name="LTX2_CONNECTORS",
        rules={projection: projection, **{DIT_PREFIX + name: name for name in CONNECTORS}},
        dropped={name: why for name, why in OTHER_PARTS.items() if name != projection}
        | {DIT_PREFIX + name: "the transformer" for name in parts})
