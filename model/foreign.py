"""What a file is that is not the one that is needed: one sentence for each kind of weights that people have."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

# dtypes of a safetensors header that are no numbers to compute with as they are, and what they are called
QUANTIZED = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "F8_E8M0": "mxfp", "F8_E4M3FNUZ": "fp8", "F8_E5M2FNUZ": "fp8",
             "F6_E2M3": "mxfp6", "F6_E3M2": "mxfp6", "F4": "fp4"}

# Part of a tensor's name -> what the file then is, and what to do. The first that fits is said.
KINDS = (
    (r"lora_(A|B|up|down)\b|\.lokr_|\.hada_w|\.diff_b$|\.dora_scale$",
     "a LoRA, which changes a model and is none; dailies does not apply LoRAs yet: merge it into the model's weights"),
    (r"\.quant_state\.bitsandbytes|\.absmax$|\.quant_map$|\.SCB$",
     "quantised by bitsandbytes; fetch the bf16 or fp16 file instead"),
    (r"\.qweight$|\.qzeros$|\.g_idx$", "quantised by GPTQ or AWQ; fetch the bf16 or fp16 file instead"),
    (r"\.comfy_quant$|\.weight_scale_2$|\.scale_weight$|^scaled_fp8$",
     "quantised for ComfyUI; fetch the bf16 or fp16 file instead"),
    (r"\bvace_blocks\.|\bvace_patch_embedding\.", "Wan VACE, a model that dailies does not have"),
    (r"\bcasual_audio_encoder\.|\baudio_injector\.", "Wan S2V, a model that dailies does not have"),
    (r"\bmotion_encoder\.|\bface_adapter\.", "Wan Animate, a model that dailies does not have"),
    (r"\bcontrol_adapter\.|\bref_conv\.", "Wan Fun, a model that dailies does not have"),
    (r"\bimg_emb\.emb_pos$|\bimage_embedder\.pos_embed$",
     "Wan for first and last frames (FLF2V), a model that dailies does not have"),
    (r"\bdouble_blocks\.|\bsingle_blocks\.", "a FLUX or HunyuanVideo transformer, a model that dailies does not have"),
    (r"\badaln_single\.|\bvocoder\.", "a file of LTX-2, whose models are called ltx-2-19b, ltx-2.3 and so on"),
    (r"^(model\.)?(language_model\.)?(model\.)?layers\.\d+\.self_attn\.",
     "a language model, where an encoder of texts is needed"),
    (r"^first_stage_model\.|^cond_stage_model\.|^conditioner\.",
     "a checkpoint with several models in one file; fetch the transformer, the VAE and the text encoder as files of "
     "their own"),
)
# of the transformers of Wan: width and channels that go in -> which one it is
WAN_SIZES = {(1536, 16): "Wan 2.1 1.3B, text to video", (1536, 36): "Wan 2.1 1.3B Fun or I2V",
             (5120, 16): "Wan 14B, text to video (2.1, or an expert of 2.2)",
             (5120, 36): "Wan 14B, image to video (2.1, or an expert of 2.2)",
             (3072, 48): "Wan 2.2 TI2V 5B, which dailies does not have"}


def kind_of(names: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A sentence, with a blank before it, where the names of the tensors say what their file is; "" elsewhere."""
    for pattern, kind in KINDS:
        found = next((name for name in names if re.search(pattern, name[:300])), None)
        if found is not None:
            return f" It is {kind} (by {found[:100]})."
    embedding = next((name for name in names if name.endswith("patch_embedding.weight")), "")
    size = shapes.get(embedding, ())
    if len(size) == 5 and size[:2] in WAN_SIZES:
        return f" By its sizes it is {WAN_SIZES[size[0], size[1]]}."
    return ""


def quantized(path: Path, kinds: Mapping[str, str]) -> str:
    """The message for a file of which some tensors have these dtypes, by their names."""
    names = list(kinds)
    kind = QUANTIZED.get(kinds[names[0]], "fp8")
    return (f"{path} holds {kind} weights ({kinds[names[0]]}: {names[0][:100]}"
            f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}), which dailies does not compute with. Fetch "
            f"the bf16 or fp16 file of the same model; dailies convert --precision int8 makes a transformer as small")
