"""Several images at once: the cores are divided among them; meanwhile one more is read, and one is written.

Reading, measuring and drawing take one core, and a network does not keep many cores busy: with a core for each image,
all cores have work. On a GPU one image is segmented at a time, while the next is read and the one before is written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from queue import SimpleQueue
from typing import TypeVar

import torch

from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.system import available_memory

__all__ = ["SegmenterPool", "images_at_once", "run_in_order"]

MOST = 8  # threads of Python take turns, which many would wait for
MEMORY_OF_AN_IMAGE = 4 * 2**30  # bytes: what a CT of 512 x 512 x 800 voxels takes with 118 classes, see the guides

Item = TypeVar("Item")
Result = TypeVar("Result")


def images_at_once(segmenter: BundleSegmenter, count: int) -> int:
    """Return how many of `count` images to segment at once: one where the segmenter sees as much as memory allows.

    Example:
        >>> from monai_iunet import bundle_folder
        >>> images_at_once(BundleSegmenter(bundle_folder("hippocampus"), "cpu"), 1)
        1
    """
    if segmenter.device.type != "cpu" or getattr(segmenter.windows, "whole", False):
        return 1
    available = available_memory()
    fitting = MOST if available is None else available // MEMORY_OF_AN_IMAGE
    return max(1, min(torch.get_num_threads(), MOST, fitting, count))


class SegmenterPool:
    """Lends each segmenter to one thread at a time, since networks and transforms may be in use by one only.

    Args:
        segmenter: the first one; the others are copies.
        count: number of segmenters.
    """

    def __init__(self, segmenter: BundleSegmenter, count: int) -> None:
        self._free: SimpleQueue[BundleSegmenter] = SimpleQueue()
        for one in [segmenter, *(deepcopy(segmenter) for _ in range(count - 1))]:
            self._free.put(one)

    @contextmanager
    def borrow(self) -> Iterator[BundleSegmenter]:
        """Wait for a segmenter, and give it back at the end of the `with` block."""
        segmenter = self._free.get()
        try:
            yield segmenter
        finally:
            self._free.put(segmenter)


def run_in_order(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, torch_threads: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """Call a function for each item, several at once, and yield what comes out in the order of the items.

    After a failure nothing more is begun until the caller has seen it and goes on. With one worker the calls run in the
    thread of the caller, so that they can be interrupted at once; with more, an interruption waits for what is begun.

    Args:
        work: the function.
        items: what to call it with.
        workers: number of calls at once, each in a thread.
        torch_threads: number of threads that PyTorch uses in each.
    """
    if workers == 1:
        yield from ((item, _finished(work, item)) for item in items)
        return
    before = torch.get_num_threads()
    begun: deque[tuple[Item, Future[Result]]] = deque()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(torch_threads,)) as pool:
            for item in items:
                while begun and (len(begun) == workers or any(_has_failed(result) for _, result in begun)):
                    yield begun.popleft()
                begun.append((item, pool.submit(work, item)))
            yield from begun
    finally:
        torch.set_num_threads(before)  # that of the process, which the workers have changed


def _finished(work: Callable[[Item], Result], item: Item) -> Future[Result]:
    """Call a function here, and return what comes out as a thread would."""
    result: Future[Result] = Future()
    try:
        result.set_result(work(item))
    except Exception as error:
        result.set_exception(error)
    return result


def _has_failed(result: Future[Result]) -> bool:
    return result.done() and result.exception() is not None
