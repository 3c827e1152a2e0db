"""Random small models and schedules against diffusers, another implementation; what differs by design is asserted."""

import random

import pytest
import torch
from golden import error
from one_stream import solved
from parity import randomise, with_weights_of

from dailies.model import checkpoint
from dailies.model.catalog import WAN21_T2V_1_3B
from dailies.model.convolution import channels_last
from dailies.model.samplers import dpm_solver, unipc
from dailies.model.schedules import wan_sigmas, whole_timestep
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.transformer import WanConfig, WanDiT
from dailies.model.wan.vae import WanVAE, WanVAEConfig

diffusers = pytest.importorskip("diffusers")
SEEDS = range(20)


def ours(make, theirs, folder):
    return with_weights_of(theirs, make, folder, wan_keys.WAN, wan_keys.WAN_DIFFUSERS, wan_keys.WAN_VAE,
                           wan_keys.WAN_VAE_DIFFUSERS)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_transformer_gives_the_velocity_of_diffusers(seed, tmp_path):
    pick = random.Random(seed)
    heads, head_dim, image = pick.choice([1, 2, 3]), pick.choice([12, 24, 32, 64]), pick.random() < 0.4
    width = heads * head_dim
    text_len = pick.choice([8, 20, 512]) if not image else 512         # 512 is built into diffusers' split
    condition = 20 if image or pick.random() < 0.3 else 0
    config = WanConfig(width=width, heads=heads, layers=pick.choice([1, 2, 3]), ffn=pick.choice([32, 80]),
                       text_dim=pick.choice([16, 40]),
                       time_features=pick.choice([32, 256]), text_len=text_len, condition_channels=condition,
                       image_dim=pick.choice([16, 24]) if image else None)
    theirs = randomise(diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=16 + condition, out_channels=16,
        text_dim=config.text_dim,
        freq_dim=config.time_features, ffn_dim=config.ffn, num_layers=config.layers, image_dim=config.image_dim,
        added_kv_proj_dim=width if image else None), seed)
    dit = ours(lambda: WanDiT(config), theirs, tmp_path)
    shape = (1, 16, pick.choice([1, 2, 5]), 2 * pick.choice([1, 2, 3]), 2 * pick.choice([1, 3, 4]))
    latent, text = torch.randn(shape), torch.randn(pick.randint(1, text_len), config.text_dim)
    y = torch.randn(1, condition, *shape[2:]) if condition else None
    rows = [torch.randn(257, config.image_dim)] if image else None
    timestep = torch.tensor([pick.randint(0, 999)])
    padded = torch.nn.functional.pad(text, (0, 0, 0, text_len - len(text)))[None]
    want = theirs(hidden_states=latent if y is None else torch.cat((latent, y), 1), timestep=timestep,
                  encoder_hidden_states=padded,
                  encoder_hidden_states_image=rows[0][None] if image else None, return_dict=False)[0]
    assert error(dit(latent, timestep, dit.embed([text], rows), y), want) < 1e-4


def vae_pair(seed, folder):
    """Every other one of ours is loaded from the original key layout."""
    pick = random.Random(seed)
    width = pick.choice([4, 6, 8])                      # norms over 2 make rounding large: 1e-4 in diffusers itself
    theirs = randomise(diffusers.AutoencoderKLWan(base_dim=width, z_dim=16), seed)
    vae = ours(lambda: WanVAE(WanVAEConfig(width=width)), theirs, folder)
    if seed % 2:
        checkpoint.save(folder / "original.safetensors", checkpoint.released_state(vae, wan_keys.WAN_VAE))
        vae = checkpoint.build(lambda: WanVAE(WanVAEConfig(width=width)), folder / "original.safetensors",
                               wan_keys.WAN_VAE,
                               name="parity", device="cpu", precision="fp32")
    return pick, theirs, channels_last(vae) if pick.random() < 0.5 else vae


@pytest.mark.parametrize("seed", SEEDS)
def test_the_vae_encodes_and_decodes_as_diffusers(seed, tmp_path):
    pick, theirs, vae = vae_pair(seed, tmp_path)
    steps, height, width = pick.randint(1, 4), pick.randint(1, 4), pick.randint(1, 4)
    cut = dict(chunk=pick.choice([None, 1, 2]), rows=pick.choice([None, 1, 2]))
    latent, video = torch.randn(1, 16, steps, height, width), torch.randn(1, 3, 4 * steps - 3, 8 * height, 8 * width)
    want = theirs.decode(latent, return_dict=False)[0]
    assert error(vae.decode(latent, **cut).clamp(-1, 1), want) < 1e-4       # theirs cuts off inside
    mean, log_variance = vae.encode(video, **cut)
    posterior = theirs.encode(video, return_dict=False)[0]
    assert error(mean, posterior.mean) < 1e-4
    assert error(log_variance.clamp(-30, 20), posterior.logvar) < 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_bands_are_exact_and_the_tiles_of_diffusers_are_not(seed, tmp_path):
    """By design. A tile of theirs that nothing was blended into is what we make of its part of the clip alone."""
    pick, theirs, vae = vae_pair(seed, tmp_path)
    steps, height, width = pick.randint(1, 2), pick.randint(5, 8), pick.randint(5, 8)
    tile = pick.choice([2, 3, 4])                       # a side, in latent cells
    stride, rows = pick.randint(1, tile), pick.randint(1, height)
    latent, video = torch.randn(1, 16, steps, height, width), torch.randn(1, 3, 4 * steps - 3, 8 * height, 8 * width)
    pixels, mean = theirs.decode(latent, return_dict=False)[0], theirs.encode(video, return_dict=False)[0].mean
    assert error(vae.decode(latent, rows=rows).clamp(-1, 1), pixels) < 1e-4
    assert error(vae.encode(video, rows=rows)[0], mean) < 1e-4
    theirs.enable_tiling(tile_sample_min_height=8 * tile, tile_sample_min_width=8 * tile,
                         tile_sample_stride_height=8 * stride, tile_sample_stride_width=8 * stride)
    tiled = theirs.decode(latent, return_dict=False)[0], theirs.encode(video, return_dict=False)[0].mean
    assert error(tiled[0], pixels) > 1e-2 and error(tiled[1], mean) > 1e-2
    corner = vae.decode(latent[..., :tile, :tile]).clamp(-1, 1)[..., :8 * stride, :8 * stride]
    assert error(corner, tiled[0][..., :8 * stride, :8 * stride]) < 1e-4
    corner = vae.encode(video[..., :8 * tile, :8 * tile])[0][..., :stride, :stride]
    assert error(corner, tiled[1][..., :stride, :stride]) < 1e-4


def test_the_latents_statistics_are_those_of_diffusers():
    theirs = diffusers.AutoencoderKLWan(base_dim=2).config
    assert tuple(theirs.latents_mean) == WAN21_T2V_1_3B.latent_mean
    assert tuple(theirs.latents_std) == WAN21_T2V_1_3B.latent_std


def velocity_like(matrix, offset):
    return lambda x, timestep: torch.einsum("dc,bcfhw->bdfhw", matrix, x).tanh() + timestep / 1000 * offset


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_solvers_step_as_diffusers(seed, solver):
    """On diffusers' own sigmas: its newer releases place them a little differently (see below)."""
    pick, matrix, offset = random.Random(seed), torch.randn(4, 4), torch.randn(4, 1, 1, 1)
    steps, shift, model = pick.randint(1, 30), pick.choice([1.0, 3.0, 5.0, 8.0, 12.0]), velocity_like(matrix, offset)
    theirs = scheduler(solver, shift)
    theirs.set_timesteps(steps)
    x = start = torch.randn(1, 4, 2, 3, 3)
    at = {}
    for sigma, timestep in zip(theirs.sigmas.tolist(), theirs.timesteps, strict=False):
        at[sigma] = timestep.item()
        x = theirs.step(model(x, timestep.item()), timestep, x, return_dict=False)[0]
    solve = {"unipc": unipc, "dpm++": dpm_solver}[solver]
    got = solved(solve, lambda video, sigma: model(video, at[sigma]), start, theirs.sigmas.tolist())
    assert error(got, x) < 2e-4


def scheduler(solver, shift):
    said = dict(num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if solver == "unipc":
        return diffusers.UniPCMultistepScheduler(solver_order=2, solver_type="bh2", **said)
    return diffusers.DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint",
                                                 **said)


@pytest.mark.parametrize("steps, shift", [(8, 5.0), (40, 12.0), (50, 3.0)])
def test_sigmas_differ_from_newer_diffusers_as_documented(steps, shift):
    """The release takes 0.999 to 0 on its way to shifting, newer diffusers 1 to 0.001; we follow the release."""
    theirs = scheduler("unipc", shift)
    theirs.set_timesteps(steps)
    u = torch.linspace(1, 0.001, steps + 1, dtype=torch.float64)[:-1]
    newer = shift * u / (1 + (shift - 1) * u)
    newer[0] -= 1e-6
    assert (theirs.sigmas[:-1] - newer).abs().max() < 1e-6
    mine = wan_sigmas(steps, shift)
    assert 1e-4 < (mine[:-1] - newer).abs().max() < 0.01
    assert [whole_timestep(s) for s in mine[:-1].tolist()][0] == 999


def test_a_first_timestep_that_comes_twice_skips_no_step():
    """By design: the release finds its place by the timestep, takes the second of two equals, and so skips a step."""
    sigmas = wan_sigmas(120, 12.0)
    timesteps = [whole_timestep(s) for s in sigmas[:-1].tolist()]
    assert timesteps[0] == timesteps[1] == 999
    seen = []
    solved(unipc, lambda video, sigma: seen.append(sigma) or video, torch.randn(3), sigmas.tolist())
    assert seen == sigmas[:-1].tolist()


def test_an_empty_negative_prompt_stays_empty_and_a_missing_one_is_the_releases():
    """By design: the release takes its default for an empty one too, and diffusers has no default."""
    assert WAN21_T2V_1_3B.negative_prompt.startswith("色调艳丽")
    from dailies.pipeline.plan import Defaults
    assert Defaults(negative_prompt="").resolved(WAN21_T2V_1_3B)["negative_prompt"] == ""
    assert Defaults().resolved(WAN21_T2V_1_3B)["negative_prompt"] == WAN21_T2V_1_3B.negative_prompt
