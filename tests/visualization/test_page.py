"""The page to look through: what is in it, and what a browser makes of it."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iunet.errors import InputError
from monai_iunet.segmentation.report import write_report
from monai_iunet.visualization import page
from monai_iunet.visualization.page import image_view, viewer_program, write_page
from tests.test_cli import call, save

pytest.importorskip("ipyniivue")
NAMES = {1: "liver", 2: "<b>tumor"}


def volume(shape: tuple[int, int, int] = (24, 20, 16)) -> tuple[nibabel.Nifti1Image, np.ndarray]:
    data = np.random.default_rng(0).random(shape).astype(np.float32)
    labels = np.zeros(shape, np.uint8)
    labels[4:12, 5:15, 4:12] = 1
    labels[14:18, 5:10, 4:8] = 2
    return nibabel.Nifti1Image(data, np.diag([2.0, 2.0, 3.0, 1.0])), labels


@pytest.fixture
def written(tmp_path: Path) -> Path:
    views = {}
    for name in ("one", "two </script>"):
        views[name] = tmp_path / f"{len(views)}.json"
        views[name].write_text(json.dumps(image_view(name, *volume(), NAMES)))
    measures: dict[str, dict[str, float | str | None]] = {
        "one": {"liver, mm³": "900", "quality": 0.9},
        "two </script>": {"liver, mm³": "1000", "quality": 0.4},
        "three": {"liver, mm³": "80"},
    }
    path = tmp_path / "report.html"
    write_page(path, "Title", measures, views, ["two: <doubtful>"], ["two </script>"], "a command", {"torch": "2"})
    return path


def decoded(text: str) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def test_a_view_has_the_image_in_gray_and_the_labels_in_place() -> None:
    image, labels = volume()
    view = image_view("scan", image, labels, NAMES)
    np.testing.assert_array_equal(decoded(view["labels"]).get_fdata(), labels)
    np.testing.assert_allclose(decoded(view["labels"]).affine, image.affine)
    gray = decoded(view["image"])
    assert gray.get_data_dtype() == np.uint8
    assert np.corrcoef(gray.get_fdata().ravel(), image.get_fdata().ravel())[0, 1] > 0.999
    assert view["center"] == [15.0, 19.0, 22.5]  # of the larger structure
    assert view["legend"] == [["liver", "#1f77b4"], ["<b>tumor", "#ff7f0e"]]
    assert view["colors"]["A"] == [0, 255, 255]
    assert view["colors"]["R"] == [0, 0x1F, 0xFF]
    assert view["note"] == ""


def test_long_axes_are_thinned_out_and_stay_in_place() -> None:
    image, labels = volume((300, 20, 16))
    view = image_view("scan", image, labels, NAMES)
    shown = decoded(view["labels"])
    np.testing.assert_array_equal(shown.get_fdata(), labels[::2])
    np.testing.assert_allclose(shown.affine, image.affine @ np.diag([2, 1, 1, 1]))
    assert view["note"] == "shown with every 2nd voxel along the first axis"
    assert image_view("empty", image, np.zeros_like(labels), NAMES)["center"] == [298.0, 19.0, 22.5]


def test_the_page_needs_no_network_and_escapes_what_users_name(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    frame = text.replace(viewer_program()[0], "")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", frame)
    assert "<b>tumor" not in frame
    assert "two: &lt;doubtful&gt;" in frame
    assert frame.count("</script>") == frame.count("<script")
    assert text.count("export{COLORMAP_TYPE") == 1
    assert "BSD 2-Clause" in frame


@pytest.mark.parametrize(
    "limit", [lambda _: ("MOST_VIEWS", 1), lambda size: ("MOST_CHARACTERS", 2 * size - 1)], ids=["number", "size"]
)
def test_of_many_images_the_first_are_shown_and_the_page_says_so(
    limit: Callable[[int], tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = tmp_path / "view.json"
    view.write_text(json.dumps(image_view("one", *volume(), NAMES)))
    monkeypatch.setattr(page, *limit(view.stat().st_size))
    write_page(tmp_path / "page.html", "Title", {"one": {}, "two": {}}, {"one": view, "two": view})
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "2 images. The first 1 can be looked at here, the table has all." in text
    assert text.count('<button type="button" data-view') == 1


@pytest.mark.parametrize("content", [b'{"name": "one", "image": "H4sI', b"\xff", b"3"])
def test_a_view_that_a_copy_has_damaged_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_bytes(content)
    with pytest.raises(InputError, match=r"one.json: not what the page shows of an image \(.*\). Remove it"):
        write_page(tmp_path / "report.html", "Title", {"one": {}}, {"one": tmp_path / "one.json"})
    assert not (tmp_path / "report.html").exists()


def test_rows_of_doubtful_images_are_marked(tmp_path: Path) -> None:
    for name, doubts in (("sound", None), ("noise", "doubtful, predicted Dice below 0.72: liver 0.01")):
        measures = {"volumes_mm3": {"liver": 900.0}, "quality": {"liver": 0.01 if doubts else 0.9}}
        record = {"origin": {"bundle": "a 0.1"}, "doubts": doubts, **measures}
        (tmp_path / f"{name}_seg.json").write_text(json.dumps(record))
    assert write_report(tmp_path, tmp_path, tmp_path / "report.html", [], [], "a command") == 2
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<tr class="doubtful">\s*<td>(\w+)', text) == ["noise"]
    assert "<li>noise: doubtful, predicted Dice below 0.72: liver 0.01</li>" in text


def test_without_the_viewer_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise page.PackageNotFoundError(name)

    monkeypatch.setattr(page, "distribution", missing)
    code, _, error = call("segment", save(tmp_path / "a.nii.gz"), "--output", tmp_path / "out", "--report")
    assert code == 2
    assert "ipyniivue is needed for the page" in error
    assert not (tmp_path / "out").exists()


def test_a_package_without_the_program_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Package:
        version, files = "0.1", ()

        def locate_file(self, _: str) -> Path:
            return tmp_path / "widget.js"

    (tmp_path / "widget.js").write_text("export default {}")
    monkeypatch.setattr(page, "distribution", lambda _: Package())
    with pytest.raises(InputError, match="carries no program"):
        viewer_program()


def test_the_command_writes_a_page_of_all_results(tmp_path: Path) -> None:
    image, broken = save(tmp_path / "a.nii.gz"), tmp_path / "b.nii.gz"
    broken.write_bytes(b"no image")
    code, printed, _ = call("segment", image, broken, "--output", tmp_path / "out", "--report", "--no-overlay")
    assert code == 2
    assert printed.endswith(f"{tmp_path / 'out' / 'report.html'}\n")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "b.nii.gz: not a readable NIfTI file" in text
    assert "anterior hippocampus, mm³" in text
    assert "iunet_hippocampus_mri_segmentation 0." in text
    code, _, error = call("segment", image, "--output", tmp_path / "out", "--report", "--no-overlay")
    assert code == 2
    assert "report.html: exists" in error


@pytest.mark.browser
def test_a_browser_draws_the_image_and_sorts_the_table(written: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    from matplotlib.image import imread

    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        tab = browser.new_page(viewport={"width": 640, "height": 480}, offline=True)
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.set_default_timeout(180_000)
        tab.goto(written.as_uri())
        tab.wait_for_selector("body[data-shown='one']", state="attached")
        tab.click("#table th:nth-child(2) button")
        first = tab.locator("#table tbody tr td:first-child").all_inner_texts()
        tab.click("#table th:nth-child(3) button")
        tab.click("#table th:nth-child(3) button")
        by_quality = tab.locator("#table tbody tr td:first-child").all_inner_texts()
        tab.click("text='two </script>'")
        tab.wait_for_selector("body[data-shown='two </script>']", state="attached")
        legend = tab.inner_text("#legend")
        picture = written.with_suffix(".png")
        tab.locator("#canvas").screenshot(path=picture)
        browser.close()
    assert errors == []
    assert first == ["three", "one", "two </script>"]
    assert by_quality == ["one", "two </script>", "three"]
    assert "<b>tumor" in legend
    drawn = imread(picture)[..., :3]
    assert (drawn.max(-1) > 0.1).mean() > 0.05
    assert (drawn.max(-1) - drawn.min(-1) > 0.2).mean() > 0.005  # the labels, in color
