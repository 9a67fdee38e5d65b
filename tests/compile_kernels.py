"""Compile what the operators launch, for CUDA cards that need not be here: python compile_kernels.py CAPABILITY ...

Prints kernel, compute capability (80: A100, 90: H100) and bytes of shared memory.
"""

import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_modules.networks import triton_filtered_lrelu, triton_kernels, triton_operators
from lightning_modules.networks.bias_act import bias_act
from lightning_modules.networks.filtered_lrelu import design_lowpass_filter, filtered_lrelu
from lightning_modules.networks.operators import upfirdn2d

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", int: "i32", float: "fp32"}


def launch(name: str, programs: int, *arguments: Any) -> None:
    """Compile instead."""
    kernel = getattr(triton_kernels, name)
    signature, constants = {}, {}
    for parameter, value in zip(kernel.params, arguments, strict=True):
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = TYPES[value.dtype if isinstance(value, Tensor) else type(value)]
    for capability in sys.argv[1:]:
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", int(capability), 32))
        assert compiled.asm["cubin"]
        print(name, capability, compiled.metadata.shared)


def run(dtype: torch.dtype, up: int, radial: bool) -> None:
    """Both derivatives of each operator; the results are not looked at."""
    fu, fd = (design_lowpass_filter(6 * n, 1, 1, 4 * n, radial and n < up) for n in (up, 2))
    x = torch.zeros(1, 2, 30, 30, dtype=dtype, requires_grad=True)
    y = filtered_lrelu(x, fu, fd, up=up, down=2, clamp=1)
    y = bias_act(upfirdn2d(y, fu, up=2, down=2), torch.ones(2, dtype=dtype), act="lrelu", clamp=1)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    gradient.sum().backward()


if __name__ == "__main__":
    triton_operators.launch = triton_filtered_lrelu.launch = launch
    triton_operators.available = triton_filtered_lrelu.available = lambda x: True
    triton_operators.choose.mode = "triton"
    run(torch.float32, 2, radial=False)
    run(torch.bfloat16, 4, radial=True)
