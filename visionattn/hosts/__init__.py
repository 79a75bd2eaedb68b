"""Well-known networks whose blocks take any ``Mixer`` of ``visionattn.attention``; one host a file."""

from visionattn.hosts.cswin import CSwin
from visionattn.hosts.deit import DeiT, DeiTGrid
from visionattn.hosts.pvt import PVT, ClassTokenPVT, PVTv2
from visionattn.hosts.swin import Swin

__all__ = ["CSwin", "ClassTokenPVT", "DeiT", "DeiTGrid", "PVT", "PVTv2", "Swin"]
