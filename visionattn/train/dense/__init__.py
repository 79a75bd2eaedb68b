"""Networks for dense tasks: segmentation heads and torchvision's detectors on any timm backbone."""
