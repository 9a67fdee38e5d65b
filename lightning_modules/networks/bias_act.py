"""Bias and activation in one operator (Karras et al. 2020, StyleGAN 2, CVPR, arXiv 1912.04958)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.networks.triton_operators import bias_lrelu

Activation = Literal["linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"]


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: Activation = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """clamp(gain · act(x + b)).

    Args:
        x: Any shape.
        b: Bias along `dim`.
        dim: Dimension of the bias.
        act: Activation.
        alpha: Slope of lrelu for negative values, 0.2 by default.
        gain: Default: what keeps the second moment (sqrt 2 for relu, lrelu, swish; else 1).
        clamp: Limit of the absolute value; None for none.
    """
    if gain is None:
        gain = math.sqrt(2) if act in ("relu", "lrelu", "swish") else 1.0
    slopes = {"linear": 1.0, "relu": 0.0, "lrelu": 0.2 if alpha is None else alpha}

    def plain(x: Tensor) -> Tensor:
        return _bias_act(x, b, dim, act, slopes["lrelu"], gain, clamp)

    return bias_lrelu(plain, x, b, dim, slopes[act], gain, clamp) if act in slopes else plain(x)


def _bias_act(
    x: Tensor, b: Tensor | None, dim: int, act: Activation, slope: float, gain: float, clamp: float | None
) -> Tensor:
    if b is not None:
        x = x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    match act:
        case "relu":
            x = F.relu(x)
        case "lrelu":
            x = F.leaky_relu(x, slope)
        case "tanh":
            x = torch.tanh(x)
        case "sigmoid":
            x = torch.sigmoid(x)
        case "elu":
            x = F.elu(x)
        case "selu":
            x = F.selu(x)
        case "softplus":
            x = F.softplus(x)
        case "swish":
            x = F.silu(x)
    x = x if gain == 1 else x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)
