"""The GAN networks, operators and losses equal the published implementations number for number.

Every `*.safetensors` of a folder (default: gan/ beside this file; another one with `--reference-dir DIR`) is compared,
one test per file and quantity. What a file is follows from its metadata (header key `meta`), never from its name;
README.md in gan/ describes the format. A comparison family is a function from (meta, tensors) to {key of the file: our
value}; `FAMILIES` lists them.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_modules.losses import path_lengths, r1_penalty
from lightning_modules.networks import operators
from lightning_modules.networks.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

HERE = Path(__file__).parent

Meta = dict[str, Any]
Tensors = dict[str, Tensor]


class NotImplementedYetError(Exception):
    """The file needs something that StandIn does not have."""


# ---------------------------------------------------------------------------------------------------------------------
# Operators


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
        y = operators.bias_act(inputs[0], inputs[1] if len(inputs) == 2 else None, **case["kw"])
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
            raise NotImplementedYetError(case["op"])
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


# ---------------------------------------------------------------------------------------------------------------------
# StyleGAN 2


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


FAMILIES: dict[str, Callable[[Meta, Tensors], Tensors]] = {
    "op_upfirdn2d": op_upfirdn2d,
    "op_bias_act": op_bias_act,
    "op_convolutions": op_convolutions,
    "op_minibatch_stddev": op_minibatch_stddev,
    "sg2_generator": sg2_generator,
    "sg2_discriminator": sg2_discriminator,
    "sg2_path_length": sg2_path_length,
}
ELSEWHERE = {"train_trajectory_sg2"}  # compared with the training rule in another test


def family(meta: Meta, keys: set[str]) -> str:
    """What a file holds: by network class and by the keys that must exist; else by the name of its recipe."""
    cls, fixture = meta.get("cls", ""), re.sub(r"(_\d+)?(_\d+ch)?$", "", meta.get("fixture", "file without metadata"))
    case = (meta.get("cases") or [{}])[0]
    if "g_ctor" in meta and "steps" in meta:
        return "train_trajectory_" + ("sg3" if "magnitude_ema_beta" in meta["g_ctor"] else "sg2")
    if "stylegan2.Generator" in cls:
        return "sg2_generator"
    if "stylegan2.Discriminator" in cls:
        return "sg2_discriminator"
    if "out/pl_lengths" in keys and "G/mapping.w_avg" in keys:
        return "sg2_path_length"
    if "fu" in case:
        return "op_filtered_lrelu"
    if "op" in case:
        return "op_convolutions"
    if "group_size" in case:
        return "op_minibatch_stddev"
    if "act" in case.get("kw", {}):
        return "op_bias_act"
    if "taps" in case:
        return "op_upfirdn2d"
    return fixture


# ---------------------------------------------------------------------------------------------------------------------
# Construction


def arguments(ctor: Meta, renamed: dict[str, str], ignored: dict[str, Any]) -> Meta:
    """Constructor arguments of the original as ours; `ignored` maps what we lack to the values that mean the same."""
    flat = {k: v for k, v in ctor.items() if not k.endswith("_kwargs")}
    flat |= {f"{k}.{n}": v for k, kwargs in ctor.items() if k.endswith("_kwargs") for n, v in kwargs.items()}
    ours: Meta = {"conv_clamp": 256}  # the default of the original
    for name, value in flat.items():
        if name in renamed:
            ours[renamed[name]] = value
        elif name not in ignored or (ignored[name] is not ... and value not in ignored[name]):
            raise NotImplementedYetError(f"StyleGAN 2 with {name}={value!r}")
    return ours


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


def load(net: nn.Module, ref: Tensors, prefix: str, names: dict[str, list[str]]) -> None:
    """Load weights without renaming; parameters and buffers must be exactly the original's."""
    net.load_state_dict({k.removeprefix(prefix): v for k, v in ref.items() if k.startswith(prefix)})
    assert {k for k, _ in net.named_parameters()} == set(names["parameters"])
    assert {k for k, _ in net.named_buffers()} == set(names["buffers"])


# ---------------------------------------------------------------------------------------------------------------------
# Help for the families


def table(meta: Meta) -> list[tuple[str, Meta]]:
    return [(f"case{case['index']:02d}", case) for case in meta["cases"]]


def stated(text: str, pattern: str, default: str) -> str:
    """A number that the metadata gives only in words."""
    match = re.search(pattern, text)
    return match[1] if match else default


def gradients(scalar: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients, zero for inputs that do not matter."""
    found = torch.autograd.grad(scalar, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def parameter_gradients(net: nn.Module, loss: Tensor, meta: Meta, ref: Tensors, prefix: str) -> Tensors:
    """`<prefix>_norms` in the stated order and `<prefix>/<name>` for the parameters that the file has."""
    names = meta["param_order_for_norms"]
    found = dict(zip(names, gradients(loss, [net.get_parameter(n) for n in names]), strict=True))
    named = {f"{prefix}/{n}": g for n, g in found.items() if f"{prefix}/{n}" in ref}
    return named | {f"{prefix}_norms": torch.stack([g.norm() for g in found.values()])}


def outputs_of_blocks(net: nn.Module, resolutions: list[int], run: Callable[[], Tensor]) -> dict[int, Any]:
    """What the submodules b<resolution> return during `run`."""
    found: dict[int, Any] = {}
    hooks = [
        net.get_submodule(f"b{r}").register_forward_hook(lambda _m, _i, out, r=r: found.__setitem__(r, out))
        for r in resolutions
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Collection and comparison

INPUTS = {"x", "b", "r", "w", "styles", "noise"}  # of operator tables
GRADIENT = re.compile(r"(^|/)(d2?[xbw]|(\w+_)?grad(_\w+)?)(/|$)")


def quantities(keys: list[str]) -> list[str]:
    return [k for k in keys if k.startswith("out/") or (k.startswith("case") and k.split("/")[1] not in INPUTS)]


def tolerances(meta: Meta, quantity: str, expected: Tensor) -> tuple[float, float]:
    """Relative and absolute, as the metadata says in words."""
    text = meta.get("tolerance", "")
    forward = float(stated(text, r"rtol ([\d.e-]*\d)", "1e-4"))
    gradient = float(stated(text, r"rtol ([\d.e-]*\d) \(gradients\)", "1e-3"))
    scale = float(stated(text, r"atol ([\d.e-]*\d)", "1e-5")) * float(expected.abs().max())
    return (gradient if GRADIENT.search(quantity) else forward), scale


def read_meta(path: Path) -> tuple[Meta, list[str]]:
    with safe_open(path, "pt") as f:
        meta: Meta = json.loads((f.metadata() or {}).get("meta", "{}"))
        return meta, sorted(f.keys())


@functools.lru_cache(maxsize=2)
def compare(path: Path) -> tuple[Meta, Tensors, Tensors]:
    """Metadata, expected and our tensors of one file."""
    meta, keys = read_meta(path)
    with safe_open(path, "pt") as f:
        expected = {k: f.get_tensor(k) for k in keys}
    ours = FAMILIES[family(meta, set(keys))](meta, {k: v.clone() for k, v in expected.items()})
    return meta, expected, {k: v.detach() for k, v in ours.items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption("--reference-dir")
    folder = Path(option) if option else HERE / "gan"
    if not folder.is_dir():
        raise pytest.UsageError(f"--reference-dir {folder}: no such folder")
    cases = []
    for path in sorted(folder.rglob("*.safetensors")):
        meta, keys = read_meta(path)
        name, kind = path.relative_to(folder).with_suffix("").as_posix(), family(meta, set(keys))
        if kind in FAMILIES:
            cases += [pytest.param(path, q, id=f"{name}::{q}") for q in quantities(keys)]
        elif kind in ELSEWHERE:
            continue
        else:
            reason = f"no implementation of {kind} yet"
            marks = [pytest.mark.skip(reason=reason)] if option else []
            cases.append(pytest.param(path, reason, id=name, marks=marks))
    metafunc.parametrize(("path", "quantity"), cases)


def test_equals_the_original(path: Path, quantity: str, request: pytest.FixtureRequest) -> None:
    try:
        meta, expected, ours = compare(path)
    except NotImplementedYetError as missing:
        if not request.config.getoption("--reference-dir"):
            raise
        pytest.skip(f"no implementation of {missing} yet")
    assert quantity in ours, f"{path.name} holds {quantity}, which no comparison computes"
    rtol, atol = tolerances(meta, quantity, expected[quantity])
    torch.testing.assert_close(ours[quantity], expected[quantity], rtol=rtol, atol=atol)
