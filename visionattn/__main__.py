"""``python -m visionattn`` is the command ``visionattn``."""

from visionattn.weights.commands.cli import main

if __name__ == "__main__":
    main()
