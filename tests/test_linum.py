"""Linum v2's transformer, schedule and guidance against the release, and against what its documents say of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, error, names
from one_stream import solved

from dailies.kernels import processor
from dailies.model import checkpoint
from dailies.model.catalog import LINUM_V2_720P
from dailies.model.guidance import AdaptiveProjectedGuidance
from dailies.model.layers import rotary_table, rotate
from dailies.model.linum import keys as linum_keys
from dailies.model.linum.transformer import LinumConfig, LinumDiT
from dailies.model.samplers import euler
from dailies.model.schedules import flow_match_sigmas

SMALL = LinumConfig(width=48, heads=2, layers=1, ffn=64, time_features=32, text_dim=20, text_len=12)


def build(golden, precision="fp32"):
    said = golden.config
    config = LinumConfig(patch=tuple(said["patch_size"]), latent_channels=said["in_dim"], width=said["dim"],
                         heads=said["num_heads"], layers=said["num_layers"], ffn=said["ffn_dim"],
                         time_features=said["freq_dim"], text_dim=said["text_dim"], text_len=said["text_len"])
    return checkpoint.build(lambda: LinumDiT(config), golden.folder / "weights.safetensors", linum_keys.LINUM,
                            name="golden",
                            device="cpu", precision=precision)


def randomised(config=SMALL):
    """A model whose every tensor counts, also those that start at zero or one."""
    torch.manual_seed(3)
    dit = LinumDiT(config).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(0, 0.2)
    return dit


def texts(golden):
    return [tensor for name, tensor in sorted(golden.inputs.items()) if name.startswith("text_input")]


@pytest.mark.parametrize("case", names("linum_dit"))
def test_the_velocity_and_the_way_to_it_equal_the_release(case):
    golden = Golden(case)
    dit, seen = build(golden), {}
    block = dit.blocks[0]
    modules = {"block0_self_attn": block.attn.o, "block0_cross_attn": block.cross.o, "block0": block,
               "block_last": dit.blocks[-1], "head": dit.head, "time_projection": dit.time_modulation,
               "time_embedding": dit.time_out, "text_embedding": dit.text_out, "patch_embedding": dit.patch_embed}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
    seen["velocity"] = dit(golden.inputs["x"], golden.inputs["t"], dit.embed_text(texts(golden)))
    assert seen.keys() == golden.outputs.keys()
    for name, want in golden.outputs.items():
        assert error(seen[name], want) < golden.tolerance["value"], name


@pytest.mark.cpu
@pytest.mark.parametrize("case", names("linum_dit"))
def test_bf16_weights_keep_gains_and_residual_stream_in_fp32_and_stay_near(case):
    golden = Golden(case)
    dit, streams = build(golden, "bf16"), []
    assert dit.blocks[0].attn.q.weight.dtype == dit.patch_embed.weight.dtype == processor.dtype_of("bf16", "cpu")
    for gain in (dit.blocks[0].modulation, dit.blocks[0].norm_attn.weight, dit.latent_scale):
        assert gain.dtype == torch.float32
    for block in dit.blocks:
        block.register_forward_hook(lambda _, inputs, output: streams.append(output.dtype))
    got, want = dit(golden.inputs["x"], golden.inputs["t"], dit.embed_text(texts(golden))), golden.outputs["velocity"]
    assert set(streams) == {torch.float32} and got.dtype == torch.float32
    assert ((got - want).norm() / want.norm()).item() < 0.03


def test_padded_text_is_a_sink_of_weight_zero_rows_and_value_zero():
    dit = randomised()
    x, text = torch.randn(1, 7, 48), torch.randn(5, 20)
    context, cross = dit.embed_text([text]), dit.blocks[0].cross
    got = cross.o(cross(x, context.keys[0], context.values[0]))
    key, value = cross.keys_values(dit.text_out(F.gelu(dit.text_in(text[None]), approximate="tanh")))
    query = cross.norm_q(cross.q(x)).unflatten(-1, (2, -1))
    logits = torch.einsum("bnhd,blhd->bhnl", query, key).double() / math.sqrt(24)
    weights = logits.exp() / (logits.exp().sum(-1, keepdim=True) + 12 - 5)
    want = cross.o(torch.einsum("bhnl,blhd->bnhd", weights, value.double()).flatten(2).float())
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("rows", [0, 13])
def test_a_text_without_rows_or_with_too_many_is_refused(rows):
    with pytest.raises(ValueError, match="1 to 12 rows; got \\[3, " + str(rows)):
        randomised().embed_text([torch.zeros(3, 20), torch.zeros(rows, 20)])


def test_odd_sides_are_padded_with_zeros_that_take_part_and_cut_off_again():
    dit = randomised()
    latent, text = torch.randn(1, 16, 2, 45, 3), dit.embed_text([torch.randn(4, 20)])
    tokens, _ = dit.patchify(latent)
    assert tokens.shape == (1, 2 * 23 * 2, 48)
    velocity = dit(latent, torch.tensor([500.0]), text)
    assert velocity.shape == latent.shape
    padded = dit(F.pad(latent, (0, 1, 0, 1)), torch.tensor([500.0]), text)
    assert torch.equal(velocity, padded[..., :45, :3])


def test_the_heads_numbers_are_laid_out_channel_last():
    dit = randomised()
    tokens = torch.arange(64.0).expand(1, 4, 64)
    pixels = dit.unpatchify(tokens, torch.Size((1, 16, 1, 4, 4)))
    for row, column, channel in ((0, 0, 0), (0, 1, 5), (1, 0, 9), (3, 2, 15)):
        assert pixels[0, channel, 0, row, column] == ((row % 2) * 2 + column % 2) * 16 + channel


def test_rotation_of_a_128_wide_head_gives_time_44_channels_and_height_and_width_42_each():
    q, k = torch.randn(2, 1, 1, 1, 128).double()
    grid = (5, 6, 7)
    cos, sin = (t.double().reshape(*grid, 1, 64) for t in rotary_table(grid, 128))

    def dot(a, b, channels):
        turned = [rotate(x, (cos[p][None], sin[p][None]))[..., channels] for x, p in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum().item()

    for axis, channels in enumerate((slice(0, 44), slice(44, 86), slice(86, 128))):
        start, step = (1, 1, 1), [0, 0, 0]
        step[axis] = 2
        there = tuple(s + d for s, d in zip(start, step, strict=True))
        for other in (0, 1, 2):                         # moving both along any axis changes nothing
            shift = tuple(int(i == other) for i in range(3))
            moved = [tuple(s + d for s, d in zip(p, shift, strict=True)) for p in (start, there)]
            assert dot(start, there, channels) == pytest.approx(dot(*moved, channels), rel=1e-5)
        assert dot(start, there, channels) != pytest.approx(dot(start, start, channels), rel=1e-3)
        rest = [slice(0, 44), slice(44, 86), slice(86, 128)]
        rest.remove(channels)
        for others in rest:
            assert dot(start, there, others) == pytest.approx(dot(start, start, others), rel=1e-5)


def test_layer_norm_has_the_default_eps():
    assert {m.eps for m in randomised().modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize("case", names("linum_apg"))
def test_projected_guidance_equals_the_release_over_several_steps(case):
    golden = Golden(case)
    said = golden.config
    guide = AdaptiveProjectedGuidance(said["guidance_scale"], momentum=said["momentum"], max_norm=said["rescale"],
                                      parallel=said["eta"])
    for step in range(said["steps"]):
        guided = guide(golden.inputs[f"pred_cond.{step}"], golden.inputs[f"pred_other.{step}"])
        assert error(guided, golden.outputs[f"guided.{step}"]) < golden.tolerance["value"]
        assert error(guide.average, golden.outputs[f"running_average.{step}"]) < golden.tolerance["value"]


def test_projected_guidance_with_all_of_it_off_is_plain_guidance_at_one_more():
    cond, uncond = torch.randn(2, 2, 16, 3, 4, 4)
    guide = AdaptiveProjectedGuidance(7.0, momentum=0.0, max_norm=0.0, parallel=1.0)
    assert error(guide(cond, uncond), cond + 7 * (cond - uncond)) < 1e-6


def test_the_schedule_and_the_steps_equal_the_release():
    golden = Golden("flow_schedule_a")
    for steps in golden.config["steps"]:
        sigmas = flow_match_sigmas(steps, golden.config["shift"])
        assert (sigmas - golden.outputs[f"sigmas.{steps}"]).abs().max() <= golden.tolerance["sigmas"]
        assert (1000 * sigmas[:-1] - golden.outputs[f"timesteps.{steps}"]).abs().max() <= golden.tolerance["timesteps"]
    for steps in (4, 10):
        seen = []

        def velocity(video, sigma, steps=steps, seen=seen):
            seen.append(video)
            return golden.inputs[f"velocity.{steps}.{len(seen) - 1}"]

        end = solved(euler, velocity, golden.inputs[f"x_init.{steps}"], flow_match_sigmas(steps).tolist())
        for step, x in enumerate([*seen[1:], end]):
            assert error(x, golden.outputs[f"x.{steps}.{step}"]) < golden.tolerance["x"]


def test_the_schedule_is_the_documented_one():
    assert flow_match_sigmas(4).tolist() == pytest.approx([1, 0.85769230, 0.60215056, 0.00892857, 0], abs=1e-7)
    fifty = flow_match_sigmas(50).tolist()
    ends = [1, 0.99312437, 0.98605704, 0.97878981, 0.12053271, 0.06690018, 0.00892857, 0]
    assert fifty[:4] + fifty[-4:] == pytest.approx(ends, abs=1e-7)


def published_names():
    """The names in the documents of the release, written out."""
    block = ["modulation", *(f"norm{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")),
             *(f"self_attn.{proj}.{part}" for proj in "qkvo" for part in ("weight", "bias")),
             *(f"cross_attn.{proj}.{part}" for proj in "qo" for part in ("weight", "bias")),
             *(f"cross_attn.{proj}.weight" for proj in "kv"),
             *(f"{attn}.norm_{of}.weight" for attn in ("self_attn", "cross_attn") for of in "qk"),
             *(f"ffn.{i}.{part}" for i in (0, 2) for part in ("weight", "bias"))]
    layers = ("patch_embedding", "head.norm", "head.head", "time_embedding.0", "time_embedding.2", "time_projection.1")
    outside = [*(f"{layer}.{part}" for part in ("weight", "bias") for layer in layers),
               "text_embedding.0.weight", "text_embedding.2.weight", "head.modulation"]
    return {"video_data_scale", "video_data_bias", *(f"model.{name}" for name in outside),
            *(f"model.blocks.{i}.{name}" for i in range(40) for name in block)}


def test_the_full_model_has_the_published_tensors():
    with torch.device("meta"):
        dit = LinumDiT(LINUM_V2_720P.dit_config)
    assert sum(p.numel() for p in dit.parameters()) == 2_008_051_904
    released = {linum_keys.LINUM.released(name): name for name in dit.state_dict()}
    assert released.keys() == published_names() and len(released) == 1177
    assert all(linum_keys.LINUM.ours(name) == ours for name, ours in released.items())
    shapes = {name: tuple(dit.state_dict()[ours].shape) for name, ours in released.items()}
    for name, shape in {"video_data_scale": (16,), "model.patch_embedding.weight": (1664, 16, 1, 2, 2),
                        "model.time_embedding.0.weight": (1664, 256), "model.time_projection.1.weight": (9984, 1664),
                        "model.text_embedding.0.weight": (1664, 4096), "model.blocks.39.modulation": (1, 6, 1664),
                        "model.blocks.0.cross_attn.norm_k.weight": (1664,), "model.blocks.0.ffn.0.weight": (8192, 1664),
                        "model.blocks.0.ffn.2.weight": (1664, 8192), "model.head.modulation": (1, 2, 1664),
                        "model.head.head.weight": (64, 1664)}.items():
        assert shapes[name] == shape
