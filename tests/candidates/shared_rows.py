"""The same convolution where the rows of a program share what they see, in Gluon, for Hopper.

Row r of a program's output sees rows r - 1, r and r + 1. In causal_conv.py every tap fetches its rows anew; here a step
is one tap in time and one in columns, DEPTH channels, and all KH taps in rows: it fetches ROWS + KH - 1 rows and KH
taps' weights, and makes ROWS * KH products of them. For four rows that is half the bytes from the L2 cache, which is
what the narrow convolutions wait for. Several products then follow each other into the same sums; Triton would wait for
each to end before it begins the next, so the asynchronous copies, products and waits are written down here. The
interpreter cannot run them: what is proved on a CPU is that they compile as they should, and the rest where there is a
device.

Letters as in causal_conv.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.jit(do_not_specialize=["T", "H", "TILES_X", "TILES"])
def shared_rows_kernel(x, w, w_rest, bias, residual, y, residual_frame, y_frame, T, H, W, C, N, TILES_X, TILES,
                       KT: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr, CHUNKS: gl.constexpr, ROWS: gl.constexpr,
                       COLUMNS: gl.constexpr, DEPTH: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr,
                       GROUP: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr,
                       HAS_RESIDUAL: gl.constexpr):
    """One clip. x: a descriptor of [1, 1, COLUMNS, DEPTH] of the window [T + KT - 1, H, W, C]; w, w_rest: descriptors
    of [FIRST, DEPTH] and [REST, DEPTH] of the weights [N, KT * KH * KW * C].  CHUNKS: of DEPTH channels, for a tap.
    """
    SEEN: gl.constexpr = ROWS + KH - 1
    TURNS: gl.constexpr = KT * KW * CHUNKS
    PRODUCTS: gl.constexpr = ROWS * KH * (2 if REST > 0 else 1)
    place = gl.program_id(0)
    parts = gl.cdiv(N, FIRST + REST)
    channel = place % parts * (FIRST + REST)
    place = place // parts
    before = place // (GROUP * T) * GROUP              # tiles of earlier groups
    size = gl.minimum(TILES - before, GROUP)
    frame = place % (GROUP * T) // size
    tile = before + place % (GROUP * T) % size
    top = tile // TILES_X * ROWS
    left = tile % TILES_X * COLUMNS

    seen = gl.allocate_shared_memory(x.dtype, [STAGES * SEEN, 1, 1, COLUMNS, DEPTH], x.layout)
    weights = gl.allocate_shared_memory(w.dtype, [STAGES * KH, FIRST, DEPTH], w.layout)
    weights_rest = weights
    if REST > 0:
        weights_rest = gl.allocate_shared_memory(w.dtype, [STAGES * KH, REST, DEPTH], w_rest.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)

    FIRST_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, FIRST, 16])
    LAST: gl.constexpr = REST if REST > 0 else FIRST
    REST_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, LAST, 16])
    totals = ()
    rests = ()
    for _row in gl.static_range(ROWS):
        totals = totals + (gl.zeros((COLUMNS, FIRST), gl.float32, FIRST_SUMS),)
        if REST > 0:
            rests = rests + (gl.zeros((COLUMNS, REST), gl.float32, REST_SUMS),)
    for i in gl.static_range(STAGES - 1):
        fetch(i, x, w, w_rest, seen, weights, weights_rest, bars, frame, top, left, channel, C, KH, KW, CHUNKS, TURNS,
              ROWS, COLUMNS, DEPTH, FIRST, REST, STAGES)
    for step in range(TURNS):
        stage = step % STAGES
        mbarrier.wait(bars.index(stage), step // STAGES & 1)
        for row in gl.static_range(SEEN):
            a = seen.index(stage * SEEN + row).reshape([COLUMNS, DEPTH])
            for dy in gl.static_range(KH):
                if row >= dy and row - dy < ROWS:
                    b = weights.index(stage * KH + dy).permute([1, 0])
                    totals = put(totals, row - dy, warpgroup_mma(a, b, totals[row - dy], is_async=True))
                    if REST > 0:
                        b = weights_rest.index(stage * KH + dy).permute([1, 0])
                        rests = put(rests, row - dy, warpgroup_mma(a, b, rests[row - dy], is_async=True))
        # at most this step's products are under way: the step before is through, and its stage is free
        sums = warpgroup_mma_wait(PRODUCTS, deps=totals + rests)
        totals = sums[:ROWS]
        rests = sums[ROWS:]
        fetch(step + STAGES - 1, x, w, w_rest, seen, weights, weights_rest, bars, frame, top, left, channel, C, KH, KW,
              CHUNKS, TURNS, ROWS, COLUMNS, DEPTH, FIRST, REST, STAGES)
    sums = warpgroup_mma_wait(0, deps=totals + rests)
    totals = sums[:ROWS]
    rests = sums[ROWS:]
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(i))
    residual += frame.to(gl.int64) * residual_frame
    y += frame.to(gl.int64) * y_frame
    for row in gl.static_range(ROWS):
        at = ((top + row) * W + left).to(gl.int64) * N
        inside = gl.where(top + row < H, W - left, 0)
        finish(totals[row], bias, residual, y, at, inside, channel, N, FIRST, COLUMNS, HAS_BIAS, HAS_RESIDUAL)
        if REST > 0:
            finish(rests[row], bias, residual, y, at, inside, channel + FIRST, N, REST, COLUMNS, HAS_BIAS, HAS_RESIDUAL)


@gluon.jit
def fetch(step, x, w, w_rest, seen, weights, weights_rest, bars, frame, top, left, channel, C, KH: gl.constexpr,
          KW: gl.constexpr, CHUNKS: gl.constexpr, TURNS: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
          DEPTH: gl.constexpr, FIRST: gl.constexpr, REST: gl.constexpr, STAGES: gl.constexpr):
    """Begins to copy what a step needs into its stage, whose barrier counts the bytes; nothing behind the last step."""
    wanted = step < TURNS
    stage = step % STAGES
    tap = step // CHUNKS
    c = step % CHUNKS * DEPTH
    t = tap // KW
    dx = tap % KW
    bar = bars.index(stage)
    mbarrier.expect(bar, ((ROWS + KH - 1) * COLUMNS + KH * (FIRST + REST)) * DEPTH * 2, wanted)
    for dy in gl.static_range(KH):
        at = ((t * KH + dy) * KW + dx) * C + c
        tma.async_copy_global_to_shared(w, [channel, at], bar, weights.index(stage * KH + dy), wanted)
        if REST > 0:
            tma.async_copy_global_to_shared(w_rest, [channel + FIRST, at], bar, weights_rest.index(stage * KH + dy),
                                            wanted)
    for row in gl.static_range(ROWS + KH - 1):         # what lies beside the picture arrives as zeros
        tma.async_copy_global_to_shared(x, [frame + t, top + row - KH // 2, left + dx - KW // 2, c], bar,
                                        seen.index(stage * (ROWS + KH - 1) + row), wanted)


@gluon.jit
def finish(total, bias, residual, y, at, inside, channel, N, CHANNELS: gl.constexpr, COLUMNS: gl.constexpr,
           HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr):
    """Bias and residual of the first `inside` pixels from `at` on, and some channels; rounded once, stored."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // CHANNELS, CHANNELS // 8], [gl.num_warps(), 1], [1, 0])
    total = gl.convert_layout(total, LAYOUT)
    channels = channel + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, LAYOUT))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, LAYOUT))
    where = at + column[:, None] * N + channels[None, :]
    wanted = (column < inside)[:, None] & (channels < N)[None, :]
    if HAS_BIAS:
        total += gl.load(bias + channels, mask=channels < N, other=0.0).to(gl.float32)[None, :]
    if HAS_RESIDUAL:
        total += gl.load(residual + where, mask=wanted, other=0.0).to(gl.float32)
    gl.store(y + where, total.to(y.dtype.element_ty), mask=wanted)


@gluon.jit
def put(values, AT: gl.constexpr, new):
    """The tuple with another value at AT."""
    out = ()
    for i in gl.static_range(len(values)):
        out = out + (new,) if i == AT else out + (values[i],)
    return out


def descriptor(base, strides: list[int], block: list[int]) -> TensorDescriptor:
    """Of blocks as the tensor cores read them: the last axis, of two bytes a number, is 32, 64 or 128 bytes."""
    layout = gl.NVMMASharedLayout(min(128, 2 * block[-1]), 16, rank=len(block))
    return TensorDescriptor(base, list(base.shape), strides, block, layout)
