"""What this machine's processor computes with: the one place where it is asked, for every kind of layer.

A product in bf16 or INT8 that the processor has no instructions for is made by others, and is slow: with AVX2 alone
bf16 takes 6 to 70 times as long as fp32, and torch's INT8 product 40 times. oneDNN's INT8 product is wrong there too:
it adds pairs of products in 16 bits, where they saturate, which moved results by up to 7 % of their norm. So such
layers are computed in fp32: integers up to 2^24 are exact in it.

For tests, and to make one machine's clips on another: torch's variable ATEN_CPU_CAPABILITY=avx2 and oneDNN's
ONEDNN_MAX_CPU_ISA=AVX2 make a processor the least one that is supported, and are obeyed here.
"""

import os
import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

X86 = ("x86_64", "AMD64", "amd64")
# values of ONEDNN_MAX_CPU_ISA, above which are those that leave the instructions to oneDNN
WITHOUT_INT8 = ("SSE41", "AVX", "AVX2", "AVX512_CORE")
WITHOUT_BF16 = (*WITHOUT_INT8, "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE_VNNI")


@cache
def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available()


@cache
def has_bf16_products() -> bool:
    """Whether products of bf16 numbers, in linear layers and in convolutions, are instructions."""
    if not has_onednn() or onednn_limit() in WITHOUT_BF16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # with AVX-512 alone they are supported, and no faster than fp32's
    return not is_x86() or has_avx512() and instruction("avx512_bf16")


@cache
def has_bf16_tiles() -> bool:
    """Whether they are made by AMX, which is so fast that it mostly waits for what it multiplies."""
    return has_bf16_products() and instruction("amx_tile") and not onednn_limit()


@cache
def has_int8_products() -> bool:
    """Whether products of INT8 numbers are instructions (VNNI), and so exact and faster than fp32's."""
    return is_x86() and has_onednn() and onednn_limit() not in WITHOUT_INT8 and has_avx512() and (
        instruction("vnni"))


@cache
def has_signed_int8_products() -> bool:
    """Whether both of their operands may be signed, as AMX has it: VNNI multiplies unsigned by signed, and oneDNN has a
    loop for the other that takes 7,000 times as long."""
    return has_int8_products() and instruction("amx_tile") and not onednn_limit()


@cache
def has_gelu_in_product() -> bool:
    """Whether oneDNN's bf16 product takes the tanh form of GELU with it, as it was tried."""
    return is_x86() and has_bf16_products()


@cache
def has_faster_fp32_products() -> bool:
    """Whether oneDNN's are the faster: MKL, which torch takes, has its best instructions on Intel's processors alone.

    Of MKL's time, one core, products of LTX-2's sizes: Zen 5 0.42, with AVX2 alone 0.83; a Xeon 0.98 to 1.07.
    """
    return is_x86() and has_onednn() and cpuinfo("vendor_id") in ("AuthenticAMD", "HygonGenuine")


def convolves(dtype: torch.dtype) -> bool:
    """Whether oneDNN has convolutions of this dtype here, whatever their shape."""
    return has_onednn() and (dtype == torch.float32 or dtype == torch.bfloat16 and has_bf16_products())


def dtype_of(precision: str, device: str) -> torch.dtype:
    """What layers of a precision that are not INT8 compute in: bf16 for bf16 and int8, where that is no slower."""
    if precision == "fp32" or device.startswith("cpu") and not has_bf16_products():
        return torch.float32
    return torch.bfloat16


def instead_of_bf16() -> tuple[str, ...]:
    """What is said of layers that were asked for in bf16."""
    return () if has_bf16_products() else ("computed in fp32 instead of bf16: this CPU has no bf16 products",)


def int8_operand(x: Tensor) -> Tensor:
    """An INT8 matrix as `int8_product` takes it: made once where it is used again."""
    return x if x.is_cuda or has_int8_products() else x.float()


def sum_dtype(operand: Tensor) -> torch.dtype:
    """In which int8_product leaves the products with this operand."""
    return torch.int32 if operand.dtype == torch.int8 else torch.float32


def int8_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b of INT8 matrices [M, K] and [K, N], exactly: in int32, or where those products are slow in fp32.

    b: of int8_operand; in fp32 sums above 2^24 are rounded as fp32 rounds, which takes K > 1024.  out: of that dtype.
    """
    if b.dtype == torch.int8:
        return torch._int_mm(a, b) if out is None else torch._int_mm(a, b, out=out)
    return torch.mm(a.float(), b, out=out)


def is_x86() -> bool:
    return platform.machine() in X86


def has_avx512() -> bool:
    """Whether torch makes use of it."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def instruction(name: str) -> bool:
    """As torch sees the processor; it has no name of its own for these questions that would last."""
    asks = getattr(torch.cpu, f"_is_{name}_supported", None)
    return asks is not None and asks()


def onednn_limit() -> str:
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()


@cache
def described() -> str:
    """The processor, and the instructions that decide which sums are made in which order."""
    found = [torch.backends.cpu.get_cpu_capability()]
    found += [name for name, has in (("INT8", has_int8_products()), ("BF16", has_bf16_products()),
                                     ("AMX", instruction("amx_tile") and not onednn_limit())) if has]
    found += [f"oneDNN up to {limit}"] if (limit := onednn_limit()) else []
    return f"{model_name()} ({' '.join(found)})"


def model_name() -> str:
    return " ".join(cpuinfo("model name").split()) or platform.machine()


def cpuinfo(field: str) -> str:
    """As Linux has it of the first processor; empty elsewhere, and where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")
