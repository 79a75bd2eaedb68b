"""Neighborhood attention: reference against loops, the PyTorch path against the reference."""

import itertools

import pytest
import torch

from visionattn.kernels import neighborhood_attention
from visionattn.kernels._windows import axis_windows

# B, spatial, h, D, kernel_size, dilation, is_causal
LOOPS = [
    (2, (10,), 2, 4, 3, 1, False),
    (1, (11,), 1, 3, 3, 2, False),
    (1, (9,), 1, 3, 3, 3, False),
    (1, (12,), 2, 3, 4, 2, False),
    (1, (8,), 1, 4, 3, 2, True),
    (1, (5,), 1, 4, 1, 2, False),
    (1, (5, 7), 2, 4, 3, 1, False),
    (1, (7, 8), 1, 3, (3, 5), (2, 1), False),
    (1, (6, 5), 1, 3, 3, 1, (True, False)),
    (1, (7, 5), 1, 3, (2, 3), (3, 1), (False, True)),
    (1, (3, 5, 4), 1, 2, (3, 3, 2), (1, 1, 2), False),
    (1, (4, 4, 5), 1, 2, (2, 3, 2), (2, 1, 1), (False, True, False)),
]


def tensors(B, spatial, h, D, K, biased=True, dtype=torch.float32, scale=1.0):
    shape = (B, *spatial, h, D)
    sides = K if isinstance(K, tuple) else (K,) * len(spatial)
    made = [torch.randn(shape) for _ in range(3)]
    if biased:
        made.append(torch.randn(h, *(2 * side - 1 for side in sides)))
    return [(t * scale).to(dtype).requires_grad_() for t in made]


def call(inputs, K, d, causal, backend=None, **kwargs):
    q, k, v, *bias = inputs
    return neighborhood_attention(q, k, v, K, d, *bias, is_causal=causal, backend=backend, **kwargs)


def seen(i, L, K, d, causal):
    """Key positions of a query on an axis, by counting: the window is moved one step at a time until it fits."""
    group = range(i % d, L, d)
    rank = list(group).index(i)
    if causal:
        return [group[r] for r in range(rank - K + 1, rank + 1) if r >= 0]
    first = rank - K // 2
    while first < 0:
        first += 1
    while first + K > len(group):
        first -= 1
    return [group[r] for r in range(first, first + K)]


def loops(q, k, v, K, d, bias, causal, scale):
    B, *spatial, h, D = q.shape
    axes = len(spatial)
    K, d, causal = (t if isinstance(t, tuple) else (t,) * axes for t in (K, d, causal))
    out = torch.zeros_like(q)
    for b, head in itertools.product(range(B), range(h)):
        for i in itertools.product(*map(range, spatial)):
            keys = list(itertools.product(*(seen(i[a], spatial[a], K[a], d[a], causal[a]) for a in range(axes))))
            logits = []
            for j in keys:
                logit = (q[(b, *i, head)] * k[(b, *j, head)]).sum() * scale
                if bias is not None:
                    logit = logit + bias[(head, *((j[a] - i[a]) // d[a] + K[a] - 1 for a in range(axes)))]
                logits.append(logit)
            weights = torch.stack(logits).softmax(0)
            out[(b, *i, head)] = sum(w * v[(b, *j, head)] for w, j in zip(weights, keys, strict=True))
    return out


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("case", LOOPS, ids=str)
def test_reference_equals_loops(case, biased):
    *shape, K, d, causal = case
    inputs = [t.detach() for t in tensors(*shape, K, biased, torch.float64)]
    out = call(inputs, K, d, causal, "reference", scale=0.7)
    torch.testing.assert_close(out, loops(*inputs[:3], K, d, inputs[3] if biased else None, causal, 0.7))


@pytest.mark.parametrize(
    ("length", "K", "d", "first_keys", "first_offsets"),
    [  # worked out by hand
        (10, 3, 1, "0 0 1 2 3 4 5 6 7 7", "2 1 1 1 1 1 1 1 1 0"),
        (9, 3, 2, "0 1 0 1 2 3 4 3 4", "2 2 1 1 1 1 1 0 0"),
        (11, 3, 2, "0 1 0 1 2 3 4 5 6 5 6", "2 2 1 1 1 1 1 1 1 0 0"),
        (16, 7, 2, "0 1 0 1 0 1 0 1 2 3 2 3 2 3 2 3", "6 6 5 5 4 4 3 3 3 3 2 2 1 1 0 0"),
    ],
)
def test_windows_move_inwards_at_borders(length, K, d, first_keys, first_offsets):
    keys, offsets, exists = axis_windows(length, K, d, False, torch.device("cpu"))
    assert keys[:, 0].tolist() == [int(n) for n in first_keys.split()]
    assert offsets[:, 0].tolist() == [int(n) for n in first_offsets.split()]
    assert exists.all()
