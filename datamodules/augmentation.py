"""Augmentation of segmentation training in MONAI: geometry moves image, label, brain mask; intensity the image."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.transforms.compose import Compose, OneOf
from monai.transforms.intensity.dictionary import RandAdjustContrastd, RandGaussianNoised, RandGaussianSmoothd
from monai.transforms.spatial.dictionary import RandAffined, RandSimulateLowResolutiond


class PaperAugmentation:
    """The augmentation of Usman Akbar et al. 2024: rotation, scaling, noise, blur, low resolution, gamma; no flips.

    Args:
        rotation_degrees: rotation by up to that angle, probability 0.75 (together with the scaling: one resampling).
        scaling: each axis stretched by up to that share.
        noise: largest standard deviation of Gaussian noise as a share of the grey range, probability 0.5.
    """

    def __init__(self, rotation_degrees: float = 30.0, scaling: float = 0.1, noise: float = 0.05) -> None:
        everything, image = ["image", "label", "brain"], ["image"]
        angle = float(np.deg2rad(rotation_degrees))
        self.transform = Compose(
            [
                RandAffined(
                    everything,
                    prob=0.75,
                    rotate_range=angle,
                    scale_range=(scaling, scaling),
                    mode=("bilinear", "nearest", "nearest"),
                    padding_mode="zeros",
                ),
                RandGaussianNoised(image, prob=0.5, std=noise * 255, sample_std=True),
                RandGaussianSmoothd(image, prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0)),
                RandSimulateLowResolutiond(image, prob=0.25, upsample_mode="bilinear", zoom_range=(0.75, 1.0)),
                OneOf(
                    [
                        RandAdjustContrastd(image, prob=0.1, gamma=(0.85, 1.2), invert_image=True, retain_stats=True),
                        RandAdjustContrastd(image, prob=0.2, gamma=(0.85, 1.2), retain_stats=True),
                    ]
                ),
            ]
        )

    def set_random_state(self, seed: int) -> None:
        """Make the next call a function of this seed."""
        self.transform.set_random_state(seed=seed)

    def __call__(self, sample: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Transform {"image": (4, H, W) in grey levels, "label": (1, H, W), "brain": (1, H, W)}."""
        augmented: Mapping[Hashable, Any] = self.transform(sample)
        return augmented
