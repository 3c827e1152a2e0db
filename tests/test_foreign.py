"""The files that people have of a model: each loads, or is told in a sentence what it is and what to do."""

import json
import os

import pytest
import torch
from parts import dit_from
from turbo_tiny import TURBO_TINY, new_tensors
from wan_tiny import WAN_TINY, WAN_TINY_I2V, write_weights

from dailies.model import checkpoint, keys
from dailies.model.files import CheckpointError
from dailies.model.text import new_encoder
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.image_encoder import ClipVision
from dailies.model.wan.transformer import WanDiT
from dailies.model.weights import locate


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    write_weights(folder, WAN_TINY_I2V, "diffusers")
    return folder


def tensors_in(path):
    return checkpoint.unpack(path.read_bytes())[0]


def raw(path, dtype, itemsize, name="blocks.0.ffn.0.weight", **metadata):
    """A file with one tensor of a dtype that torch may not have."""
    header = {"__metadata__": metadata, name: {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, 4 * itemsize]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 * itemsize))
    return path


def refusal(act):
    with pytest.raises(CheckpointError) as caught:
        act()
    return str(caught.value)


def clip_of(path):
    return checkpoint.build(lambda: ClipVision(WAN_TINY_I2V.clip_config), path, wan_keys.CLIP_VISION, name="clip",
                            device="cpu", precision="fp32")


def test_the_image_encoder_of_diffusers_may_bring_its_projection_and_its_text_tower(published, tmp_path):
    tensors = tensors_in(published / "image_encoder/model.safetensors")
    more = {"visual_projection.weight": torch.ones(3, 24), "text_model.final_layer_norm.weight": torch.ones(3),
            "text_projection.weight": torch.ones(3, 3), "logit_scale": torch.ones(())}
    checkpoint.save(tmp_path / "a.safetensors", tensors | more)
    want, got = (clip_of(path).state_dict() for path in (published / "image_encoder/model.safetensors",
                                                         tmp_path / "a.safetensors"))
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert all("Wan" in why or "tower" in why for why in (wan_keys.CLIP_VISION.dropped[name] for name in
                                                          ("visual_projection.", "text_model.", "logit_scale")))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.", "module.", "net."])
@pytest.mark.parametrize("table", [wan_keys.WAN, wan_keys.WAN_DIFFUSERS], ids=lambda table: table.name)
def test_a_transformer_loads_whatever_prefix_a_tool_has_put_before_every_name(prefix, table, tmp_path):
    torch.manual_seed(3)
    dit = WanDiT(WAN_TINY.dit_config)
    state = checkpoint.released_state(dit, table)
    checkpoint.save(tmp_path / "a.safetensors", {prefix + name: tensor for name, tensor in state.items()})
    loaded = dit_from(WAN_TINY, tmp_path / "a.safetensors", "cpu", "fp32")
    assert torch.equal(loaded.blocks[1].cross.k.weight, dit.blocks[1].cross.k.weight)


@pytest.mark.parametrize("names", [lambda name: "net." + name,
                                   lambda name: name.replace("blocks.1.",
                                                             "blocks.1._checkpoint_wrapped_module.").replace(
                                       "blocks.0.", "blocks.0._checkpoint_wrapped_module.")])
@pytest.mark.parametrize("quant", [False, True])
def test_a_turbo_transformer_loads_as_training_leaves_it(names, quant, tmp_path):
    torch.manual_seed(3)
    tensors = new_tensors(TURBO_TINY, quant)
    checkpoint.save(tmp_path / "a.safetensors", {names(name): tensor for name, tensor in tensors.items()})
    dit_from(TURBO_TINY, tmp_path / "a.safetensors", "cpu", "int8" if quant else "fp32")


def umt5_file(folder, change=lambda tensors: tensors):
    encoder = new_encoder("umT5", WAN_TINY.text_encoder_fields)
    encoder.encoder.embed_tokens = encoder.shared
    tensors = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    checkpoint.save(folder / "a.safetensors", change(tensors) or tensors)
    return encoder, folder / "a.safetensors"


def load_umt5(encoder, path):
    checkpoint.load(encoder, path, keys.UMT5, keys.UMT5_WAN, name="umt5", device="cpu")


def test_an_encoder_may_bring_comfyuis_tokenizer_or_the_half_that_writes(tmp_path):
    load_umt5(*umt5_file(tmp_path, lambda tensors: tensors.update(
        {"spiece_model": torch.ones(9, dtype=torch.uint8), "lm_head.weight": torch.ones(3, 3),
         "decoder.final_layer_norm.weight": torch.ones(3),
         "encoder.embed_tokens.weight": tensors["shared.weight"].clone()})))


@pytest.mark.parametrize("twin", [lambda tensor: tensor + 1, lambda tensor: tensor.bfloat16(),
                                  lambda tensor: torch.full_like(tensor, torch.nan)])
def test_two_names_of_one_embedding_with_different_values_are_refused(twin, tmp_path):
    said = refusal(lambda: load_umt5(*umt5_file(tmp_path, lambda tensors: tensors.update(
        {"encoder.embed_tokens.weight": twin(tensors["shared.weight"])}))))
    assert "encoder.embed_tokens.weight" in said and "shared.weight" in said and "two names of one tensor" in said


@pytest.mark.parametrize("dtype, kind", [("F8_E4M3", "fp8"), ("F8_E5M2", "fp8"), ("F8_E8M0", "mxfp"), ("F4", "fp4")])
def test_a_file_of_fewer_bits_is_told_what_it_is_and_what_to_fetch(dtype, kind, tmp_path):
    said = refusal(lambda: checkpoint.stored_tensors(raw(tmp_path / "a.safetensors", dtype, 1)))
    assert f"holds {kind} weights ({dtype}: blocks.0.ffn.0.weight)" in said and "Fetch the bf16 or fp16 file" in said


@pytest.mark.parametrize("extra, said", [
    ("blocks.0.self_attn.q.lora_A.weight", "It is a LoRA"), ("lora_unet_blocks_0_q.lora_down.weight", "It is a LoRA"),
    ("blocks.0.ffn.0.weight.quant_state.bitsandbytes__nf4", "quantised by bitsandbytes"),
    ("blocks.0.ffn.0.qweight", "quantised by GPTQ or AWQ"), ("scaled_fp8", "quantised for ComfyUI"),
    ("vace_blocks.0.before_proj.weight", "Wan VACE"), ("motion_encoder.dec.weight", "Wan Animate"),
    ("double_blocks.0.img_attn.qkv.weight", "FLUX or HunyuanVideo"), ("model.layers.0.self_attn.q_proj.weight",
                                                                      "a language model"),
    ("first_stage_model.conv1.weight", "several models in one file"),
])
def test_a_file_of_another_kind_is_told_which(extra, said, tmp_path):
    state = checkpoint.released_state(WanDiT(WAN_TINY.dit_config), wan_keys.WAN) | {extra: torch.ones(2, 2)}
    checkpoint.save(tmp_path / "a.safetensors", state)
    assert said in refusal(lambda: dit_from(WAN_TINY, tmp_path / "a.safetensors", "cpu"))


def test_a_transformer_of_another_size_is_told_which_one_it_is(tmp_path):
    checkpoint.save(tmp_path / "a.safetensors", {"patch_embedding.weight": torch.ones(3072, 48, 1, 2, 2)})
    assert "By its sizes it is Wan 2.2 TI2V 5B" in refusal(lambda: dit_from(WAN_TINY, tmp_path / "a.safetensors",
                                                                            "cpu"))


def test_a_gguf_file_is_told_what_it_is(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    assert "is a GGUF file" in refusal(lambda: checkpoint.stored_tensors(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name, said", [
    ("split_files/diffusion_models/wan2.1_t2v_1.3B_bf16.safetensors", "dailies convert FILE --model wan-tiny"),
    ("transformer/diffusion_pytorch_model.fp16.safetensors", "dailies convert FILE --model wan-tiny"),
    ("wan2.1-t2v-14b-Q4_K_M.gguf", "fetch the .safetensors files"), ("Wan2.1_VAE.pth", "Convert once")])
def test_a_folder_with_files_by_other_names_is_told_how_to_use_them(name, said, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    message = refusal(lambda: locate(tmp_path, WAN_TINY))
    assert name in message and said in message


def test_looking_at_a_folder_that_may_be_anything_ends(tmp_path):
    deep = tmp_path
    for _ in range(40):
        deep = deep / "a"
    deep.mkdir(parents=True)
    (deep / "model.pth").touch()
    (tmp_path / "all").symlink_to("/")
    os.mkfifo(tmp_path / "pipe.pth")
    message = refusal(lambda: locate(tmp_path, WAN_TINY))
    assert "lacks diffusion_pytorch_model.safetensors" in message and ".pth" not in message
