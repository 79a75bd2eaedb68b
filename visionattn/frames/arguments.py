"""What the arguments of networks mean, by their names: checked before a network is built, for every family alike."""

from collections.abc import Callable, Mapping
from inspect import Parameter

from visionattn.layers.checks import check_counts, check_declared, check_shares, check_side, guarded

__all__ = ["checked"]

COUNTS = ("in_chans", "embed_dim", "embed_dims", "depth", "num_heads", "patch_size", "head_width")
COUNTS += ("head_dim", "sr_ratios", "split_sizes")
SHARES = ("drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
STAGES = ("embed_dims", "depths", "num_heads", "mixers", "mlp_ratios", "sr_ratios", "split_sizes", "layer_scales")
STAGES += ("dilations", "topks")
# What timm's pooling takes; that of tokens, less.
POOLS = ("", "avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")
POOLS += ("token", "map")


def checked(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a network behind a check of its arguments, those left out that its class alone has.

    It raises ``ValueError`` with name, value and what is allowed.
    """
    return guarded(init, _check)


def _check(arguments: Mapping[str, object], parameters: Mapping[str, Parameter]) -> None:
    given = {name: value for name, value in arguments.items() if value is not None}
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
        elif name == "global_pool" and value not in POOLS:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLS))}, got {value!r}")
    check_declared(arguments, parameters)
    lengths = {name: len(given[name]) for name in STAGES if isinstance(given.get(name), (tuple, list))}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"the arguments of the stages must have one entry a stage, got {found}")
