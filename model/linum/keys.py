"""Linum v2: released tensor names -> our names (model/keys.py)."""

from dailies.model.keys import KeyTable

LINUM = KeyTable(
    name="LINUM",
    rules={
        "video_data_scale": "latent_scale",
        "video_data_bias": "latent_bias",
        "model.patch_embedding.": "patch_embed.",
        "model.time_embedding.0.": "time_in.",
        "model.time_embedding.2.": "time_out.",
        "model.time_projection.1.": "time_modulation.",
        "model.text_embedding.0.": "text_in.",
        "model.text_embedding.2.": "text_out.",
        "model.blocks.{}.modulation": "blocks.{}.modulation",
        "model.blocks.{}.norm1.": "blocks.{}.norm_attn.",
        "model.blocks.{}.norm3.": "blocks.{}.norm_cross.",      # norm3 runs second
        "model.blocks.{}.norm2.": "blocks.{}.norm_ffn.",
        "model.blocks.{}.self_attn.": "blocks.{}.attn.",
        "model.blocks.{}.cross_attn.": "blocks.{}.cross.",
        "model.blocks.{}.ffn.0.": "blocks.{}.ffn_in.",
        "model.blocks.{}.ffn.2.": "blocks.{}.ffn_out.",
        "model.head.modulation": "head.modulation",
        "model.head.norm.": "head.norm.",
        "model.head.head.": "head.linear.",
    },
    dropped={
        "image_data_scale": "statistics of single images, left over from training; rendering uses those of video",
        "image_data_bias": "as image_data_scale",
    },
)
