"""The command ``visionattn-train``, and ``train.py``: what is to be done before PyTorch is imported.

It lies outside of the package, whose import brings PyTorch.
"""

import gc
import os
import sys

# Threads that wait for others by spinning take most of a busy machine's time, those of the run itself included. OpenMP
# reads this when PyTorch is imported; it changes no result.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HELP = """\
usage: {program} [-h] {{fit,validate,test,predict}} ...

  fit         Train a model, validate it after every epoch and keep the best and the last checkpoint.
  validate    Measure a model on the validation images.
  test        Measure a model on the test images.
  predict     Classify image files, or draw what a segmenter or a detector finds in them.

{program} fit --help lists the settings of a run; with --print_config it prints those that it would have.
"""


def main(args: list[str] | None = None) -> None:
    """Run one command of the trainer.

    Args:
        args: The command line, without the program; ``sys.argv`` if not given.
    """
    arguments = sys.argv[1:] if args is None else args
    if arguments in ([], ["-h"], ["--help"]):  # no reason to load all that a run needs
        print(HELP.format(program=os.path.basename(sys.argv[0])), end="", file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    gc.disable()  # what is imported stays: looking for garbage in it takes a fifth of the time
    from visionattn.train.cli import main as run

    gc.freeze()
    gc.enable()
    run(args)
