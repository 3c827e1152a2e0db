"""Speed, applied to a transformer from outside: INT8 linear layers, other self-attention, fused norms.

A refitted model has the layers that it had, computed by the operators of fused.py, or, packed for a CPU, of packed.py;
linum and wan never hear of it. In fp32 with dense attention nothing is refitted: that is the model as it is written,
and what all else is compared to. But LTX-2 asks for it (`always_refitted`): as it is written it takes a tenth longer.

Of a model in int8, the linear layers of its blocks are INT8 and the rest is bf16, as TurboDiffusion publishes it:
patches, text, time, head and the projection of sparse attention stay. On a CPU without such products both are computed
in fp32 (kernels/processor.py). Their names in a file are those of the -quant releases, NAME.int8_weight and NAME.scale;
the scales are per output channel where we quantise, per 128 x 128 tile in the releases.
"""

import atexit
import contextlib
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from dailies.kernels import processor
from dailies.model import checkpoint
from dailies.model.block import use_ops
from dailies.model.card import Sparsity
from dailies.model.checkpoint import StoredTensor
from dailies.model.eight_bits import FP8, Fp8Linear
from dailies.model.files import CheckpointError
from dailies.model.fused import FusedOps, Int8Linear
from dailies.model.keys import KeyTable, table_of
from dailies.model.layers import FullPrecisionLinear, Linear
from dailies.model.offload import LayersInTurn, settled_on_host
from dailies.model.packed import PackedInt8Linear, PackedOps
from dailies.model.private import cache_folder, private_folder

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
CODE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
STILL_WRITTEN_S = 60                                     # of a library that is linked; it takes a second
_SHAPES = 1000                                           # of clips that one process may compile for


def build(make: Callable[[], checkpoint.Model], path: Path, *tables: KeyTable, name: str, device: str, precision: str,
          attention: str, sparsity: Sparsity, resident: int | None = None) -> checkpoint.Model:
    """checkpoint.build, refitted: precision fp32, bf16, int8 or fp8, attention dense, sage or sparse.

    resident: of the blocks, those whose weights stay on the device; the others' are copied there in turn, from host
    memory, by the model's `in_turn` (offload.py). None: all stay.

    A file of INT8 layers is loaded as it is, one of others is quantised layer by layer while it is loaded. In fp8 the
    layers that the file has in FP8 stay so, and the rest is bf16.
    Raises CheckpointError, also for INT8 weights where another precision is wanted.
    """
    stored = checkpoint.stored_tensors(path)
    scheme = scheme_of(stored)
    if scheme and precision != "int8":
        raise CheckpointError(f"{name}: {path} holds INT8 layers, which cannot be made {precision} again. "
                              "Say --precision int8, or name a folder with the weights that are not quantised")

    table = table_of(stored, tables)
    narrow = {table.ours(key) for key, tensor in stored.items() if tensor.dtype == FP8} if precision == "fp8" else ()

    def refitted() -> checkpoint.Model:
        dit = make()
        if precision != "fp32" or attention != "dense" or sparsity.tuned or getattr(dit, "always_refitted", False):
            refit(dit, attention, sparsity, packed=runs_packed(precision, device))
        for place, linear in linears_of_blocks(dit) if precision == "int8" else ():
            sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
            layer = Int8Linear(*sizes, scheme=scheme, bias=bias) if scheme else Unquantized(*sizes, bias=bias)
            dit.set_submodule(place, layer)
        for place, linear in linears_of_blocks(dit):
            if f"{place}.weight" in narrow:
                layer = Fp8Linear(linear.in_features, linear.out_features, bias=linear.bias is not None,
                                  wide=processor.dtype_of(precision, device))
                dit.set_submodule(place, layer)
        return dit

    def built(settle: Callable[[str, nn.Module], nn.Module]) -> checkpoint.Model:
        return checkpoint.build(refitted, path, *tables, name=name, device=device, precision=precision, settle=settle)

    if resident is None:
        return built(settled)
    with torch.device("meta"):
        blocks = name_of_blocks(make())
    dit = built(settled_on_host(settled, blocks, resident))
    dit.in_turn = LayersInTurn(dit.blocks[resident:], device)
    return dit


def scheme_of(stored: Mapping[str, StoredTensor]) -> str | None:
    """How the INT8 layers of a file are scaled, rows or blocks; None where it has none."""
    scales = {len(tensor.shape) for key, tensor in stored.items()
              if key.endswith(".scale") and key.removesuffix("scale") + "int8_weight" in stored}
    return "rows" if scales == {1} else "blocks" if scales else None


def fallbacks(stored: Mapping[str, StoredTensor], device: str, precision: str) -> tuple[str, ...]:
    """What runs instead of what was asked for, known from a file's header and this machine."""
    if precision == "fp32" or not device.startswith("cpu"):
        return ()
    notes = []
    if precision == "int8" and not processor.has_int8_products():
        notes.append(f"INT8 weights are computed with in {NAMES[processor.dtype_of(precision, device)]}: "
                     "this CPU has no INT8 products")
    elif precision == "int8" and scheme_of(stored) == "blocks":
        notes.append("INT8 weights with scales per block are scaled per row: a CPU has no fast product of blocks")
    return *notes, *processor.instead_of_bf16()


def linears_of_blocks(dit: nn.Module) -> list[tuple[str, Linear]]:
    """Those that are quantised, and their names."""
    blocks = name_of_blocks(dit)
    return [(place, module) for place, module in dit.named_modules()
            if place.startswith(f"{blocks}.") and isinstance(module, Linear) and not place.endswith(".attn.proj")]


def name_of_blocks(dit: nn.Module) -> str:
    return next(place for place, module in dit.named_modules() if module is dit.blocks)


def settled(place: str, module: nn.Module) -> nn.Module:
    """What a layer becomes once its weights are there: INT8, in the form that this device can run."""
    if isinstance(module, Unquantized) and not module.weight.is_meta:
        module = Int8Linear.of(module)
    if isinstance(module, Int8Linear) and module.int8_weight.is_cpu:
        if processor.has_int8_products():
            return PackedInt8Linear(module)
        return module.dequantized(processor.dtype_of("int8", "cpu"))
    return module


class Unquantized(FullPrecisionLinear):
    """A layer as its file has it, until it is there and becomes an Int8Linear."""


def refit(dit: nn.Module, attention: str, sparsity: Sparsity, *, packed: bool = False) -> None:
    """Have blocks and head computed by kernels.  packed: their layers are, or will be, PackedInt8Linear."""
    use_ops(dit, (PackedOps if packed else FusedOps)(attention, sparsity))
    for block in dit.blocks if sparsity.tuned else ():
        width = block.attn.q.out_features // block.attn.heads
        block.attn.proj = Linear(width, width)


def runs_packed(precision: str, device: str) -> bool:
    return precision == "int8" and device.startswith("cpu") and processor.has_int8_products()


def compile_blocks(dit: nn.Module, backend: str = "inductor") -> None:
    """Compile what the blocks have in common, once for each shape of clip; for other shapes as they come.

    The blocks and not the whole, since equal blocks share what is compiled: a shape costs one block's compilation.
    """
    keep_code_private()
    for block in dit.blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    # by default a ninth shape is an error
    limits = torch._dynamo.config.patch(recompile_limit=_SHAPES, accumulated_recompile_limit=_SHAPES)
    dit.forward = limits(dit.forward)


def keep_code_private() -> None:
    """Compiled code is kept in the user's cache, or for this process alone where there is none that is private.

    torch's own place is a name below /tmp that anybody can take first, and the code that lies there is run. torch puts
    that name into the environment itself, as soon as its compiler is imported: then nobody has chosen it.
    """
    said = os.environ.get(CODE_CACHE, "")
    if not said or said.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_")):
        try:
            place = private_folder(cache_folder() / "inductor", below=cache_folder())
        except OSError:
            place = Path(tempfile.mkdtemp(prefix="dailies-code-"))
            atexit.register(shutil.rmtree, place, ignore_errors=True)
        os.environ[CODE_CACHE] = str(place)
    remove_torn_code(Path(os.environ[CODE_CACHE]))


def remove_torn_code(place: Path) -> None:
    """Compiled code whose writing was cut off: a compiler that is killed leaves it, and torch would load it for ever
    after ("file too short"). What was written just now may be under way and stays.
    """
    for path in place.rglob("*.so"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STILL_WRITTEN_S and is_torn(path):
                path.unlink()


def is_torn(library: Path) -> bool:
    """Whether it is empty, or an ELF file that ends before its table of sections does.  Raises OSError."""
    with library.open("rb") as file:
        header = file.read(64)
    if header[:4] != b"\x7fELF":
        return not header
    if len(header) < 64:
        return True
    (table,), (size, count) = struct.unpack_from("<Q", header, 0x28), struct.unpack_from("<HH", header, 0x3A)
    return library.stat().st_size < table + size * count
