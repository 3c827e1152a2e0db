"""Wan's transformer, schedules and solvers against the releases, and against what their documents say of them."""

import math

import pytest
import torch
import torch.nn.functional as F

from golden import Golden, error, names
from model import checkpoint, keys
from model.layers import attention
from model.wan import WanConfig, WanDiT

SMALL = WanConfig(width=48, heads=2, layers=1, ffn=64, time_features=32, text_dim=20, text_len=12)
TABLES = (keys.WAN, keys.WAN_DIFFUSERS, keys.WAN_REPACKED)
DIT_CASES = [(case, weights) for case in [*names("wan_dit"), *names("wan_i2v21"), *names("wan_i2v22")]
             for weights in ("weights", "weights_diffusers") if (Golden(case).folder / f"{weights}.safetensors").exists()]


def config_of(said):
    return WanConfig(patch=tuple(said["patch_size"]), latent_channels=said["out_dim"], condition_channels=said["in_dim"] - said["out_dim"],
                     width=said["dim"], heads=said["num_heads"], layers=said["num_layers"], ffn=said["ffn_dim"],
                     time_features=said["freq_dim"], text_dim=said["text_dim"], text_len=said["text_len"],
                     image_dim=said.get("img_emb in_dim (1280 in the published model)"))


def build(golden, weights="weights", precision="fp32", config=None):
    return checkpoint.build(lambda: WanDiT(config_of(config or golden.config)), golden.folder / f"{weights}.safetensors", *TABLES,
                            name="golden", device="cpu", precision=precision)


def velocity_of(dit, golden):
    inputs = golden.inputs
    context = dit.embed([inputs["context.0"]], list(inputs["clip_fea"]) if "clip_fea" in inputs else None)
    return dit(inputs["x"], inputs["t"], context, inputs.get("y"))


def randomised(config=SMALL):
    """A model whose every tensor counts, also those that start at zero or one."""
    torch.manual_seed(3)
    dit = WanDiT(config).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(0, 0.2)
    return dit


@pytest.mark.parametrize("case, weights", DIT_CASES)
def test_the_velocity_and_the_way_to_it_equal_the_release(case, weights):
    golden = Golden(case)
    dit, seen = build(golden, weights), {}
    hooked = {"block0_self_attn": dit.blocks[0].attn, "block0_cross_attn": dit.blocks[0].cross, "block0": dit.blocks[0],
              "block_last": dit.blocks[-1], "text_embedding": dit.text_out, "img_emb": dit.image_embed}
    for name, module in hooked.items():
        if module is not None:
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
    seen["velocity"] = velocity_of(dit, golden)
    assert seen.keys() == golden.outputs.keys()
    for name, want in golden.outputs.items():
        assert error(seen[name], want) < golden.tolerance["value"], name


def test_both_layouts_and_the_repacked_one_are_one_model(tmp_path):
    golden = Golden("wan_i2v21_a")
    tensors, _ = checkpoint.unpack((golden.folder / "weights.safetensors").read_bytes())
    other, _ = checkpoint.unpack((golden.folder / "weights_diffusers.safetensors").read_bytes())
    checkpoint.save(tmp_path / "repacked.safetensors", {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()})
    # diffusers' files may carry a norm that nothing uses
    checkpoint.save(tmp_path / "added.safetensors", other | {"blocks.0.attn2.norm_added_q.weight": torch.ones(48)})
    models = [build(golden).state_dict()]
    for file in ("repacked", "added"):
        models.append(checkpoint.build(lambda: WanDiT(config_of(golden.config)), tmp_path / f"{file}.safetensors", *TABLES,
                                       name="golden", device="cpu", precision="fp32").state_dict())
    for state in models[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in models[0].items())


@pytest.mark.parametrize("case, weights", DIT_CASES)
def test_bf16_weights_keep_time_modulation_head_and_residual_stream_in_fp32_and_stay_near(case, weights):
    golden = Golden(case)
    dit, streams = build(golden, weights, "bf16"), []
    assert dit.blocks[0].attn.q.weight.dtype == dit.patch_embed.weight.dtype == dit.text_in.weight.dtype == torch.bfloat16
    for module in (dit.time_in, dit.time_out, dit.time_modulation, dit.head.linear, dit.blocks[0].norm_cross):
        assert module.weight.dtype == torch.float32
    for block in dit.blocks:
        block.register_forward_hook(lambda _, inputs, output: streams.append(output.dtype))
    got, want = velocity_of(dit, golden), golden.outputs["velocity"]
    assert set(streams) == {torch.float32} and got.dtype == torch.float32
    assert ((got - want).norm() / want.norm()).item() < 0.03


def test_padded_text_is_one_row_with_the_weight_of_all():
    dit = randomised()
    x, text = torch.randn(1, 7, 48), torch.randn(5, 20)
    context, cross = dit.embed([text]), dit.blocks[0].cross
    got = cross(x, *context.of_block(0))
    rows = torch.cat((text, torch.zeros(1, 20)))[None]
    key, value = cross.keys_values(dit.text_out(F.gelu(dit.text_in(rows), approximate="tanh")))
    bias = torch.tensor([0.0] * 5 + [math.log(12 - 5)])
    q = cross.norm_q(cross.q(x)).unflatten(-1, (2, -1))
    assert error(got, cross.o(attention(q, key, value, bias.view(1, 1, 1, -1)))) < 1e-5


@pytest.mark.parametrize("rows", [0, 13])
def test_a_text_without_rows_or_with_too_many_is_refused(rows):
    with pytest.raises(ValueError, match="1 to 12 rows; got \\[3, " + str(rows)):
        randomised().embed([torch.zeros(3, 20), torch.zeros(rows, 20)])


def test_a_model_gets_image_rows_exactly_when_it_attends_to_them():
    text, image = [torch.zeros(3, 20)], [torch.zeros(4, 8)]
    with pytest.raises(ValueError, match="takes no image rows"):
        randomised().embed(text, image)
    with pytest.raises(ValueError, match="needs an image with each text"):
        randomised(WanConfig(**vars(SMALL) | {"image_dim": 8})).embed(text)


def test_a_batch_of_two_times_equals_each_alone():
    dit = randomised()
    latent, texts, times = torch.randn(2, 16, 2, 4, 6), [torch.randn(4, 20), torch.randn(9, 20)], torch.tensor([997.0, 31.0])
    together = dit(latent, times, dit.embed(texts))
    for place in range(2):
        alone = dit(latent[place:place + 1], times[place:place + 1], dit.embed(texts[place:place + 1]))
        assert error(together[place:place + 1], alone) < 1e-5


def test_norms_have_the_releases_eps_and_gains():
    dit = randomised(WanConfig(**vars(SMALL) | {"image_dim": 8}))
    eps = {name: (m.eps, m.elementwise_affine) for name, m in dit.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert eps == {"blocks.0.norm_attn": (1e-6, False), "blocks.0.norm_ffn": (1e-6, False), "blocks.0.norm_cross": (1e-6, True),
                   "head.norm": (1e-6, False), "image_embed.norm_in": (1e-5, True), "image_embed.norm_out": (1e-5, True)}
