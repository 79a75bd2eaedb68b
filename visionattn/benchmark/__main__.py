"""Entry point of ``python -m visionattn.benchmark``."""

import sys

from visionattn.benchmark.cli import main

if __name__ == "__main__":
    sys.exit(main())
