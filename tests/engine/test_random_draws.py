"""Random numbers of any generator are drawn again as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.layers.drop_path import DropPath
from monai.transforms import Compose, RandScaleIntensity
from torch import Tensor, nn

from monai_iunet.engine import repetition
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from tests.engine.helpers import compare, plain, work_in_threads


class Drawing(nn.Conv2d):
    """Scales its output by a random number."""

    def __init__(self, draw: Callable[[Any], float], inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.draw = draw
        self.of_torch, self.of_python = torch.Generator().manual_seed(0), random.Random(0)
        self.of_numpy, self.new_of_numpy = np.random.RandomState(0), np.random.default_rng(0)
        self.several = [random.Random(0), {"one": np.random.default_rng(0)}]
        self.transform = Compose([RandScaleIntensity(1.0, prob=1.0)]).set_random_state(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.draw(self))


DRAWS: dict[str, Callable[[Any], float]] = {
    "python": lambda _: random.random(),
    "numpy": lambda _: np.random.rand(),
    "own of torch": lambda branch: float(torch.rand((), generator=branch.of_torch)),
    "own of python": lambda branch: branch.of_python.random(),
    "own of numpy": lambda branch: 0.1 * branch.of_numpy.randn(),
    "own new one of numpy": lambda branch: branch.new_of_numpy.random(),
    "in a list": lambda branch: branch.several[0].random(),
    "in a dictionary in it": lambda branch: branch.several[1]["one"].random(),
    "of MONAI's transforms": lambda branch: float(branch.transform(torch.ones(1))),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_numbers_from_other_generators_than_pytorch_s_are_drawn_again(draw: str) -> None:
    following = []

    def run(net: Any, x: Tensor) -> None:
        random.seed(0)
        np.random.seed(0)
        plain(net, x)
        following.append(DRAWS[draw](net.iunet.encoder[0][0].branch))

    compare(run, make_branch=lambda _, inputs, outputs, *__: Drawing(DRAWS[draw], inputs, outputs))
    assert following[0] == following[1]


def test_a_class_that_a_parametrization_has_made_of_one_s_own_draws_its_numbers_again() -> None:
    def make(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
        return nn.utils.parametrizations.weight_norm(Drawing(DRAWS["python"], inputs, outputs))

    def run(net: Any, x: Tensor) -> None:
        random.seed(0)
        plain(net, x)

    compare(run, make_branch=make)


class Scale:
    """A hook that draws."""

    def __init__(self) -> None:
        self.generator = random.Random(0)

    def __call__(self, _: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self.generator.random()

    def method(self, _: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self(_, inputs, output)


@pytest.mark.parametrize("hook_of", [lambda scale: scale, lambda scale: scale.method], ids=["object", "method"])
def test_numbers_of_a_hook_s_own_generator_are_drawn_again(hook_of: Callable[[Scale], Any]) -> None:
    def make(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
        branch = nn.Conv2d(inputs, outputs, 3, padding=1)
        branch.register_forward_hook(hook_of(Scale()))
        return branch

    compare(plain, make_branch=make)


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.RReLU(), DropPath(0.5), FunctionalDropout()])
def test_draws_from_a_generator_that_another_thread_used_are_noticed(layer: nn.Module) -> None:
    coupling = AdditiveCoupling(nn.Sequential(nn.Conv1d(2, 2, 1), layer))
    draw: list[Callable[[], Any]] = [lambda: torch.rand(3)]
    states = torch.ones(4, 2, 4), -torch.ones(4, 2, 4)
    conditions = repetition.Conditions(coupling, states[0].device)
    with conditions.recorded():
        coupling.branch(states[1])
        work_in_threads(draw)
    with pytest.raises(RuntimeError, match="another thread has drawn"), conditions.repeated():
        coupling.branch(states[1])


def test_a_branch_that_draws_nothing_is_not_blamed_for_another_thread() -> None:
    layer = AdditiveCoupling(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Tanh()))
    to_draw: list[Callable[[], Any]] = [lambda: torch.rand(3)]
    layer.branch.register_forward_hook(lambda *_: work_in_threads(to_draw) and None)
    outputs = layer(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    to_draw[0] = int
    outputs[1].sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
