"""Wan's transformer, schedules and solvers against the releases, and against what their documents say of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, error, names
from one_stream import solved

from dailies.kernels import processor
from dailies.model import checkpoint
from dailies.model.layers import attention
from dailies.model.samplers import dpm_solver, euler, unipc
from dailies.model.schedules import wan_sigmas, whole_timestep
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.transformer import WanConfig, WanDiT

SOLVERS = {"unipc": unipc, "dpm++": dpm_solver}
SMALL = WanConfig(width=48, heads=2, layers=1, ffn=64, time_features=32, text_dim=20, text_len=12)
TABLES = (wan_keys.WAN, wan_keys.WAN_DIFFUSERS)
DIT_CASES = [(case, weights) for case in [*names("wan_dit"), *names("wan_i2v21"), *names("wan_i2v22")]
             for weights in ("weights", "weights_diffusers")
             if (Golden(case).folder / f"{weights}.safetensors").exists()]


def config_of(said):
    return WanConfig(patch=tuple(said["patch_size"]), latent_channels=said["out_dim"],
                     condition_channels=said["in_dim"] - said["out_dim"],
                     width=said["dim"], heads=said["num_heads"], layers=said["num_layers"], ffn=said["ffn_dim"],
                     time_features=said["freq_dim"], text_dim=said["text_dim"], text_len=said["text_len"],
                     image_dim=said.get("img_emb in_dim (1280 in the published model)"))


def build(golden, weights="weights", precision="fp32", config=None):
    path = golden.folder / f"{weights}.safetensors"
    return checkpoint.build(lambda: WanDiT(config_of(config or golden.config)), path,
                            *TABLES, name="golden", device="cpu", precision=precision)


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
    hooked = {"block0_self_attn": dit.blocks[0].attn.o, "block0_cross_attn": dit.blocks[0].cross.o,
              "block0": dit.blocks[0], "block_last": dit.blocks[-1],
              "text_embedding": dit.text_out, "img_emb": dit.image_embed}
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
    checkpoint.save(tmp_path / "repacked.safetensors",
                    {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()})
    # diffusers' files may carry a norm that nothing uses
    checkpoint.save(tmp_path / "added.safetensors", other | {"blocks.0.attn2.norm_added_q.weight": torch.ones(48)})
    models = [build(golden).state_dict()]
    for file in ("repacked", "added"):
        models.append(checkpoint.build(lambda: WanDiT(config_of(golden.config)), tmp_path / f"{file}.safetensors",
                                       *TABLES, name="golden", device="cpu", precision="fp32").state_dict())
    for state in models[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in models[0].items())


@pytest.mark.parametrize("case, weights", DIT_CASES)
def test_bf16_weights_keep_time_modulation_head_and_residual_stream_in_fp32_and_stay_near(case, weights):
    golden = Golden(case)
    dit, streams = build(golden, weights, "bf16"), []
    for layer in (dit.blocks[0].attn.q, dit.patch_embed, dit.text_in):
        assert layer.weight.dtype == processor.dtype_of("bf16", "cpu")
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
    got = cross.o(cross(x, *context.of_block(0)))
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
    latent, texts = torch.randn(2, 16, 2, 4, 6), [torch.randn(4, 20), torch.randn(9, 20)]
    times = torch.tensor([997.0, 31.0])
    together = dit(latent, times, dit.embed(texts))
    for place in range(2):
        alone = dit(latent[place:place + 1], times[place:place + 1], dit.embed(texts[place:place + 1]))
        assert error(together[place:place + 1], alone) < 1e-5


def test_norms_have_the_releases_eps_and_gains():
    dit = randomised(WanConfig(**vars(SMALL) | {"image_dim": 8}))
    eps = {name: (m.eps, m.elementwise_affine) for name, m in dit.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert eps == {"blocks.0.norm_attn": (1e-6, False), "blocks.0.norm_ffn": (1e-6, False),
                   "blocks.0.norm_cross": (1e-6, True), "head.norm": (1e-6, False), "image_embed.norm_in": (1e-5, True),
                   "image_embed.norm_out": (1e-5, True)}


@pytest.mark.parametrize("solver", SOLVERS)
def test_sigmas_and_whole_timesteps_equal_the_release(solver):
    golden, checked = Golden("wan_schedule_a"), 0
    for shift in golden.config["shifts"]:
        for steps in golden.config["steps"]:
            sigmas, name = wan_sigmas(steps, shift, solver), f"{solver}.shift{shift:g}.steps{steps}"
            assert (sigmas - golden.outputs[f"sigmas.{name}"]).abs().max() <= golden.tolerance["sigmas"]
            timesteps = [whole_timestep(sigma) for sigma in sigmas[:-1].tolist()]
            assert timesteps == golden.outputs[f"timesteps.{name}"].tolist()
            checked += 1
    assert checked == 16


@pytest.mark.parametrize("solver, shift, steps", [tuple(run) for run in Golden("wan_schedule_a").config["runs"]])
def test_every_step_of_a_run_equals_the_release(solver, shift, steps):
    golden, seen = Golden("wan_schedule_a"), []

    def velocity(video, sigma):
        seen.append(video)
        mixed = torch.einsum("dc,bcfhw->bdfhw", golden.inputs["A"], video)
        return mixed + whole_timestep(sigma) / 1000 * golden.inputs["b"].view(1, -1, 1, 1, 1)

    end = solved(SOLVERS[solver], velocity, golden.inputs["x_init"], wan_sigmas(steps, shift, solver).tolist())
    assert len(seen) == steps
    for step, x in enumerate([*seen[1:], end]):
        assert error(x, golden.outputs[f"x.{solver}.shift{shift:g}.steps{steps}.{step}"]) < golden.tolerance["x"]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_constant_velocity_is_followed_exactly_in_any_number_of_steps(solver, steps):
    """The path is a straight line, and both solvers know it; the last step returns the clean prediction itself."""
    start, noise = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    end = solved(SOLVERS[solver], lambda video, sigma: noise, start, wan_sigmas(steps, 5.0, solver).tolist())
    assert error(end, start - wan_sigmas(steps, 5.0, solver)[0] * noise) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_solvers_are_of_second_order(solver):
    """Halving the steps' length quarters the error, where Euler's is halved."""
    def velocity(video, sigma):
        return 3 * video.cos() * sigma

    start = torch.linspace(-1, 1, 9, dtype=torch.float64)

    def run(solve, steps):
        # away from sigma 0, where the last step is of first order whatever the count
        sigmas = torch.linspace(0.9, 0.4, steps + 1, dtype=torch.float64).tolist()
        return solved(solve, velocity, start, sigmas)

    truth = run(euler, 50_000)
    errors = [(run(SOLVERS[solver], steps) - truth).abs().max().item() for steps in (40, 80, 160)]
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3


def test_two_streams_are_solved_as_one():
    a, b = torch.randn(2, 5)
    sigmas = wan_sigmas(6, 5.0).tolist()
    both, = unipc(lambda clips, sigma: [{name: x.sin() for name, x in clip.items()} for clip in clips],
                  [{"video": a, "audio": b}], sigmas)
    alone = [solved(unipc, lambda video, sigma: video.sin(), x, sigmas) for x in (a, b)]
    assert torch.equal(both["video"], alone[0]) and torch.equal(both["audio"], alone[1])


def test_a_schedule_needs_a_step_and_a_known_solver():
    with pytest.raises(ValueError, match="at least 1; got 0"):
        wan_sigmas(0, 5.0)
    with pytest.raises(ValueError, match="unipc or dpm\\+\\+; got 'heun'"):
        wan_sigmas(4, 5.0, "heun")


def test_timesteps_at_the_defaults_are_the_documented_ones():
    """What decides which expert runs: 26 of 40 steps at shift 12, 15 of 40 at shift 5."""
    for shift, boundary, high in ((12.0, 875, 26), (5.0, 900, 15)):
        timesteps = [whole_timestep(sigma) for sigma in wan_sigmas(40, shift)[:-1].tolist()]
        assert timesteps[0] == 999 and sum(t >= boundary for t in timesteps) == high
