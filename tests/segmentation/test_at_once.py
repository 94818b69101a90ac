from __future__ import annotations

import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from monai_iunet import BundleSegmenter, StreamingInferer, bundle_folder
from monai_iunet.segmentation import at_once
from monai_iunet.segmentation.at_once import SegmenterPool, images_at_once, run_in_order
from monai_iunet.segmentation.files import Settings, segment_files

LONG = 60  # seconds after which a test that waits for another thread fails


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(at_once, "available_memory", lambda: None)  # what other tests leave of it does not matter
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_so_many_threads(two_threads: None) -> None:
    together, most, lock = 0, 0, threading.Lock()
    meeting = threading.Barrier(3)

    def work(number: int) -> tuple[int, int]:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        if number < 3:
            meeting.wait(LONG)  # passes only if three calls run at once
        with lock:
            together -= 1
        return 10 * number, torch.get_num_threads()

    results = [(number, result.result()) for number, result in run_in_order(work, range(9), 3, 1)]
    assert results == [(number, (10 * number, 1)) for number in range(9)]
    assert most == 3
    assert torch.get_num_threads() == 2


def test_one_at_a_time_runs_in_the_thread_of_the_caller(two_threads: None) -> None:
    seen = [result.result() for _, result in run_in_order(lambda _: threading.current_thread(), range(2), 1, 2)]
    assert seen == [threading.current_thread()] * 2


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_begun_after_a_failure_until_it_was_seen(workers: int) -> None:
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        return 1 // number

    results = run_in_order(work, [0, 1, 2, 3], workers, 1)
    _, first = next(results)
    with pytest.raises(ZeroDivisionError):
        first.result(LONG)
    assert begun in ([0], [0, 1])
    results.close()
    assert begun in ([0], [0, 1])


def test_the_number_of_threads_is_that_of_before_after_an_early_end(two_threads: None) -> None:
    results = run_in_order(lambda number: number, range(9), 2, 1)
    next(results)
    results.close()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("threads", "memory", "count", "expected"),
    [(1, 64, 9, 1), (2, 64, 9, 2), (2, 64, 1, 1), (6, 9, 9, 2), (6, 1, 9, 1), (64, 640, 99, 8), (2, None, 9, 2)],
)
def test_as_many_images_as_threads_memory_and_images_allow(
    threads: int, memory: int | None, count: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_once, "available_memory", lambda: None if memory is None else memory * 2**30)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    segmenter: Any = SimpleNamespace(device=torch.device("cpu"), windows=StreamingInferer(8))
    assert images_at_once(segmenter, count) == expected
    segmenter.windows = StreamingInferer("whole")  # takes what memory is free for one image
    assert images_at_once(segmenter, count) == 1
    segmenter = SimpleNamespace(device=torch.device("cuda"), windows=StreamingInferer(8))
    assert images_at_once(segmenter, count) == 1


def test_an_error_ends_the_threads(two_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [tmp_path / f"{name}.nii.gz" for name in "abc"]
    for image in images:
        nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((20, 24, 20)), np.eye(4)), image)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("monai_iunet.segmentation.files.read_image", fail)
    segmenter = BundleSegmenter(bundle_folder("hippocampus"), "cpu")
    with pytest.raises(OSError, match="No space left") as caught:
        list(segment_files(images, segmenter, tmp_path / "out", Settings()))
    assert caught.tb is not None  # which would keep them alive
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
    assert torch.get_num_threads() == 2


def test_threads_share_no_network() -> None:
    segmenter = BundleSegmenter(bundle_folder("hippocampus"), "cpu")
    pool = SegmenterPool(segmenter, 2)
    with pool.borrow() as one, pool.borrow() as other:
        assert one is segmenter
        assert other.network is not one.network
        assert other.inferer is not one.inferer
        for parameter, copied in zip(one.network.parameters(), other.network.parameters()):
            assert torch.equal(parameter, copied)
    with pool.borrow() as again:
        assert again in (one, other)


@pytest.mark.long
def test_images_at_once_get_the_labels_of_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    generator = np.random.default_rng(0)
    images = []
    for name in "ab":
        blurred = torch.nn.functional.avg_pool3d(torch.from_numpy(generator.random((1, 1, 36, 44, 36))), 9, 1)
        nibabel.save(nibabel.Nifti1Image(1000 * blurred[0, 0].numpy(), np.eye(4)), tmp_path / f"{name}.nii.gz")
        images.append(tmp_path / f"{name}.nii.gz")
    segmenter = BundleSegmenter(bundle_folder("hippocampus"), "cpu")
    written: dict[bool, list[np.ndarray]] = {}
    meeting = threading.Barrier(2)
    segment = BundleSegmenter.segment

    def meet(self: BundleSegmenter, *arguments: Any, **options: Any) -> Any:
        meeting.wait(LONG)  # passes only if two images are segmented at once
        return segment(self, *arguments, **options)

    for overlap in (False, True):
        if overlap:
            request.getfixturevalue("two_threads")
            monkeypatch.setattr(BundleSegmenter, "segment", meet)
        settings = Settings(overlap=overlap)
        results: list[Any] = list(segment_files(images, segmenter, tmp_path / str(overlap), settings))
        assert [result.name for result in results] == list("ab")
        written[overlap] = [np.asarray(nibabel.load(result.written).dataobj) for result in results]
    assert any(labels.any() for labels in written[False])
    for one, other in zip(written[False], written[True]):
        np.testing.assert_array_equal(one, other)
