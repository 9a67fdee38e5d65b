"""What the comparison families share: metadata, weights, gradients and the outputs of inner blocks."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Meta = dict[str, Any]
Tensors = dict[str, Tensor]
Family = Callable[[Meta, Tensors], Tensors]


class UnsupportedError(Exception):
    """The file needs something that StandIn does not have."""


def arguments(ctor: Meta, renamed: dict[str, str], ignored: dict[str, Any]) -> Meta:
    """Constructor arguments of the original as ours; `ignored` maps what we lack to the values that mean the same."""
    flat = {k: v for k, v in ctor.items() if not k.endswith("_kwargs")}
    flat |= {f"{k}.{n}": v for k, kwargs in ctor.items() if k.endswith("_kwargs") for n, v in kwargs.items()}
    ours: Meta = {"conv_clamp": 256}  # the default of the original
    for name, value in flat.items():
        if name in renamed:
            ours[renamed[name]] = value
        elif name not in ignored or (ignored[name] is not ... and value not in ignored[name]):
            raise UnsupportedError(f"StyleGAN 2 with {name}={value!r}")
    return ours


def load(net: nn.Module, ref: Tensors, prefix: str, names: dict[str, list[str]]) -> None:
    """Load weights without renaming; parameters and buffers must be exactly the original's."""
    net.load_state_dict({k.removeprefix(prefix): v for k, v in ref.items() if k.startswith(prefix)})
    assert {k for k, _ in net.named_parameters()} == set(names["parameters"])
    assert {k for k, _ in net.named_buffers()} == set(names["buffers"])


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
