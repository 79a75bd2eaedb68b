"""Which forms of operators run on this machine, timed for given models: the command ``visionattn tune``.

Needs PyTorch only once it runs, so that the command line is there in a moment.
"""

from collections.abc import Sequence

__all__ = ["TuneError", "report", "tune"]


class TuneError(ValueError):
    """What was asked for cannot be timed; the message says why in one line."""


def tune(
    models: Sequence[str] = (),
    batch_sizes: Sequence[int] = (1, 8),
    threads: Sequence[int] = (),
    img_size: int = 224,
    training: bool = True,
) -> None:
    """Time the forms of the operators that models use on this CPU, remember the fastest, and show what is known.

    Args:
        models: Names that timm knows; none to show only what earlier runs have found.
        batch_sizes: Images a batch.
        threads: Numbers of threads; PyTorch's own number if none is given.
        img_size: Side of the images.
        training: Also time training steps.

    Raises:
        TuneError: If a model is not known or a number not positive.
    """
    import timm
    import torch

    from visionattn.kernels import use_tuning

    unknown = [name for name in models if not timm.is_model(name)]
    if unknown:
        raise TuneError(f"timm knows no model {unknown[0]}: timm.list_models() has the names")
    for name, values in (("batch_sizes", batch_sizes), ("threads", threads), ("img_size", [img_size])):
        if any(value < 1 for value in values):
            raise TuneError(f"{name} must be positive, got {min(values)}")
    before = torch.get_num_threads()
    try:
        with use_tuning("full", anew=bool(models)):
            for name in models:
                for count in threads or (before,):
                    torch.set_num_threads(count)
                    print(f"{name}, {count} threads ...", flush=True)
                    for batch in batch_sizes:
                        _run(name, batch, img_size, training)
    finally:
        torch.set_num_threads(before)
    print(report())


def _run(name: str, batch: int, img_size: int, training: bool) -> None:
    import timm
    import torch

    model = timm.create_model(name).eval()
    images = torch.zeros(batch, model.pretrained_cfg["input_size"][0], img_size, img_size)
    with torch.no_grad():
        model(images)
    if training:
        model.train()(images).sum().backward()


def report() -> str:
    """What has been timed on this machine, a line for each kind of shape: the form, and the times of all forms."""
    from visionattn.kernels import tuned

    machine, rows = tuned()
    lines = [f"{machine['cpu']}, {machine['capability']}, oneDNN {machine['onednn']}, torch {machine['torch']}"]
    for choice, threads, shape, form, ms in rows:
        times = ", ".join(f"{name} {value:.3g}" for name, value in sorted(ms.items(), key=lambda item: item[1]))
        lines.append(f"{choice}  threads {threads}  {shape}  {form}  ({times} ms)")
    if not rows:
        lines.append("nothing has been timed yet: name a model, as in visionattn tune nat_tiny")
    return "\n".join(lines)
