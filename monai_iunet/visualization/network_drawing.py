"""Drawings of the network and of its backward pass, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from monai_iunet.io.files import write_text
from monai_iunet.networks.nets.iunet import IUNet

__all__ = ["draw_backward", "draw_network", "main"]

INK, BLUE, ORANGE, GRAY = "#222222", "#4c78a8", "#f58518", "#9a9a9a"
STYLE = "font-family: Helvetica, Arial, sans-serif; font-size: 13px"


def draw_network(channels: Sequence[int] = (32, 64, 128), couplings: int = 2) -> str:
    """Draw an `IUNet` as SVG: couplings, splits, orthogonal resampling, and the codes that skip.

    Args:
        channels: of each level, finest first.
        couplings: per level.

    Example:
        >>> draw_network((4, 16)).startswith("<svg")
        True
    """
    net = IUNet(3, tuple(channels), couplings=couplings)
    levels, step, width, height = len(net.channels), 95, 26, 46
    reach = couplings * (width + 6)
    total = 2 * levels * reach + 2 * levels * 46
    parts: list[str] = []
    left, right = 60.0, 60.0 + total
    for level, count in enumerate(net.channels):
        top = 40 + level * step
        last = level == levels - 1
        for number in range(couplings):
            for x in (left + number * (width + 6), right - number * (width + 6) - width):
                parts.append(_box(x, top, width, height, BLUE))
        for x in (left + (reach - 6) / 2, right - (reach - 6) / 2):
            parts.append(_text(x, top - 6, str(count), anchor="middle"))
        inner, outer = left + reach, right - reach
        middle = top + height / 2
        if last:
            parts.append(_arrow(inner, middle, outer, middle, INK))
        else:
            below = net.channels[level + 1] // 8
            parts.append(_arrow(inner, middle, outer, middle, GRAY, dashed=True))
            parts.append(
                _text((inner + outer) / 2, middle - 7, f"{count - below} channels skip", anchor="middle", fill=GRAY)
            )
            parts.append(_arrow(inner + 8, middle, inner + 34, top + step + height / 2 - 4, ORANGE))
            parts.append(_arrow(outer - 34, top + step + height / 2 - 4, outer - 8, middle, ORANGE))
            text = f"{below} to {net.channels[level + 1]}"
            parts.append(_text(inner + 8, top + height / 2 + step / 2 + 4, text, anchor="end", fill=ORANGE))
        left, right = inner + 46, outer - 46
    bottom = 40 + levels * step
    legend = [
        (BLUE, "additive coupling, resolution kept"),
        (ORANGE, "orthogonal matrix, half the resolution"),
        (GRAY, "split off and merged again"),
    ]
    x = 40.0
    for color, text in legend:
        parts += [_box(x, bottom, 14, 14, color), _text(x + 20, bottom + 12, text)]
        x += 40 + 7 * len(text)
    return _svg(max(total + 120, x), bottom + 30, parts)


def draw_backward(layers: int = 3) -> str:
    """Draw the backward pass as SVG: which states are kept, which rebuilt, and where gradients flow.

    Args:
        layers: layers of the chain.

    Example:
        >>> draw_backward(2).count("inverse")
        2
    """
    parts: list[str] = []
    gap, first = 170, 70
    rows = {"forward": 50, "rebuilt": 140, "gradient": 215}
    for index in range(layers + 1):
        x = first + index * gap
        kept = index == layers
        parts.append(_circle(x, rows["forward"], f"x{index}", BLUE if kept else GRAY, filled=kept))
        parts.append(_circle(x, rows["rebuilt"], f"x{index}", BLUE, filled=kept))
        parts.append(_circle(x, rows["gradient"], f"g{index}", ORANGE, filled=False))
        if index < layers:
            parts.append(_arrow(x + 24, rows["forward"], x + gap - 24, rows["forward"], INK))
            parts.append(_text(x + gap / 2, rows["forward"] - 9, f"layer {index + 1}", anchor="middle"))
            parts.append(_arrow(x + gap - 24, rows["rebuilt"], x + 24, rows["rebuilt"], BLUE))
            parts.append(_text(x + gap / 2, rows["rebuilt"] - 9, f"inverse {index + 1}", anchor="middle", fill=BLUE))
            parts.append(_arrow(x + gap - 24, rows["gradient"], x + 24, rows["gradient"], ORANGE))
            parts.append(_arrow(x + 8, rows["rebuilt"] + 22, x + gap / 2, rows["gradient"] - 6, GRAY, dashed=True))
    end = first + layers * gap
    parts.append(_arrow(end, rows["forward"] + 22, end, rows["rebuilt"] - 24, INK))
    parts.append(_text(end + 30, rows["forward"] + 5, "kept"))
    parts.append(_text(end + 30, rows["rebuilt"] + 5, "rebuilt, then freed", fill=BLUE))
    parts.append(_text(end + 30, rows["gradient"] + 5, "gradients", fill=ORANGE))
    note = "Gray: freed on the way forward. One evaluation of a layer rebuilds its input and gives its gradient."
    parts.append(_text(40, rows["gradient"] + 52, note))
    return _svg(end + 180, rows["gradient"] + 70, parts)


def main() -> None:
    """Write both drawings beside this file."""
    for name, drawing in {"network": draw_network(), "backward": draw_backward()}.items():
        path = Path(__file__).parent / f"{name}.svg"
        write_text(path, drawing)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    lines = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" style="{STYLE}">\n<rect width="100%" height="100%" fill="white"/>\n{lines}\n</svg>\n'
    )


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}"/>'


def _circle(x: float, y: float, text: str, color: str, filled: bool) -> str:
    fill, ink = (color, "white") if filled else ("white", color)
    return (
        f'<circle cx="{x:g}" cy="{y:g}" r="20" fill="{fill}" stroke="{color}" stroke-width="2"/>\n'
        f"{_text(x, y + 5, text, anchor='middle', fill=ink)}"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", fill: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'


def _arrow(x1: float, y1: float, x2: float, y2: float, color: str, dashed: bool = False) -> str:
    """Return a line whose head is drawn too, for viewers without markers."""
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    along, across = ((x2 - x1) / length, (y2 - y1) / length), (-(y2 - y1) / length, (x2 - x1) / length)
    base = (x2 - 9 * along[0], y2 - 9 * along[1])
    head = [
        (x2, y2),
        (base[0] + 4.5 * across[0], base[1] + 4.5 * across[1]),
        (base[0] - 4.5 * across[0], base[1] - 4.5 * across[1]),
    ]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in head)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    line = f'x1="{x1:g}" y1="{y1:g}" x2="{base[0]:.1f}" y2="{base[1]:.1f}"'
    return f'<line {line} stroke="{color}" stroke-width="2"{dash}/>\n<polygon points="{points}" fill="{color}"/>'


if __name__ == "__main__":
    main()
