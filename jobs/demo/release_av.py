"""The demo with sound as a release of LTX-2.3 lies: one file with its header, and Gemma's folder beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from dailies.jobs.demo.codecs_av import AUDIO, VIDEO, VOCODER
from dailies.jobs.demo.losses import halved
from dailies.model import checkpoint
from dailies.model.ltx2.card import DEMO_AV
from dailies.model.ltx2.codec_config import STRIDES, VideoStage
from dailies.model.ltx2.config import DIT_PREFIX, PER_TOKEN, ConnectorsConfig, LtxConfig
from dailies.model.ltx2.gemma import GemmaConfig
from dailies.model.ltx2.keys import PROJECTION

RELEASE_FILE, GEMMA_FOLDER = DEMO_AV.files[0], DEMO_AV.text_folder
CONTEXT_ROWS = DEMO_AV.text_rows                        # tokens of a sentence, registers, rows of a context
SMALL_WIDTH, SMALL_SOUND_WIDTH = DEMO_AV.context_widths
SMALL_HEADS = 4

SMALL_GEMMA = GemmaConfig(
    vocabulary=320, width=64, hidden=128, layers=2, heads=4, key_heads=2, head_dim=16, query_scale=16 ** -0.5,
    window=64, everywhere=(False, True), thetas=(1e4, 1e6), stretch=(1.0, 1.0))
SMALL_TRANSFORMER = LtxConfig(
    layers=4, channels=VIDEO.latent_channels, heads=SMALL_HEADS, width=SMALL_WIDTH, audio_heads=SMALL_HEADS,
    audio_width=SMALL_SOUND_WIDTH, audio_channels=AUDIO.latent_channels * AUDIO.latent_bins, caption_width=None,
    gated=True, modulated_text=True)
SMALL_CONNECTORS = ConnectorsConfig(
    hidden=SMALL_GEMMA.width, stack=SMALL_GEMMA.layers + 1, layers=1, heads=SMALL_HEADS, width=SMALL_WIDTH,
    audio_heads=SMALL_HEADS, audio_width=SMALL_SOUND_WIDTH, registers=CONTEXT_ROWS, per_token=True, gated=True)


def write_release(folder: Path, *, dit: nn.Module, video: nn.Module, audio: nn.Module, vocoder: nn.Module,
                  gemma: nn.Module, connectors: nn.Module, tokenizer: Path) -> None:
    """Matrices in bf16, under the published names; of the VAEs what decodes.  tokenizer: a folder with one."""
    whole = {f"{DIT_PREFIX}{name}": tensor for name, tensor in dit.state_dict().items()}
    for name, tensor in connectors.state_dict().items():
        whole[name if name.startswith(PROJECTION) else f"{DIT_PREFIX}{name}"] = tensor
    for prefix, part in (("vae.", video), ("audio_vae.", audio), ("vocoder.", vocoder)):
        whole |= {f"{prefix}{name}": tensor for name, tensor in part.state_dict().items()
                  if not name.startswith("encoder.")}
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"config": json.dumps(header()), "model_version": "2.3.0"}
    checkpoint.save(folder / RELEASE_FILE, packed_state(whole), metadata)
    texts = folder / GEMMA_FOLDER
    texts.mkdir(exist_ok=True)
    checkpoint.save(texts / "model.safetensors", packed_state({f"language_model.model.{name}": tensor for name, tensor
                                                               in gemma.state_dict().items()}))
    (texts / "config.json").write_text(json.dumps(gemma_header(), indent=1))
    if tokenizer.resolve() != texts.resolve():
        shutil.copyfile(tokenizer / "tokenizer.json", texts / "tokenizer.json")


def packed_state(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in halved(state).items()}


def header() -> dict[str, Any]:
    """The config of the file, by the names of the releases."""
    dit = SMALL_TRANSFORMER
    width, sound = (size // SMALL_HEADS for size in (dit.width, dit.audio_width))
    return {
        "transformer": {
            "num_attention_heads": SMALL_HEADS, "attention_head_dim": width, "num_layers": dit.layers,
            "in_channels": dit.channels, "out_channels": dit.channels,
            "cross_attention_dim": dit.width, "audio_num_attention_heads": SMALL_HEADS,
            "audio_attention_head_dim": sound, "audio_in_channels": dit.audio_channels,
            "audio_out_channels": dit.audio_channels, "audio_cross_attention_dim": dit.audio_width,
            "timestep_scale_multiplier": 1000, "av_ca_timestep_scale_multiplier": 1000.0, "rope_type": "split",
            "frequencies_precision": "float64", "apply_gated_attention": True, "cross_attention_adaln": True,
            "positional_embedding_max_pos": list(dit.most),
            "audio_positional_embedding_max_pos": [dit.audio_most],
            "connector_num_attention_heads": SMALL_HEADS, "audio_connector_num_attention_heads": SMALL_HEADS,
            "connector_positional_embedding_max_pos": [SMALL_CONNECTORS.most], **PER_TOKEN},
        "vae": {"latent_channels": VIDEO.latent_channels, "patch_size": VIDEO.patch, "encoder_blocks": [],
                "decoder_blocks": [listed_stage(stage) for stage in VIDEO.decoder[::-1]],
                "decoder_base_channels": narrowest(), "spatial_padding_mode": VIDEO.decoder_padding},
        "audio_vae": {"model": {"params": {"sampling_rate": AUDIO.sample_rate, "ddconfig": {
            "ch": AUDIO.width, "ch_mult": list(AUDIO.multipliers), "num_res_blocks": AUDIO.blocks,
            "z_channels": AUDIO.latent_channels, "mel_bins": AUDIO.mel_bins, "out_ch": AUDIO.channels,
            "norm_type": "pixel", "causality_axis": "height"}}},
            "preprocessing": {"stft": {"hop_length": AUDIO.hop, "filter_length": AUDIO.window}}},
        "vocoder": vocoder_header()}


def listed_stage(stage: VideoStage) -> list[Any]:
    if stage.layers:
        return ["res_x", {"num_layers": stage.layers}]
    kind = next(name for name, stride in STRIDES.items() if stride == stage.stride)
    return [f"compress_{kind}", {"multiplier": stage.multiplier}]


def narrowest() -> int:
    """Channels of the video decoder before the pixels."""
    width = VIDEO.decoder_width
    for stage in VIDEO.decoder:
        width //= stage.multiplier
    return width


def vocoder_header() -> dict[str, Any]:
    made = VOCODER.generator
    return {"resblock": "1", "stereo": True, "upsample_initial_channel": made.width,
            "upsample_rates": list(made.rates), "upsample_kernel_sizes": list(made.kernels),
            "resblock_kernel_sizes": list(made.block_kernels),
            "resblock_dilation_sizes": [list(made.dilations)] * len(made.block_kernels),
            "output_sampling_rate": VOCODER.sample_rate, "use_tanh_at_final": made.final_tanh,
            "use_bias_at_final": made.final_bias}


def gemma_header() -> dict[str, Any]:
    made = SMALL_GEMMA
    return {"model_type": "gemma3", "text_config": {
        "vocab_size": made.vocabulary, "hidden_size": made.width, "intermediate_size": made.hidden,
        "num_hidden_layers": made.layers, "num_attention_heads": made.heads, "num_key_value_heads": made.key_heads,
        "head_dim": made.head_dim, "query_pre_attn_scalar": made.head_dim, "sliding_window": made.window,
        "layer_types": ["full_attention" if all_of_it else "sliding_attention" for all_of_it in made.everywhere],
        "rope_theta": made.thetas[1], "rope_local_base_freq": made.thetas[0], "rms_norm_eps": made.eps}}
