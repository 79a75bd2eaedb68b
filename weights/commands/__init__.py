"""What one does with checkpoints: list, translate, check, publish; the command ``visionattn weights``."""
