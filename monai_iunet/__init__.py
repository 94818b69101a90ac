r"""Invertible U-Nets for MONAI: volumetric segmentation networks whose training memory does not grow with depth.

`IUNet` is the bijective network, `SegIUNet` the same between a convolutional stem and head. Every public name is
`monai_iunet.NAME`, in Python, in the configs of bundles and in nnU-Net's plans; it is loaded on first use, so that
importing the package is light.

## By task

- Train a network: `IUNet`, `SegIUNet`, `ChunkedDiceCELoss`, `MarginalLoss`.
- Know what a training step will hold, or what fits a memory: `plan_training`, which returns a `TrainingPlan`,
  `largest_patch`, `most_couplings`, `best_activations`; count what one holds: `LiveBytes`.
- See how well activations are rebuilt: `reconstruction_error`.
- Build a reversible network of your own: `InvertibleLayer`, `InvertibleChain`, `AdditiveCoupling`, `Branch`.
- Segment images: `segment`, `BundleSegmenter`, `Segmentation`; choose a bundle: `installed_bundles`, `bundle_folder`,
  `bundle_facts`; the template that `--example` segments: `load_template`; fit what predicts their Dice:
  `evaluate_quality`.
- Read images and write labels: `read_image`, `SimpleITKReader`, `list_series`, `series_files`, `label_image`,
  `write_dicom_seg`, `to_simpleitk`, `from_simpleitk`.
- Make a bundle from images and labels: `fit`.
- Write the configs of a bundle, and check one: `Task`, `write_bundle`, `verify_bundle`.
- Run a training by MONAI's engines: `list_cases`, `check_cases`, `check_structures`, `check_images`,
  `images_to_segment`, `Checkpoints`, `check_overrides`, `check_switches`, `check_postprocessing`, `StartFrom`,
  `start_from`, `EarlyStop`, `WeightAverage`, `TimedDecay`, `GrowingPatches`, `HandlerGroup`, `CaseReport`,
  `PictureHandler`.
- Know what weights were trained with: `training_record`, `trained_value`, `check_training`; and on which cases:
  `check_unseen`.
- Run a network by sliding windows without holding its whole output: `StreamingInferer`, `MirrorInferer`,
  `LabelInferer`; in 16 bits: `AutocastInferer`; several networks as one: `SegEnsemble`.
- Transform images and labels: `TrainingPatchd`, `CollatePadded`, `RandMirrord`, `mirrored_pairs`, `NoteContouredd`,
  `OneHotContouredd`, `LabelsOnImageGridd`, `LargestComponentsd`, `SaveImageLabelsd`, `is_scanned`.
- Vary contrast, and make images from label maps: `RandIntensityCurved`, `RandSyntheticImaged`.
- Draw images and labels: `draw_overlay`, `save_overlay`, `draw_slice`, `draw_surfaces`, `VolumeViewer`.
- Go on with networks of other packages: `iUNet`, `load_iunets_state_dict`, `PlannedIUNet`, `add_configurations`.

What a user's file or argument can cause is an `InputError`, one line that names it and the remedy.

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
another, and $A$ starts at 0, where each map is the identity. Gradients come from autograd through the linear algebra,
but for that of the Cayley transform, which follows from the transform itself. See
`monai_iunet.networks.layers.orthogonal`.

**The reversible backward pass.** Back-propagation through a layer $y = f(x)$ needs $x$. An invertible layer computes it
from $y$, and then no $x$ need be stored [5]. For a coupling, one evaluation of $F(b)$ gives both the rebuilt $a = c -
F(b)$ and the graph for the gradients $\bar a = \bar c$, $\bar b \mathrel{+}= F'(b)^T \bar c$; so a step costs two
evaluations of each $F$ and one back-propagation, in place of one and one: about 4/3 of the time of plain
back-propagation, as with checkpointing, for less memory. The graph is autograd's own; only what its nodes would save is
rebuilt when they ask for it. See `monai_iunet.engine.reversible`.

**Memory.** Let $s$ be the bytes of a state, an activation of all channels of a level and the codes that wait beside it;
it is the same at every level, because nothing is lost. A plain network of $L$ couplings stores what each $F$ needs, at
least $L s / 2$ on the finest level, and the coarser ones add to it. Here, beside parameters, gradients and optimizer, a
step holds one state, its gradient and the working memory of one $F$: a small multiple of $s$, whatever $L$ is. Between
these ends a level may store or rebuild, or keep the outputs of convolutions alone, half a state each, from which the
rest of $F$ is quickly computed again. Each level down has about a quarter of the activations of the one above (in 3D,
where a quarter of its channels go down) but half of the operations, so coarse levels are the cheap ones to keep.
`monai_iunet.planning.budget` chooses, `monai_iunet.planning.plan` counts.

**Exactness.** In floating point $(a + r) - r$ is not $a$. The error is that of the last digit, but under 16-bit
autocast it flips the rounding of what $F$ sees, and the errors of gradients grow with depth. Multiples of $2^{-16}$
smaller than $2^8$ fit into the 24 binary digits of a float32, so sums and differences of them are exact as long as they
stay below $2^8$. With `exact=True` the input of the network, every $F(b)$ and the output of every orthogonal layer are
rounded to that grid. A rounded rotation is not quite undone by its transpose; the difference, a few steps of the grid,
is kept, three of them in two bytes [6, 7]. Rounding counts as the identity for gradients, and these are, to the last
bit, those of plain autograd through the same network. Under autocast to 16 bits states are integers of 16 bits,
multiples of $2^{-7}$; their gradients are of autocast's type, and three of the differences share a byte. See
`monai_iunet.networks.blocks.grid`.

Sources: [1] Dinh, Krueger, Bengio, NICE, 2014, arXiv 1410.8516. [2] Etmann, Ke, Schönlieb, iUNets, 2020, arXiv
2005.05220. [3] Cayley, 1846. [4] Lezcano-Casado, Martinez-Rubio, Cheap Orthogonal Constraints, 2019, arXiv 1901.08428.
[5] Gomez et al., The Reversible Residual Network, 2017, arXiv 1707.04585. [6] Maclaurin et al., 2015, arXiv 1502.03492.
[7] Zhang et al., 2024, arXiv 2407.09093.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monai_iunet.bundling.fit_quality import evaluate_quality
    from monai_iunet.bundling.new_bundle import write_bundle
    from monai_iunet.bundling.task import Task
    from monai_iunet.bundling.verify import verify_bundle
    from monai_iunet.engine.reversible import InvertibleLayer
    from monai_iunet.errors import InputError
    from monai_iunet.fitting.fit import fit
    from monai_iunet.inference.labels import LabelInferer, check_postprocessing
    from monai_iunet.inference.mirror import MirrorInferer
    from monai_iunet.inference.streaming import StreamingInferer
    from monai_iunet.interop.iunets import iUNet, load_iunets_state_dict
    from monai_iunet.interop.nnunet import PlannedIUNet, add_configurations
    from monai_iunet.io.bundles import bundle_facts, bundle_folder, installed_bundles
    from monai_iunet.io.dicom_series import list_series, series_files
    from monai_iunet.io.geometry import from_simpleitk, to_simpleitk
    from monai_iunet.io.labels import label_image
    from monai_iunet.io.read import read_image
    from monai_iunet.io.reader import SimpleITKReader
    from monai_iunet.losses.chunked_dice_ce import ChunkedDiceCELoss
    from monai_iunet.losses.partial_labels import MarginalLoss, NoteContouredd, OneHotContouredd
    from monai_iunet.networks.blocks.branch import Branch
    from monai_iunet.networks.blocks.chain import InvertibleChain
    from monai_iunet.networks.blocks.coupling import AdditiveCoupling
    from monai_iunet.networks.diagnostics import reconstruction_error
    from monai_iunet.networks.nets.iunet import IUNet
    from monai_iunet.networks.nets.seg_ensemble import SegEnsemble
    from monai_iunet.networks.nets.seg_iunet import SegIUNet
    from monai_iunet.planning.budget import best_activations, largest_patch, most_couplings
    from monai_iunet.planning.live_bytes import LiveBytes
    from monai_iunet.planning.plan import TrainingPlan, plan_training
    from monai_iunet.segmentation.api import segment
    from monai_iunet.segmentation.dicom_seg import write_dicom_seg
    from monai_iunet.segmentation.result import Segmentation
    from monai_iunet.segmentation.segmenter import BundleSegmenter
    from monai_iunet.segmentation.whole_head import load_template
    from monai_iunet.training.autocast import AutocastInferer
    from monai_iunet.training.average import WeightAverage
    from monai_iunet.training.cases import check_cases, check_images, images_to_segment
    from monai_iunet.training.checkpoints import Checkpoints
    from monai_iunet.training.dataset import list_cases
    from monai_iunet.training.early_stop import EarlyStop
    from monai_iunet.training.evaluation import CaseReport
    from monai_iunet.training.fine_tuning import StartFrom, start_from
    from monai_iunet.training.growing import GrowingPatches
    from monai_iunet.training.handler_group import HandlerGroup
    from monai_iunet.training.overrides import check_overrides
    from monai_iunet.training.pictures import PictureHandler
    from monai_iunet.training.record import check_training, trained_value, training_record
    from monai_iunet.training.seen_cases import check_unseen
    from monai_iunet.training.structures import check_structures
    from monai_iunet.training.switches import check_switches
    from monai_iunet.training.time_limit import TimedDecay
    from monai_iunet.transforms.components import LargestComponentsd
    from monai_iunet.transforms.contrast import RandIntensityCurved
    from monai_iunet.transforms.foreground import is_scanned
    from monai_iunet.transforms.mirror import RandMirrord, mirrored_pairs
    from monai_iunet.transforms.outputs import LabelsOnImageGridd, SaveImageLabelsd
    from monai_iunet.transforms.patches import CollatePadded, TrainingPatchd
    from monai_iunet.transforms.synthetic import RandSyntheticImaged
    from monai_iunet.visualization.overlay import draw_overlay, save_overlay
    from monai_iunet.visualization.slices import draw_slice
    from monai_iunet.visualization.surfaces import draw_surfaces
    from monai_iunet.visualization.viewer import VolumeViewer

__all__ = [
    "AdditiveCoupling",
    "AutocastInferer",
    "Branch",
    "BundleSegmenter",
    "CaseReport",
    "Checkpoints",
    "ChunkedDiceCELoss",
    "CollatePadded",
    "EarlyStop",
    "GrowingPatches",
    "HandlerGroup",
    "IUNet",
    "InputError",
    "InvertibleChain",
    "InvertibleLayer",
    "LabelInferer",
    "LabelsOnImageGridd",
    "LargestComponentsd",
    "LiveBytes",
    "MarginalLoss",
    "MirrorInferer",
    "NoteContouredd",
    "OneHotContouredd",
    "PictureHandler",
    "PlannedIUNet",
    "RandIntensityCurved",
    "RandMirrord",
    "RandSyntheticImaged",
    "SaveImageLabelsd",
    "SegEnsemble",
    "SegIUNet",
    "Segmentation",
    "SimpleITKReader",
    "StartFrom",
    "StreamingInferer",
    "Task",
    "TimedDecay",
    "TrainingPatchd",
    "TrainingPlan",
    "VolumeViewer",
    "WeightAverage",
    "add_configurations",
    "best_activations",
    "bundle_facts",
    "bundle_folder",
    "check_cases",
    "check_images",
    "check_overrides",
    "check_postprocessing",
    "check_structures",
    "check_switches",
    "check_training",
    "check_unseen",
    "draw_overlay",
    "draw_slice",
    "draw_surfaces",
    "evaluate_quality",
    "fit",
    "from_simpleitk",
    "iUNet",
    "images_to_segment",
    "installed_bundles",
    "is_scanned",
    "label_image",
    "largest_patch",
    "list_cases",
    "list_series",
    "load_iunets_state_dict",
    "load_template",
    "mirrored_pairs",
    "most_couplings",
    "plan_training",
    "read_image",
    "reconstruction_error",
    "save_overlay",
    "segment",
    "series_files",
    "start_from",
    "to_simpleitk",
    "trained_value",
    "training_record",
    "verify_bundle",
    "write_bundle",
    "write_dicom_seg",
]

_NAMES = {
    "bundling.fit_quality": ("evaluate_quality",),
    "bundling.new_bundle": ("write_bundle",),
    "bundling.task": ("Task",),
    "bundling.verify": ("verify_bundle",),
    "engine.reversible": ("InvertibleLayer",),
    "errors": ("InputError",),
    "fitting.fit": ("fit",),
    "inference.labels": ("LabelInferer", "check_postprocessing"),
    "inference.mirror": ("MirrorInferer",),
    "inference.streaming": ("StreamingInferer",),
    "interop.iunets": ("iUNet", "load_iunets_state_dict"),
    "interop.nnunet": ("PlannedIUNet", "add_configurations"),
    "io.bundles": ("bundle_facts", "bundle_folder", "installed_bundles"),
    "io.dicom_series": ("list_series", "series_files"),
    "io.geometry": ("from_simpleitk", "to_simpleitk"),
    "io.labels": ("label_image",),
    "io.read": ("read_image",),
    "io.reader": ("SimpleITKReader",),
    "losses.chunked_dice_ce": ("ChunkedDiceCELoss",),
    "losses.partial_labels": ("MarginalLoss", "NoteContouredd", "OneHotContouredd"),
    "networks.blocks.branch": ("Branch",),
    "networks.blocks.chain": ("InvertibleChain",),
    "networks.blocks.coupling": ("AdditiveCoupling",),
    "networks.diagnostics": ("reconstruction_error",),
    "networks.nets.iunet": ("IUNet",),
    "networks.nets.seg_ensemble": ("SegEnsemble",),
    "networks.nets.seg_iunet": ("SegIUNet",),
    "planning.budget": ("best_activations", "largest_patch", "most_couplings"),
    "planning.live_bytes": ("LiveBytes",),
    "planning.plan": ("TrainingPlan", "plan_training"),
    "segmentation.api": ("segment",),
    "segmentation.dicom_seg": ("write_dicom_seg",),
    "segmentation.result": ("Segmentation",),
    "segmentation.segmenter": ("BundleSegmenter",),
    "segmentation.whole_head": ("load_template",),
    "training.autocast": ("AutocastInferer",),
    "training.average": ("WeightAverage",),
    "training.cases": ("check_cases", "check_images", "images_to_segment"),
    "training.checkpoints": ("Checkpoints",),
    "training.dataset": ("list_cases",),
    "training.early_stop": ("EarlyStop",),
    "training.evaluation": ("CaseReport",),
    "training.fine_tuning": ("StartFrom", "start_from"),
    "training.growing": ("GrowingPatches",),
    "training.handler_group": ("HandlerGroup",),
    "training.overrides": ("check_overrides",),
    "training.pictures": ("PictureHandler",),
    "training.record": ("check_training", "trained_value", "training_record"),
    "training.seen_cases": ("check_unseen",),
    "training.structures": ("check_structures",),
    "training.switches": ("check_switches",),
    "training.time_limit": ("TimedDecay",),
    "transforms.components": ("LargestComponentsd",),
    "transforms.contrast": ("RandIntensityCurved",),
    "transforms.foreground": ("is_scanned",),
    "transforms.mirror": ("RandMirrord", "mirrored_pairs"),
    "transforms.outputs": ("LabelsOnImageGridd", "SaveImageLabelsd"),
    "transforms.patches": ("CollatePadded", "TrainingPatchd"),
    "transforms.synthetic": ("RandSyntheticImaged",),
    "visualization.overlay": ("draw_overlay", "save_overlay"),
    "visualization.slices": ("draw_slice",),
    "visualization.surfaces": ("draw_surfaces",),
    "visualization.viewer": ("VolumeViewer",),
}
_MODULES = {name: f"monai_iunet.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
