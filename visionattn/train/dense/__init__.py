"""Segmentation and detection with any timm backbone: the tasks, their networks, and prediction with them."""
