"""The kernels that ``triton.py`` launches; its docstring says what they compute.

Letters: n counts the ranks of a residue c (the positions c, c + dilation, ...), t is the rank of a query, u that of a
key. A program has a tile of ranks of one residue per axis in one plane, so dilation moves no data, and walks over the
tile's halo, all that it sees (for keys: is seen by), masking what single queries do not see.
Strides are those of B, Z, Y, X, h.
"""

from __future__ import annotations

from visionattn.kernels.common.jit import jit, tl
from visionattn.kernels.common.rows import load_rows, store_rows


@jit
def _place(program, heads, shape, dilation, tiles, TILE: tl.constexpr):
    """Split the index of a program: neighbours differ in the head first, then in the residues, then in the tile."""
    rest = program // heads
    c_x = rest % dilation[2]
    rest = rest // dilation[2]
    c_y = rest % dilation[1]
    rest = rest // dilation[1]
    x = rest % tiles[1] * TILE[1]
    rest = rest // tiles[1]
    y = rest % tiles[0] * TILE[0]
    rest = rest // tiles[0]
    z = rest % shape[0] // dilation[0]
    c_z = rest % shape[0] % dilation[0]
    n_z = (shape[0] - c_z + dilation[0] - 1) // dilation[0]
    n_y = (shape[1] - c_y + dilation[1] - 1) // dilation[1]
    n_x = (shape[2] - c_x + dilation[2] - 1) // dilation[2]
    return rest // shape[0], program % heads, (z, y, x), (c_z, c_y, c_x), (n_z, n_y, n_x)


@jit
def _keys(t, n, K: tl.constexpr, CAUSAL: tl.constexpr):
    """First and last rank that the query of rank t sees."""
    if CAUSAL:
        first = tl.maximum(t - (K - 1), 0)
        last = t
    else:
        first = tl.minimum(tl.maximum(t - K // 2, 0), n - K)
        last = first + (K - 1)
    return first, last


@jit
def _viewers(first, last, n, K: tl.constexpr, CAUSAL: tl.constexpr):
    """First and last rank of the queries that see any of the ranks from first to last."""
    if CAUSAL:
        last = tl.minimum(last + (K - 1), n - 1)
    else:
        first = tl.where(first < K, 0, first - (K - 1 - K // 2))
        last = tl.where(last >= n - K, n - 1, last + K // 2)
    return first, last


@jit
def _ranks(first, n, TILE: tl.constexpr):
    """Rows and columns of a tile, which of them exist, and the last ones."""
    m = tl.arange(0, TILE[0] * TILE[1])
    y, x = first[1] + m // TILE[1], first[2] + m % TILE[1]
    last = (tl.minimum(first[1] + TILE[0], n[1]) - 1, tl.minimum(first[2] + TILE[1], n[2]) - 1)
    return y, x, (y < n[1]) & (x < n[2]), last


@jit
def _seen_halo(first, last, n, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):
    """The corners of what the queries of a tile see."""
    start_z, stop_z = _keys(first[0], n[0], WINDOW[0], CAUSAL[0])
    start_y, _ = _keys(first[1], n[1], WINDOW[1], CAUSAL[1])
    start_x, _ = _keys(first[2], n[2], WINDOW[2], CAUSAL[2])
    _, stop_y = _keys(last[0], n[1], WINDOW[1], CAUSAL[1])
    _, stop_x = _keys(last[1], n[2], WINDOW[2], CAUSAL[2])
    return (start_z, start_y, start_x), (stop_z, stop_y, stop_x)


@jit
def _step(i, halo, PITCH: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ranks of the i-th BLOCK_N positions of a halo, and which of them are in it."""
    start, stop = halo
    n = i % STEPS * BLOCK_N + tl.arange(0, BLOCK_N)
    z, y, x = start[0] + i // STEPS, start[1] + n // PITCH, start[2] + n % PITCH
    stop_y = tl.where(z <= stop[0], stop[1], -1)
    return z, y, x, (y <= stop_y) & (x <= stop[2])


@jit
def _seen(u_y, u_x, t_y, t_x, n, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether queries see keys, within a plane that they see."""
    near_y, far_y = _keys(t_y, n[1], WINDOW[1], CAUSAL[1])
    near_x, far_x = _keys(t_x, n[2], WINDOW[2], CAUSAL[2])
    return (u_y >= near_y) & (u_y <= far_y) & (u_x >= near_x) & (u_x <= far_x)


@jit
def _bias_index(z, y, x, WINDOW: tl.constexpr):
    """Ranks as a position in the bias table; that of a key minus that of a query is where their bias is."""
    return (z * (2 * WINDOW[1] - 1) + y) * (2 * WINDOW[2] - 1) + x


@jit
def _bias_table(bias, head, WINDOW: tl.constexpr):
    """Where the bias of a head has the offset 0."""
    size = (2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1) * (2 * WINDOW[2] - 1)
    return bias + head * size + size // 2


@jit
def _offset(z, y, x, residue, dilation, strides):
    """Where in memory the pixels of ranks begin, seen from that of the image and head."""
    z = (z * dilation[0] + residue[0]).to(tl.int64) * strides[1]
    y = (y * dilation[1] + residue[1]).to(tl.int64) * strides[2]
    return z + y + (x * dilation[2] + residue[2]).to(tl.int64) * strides[3]


@jit
def _logits(
    rows, columns, table, index, seen, scale, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Logits in base 2 of a tile by BLOCK_N positions of its halo, the ones being queries, the others keys."""
    logits = tl.dot(rows, tl.trans(columns), input_precision=PRECISION, out_dtype=ACC) * scale
    if HAS_BIAS:
        logits += tl.load(table + index, seen, other=0.0).to(ACC) * 1.4426950408889634
    return tl.where(seen, logits, float("-inf"))


@jit
def _one_by_one(
    q, k, v, table, out, q_strides, k_strides, v_strides, out_strides, first, residue, n, dilation, scale,
    D: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The outputs of a tile again, each from its own window alone; in few registers, lest the common case pay."""
    STEPS: tl.constexpr = (WINDOW[1] * WINDOW[2] + BLOCK_N - 1) // BLOCK_N
    d = tl.arange(0, BLOCK_D)
    m = 0
    while m < TILE[0] * TILE[1]:
        t_y, t_x = first[1] + m // TILE[1], first[2] + m % TILE[1]
        if (t_y < n[1]) & (t_x < n[2]):
            halo = _seen_halo((first[0], t_y, t_x), (t_y, t_x), n, WINDOW, CAUSAL)
            t_index = _bias_index(first[0], t_y, t_x, WINDOW)
            row = tl.load(q + _offset(first[0], t_y, t_x, residue, dilation, q_strides) + d, d < D, other=0.0)
            top = tl.full([], float("-inf"), ACC)
            total = tl.full([], 0.0, ACC)
            acc = tl.zeros([BLOCK_D], ACC)
            for i in range(WINDOW[0] * STEPS):
                u_z, u_y, u_x, seen = _step(i, halo, WINDOW[2], STEPS, BLOCK_N)
                keys = load_rows(k + _offset(u_z, u_y, u_x, residue, dilation, k_strides), seen, D, BLOCK_D)
                values = load_rows(v + _offset(u_z, u_y, u_x, residue, dilation, v_strides), seen, D, BLOCK_D)
                logits = tl.sum(keys.to(ACC) * row.to(ACC)[None, :], 1) * scale
                if HAS_BIAS:
                    index = _bias_index(u_z, u_y, u_x, WINDOW) - t_index
                    logits += tl.load(table + index, seen, other=0.0).to(ACC) * 1.4426950408889634
                logits = tl.where(seen, logits, float("-inf"))
                new_top = tl.maximum(top, tl.max(logits, 0))
                shift = tl.where(new_top == float("-inf"), 0.0, new_top)
                p = tl.exp2(logits - shift)
                decay = tl.exp2(top - shift)
                acc = acc * decay + tl.sum(p[:, None] * values.to(ACC), 0)
                total = total * decay + tl.sum(p, 0)
                top = new_top
            pixel = out + _offset(first[0], t_y, t_x, residue, dilation, out_strides)
            tl.store(pixel + d, (acc / total).to(out.dtype.element_ty), d < D)
        m += 1


@jit
def neighborhood_fwd(
    q, k, v, bias, out, lse, q_strides, k_strides, v_strides, out_strides,
    heads, shape, dilation, tiles, scale, scale_low,
    D: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr,
    PITCH: tl.constexpr, PLANES: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries. lse is the log-sum-exp in base 2, [B, Z, Y, X, h]."""
    b, head, first, residue, n = _place(tl.program_id(0), heads, shape, dilation, tiles, TILE)
    b, head = b.to(tl.int64), head.to(tl.int64)
    t_y, t_x, exist, last = _ranks(first, n, TILE)
    halo = _seen_halo(first, last, n, WINDOW, CAUSAL)
    q += b * q_strides[0] + head * q_strides[4]
    k += b * k_strides[0] + head * k_strides[4]
    v += b * v_strides[0] + head * v_strides[4]
    row = b * out_strides[0] + head * out_strides[4]
    out += row
    pixel = _offset(first[0], t_y, t_x, residue, dilation, out_strides)
    rows = load_rows(q + _offset(first[0], t_y, t_x, residue, dilation, q_strides), exist, D, BLOCK_D)
    table = _bias_table(bias, head, WINDOW)
    t_index = _bias_index(first[0], t_y, t_x, WINDOW)
    scale = tl.full([], scale, ACC) + tl.full([], scale_low, ACC)
    top = tl.full([TILE[0] * TILE[1]], float("-inf"), ACC)
    total = tl.zeros([TILE[0] * TILE[1]], ACC)
    acc = tl.zeros([TILE[0] * TILE[1], BLOCK_D], ACC)
    for i in range(PLANES * STEPS):
        u_z, u_y, u_x, needed = _step(i, halo, PITCH, STEPS, BLOCK_N)
        keys = load_rows(k + _offset(u_z, u_y, u_x, residue, dilation, k_strides), needed, D, BLOCK_D)
        values = load_rows(v + _offset(u_z, u_y, u_x, residue, dilation, v_strides), needed, D, BLOCK_D)
        seen = _seen(u_y[None, :], u_x[None, :], t_y[:, None], t_x[:, None], n, WINDOW, CAUSAL) & needed[None, :]
        index = _bias_index(u_z, u_y, u_x, WINDOW)[None, :] - t_index[:, None]
        logits = _logits(rows, keys, table, index, seen, scale, HAS_BIAS, ACC, PRECISION)
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a query may see nothing of the first steps
        p = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(top - shift)
        acc = acc * decay[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION, out_dtype=ACC)
        total = total * decay + tl.sum(p, 1)
        top = new_top
    acc = acc / total[:, None]
    top += tl.log2(total)
    store_rows(out + pixel, acc, exist, D, BLOCK_D)
    tl.store(lse + (row + pixel) // D, top, exist)
    # A probability of 0 times a NaN or Inf in v is NaN for all queries of the tile, also those that do not see it.
    if tl.max(tl.where((acc - acc == 0) | (exist == 0)[:, None], 0, 1)) > 0:
        _one_by_one(
            q, k, v, table, out, q_strides, k_strides, v_strides, out_strides,
            first, residue, n, dilation, scale, D, WINDOW, CAUSAL, HAS_BIAS, TILE, BLOCK_N, BLOCK_D, ACC,
        )  # fmt: skip


@jit
def neighborhood_bwd_dq(
    grad, q, k, v, bias, out, lse, delta, dq, bias_parts,
    grad_strides, q_strides, k_strides, v_strides, out_strides,
    heads, shape, dilation, tiles, scale, scale_low,
    D: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr,
    PITCH: tl.constexpr, PLANES: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BINS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries: dq, delta (the products of rows of grad and out) for the gradient of k, the bias gradient.

    Its part of the bias gradient, in bias_parts [programs, 2 * K - 1, BINS, BLOCK_N], needs a last sum: columns are
    rows r of the halo by offsets along x, r is to be added to the bin to get the offset along y.
    """
    program = tl.program_id(0)
    b, head, first, residue, n = _place(program, heads, shape, dilation, tiles, TILE)
    b, head = b.to(tl.int64), head.to(tl.int64)
    t_y, t_x, exist, last = _ranks(first, n, TILE)
    halo = _seen_halo(first, last, n, WINDOW, CAUSAL)
    grad += b * grad_strides[0] + head * grad_strides[4]
    grad += _offset(first[0], t_y, t_x, residue, dilation, grad_strides)
    q += b * q_strides[0] + head * q_strides[4] + _offset(first[0], t_y, t_x, residue, dilation, q_strides)
    k += b * k_strides[0] + head * k_strides[4]
    v += b * v_strides[0] + head * v_strides[4]
    pixel = b * out_strides[0] + head * out_strides[4] + _offset(first[0], t_y, t_x, residue, dilation, out_strides)
    grads = load_rows(grad, exist, D, BLOCK_D)
    deltas = tl.sum(grads.to(ACC) * load_rows(out + pixel, exist, D, BLOCK_D).to(ACC), 1)
    tl.store(delta + pixel // D, deltas, exist)
    rows = load_rows(q, exist, D, BLOCK_D)
    log_sums = tl.load(lse + pixel // D, exist, other=0.0)
    table = _bias_table(bias, head, WINDOW)
    t_index = _bias_index(first[0], t_y, t_x, WINDOW)
    scale = tl.full([], scale, ACC) + tl.full([], scale_low, ACC)
    acc = tl.zeros([TILE[0] * TILE[1], BLOCK_D], ACC)
    if BINS > 0:
        j = tl.arange(0, BLOCK_N)
        m = tl.arange(0, TILE[0] * TILE[1])
        # Column j of the sheared gradient holds the key that is j % PITCH - (K - 1) right of the query.
        sheared = (j % PITCH)[None, :] + (first[2] + m % TILE[1] - halo[0][2] - (WINDOW[2] - 1))[:, None]
        sheared = (j // PITCH * PITCH)[None, :] + (sheared & (PITCH - 1))
        bins = tl.arange(0, BINS)[:, None] + (first[1] + m // TILE[1] - halo[0][1])[None, :]
        bins -= BLOCK_N // PITCH - 1 + WINDOW[1] - 1
        part = bias_parts + program.to(tl.int64) * (2 * WINDOW[0] - 1) * BINS * BLOCK_N
        part += tl.arange(0, BINS)[:, None] * BLOCK_N + j[None, :]
        sums = tl.zeros([BINS, BLOCK_N], ACC)
    for i in range(PLANES * STEPS):
        u_z, u_y, u_x, needed = _step(i, halo, PITCH, STEPS, BLOCK_N)
        keys = load_rows(k + _offset(u_z, u_y, u_x, residue, dilation, k_strides), needed, D, BLOCK_D)
        values = load_rows(v + _offset(u_z, u_y, u_x, residue, dilation, v_strides), needed, D, BLOCK_D)
        seen = _seen(u_y[None, :], u_x[None, :], t_y[:, None], t_x[:, None], n, WINDOW, CAUSAL) & needed[None, :]
        index = _bias_index(u_z, u_y, u_x, WINDOW)[None, :] - t_index[:, None]
        logits = _logits(rows, keys, table, index, seen, scale, HAS_BIAS, ACC, PRECISION)
        p = tl.exp2(logits - log_sums[:, None])
        dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION, out_dtype=ACC)
        ds = tl.where(seen & exist[:, None], p * (dp - deltas[:, None]), 0.0).to(keys.dtype)
        acc += tl.dot(ds, keys, input_precision=PRECISION, out_dtype=ACC)
        if BINS > 0:
            shift = i % STEPS * (BLOCK_N // PITCH)
            chosen = (bins == shift).to(ds.dtype)
            sums += tl.dot(chosen, tl.gather(ds, sheared, 1), input_precision=PRECISION, out_dtype=ACC)
            if WINDOW[0] > 1:
                if (i % STEPS == STEPS - 1) & (u_z <= halo[1][0]):
                    tl.store(part + (u_z - first[0] + WINDOW[0] - 1) * BINS * BLOCK_N, sums)
                    sums = tl.zeros([BINS, BLOCK_N], ACC)
    store_rows(dq + pixel, acc * (scale * 0.6931471805599453), exist, D, BLOCK_D)
    if BINS > 0:
        if WINDOW[0] == 1:
            tl.store(part, sums)


@jit
def neighborhood_bwd_dkv(
    grad, q, k, v, bias, lse, delta, dk, dv, grad_strides, q_strides, k_strides, v_strides, out_strides,
    heads, shape, dilation, tiles, scale, scale_low,
    D: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr,
    PITCH: tl.constexpr, PLANES: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys; its halo are the queries that see any of them, more of them near a border."""
    b, head, first, residue, n = _place(tl.program_id(0), heads, shape, dilation, tiles, TILE)
    b, head = b.to(tl.int64), head.to(tl.int64)
    u_y, u_x, exist, last = _ranks(first, n, TILE)
    start_z, stop_z = _viewers(first[0], first[0], n[0], WINDOW[0], CAUSAL[0])
    start_y, stop_y = _viewers(first[1], last[0], n[1], WINDOW[1], CAUSAL[1])
    start_x, stop_x = _viewers(first[2], last[1], n[2], WINDOW[2], CAUSAL[2])
    halo = (start_z, start_y, start_x), (stop_z, stop_y, stop_x)
    grad += b * grad_strides[0] + head * grad_strides[4]
    q += b * q_strides[0] + head * q_strides[4]
    k += b * k_strides[0] + head * k_strides[4] + _offset(first[0], u_y, u_x, residue, dilation, k_strides)
    v += b * v_strides[0] + head * v_strides[4] + _offset(first[0], u_y, u_x, residue, dilation, v_strides)
    out = b * out_strides[0] + head * out_strides[4]
    keys, values = load_rows(k, exist, D, BLOCK_D), load_rows(v, exist, D, BLOCK_D)
    table = _bias_table(bias, head, WINDOW)
    u_index = _bias_index(first[0], u_y, u_x, WINDOW)
    scale = tl.full([], scale, ACC) + tl.full([], scale_low, ACC)
    acc_k = tl.zeros([TILE[0] * TILE[1], BLOCK_D], ACC)
    acc_v = tl.zeros([TILE[0] * TILE[1], BLOCK_D], ACC)
    for i in range(PLANES * STEPS):
        t_z, t_y, t_x, needed = _step(i, halo, PITCH, STEPS, BLOCK_N)
        rows = load_rows(q + _offset(t_z, t_y, t_x, residue, dilation, q_strides), needed, D, BLOCK_D)
        grads = load_rows(grad + _offset(t_z, t_y, t_x, residue, dilation, grad_strides), needed, D, BLOCK_D)
        row = (out + _offset(t_z, t_y, t_x, residue, dilation, out_strides)) // D
        log_sums = tl.load(lse + row, needed, other=0.0)
        deltas = tl.load(delta + row, needed, other=0.0)
        seen = _seen(u_y[:, None], u_x[:, None], t_y[None, :], t_x[None, :], n, WINDOW, CAUSAL) & needed[None, :]
        index = u_index[:, None] - _bias_index(t_z, t_y, t_x, WINDOW)[None, :]
        logits = _logits(keys, rows, table, index, seen, scale, HAS_BIAS, ACC, PRECISION)
        p = tl.exp2(logits - log_sums[None, :])
        acc_v += tl.dot(p.to(grads.dtype), grads, input_precision=PRECISION, out_dtype=ACC)
        dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION, out_dtype=ACC)
        ds = tl.where(seen, p * (dp - deltas[None, :]), 0.0).to(rows.dtype)
        acc_k += tl.dot(ds, rows, input_precision=PRECISION, out_dtype=ACC)
    pixel = out + _offset(first[0], u_y, u_x, residue, dilation, out_strides)
    store_rows(dk + pixel, acc_k * (scale * 0.6931471805599453), exist, D, BLOCK_D)
    store_rows(dv + pixel, acc_v, exist, D, BLOCK_D)
