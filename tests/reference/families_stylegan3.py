"""StyleGAN 3: filtered leaky ReLU, generator."""

import json
from inspect import signature
from typing import Any

import torch
from comparison import Family, Meta, Tensors, arguments, gradients, load, stated, table

from lightning_modules.networks.filtered_lrelu import design_lowpass_filter, filtered_lrelu
from lightning_modules.networks.stylegan3 import StyleGAN3Generator

OURS = ("mapping_", "num_half_res", "half_dtype")
RENAMED = {name: name for name in signature(StyleGAN3Generator).parameters if not name.startswith(OURS)}
RENAMED |= {f"mapping_kwargs.{name}": f"mapping_{name}" for name in ("num_layers", "lr_multiplier")}
ANY: dict[str, Any] = {"num_fp16_res": ..., "mapping_kwargs.w_avg_beta": ...}  # the CPU numbers do not depend on them


def op_filtered_lrelu(meta: Meta, ref: Tensors) -> Tensors:
    ours: Tensors = {}
    for key, case in table(meta):
        filters = {name: case[name] and design_lowpass_filter(**case[name]) for name in ("fu", "fd")}
        ours |= {f"{key}/{name}": f for name, f in filters.items() if f is not None}
        inputs = [ref[f"{key}/{name}"].requires_grad_() for name in "xb" if f"{key}/{name}" in ref]
        b = inputs[1] if len(inputs) == 2 else None
        y = ours[f"{key}/y"] = filtered_lrelu(inputs[0], b=b, **filters, **case["kw"])
        grads = torch.autograd.grad((y * ref[f"{key}/r"]).sum(), inputs)
        ours |= {f"{key}/d{name}": g for name, g in zip("xb", grads, strict=False)}
    return ours


def build_generator(ctor: Meta) -> StyleGAN3Generator:
    return StyleGAN3Generator(**arguments(ctor, RENAMED, ANY)).eval()


def sg3_generator(meta: Meta, ref: Tensors) -> Tensors:
    net = build_generator(meta["ctor"])
    load(net, ref, "G/", meta["names"])
    text = json.dumps(meta["definitions"])
    psi = float(stated(text, r"truncation_psi=([\d.]+)", "0.6"))
    cutoff = stated(text, r"truncation_cutoff=(\w+)", "5")
    c = ref["in/c"] if meta["ctor"].get("c_dim") else None

    ours: Tensors = {}
    acts: dict[str, Any] = {}  # layers give a list of parts of the batch
    synthesis = net.synthesis
    hooks = [
        synthesis.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: acts.__setitem__(name, out))
        for name in ("input", *synthesis.layer_names)
    ]
    with torch.no_grad():
        ws = ours["out/ws"] = net.mapping(ref["in/z"], c)
        ours["out/ws_trunc"] = net.mapping(ref["in/z"], c, psi, None if cutoff == "None" else int(cutoff))
        ours["out/img_trunc"] = synthesis(ours["out/ws_trunc"])
        ours["out/img"] = synthesis(ws)
    for hook in hooks:
        hook.remove()
    ours["out/fourier_input"] = acts["input"]
    ours |= {f"out/act_first/{name}": acts[name][0][:1] for name in synthesis.layer_names}

    leaf = ws.clone().requires_grad_()
    names = meta["param_order_for_norms"]
    scalar = (synthesis(leaf) * ref["in/r"]).sum()
    grads = gradients(scalar, [leaf, *(synthesis.get_parameter(n) for n in names)])
    ours["out/grad_ws"] = grads[0]
    ours["out/grad_param_norms"] = torch.stack([g.norm() for g in grads[1:]])

    with torch.no_grad():
        synthesis.input.transform.copy_(ref["in/transform"])
        ours["out/img_transformed"] = synthesis(ws)
        synthesis.input.transform.copy_(torch.eye(3))
        ours["out/img_update_emas"] = net(ref["in/z"], c, update_emas=lambda mean: mean)
        net.update_w_avg(ws[:, 0].mean(0))
    ours["out/w_avg_after"] = net.mapping.w_avg
    emas = [synthesis.get_buffer(f"{layer['name']}.magnitude_ema") for layer in meta["layer_geometry"]]
    ours["out/magnitude_ema_after"] = torch.stack(emas)
    return ours


FAMILIES: dict[str, Family] = {"op_filtered_lrelu": op_filtered_lrelu, "sg3_generator": sg3_generator}
