"""Feature maps for detectors and segmenters: any timm pyramid with what dense tasks ask of a backbone.

timm's ``features_only=True`` gives the maps. :class:`FeatureBackbone` adds a norm per output, frozen stages, gradient
checkpointing and loading of dense checkpoints; :class:`FPNBackbone` puts torchvision's feature pyramid on top, the
form in which torchvision's detectors take a backbone.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from visionattn.weights.families import release_filter
from visionattn.weights.load import unusable
from visionattn.weights.rename import unwrap

__all__ = ["FPNBackbone", "FeatureBackbone"]

# The authors' names of the norm of output 0: norm0 in NAT, LITv2 and Agent, extra_norms.0 in BiFormer and RAVLT.
OUTPUT_NORM = re.compile(r"^(?:norm|extra_norms\.)(\d)\.(weight|bias)$")


class FeatureBackbone(nn.Module):
    """The maps of a timm model, [B, C, H / stride, W / stride] each, at any image size.

    Args:
        name: Any timm model that has ``forward_intermediates``, which all of ours do.
        out_indices: Stages to return, counted from the finest; a number for the last so many.
        pretrained: Start from the published classification weights.
        output_norm: Layer norm over the channels of each output, as the dense backbones of many papers have: True for
            all outputs, or the stages that have one. The path between the stages stays as it is.
        output_norm_eps: Its epsilon, 1e-5 in most of them; 1e-6 in BiFormer, RAVLT and MAViT.
        frozen_stages: Number of stages, from the stem on, that do not learn and stay in evaluation mode; 0 for none.
        norm_eval: Keep the running statistics of batch norms as they are, for small batches.
        grad_checkpointing: Recompute activations in the backward pass instead of keeping them.
        **model_args: Passed to the model, such as ``drop_path_rate`` or ``in_chans``.

    Attributes:
        channels: Of each output.
        strides: Of each output.

    Raises:
        ValueError: If the model has no such stages, or cannot return maps of them.
    """

    def __init__(
        self,
        name: str,
        out_indices: int | Sequence[int] = 4,
        pretrained: bool = False,
        output_norm: bool | Sequence[int] = False,
        output_norm_eps: float = 1e-5,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        grad_checkpointing: bool = False,
        **model_args: Any,
    ) -> None:
        super().__init__()
        out_indices = out_indices if isinstance(out_indices, int) else tuple(out_indices)
        try:
            getter = timm.create_model(
                name, pretrained, features_only=True, feature_cls="getter", out_indices=out_indices, **model_args
            )
        except (AssertionError, AttributeError, IndexError) as error:
            raise ValueError(f"{name} has no feature maps at out_indices {out_indices}: {error}") from error
        self.name, self.model_args, self.norm_eval = name, model_args, norm_eval
        self.model, self.out_indices = getter.model, list(getter.out_indices)
        self.feature_info = getter.feature_info
        self.channels, self.strides = list(getter.feature_info.channels()), list(getter.feature_info.reduction())
        stages = self.out_indices if output_norm is True else list(output_norm or ())
        if unknown := [stage for stage in stages if stage not in self.out_indices]:
            raise ValueError(f"output_norm names stages {unknown}; the outputs are of stages {self.out_indices}")
        widths = dict(zip(self.out_indices, self.channels, strict=True))
        self.norms = nn.ModuleDict({str(i): LayerNorm2d(widths[i], eps=output_norm_eps) for i in stages})
        self.frozen = self._parts(frozen_stages)
        for part in self.frozen:
            self.model.get_submodule(part).requires_grad_(False)
        if grad_checkpointing:
            self.model.set_grad_checkpointing(True)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [B, in_chans, H, W] to the maps of ``out_indices``."""
        maps = self.model.forward_intermediates(x, indices=self.out_indices, intermediates_only=True)
        return [
            self.norms[str(i)](y) if str(i) in self.norms else y for i, y in zip(self.out_indices, maps, strict=True)
        ]

    def train(self, mode: bool = True) -> "FeatureBackbone":
        super().train(mode)
        for part in self.frozen:
            self.model.get_submodule(part).eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Parameters to keep from weight decay, as the model names them."""
        skip = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else set()
        return {f"model.{name}" for name in skip}

    def group_matcher(self, coarse: bool = False) -> dict:
        """The model's own groups for layer-wise learning-rate decay; the output norms belong to the last one."""
        return prefixed(self.model.group_matcher(coarse=coarse), "model")

    def load(self, state_dict: dict[str, Any]) -> None:
        """Load a classification model, or the backbone of the authors' detector or segmenter with its output norms.

        Args:
            state_dict: Ours, or a release that the model's ``checkpoint_filter_fn`` renames. A classifier and what
                lies behind the last output are left out; output norms that it does not have keep their values.

        Raises:
            ValueError: Naming what is missing, unexpected or of another shape; nothing is loaded then.
        """
        self.load_state_dict(self.state_dict() | self.fitted(state_dict))

    def fitted(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """What :meth:`load` loads, by the names of this module; raises as it does."""
        rename = release_filter(self.name, self.model)
        released = unwrap(state_dict)
        state = rename(dict(state_dict), self.model) if rename else released
        used = {id(value) for value in state.values()}
        norms = {}
        for key, value in released.items():
            norm = OUTPUT_NORM.match(key.removeprefix("backbone."))
            # A norm that the renaming keeps under another name is one of the main path, such as VAN's.
            if norm and key not in self.model.state_dict() and (key in state or id(value) not in used):
                norms[f"norms.{norm[1]}.{norm[2]}"] = value
        if norms and not len(self.norms):
            stages = sorted({int(key.split(".")[1]) for key in norms})
            raise ValueError(f"the weights have norms at the outputs of stages {stages}: ask for them with output_norm")
        state = {f"model.{key}": value for key, value in state.items() if not OUTPUT_NORM.match(key)} | norms
        own = self.state_dict()
        with torch.device("meta"):
            whole = {f"model.{key}" for key in timm.create_model(self.name, **self.model_args).state_dict()}
        state = {key: value for key, value in state.items() if key in own or key not in whole}
        if not any(key.startswith("norms.") for key in state):
            state |= {key: value for key, value in own.items() if key.startswith("norms.")}
        problems = [f"{key} is missing" for key in own if key not in state and not key.endswith("num_batches_tracked")]
        problems += [f"{key} is unexpected" for key in state if key not in own]
        problems += [
            f"{key} is {list(value.shape)}, here {list(own[key].shape)}"
            for key, value in state.items()
            if key in own and value.shape != own[key].shape
        ]
        problems = problems or unusable(state, own)
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(f"the weights do not fit {self.name}: {'; '.join(problems[:3])}{more}")
        return state

    def _parts(self, frozen_stages: int) -> list[str]:
        """Names of the modules from the stem to the last frozen stage."""
        info = self.model.feature_info
        stages = [entry["module"] for entry in info]
        if not 0 <= frozen_stages <= len(stages):
            raise ValueError(f"frozen_stages is {frozen_stages}; allowed are 0 to {len(stages)}")
        if not frozen_stages:
            return []
        children = [name for name, _ in self.model.named_children()]
        return children[: children.index(stages[0].split(".")[0])] + stages[:frozen_stages]


def prefixed(matcher: dict, prefix: str) -> dict:
    """A timm ``group_matcher`` for a model that has become the submodule ``prefix`` of another."""

    def rename(pattern: Any) -> Any:
        if isinstance(pattern, str):
            inside = re.sub(r"(^|[|])\^", r"\1", pattern)  # the model's own anchors
            return rf"^{prefix}\.(?:{inside})"
        if isinstance(pattern, tuple):
            return (rename(pattern[0]), *pattern[1:])
        return [rename(part) for part in pattern]

    return {key: rename(value) for key, value in matcher.items()}


class FPNBackbone(nn.Module):
    """A feature pyramid (Lin et al. 2017) on any backbone, for torchvision's detectors.

    Args:
        features: Gives maps whose strides double from one to the next.
        out_channels: Channels of every level.
        extra: Coarser levels on top: ``"pool"``, one by subsampling, as Faster and Mask R-CNN have it, or ``"p6p7"``,
            two by strided convolutions, as RetinaNet and FCOS have them.

    Attributes:
        out_channels: What torchvision's detectors read.
        levels: Names of the levels without the extra ones, for ``MultiScaleRoIAlign``.
    """

    def __init__(
        self, features: FeatureBackbone, out_channels: int = 256, extra: Literal["pool", "p6p7"] = "pool"
    ) -> None:
        super().__init__()
        top = LastLevelMaxPool() if extra == "pool" else LastLevelP6P7(out_channels, out_channels)
        self.features = features
        self.fpn = FeaturePyramidNetwork(features.channels, out_channels, top)
        self.out_channels = out_channels
        self.levels = [str(i) for i in range(len(features.channels))]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [B, C, H, W] to the levels by name, finest first, all with ``out_channels`` channels."""
        return self.fpn(OrderedDict(zip(self.levels, self.features(x), strict=True)))
