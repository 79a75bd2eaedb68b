"""Aggregated attention of TransNeXt: a neighborhood and a pooled map in one softmax."""

from visionattn.kernels.aggregated.op import aggregated_attention, seen_neighbors

__all__ = ["aggregated_attention", "seen_neighbors"]
