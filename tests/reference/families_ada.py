"""Adaptive discriminator augmentation."""

from typing import Any

import torch
from comparison import Family, Meta, Tensors, UnsupportedError, load, parameter_gradients
from families_stylegan2 import build_discriminator
from torch import Tensor

from lightning_modules.ada import TRANSFORMATIONS, AdaptiveAugmentation
from lightning_modules.losses import r1_penalty


def build(n_channels: int, enabled: list[str]) -> AdaptiveAugmentation:
    """The original pipeline: 3 channels are colours, all others are alone; hue and saturation need colours."""
    names = [f"channel{i}" for i in range(n_channels)]
    colours = n_channels == 3
    if unknown := set(enabled) - set(TRANSFORMATIONS):
        raise UnsupportedError(f"ADA with {', '.join(sorted(unknown))}")
    multipliers: dict[str, Any] = {name: float(name in enabled) for name in TRANSFORMATIONS}
    multipliers |= {} if colours else {"hue": 0.0, "saturation": 0.0}
    return AdaptiveAugmentation(names, None, [names] if colours else None, xflip_axis=-1, **multipliers)


def augment(images: Tensor, enabled: list[str], percentile: float) -> Tensor:
    ada = build(images.shape[1], enabled)
    position = torch.arange(len(images))
    return ada.transform(images, ada.draw(position, images.shape[2:], seed=0, percentile=percentile))


def ada_augment(meta: Meta, ref: Tensors) -> Tensors:
    filters = AdaptiveAugmentation()
    ours: Tensors = {"const/Hz_geom": filters.Hz_geom, "const/Hz_fbank": filters.Hz_fbank}
    for case in meta["cases"]:
        if options := set(case) - {"index", "channels", "enabled", "percentile"}:
            raise UnsupportedError(f"ADA cases with {', '.join(sorted(options))}")
        key = f"case{case['index']:03d}"
        x = ref[f"in/x{case['channels']}"].requires_grad_()
        y = ours[f"{key}/y"] = augment(x, case["enabled"], case["percentile"])
        if f"{key}/r" in ref:
            (ours[f"{key}/dx"],) = torch.autograd.grad((y * ref[f"{key}/r"]).sum(), x)
    return ours


def ada_r1(meta: Meta, ref: Tensors) -> Tensors:
    net = build_discriminator(meta["ctor"])
    load(net, ref, "D/", meta["names"])
    images = ref["in/img"].requires_grad_()
    ours = {"out/img_augmented": augment(images, meta["enabled"], meta["percentile"])}
    logits = ours["out/logits"] = net(ours["out/img_augmented"], ref.get("in/c"))
    (ours["out/r1_grad"],) = torch.autograd.grad(logits.sum(), images, retain_graph=True)
    penalty = ours["out/r1_penalty"] = r1_penalty(images, logits)
    loss = (penalty * meta["r1_gamma"] / 2).mean()
    return ours | parameter_gradients(net, loss, meta, ref, "out/r1_param_grad")


FAMILIES: dict[str, Family] = {"ada_augment": ada_augment, "ada_r1": ada_r1}
