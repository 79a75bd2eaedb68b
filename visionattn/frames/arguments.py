"""What the arguments of networks mean, by their names: checked before a network is built, for every family alike."""

from collections.abc import Callable
from functools import wraps
from inspect import BoundArguments, signature

from visionattn.layers.checks import check_counts, check_shares, check_side

__all__ = ["checked"]

COUNTS = ("in_chans", "embed_dim", "embed_dims", "depth", "num_heads", "patch_size", "head_width")
COUNTS += ("head_dim", "sr_ratios", "split_sizes")
SHARES = ("drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
STAGES = ("embed_dims", "depths", "num_heads", "mixers", "mlp_ratios", "sr_ratios", "split_sizes", "layer_scales")
STAGES += ("dilations", "topks")


def checked(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a network behind a check of its arguments, those left out that its class alone has.

    It raises ``ValueError`` with name, value and what is allowed.
    """

    @wraps(init)
    def __init__(self, *args, **kwargs) -> None:
        try:
            bound = signature(init).bind(self, *args, **kwargs)
        except TypeError:  # which the constructor itself tells best
            pass
        else:
            bound.apply_defaults()
            _check(bound)
        init(self, *args, **kwargs)

    return __init__


def _check(bound: BoundArguments) -> None:
    given = {name: value for name, value in bound.arguments.items() if value is not None}
    for name, value in given.items():
        if name in COUNTS or name == "depths":
            for one in value if isinstance(value, (tuple, list)) else [value]:
                check_counts(0 if name == "depths" else 1, **{name: one})
        elif name == "num_classes":
            check_counts(0, num_classes=value)
        elif name in SHARES:
            check_shares(**{name: value})
        elif name == "img_size":
            check_side(name, value)
    lengths = {name: len(given[name]) for name in STAGES if isinstance(given.get(name), (tuple, list))}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"the arguments of the stages must have one entry a stage, got {found}")
