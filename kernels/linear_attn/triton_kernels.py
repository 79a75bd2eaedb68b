"""The kernels that ``triton.py`` launches: one pass over keys and one over queries, forward and backward.

Shapes: B batch, N queries, M keys, h heads, D features, V width of a value. Strides are those of B, N, h.
Features are worked on as two halves, the even ones and the odd ones, so that a rotation of adjacent pairs needs no
exchange between threads. All sums are formed in ACC; sums over tokens are split and added up in a fixed order.

    state = sum_j w_j R phi(k_j)^T v_j,   s = sum_j w_j phi(k_j),   m = mean_j v_j
    t = phi(q) . s,   out = ((R phi(q) state) a(t) + m b(t) + residual) * gate
"""

from __future__ import annotations

from visionattn.kernels.common.jit import jit, tl


@jit
def _mapped(x, MAP: tl.constexpr):
    """A feature map. NaN stays NaN."""
    if MAP == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif MAP == "relu2":
        x = tl.where(x < 0, 0.0, x * x)
    elif MAP == "elu+1":
        x = tl.where(x > 0, x + 1, tl.exp(x))
    elif MAP == "exp":
        x = tl.exp(tl.where(x > 30.0, 30.0, x))
    return x


@jit
def _slope(x, MAP: tl.constexpr):
    """The derivative of a feature map."""
    if MAP == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    elif MAP == "relu2":
        y = tl.where(x > 0, 2 * x, 0.0)
    elif MAP == "elu+1":
        y = tl.where(x > 0, 1.0, tl.exp(x))
    elif MAP == "exp":
        y = tl.where(x > 30.0, 0.0, tl.exp(x))
    else:
        y = tl.full(x.shape, 1.0, x.dtype)
    return y.to(x.dtype)


@jit
def _rotated(a, b, cos, sin):
    return a * cos - b * sin, b * cos + a * sin


@jit
def _halves(x, n, d, step, inside, ACC: tl.constexpr):
    """The even and the odd features of tokens."""
    at = x + n.to(tl.int64)[:, None] * step + 2 * d[None, :]
    return tl.load(at, inside, other=0.0).to(ACC), tl.load(at + 1, inside, other=0.0).to(ACC)


@jit
def _angles(cos, sin, n, d, inside, D: tl.constexpr, ACC: tl.constexpr):
    at = n.to(tl.int64)[:, None] * (D // 2) + d[None, :]
    return tl.load(cos + at, inside, other=0.0).to(ACC), tl.load(sin + at, inside, other=0.0).to(ACC)


@jit
def _tile(x, rows, columns, inside, ACC: tl.constexpr):
    return tl.load(x + rows[:, None] + columns[None, :], inside, other=0.0).to(ACC)


@jit
def _sum(high, low, ACC: tl.constexpr):
    """A number that is given as two of float32."""
    return tl.full([], high, ACC) + tl.full([], low, ACC)


@jit
def _coefficients(t, scale, eps, count, NORMALIZER: tl.constexpr):
    """a(t), b(t) and their derivatives."""
    part = scale / count
    a = t * 0.0 + part
    b, slope_a, slope_b = t * 0.0, t * 0.0, t * 0.0
    if NORMALIZER == "none":
        a = t * 0.0 + scale
    elif NORMALIZER == "inline":
        b, slope_b = 1 - t * part, slope_b - part
    else:
        share = t * part if NORMALIZER == "magnitude" else t if NORMALIZER == "sum" else t / count
        divisor = share + eps
        small = tl.abs(divisor) < eps
        inverse = 1 / tl.where(small, tl.where(divisor < 0, -eps, eps), divisor)
        square = tl.where(small, 0.0, inverse * inverse)
        if NORMALIZER == "sum":
            a, slope_a = inverse, -square
        elif NORMALIZER == "mean":
            a, slope_a = inverse / count, -square / (count * count)
        else:
            a, slope_a = part * (1 + inverse), -square * part * part
            b, slope_b = -share, slope_b - part
    return a, b, slope_a, slope_b


@jit
def linear_keys(
    k, v, weights, cos, sin, state, key_sum, value_sum, k_strides, v_strides, w_strides, heads, M,
    D: tl.constexpr, V: tl.constexpr, MAP: tl.constexpr, ROTARY: tl.constexpr, WEIGHTED: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What STEPS * BLOCK_N keys add to a head's state, to its sum of keys and to its sum of values."""
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = program // heads, program % heads
    k += batch * k_strides[0] + head * k_strides[2]
    v += batch * v_strides[0] + head * v_strides[2]
    weights += batch * w_strides[0] + head * w_strides[2]
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    even, odd = tl.zeros([BLOCK_D, BLOCK_V], ACC), tl.zeros([BLOCK_D, BLOCK_V], ACC)
    even_sum, odd_sum, values = tl.zeros([BLOCK_D], ACC), tl.zeros([BLOCK_D], ACC), tl.zeros([BLOCK_V], ACC)
    for i in range(STEPS):
        n = (part * STEPS + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (n < M)[:, None] & (d < D // 2)[None, :]
        a, b = _halves(k, n, d, k_strides[1], inside, ACC)
        a, b = tl.where(inside, _mapped(a, MAP), 0.0), tl.where(inside, _mapped(b, MAP), 0.0)
        if WEIGHTED:
            w = tl.load(weights + n.to(tl.int64) * w_strides[1], n < M, other=0.0).to(ACC)[:, None]
            a, b = a * w, b * w
        even_sum += tl.sum(a, 0)
        odd_sum += tl.sum(b, 0)
        if ROTARY:
            a, b = _rotated(a, b, *_angles(cos, sin, n, d, inside, D, ACC))
        x = _tile(v, n.to(tl.int64) * v_strides[1], c, (n < M)[:, None] & (c < V)[None, :], ACC)
        values += tl.sum(x, 0)
        even += tl.dot(tl.trans(a), x, input_precision=PRECISION, out_dtype=ACC)
        odd += tl.dot(tl.trans(b), x, input_precision=PRECISION, out_dtype=ACC)
    place = part * tl.num_programs(0).to(tl.int64) + program
    _store_sums(state, key_sum, value_sum, place, d, c, even, odd, even_sum, odd_sum, values, D, V)


@jit
def _store_sums(
    state, key_sum, value_sum, place, d, c, even, odd, even_sum, odd_sum, values, D: tl.constexpr, V: tl.constexpr
):
    inside = (d < D // 2)[:, None] & (c < V)[None, :]
    at = state + place * (D * V) + 2 * d[:, None] * V + c[None, :]
    tl.store(at, even, inside)
    tl.store(at + V, odd, inside)
    tl.store(key_sum + place * D + 2 * d, even_sum, d < D // 2)
    tl.store(key_sum + place * D + 2 * d + 1, odd_sum, d < D // 2)
    tl.store(value_sum + place * V + c, values, c < V)


@jit
def _load_sums(state, key_sum, program, d, c, D: tl.constexpr, V: tl.constexpr):
    inside = (d < D // 2)[:, None] & (c < V)[None, :]
    at = state + program * (D * V) + 2 * d[:, None] * V + c[None, :]
    even, odd = tl.load(at, inside, other=0.0), tl.load(at + V, inside, other=0.0)
    at = key_sum + program * D + 2 * d
    return even, odd, tl.load(at, d < D // 2, other=0.0), tl.load(at + 1, d < D // 2, other=0.0)


@jit
def linear_queries(
    q, cos, sin, state, key_sum, value_mean, residual, gate, out, q_strides, r_strides, g_strides,
    heads, N, M, scale, scale_low, eps, eps_low,
    D: tl.constexpr, V: tl.constexpr, MAP: tl.constexpr, NORMALIZER: tl.constexpr, ROTARY: tl.constexpr,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The results of BLOCK_N queries of a head; out is contiguous."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // heads, program % heads
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    inside = (n < N)[:, None] & (d < D // 2)[None, :]
    a, b = _halves(q + batch * q_strides[0] + head * q_strides[2], n, d, q_strides[1], inside, ACC)
    a, b = tl.where(inside, _mapped(a, MAP), 0.0), tl.where(inside, _mapped(b, MAP), 0.0)
    even, odd, even_sum, odd_sum = _load_sums(state, key_sum, program, d, c, D, V)
    t = tl.sum(a * even_sum[None, :] + b * odd_sum[None, :], 1)
    if ROTARY:
        a, b = _rotated(a, b, *_angles(cos, sin, n, d, inside, D, ACC))
    y = tl.dot(a, even, input_precision=PRECISION, out_dtype=ACC)
    y += tl.dot(b, odd, input_precision=PRECISION, out_dtype=ACC)
    scale, eps = _sum(scale, scale_low, ACC), _sum(eps, eps_low, ACC)
    factor, shift, _, _ = _coefficients(t, scale, eps, M, NORMALIZER)
    mean = tl.load(value_mean + program * V + c, c < V, other=0.0)
    y = y * factor[:, None] + shift[:, None] * mean[None, :]
    inside = (n < N)[:, None] & (c < V)[None, :]
    n = n.to(tl.int64)
    if RESIDUAL:
        y += _tile(residual + batch * r_strides[0] + head * r_strides[2], n * r_strides[1], c, inside, ACC)
    if GATE:
        y *= _tile(gate + batch * g_strides[0] + head * g_strides[2], n * g_strides[1], c, inside, ACC)
    at = out + ((batch * N + n)[:, None] * heads + head) * V + c[None, :]
    tl.store(at, y.to(out.dtype.element_ty), inside)


@jit
def linear_queries_bwd(
    grad, q, cos, sin, state, key_sum, value_mean, residual, gate, dq, dgate, dstate, dkey_sum, dvalue_sum,
    o_strides, q_strides, r_strides, g_strides, heads, N, M, scale, scale_low, eps, eps_low,
    D: tl.constexpr, V: tl.constexpr, MAP: tl.constexpr, NORMALIZER: tl.constexpr, ROTARY: tl.constexpr,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of STEPS * BLOCK_N queries and gates, and what they add to those of the sums; dq, dgate contiguous."""
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = program // heads, program % heads
    q += batch * q_strides[0] + head * q_strides[2]
    grad += batch * o_strides[0] + head * o_strides[2]
    residual += batch * r_strides[0] + head * r_strides[2]
    gate += batch * g_strides[0] + head * g_strides[2]
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    even, odd, even_sum, odd_sum = _load_sums(state, key_sum, program, d, c, D, V)
    mean = tl.load(value_mean + program * V + c, c < V, other=0.0)
    scale, eps = _sum(scale, scale_low, ACC), _sum(eps, eps_low, ACC)
    deven, dodd = tl.zeros([BLOCK_D, BLOCK_V], ACC), tl.zeros([BLOCK_D, BLOCK_V], ACC)
    deven_sum, dodd_sum, dmean = tl.zeros([BLOCK_D], ACC), tl.zeros([BLOCK_D], ACC), tl.zeros([BLOCK_V], ACC)
    for i in range(STEPS):
        n = (part * STEPS + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = n.to(tl.int64)
        inside = (n < N)[:, None] & (d < D // 2)[None, :]
        inside_v = (n < N)[:, None] & (c < V)[None, :]
        raw_a, raw_b = _halves(q, n, d, q_strides[1], inside, ACC)
        straight_a = tl.where(inside, _mapped(raw_a, MAP), 0.0)
        straight_b = tl.where(inside, _mapped(raw_b, MAP), 0.0)
        t = tl.sum(straight_a * even_sum[None, :] + straight_b * odd_sum[None, :], 1)
        factor, shift, slope, shift_slope = _coefficients(t, scale, eps, M, NORMALIZER)
        a, b = straight_a, straight_b
        if ROTARY:
            cosine, sine = _angles(cos, sin, n, d, inside, D, ACC)
            a, b = _rotated(a, b, cosine, sine)
        y = tl.dot(a, even, input_precision=PRECISION, out_dtype=ACC)
        y += tl.dot(b, odd, input_precision=PRECISION, out_dtype=ACC)
        g = _tile(grad, row * o_strides[1], c, inside_v, ACC)
        at = ((batch * N + row)[:, None] * heads + head) * V + c[None, :]
        if GATE:
            total = y * factor[:, None] + shift[:, None] * mean[None, :]
            if RESIDUAL:
                total += _tile(residual, row * r_strides[1], c, inside_v, ACC)
            tl.store(dgate + at, (g * total).to(dgate.dtype.element_ty), inside_v)
            g *= _tile(gate, row * g_strides[1], c, inside_v, ACC)
        dt = tl.sum(g * y, 1) * slope + tl.sum(g * mean[None, :], 1) * shift_slope
        dmean += tl.sum(g * shift[:, None], 0)
        g *= factor[:, None]
        deven += tl.dot(tl.trans(a), g, input_precision=PRECISION, out_dtype=ACC)
        dodd += tl.dot(tl.trans(b), g, input_precision=PRECISION, out_dtype=ACC)
        deven_sum += tl.sum(straight_a * dt[:, None], 0)
        dodd_sum += tl.sum(straight_b * dt[:, None], 0)
        da = tl.dot(g, tl.trans(even), input_precision=PRECISION, out_dtype=ACC)
        db = tl.dot(g, tl.trans(odd), input_precision=PRECISION, out_dtype=ACC)
        if ROTARY:
            da, db = _rotated(da, db, cosine, -sine)
        da = (da + dt[:, None] * even_sum[None, :]) * _slope(raw_a, MAP)
        db = (db + dt[:, None] * odd_sum[None, :]) * _slope(raw_b, MAP)
        at = dq + ((batch * N + row)[:, None] * heads + head) * D + 2 * d[None, :]
        tl.store(at, da.to(dq.dtype.element_ty), inside)
        tl.store(at + 1, db.to(dq.dtype.element_ty), inside)
    place = part * tl.num_programs(0).to(tl.int64) + program
    _store_sums(dstate, dkey_sum, dvalue_sum, place, d, c, deven, dodd, deven_sum, dodd_sum, dmean, D, V)


@jit
def linear_keys_bwd(
    k, v, weights, cos, sin, dstate, dkey_sum, dvalue_mean, dk, dv, dweights, k_strides, v_strides, w_strides, heads, M,
    D: tl.constexpr, V: tl.constexpr, MAP: tl.constexpr, ROTARY: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys, values and weights, all contiguous."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // heads, program % heads
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    inside = (n < M)[:, None] & (d < D // 2)[None, :]
    inside_v = (n < M)[:, None] & (c < V)[None, :]
    raw_a, raw_b = _halves(k + batch * k_strides[0] + head * k_strides[2], n, d, k_strides[1], inside, ACC)
    a, b = tl.where(inside, _mapped(raw_a, MAP), 0.0), tl.where(inside, _mapped(raw_b, MAP), 0.0)
    x = _tile(v + batch * v_strides[0] + head * v_strides[2], row * v_strides[1], c, inside_v, ACC)
    deven, dodd, deven_sum, dodd_sum = _load_sums(dstate, dkey_sum, program, d, c, D, V)
    da = tl.dot(x, tl.trans(deven), input_precision=PRECISION, out_dtype=ACC)
    db = tl.dot(x, tl.trans(dodd), input_precision=PRECISION, out_dtype=ACC)
    straight_a, straight_b = a, b
    if ROTARY:
        cosine, sine = _angles(cos, sin, n, d, inside, D, ACC)
        a, b = _rotated(a, b, cosine, sine)
        da, db = _rotated(da, db, cosine, -sine)
    da += deven_sum[None, :]
    db += dodd_sum[None, :]
    dx = tl.dot(a, deven, input_precision=PRECISION, out_dtype=ACC)
    dx += tl.dot(b, dodd, input_precision=PRECISION, out_dtype=ACC)
    at = (batch * M + row) * heads + head
    if WEIGHTED:
        dw = tl.sum(straight_a * da + straight_b * db, 1)
        tl.store(dweights + at, dw.to(dweights.dtype.element_ty), n < M)
        weights += batch * w_strides[0] + head * w_strides[2]
        w = tl.load(weights + row * w_strides[1], n < M, other=0.0).to(ACC)[:, None]
        da, db, dx = da * w, db * w, dx * w
    dx += tl.load(dvalue_mean + program * V + c, c < V, other=0.0)[None, :]
    tl.store(dv + at[:, None] * V + c[None, :], dx.to(dv.dtype.element_ty), inside_v)
    at = dk + at[:, None] * D + 2 * d[None, :]
    tl.store(at, (da * _slope(raw_a, MAP)).to(dk.dtype.element_ty), inside)
    tl.store(at + 1, (db * _slope(raw_b, MAP)).to(dk.dtype.element_ty), inside)
