"""Wan and TurboDiffusion: released tensor names -> our names (model/keys.py)."""

from dailies.model.keys import KeyTable, nested

RES_BLOCK = {"residual.0.": "norm1.", "residual.2.": "conv1.", "residual.3.": "norm2.", "residual.6.": "conv2."}
RESAMPLE = {"resample.1.": "conv.", "time_conv.": "time_conv."}
ATTENTION = {"norm.": "norm.", "to_qkv.": "to_qkv.", "proj.": "proj."}

WAN_VAE = KeyTable(
    name="WAN_VAE",
    rules={
        "conv1.": "to_moments.",
        "conv2.": "from_latent.",
        **{f"{side}.{old}": f"{side}.{new}" for side in ("encoder", "decoder")
           for old, new in {"conv1.": "conv_in.", "head.0.": "norm_out.", "head.2.": "conv_out."}.items()},
        **nested({"encoder.middle.{}.": "encoder.mid.{}.", "decoder.middle.{}.": "decoder.mid.{}."},
                 RES_BLOCK | ATTENTION),
        **nested({"encoder.downsamples.{}.": "encoder.down.{}.", "decoder.upsamples.{}.": "decoder.up.{}."},
                 RES_BLOCK | RESAMPLE | {"shortcut.": "shortcut."}),
    },
)

DIFFUSERS_RES_BLOCK = {"norm1.": "norm1.", "conv1.": "conv1.", "norm2.": "norm2.", "conv2.": "conv2."}

WAN_VAE_DIFFUSERS = KeyTable(
    name="WAN_VAE_DIFFUSERS",
    rules={
        "quant_conv.": "to_moments.",
        "post_quant_conv.": "from_latent.",
        **{f"{side}.{part}": f"{side}.{part}" for side in ("encoder", "decoder")
           for part in ("conv_in.", "norm_out.", "conv_out.")},
        **nested({f"{side}.mid_block.resnets.{i}.": f"{side}.mid.{2 * i}."
                  for side in ("encoder", "decoder") for i in (0, 1)}, DIFFUSERS_RES_BLOCK),
        **nested({f"{side}.mid_block.attentions.0.": f"{side}.mid.1." for side in ("encoder", "decoder")}, ATTENTION),
        **nested({"encoder.down_blocks.{}.": "encoder.down.{}."},
                 DIFFUSERS_RES_BLOCK | RESAMPLE | {"conv_shortcut.": "shortcut."}),
        # the decoder's layers are numbered within their stage: three residual blocks, and an upsampler but for the last
        **nested({f"decoder.up_blocks.{stage}.resnets.{i}.": f"decoder.up.{4 * stage + i}."
                  for stage in range(4) for i in range(3)}, DIFFUSERS_RES_BLOCK),
        "decoder.up_blocks.1.resnets.0.conv_shortcut.": "decoder.up.4.shortcut.",           # the one stage that widens
        **{f"decoder.up_blocks.{stage}.upsamplers.0.{old}": f"decoder.up.{4 * stage + 3}.{new}"
           for old, new, stages in (("resample.1.", "conv.", 3), ("time_conv.", "time_conv.", 2))
           for stage in range(stages)},
    },
)

WAN = KeyTable(
    name="WAN",
    rules={
        "patch_embedding.": "patch_embed.",
        "time_embedding.0.": "time_in.",
        "time_embedding.2.": "time_out.",
        "time_projection.1.": "time_modulation.",
        "text_embedding.0.": "text_in.",
        "text_embedding.2.": "text_out.",
        "img_emb.proj.0.": "image_embed.norm_in.",
        "img_emb.proj.1.": "image_embed.linear_in.",
        "img_emb.proj.3.": "image_embed.linear_out.",
        "img_emb.proj.4.": "image_embed.norm_out.",
        "blocks.{}.modulation": "blocks.{}.modulation",
        "blocks.{}.norm3.": "blocks.{}.norm_cross.",            # the only norm of a block that has tensors
        "blocks.{}.self_attn.": "blocks.{}.attn.",
        "blocks.{}.cross_attn.k_img.": "blocks.{}.cross.k_image.",
        "blocks.{}.cross_attn.v_img.": "blocks.{}.cross.v_image.",
        "blocks.{}.cross_attn.norm_k_img.": "blocks.{}.cross.norm_k_image.",
        "blocks.{}.cross_attn.": "blocks.{}.cross.",
        "blocks.{}.ffn.0.": "blocks.{}.ffn_in.",
        "blocks.{}.ffn.2.": "blocks.{}.ffn_out.",
        "head.modulation": "head.modulation",
        "head.head.": "head.linear.",
    },
)

# Distilled and tuned for sparse attention. In the -quant files a layer has int8_weight and scale for its weight: the
# names are ours too (model/turbo.py). While training, every name has net. in front (PREFIXES), and every block a
# wrapper around it; some tools leave them there.
TURBO_WAN = KeyTable(
    name="TURBO_WAN",
    rules={"blocks.{}.self_attn.attn_op.local_attn.proj_l.": "blocks.{}.attn.proj.", **WAN.rules},
    flat=("patch_embedding.weight",),                   # a linear layer there, of patches in the order c, t, h, w
)

TURBO_WAN_WRAPPED = KeyTable(
    name="TURBO_WAN_WRAPPED",
    rules={old.replace("blocks.{}.", "blocks.{}._checkpoint_wrapped_module."): new
           for old, new in TURBO_WAN.rules.items()},
    flat=TURBO_WAN.flat,
)

DIFFUSERS_ATTENTION = {"to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "o.",
                       "norm_q.": "norm_q.", "norm_k.": "norm_k."}

WAN_DIFFUSERS = KeyTable(
    name="WAN_DIFFUSERS",
    rules={
        "patch_embedding.": "patch_embed.",
        **nested({"condition_embedder.": ""}, {
            "time_embedder.linear_1.": "time_in.",
            "time_embedder.linear_2.": "time_out.",
            "time_proj.": "time_modulation.",
            "text_embedder.linear_1.": "text_in.",
            "text_embedder.linear_2.": "text_out.",
            "image_embedder.norm1.": "image_embed.norm_in.",
            "image_embedder.ff.net.0.proj.": "image_embed.linear_in.",
            "image_embedder.ff.net.2.": "image_embed.linear_out.",
            "image_embedder.norm2.": "image_embed.norm_out.",
        }),
        "blocks.{}.scale_shift_table": "blocks.{}.modulation",
        "blocks.{}.norm2.": "blocks.{}.norm_cross.",            # norm3 in the original files
        **nested({"blocks.{}.attn1.": "blocks.{}.attn."}, DIFFUSERS_ATTENTION),
        **nested({"blocks.{}.attn2.": "blocks.{}.cross."}, DIFFUSERS_ATTENTION | {
            "add_k_proj.": "k_image.", "add_v_proj.": "v_image.", "norm_added_k.": "norm_k_image."}),
        "blocks.{}.ffn.net.0.proj.": "blocks.{}.ffn_in.",
        "blocks.{}.ffn.net.2.": "blocks.{}.ffn_out.",
        "scale_shift_table": "head.modulation",
        "proj_out.": "head.linear.",
    },
    dropped={"blocks.{}.attn2.norm_added_q.": "made by diffusers' attention, used by nothing"},
)

# Wan's image encoder as transformers names it. In the original file query, key and value are one tensor, and the text
# tower is there too: `dailies convert` takes both apart (jobs/convert.py).
CLIP_VISION = KeyTable(
    name="CLIP_VISION",
    rules=nested({"vision_model.": ""}, {
        "embeddings.class_embedding": "class_row",
        "embeddings.position_embedding.weight": "positions",
        "embeddings.patch_embedding.": "patch_embed.",
        "pre_layrnorm.": "norm_in.",                    # spelt so
        "encoder.layers.{}.layer_norm1.": "blocks.{}.norm_attn.",
        "encoder.layers.{}.self_attn.q_proj.": "blocks.{}.q.",
        "encoder.layers.{}.self_attn.k_proj.": "blocks.{}.k.",
        "encoder.layers.{}.self_attn.v_proj.": "blocks.{}.v.",
        "encoder.layers.{}.self_attn.out_proj.": "blocks.{}.o.",
        "encoder.layers.{}.layer_norm2.": "blocks.{}.norm_mlp.",
        "encoder.layers.{}.mlp.fc1.": "blocks.{}.mlp_in.",
        "encoder.layers.{}.mlp.fc2.": "blocks.{}.mlp_out.",
    }),
    dropped={
        "vision_model.encoder.layers.31.": "Wan takes the rows before the last block",
        "vision_model.post_layernorm.": "as that block",
        "vision_model.embeddings.position_ids": "0, 1, 2 and so on",
        "visual_projection.": "of CLIPVisionModelWithProjection: it turns the first row, behind the last block, into "
                              "one that is compared with texts; Wan takes all rows before that block",
        "text_model.": "the text tower, which Wan does not use",
        "text_projection.": "as the text tower",
        "logit_scale": "as the text tower",
    },
)

CLIP_ORIGINAL = KeyTable(
    name="CLIP_ORIGINAL",
    rules={"visual.": "visual."},                       # model/wan/image_encoder.py, from_open_clip
    dropped={"textual.": "the text tower, which Wan does not use", "log_scale": "as the text tower"},
)
