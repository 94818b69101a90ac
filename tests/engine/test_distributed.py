"""Distributed training on two processes: the gradients are those of one process with the whole batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from monai_iunet import SegIUNet
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from tests.helpers import GLOO_AVERAGES, relative_errors


def shard_each_coupling(net: nn.Module, **options: Any) -> nn.Module:
    for module in list(net.modules()):
        if isinstance(module, AdditiveCoupling):
            fully_shard(module, **options)
    return fully_shard(net, **options)


def shard_each_branch(net: nn.Module, **options: Any) -> nn.Module:
    for module in list(net.modules()):
        if isinstance(module, AdditiveCoupling):
            fully_shard(module.branch, **options)
    return fully_shard(net, **options)


WAYS = ("invert", "convolutions", "store")
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "DDP, unused parameters looked for": lambda net: DistributedDataParallel(net, find_unused_parameters=True),
    "DDP, static graph": lambda net: DistributedDataParallel(net, static_graph=True),
    "FSDP2 of the whole": lambda net: fully_shard(net),
    "FSDP2 of each coupling": shard_each_coupling,
    "FSDP2 of each branch": shard_each_branch,
}


def network(activations: str) -> SegIUNet:
    torch.manual_seed(0)
    return SegIUNet(2, 1, 3, (4, 8), couplings=3, activations=activations)


def whole_gradient(parameter: Any) -> torch.Tensor:
    return parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad


def order_of_events(images: torch.Tensor) -> list[str]:
    """When buckets of gradients are sent, and when the backward pass comes to the first coupling."""
    net = network("invert")
    wrapped = DistributedDataParallel(net, bucket_cap_mb=0.0005)
    events = []

    def send(_, bucket):  # without annotations, which DDP would compare with the classes
        events.append("bucket sent")
        return default_hooks.allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, send)
    for _ in range(2):  # the first step finds the order of the buckets
        handle = net.iunet.encoder[0][0].branch.register_forward_hook(lambda *_: events.append("first coupling"))
        loss = wrapped(images).square().mean()
        events.clear()
        loss.backward()
        handle.remove()
    return events


def accumulate(rank: int, images: torch.Tensor) -> float:
    """Error of gradients that were accumulated over two passes, the first without communication."""
    expected, net = network("store"), network("invert")
    (expected(images).square().mean() + expected(2 * images).square().mean()).backward()
    wrapped = DistributedDataParallel(net)
    mine = images[rank : rank + 1]
    with wrapped.no_sync():
        wrapped(mine).square().mean().backward()
    wrapped(2 * mine).square().mean().backward()
    return max(relative_errors([p.grad for p in net.parameters()], [p.grad for p in expected.parameters()]))


def train_from_meta(images: torch.Tensor, shard: Callable[..., nn.Module]) -> dict[str, list[float]]:
    """Losses of networks that were built on meta, sharded, emptied, loaded and trained in bfloat16."""
    weights = network("store").state_dict()
    losses: dict[str, list[float]] = {}
    for activations in WAYS:
        with torch.device("meta"):
            net = network(activations)
        shard(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        net.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(net, weights, options=options)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        losses[activations] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (net(images) - 1).float().square().mean()
            loss.backward()
            optimizer.step()
            losses[activations].append(float(loss))
    return losses


def train_one_step(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = network("store")
    whole(images).square().mean().backward()
    expected = [parameter.grad for parameter in whole.parameters()]
    errors = {}
    for name, wrap in WRAPPERS.items():
        found = {}
        for activations in WAYS:
            net = network(activations)
            wrapped = wrap(net)
            for _ in range(2):  # the second step is where a wrong bookkeeping of the first shows
                wrapped.zero_grad()
                wrapped(images[rank : rank + 1]).square().mean().backward()
            found[activations] = [whole_gradient(parameter) for parameter in net.parameters()]
        for activations in WAYS[:2]:
            gradients = found[activations]
            errors[f"{name}, {activations}, as plain autograd"] = max(relative_errors(gradients, found["store"]))
            errors[f"{name}, {activations}"] = max(relative_errors(gradients, expected))
    errors["DDP, accumulated"] = accumulate(rank, images)
    shards = {"whole": fully_shard, "couplings": shard_each_coupling, "branches": shard_each_branch}
    from_meta = {name: train_from_meta(images[rank : rank + 1], shard) for name, shard in shards.items()}
    order = order_of_events(images[rank : rank + 1])
    torch.save({"errors": errors, "order": order, "from meta": from_meta}, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    # The result is on disk. Leave without tearing down the interpreter, in which threads of gloo now and then abort.
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(train_one_step, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("activations", WAYS[:2])
@pytest.mark.parametrize("name", WRAPPERS)
def test_gradients_are_those_of_plain_autograd_in_two_processes(
    ranks: list[dict[str, Any]], name: str, activations: str
) -> None:
    assert max(rank["errors"][f"{name}, {activations}, as plain autograd"] for rank in ranks) < 1e-4


@pytest.mark.parametrize("name", [*(f"{name}, {way}" for name in WRAPPERS for way in WAYS[:2]), "DDP, accumulated"])
def test_gradients_are_those_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    if name.startswith("FSDP2") and not GLOO_AVERAGES:
        pytest.skip("gloo of this PyTorch adds up the gradients of FSDP2, of any network, instead of averaging them")
    assert max(rank["errors"][name] for rank in ranks) < 1e-4


def test_communication_overlaps_the_backward_pass(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["order"].count("first coupling") == 1
        assert rank["order"].index("first coupling") > 2  # gradients of later layers were sent before
        assert rank["order"][-1] == "bucket sent"


@pytest.mark.parametrize("shard", ["whole", "couplings", "branches"])
def test_built_on_meta_and_sharded_with_a_bfloat16_policy_it_trains(ranks: list[dict[str, Any]], shard: str) -> None:
    for rank in ranks:
        losses = rank["from meta"][shard]
        for activations in WAYS[:2]:
            assert losses[activations][-1] < losses[activations][0]
            # Where couplings are sharded, what runs through them is cast to bfloat16, and rebuilt with its rounding.
            assert losses[activations] == pytest.approx(losses["store"], rel=0.05)
