"""arl_fast: Asymmetric Representation Learning (ARL, ICCV 2025) as a drop-in loss for multimodal training."""

from .branches import BranchLogits
from .functional import arl_loss, modulate
from .fusion import FusionWeights
from .heads import BilinearHead, ConcatHead, GatedHead, SharedHead, SumHead, ZeroedHead
from .linear import LinearARLLoss, linear_arl_loss
from .loss import ARLLoss
from .stats import BranchStats

__version__ = "0.1.0"

__all__ = [
    "ARLLoss",
    "BilinearHead",
    "BranchLogits",
    "BranchStats",
    "ConcatHead",
    "FusionWeights",
    "GatedHead",
    "LinearARLLoss",
    "SharedHead",
    "SumHead",
    "ZeroedHead",
    "arl_loss",
    "linear_arl_loss",
    "modulate",
]
