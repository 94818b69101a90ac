"""The README's drawings are those of the code."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from monai_iunet import IUNet
from monai_iunet.visualization import network_drawing
from monai_iunet.visualization.network_drawing import draw_backward, draw_network

FOLDER = Path(network_drawing.__file__).parent


@pytest.mark.parametrize(("name", "drawn"), [("network", draw_network()), ("backward", draw_backward())])
def test_the_committed_drawings_are_those_of_the_code(name: str, drawn: str) -> None:
    ElementTree.fromstring(drawn)
    assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == drawn


def test_a_drawing_names_the_channels_of_its_network() -> None:
    net = IUNet(3, (32, 64, 128))
    drawn = draw_network((32, 64, 128))
    for count in net.channels:
        assert drawn.count(f">{count}</text>") == 2
    assert "24 channels skip" in drawn
    assert "8 to 64" in drawn
