"""The kernels that ``triton.py`` launches; its docstring says what they compute.

A slot is a token among all those that a region is routed to, or, for the gradients of keys and values, among those of
all regions routed to it. Regions are read where they lie in the map. Strides are those of B, H, W, h; ``shape``,
``region`` (tokens of one) and those of the keys are rows and columns.
"""

from __future__ import annotations

from visionattn.kernels.common.jit import jit, tl
from visionattn.kernels.common.rows import load_rows, store_rows


@jit
def _split(program, heads, blocks, regions, BLOCK: tl.constexpr):
    """Image, head, region and first token of a program: neighbors differ in the head first, then in the tokens."""
    rest = program // heads
    first = rest % blocks * BLOCK
    rest = rest // blocks
    return (rest // regions).to(tl.int64), (program % heads).to(tl.int64), rest % regions, first


@jit
def _place(regions, tokens, across, region, shape):
    """Rows and columns of tokens of regions, and whether they lie in the map."""
    y = regions // across * region[0] + tokens // region[1]
    x = regions % across * region[1] + tokens % region[1]
    return y, x, (y < shape[0]) & (x < shape[1])


@jit
def _offset(y, x, strides):
    return y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]


@jit
def _routed(routes, n, K, across, regions, region, shape):
    """Places of slots, which of them exist, and which of those lie in the map (the others are zeros).

    A route to a region that there is not leads out of the map; where Triton compiles for debugging, it is reported.
    """
    tokens = region[0] * region[1]
    exist = n < K * tokens
    chosen = tl.load(routes + n // tokens, exist, other=0)
    known = (chosen >= 0) & (chosen < regions)
    tl.device_assert(known, "a route is not the number of a region", exist)
    y, x, inside = _place(chosen.to(tl.int32), n % tokens, across, region, shape)
    return y, x, exist, exist & known & inside


@jit
def bilevel_fwd(
    q, k, v, routes, out, lse, q_strides, k_strides, v_strides, out_strides,
    heads, shape, key_shape, region, key_region, across, regions, K, scale, scale_low,
    D: tl.constexpr, E: tl.constexpr, STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens of a region. lse is the log-sum-exp of their logits in base 2, [B, H, W, h]."""
    blocks = tl.cdiv(region[0] * region[1], BLOCK_M)
    b, head, own, first = _split(tl.program_id(0), heads, blocks, regions, BLOCK_M)
    t = first + tl.arange(0, BLOCK_M)
    t_y, t_x, t_in = _place(own, t, across, region, shape)
    t_in = t_in & (t < region[0] * region[1])
    q += b * q_strides[0] + head * q_strides[3]
    k += b * k_strides[0] + head * k_strides[3]
    v += b * v_strides[0] + head * v_strides[3]
    routes += (b * regions + own) * K
    pixel = b * out_strides[0] + head * out_strides[3] + _offset(t_y, t_x, out_strides)
    rows = load_rows(q + _offset(t_y, t_x, q_strides), t_in, D, BLOCK_D)
    scale = tl.full([], scale, ACC) + tl.full([], scale_low, ACC)
    top = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_E], ACC)
    for i in range(STEPS):
        n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        u_y, u_x, exist, inside = _routed(routes, n, K, across, regions, key_region, key_shape)
        keys = load_rows(k + _offset(u_y, u_x, k_strides), inside, D, BLOCK_D)
        values = load_rows(v + _offset(u_y, u_x, v_strides), inside, E, BLOCK_E)
        logits = tl.dot(rows, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC) * scale
        logits = tl.where(exist[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp2(logits - new_top[:, None])
        decay = tl.exp2(top - new_top)
        acc = acc * decay[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION, out_dtype=ACC)
        total = total * decay + tl.sum(p, 1)
        top = new_top
    store_rows(out + pixel, acc / total[:, None], t_in, E, BLOCK_E)
    tl.store(lse + pixel // E, top + tl.log2(total), t_in)


@jit
def bilevel_bwd_dq(
    grad, q, k, v, routes, out, lse, delta, dq,
    grad_strides, q_strides, k_strides, v_strides, out_strides, dq_strides,
    heads, shape, key_shape, region, key_region, across, regions, K, scale, scale_low,
    D: tl.constexpr, E: tl.constexpr, STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens of a region: dq, and delta, the products of rows of grad and out, for the gradient of k."""
    blocks = tl.cdiv(region[0] * region[1], BLOCK_M)
    b, head, own, first = _split(tl.program_id(0), heads, blocks, regions, BLOCK_M)
    t = first + tl.arange(0, BLOCK_M)
    t_y, t_x, t_in = _place(own, t, across, region, shape)
    t_in = t_in & (t < region[0] * region[1])
    grad += b * grad_strides[0] + head * grad_strides[3]
    q += b * q_strides[0] + head * q_strides[3]
    k += b * k_strides[0] + head * k_strides[3]
    v += b * v_strides[0] + head * v_strides[3]
    dq += b * dq_strides[0] + head * dq_strides[3]
    routes += (b * regions + own) * K
    pixel = b * out_strides[0] + head * out_strides[3] + _offset(t_y, t_x, out_strides)
    grads = load_rows(grad + _offset(t_y, t_x, grad_strides), t_in, E, BLOCK_E)
    deltas = tl.sum(grads.to(ACC) * load_rows(out + pixel, t_in, E, BLOCK_E).to(ACC), 1)
    tl.store(delta + pixel // E, deltas, t_in)
    rows = load_rows(q + _offset(t_y, t_x, q_strides), t_in, D, BLOCK_D)
    log_sums = tl.load(lse + pixel // E, t_in, other=0.0)
    scale = tl.full([], scale, ACC) + tl.full([], scale_low, ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for i in range(STEPS):
        n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        u_y, u_x, exist, inside = _routed(routes, n, K, across, regions, key_region, key_shape)
        keys = load_rows(k + _offset(u_y, u_x, k_strides), inside, D, BLOCK_D)
        values = load_rows(v + _offset(u_y, u_x, v_strides), inside, E, BLOCK_E)
        logits = tl.dot(rows, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC) * scale
        p = tl.exp2(tl.where(exist[None, :], logits - log_sums[:, None], float("-inf")))
        dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION, out_dtype=ACC)
        ds = (p * (dp - deltas[:, None])).to(keys.dtype)
        acc += tl.dot(ds, keys, input_precision=PRECISION, out_dtype=ACC)
    # The scale is that of logits in base 2.
    store_rows(dq + _offset(t_y, t_x, dq_strides), acc * (scale * 0.6931471805599453), t_in, D, BLOCK_D)


@jit
def bilevel_bwd_dkv(
    grad, q, k, v, sources, starts, lse, delta, dk, dv,
    grad_strides, q_strides, k_strides, v_strides, out_strides, dk_strides, dv_strides,
    heads, shape, key_shape, region, key_region, across, regions, K, scale, scale_low,
    D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of a region: dk and dv, from the queries of the regions that are routed to it.

    These stand in ``sources`` [B, R * K] from place ``starts[r]`` [B, R + 1] on.
    """
    blocks = tl.cdiv(key_region[0] * key_region[1], BLOCK_N)
    b, head, own, first = _split(tl.program_id(0), heads, blocks, regions, BLOCK_N)
    u = first + tl.arange(0, BLOCK_N)
    u_y, u_x, u_in = _place(own, u, across, key_region, key_shape)
    u_in = u_in & (u < key_region[0] * key_region[1])
    grad += b * grad_strides[0] + head * grad_strides[3]
    q += b * q_strides[0] + head * q_strides[3]
    k += b * k_strides[0] + head * k_strides[3]
    v += b * v_strides[0] + head * v_strides[3]
    dk += b * dk_strides[0] + head * dk_strides[3]
    dv += b * dv_strides[0] + head * dv_strides[3]
    image = b * out_strides[0] + head * out_strides[3]
    begin = tl.load(starts + b * (regions + 1) + own)
    viewers = tl.load(starts + b * (regions + 1) + own + 1) - begin
    sources += b * regions * K + begin
    keys = load_rows(k + _offset(u_y, u_x, k_strides), u_in, D, BLOCK_D)
    values = load_rows(v + _offset(u_y, u_x, v_strides), u_in, E, BLOCK_E)
    scale = tl.full([], scale, ACC) + tl.full([], scale_low, ACC)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_E], ACC)
    slots = viewers * (region[0] * region[1])
    m = 0
    while m < slots:
        t = m + tl.arange(0, BLOCK_M)
        t_y, t_x, _, t_in = _routed(sources, t, viewers, across, regions, region, shape)
        rows = load_rows(q + _offset(t_y, t_x, q_strides), t_in, D, BLOCK_D)
        grads = load_rows(grad + _offset(t_y, t_x, grad_strides), t_in, E, BLOCK_E)
        place = (image + _offset(t_y, t_x, out_strides)) // E
        log_sums = tl.load(lse + place, t_in, other=0.0)
        deltas = tl.load(delta + place, t_in, other=0.0)
        logits = tl.dot(keys, tl.trans(rows), input_precision=PRECISION, out_dtype=ACC) * scale
        p = tl.exp2(tl.where(t_in[None, :], logits - log_sums[None, :], float("-inf")))
        dv_acc += tl.dot(p.to(grads.dtype), grads, input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION, out_dtype=ACC)
        ds = (p * (dp - deltas[None, :])).to(rows.dtype)
        dk_acc += tl.dot(ds, rows, input_precision=PRECISION, out_dtype=ACC)
        m += BLOCK_M
    store_rows(dk + _offset(u_y, u_x, dk_strides), dk_acc * (scale * 0.6931471805599453), u_in, D, BLOCK_D)
    store_rows(dv + _offset(u_y, u_x, dv_strides), dv_acc, u_in, E, BLOCK_E)
