"""Fine-tuning: a training begins with the weights of another one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine
from monai.networks import copy_model_state
from torch import nn

from monai_iunet.errors import InputError
from monai_iunet.io.text import in_one_line
from monai_iunet.io.weights import read_weights

__all__ = ["StartFrom", "start_from"]

logger = logging.getLogger(__name__)


def start_from(path: str | Path, *networks: nn.Module) -> None:
    """Copy the weights of another training into networks, as far as they fit: fine-tuning.

    Args:
        path: state of a network, such as `model.pt` or `model.safetensors`. What has another shape, the last
            convolution for other classes say, is left as it is, and named in the log.
        networks: of the same structure: the one that is trained, and its average.

    Raises:
        InputError: when the file is no state of a network; when nothing in it fits one of the networks, or they would
            make other matrices of it, with another `orthogonal_map`.

    Example:
        >>> import tempfile
        >>> import torch
        >>> path = Path(tempfile.mkdtemp(), "model.pt")
        >>> torch.save(nn.Linear(2, 1).state_dict(), path)
        >>> start_from(path, nn.Linear(2, 1))
    """
    weights = read_weights(path)
    for network in networks:
        state, taken, left = copy_model_state(network, weights, inplace=False)
        if not taken:
            raise InputError(f"{path}: weights of another network, nothing in it fits. It holds {', '.join(weights)}.")
        # With what modules noted beside weights that are taken, such as the map of an orthogonal matrix.
        noted = getattr(weights, "_metadata", {})
        state._metadata = {name: noted[name] for name in {key.rpartition(".")[0] for key in taken} & noted.keys()}
        module: Any = network
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = network.module
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{path}: weights of another network: {in_one_line(error)}") from error
    logger.info("Starting from %s; new are: %s", path, ", ".join(left) or "none")


class StartFrom:
    """Copies, as a handler of a trainer, weights of another training into its networks when it is attached.

    Args:
        path: see `start_from`.
        networks: see `start_from`.

    Example:
        >>> import tempfile
        >>> import torch
        >>> path = Path(tempfile.mkdtemp(), "model.pt")
        >>> torch.save({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, path)
        >>> network = nn.Linear(2, 1)
        >>> StartFrom(path, [network]).attach(Engine(lambda *_: None))
        >>> network.weight.tolist()
        [[1.0, 1.0]]
    """

    def __init__(self, path: str | Path, networks: Sequence[nn.Module]) -> None:
        self.path = path
        self.networks = list(networks)

    def attach(self, engine: Engine) -> None:
        """Copy the weights.

        Raises:
            InputError: see `start_from`; and when the training goes on, with weights that these would replace.
        """
        if engine.state.iteration > 0:
            raise InputError(
                f"{self.path}: would replace the weights of a training that goes on after epoch {engine.state.epoch}. "
                "Attach StartFrom before what resumes the training, or leave it out."
            )
        start_from(self.path, *self.networks)
