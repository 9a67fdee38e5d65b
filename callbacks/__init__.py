"""Callbacks: glue between training rules and metrics; no mathematics here."""

from callbacks.atomic_checkpoint import AtomicCheckpointIO
from callbacks.curves import CurvesCSV
from callbacks.dice import Dice
from callbacks.ema import EMA
from callbacks.equivariance import Equivariance
from callbacks.evaluation import Evaluation
from callbacks.image_grid import ImageGrid
from callbacks.label_maps import LabelMaps
from callbacks.membership_losses import MembershipLosses
from callbacks.memorization import Memorization
from callbacks.posthoc_ema import PosthocEMA
from callbacks.reconstruction import Reconstruction
from callbacks.run_record import RunRecord
from callbacks.sensitivity import Sensitivity
from callbacks.synthetic_dataset import SyntheticDataset

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "CurvesCSV",
    "Dice",
    "Equivariance",
    "Evaluation",
    "ImageGrid",
    "LabelMaps",
    "MembershipLosses",
    "Memorization",
    "PosthocEMA",
    "Reconstruction",
    "RunRecord",
    "Sensitivity",
    "SyntheticDataset",
]
