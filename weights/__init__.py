"""Published weights, from the manifest to a network: the path of a file is the order of this list.

manifest    which checkpoints exist, where they lie, how their images are prepared
locate      from a model's name to a file on this machine
download    fetching it so that a half, wrong or foreign file never gets its name
read        tensors out of a stranger's file, of which nothing runs
rename      from the parameter names of a release to ours
load        into a network, completely or not at all
export      out of a run, as a file that a program can open
commands/   all of it from the command line: ``visionattn weights``
"""

from visionattn.weights.errors import WeightsError
from visionattn.weights.manifest import checkpoints, link, pretrained_cfgs

__all__ = ["WeightsError", "checkpoints", "link", "pretrained_cfgs"]
