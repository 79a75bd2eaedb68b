"""What the Triton cases of several operators share."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes nonsense in bfloat16.
DTYPES = [torch.float32, torch.float64, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
# Of attention, whose sums have another order than the reference's. Half precision: probabilities are rounded before the
# product with v, and the gradient of the logits before that with q and k.
ATTENTION_TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
