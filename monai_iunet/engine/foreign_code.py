"""Whether a module may do what is not known here: draw random numbers, or keep tensors that it is given."""

from __future__ import annotations

from torch import nn

from monai_iunet.engine.pytorch_private import has_hooks

__all__ = ["runs_foreign_code"]

KNOWN = ("torch", "monai", "monai_iunet")  # whose modules draw from PyTorch's generators alone, and keep nothing


def runs_foreign_code(module: nn.Module) -> bool:
    """Return whether a module has hooks or is of one's own, or its `forward` is; its children are not looked at.

    Example:
        >>> runs_foreign_code(nn.Linear(1, 1))
        False
    """
    # What a parametrization makes of a class counts as PyTorch's own, but is a subclass of that.
    kinds = (kind for kind in type(module).__mro__ if issubclass(kind, nn.Module))
    is_known = all(kind.__module__.split(".")[0] in KNOWN for kind in kinds)
    return not is_known or has_hooks(module) or "forward" in module.__dict__
