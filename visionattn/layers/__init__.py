"""Building blocks that several families share: blocks, norms, patch embeddings, token merging, timm's switches.

They are made of timm's layers and the operators of ``visionattn.kernels``, and know no attention and no network.
"""
