"""arl_fast: Asymmetric Representation Learning (ARL, ICCV 2025) as a drop-in loss for multimodal training."""

from .branches import BranchLogits
from .diagnose import diagnose
from .functional import arl_loss, modulate
from .heads import BilinearHead, ConcatHead, GatedHead, SharedHead, SumHead, ZeroedHead
from .history import History
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
    "GatedHead",
    "History",
    "LinearARLLoss",
    "SharedHead",
    "SumHead",
    "ZeroedHead",
    "arl_loss",
    "diagnose",
    "linear_arl_loss",
    "modulate",
]
