"""Published weights, from the manifest to a network and out of a run: the path of a file is the order of this list.

manifest    which checkpoints exist, where they lie, how their images are prepared
places      where files lie on this machine
locate      from a model's name to a file on this machine
connect     the connection to a server that may be slow, broken or of ill will
download    fetching it so that a half, wrong or foreign file never gets its name
seen        that a download stays what it was when it was first of use
files       what a file is by its first bytes, before any reader is let near it
read        tensors out of a stranger's file, of which nothing runs
legacy      what files of old PyTorch claim to hold
numbers     NumPy's numbers in them, which NumPy itself must not read
limits      what they may say beside their tensors
rename      from the parameter names of a release to ours
families    which function renames a model's releases
load        into a network that is there, completely or not at all
pretrained  the whole path for ``timm.create_model(name, pretrained=True)``
card        what a file of ours says about its model, and that model from it
export      out of a run, as one file that is enough to build and load the model
commands/   all of it from the command line: ``visionattn weights``

options     what a user may change about downloads
errors      the one exception of all of them
"""

from visionattn.weights.errors import WeightsError
from visionattn.weights.manifest import checkpoints, link, pretrained_cfgs

__all__ = ["WeightsError", "checkpoints", "link", "pretrained_cfgs"]
