"""The kernels that ``triton.py`` launches; its docstring says what they compute.

A window is a number of images, rows and columns of windows; its slots are numbered row by row. Shift, borders and
padding are arithmetic on slots: nothing is moved. Strides are those of B, H, W, (part,) h.
"""

from __future__ import annotations

from visionattn.kernels.common.jit import jit, tl
from visionattn.kernels.common.rows import load_rows, store_rows


@jit
def _corner(window, windows):
    """Image, and row and column among its windows, of a window."""
    rest = window // windows[1]
    return (rest // windows[0]).to(tl.int64), rest % windows[0], window % windows[1]


@jit
def _slots(first, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column in the window of successive slots, and which of them exist."""
    m = first + tl.arange(0, BLOCK)
    return m // WINDOW[1], m % WINDOW[1], m < WINDOW[0] * WINDOW[1]


@jit
def _tokens(slots, corner, live, shape, windows, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Row and column on the map of slots, which are on it, and which end of the map they come from, as a number."""
    y, x = corner[1] * WINDOW[0] + slots[0] + SHIFT[0], corner[2] * WINDOW[1] + slots[1] + SHIFT[1]
    end = tl.zeros_like(y)
    if SHIFT[0] > 0:
        around = y >= windows[0] * WINDOW[0]
        end += tl.where(around, 2, 0)
        y = tl.where(around, y - windows[0] * WINDOW[0], y)
    if SHIFT[1] > 0:
        around = x >= windows[1] * WINDOW[1]
        end += tl.where(around, 1, 0)
        x = tl.where(around, x - windows[1] * WINDOW[1], x)
    return y, x, slots[2] & (y < tl.where(live, shape[0], 0)) & (x < shape[1]), end


@jit
def _offset(corner, tokens, strides):
    """Where in memory tokens begin."""
    y, x = tokens[0].to(tl.int64) * strides[1], tokens[1].to(tl.int64) * strides[2]
    return corner[0] * strides[0] + y + x


@jit
def _number(corner, tokens, shape):
    """Number of tokens among those of all images."""
    return (corner[0] * shape[0] + tokens[0]) * shape[1] + tokens[1]


@jit
def _load_padded(rows, exist, slots, token, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_PADDING: tl.constexpr):
    """Rows of keys or values, ``token`` for those beyond the map."""
    x = load_rows(rows, exist, D, BLOCK_D)
    if HAS_PADDING:
        d = tl.arange(0, BLOCK_D)
        beyond = slots[2] & (exist == 0)
        x = tl.where(beyond[:, None], tl.load(token + d, d < D, other=0.0)[None, :], x)
    return x


@jit
def window_bias(
    bias, added, heads,
    WINDOW: tl.constexpr, SIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What is added to logits in base 2, [h, SIDE, SIDE]: the bias of the table [T, h], and -inf where no key is."""
    program = tl.program_id(0)
    head = program % heads
    m = program // heads // (SIDE // BLOCK_N) * BLOCK_M
    n = program // heads % (SIDE // BLOCK_N) * BLOCK_N
    queries, keys = _slots(m, WINDOW, BLOCK_M), _slots(n, WINDOW, BLOCK_N)
    dy, dx = queries[0][:, None] - keys[0][None, :], queries[1][:, None] - keys[1][None, :]
    index = (dy + WINDOW[0] - 1) * (2 * WINDOW[1] - 1) + dx + WINDOW[1] - 1
    x = tl.load(bias + index * heads + head, queries[2][:, None] & keys[2][None, :], other=0.0)
    x = tl.where(keys[2][None, :], x.to(added.dtype.element_ty) * 1.4426950408889634, float("-inf"))
    row = (head.to(tl.int64) * SIDE + m + tl.arange(0, BLOCK_M)) * SIDE
    tl.store(added + row[:, None] + (n + tl.arange(0, BLOCK_N))[None, :], x)


@jit
def _added(
    added, m, n, head, keys,
    HAS_BIAS: tl.constexpr, SIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of that, from query m and key n on."""
    if HAS_BIAS:
        row = (head * SIDE + m + tl.arange(0, BLOCK_M)) * SIDE
        tile = tl.load(added + row[:, None] + (n + tl.arange(0, BLOCK_N))[None, :])
    else:
        tile = tl.where(keys[2][None, :], tl.zeros([BLOCK_M, BLOCK_N], ACC), float("-inf"))
    return tile


@jit
def _logits(
    rows, keys, tile, query_end, key_end, scale, masked,
    SHIFT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits in base 2."""
    logits = tl.dot(rows, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC) * scale + tile
    if SHIFT[0] + SHIFT[1] > 0:
        logits = tl.where(query_end[:, None] != key_end[None, :], logits + masked, logits)
    return logits


@jit
def window_fwd(
    qkv, added, padding, out, lse, qkv_strides, heads, shape, windows, total, scale, scale_low, masked, masked_low,
    D: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PADDING: tl.constexpr,
    SIDE: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of RUN windows, one after another. lse is the log-sum-exp in base 2, [B, H, W, h]."""
    BLOCKS: tl.constexpr = (WINDOW[0] * WINDOW[1] + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = (WINDOW[0] * WINDOW[1] + BLOCK_N - 1) // BLOCK_N
    head = (tl.program_id(0) % heads).to(tl.int64)
    rest = tl.program_id(0) // heads
    qkv += head * qkv_strides[4]
    k_token = padding + (heads + head) * D
    v_token = padding + (2 * heads + head) * D
    m = rest % BLOCKS * BLOCK_M
    queries = _slots(m, WINDOW, BLOCK_M)
    scale = tl.full([], scale, ACC) + tl.full([], scale_low, ACC)
    masked = tl.full([], masked, ACC) + tl.full([], masked_low, ACC)
    for run in range(RUN):
        window = rest // BLOCKS * RUN + run
        live = window < total
        corner = _corner(window, windows)
        t = _tokens(queries, corner, live, shape, windows, WINDOW, SHIFT)
        rows = load_rows(qkv + _offset(corner, t, qkv_strides), t[2], D, BLOCK_D)
        top = tl.full([BLOCK_M], float("-inf"), ACC)
        sums = tl.zeros([BLOCK_M], ACC)
        acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
        for step in range(STEPS):
            n = step * BLOCK_N
            keys = _slots(n, WINDOW, BLOCK_N)
            tile = _added(added, m, n, head, keys, HAS_BIAS, SIDE, BLOCK_M, BLOCK_N, ACC)
            u = _tokens(keys, corner, live, shape, windows, WINDOW, SHIFT)
            place = qkv + _offset(corner, u, qkv_strides)
            k = _load_padded(place + qkv_strides[3], u[2], keys, k_token, D, BLOCK_D, HAS_PADDING)
            v = _load_padded(place + 2 * qkv_strides[3], u[2], keys, v_token, D, BLOCK_D, HAS_PADDING)
            logits = _logits(rows, k, tile, t[3], u[3], scale, masked, SHIFT, ACC, PRECISION)
            new_top = tl.maximum(top, tl.max(logits, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # all that came may be masked by -inf
            p = tl.exp2(logits - base[:, None])
            decay = tl.exp2(top - base)
            acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION, out_dtype=ACC)
            sums = sums * decay + tl.sum(p, 1)
            top = new_top
        pixel = _number(corner, t, shape) * heads + head
        store_rows(out + pixel * D, acc / sums[:, None], t[2], D, BLOCK_D)
        tl.store(lse + pixel, top + tl.log2(sums), t[2])


@jit
def window_bwd(
    grad, qkv, added, padding, lse, dqkv, bias_parts, padding_parts, grad_strides, qkv_strides,
    heads, shape, windows, total, scale, scale_low, masked, masked_low,
    D: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PADDING: tl.constexpr,
    SIDE: tl.constexpr, BIAS_GRAD: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of RUN windows of at most BLOCK_M tokens. Parts of the sums over windows, each [programs, ...]:
    of the bias [BLOCK_M, BLOCK_M], queries by keys, of the padding [2, D], key and value.
    """
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    qkv += head * qkv_strides[4]
    grad += head * grad_strides[3]
    k_token = padding + (heads + head) * D
    v_token = padding + (2 * heads + head) * D
    slots = _slots(0, WINDOW, BLOCK_M)
    scale = tl.full([], scale, ACC) + tl.full([], scale_low, ACC)
    masked = tl.full([], masked, ACC) + tl.full([], masked_low, ACC)
    if BIAS_GRAD:
        bias_sums = tl.zeros([BLOCK_M, BLOCK_M], ACC)
    if HAS_PADDING:
        k_sums = tl.zeros([BLOCK_D], ACC)
        v_sums = tl.zeros([BLOCK_D], ACC)
    for run in range(RUN):
        window = (program // heads * RUN + run).to(tl.int32)
        live = window < total
        corner = _corner(window, windows)
        t = _tokens(slots, corner, live, shape, windows, WINDOW, SHIFT)
        place = qkv + _offset(corner, t, qkv_strides)
        q = load_rows(place, t[2], D, BLOCK_D)
        k = _load_padded(place + qkv_strides[3], t[2], slots, k_token, D, BLOCK_D, HAS_PADDING)
        v = _load_padded(place + 2 * qkv_strides[3], t[2], slots, v_token, D, BLOCK_D, HAS_PADDING)
        do = load_rows(grad + _offset(corner, t, grad_strides), t[2], D, BLOCK_D)
        number = _number(corner, t, shape)
        log_sums = tl.load(lse + number * heads + head, t[2], other=0.0)
        tile = _added(added, 0, 0, head, slots, HAS_BIAS, SIDE, BLOCK_M, BLOCK_M, ACC)
        logits = _logits(q, k, tile, t[3], t[3], scale, masked, SHIFT, ACC, PRECISION)
        p = tl.where(t[2][:, None], tl.exp2(logits - log_sums[:, None]), 0.0)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if BIAS_GRAD:
            bias_sums += ds
        ds = ds.to(q.dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION, out_dtype=ACC) * (scale * 0.6931471805599453)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION, out_dtype=ACC) * (scale * 0.6931471805599453)
        place = dqkv + (number * 3 * heads + head) * D
        store_rows(place, dq, t[2], D, BLOCK_D)
        store_rows(place + heads * D, dk, t[2], D, BLOCK_D)
        store_rows(place + 2 * heads * D, dv, t[2], D, BLOCK_D)
        if HAS_PADDING:
            beyond = (slots[2] & (t[2] == 0) & (slots[0] < tl.where(live, WINDOW[0], 0)))[:, None]
            k_sums += tl.sum(tl.where(beyond, dk, 0.0), 0)
            v_sums += tl.sum(tl.where(beyond, dv, 0.0), 0)
    if BIAS_GRAD:
        m = tl.arange(0, BLOCK_M)
        tl.store(bias_parts + (program * BLOCK_M + m)[:, None] * BLOCK_M + m[None, :], bias_sums)
    if HAS_PADDING:
        d = tl.arange(0, BLOCK_D)
        tl.store(padding_parts + program * 2 * D + d, k_sums, d < D)
        tl.store(padding_parts + (program * 2 + 1) * D + d, v_sums, d < D)


@jit
def _ds(
    q, k, v, do, log_sums, deltas, tile, t, u, scale, masked,
    SHIFT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights and the gradient of the logits, queries by keys."""
    logits = _logits(q, k, tile, t[3], u[3], scale, masked, SHIFT, ACC, PRECISION)
    p = tl.where(t[2][:, None], tl.exp2(logits - log_sums[:, None]), 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    return p, p * (dp - deltas[:, None])


@jit
def window_bwd_dq(
    grad, qkv, added, padding, out, lse, delta, dqkv, grad_strides, qkv_strides,
    heads, shape, windows, total, scale, scale_low, masked, masked_low,
    D: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PADDING: tl.constexpr,
    SIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a window: their gradient, and delta, the products of rows of grad and out."""
    BLOCKS: tl.constexpr = (WINDOW[0] * WINDOW[1] + BLOCK_M - 1) // BLOCK_M
    head = (tl.program_id(0) % heads).to(tl.int64)
    rest = tl.program_id(0) // heads
    qkv += head * qkv_strides[4]
    k_token = padding + (heads + head) * D
    v_token = padding + (2 * heads + head) * D
    corner = _corner(rest // BLOCKS, windows)
    m = rest % BLOCKS * BLOCK_M
    queries = _slots(m, WINDOW, BLOCK_M)
    live = rest // BLOCKS < total
    t = _tokens(queries, corner, live, shape, windows, WINDOW, SHIFT)
    number = _number(corner, t, shape)
    pixel = number * heads + head
    do = load_rows(grad + head * grad_strides[3] + _offset(corner, t, grad_strides), t[2], D, BLOCK_D)
    q = load_rows(qkv + _offset(corner, t, qkv_strides), t[2], D, BLOCK_D)
    deltas = tl.sum(do.to(ACC) * load_rows(out + pixel * D, t[2], D, BLOCK_D).to(ACC), 1)
    tl.store(delta + pixel, deltas, t[2])
    log_sums = tl.load(lse + pixel, t[2], other=0.0)
    scale = tl.full([], scale, ACC) + tl.full([], scale_low, ACC)
    masked = tl.full([], masked, ACC) + tl.full([], masked_low, ACC)
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for first in range(0, WINDOW[0] * WINDOW[1], BLOCK_N):
        keys = _slots(first, WINDOW, BLOCK_N)
        u = _tokens(keys, corner, live, shape, windows, WINDOW, SHIFT)
        place = qkv + _offset(corner, u, qkv_strides)
        k = _load_padded(place + qkv_strides[3], u[2], keys, k_token, D, BLOCK_D, HAS_PADDING)
        v = _load_padded(place + 2 * qkv_strides[3], u[2], keys, v_token, D, BLOCK_D, HAS_PADDING)
        tile = _added(added, m, first, head, keys, HAS_BIAS, SIDE, BLOCK_M, BLOCK_N, ACC)
        _, ds = _ds(q, k, v, do, log_sums, deltas, tile, t, u, scale, masked, SHIFT, ACC, PRECISION)
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION, out_dtype=ACC)
    store_rows(dqkv + (number * 3 * heads + head) * D, dq * (scale * 0.6931471805599453), t[2], D, BLOCK_D)


@jit
def window_bwd_dkv(
    grad, qkv, added, padding, lse, delta, dqkv, bias_parts, padding_parts, grad_strides, qkv_strides,
    heads, shape, windows, total, scale, scale_low, masked, masked_low,
    D: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PADDING: tl.constexpr,
    SIDE: tl.constexpr, BIAS_GRAD: tl.constexpr, RUN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of a window: their gradients and those of values. Its part of the padding's gradient, [2, D].

    With BIAS_GRAD instead these keys, and BLOCK_M queries, of RUN windows: the sum of the gradients of their logits.
    """
    BLOCKS: tl.constexpr = (WINDOW[0] * WINDOW[1] + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (WINDOW[0] * WINDOW[1] + BLOCK_M - 1) // BLOCK_M if BIAS_GRAD else 1
    STEPS: tl.constexpr = RUN if BIAS_GRAD else (WINDOW[0] * WINDOW[1] + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    rest = tl.program_id(0) // heads
    n = rest % BLOCKS * BLOCK_N
    keys = _slots(n, WINDOW, BLOCK_N)
    rest = rest // BLOCKS
    window = rest // TILES * RUN
    qkv += head * qkv_strides[4]
    grad += head * grad_strides[3]
    k_token = padding + (heads + head) * D
    v_token = padding + (2 * heads + head) * D
    scale = tl.full([], scale, ACC) + tl.full([], scale_low, ACC)
    masked = tl.full([], masked, ACC) + tl.full([], masked_low, ACC)
    if BIAS_GRAD:
        sums = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    else:
        dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for step in range(STEPS):
        if BIAS_GRAD:
            corner = _corner(window + step, windows)
            live = window + step < total
            m = rest % TILES * BLOCK_M
        else:
            corner = _corner(window, windows)
            live = window < total
            m = step * BLOCK_M
        queries = _slots(m, WINDOW, BLOCK_M)
        u = _tokens(keys, corner, live, shape, windows, WINDOW, SHIFT)
        place = qkv + _offset(corner, u, qkv_strides)
        k = _load_padded(place + qkv_strides[3], u[2], keys, k_token, D, BLOCK_D, HAS_PADDING)
        v = _load_padded(place + 2 * qkv_strides[3], u[2], keys, v_token, D, BLOCK_D, HAS_PADDING)
        t = _tokens(queries, corner, live, shape, windows, WINDOW, SHIFT)
        q = load_rows(qkv + _offset(corner, t, qkv_strides), t[2], D, BLOCK_D)
        do = load_rows(grad + _offset(corner, t, grad_strides), t[2], D, BLOCK_D)
        pixel = _number(corner, t, shape) * heads + head
        log_sums = tl.load(lse + pixel, t[2], other=0.0)
        deltas = tl.load(delta + pixel, t[2], other=0.0)
        tile = _added(added, m, n, head, keys, HAS_BIAS, SIDE, BLOCK_M, BLOCK_N, ACC)
        p, ds = _ds(q, k, v, do, log_sums, deltas, tile, t, u, scale, masked, SHIFT, ACC, PRECISION)
        if BIAS_GRAD:
            sums += ds
        else:
            dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION, out_dtype=ACC)
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION, out_dtype=ACC)
    if BIAS_GRAD:
        m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        tl.store(bias_parts + (program * BLOCK_M + m)[:, None] * BLOCK_N + n[None, :], sums)
    else:
        dk *= scale * 0.6931471805599453
        corner = _corner(window, windows)
        u = _tokens(keys, corner, window < total, shape, windows, WINDOW, SHIFT)
        place = dqkv + ((_number(corner, u, shape) * 3 + 1) * heads + head) * D
        store_rows(place, dk, u[2], D, BLOCK_D)
        store_rows(place + heads * D, dv, u[2], D, BLOCK_D)
        if HAS_PADDING:
            d = tl.arange(0, BLOCK_D)
            beyond = (keys[2] & (u[2] == 0))[:, None]
            part = padding_parts + program * 2 * D + d
            tl.store(part, tl.sum(tl.where(beyond, dk, 0.0), 0), d < D)
            tl.store(part + D, tl.sum(tl.where(beyond, dv, 0.0), 0), d < D)
