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

from lightning_modules.losses import path_lengths, r1_penalty
from lightning_modules.networks.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

SAME = {
    k: k for k in ("img_resolution", "img_channels", "channel_base", "channel_max", "conv_clamp", "resample_filter")
}
# The CPU numbers do not depend on num_fp16_res and on fused modulation; dots: whatever the value.
ANY = {"num_fp16_res": ..., "fused_modconv_default": ..., "c_dim": [0], "activation": ["lrelu"]}


def build_generator(ctor: Meta) -> StyleGAN2Generator:
    renamed = SAME | {k: k for k in ("z_dim", "w_dim", "use_noise")}
    renamed |= {f"mapping_kwargs.{k}": f"mapping_{k}" for k in ("num_layers", "lr_multiplier")}
    synthesis = {f"synthesis_kwargs.{k}": k for k in (*SAME, "use_noise")}
    widths = [None, ctor["w_dim"]]
    mapping = {"embed_features": ..., "layer_features": widths, "activation": ["lrelu"], "w_avg_beta": ...}
    ignored = ANY | {f"mapping_kwargs.{k}": v for k, v in mapping.items()} | {"architecture": ["skip"]}
    return StyleGAN2Generator(**arguments(ctor, renamed | synthesis, ignored)).eval()


def build_discriminator(ctor: Meta) -> StyleGAN2Discriminator:
    epilogue = {f"epilogue_kwargs.{k}": k for k in ("mbstd_group_size", "mbstd_num_channels")}
    block = {"block_kwargs.resample_filter": "resample_filter"}
    ignored = ANY | {"architecture": ["resnet"], "cmap_dim": ..., "block_kwargs.activation": ["lrelu"]}
    ignored |= {"block_kwargs.freeze_layers": ..., "epilogue_kwargs.activation": ["lrelu"]}
    return StyleGAN2Discriminator(**arguments(ctor, SAME | epilogue | block, ignored)).eval()


def sg2_generator(meta: Meta, ref: Tensors) -> Tensors:
    net = build_generator(meta["ctor"])
    load(net, ref, "G/", meta["names"])
    text = json.dumps(meta["definitions"])
    psi = float(stated(text, r"truncation_psi=([\d.]+)", "0.6"))
    cutoff = stated(text, r"truncation_cutoff=(\w+)", "4")
    truncation = (psi, None if cutoff == "None" else int(cutoff))
    first_mixed = int(stated(text, r"index >= (\d+)", "4"))

    ours: Tensors = {}
    with torch.no_grad():
        ours["out/ws"] = net.mapping(ref["in/z"])
        ours["out/ws_trunc"] = net.mapping(ref["in/z"], *truncation)
        ours["out/img_noise_none"] = net.synthesis(ours["out/ws"], noise="none")
        ours["out/img_trunc"] = net(ref["in/z"], *truncation, noise="const")
        mixed = torch.cat([ours["out/ws"][:, :first_mixed], ours["out/ws"].flip(0)[:, first_mixed:]], 1)
        ours["out/img_mixed"] = net.synthesis(mixed)

    blocks = outputs_of_blocks(net.synthesis, net.synthesis.resolutions, lambda: net.synthesis(ours["out/ws"]))
    for r, (x, running_img) in blocks.items():
        ours |= {f"out/block{r}_x": x, f"out/block{r}_img": running_img}
    ws = ours["out/ws"].clone().requires_grad_()
    img = ours["out/img_noise_const"] = net.synthesis(ws)
    names = [k.removeprefix("out/grad_param/") for k in ref if k.startswith("out/grad_param/")]
    grads = gradients((img * ref["in/r"]).sum(), [ws, *(net.get_parameter(n) for n in names)])
    ours["out/grad_ws"] = grads[0]
    return ours | {f"out/grad_param/{n}": g for n, g in zip(names, grads[1:], strict=True)}


def sg2_discriminator(meta: Meta, ref: Tensors) -> Tensors:
    net = build_discriminator(meta["ctor"])
    load(net, ref, "D/", meta["names"])
    images = ref["in/img"].requires_grad_()
    blocks = outputs_of_blocks(net, net.resolutions[:-1], lambda: net(images[:2]))
    ours = {f"out/block{r}_x_first2": x for r, x in blocks.items()}
    with torch.no_grad():
        ours |= {f"out/logits_first{n}": net(images[:n]) for n in (1, 2)}
    logits = ours["out/logits"] = net(images)
    (ours["out/r1_grad"],) = torch.autograd.grad(logits.sum(), images, retain_graph=True)
    penalty = ours["out/r1_penalty"] = r1_penalty(images, logits)
    loss = (penalty * meta["r1_gamma"] / 2).mean()
    return ours | parameter_gradients(net, loss, meta, ref, "out/r1_param_grad")


def sg2_path_length(meta: Meta, ref: Tensors) -> Tensors:
    net = build_generator(meta["ctor"])
    load(net, ref, "G/", meta["names"])
    ours: Tensors = {}
    ws = ours["out/ws"] = net.mapping(ref["in/z"])
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
