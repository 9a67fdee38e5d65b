"""Adaptive discriminator augmentation for images with named channels.

Karras, Aittala, Hellsten, Laine, Lehtinen, Aila 2020, "Training Generative Adversarial Networks with Limited Data"
(NeurIPS, arXiv 2006.06676). The discriminator sees real and generated images through random transformations, each
applied with probability p. As long as p stays well below 1, the generator that fools it makes images without them
(section 2.2, appendix C); p follows from how much the discriminator overfits (section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.ada_transforms import (
    BAND_POWER,
    COLOUR,
    GEOMETRIC,
    SYM6,
    Parameters,
    amplify_bands,
    change_colours,
    cut_out,
    filter_bank,
    inverse_affine,
    warp,
)
from lightning_modules.counter_random import Stream, random_normal, random_uniform
from lightning_modules.networks.layers import fast_layout
from lightning_modules.networks.operators import setup_filter

TRANSFORMATIONS = (*GEOMETRIC, *COLOUR, "imgfilter", "noise", "cutout")
ONE_CHANCE = ("xint", "xfrac", "cutout")  # several numbers that are applied together


def adjusted_probability(p: Tensor, mean_sign: Tensor, target: float, images: int, adjust_kimg: float) -> Tensor:
    """Move p by a constant speed towards less overfitting (section 3), within [0, 1].

    Args:
        p: probability so far, a scalar.
        mean_sign: r_t of equation 1, mean sign of D on real images; near 1 when the discriminator overfits.
        target: the value of `mean_sign` to hold.
        images: training images since the last adjustment.
        adjust_kimg: thousands of images in which p moves by 1.
    """
    return (p + (mean_sign - target).sign() * (images / (adjust_kimg * 1000))).clamp(0, 1)


class AdaptiveAugmentation(nn.Module):
    """Random transformations of the discriminator's input, with an adaptive probability.

    Geometry moves all channels together and cutout blanks the same rectangle in all. Brightness, contrast, luma flip,
    filtering and noise are drawn for every modality on its own and never reach the label.

    The label is resampled as the intensities that the generator makes of it, exactly as an image: generated labels are
    continuous, gradients have to flow through them, and nearest-neighbour interpolation has none. Real and generated
    labels are smoothed alike, so the discriminator learns nothing from it.

    By default the three families with which the paper trains are on, at the multiplier 1: pixel blitting, geometry and
    colour, those that help small data sets (figure 4). Upside-down brains and inverted contrasts are not anatomy, but
    below p of about 0.8 they do not leak into the generated images (section 2.2). A multiplier of 0 leaves a
    transformation out. Hue and saturation exist for three colours only, and are off.

    Args:
        channels: names of the channels in their order.
        label: the channel that holds the label; None if all are modalities.
        intensity_groups: modalities that share their draws of colour, filter and noise. One channel is treated as
            grey, three as red, green, blue. Default: every modality alone.
        target: mean sign of the discriminator on real images that p is to hold; None keeps p.
        p: probability at the start.
        adjust_kimg: thousands of images in which p can move by 1.
        adjust_interval: p moves every that many iterations.
        xflip: multiplier of p for mirror images.
        xflip_axis: the image axis that is mirrored; -2 is left and right in stored slices, -1 that of the original.
        rotate90: multiplier for rotations by multiples of 90 degrees.
        xint: multiplier for translations by whole pixels.
        xint_max: range of them, relative to the image.
        scale: multiplier for isotropic scaling.
        rotate: multiplier for rotations by any angle.
        aniso: multiplier for anisotropic scaling.
        xfrac: multiplier for translations by fractions of a pixel.
        scale_std: standard deviation of isotropic scaling, log2.
        rotate_max: range of rotations; 1 is the full circle.
        aniso_std: standard deviation of anisotropic scaling, log2.
        xfrac_std: standard deviation of fractional translations, relative to the image.
        brightness: multiplier for brightness.
        contrast: multiplier for contrast.
        lumaflip: multiplier for inversion of the grey axis.
        hue: multiplier for hue; needs a group of three.
        saturation: multiplier for saturation; needs a group of three.
        brightness_std: standard deviation of brightness; images are in [-1, 1].
        contrast_std: standard deviation of contrast, log2.
        hue_max: range of hue rotations; 1 is the full circle.
        saturation_std: standard deviation of saturation, log2.
        imgfilter: multiplier for the amplification of frequency bands.
        imgfilter_bands: further multipliers of the four bands, the lowest first.
        imgfilter_std: standard deviation of the amplification, log2.
        noise: multiplier for white noise.
        cutout: multiplier for cutout.
        noise_std: standard deviation of the noise's standard deviation.
        cutout_size: side of the rectangle, relative to the image.

    Raises:
        ValueError: for unknown or repeated channels, groups that are not 1 or 3 modalities, and values out of range;
            all problems at once.
    """

    p: Tensor
    Hz_geom: Tensor
    Hz_fbank: Tensor
    sign_sum: Tensor
    sign_count: Tensor
    _modalities: Tensor
    _group: Tensor

    def __init__(
        self,
        channels: Sequence[str] = ("T1", "T1ce", "T2", "FLAIR", "label"),
        label: str | None = "label",
        intensity_groups: Sequence[Sequence[str]] | None = None,
        target: float | None = 0.6,
        p: float = 0.0,
        adjust_kimg: float = 500.0,
        adjust_interval: int = 4,
        xflip: float = 1.0,
        xflip_axis: Literal[-2, -1] = -2,
        rotate90: float = 1.0,
        xint: float = 1.0,
        xint_max: float = 0.125,
        scale: float = 1.0,
        rotate: float = 1.0,
        aniso: float = 1.0,
        xfrac: float = 1.0,
        scale_std: float = 0.2,
        rotate_max: float = 1.0,
        aniso_std: float = 0.2,
        xfrac_std: float = 0.125,
        brightness: float = 1.0,
        contrast: float = 1.0,
        lumaflip: float = 1.0,
        hue: float = 0.0,
        saturation: float = 0.0,
        brightness_std: float = 0.2,
        contrast_std: float = 0.5,
        hue_max: float = 1.0,
        saturation_std: float = 1.0,
        imgfilter: float = 0.0,
        imgfilter_bands: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        imgfilter_std: float = 1.0,
        noise: float = 0.0,
        cutout: float = 0.0,
        noise_std: float = 0.1,
        cutout_size: float = 0.5,
    ) -> None:
        super().__init__()
        modalities = [name for name in channels if name != label]
        groups = [[name] for name in modalities] if intensity_groups is None else [list(g) for g in intensity_groups]
        geometry = (xflip, rotate90, xint, scale, rotate, aniso, xfrac)
        colour = (brightness, contrast, lumaflip, hue, saturation)
        multipliers = dict(zip(TRANSFORMATIONS, (*geometry, *colour, imgfilter, noise, cutout), strict=True))
        problems = _problems_of_channels(channels, label, groups)
        problems += [f"{k} is a multiplier and at least 0, not {v}" for k, v in multipliers.items() if not v >= 0]
        if (hue > 0 or saturation > 0) and not any(len(group) == 3 for group in groups):
            problems.append("hue and saturation need an intensity group of three channels; set both to 0")
        if len(imgfilter_bands) != len(BAND_POWER):
            problems.append(f"imgfilter_bands has one multiplier for each of {len(BAND_POWER)} bands")
        if not 0 <= p <= 1:
            problems.append(f"p is a probability, not {p}")
        if not adjust_kimg > 0 or adjust_interval < 1:
            problems.append("adjust_kimg and adjust_interval are positive")
        if problems:
            raise ValueError("Adaptive augmentation: " + "; ".join(problems) + ".")

        self.channels = tuple(channels)
        self.target = target
        self.adjust_kimg = adjust_kimg
        self.adjust_interval = adjust_interval
        self.multipliers = multipliers
        self.xflip_axis = xflip_axis
        self.xint_max = xint_max
        self.scale_std = scale_std
        self.rotate_max = rotate_max
        self.aniso_std = aniso_std
        self.xfrac_std = xfrac_std
        self.brightness_std = brightness_std
        self.contrast_std = contrast_std
        self.hue_max = hue_max
        self.saturation_std = saturation_std
        self.imgfilter_bands = tuple(imgfilter_bands)
        self.imgfilter_std = imgfilter_std
        self.noise_std = noise_std
        self.cutout_size = cutout_size
        self.group_sizes = [len(group) for group in groups]

        index = [self.channels.index(name) for group in groups for name in group]
        group = [k for k, size in enumerate(self.group_sizes) for _ in range(size)]
        self.register_buffer("p", torch.tensor(float(p)))
        self.register_buffer("Hz_geom", setup_filter(SYM6))
        self.register_buffer("Hz_fbank", filter_bank())
        self.register_buffer("sign_sum", torch.zeros([]))
        self.register_buffer("sign_count", torch.zeros([], dtype=torch.int64))
        self.register_buffer("_modalities", torch.tensor(index, dtype=torch.int64), persistent=False)
        self.register_buffer("_group", torch.tensor(group, dtype=torch.int64), persistent=False)

    def forward(self, images: Tensor, position: Tensor, seed: int, draw: int = 0) -> Tensor:
        """Transform images at random.

        Args:
            images: (N, C, H, W), channels as named, nominally in [-1, 1].
            position: int64 (N,), positions of the samples in the training.
            seed: of the training.
            draw: 0..7, tells several augmentations of the same position apart.

        Returns:
            (N, C, H, W), at least in float32.
        """
        if self.target is None and self.p == 0:
            return images
        return self.transform(images, self.draw(position, images.shape[2:], seed, draw))

    @torch.no_grad()
    def draw(
        self, position: Tensor, size: Sequence[int], seed: int, draw: int = 0, percentile: float | None = None
    ) -> Parameters:
        """Draw the parameters of the transformations that have a multiplier above 0.

        The numbers of a transformation depend neither on the rest of the batch nor on which others are enabled.

        Args:
            position: int64 (N,), positions of the samples in the training.
            size: (H, W) of the images.
            seed: of the training.
            draw: 0..7, tells several augmentations of the same position apart.
            percentile: for comparisons: apply everything, with all numbers at this percentile in the original's
                sense, that is erfinv(2 percentile - 1) for normal ones, and no rotation after `aniso`.

        Returns:
            By name, with J intensity groups and M modalities: `xflip` (N, 1) of 0 and 1, `rotate90` (N, 1) quarter
            turns, `xint`, `xfrac` (N, 2) x and y relative to the image, `scale`, `aniso` (N, 1) log2, `rotate` (N, 2)
            radians before and after `aniso`; `brightness`, `contrast` (log2), `lumaflip`, `hue` (radians),
            `saturation` (log2), each (N, J); `imgfilter` (N, J, 4) log2; `noise` (N, M, H, W), to be added; `cutout`
            (N, 3) side and centre. All are 0 where the transformation is not applied.
        """
        n_groups = len(self.group_sizes)
        table = (len(TRANSFORMATIONS), 4 * max(1, n_groups))
        index = (position * 8 + draw) * 4
        if percentile is None:
            p = self.p
            words = random_uniform(seed, Stream.ADA, index, 2 * math.prod(table))
            chance, uniform = words.reshape(-1, 2, *table).unbind(1)
            normal = random_normal(seed, Stream.ADA, index + 1, table)
        else:
            p = torch.ones_like(self.p)
            uniform = torch.full((len(position), *table), percentile, device=position.device)
            chance, normal = torch.zeros_like(uniform), torch.erfinv(2 * uniform - 1)

        def of(numbers: Tensor, name: str, width: int = n_groups) -> Tensor:
            return numbers[:, TRANSFORMATIONS.index(name), :width]

        def symmetric(name: str, width: int = n_groups) -> Tensor:
            return of(uniform, name, width) * 2 - 1

        rotate = symmetric("rotate", 2) * (math.pi * self.rotate_max)
        side = torch.full_like(uniform[:, 0, :1], self.cutout_size)
        values = {
            "xflip": (of(uniform, "xflip", 1) * 2).floor(),
            "rotate90": (of(uniform, "rotate90", 1) * 4).floor(),
            "xint": symmetric("xint", 2) * self.xint_max,
            "scale": of(normal, "scale", 1) * self.scale_std,
            "rotate": rotate if percentile is None else rotate * rotate.new_tensor([1.0, 0.0]),
            "aniso": of(normal, "aniso", 1) * self.aniso_std,
            "xfrac": of(normal, "xfrac", 2) * self.xfrac_std,
            "brightness": of(normal, "brightness") * self.brightness_std,
            "contrast": of(normal, "contrast") * self.contrast_std,
            "lumaflip": (of(uniform, "lumaflip") * 2).floor(),
            "hue": symmetric("hue") * (math.pi * self.hue_max),
            "saturation": of(normal, "saturation") * self.saturation_std,
            "imgfilter": of(normal, "imgfilter", 4 * n_groups) * self.imgfilter_std,
            "noise": of(normal, "noise").abs() * self.noise_std,
            "cutout": torch.cat([side, of(uniform, "cutout", 2)], 1),
        }
        parameters = {}
        for name, multiplier in self.multipliers.items():
            if multiplier > 0:
                probability = multiplier * p
                if name == "rotate":  # one of the two rotations is applied with the probability wanted
                    probability = 1 - (1 - probability).clamp(min=0).sqrt()
                elif name == "imgfilter":
                    probability = probability * p.new_tensor(self.imgfilter_bands * n_groups)
                width = 1 if name in ONE_CHANCE else values[name].shape[1]
                parameters[name] = values[name] * (of(chance, name, width) < probability)
        if "imgfilter" in parameters:
            parameters["imgfilter"] = parameters["imgfilter"].reshape(-1, n_groups, 4)
        if "noise" in parameters:
            white = random_normal(seed, Stream.ADA, index + 2, (len(self._group), *size))
            parameters["noise"] = parameters["noise"][:, self._group, None, None] * white
        return parameters

    def transform(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Apply the transformations with these parameters: (N, C, H, W) to (N, C, H, W), differentiable twice.

        Args:
            images: channels as named; computed at least in float32, under autocast too.
            parameters: of :meth:`draw`, for these samples.

        Raises:
            ValueError: if the number of channels is another one.
        """
        if images.shape[1] != len(self.channels):
            raise ValueError(
                f"Adaptive augmentation expects the {len(self.channels)} channels {', '.join(self.channels)}, but got "
                f"images of {images.shape[1]} channels. Set its option channels to the names of those of the data."
            )
        with torch.autocast(images.device.type, enabled=False):
            images = fast_layout(images, torch.promote_types(images.dtype, torch.float32))
            if any(name in parameters for name in GEOMETRIC):
                inverse = inverse_affine(parameters, images.shape[2:], self.xflip_axis)
                images = warp(images, inverse, self.Hz_geom)
            if any(name in parameters for name in (*COLOUR, "imgfilter", "noise")):
                x = images.index_select(1, self._modalities)
                if any(name in parameters for name in COLOUR):
                    x = change_colours(x, self.group_sizes, parameters)
                if "imgfilter" in parameters:
                    x = amplify_bands(x, parameters["imgfilter"].index_select(1, self._group), self.Hz_fbank)
                if "noise" in parameters:
                    x = x + parameters["noise"]
                images = images.index_copy(1, self._modalities, x)
            if "cutout" in parameters:
                images = cut_out(images, parameters["cutout"])
            return images

    @torch.no_grad()
    def accumulate(self, mean_sign: Tensor, count: int) -> None:
        """Note the mean sign of the discriminator on `count` real images, the same number on all ranks."""
        self.sign_sum += mean_sign.float() * count
        self.sign_count += count

    @torch.no_grad()
    def adjust(self, images: int) -> None:
        """Adapt p to the signs noted since the last call; the training rule calls it every `adjust_interval`.

        Args:
            images: images of the iterations since then, over all processes.
        """
        if self.target is not None:
            mean_sign = self.sign_sum / self.sign_count.clamp(min=1)
            self.p.copy_(adjusted_probability(self.p, mean_sign, self.target, images, self.adjust_kimg))
        self.sign_sum.zero_()
        self.sign_count.zero_()


def _problems_of_channels(channels: Sequence[str], label: str | None, groups: Sequence[Sequence[str]]) -> list[str]:
    """What is wrong with the names, as sentences."""
    problems = []
    if len(set(channels)) < len(channels):
        problems.append(f"channels are named twice: {', '.join(channels)}")
    if label is not None and label not in channels:
        problems.append(f"label {label} is none of the channels {', '.join(channels)}")
    grouped, modalities = [name for group in groups for name in group], [name for name in channels if name != label]
    if sorted(grouped) != sorted(modalities):
        problems.append(
            f"intensity_groups must hold every modality ({', '.join(modalities)}) once, but hold {', '.join(grouped)}"
        )
    if any(len(group) not in (1, 3) for group in groups):
        problems.append(f"an intensity group has 1 or 3 channels, but there are {[list(group) for group in groups]}")
    return problems
