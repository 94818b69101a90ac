"""Stitching slab by slab gives what MONAI's sliding windows give, and holds a slab."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.inferers import SlidingWindowInferer
from monai.transforms import Orientation
from torch import Tensor, nn

from monai_iunet import InputError, LiveBytes, MirrorInferer, SegIUNet, StreamingInferer
from monai_iunet.inference.images import WholeImage
from monai_iunet.inference.windows import Windows
from monai_iunet.planning.plan import plan_inference_pass


class Network(nn.Module):
    """A convolution and the mean of its window, so that padding and neighbors show."""

    def __init__(self, classes: int = 5, axes: int = 3) -> None:
        super().__init__()
        self.conv = (nn.Conv2d if axes == 2 else nn.Conv3d)(1, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x.mean(tuple(range(2, x.ndim)), keepdim=True)


@torch.no_grad()
def run(inferer: Any, image: Tensor, network: Any) -> Any:
    return inferer(image, network)


CASES = {
    "windows that fit": ((40, 24, 16), {"roi_size": (16, 16, 16), "overlap": 0.5, "mode": "gaussian"}),
    "windows moved back": ((13, 29, 22), {"roi_size": (8, 8, 8), "overlap": 0.25}),
    "no overlap": ((13, 9, 22), {"roi_size": (8, 8, 8), "overlap": 0.0, "mode": "gaussian"}),
    "overlap of 0.9": ((20, 9, 11), {"roi_size": (8, 8, 8), "overlap": 0.9, "mode": "gaussian"}),
    "steps of one voxel": ((9, 8, 7), {"roi_size": (4, 4, 4), "overlap": 0.99}),
    "a window larger than the image": ((5, 12, 7), {"roi_size": (16, 16, 16), "mode": "gaussian", "cval": -1.0}),
    "larger along some axes": ((30, 3, 9), {"roi_size": (8, 8, 8), "overlap": (0.5, 0, 0.25), "cval": 2.0}),
    "reflected": ((30, 6, 9), {"roi_size": (8, 8, 8), "padding_mode": "reflect"}),
    "one slice": ((31, 20, 1), {"roi_size": (8, 8, 8), "overlap": 0.5, "mode": "gaussian"}),
    "one voxel": ((1, 1, 1), {"roi_size": (8, 8, 8)}),
    "the whole image": ((13, 9, 7), {"roi_size": (-1, -1, -1)}),
    "one size for all": ((13, 9, 17), {"roi_size": 8, "sigma_scale": 0.2, "mode": "gaussian"}),
    "buffers of MONAI": ((20, 9, 17), {"roi_size": (8, 8, 8), "buffer_steps": 2, "cache_roi_weight_map": True}),
    "two axes": ((33, 20), {"roi_size": (8, 8), "overlap": 0.5, "mode": "gaussian"}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_output_is_that_of_monai(name: str, batch: int) -> None:
    shape, options = CASES[name]
    images, network = torch.rand(2, 1, *shape), Network(axes=len(shape))
    expected = run(SlidingWindowInferer(sw_batch_size=batch, **options), images, network)
    found = run(StreamingInferer(sw_batch_size=batch, shrink=False, **options), images, network)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    labels = run(StreamingInferer(sw_batch_size=batch, shrink=False, argmax=True, **options), images, network)
    first, second = expected.topk(2, dim=1).values.unbind(1)
    assert (labels[:, 0] == expected.argmax(1))[first - second > 1e-5].all()


@pytest.mark.parametrize("seed", range(5))
def test_any_windows(seed: int) -> None:
    rng = random.Random(seed)
    shape, roi = [rng.randint(1, 40) for _ in range(3)], [rng.choice([4, 7, 16, -1]) for _ in range(3)]
    options: dict[str, Any] = {"roi_size": roi, "overlap": rng.choice([0, 0.3, 0.6]), "mode": "gaussian"}
    images, network = torch.rand(1, 1, *shape), Network()
    expected = run(SlidingWindowInferer(**options), images, network)
    torch.testing.assert_close(run(StreamingInferer(**options, shrink=False), images, network), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(23, 12, 9), (9, 23, 12), (5, 6, 30)])
def test_the_mean_over_the_mirror_image(axis: int, shape: tuple[int, ...]) -> None:
    """Whether slabs follow each other along the axis that is mirrored or another one, with padding or without."""
    options: dict[str, Any] = {"roi_size": (8, 8, 8), "overlap": 0.4, "mode": "gaussian", "cval": -1.0}
    images, network = torch.rand(1, 1, *shape), Network()
    plain = SlidingWindowInferer(**options)
    mirrored = run(plain, images.flip(2 + axis), network).flip(2 + axis)[:, [0, 2, 1, 3, 4]]
    expected = (run(plain, images, network) + mirrored) / 2
    inferer = MirrorInferer(swap=[[1, 2]], spatial_axis=axis, shrink=False, **options)
    torch.testing.assert_close(run(inferer, images, network), expected, atol=2e-6, rtol=0)
    inferer.enabled = False
    torch.testing.assert_close(run(inferer, images, network), run(plain, images, network), atol=2e-6, rtol=0)


def test_meta_data_and_integers_are_taken() -> None:
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0]))
    image = MetaTensor(torch.randint(-1000, 1000, (1, 1, 20, 9, 9)).short(), affine=affine)
    network = Network()
    found = run(StreamingInferer((8, 8, 8)), image, network)
    assert isinstance(found, MetaTensor)
    torch.testing.assert_close(found.affine, affine.double())
    expected = run(SlidingWindowInferer((8, 8, 8)), image.as_tensor().float(), network)
    torch.testing.assert_close(found.as_tensor(), expected, rtol=1e-5, atol=1e-2)


def test_more_classes_than_a_byte_has_numbers() -> None:
    labels = run(
        StreamingInferer((4, 4), argmax=True),
        torch.ones(1, 1, 9, 9),
        lambda x: x * torch.arange(300.0).reshape(300, 1, 1),
    )
    assert labels.dtype == torch.int16
    assert (labels == 299).all()


def test_slabs_follow_each_other() -> None:
    inferer, stop = StreamingInferer((8, 8, 8), overlap=0.5), 0
    for slab in inferer.slabs(WholeImage(torch.rand(1, 9, 30, 9)), lambda windows: windows):
        assert (slab.axis, slab.start) == (1, stop)
        stop += slab.length
    assert stop == 30


@pytest.mark.parametrize("mirror", [None, 0, 2])
def test_memory_does_not_grow_along_the_longest_axis(mirror: int | None) -> None:
    """Alone, and with the mirror image, across the longest axis and along it."""
    peaks = []
    options: dict[str, Any] = {"swap": [], "spatial_axis": mirror or 0, "enabled": mirror is not None}
    for length in (40, 80, 160):
        image, network = torch.rand(1, 1, 16, 16, length), Network(classes=20)
        inferer = MirrorInferer(**options, roi_size=(16, 16, 16), overlap=0.5, argmax=True)
        with LiveBytes(ignore=[image, *network.parameters()]) as live:
            labels = run(inferer, image, network)
        peaks.append(live.peak - labels.numel())
    assert peaks[1:] == pytest.approx(peaks[:1] * 2, rel=0.01)
    with LiveBytes(ignore=[image, *network.parameters()]) as live:
        run(SlidingWindowInferer((16, 16, 16), overlap=0.5), image, network)
    assert peaks[1] < 0.4 * live.peak


@pytest.mark.parametrize("name", ["windows that fit", "larger along some axes"])
def test_gradients_are_those_of_monai(name: str) -> None:
    shape, options = CASES[name]
    network, gradients = Network(), []
    images = torch.rand(2, 1, *shape)
    for inferer in (SlidingWindowInferer(**options), StreamingInferer(shrink=False, **options)):
        leaf = images.clone().requires_grad_()
        output = inferer(leaf, network)
        (output * torch.linspace(0, 1, output.numel()).reshape(output.shape)).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_labels_hold_no_graph() -> None:
    """Also where nobody has turned gradients off: the memory of labels is a byte per voxel."""
    modes = []
    StreamingInferer((8, 8, 8), argmax=True)(
        torch.rand(1, 2, 20, 9, 9), lambda x: modes.append(torch.is_grad_enabled()) or x
    )
    assert not any(modes)


@pytest.mark.parametrize("option", [{"device": "cpu"}, {"buffer_steps": 2}, {"buffer_dim": 0}])
def test_a_call_may_name_what_inferers_of_monai_keep_to_themselves(option: dict[str, Any]) -> None:
    images, network = torch.rand(1, 1, 20, 9, 9), Network()
    with torch.no_grad():
        expected = SlidingWindowInferer((8, 8, 8))(images, network, **option)
        torch.testing.assert_close(StreamingInferer((8, 8, 8))(images, network, **option), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_of_what_is_no_number_no_labels_are_made(value: float) -> None:
    def network(windows: Tensor) -> Tensor:
        return torch.cat([windows, windows.where(windows < 0.99, value)], 1)

    image = torch.rand(1, 1, 20, 9, 9) * 0.9
    inferer = StreamingInferer((8, 8, 8), argmax=True)
    inferer(image, network)
    image[..., 15, 4, 4] = 1
    with pytest.raises(ValueError, match="NaN or infinite"):
        inferer(image, network)


def test_of_a_single_class_no_labels_are_made() -> None:
    with pytest.raises(ValueError, match="has 1 output channel, labels need one per class"):
        StreamingInferer((8, 8), argmax=True)(torch.rand(1, 1, 9, 9), lambda windows: windows)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "several outputs": (lambda x: (x, x), {}, "returns a tuple, one tensor is needed"),
    "a dictionary": (lambda x: {"a": x}, {}, "returns a dict, one tensor is needed"),
    "another size": (lambda x: x[..., ::2], {}, "batch and spatial size must stay"),
    "another batch": (lambda x: x[:0], {}, "batch and spatial size must stay"),
    "a number": (lambda x: x.mean(), {}, "batch and spatial size must stay"),
    "two axes": (lambda x: x, {"roi_size": (8, 8)}, "must have 3 axes"),
    "overlap of 1": (lambda x: x, {"overlap": 1.0}, "at least 0 and below 1"),
    "negative overlap": (lambda x: x, {"overlap": (0.5, -0.1, 0)}, "at least 0 and below 1"),
    "no windows at once": (lambda x: x, {"sw_batch_size": 0}, "at least 1 window"),
    "a class that is not there": (lambda x: x, {"swap": [[0, 1]]}, "beyond the 1 output channels"),
    "an axis from behind": (lambda x: x, {"swap": [], "spatial_axis": -1}, "counted from 0"),
    "an axis that is not there": (lambda x: x, {"swap": [], "spatial_axis": 3}, "has 3 axes"),
    "no image": (lambda x: x, {"images": torch.rand(0, 1, 20, 9, 9)}, "without a voxel"),
    "no voxel": (lambda x: x, {"images": torch.rand(1, 1, 0, 9, 9)}, "without a voxel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(name: str) -> None:
    network, options, message = REFUSED[name]
    options = {"roi_size": (8, 8, 8), "sw_batch_size": 2, **options}
    images = options.pop("images", torch.rand(1, 1, 20, 9, 9))
    kind: Any = MirrorInferer if "swap" in options else StreamingInferer
    with pytest.raises(ValueError, match=message) as caught:
        kind(**options)(images, network)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roi_size": "all"}, "roi_size 'all': must be \"whole\""),
        ({"roi_size": (8.5, 8)}, "a whole number"),
        ({"roi_size": 8, "mode": "gaussian", "sigma_scale": 0}, "sigma_scale 0: must be positive"),
        ({"roi_size": 8, "mode": "gaussian", "sigma_scale": float("nan")}, "must be positive"),
    ],
)
def test_windows_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingInferer(**options)


def test_coordinates_and_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="with_coord"):
        StreamingInferer((8, 8), with_coord=True)
    image = torch.rand(1, 1, 20, 9)
    with pytest.raises(ValueError, match="condition"):
        StreamingInferer((8, 8))(image, lambda x, condition: x, condition=image)


@pytest.mark.parametrize(
    ("image", "roi", "divisible_by", "expected"),
    [
        ((98, 75, 44), (96, 96, 96), 8, (96, 80, 48)),
        ((98, 75, 44), (96, 96, 96), None, (96, 96, 64)),
        ((35, 51, 36), (40, 56, 40), 8, (40, 56, 40)),
        ((200, 200, 1), (64, 64, 64), 8, (64, 64, 8)),
        ((1, 2, 1), (64, 64, 64), 8, (16, 8, 8)),
        ((20, 200, 200), (64, 64, 64), (4, 8, 16), (20, 64, 64)),
    ],
)
def test_a_window_shrinks_to_the_image(
    image: tuple[int, ...], roi: tuple[int, ...], divisible_by: Any, expected: tuple[int, ...]
) -> None:
    windows = Windows.of(image, roi, divisible_by=divisible_by)
    assert windows.roi_size == expected
    assert windows.size == tuple(min(pair) for pair in zip(expected, image))
    assert Windows.of(image, roi, shrink=False).roi_size == roi
    seen = []
    inferer = StreamingInferer(roi, divisible_by=divisible_by, cval=-1.0)
    output = run(inferer, torch.rand(1, 1, *image), lambda x: seen.append(tuple(x.shape[2:])) or x)
    assert set(seen) == {expected}
    assert output.min() >= 0


def test_an_image_is_seen_whole_where_memory_takes_it_and_else_in_windows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    network = SegIUNet(2, 1, 2, (8, 16)).eval()
    image = torch.rand(1, 1, 61, 30)
    inferer = StreamingInferer("whole", overlap=0.5, mode="gaussian", divisible_by=2)
    with torch.no_grad():
        whole = inferer(image, network)
        torch.testing.assert_close(whole, network(torch.nn.functional.pad(image, (0, 0, 0, 1)))[:, :, :61])
        assert not caplog.records
        enough = plan_inference_pass(network, (1, 1, 62, 30))
        monkeypatch.setattr("monai_iunet.inference.streaming.available_memory", lambda: int(1.5 * enough))
        parts = inferer(image, network)
        windows = inferer.windows((61, 30), network)
        expected = StreamingInferer(windows.roi_size, overlap=0.5, mode="gaussian")(image, network)
    assert "not fit as a whole" in caplog.text
    assert "61 x 30" in caplog.text
    assert windows.roi_size == (32, 30)
    torch.testing.assert_close(parts, expected)
    assert not torch.equal(parts, whole)


@pytest.mark.parametrize(("axcodes", "axis"), [("PIR", 2), ("RAS", 0), ("LPS", 0), ("SRA", 1)])
def test_classes_change_places_only_along_the_axis_between_left_and_right(axcodes: str, axis: int) -> None:
    image = Orientation(axcodes, labels=None)(MetaTensor(torch.rand(1, 4, 4, 4), affine=torch.eye(4)))
    images = list_data_collate([{"image": image}, {"image": image}])["image"]
    for spatial_axis in range(3):
        inferer = MirrorInferer([[1, 2]], spatial_axis, roi_size=(4, 4, 4))
        if spatial_axis == axis:
            assert inferer(images, lambda windows: windows.expand(-1, 3, -1, -1, -1)).shape == (2, 3, 4, 4, 4)
        else:
            with pytest.raises(InputError, match=f"image: is turned {axcodes}, so spatial_axis {spatial_axis} does"):
                inferer(images, lambda windows: windows)
