r"""Invertible U-Nets for MONAI: volumetric segmentation networks whose training memory does not grow with depth.

`IUNet` is the bijective network, `SegIUNet` the same between a convolutional stem and head; `plan_training` says what a
training step will hold, `reconstruction_error` how well activations are rebuilt; `segment` applies a bundle to an
image, and `SimpleITKReader` reads DICOM series, NRRD and MetaImage for MONAI's `LoadImage`. Names are loaded on first
use, so that importing the package is light.

## The mathematics

**Couplings.** The channels of an activation are split into two parts $(a, b)$. An additive coupling maps them to $(b,\,
a + F(b))$ with an arbitrary network $F$, and is undone by $(b, c) \mapsto (c - F(b),\, b)$: the inverse needs $F$, not
its inverse [1]. Its Jacobian has determinant $\pm 1$, so volume is kept. As the parts change places, two couplings
change every channel. See `monai_iunet.networks.blocks.coupling`.

**Resampling.** To see far, a U-Net works at several resolutions, and to be invertible it must not lose a value on the
way. So a block of $n$ neighboring voxels of one channel (8 for a stride of 2 in 3D) becomes one voxel of $n$ channels,
multiplied by an orthogonal $n \times n$ matrix $K$, one per channel: the number of values and their norm stay, and the
inverse is $K^T$. Of $C$ channels, $k < C$ are downsampled to $n k$, and the other $C - k$, the code of the level, skip
to the decoder, where they are merged with what comes back up [2]. See `monai_iunet.networks.blocks.resampling`.

**Orthogonal maps.** A matrix that shall stay orthogonal while an optimizer moves it is written as a function of a free
one: $A = W - W^T$ is skew-symmetric whatever $W$ is, and the Cayley transform $(I + A)^{-1} (I - A)$, the exponential
$e^A$ or a product of Householder reflections takes it to an orthogonal matrix [3, 4]. A natural start is the Haar
matrix, whose first channel is the scaled mean of a block. No Cayley transform gives it: the eigenvalues of $A$ are $i
t$, those of its transform $(1 - i t) / (1 + i t)$, and none of these is $-1$, which is an eigenvalue of the Haar
matrix; it is only approached as $t \to \infty$. Therefore $K = B \, \mathrm{map}(A)$ with a fixed base $B$, Haar or
another, and $A$ starts at 0, where each map is the identity. Gradients are those of autograd through the linear
algebra; a derivative worked out by hand is easily wrong. See `monai_iunet.networks.layers.orthogonal`.

**The reversible backward pass.** Back-propagation through a layer $y = f(x)$ needs $x$. An invertible layer computes it
from $y$, and then no $x$ need be stored [5]. For a coupling, one evaluation of $F(b)$ gives both the rebuilt $a = c -
F(b)$ and the graph for the gradients $\bar a = \bar c$, $\bar b \mathrel{+}= F'(b)^T \bar c$; so a step costs two
evaluations of each $F$ and one back-propagation, in place of one and one: about 4/3 of the time of plain
back-propagation, as with checkpointing, for less memory. The graph is autograd's own; only what its nodes would save is
rebuilt when they ask for it. See `monai_iunet.reversible`.

**Memory.** Let $s$ be the bytes of a state, an activation of all channels of a level and the codes that wait beside it;
it is the same at every level, because nothing is lost. A plain network of $L$ couplings stores what each $F$ needs, at
least $L s / 2$ on the finest level, and the coarser ones add to it. Here, beside parameters, gradients and optimizer, a
step holds one state, its gradient and the working memory of one $F$: a small multiple of $s$, whatever $L$ is. Between
these ends a level may store or rebuild. Each level down has about a quarter of the activations of the one above (in 3D,
where a quarter of its channels go down) but half of the operations, so coarse levels are the cheap ones to store.
`monai_iunet.budget` chooses, `monai_iunet.plan` counts.

**Exactness.** In floating point $(a + r) - r$ is not $a$. The error is that of the last digit, but under 16-bit
autocast it flips the rounding of what $F$ sees, and the errors of gradients grow with depth. Multiples of $2^{-16}$
smaller than $2^8$ fit into the 24 binary digits of a float32, so sums and differences of them are exact as long as they
stay below $2^8$. With `exact=True` the input of the network, every $F(b)$ and the output of every orthogonal layer are
rounded to that grid. A rounded rotation is not quite undone by its transpose; the difference, a few steps of the grid,
is kept in a byte per value [6, 7]. Rounding counts as the identity for gradients, and these are, to the last bit, those
of plain autograd through the same network. See `monai_iunet.networks.blocks.grid`.

Sources: [1] Dinh, Krueger, Bengio, NICE, 2014, arXiv 1410.8516. [2] Etmann, Ke, Schönlieb, iUNets, 2020, arXiv
2005.05220. [3] Cayley, 1846. [4] Lezcano-Casado, Martinez-Rubio, Cheap Orthogonal Constraints, 2019, arXiv 1901.08428.
[5] Gomez et al., The Reversible Residual Network, 2017, arXiv 1707.04585. [6] Maclaurin et al., 2015, arXiv 1502.03492.
[7] Zhang et al., 2024, arXiv 2407.09093.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monai_iunet.diagnostics import reconstruction_error
    from monai_iunet.inference import segment
    from monai_iunet.networks.nets.iunet import IUNet
    from monai_iunet.networks.nets.seg_iunet import SegIUNet
    from monai_iunet.plan import TrainingPlan, plan_training
    from monai_iunet.readers import SimpleITKReader

__all__ = [
    "IUNet",
    "SegIUNet",
    "SimpleITKReader",
    "TrainingPlan",
    "plan_training",
    "reconstruction_error",
    "segment",
]

_MODULES = {
    "IUNet": "monai_iunet.networks.nets.iunet",
    "SegIUNet": "monai_iunet.networks.nets.seg_iunet",
    "SimpleITKReader": "monai_iunet.readers",
    "TrainingPlan": "monai_iunet.plan",
    "plan_training": "monai_iunet.plan",
    "reconstruction_error": "monai_iunet.diagnostics",
    "segment": "monai_iunet.inference",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_MODULES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
