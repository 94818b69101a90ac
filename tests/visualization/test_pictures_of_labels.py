"""Contours over images: every picture shows the same labels in the same place and color."""

from __future__ import annotations

import base64
import gzip
import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from monai_iunet import InputError, VolumeViewer, draw_overlay, draw_slice, draw_surfaces, save_overlay
from monai_iunet.visualization.page import image_view
from monai_iunet.visualization.palette import label_colors

NAMES = {1: "liver", 2: "tumor"}


def case(axcodes: str = "RAS") -> tuple[nibabel.Nifti1Image, np.ndarray]:
    """An image with two structures: label 1 on the left of the patient and low, label 2 on the right and high."""
    labels = np.zeros((30, 24, 20), np.uint8)
    labels[4:10, 8:16, 3:8] = 1
    labels[20:26, 8:16, 12:17] = 2
    image = nibabel.Nifti1Image(np.random.default_rng(0).random(labels.shape).astype(np.float32), np.diag([1, 2, 3, 1]))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(axcodes)
    )
    turned = nibabel.Nifti1Image(labels, image.affine).as_reoriented(turn)
    return image.as_reoriented(turn), np.asarray(turned.dataobj)


def contours(axes: object) -> dict[str, np.ndarray]:
    """Corners of the contours in axes, by their color."""
    found: dict[str, np.ndarray] = {}
    for collection in axes.collections:  # type: ignore[attr-defined]
        points = np.concatenate([path.vertices for path in collection.get_paths()])
        found[to_hex(collection.get_edgecolor()[0])] = np.stack([points.min(0), points.max(0)])
    return found


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SAR", "PIL"])
def test_contours_lie_around_their_structure_whatever_the_orientation(axcodes: str) -> None:
    image, labels = case(axcodes)
    figure = Figure()
    draw_slice(figure, image, labels, NAMES, "coronal", index=10)
    blue, orange = label_colors(NAMES).values()
    lines = contours(figure.axes[0])
    np.testing.assert_allclose(lines[blue], [[3.5, 2.5], [9.5, 7.5]])
    np.testing.assert_allclose(lines[orange], [[19.5, 11.5], [25.5, 16.5]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["L", "R"]


def test_the_planes_of_an_overlay_have_one_scale_and_stay_in_the_figure() -> None:
    image, labels = case()
    figure = Figure(figsize=(12, 4.6))
    draw_overlay(figure, image, labels, NAMES, margin=100)
    FigureCanvasAgg(figure).draw()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert all(box.x0 >= 0 and box.x1 <= 1200 and box.y0 >= 0 and box.y1 <= 460 for box in boxes)
    assert all(after.x0 - before.x1 > 4 for before, after in itertools.pairwise(boxes))  # one can tell them apart
    sizes = [(30.0, 60.0), (48.0, 60.0), (30.0, 48.0)]  # mm: coronal, sagittal, axial
    scales = [box.width / across for box, (across, _) in zip(boxes, sizes)]
    scales += [box.height / up for box, (_, up) in zip(boxes, sizes)]
    np.testing.assert_allclose(scales, scales[0], rtol=0.02)


def test_the_planes_of_a_volume_of_one_slice_have_one_scale() -> None:
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((30, 24, 1)), np.diag([1, 1, 6, 1]))
    figure = Figure(figsize=(12, 4.6))
    draw_overlay(figure, image, np.ones(image.shape, np.uint8), NAMES)
    FigureCanvasAgg(figure).draw()
    sizes = [(30.0, 6.0), (24.0, 6.0), (30.0, 24.0)]  # mm: coronal, sagittal, axial
    boxes = [axes.get_window_extent() for axes in figure.axes]
    scales = [scale for box, (across, up) in zip(boxes, sizes) for scale in (box.width / across, box.height / up)]
    np.testing.assert_allclose(scales, scales[0], rtol=0.02)


@pytest.mark.parametrize("width", [9.6, 12.0])
@pytest.mark.parametrize("count", [1, 8, 30])
def test_the_legend_lies_in_the_figure_below_the_planes(count: int, width: float) -> None:
    image, labels = case()
    names = {number: f"left structure of number {number}" for number in range(1, count + 1)}
    figure = Figure(figsize=(width, 4.6))
    draw_overlay(figure, image, labels, names, reference=labels)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == count + 2
    assert box.x0 >= 0
    assert box.x1 <= 100 * width
    assert box.y0 >= 0
    assert all(axes.get_window_extent().y0 >= box.y1 - 1 for axes in figure.axes)


@pytest.mark.parametrize(
    ("count", "words"),
    [pytest.param(255, 1, marks=pytest.mark.long), pytest.param(120, 3, marks=pytest.mark.long), (30, 12)],
)
def test_a_legend_of_very_many_lines_leaves_room_for_the_planes(count: int, words: int, tmp_path: Path) -> None:
    image, labels = case()
    names = {number: f"{'left structure of ' * words} number {number}" for number in range(1, count + 1)}
    save_overlay(image, labels, names, tmp_path / "picture.png")
    figure = Figure(figsize=(12, 4.6))
    draw_overlay(figure, image, labels, names, bottom=0.5, height=0.5)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == count
    top = legend.get_window_extent().y1  # about the half, since very small letters have whole pixels
    assert top < 0.5 * 460 + 0.7 * 230
    assert all(top - 1 < axes.get_window_extent().y0 < axes.get_window_extent().y1 - 20 for axes in figure.axes)


@pytest.mark.parametrize("count", [1, 28, 120])
def test_a_warning_lies_above_the_planes(count: int) -> None:
    image, labels = case()
    figure = Figure(figsize=(12, 4.6))
    warning = ", ".join(f"left ventral diencephalon {number} 0.50" for number in range(count))
    draw_overlay(figure, image, labels, NAMES, title="a", warning=f"doubtful: {warning}")
    FigureCanvasAgg(figure).draw()
    text = next(text for text in figure.texts if text.get_text().startswith("Warning: doubtful"))
    box = text.get_window_extent()
    assert 0.6 * 460 < box.y0 < box.y1 < 0.93 * 460
    assert all(axes.get_window_extent().y1 <= box.y0 for axes in figure.axes)


def test_the_legend_of_a_picture_is_as_wide_as_it_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Letters are up to 4 % wider in another resolution, so that the last digits of names were cut off."""
    image, labels = case()
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (drawn.append(self), save(self, *args, **options))
    )
    save_overlay(image, labels, {number: f"structure number {number}" for number in range(1, 105)}, tmp_path / "a.png")
    (figure,) = drawn
    figure.set_dpi(110)
    FigureCanvasAgg(figure).draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= 12 * 110


@pytest.mark.parametrize("axcodes", ["RAS", "LPS"])
def test_an_overlay_goes_through_the_largest_structure(axcodes: str) -> None:
    image, labels = case(axcodes)
    labels[labels == 2] = 0
    figure = Figure()
    draw_overlay(figure, image, labels, NAMES, reference=labels)
    for axes in figure.axes:
        styles = [collection.get_linestyle()[0][1] for collection in axes.collections]
        assert [style is None for style in styles] == [True, False]  # solid, dashed


@pytest.mark.parametrize("shape", [(35, 51, 1), (1, 51, 36), (35, 1, 1), (1, 1, 1)])
def test_thin_volumes_are_drawn(shape: tuple[int, int, int], tmp_path: Path) -> None:
    labels = np.zeros(shape, np.uint8)
    labels[tuple(slice(0, max(1, extent // 2)) for extent in shape)] = 1
    image = nibabel.Nifti1Image(np.random.default_rng(0).random(shape).astype(np.float32), np.eye(4))
    save_overlay(image, labels, NAMES, tmp_path / "picture.png", title="thin")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    for plane in ("axial", "coronal", "sagittal"):
        draw_slice(Figure(), image, labels, NAMES, plane)


def test_letters_that_the_font_has_not_are_no_warning(tmp_path: Path) -> None:
    image, labels = case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_overlay(image, labels, {1: "\u809d", 2: "tumor"}, tmp_path / "picture.png", title="\u809d")


def test_dollar_signs_are_no_formula(tmp_path: Path) -> None:
    image, labels = case()
    save_overlay(image, labels, {1: "part $_$", 2: "$x^$"}, tmp_path / "picture.png", title="scan$_$1")
    figure = Figure()
    draw_slice(figure, image, labels, {1: "part $_$"}, title="scan$_$1")
    FigureCanvasAgg(figure).draw()


def test_a_figure_without_labels_and_one_of_a_constant_image(tmp_path: Path) -> None:
    image, labels = case()
    save_overlay(image, np.zeros_like(labels), NAMES, tmp_path / "without.png")
    flat = nibabel.Nifti1Image(np.ones(labels.shape, np.float32), image.affine)
    save_overlay(flat, labels, NAMES, tmp_path / "flat.png")
    assert {path.name for path in tmp_path.iterdir()} == {"without.png", "flat.png"}


def test_an_image_is_drawn_without_names() -> None:
    image, labels = case()
    figure = Figure()
    draw_overlay(figure, image, labels, {})
    assert len(figure.axes) == 3
    assert not figure.legends
    assert VolumeViewer(image, labels, {}).png()[1:4] == b"PNG"


def test_surfaces_have_the_colors_of_the_contours() -> None:
    image, labels = case()
    figure = Figure()
    draw_surfaces(figure, labels, image.affine, NAMES)
    # Shaded: the brightest face has the color, up to its brightness.
    for surface, color in zip(figure.axes[0].collections, label_colors(NAMES).values()):
        faces = np.asarray(surface.get_facecolor())[:, :3]
        wanted = np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)]) / 255
        assert np.argsort(faces.mean(0)).tolist() == np.argsort(wanted).tolist()


@pytest.mark.parametrize("extent", [(1, 1, 1), (2, 2, 2), (9, 1, 1)])
def test_structures_too_thin_to_be_smoothed_have_a_surface(extent: tuple[int, int, int]) -> None:
    labels = np.zeros((14, 14, 14), np.uint8)
    labels[tuple(slice(4, 4 + part) for part in extent)] = 1
    figure = Figure()
    draw_surfaces(figure, labels, np.eye(4), {1: "nerve $b^{$"})
    figure.draw_without_rendering()  # the name is no formula
    axes: Any = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["nerve $b^{$"]
    drawn = [axes.xy_dataLim.intervalx, axes.xy_dataLim.intervaly, axes.zz_dataLim.intervalx]
    np.testing.assert_allclose(drawn, [[3.5, 3.5 + part] for part in extent])


def test_more_labels_than_colors_begin_again() -> None:
    colors = label_colors(range(1, 50))
    assert len(set(colors.values())) == 20
    assert colors[1] == colors[21] != colors[2]


def test_an_unknown_plane_is_refused() -> None:
    image, labels = case()
    with pytest.raises(ValueError, match="plane must be one of sagittal, coronal, axial, got 'oblique'"):
        draw_slice(Figure(), image, labels, NAMES, "oblique")


def test_a_viewer_opens_at_the_largest_structure_and_has_a_picture_beside_it() -> None:
    pytest.importorskip("ipyniivue")
    image, labels = case("LPS")
    labels = np.where(labels == 1, 0, labels)  # what is left lies on the right of the patient, and high
    viewer = VolumeViewer(image, labels, NAMES)
    widget = viewer.widget()
    np.testing.assert_allclose(widget.scene.crosshair_pos, [23 / 30, 12 / 24, 14.5 / 20], atol=1e-6)
    assert [volume.name for volume in widget.volumes] == ["image.nii.gz", "labels.nii.gz"]
    assert widget.volumes[1].colormap_label.labels[2] == "tumor"
    offered = viewer._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= offered.keys()


def test_a_viewer_without_ipyniivue_is_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipyniivue", None)
    assert VolumeViewer(*case(), NAMES)._repr_mimebundle_().keys() == {"text/plain", "image/png"}


@pytest.mark.parametrize("draw", [draw_overlay, draw_slice, lambda _, *arguments: VolumeViewer(*arguments)])
def test_labels_of_another_grid_are_not_drawn(draw: Any) -> None:
    image = nibabel.Nifti1Image(np.random.rand(8, 9, 10), np.eye(4))
    with pytest.raises(InputError, match=r"labels have the shape \(4, 9, 10\)"):
        draw(Figure(), image, np.ones((4, 9, 10), np.uint8), {1: "liver"})
    with pytest.raises(InputError, match="whole numbers from 0 to 255"):
        draw(Figure(), image, np.full((8, 9, 10), -1), {1: "liver"})


@pytest.mark.parametrize("outside", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_outside_of_a_mask_leaves_the_inside_as_it_is(outside: float) -> None:
    image, labels = case()
    masked = np.asarray(image.dataobj).copy()
    masked[:, :3] = outside
    masked = nibabel.Nifti1Image(masked, image.affine)
    inside = nibabel.Nifti1Image(np.asarray(image.dataobj)[:, 3:], image.affine)
    limits = []
    for volume, found in ((masked, labels), (inside, labels[:, 3:])):
        figure = Figure()
        draw_slice(figure, volume, found, NAMES)
        limits.append(figure.axes[0].images[0].get_clim())
    assert limits[0] == pytest.approx(limits[1])
    view = image_view("scan", masked, labels, NAMES)
    gray = np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(view["image"]))).dataobj)
    assert gray[:, 3:].std() > 50
    assert (gray[:, :3] == (255 if outside == np.inf else 0)).all()


@pytest.mark.parametrize("draw", [draw_overlay, draw_slice])
def test_an_image_of_several_volumes_is_not_drawn(draw: Any) -> None:
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6, 2)), np.eye(4))
    with pytest.raises(InputError, match=r"of the shape \(4, 5, 6, 2\) cannot be drawn: a 3D image is needed"):
        draw(Figure(), image, np.zeros((4, 5, 6), np.uint8), NAMES)


DRAW = [draw_overlay, draw_slice, lambda _, *arguments: VolumeViewer(*arguments).png()]


@pytest.mark.parametrize("draw", DRAW)
def test_an_image_of_another_format_of_nibabel_is_drawn(draw: Any) -> None:
    image, labels = case()
    draw(Figure(), nibabel.MGHImage(np.asarray(image.dataobj, np.float32), image.affine), labels, NAMES)


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
@pytest.mark.parametrize("draw", DRAW)
def test_voxels_that_are_no_real_numbers_are_not_drawn(draw: Any, dtype: Any) -> None:
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), dtype), np.eye(4))
    with pytest.raises(InputError, match=r"cannot be drawn: real numbers are needed"):
        draw(Figure(), image, np.zeros((4, 5, 6), np.uint8), NAMES)
