"""Operator tables."""

import torch
from comparison import Family, Meta, Tensors, UnsupportedError, gradients, table

from lightning_modules.networks import operators
from lightning_modules.networks.bias_act import bias_act


def op_upfirdn2d(meta: Meta, ref: Tensors) -> Tensors:
    ours: Tensors = {}
    for key, case in table(meta):
        f = None
        if case.get("taps") is not None:
            f = ours[f"{key}/f"] = operators.setup_filter(case["taps"], normalize=case.get("normalize", True))
        x = ref[f"{key}/x"].requires_grad_()
        y = getattr(operators, case.get("fn", "upfirdn2d"))(x, f, **case["kw"])
        ours[f"{key}/y"] = y
        (ours[f"{key}/dx"],) = torch.autograd.grad((y * ref[f"{key}/r"]).sum(), x)
    return ours


def op_bias_act(meta: Meta, ref: Tensors) -> Tensors:
    ours: Tensors = {}
    for key, case in table(meta):
        inputs = [ref[f"{key}/{name}"].requires_grad_() for name in "xb" if f"{key}/{name}" in ref]
        y = bias_act(inputs[0], inputs[1] if len(inputs) == 2 else None, **case["kw"])
        first = torch.autograd.grad((y * ref[f"{key}/r"]).sum(), inputs, create_graph=True)
        ours[f"{key}/y"] = y
        ours |= {f"{key}/d{name}": g for name, g in zip("xb", first, strict=False)}
        if f"{key}/d2x" in ref:
            ours[f"{key}/d2x"] = gradients(first[0].square().sum(), inputs[:1])[0]
    return ours


def op_convolutions(meta: Meta, ref: Tensors) -> Tensors:
    ours: Tensors = {}
    for key, case in table(meta):
        kw = dict(case["kw"])
        usual = (1, 3, 3, 1) if kw.get("up", 1) > 1 else None  # modulated cases do not name it
        taps = case.get("taps", usual)
        f = ref.get(f"{key}/f", None if taps is None else operators.setup_filter(taps))
        x, w = ref[f"{key}/x"].requires_grad_(), ref[f"{key}/w"].requires_grad_()
        if case["op"] == "conv2d_resample":
            y = operators.conv2d_resample(x, w, f, **kw)
        elif case["op"] in ("modulated_conv2d_sg2", "modulated_conv2d_sg3"):
            if case["op"].endswith("sg3"):
                kw |= {"normalize": True, "input_gain": case.get("input_gain")}
            y = operators.modulated_conv2d(x, w, ref[f"{key}/styles"], noise=ref.get(f"{key}/noise"), f=f, **kw)
        else:
            raise UnsupportedError(case["op"])
        ours[f"{key}/y"] = y
        if f"{key}/r" in ref:
            grads = torch.autograd.grad((y * ref[f"{key}/r"]).sum(), (x, w))
            ours |= {f"{key}/dx": grads[0], f"{key}/dw": grads[1]}
    return ours


def op_minibatch_stddev(meta: Meta, ref: Tensors) -> Tensors:
    ours: Tensors = {}
    for key, case in table(meta):
        x = ref[f"{key}/x"].requires_grad_()
        y = operators.minibatch_stddev(x, case["group_size"], case["num_channels"])
        ours[f"{key}/y"] = y
        (ours[f"{key}/dx"],) = torch.autograd.grad((y * ref[f"{key}/r"]).sum(), x)
    return ours


FAMILIES: dict[str, Family] = {
    "op_upfirdn2d": op_upfirdn2d,
    "op_bias_act": op_bias_act,
    "op_convolutions": op_convolutions,
    "op_minibatch_stddev": op_minibatch_stddev,
}
