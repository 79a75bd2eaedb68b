"""``python -m visionattn`` is the command ``visionattn``."""

from visionattn.zoo.cli import main

if __name__ == "__main__":
    main()
