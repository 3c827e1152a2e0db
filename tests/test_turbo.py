"""Refitted transformers: the release's recorded run, INT8 and attention near the plain model, strict files, cards."""

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import Golden, error
from parts import dit_from, dit_of, new_dit
from torch._dynamo.testing import CompileCounterWithBackend
from turbo_tiny import TURBO_TINY, new_tensors
from wan_tiny import WAN_TINY_I2V

from dailies.kernels import processor
from dailies.kernels.int8_linear import dequantize, quantize_blocks
from dailies.model import checkpoint, turbo
from dailies.model.block import TORCH_OPS
from dailies.model.catalog import CATALOG, DEMO
from dailies.model.files import CheckpointError
from dailies.model.fused import Unjoined, gelu_linear
from dailies.model.layers import Linear, rotary_table
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.card import TurboCard
from dailies.model.wan.transformer import WanConfig, WanDiT

TURBO = [name for name, card in CATALOG.items() if isinstance(card, TurboCard)]
IN_ROWS = "INT8 weights with scales per block are scaled per row: a CPU has no fast product of blocks"
CPU_WITHOUT = "INT8 weights are computed with in {}: this CPU has no INT8 products"
IN_FP32 = "computed in fp32 instead of bf16: this CPU has no bf16 products"


def golden_dit(precision="fp32", **changes):
    golden = Golden("turbo_dit_sla_a")
    said = golden.config | changes
    config = WanConfig(width=said["dim"], heads=said["num_heads"], layers=said["num_layers"], ffn=said["ffn_dim"],
                       time_features=said["freq_dim"], text_dim=said["text_dim"], text_len=said["text_len"])
    sparsity = turbo.Sparsity(keep_ratio=said["sla_topk"], block_q=said["BLKQ"], block_k=said["BLKK"], tuned=True)
    return golden, turbo.build(lambda: WanDiT(config), golden.folder / "weights.safetensors", wan_keys.TURBO_WAN,
                               wan_keys.TURBO_WAN_WRAPPED, name="golden", device="cpu", precision=precision,
                               attention="sparse", sparsity=sparsity)


def velocity(golden, dit):
    text = golden.inputs["crossattn_emb"][0, :golden.config["text_valid"]]
    return dit(golden.inputs["x"], golden.inputs["t"][:, 0], dit.embed([text]))


def test_the_released_transformer_with_sparse_attention_is_ours():
    golden, dit = golden_dit()
    seen = {}
    dit.blocks[0].register_forward_hook(lambda _, inputs, output: seen.update(block0=output, patch_embedding=inputs[0]))
    dit.blocks[0].attn.o.register_forward_hook(lambda _, inputs, output: seen.update(block0_self_attn=output))
    seen["velocity"] = velocity(golden, dit)
    for name, got in seen.items():
        assert error(got, golden.outputs[name]) < golden.tolerance["value"], name


@pytest.mark.cpu
@pytest.mark.parametrize("precision, most", [("bf16", 0.02), ("int8", 0.06)])
def test_lower_precisions_stay_near_the_release(precision, most):
    golden, dit = golden_dit(precision)
    got, want = velocity(golden, dit), golden.outputs["velocity"]
    assert ((got - want).norm() / want.norm()).item() < most
    assert dit.head.linear.weight.dtype == torch.float32
    assert dit.blocks[0].attn.proj.weight.dtype == processor.dtype_of(precision, "cpu")


@pytest.mark.parametrize("name", TURBO)
def test_the_quant_files_have_the_published_layers(name):
    """Names, shapes and kinds in the documents of the release, written out; loaded strictly on the meta device."""
    card, config = CATALOG[name], CATALOG[name].dit_config
    width, ffn = config.width, config.ffn
    layers = {f"blocks.{i}.{part}": size for i in range(config.layers) for part, size in {
        **{f"{attn}.{of}": (width, width) for attn in ("self_attn", "cross_attn") for of in "qkvo"},
        "ffn.0": (ffn, width), "ffn.2": (width, ffn)}.items()}
    assert len(layers) == {30: 300, 40: 400}[config.layers]
    with torch.device("meta"):
        dit = new_dit(card)
        turbo.refit(dit, "sparse", card.sparsity)
    released = {wan_keys.TURBO_WAN.released(ours): tensor for ours, tensor in dit.state_dict().items()}
    quantised = {wan_keys.TURBO_WAN.released(f"{place}.weight") for place, _ in turbo.linears_of_blocks(dit)}
    assert quantised == {f"{layer}.weight" for layer in layers}
    projections = [f"blocks.{i}.self_attn.attn_op.local_attn.proj_l" for i in range(config.layers)]
    assert {f"{projection}.{part}" for projection in projections for part in ("weight", "bias")} < released.keys()
    assert None not in released and released[f"{projections[0]}.weight"].shape == (128, 128)
    for layer, (rows, columns) in layers.items():
        with torch.device("meta"):
            quantised = turbo.Int8Linear(columns, rows, scheme="blocks", bias=True).state_dict()
        assert {leaf: tuple(tensor.shape) for leaf, tensor in quantised.items()} == {
            "int8_weight": (rows, columns), "scale": (rows // 128, columns // 128), "bias": (rows,)}
        ours = wan_keys.TURBO_WAN.ours(f"{layer}.weight")
        assert wan_keys.TURBO_WAN.ours(f"{layer}.int8_weight") == ours.replace(".weight", ".int8_weight")


def saved(tmp_path, tensors):
    checkpoint.save(tmp_path / "dit.safetensors", tensors)
    return tmp_path / "dit.safetensors"


def test_plain_quant_and_training_names_load_strictly(tmp_path):
    torch.manual_seed(0)
    plain = new_tensors(TURBO_TINY)
    want = dit_from(TURBO_TINY, saved(tmp_path, plain), "cpu", "fp32").state_dict()
    assert want["patch_embed.weight"].shape == (64, 16, 1, 2, 2)
    assert torch.equal(want["patch_embed.weight"].flatten(1), plain["patch_embedding.weight"].float())
    in_training = saved(tmp_path, {f"net.{name}": tensor for name, tensor in plain.items()})
    trained = dit_from(TURBO_TINY, in_training, "cpu", "fp32").state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in want.items())
    quant = new_tensors(TURBO_TINY, quant=True)
    projection = "blocks.0.self_attn.attn_op.local_attn.proj_l.bias"
    for damage, said in [({"blocks.1.ffn.0.scale": None}, "1 tensor missing: blocks.1.ffn.0.scale"),
                         ({"blocks.1.ffn.0.weight": torch.ones(64, 64)}, "1 tensor unexpected: blocks.1.ffn.0.weight"),
                         ({"blocks.1.ffn.0.scale": torch.ones(2, 2)}, r"ffn.0.scale must be \[1, 1\], got \[2, 2\]"),
                         ({"blocks.0.self_attn.q.int8_weight": torch.ones(64, 64)}, "1 tensor that must be int8"),
                         ({projection: None}, f"1 tensor missing: {projection}")]:
        broken = {name: tensor for name, tensor in (quant | damage).items() if tensor is not None}
        with pytest.raises(CheckpointError, match=said):
            dit_from(TURBO_TINY, saved(tmp_path, broken), "meta", "int8")
    for precision in ("fp32", "bf16"):
        with pytest.raises(CheckpointError, match="holds INT8 layers, which cannot be made .* Say --precision int8"):
            dit_from(TURBO_TINY, saved(tmp_path, quant), "meta", precision)


@pytest.mark.cpu
def test_int8_layers_of_a_file_keep_their_values_as_this_processor_runs_them():
    torch.manual_seed(0)
    layer = Linear(300, 200)
    blocks = turbo.Int8Linear(300, 200, scheme="blocks", bias=True)
    blocks.int8_weight, blocks.scale = quantize_blocks(layer.weight.detach())
    blocks.bias.data.copy_(layer.bias)
    values = dequantize(blocks.quantized)
    x = torch.randn(2, 9, 300)
    low = processor.dtype_of("int8", "cpu")
    runs = turbo.settled("blocks.0.ffn_in", blocks)
    assert ((runs(x).float() - layer(x)).norm() / layer(x).norm()).item() < 0.03 and runs(x).dtype == low
    if processor.has_int8_products():
        assert isinstance(runs, turbo.PackedInt8Linear) and not list(runs.buffers())   # one packed copy, and no other
    else:
        assert isinstance(runs, Linear) and torch.equal(runs.weight, values.to(low))


@pytest.mark.parametrize("int8, bf16, scheme, said", [
    (True, True, "rows", ()), (True, True, "blocks", (IN_ROWS,)), (True, False, "rows", (IN_FP32,)),
    (False, True, "rows", (CPU_WITHOUT.format("bf16"),)), (False, False, "rows", (CPU_WITHOUT.format("fp32"), IN_FP32)),
    (False, False, "blocks", (CPU_WITHOUT.format("fp32"), IN_FP32))])
def test_what_runs_instead_is_said(int8, bf16, scheme, said, monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "has_int8_products", lambda: int8)
    monkeypatch.setattr(processor, "has_bf16_products", lambda: bf16)
    scale = torch.ones(3) if scheme == "rows" else torch.ones(1, 1)
    file = saved(tmp_path, {"a.int8_weight": torch.ones(3, 3, dtype=torch.int8), "a.scale": scale})
    stored = checkpoint.stored_tensors(file)
    assert turbo.fallbacks(stored, "cpu", "int8") == said
    assert turbo.fallbacks(stored, "cpu", "bf16") == (() if bf16 else (IN_FP32,))
    assert turbo.fallbacks(stored, "cuda", "int8") == turbo.fallbacks(stored, "cpu", "fp32") == ()


def demo_velocity(precision, attention, **changes):
    card = replace(DEMO, **changes)
    dit = dit_of(card, card.folder, "cpu", precision, attention)
    torch.manual_seed(3)
    latent, rows = torch.randn(2, 16, 5, 8, 8), [torch.randn(7, 128), torch.randn(1, 128)]
    with torch.inference_mode():
        return dit(latent, torch.tensor([700.0, 300.0]), dit.embed_text(rows))


@pytest.mark.parametrize("precision, attention, most", [
    ("bf16", "dense", 0.02), ("int8", "dense", 0.04), ("fp32", "sage", 0.02), ("bf16", "sage", 0.03),
    ("fp32", "sparse", 1e-5), ("int8", "sparse", 0.04)])
def test_a_refitted_demo_model_stays_near_itself(precision, attention, most):
    """Sparse attention keeps every block here, so that it must be dense."""
    want = demo_velocity("fp32", "dense")
    got = demo_velocity(precision, attention, keep_ratio=1.0)
    assert ((got - want).norm() / want.norm()).item() < most


def test_keeping_fewer_blocks_changes_what_is_seen():
    want, got = demo_velocity("fp32", "dense"), demo_velocity("fp32", "sparse")
    assert 0.001 < ((got - want).norm() / want.norm()).item() < 1


def test_in_fp32_with_dense_attention_nothing_is_refitted():
    dit = dit_of(DEMO, DEMO.folder, "cpu", "fp32")
    assert not any(isinstance(module, turbo.Int8Linear) for module in dit.modules())
    assert all(module.ops is TORCH_OPS for module in (dit.head, *dit.blocks, dit.blocks[0].attn, dit.blocks[0].cross))


def test_a_clip_of_a_batch_is_the_clip_alone():
    """Rows of INT8 are scaled per token, blocks of attention end with their clip."""
    dit = dit_of(DEMO, DEMO.folder, "cpu", "int8", "sparse")
    torch.manual_seed(4)
    latent, rows = torch.randn(2, 16, 3, 8, 8), [torch.randn(7, 128), torch.randn(7, 128)]
    time = torch.tensor([700.0, 700.0])
    both = dit(latent, time, dit.embed_text(rows))
    alone = dit(latent[1:], time[1:], dit.embed_text(rows[1:]))
    assert ((both[1:] - alone).norm() / alone.norm()).item() < 0.02    # and so samplers give it one by one


@pytest.mark.parametrize("precision, most", [("fp32", 1e-5), ("int8", 0.03)])
def test_a_refitted_model_attends_to_the_image_too(precision, most):
    torch.manual_seed(0)
    dit = new_dit(WAN_TINY_I2V).requires_grad_(False).eval()
    for name, parameter in dit.named_parameters():
        parameter.data.normal_(0, 0.15).add_(1.0 if "norm" in name and not name.endswith("bias") else 0.0)
    latent, condition = torch.randn(2, 16, 2, 8, 8), torch.randn(2, 20, 2, 8, 8)
    time, texts = torch.tensor([700.0, 300.0]), [torch.randn(5, 32), torch.randn(9, 32)]
    images = [torch.randn(17, 24), torch.randn(17, 24)]

    def velocity(images):
        return dit(latent, time, dit.embed(texts, images), condition)

    want, other = velocity(images), velocity(images[::-1])
    turbo.refit(dit, "dense", WAN_TINY_I2V.sparsity, packed=turbo.runs_packed(precision, "cpu"))
    for place, layer in turbo.linears_of_blocks(dit) if precision == "int8" else ():
        dit.set_submodule(place, turbo.settled(place, turbo.Int8Linear.of(layer)))
    assert error(velocity(images), want) < most
    assert error(other, want) > 3 * most                # the image is seen


@pytest.mark.parametrize("attention", ["dense", "sage", "sparse"])
def test_a_refitted_block_is_one_graph_to_a_compiler(attention):
    """In INT8 as a GPU runs it: layers that are not packed, kernels that are operators."""
    torch.manual_seed(0)
    dit = new_dit(TURBO_TINY)
    turbo.refit(dit, attention, replace(TURBO_TINY.sparsity, tuned=attention != "dense"))
    dit.requires_grad_(False).eval()
    for place, layer in turbo.linears_of_blocks(dit):
        dit.set_submodule(place, turbo.Int8Linear.of(layer))
    context = dit.embed([torch.randn(5, 32)])
    x, modulation = torch.randn(1, 48, 64), torch.randn(1, 6, 64)
    rope = rotary_table((2, 4, 6), 32)
    want = dit.blocks[0](x, modulation, context.of_block(0), rope)
    got = torch.compile(dit.blocks[0], fullgraph=True, backend="aot_eager")(x, modulation, context.of_block(0), rope)
    assert error(got, want) < 1e-5


def test_compiled_code_is_never_kept_where_others_could_put_theirs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (cache := tmp_path / "dailies").mkdir(mode=0o700)
    for said in (None, f"{tempfile.gettempdir()}/torchinductor_root"):      # the second: torch has said it itself
        monkeypatch.delenv(turbo.CODE_CACHE, raising=False)
        if said:
            monkeypatch.setenv(turbo.CODE_CACHE, said)
        turbo.keep_code_private()
        assert os.environ[turbo.CODE_CACHE] == str(cache / "inductor")
    cache.chmod(0o777)
    for said in (None, f"{tempfile.gettempdir()}/torchinductor_root"):
        monkeypatch.delenv(turbo.CODE_CACHE)
        if said:
            monkeypatch.setenv(turbo.CODE_CACHE, said)
        turbo.keep_code_private()
        place = Path(os.environ[turbo.CODE_CACHE])
        assert place.parent == Path(tempfile.gettempdir()) and not place.name.startswith("torchinductor")
        assert place.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv(turbo.CODE_CACHE, "/of/the/users/choice")
    turbo.keep_code_private()
    assert os.environ[turbo.CODE_CACHE] == "/of/the/users/choice"


def test_code_that_a_killed_compiler_left_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv(turbo.CODE_CACHE, str(tmp_path))
    (below := tmp_path / "ui").mkdir()
    whole = Path(torch._C.__file__).read_bytes()
    kept = {"whole": whole, "of another system": b"no ELF", "under way": b""}
    for name, content in {**kept, "empty": b"", "header": whole[:40], "half": whole[:len(whole) // 2]}.items():
        (path := below / f"{name}.so").write_bytes(content)
        if name != "under way":
            os.utime(path, (0, time.time() - 90))
    turbo.keep_code_private()
    assert {path.stem for path in below.iterdir()} == set(kept)


@pytest.mark.parametrize("precision, attention", [("fp32", "dense"), ("bf16", "sparse"), ("int8", "dense")])
def test_blocks_are_compiled_once_for_each_shape_of_clip(precision, attention):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    dit = dit_of(DEMO, DEMO.folder, "cpu", precision, attention)
    torch.manual_seed(1)
    latent, time, rows = torch.randn(1, 16, 2, 8, 8), torch.tensor([700.0]), [torch.randn(7, 128)]
    context = dit.embed_text(rows)
    with torch.inference_mode():
        want = dit(latent, time, context)
        turbo.compile_blocks(dit, backend=counter)
        assert error(dit(latent, time, context), want) < 1e-5 and counter.frame_count == 1
        dit(latent, time + 100, context)
        assert counter.frame_count == 1
        dit(latent[:, :, :1], time, context)
        assert counter.frame_count == 2
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(dit(latent, time, context), want)


@pytest.mark.parametrize("precision, attention, most", [
    ("fp32", "dense", 1e-5), ("fp32", "sparse", 1e-5), ("int8", "dense", 1e-2)])
@torch.inference_mode()
def test_updates_that_join_late_on_a_gpu_join_as_on_a_cpu(precision, attention, most, triton_device, monkeypatch):
    """Where there is no GPU tensors pretend to be on one, and the kernels run in Triton's interpreter."""
    torch.manual_seed(0)
    dit = new_dit(TURBO_TINY).requires_grad_(False).eval()
    turbo.refit(dit, attention, replace(TURBO_TINY.sparsity, tuned=attention == "sparse"))
    for name, parameter in dit.named_parameters():
        parameter.data.normal_(0, 0.15).add_(1.0 if "norm" in name and not name.endswith("bias") else 0.0)
    for place, layer in turbo.linears_of_blocks(dit) if precision == "int8" else ():
        dit.set_submodule(place, turbo.Int8Linear.of(layer))
    given = torch.randn(2, 16, 2, 8, 8), torch.tensor([700.0, 300.0])
    context = dit.embed([torch.randn(5, 32), torch.randn(9, 32)])
    want, returned = dit(*given, context), []
    for block in dit.blocks:
        block.register_forward_hook(lambda _, inputs, output: returned.append(output))
    if triton_device == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
        got = dit(*given, context)
    else:
        dit.to("cuda")
        context = replace(context, keys=tuple(key.cuda() for key in context.keys),
                          values=tuple(value.cuda() for value in context.values))
        got = dit(*(part.cuda() for part in given), context).cpu()
    assert all(isinstance(output, Unjoined) == (precision == "fp32") for output in returned) and len(returned) == 2
    assert error(got, want) < most


def test_gelu_in_the_product_is_gelu_behind_it(triton_device, monkeypatch):
    torch.manual_seed(0)
    layer, x = Linear(64, 96).bfloat16().requires_grad_(False), torch.randn(2, 5, 64).bfloat16()
    want = torch.nn.functional.gelu(layer(x).float(), approximate="tanh")
    if triton_device == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    got = gelu_linear(x.to(triton_device), layer.to(triton_device), has_gelu_in_product=False)
    assert got.shape == (2, 5, 96) and got.dtype == torch.bfloat16 and error(got.float().cpu(), want) < 0.01


@torch.inference_mode()
def test_more_shapes_of_clip_are_compiled_than_dynamo_allows_by_default():
    from torch._dynamo import config
    torch._dynamo.reset()
    counter, shapes = CompileCounterWithBackend("eager"), config.recompile_limit + 1
    dit = dit_of(DEMO, DEMO.folder, "cpu", "bf16")
    torch.manual_seed(1)
    context, time = dit.embed_text([torch.randn(7, 128)]), torch.tensor([700.0])
    latents = [torch.randn(1, 16, frames, 4, 4) for frames in range(1, shapes + 1)]
    want = [dit(latent, time, context) for latent in latents]
    turbo.compile_blocks(dit, backend=counter)
    for _ in range(2):
        for latent, velocity in zip(latents, want, strict=True):
            assert error(dit(latent, time, context), velocity) < 1e-5
    assert counter.frame_count == shapes == config.recompile_limit + 1          # as others find it
