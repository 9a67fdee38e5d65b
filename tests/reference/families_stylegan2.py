"""StyleGAN 2: generator, discriminator, path length."""

import json

import torch
from comparison import (
    Family,
    Meta,
    Tensors,
    arguments,
    gradients,
    load,
    outputs_of_blocks,
    parameter_gradients,
    stated,
)
from torch import Tensor

from lightning_modules.losses import path_lengths, r1_penalty
from lightning_modules.networks.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

FIRST = "out/logits_first"
# The networks and their parts repeat arguments under the same names.
SAME = ("img_resolution", "img_channels", "c_dim", "channel_base", "channel_max", "architecture", "conv_clamp")
GENERATOR = (*SAME, "z_dim", "w_dim", "use_noise", "resample_filter")
MAPPING = ("num_layers", "lr_multiplier")
# The CPU numbers do not depend on these; dots: whatever the value.
ANY = {"num_fp16_res": ..., "fused_modconv_default": ..., "fp16_channels_last": ..., "activation": ["lrelu"]}


def mapping_widths(width: int | None) -> Meta:
    """What our mapping network does not have, as far as it is left at `width`, the default."""
    widths = [None, width]
    return {"embed_features": widths, "layer_features": widths, "activation": ["lrelu"], "w_avg_beta": ...}


def prefixed(prefix: str, values: Meta) -> Meta:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def build_generator(ctor: Meta) -> StyleGAN2Generator:
    same = {k: k for k in GENERATOR}
    mapping = {k: f"mapping_{k}" for k in MAPPING}
    renamed = same | prefixed("synthesis_kwargs", same) | prefixed("mapping_kwargs", mapping)
    ignored = ANY | prefixed("synthesis_kwargs", ANY) | prefixed("mapping_kwargs", mapping_widths(ctor["w_dim"]))
    return StyleGAN2Generator(**arguments(ctor, renamed, ignored)).eval()


def build_discriminator(ctor: Meta) -> StyleGAN2Discriminator:
    renamed = {k: k for k in (*SAME, "cmap_dim")} | prefixed("mapping_kwargs", {k: f"mapping_{k}" for k in MAPPING})
    renamed |= prefixed("epilogue_kwargs", {k: k for k in ("mbstd_group_size", "mbstd_num_channels")})
    renamed |= prefixed("block_kwargs", {k: k for k in ("resample_filter", "freeze_layers")})
    width = ctor.get("cmap_dim") or min(ctor.get("channel_base", 32768) // 4, ctor.get("channel_max", 512))
    ignored = ANY | prefixed("epilogue_kwargs", ANY) | prefixed("block_kwargs", ANY)
    ignored |= prefixed("mapping_kwargs", mapping_widths(width))
    return StyleGAN2Discriminator(**arguments(ctor, renamed, ignored)).eval()


def sg2_generator(meta: Meta, ref: Tensors) -> Tensors:
    net = build_generator(meta["ctor"])
    load(net, ref, "G/", meta["names"])
    c = ref.get("in/c")
    text = json.dumps(meta["definitions"])
    psi = float(stated(text, r"truncation_psi=([\d.]+)", "0.6"))
    cutoff = stated(text, r"truncation_cutoff=(\w+)", "4")
    truncation = (psi, None if cutoff == "None" else int(cutoff))
    first_mixed = int(stated(text, r"index >= (\d+)", "4"))

    ours: Tensors = {}
    with torch.no_grad():
        ours["out/ws"] = net.mapping(ref["in/z"], c)
        ours["out/ws_trunc"] = net.mapping(ref["in/z"], c, *truncation)
        ours["out/img_noise_none"] = net.synthesis(ours["out/ws"], noise="none")
        ours["out/img_trunc"] = net(ref["in/z"], c, *truncation, noise="const")
        mixed = torch.cat([ours["out/ws"][:, :first_mixed], ours["out/ws"].flip(0)[:, first_mixed:]], 1)
        ours["out/img_mixed"] = net.synthesis(mixed)

    blocks = outputs_of_blocks(net.synthesis, net.synthesis.resolutions, lambda: net.synthesis(ours["out/ws"]))
    for r, (x, running_img) in blocks.items():
        ours[f"out/block{r}_x"] = x
        if running_img is not None:
            ours[f"out/block{r}_img"] = running_img
    ws = ours["out/ws"].clone().requires_grad_()
    img = ours["out/img_noise_const"] = net.synthesis(ws)
    names = [k.removeprefix("out/grad_param/") for k in ref if k.startswith("out/grad_param/")]
    grads = gradients((img * ref["in/r"]).sum(), [ws, *(net.get_parameter(n) for n in names)])
    ours["out/grad_ws"] = grads[0]
    return ours | {f"out/grad_param/{n}": g for n, g in zip(names, grads[1:], strict=True)}


def sg2_discriminator(meta: Meta, ref: Tensors) -> Tensors:
    net = build_discriminator(meta["ctor"])
    load(net, ref, "D/", meta["names"])
    images, c = ref["in/img"].requires_grad_(), ref.get("in/c")

    def first(count: int) -> Tensor:
        return net(images[:count], None if c is None else c[:count])

    blocks = outputs_of_blocks(net, net.resolutions[:-1], lambda: first(2))
    ours = {f"out/block{r}_x_first2": x for r, (x, _) in blocks.items()}
    with torch.no_grad():
        ours |= {k: first(int(k.removeprefix(FIRST))) for k in ref if k.startswith(FIRST)}
    logits = ours["out/logits"] = first(len(images))
    (ours["out/r1_grad"],) = torch.autograd.grad(logits.sum(), images, retain_graph=True)
    penalty = ours["out/r1_penalty"] = r1_penalty(images, logits)
    loss = (penalty * meta["r1_gamma"] / 2).mean()
    return ours | parameter_gradients(net, loss, meta, ref, "out/r1_param_grad")


def sg2_path_length(meta: Meta, ref: Tensors) -> Tensors:
    net = build_generator(meta["ctor"])
    load(net, ref, "G/", meta["names"])
    ours: Tensors = {}
    ws = ours["out/ws"] = net.mapping(ref["in/z"], ref.get("in/c"))
    img = ours["out/img"] = net.synthesis(ws)
    y = ref["in/y"]
    scaled = (img * y).sum() / (y.shape[2] * y.shape[3]) ** 0.5
    (ours["out/pl_grad_ws"],) = torch.autograd.grad(scaled, ws, retain_graph=True)
    lengths = ours["out/pl_lengths"] = path_lengths(img, ws, y)
    mean = ours["out/pl_mean"] = torch.tensor(meta["pl_mean_before"]).lerp(lengths.mean(), meta["pl_decay"])
    penalty = ours["out/pl_penalty"] = (lengths - mean).square()
    loss = (penalty * meta["pl_weight"]).mean()
    return ours | parameter_gradients(net, loss, meta, ref, "out/param_grad")


FAMILIES: dict[str, Family] = {
    "sg2_generator": sg2_generator,
    "sg2_discriminator": sg2_discriminator,
    "sg2_path_length": sg2_path_length,
}
