"""Weights from safetensors files into models: headers checked before memory is spent, names matched strictly both ways.

Also the byte form in which tensors are kept between stages (`pack`, `unpack`).
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dailies.kernels import processor
from dailies.model import foreign
from dailies.model.eight_bits import FP8, FP8_SCALES, scale_name, scaled_weight
from dailies.model.files import INDEX, PICKLES, CheckpointError, first_line, listed, weight_map, weights_file
from dailies.model.keys import KeyTable, table_of
from dailies.model.layers import takes_low_precision

Model = TypeVar("Model", bound=nn.Module)

MAX_HEADER_BYTES = 25_000_000                           # the format allows 100 MB; of the largest model it is under 1
MAX_TENSORS = 200_000
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": FP8,                                     # a weight, which has its scale beside it
}
TWIN_NUMBERS = 2**24                                    # compared at once
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, FP8}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file, as its header describes it."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def build(make: Callable[[], Model], path: Path, *tables: KeyTable, name: str, device: str, precision: str,
          settle: Callable[[str, nn.Module], nn.Module] | None = None) -> Model:
    """The model that `make` describes, with weights from `path`, on `device`, in eval mode without gradients.

    It is described on the meta device, so the weights are the only copy. precision: fp32, or bf16 (or int8, of which
    the rest is bf16) for the linear and convolution weights alone: gains and modulation stay fp32, and with them the
    residual stream. A CPU that has no bf16 products is given fp32 (kernels/processor.py).
    tables: the layouts the file may have. name: of the model, for messages. settle: see load.
    Raises CheckpointError, before any weight is read when names, shapes or dtypes do not fit.
    """
    with torch.device("meta"):
        model = make()
    dtypes, lower = {}, processor.dtype_of(precision, device)
    for prefix, module in model.named_modules():
        for leaf, _ in module.named_parameters(prefix=prefix, recurse=False):
            dtypes[leaf] = lower if takes_low_precision(module) else torch.float32
    load(model, path, *tables, name=name, device=device, dtypes=dtypes, settle=settle)
    return model.requires_grad_(False).eval()


def load(model: nn.Module, path: Path, *tables: KeyTable, name: str, device: str,
         dtypes: Mapping[str, torch.dtype] | torch.dtype = torch.float32,
         settle: Callable[[str, nn.Module], nn.Module] | None = None) -> None:
    """Replace every parameter and buffer of `model` (meta tensors, usually) by what is stored.

    dtypes: one for all floating ones, or by name, fp32 where none is named.
    settle: given a module's name and the module as soon as its own tensors are all there, returns what takes its place:
    so that a model can become smaller while it is loaded.
    Raises CheckpointError for tensors missing, unexpected, or of another shape or kind, and for NaN and infinity.
    """
    stored = stored_tensors(path)
    table = table_of(stored, tables)
    wanted = dict(model.named_parameters()) | dict(model.named_buffers())
    where = f"{name}: {path}"
    found = match(stored, wanted, table, where)
    check_twins(stored, found, table, where)
    check_fp8_values(stored, found, where)
    scales = fp8_scales(stored, found, wanted)
    left = Counter(key.rpartition(".")[0] for key in wanted)
    for key, tensor in views({key: found[key] for key in wanted}):
        dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes.get(key, torch.float32)
        if not wanted[key].is_floating_point():
            dtype = wanted[key].dtype
        if wanted[key].dtype == FP8:
            dtype = FP8
        elif tensor.dtype == FP8:
            tensor = tensor.to(device).float() * scales[key]
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        tensor = tensor.to(device, dtype, copy=True).reshape(wanted[key].shape)
        if not is_finite(tensor):
            raise not_finite(found[key].name, where)
        place(module, leaf, tensor)
        left[owner] -= 1
        if settle is not None and not left[owner] and (settled := settle(owner, module)) is not module:
            model.set_submodule(owner, settled)


def match(stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor], table: KeyTable,
          where: str) -> dict[str, StoredTensor]:
    """Stored tensors by our names.  Raises CheckpointError unless they are exactly the wanted ones."""
    found: dict[str, StoredTensor] = {}
    for released, tensor in stored.items():
        ours = table.ours(released)
        if ours is not None and ours in wanted and not table.drops(released):
            found.setdefault(ours, tensor)              # a tied tensor may be stored under both its names: check_twins
    # the scale of a weight in FP8 is a part of it
    unexpected = [key for key in stored if not table.drops(key) and table.ours(key) not in wanted
                  and not is_fp8_scale(key, stored)]
    missing = [table.released(key) or key for key in wanted if key not in found]       # as the file would call them
    kind = foreign.kind_of(stored, {name: tensor.shape for name, tensor in stored.items()})
    next_step = (f"Is it another model's file?{kind} If the release has changed, name them in {table.name}, keys.py "
                 "below model/")
    if missing:
        also = f", and {count(unexpected)} unexpected: {listed(unexpected)}" if unexpected else ""
        raise CheckpointError(f"{where}: {count(missing)} missing: {listed(missing)}{also}. {next_step}")
    if unexpected:
        raise CheckpointError(f"{where}: {count(unexpected)} unexpected: {listed(unexpected)}. {next_step}")
    def shape(key: str, stored: StoredTensor) -> tuple[int, ...]:
        rows, *others = wanted[key].shape or (1,)
        return (rows, math.prod(others)) if stored.name in table.flat else tuple(wanted[key].shape)

    check_fp8_scales(stored, found, where)
    misshapen = [f"{tensor.name} must be {list(shape(key, tensor))}, got {list(tensor.shape)}"
                 for key, tensor in found.items() if tensor.shape != shape(key, tensor)]
    if misshapen:
        raise CheckpointError(f"{where}: {count(misshapen)} of another shape: {listed(misshapen)}. "
                              f"Is it another model's file?{kind}")
    for sort, kinds, dtypes in (("floating point", _FLOATS - {FP8}, _FLOATS), ("int8", {torch.int8}, {torch.int8}),
                                ("FP8", {FP8}, {FP8})):
        others = [f"{found[key].name} ({found[key].dtype})" for key, tensor in wanted.items()
                  if tensor.dtype in kinds and found[key].dtype not in dtypes]
        if others:
            raise CheckpointError(f"{where}: {count(others)} that must be {sort}: {listed(others)}")
    return found


def is_fp8_scale(name: str, stored: Mapping[str, StoredTensor]) -> bool:
    weight = stored.get(scaled_weight(name) or "")
    return weight is not None and weight.dtype == FP8


def check_fp8_scales(stored: Mapping[str, StoredTensor], found: Mapping[str, StoredTensor], where: str) -> None:
    """Raises CheckpointError where a weight in FP8 that is wanted has scales of another kind."""
    for tensor in found.values():
        for kind in FP8_SCALES if tensor.dtype == FP8 else ():
            scale = stored.get(scale_name(tensor.name, kind) or "")
            if scale is None and kind == FP8_SCALES[0] or scale is not None and (
                    math.prod(scale.shape) != 1 or scale.dtype != torch.float32):
                said = "missing" if scale is None else f"{list(scale.shape)} in {scale.dtype}"
                raise CheckpointError(f"{where}: {scale_name(tensor.name, kind)} must be one number in fp32; it is "
                                      f"{said}. dailies reads FP8 as LTX-2 is published: a scale for each weight")


def check_fp8_values(stored: Mapping[str, StoredTensor], found: Mapping[str, StoredTensor], where: str) -> None:
    """Raises CheckpointError where a scale of a weight in FP8 is no number above 0."""
    scales = {scale: stored[scale] for tensor in found.values() if tensor.dtype == FP8 for kind in FP8_SCALES
              if (scale := scale_name(tensor.name, kind) or "") in stored}
    for name, scale in views(scales):
        value = scale.reshape(()).item()
        if not (math.isfinite(value) and value > 0):
            raise CheckpointError(f"{where}: {name} must be a number above 0, got {value:g}. Fetch it again")


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of it is NaN or infinite; what is on the meta device has none."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype == FP8:                             # which has NaN alone, of either sign, and no minimum of its own
        return not any((part.view(torch.uint8) & 0x7F == 0x7F).any().item()
                       for part in tensor.reshape(-1).split(TWIN_NUMBERS))
    # NaN is the least and the largest of those it is among; no copy is made
    return all(map(math.isfinite, torch.stack(torch.aminmax(tensor)).tolist()))


def not_finite(name: str, where: str) -> CheckpointError:
    return CheckpointError(f"{where}: {name} holds NaN or infinity, so no clip could be right. Fetch it again")


def fp8_scales(stored: Mapping[str, StoredTensor], found: Mapping[str, StoredTensor],
               wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """By our name, what each weight that is widened as it is read is multiplied by."""
    narrow = {key: stored[scale_name(tensor.name) or ""] for key, tensor in found.items()
              if tensor.dtype == FP8 and wanted[key].dtype != FP8}
    return {key: scale.reshape(()).item() for key, scale in views(narrow)}


def check_twins(stored: Mapping[str, StoredTensor], found: Mapping[str, StoredTensor], table: KeyTable,
                where: str) -> None:
    """Raises CheckpointError where a tensor is stored under two names and not the same under both: which is it?"""
    for name, tensor in stored.items():
        ours = table.ours(name)
        twin = found.get(ours) if ours is not None and not table.drops(name) else None
        if twin is None or twin.name == name:
            continue
        same = (twin.dtype, twin.shape) == (tensor.dtype, tensor.shape)
        if same:
            one, other = (stored.reshape(-1).split(TWIN_NUMBERS)
                          for _, stored in views({"one": twin, "other": tensor}))
            # in pieces, and as bytes: NaN is not equal to itself
            same = all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
                       for a, b in zip(one, other, strict=True))
        if not same:
            raise CheckpointError(f"{where}: {twin.name} and {name} are two names of one tensor, and hold different "
                                  f"values. Fetch it again, or keep the one that is right")


def read_tensors(path: Path, names: Iterable[str], *, name: str) -> list[Tensor]:
    """Some tensors of a file by the names they have there, on the CPU.  Raises CheckpointError."""
    stored, names = stored_tensors(path), list(names)
    missing = [key for key in names if key not in stored]
    if missing:
        raise CheckpointError(f"{name}: {path}: {count(missing)} missing: {listed(missing)}")
    found = {key: tensor.clone() for key, tensor in views({key: stored[key] for key in names})}
    return [found[key] for key in names]


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """What a .safetensors file, shards by their index, or a folder with either, says it holds.

    Raises CheckpointError for a file that is missing, of another format, truncated or inconsistent.
    """
    indexes = [path] if path.name.endswith(INDEX) else []
    if not indexes and not path.is_dir():
        return read_header(path)[0]
    indexes = indexes or sorted(path.glob(f"*.safetensors{INDEX}"))
    if not indexes:
        files = sorted(path.glob("*.safetensors"))
        if len(files) == 1:
            return read_header(files[0])[0]
        raise CheckpointError(f"{path} must hold one .safetensors file, or shards and their index; "
                              f"it has {len(files)} and no index" + pickle_advice(path))
    index = weight_map(indexes[0])
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(index.values())):
        for name, tensor in read_header(indexes[0].parent / file)[0].items():
            if index.get(name) != file:
                raise CheckpointError(f"{indexes[0]} does not say that {name} is in {file}; "
                                      "are the shards of two downloads mixed?")
            stored[name] = tensor
    absent = [name for name in index if name not in stored]
    if absent:
        raise CheckpointError(f"{path}: {count(absent)} missing that {indexes[0].name} promises: {listed(absent)}")
    return stored


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file, from its header alone.

    Every size is checked against the file's own before it is believed.  Raises CheckpointError.
    """
    said, num_bytes = header_of(path)
    if not isinstance(said, dict):
        raise not_whole(path, "its header is not a table")
    metadata = said.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise not_whole(path, "its metadata is not text")
    low = {name: entry["dtype"] for name, entry in said.items()
           if isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and entry["dtype"] in foreign.QUANTIZED
           and not (entry["dtype"] == "F8_E4M3" and scale_name(name) in said)}
    lost = next((scale_name(name) for name, kind in low.items() if kind == "F8_E4M3" and len(low) < sum(
        isinstance(entry, dict) and entry.get("dtype") == kind for entry in said.values())), None)
    if lost:
        raise CheckpointError(f"{path}: {lost} is missing, and other weights in FP8 have theirs. Fetch it again")
    if low:
        raise CheckpointError(foreign.quantized(path, low))
    return _announced(path, said, num_bytes), metadata


def not_whole(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file: {why}. Fetch it again")


def header_of(path: Path) -> tuple[Any, int]:
    """What the header says, and the bytes behind it.  Raises CheckpointError."""
    if path.is_dir() or not path.exists():
        raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; a .safetensors file is needed "
                              "there" + pickle_advice(path.parent))
    try:
        with weights_file(path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            header_bytes = int.from_bytes(start, "little")
            fits = len(start) == 8 and header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8)
            if path.suffix in PICKLES or not fits and start[:2] in (b"PK", b"\x80\x02"):
                raise CheckpointError(f"{path} is a pickle, which can run code; only safetensors are read. "
                                      f"Convert once: dailies convert {path} --model NAME --to FOLDER")
            if start[:4] == b"GGUF":
                raise CheckpointError(f"{path} is a GGUF file, quantised for llama.cpp and ComfyUI; only safetensors "
                                      "are read. Fetch the model's .safetensors instead")
            if not fits and header_bytes <= file_bytes - 8:
                raise not_whole(path, f"its header announces {header_bytes:,} bytes, and {MAX_HEADER_BYTES:,} are "
                                      "allowed")
            if not fits:
                raise not_whole(path, f"its {file_bytes} bytes cannot hold the header it announces")
            text = file.read(header_bytes)
            # a table costs hundreds of bytes of memory, an entry of a tensor has one
            if max(text.count(b"{"), text.count(b"[") // 2) > MAX_TENSORS:
                raise not_whole(path, f"it announces more than {MAX_TENSORS:,} tensors")
            said = json.loads(text, object_pairs_hook=once)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise not_whole(path, "its header is not JSON with one entry per name") from error
    return said, file_bytes - 8 - header_bytes


def _announced(path: Path, said: dict[str, Any], num_bytes: int) -> dict[str, StoredTensor]:
    """The tensors that a header describes, which fill the `num_bytes` behind it without overlap or gap.

    Raises CheckpointError.
    """
    tensors, spans = {}, []
    for name, entry in said.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            fits = isinstance(shape, list) and len(shape) <= 16
            if not fits or not all(type(n) is int and 0 <= n < 2 ** 63 for n in (*shape, begin, end)):
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise not_whole(path, f"its header's entry for {name[:200]!r} is not understood") from None
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {name[:200]} has dtype {str(dtype)[:40]!r}; known are {', '.join(_DTYPES)}")
        if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise not_whole(path, f"{name[:200]} has {end - begin} bytes, not those of its shape {shape[:8]}")
        spans.append((begin, end))
        tensors[name] = StoredTensor(file=path, name=name, dtype=_DTYPES[dtype], shape=tuple(shape))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise not_whole(path, "its tensors overlap or leave gaps")
        at = end
    if at != num_bytes:
        raise not_whole(path, f"its tensors take {at} bytes and it holds {num_bytes}")
    return tensors


def views(stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, as stored: they look into the mapped file, so copy what is to stay."""
    by_file: dict[Path, list[str]] = {}
    for key, tensor in stored.items():
        by_file.setdefault(tensor.file, []).append(key)
    for file, keys in by_file.items():
        try:
            with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
                for key in keys:
                    yield key, opened.get_tensor(stored[key].name)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:   # torch has one for what it cannot map
            raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error


def place(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def released_state(model: nn.Module, table: KeyTable) -> dict[str, Tensor]:
    """The model's tensors under the names of the release, ready to save.  Raises CheckpointError where one has none."""
    state = {}
    for key, tensor in model.state_dict().items():
        if (name := table.released(key)) is None:
            raise CheckpointError(f"{table.name}, keys.py below model/, does not name every tensor of "
                                  f"{type(model).__name__}")
        state[name] = tensor.detach()
    return state


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, replaced in one step; equal content gives equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.writelines(pieces(tensors, metadata or {}))
    partial.replace(path)


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors and text as the bytes of a safetensors file; equal content gives equal bytes."""
    return b"".join(pieces(tensors, metadata or {}))


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The format, written here because the library's order of the metadata changes from run to run."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))         # so that all stay aligned
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in names:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `pack` was given, on the CPU.  Raises CheckpointError for bytes that are not such a file."""
    try:
        header_bytes = int.from_bytes(data[:8], "little")
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8:8 + header_bytes]).get("__metadata__", {})
    except (ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{len(data)} bytes are not packed tensors: {first_line(error)}") from error
    return tensors, metadata


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For json: an object, refusing a name that comes twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name comes twice")
    return table


def pickle_advice(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES) if folder.is_dir() else []
    advice = f". There is {listed(pickles)}: convert once with dailies convert {folder} --model NAME --to FOLDER"
    return advice if pickles else ""


def count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}"
