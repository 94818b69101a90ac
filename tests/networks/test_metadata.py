"""What MONAI's tensors carry reaches what the networks make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch, set_track_meta
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.networks.nets import UNet
from monai.transforms import SaveImage
from torch import Tensor, nn

from monai_iunet import IUNet, MirrorInferer, SegEnsemble, SegIUNet, StreamingInferer

AFFINE = torch.tensor([[0.0, -2, 0, 5], [3, 0, 0, -7], [0, 0, 1.5, 2], [0, 0, 0, 1]], dtype=torch.float64)


def image(channels: int = 1) -> MetaTensor:
    return MetaTensor(torch.rand(1, channels, 12, 9, 8), affine=AFFINE, meta={"filename_or_obj": "head.nii"})


def segmenter(**options: Any) -> SegIUNet:
    return SegIUNet(3, 1, 2, (4, 8), couplings=1, **options)


def check(result: Any) -> None:
    assert isinstance(result, MetaTensor)
    assert torch.equal(result.affine, AFFINE)
    assert result.meta["filename_or_obj"] == "head.nii"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"exact": True}, {"activations": "store"}], ids=str)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_logits_carry_what_the_image_does(
    training: bool, mode: Callable[[], Any], options: dict[str, Any], autocast: bool
) -> None:
    net, x = segmenter(**options).train(training), image()
    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        check(net(x))
        assert torch.equal(net(x).as_tensor(), net(x.as_tensor()))
        theirs = UNet(3, 1, 2, (4, 8), (1,)).train(training)(x)
    assert {**theirs.meta, "affine": 0} == {**net(x).meta, "affine": 0}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_all_ways_through_the_invertible_network(mode: Callable[[], Any], exact: bool) -> None:
    net, x = IUNet(3, (4, 8), couplings=1, exact=exact), image(4)
    with mode():
        y = net(x, crop=False)
        codes = net.encode(x)
        results = [y, *codes, net.decode(codes), net.inverse(y, x.shape[2:]), net.encode_inverse(codes)]
        results += [*net.decode_inverse(y), *net.forward_levels(x)]
        for result in results:
            check(result)


def test_deep_supervision_and_ensembles() -> None:
    for logits in segmenter(deep_supervision=True).train()(image()):
        check(logits)
    ensemble = SegEnsemble(2, spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8)).eval()
    with torch.no_grad():
        check(ensemble(image()))


def test_a_batch_falls_apart_into_images_with_their_own() -> None:
    affines = [AFFINE, AFFINE.diag().diag() + torch.eye(4), 2 * torch.eye(4)]
    images = [MetaTensor(torch.rand(1, 8, 8, 8), affine=affine, meta={"name": n}) for n, affine in enumerate(affines)]
    (batch,) = DataLoader(Dataset(images), batch_size=3)
    with torch.no_grad():
        logits: Any = segmenter().eval()(batch)
    for number, (each, affine) in enumerate(zip(decollate_batch(logits), affines)):
        assert torch.equal(each.affine, affine)
        assert each.meta["name"] == number


def test_the_metadata_are_of_the_result_alone() -> None:
    x = image()
    with torch.no_grad():
        y: Any = segmenter().eval()(x)
    y.meta["filename_or_obj"], y.affine = "other.nii", torch.eye(4)
    check(x)


def test_nothing_is_carried_where_monai_does_not_track() -> None:
    set_track_meta(False)
    try:
        assert type(segmenter().eval()(image())) is Tensor
    finally:
        set_track_meta(True)


@pytest.mark.parametrize(
    "inferer",
    [
        SimpleInferer(),
        SlidingWindowInferer((8, 8, 8)),
        StreamingInferer((8, 8, 8)),
        MirrorInferer(swap=[], roi_size=(8, 8, 8)),
    ],
    ids=lambda inferer: type(inferer).__name__,
)
def test_a_file_lies_where_the_image_did(inferer: Any, tmp_path: Path) -> None:
    net: nn.Module = segmenter().eval()
    with torch.no_grad():
        labels = inferer(image(), net)[0].argmax(0, keepdim=True)
    SaveImage(tmp_path, output_postfix="seg", separate_folder=False, print_log=False)(labels)
    saved: Any = nibabel.load(tmp_path / "head_seg.nii.gz")
    assert torch.equal(torch.from_numpy(saved.affine), AFFINE)
