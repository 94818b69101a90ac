"""Networks, the invertible layers they are made of, and the orthogonal matrices those use.

Imports point one way: `nets`, `blocks`, `layers`, and beneath them `monai_iunet.engine`, which knows invertible layers
but no U-Nets, and `monai_iunet.planning`, which knows networks by a protocol only. Importing this package makes the
networks known to MONAI's configs by their bare names.
"""

from monai_iunet.networks.nets.iunet import IUNet
from monai_iunet.networks.nets.seg_iunet import SegIUNet

__all__ = ["IUNet", "SegIUNet"]
