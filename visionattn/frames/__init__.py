"""Frames of backbones: all of timm's contract, so that a family adds its blocks only.

``backbone.py`` has what every network does and the pyramid, whose maps shrink from stage to stage; ``isotropic.py`` the
network of a single resolution, as ViT.
"""
