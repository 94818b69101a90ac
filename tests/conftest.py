"""What tests share."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# The tensors of most tests are too small for threads to pay, in processes that tests start, too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The site needs packages that tests do not.
collect_ignore = [] if find_spec("griffe") else ["reference_examples.py"]

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hippocampus_data() -> Path:
    """The Decathlon's Task04 with its labels, where it lies beside the checkout."""
    return _beside_the_checkout("Task04_Hippocampus")


@pytest.fixture
def headneck_data() -> Path:
    """The OpenKBP challenge's patients as NIfTI files, where they lie beside the checkout."""
    return _beside_the_checkout("OpenKBP_HeadNeck")


@pytest.fixture
def head_label_maps() -> Path:
    """Label maps of whole heads, where they lie beside the checkout."""
    return _beside_the_checkout("HeadLabelMaps")


def _beside_the_checkout(name: str) -> Path:
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"the {name} data is not beside the checkout (in ../shared/data)")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
