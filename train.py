"""Train, validate, test and predict: ``python train.py fit -c configs/classify/van_digits.yaml``."""

import os

# Threads that wait for others by spinning take most of a busy machine's time, those of the run itself included. OpenMP
# reads this when PyTorch is imported; it changes no result.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from visionattn.train.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
