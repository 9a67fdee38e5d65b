"""The Triton kernels, in Triton's interpreter, against the plain operators; and the choice between the two."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux only.", allow_module_level=True)

from triton import knobs

from lightning_modules.networks import triton_filtered_lrelu, triton_kernels, triton_operators
from lightning_modules.networks.bias_act import bias_act
from lightning_modules.networks.filtered_lrelu import design_lowpass_filter, filtered_lrelu
from lightning_modules.networks.kernel_choice import KernelChoice, choose, milliseconds
from lightning_modules.networks.layers import leaky_relu
from lightning_modules.networks.operators import setup_filter, upfirdn2d

TESTS = Path(__file__).parent
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest value
GUARDED = torch.full((45,), math.nan)
LOPSIDED = GUARDED[15:30].view(5, 3)  # between NaN, which show a tap that is read from beside the filter
LOPSIDED.copy_(torch.arange(15.0).view(5, 3).sin())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    names: list[str] = []

    class Recorder:
        def __getattr__(self, name: str) -> object:
            names.append(name)
            return getattr(triton_kernels, name)

    assert knobs.runtime.interpret, "tests/conftest.py must set TRITON_INTERPRET before anything imports Triton"
    monkeypatch.setattr(triton_operators, "triton_kernels", Recorder())
    return names


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def like(x: Tensor, seed: int) -> Tensor:
    """Noise in the memory format of x, for which a gradient is wanted."""
    return torch.empty_like(x).copy_(noise(*x.shape, seed=seed)).detach().requires_grad_()


def derivatives(function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> list[Tensor]:
    """The result, the gradient, the gradient of that in its direction, and so on once more; of others the gradient."""
    inputs = [x.detach().requires_grad_(), *(o.detach().requires_grad_() for o in others)]
    y = function(*inputs)
    g = noise(*y.shape, seed=1).to(y.dtype).requires_grad_()  # perhaps not in the memory format of y
    gradients = torch.autograd.grad(y, inputs, g, create_graph=True)
    v = like(gradients[0], 2)
    (second,) = torch.autograd.grad(gradients[0], g, v, create_graph=True)
    (third,) = torch.autograd.grad(second, v, like(second, 3))
    return [t.detach() for t in (y, *gradients, second, third)]


def check(function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> None:
    """Kernels in the dtype of x give what plain PyTorch gives in float32."""
    with choose.forced("plain"):
        expected = derivatives(function, x.float(), *(o.float() for o in others))
    with choose.forced("triton"):
        ours = derivatives(function, x, *others)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == x.dtype
        torch.testing.assert_close(a.float(), b, rtol=0, atol=ROUNDING[x.dtype] * float(b.abs().max()))


@pytest.mark.parametrize(
    ("up", "down", "padding"),
    [(1, 1, (3, 2, 1, 0)), (2, 1, (2, -1, 3, 1)), (1, 2, (-2, 3, 1, 2)), ((4, 1), (1, 2), 2), (2, 4, (5, 1, 0, 4))],
)
@pytest.mark.parametrize("flip_filter", [False, True])
def test_upfirdn2d_has_the_plain_derivatives(launched, up, down, padding, flip_filter):
    check(lambda x: upfirdn2d(x, LOPSIDED, up, down, padding, flip_filter, 1.7), noise(1, 2, 7, 5))
    assert launched == ["upfirdn2d"] * 4


@pytest.mark.parametrize("before", [-7, -4, -1, 0, 1, 3, 4, 9])
def test_no_negative_number_is_divided(monkeypatch, before):
    """A card rounds such a quotient towards zero, the interpreter down."""
    found = {}
    names = triton_kernels.upfirdn2d.arg_names
    monkeypatch.setattr(
        triton_operators, "launch", lambda _, programs, *values: found.update(zip(names, values, strict=True))
    )
    with choose.forced("triton"):
        upfirdn2d(noise(1, 1, 9, 9), LOPSIDED, (4, 3), 1, (before, 8, before, 8))
    assert found["lead_y"] > -found["UP_Y"] == -3
    assert found["lead_x"] > -found["UP_X"] == -4


def test_upfirdn2d_runs_a_separable_filter_along_both_axes(launched):
    f = setup_filter([1.0, 5, 2, 0, 3, -1, 4, 1], separable=True)
    check(lambda x: upfirdn2d(x, f, 2, 1, (4, 3, 3, 5)), noise(1, 1, 6, 9))
    assert launched == ["upfirdn2d"] * 8


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, ::2, 1:, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
    ],
    ids=["channels last", "slices", "transposed", "expanded"],
)
def test_every_memory_layout_is_read(launched, layout):
    x = layout(noise(2, 5, 8, 6))
    check(lambda x: upfirdn2d(x, LOPSIDED, 2, 1, 2), x)
    check(lambda x: bias_act(x, act="lrelu", clamp=1.0), x)
    assert set(launched) == {"upfirdn2d", "bias_lrelu", "lrelu_gradient"}


def test_images_larger_than_a_tile(launched):
    check(lambda x: upfirdn2d(x, LOPSIDED, 1, 1, 2), noise(1, 1, 27, 21))
    check(lambda x: upfirdn2d(x, LOPSIDED, 1, 1, 2), noise(1, 66, 3, 4).contiguous(memory_format=torch.channels_last))
    check(lambda x: bias_act(x, noise(3), act="lrelu"), noise(2, 3, 37, 31))
    assert launched.count("upfirdn2d") == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(launched, dtype):
    x = noise(1, 2, 7, 6).to(dtype)
    check(lambda x: upfirdn2d(x, LOPSIDED, 2, 1, (2, 1, 2, 1)), x)
    check(lambda x, b: bias_act(x, b, act="lrelu", clamp=1.0), x, noise(2).to(dtype))
    assert set(launched) == {"upfirdn2d", "bias_lrelu", "lrelu_gradient"}


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 5), (2, 4, 3, 5)])
@pytest.mark.parametrize(
    "options",
    [
        {"act": "lrelu"},
        {"act": "lrelu", "alpha": 0.0, "gain": 0.7, "clamp": 0.9},
        {"act": "linear", "clamp": 0.5},
        {"act": "relu"},
    ],
)
def test_bias_act_has_the_plain_derivatives(launched, shape, options):
    check(lambda x, b: bias_act(x, b, **options), noise(*shape), noise(4, seed=9))
    check(lambda x, b: bias_act(x, b, len(shape) - 1, **options), noise(*shape), noise(shape[-1], seed=9))
    assert launched.count("bias_lrelu") == 2


def test_a_gradient_is_constant_in_the_input(launched):
    x = noise(2, 3).requires_grad_()
    with choose.forced("triton"):
        (gradient,) = torch.autograd.grad(bias_act(x, act="lrelu").sum(), x, create_graph=True)
        assert torch.autograd.grad(gradient.square().sum(), x, materialize_grads=True)[0].count_nonzero() == 0
    assert launched == ["bias_lrelu", "lrelu_gradient", "lrelu_gradient"]


def test_bias_act_keeps_what_has_no_kernel_plain(launched):
    with choose.forced("triton"):
        bias_act(noise(2, 3), act="tanh")
        bias_act(noise(2, 3), gain=-1.0)
        assert bias_act(noise(2, 3).half(), torch.zeros(3)).dtype == torch.float32
        bias_act(noise(2, 3).double(), act="lrelu")
    assert launched == []


def test_the_limit_does_not_hide_nan(launched):
    with choose.forced("triton"):
        y = bias_act(torch.tensor([[math.nan, math.inf, -math.inf]]), act="lrelu", clamp=2.0)
    torch.testing.assert_close(y, torch.tensor([[math.nan, 2.0, -2.0]]), equal_nan=True)


def test_layers_limit_their_activations_in_one_pass(launched):
    check(lambda x: leaky_relu(x * 1.0, 0.5), noise(2, 3, 5, 4))  # in place if plain
    assert launched == ["bias_lrelu", *["lrelu_gradient"] * 3]


def low_pass(taps: int, radial: bool = False) -> Tensor:
    """A low-pass filter, made lopsided so that a reversed or transposed one is noticed."""
    f = design_lowpass_filter(taps, 4, 4, 32, radial)
    assert f is not None
    ramp = torch.linspace(0.7, 1.3, taps)
    return f * torch.outer(ramp.square(), ramp) if radial else f * ramp


@pytest.mark.parametrize("up", [2, 4])
@pytest.mark.parametrize("radial", [False, True])
def test_filtered_lrelu_has_the_plain_derivatives(launched, up, radial):
    fu, fd = low_pass(6 * up), low_pass(12, radial)
    x, b = noise(1, 2, 33, 24), noise(2, seed=9)
    check(lambda x, b: filtered_lrelu(x, fu, fd, b, up, 2, (9, -5, 8, 13), clamp=0.8), x, b)
    assert launched == ["filtered_lrelu"] * 4  # signal, adjoint, tangent, adjoint


def test_tiles_of_filtered_lrelu_do_not_overwrite_each_other(monkeypatch):
    def launch_first_again(name: str, programs: int, *arguments: object) -> None:
        triton_operators.launch(name, programs, *arguments)
        triton_operators.launch(name, 1, *arguments)

    monkeypatch.setattr(triton_filtered_lrelu, "launch", launch_first_again)
    check(lambda x: filtered_lrelu(x, low_pass(12), low_pass(12), None, 2, 2, 10, clamp=0.8), noise(1, 1, 30, 30))


@pytest.mark.parametrize(
    "options",
    [
        {"up": 2, "down": 2, "padding": -7},  # crops samples of the input
        {"up": 2, "down": 4, "padding": 11, "flip_filter": True},
        {"up": 1, "down": 3, "padding": (20, 3, 4, 5), "gain": 0.5, "slope": 0.0, "clamp": 0.3},
        {"up": 3, "down": 2, "padding": 6, "slope": 1.0, "clamp": 0.7},
        {"up": 4, "down": 1, "padding": (0, 1, 2, 3), "clamp": 1e9},
    ],
)
def test_filtered_lrelu_takes_every_geometry(launched, options):
    fu, fd = low_pass(7), low_pass(10)
    check(lambda x: filtered_lrelu(x, fu, fd, **options), noise(1, 1, 22, 19))
    assert launched == ["filtered_lrelu"] * 4


def test_filtered_lrelu_with_a_radial_filter_upwards(launched):
    check(lambda x: filtered_lrelu(x, low_pass(6, True), low_pass(6), None, 2, 2, 7), noise(1, 1, 9, 8))


def test_filtered_lrelu_in_half_precision_and_channels_last(launched):  # the interpreter cannot multiply bfloat16
    fu, fd = low_pass(12), low_pass(12, radial=True)
    x = noise(2, 2, 13, 12).to(torch.float16, memory_format=torch.channels_last)
    check(lambda x: filtered_lrelu(x, fu, fd, None, 2, 2, 9), x)
    with choose.forced("triton"):
        assert filtered_lrelu(x, fu, fd, None, 2, 2, 9).is_contiguous(memory_format=torch.channels_last)


def test_a_filter_with_new_content_is_noticed(launched):
    fu, fd = low_pass(12), low_pass(12, radial=True)
    x = noise(1, 1, 9, 9)
    with choose.forced("triton"):
        y = filtered_lrelu(x, fu, fd, None, 2, 2, 9)
        fd.copy_(fd * 2)
        torch.testing.assert_close(filtered_lrelu(x, fu, fd, None, 2, 2, 9), 2 * y)


def test_a_filter_too_long_for_a_tile_stays_plain(launched):
    x, f = noise(1, 1, 8, 8), low_pass(70)
    with choose.forced("triton"):
        y = filtered_lrelu(x, low_pass(6), f, None, 2, 2, 40)
    assert launched == []
    with choose.forced("plain"):
        torch.testing.assert_close(y, filtered_lrelu(x, low_pass(6), f, None, 2, 2, 40))


@pytest.mark.parametrize("mode", ["plain", "triton"])
def test_images_smaller_than_the_filters_are_refused(mode):
    x = noise(1, 1, 4, 4)
    with choose.forced(mode):
        with pytest.raises(ValueError, match="smaller than the filter"):
            upfirdn2d(x, LOPSIDED)
        with pytest.raises(ValueError, match="shorter than the filters"):
            filtered_lrelu(x, low_pass(6), low_pass(6), None, 2, 2)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
def test_empty_batches_give_empty_results(launched, shape):
    x = torch.zeros(shape, requires_grad=True)
    with choose.forced("triton"):
        for y in (
            upfirdn2d(x, LOPSIDED, padding=2),
            bias_act(x, torch.zeros(shape[1]), act="lrelu"),
            filtered_lrelu(x, low_pass(12), low_pass(12), None, 2, 2, 10),
        ):
            assert y.numel() == 0
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert gradient.shape == shape
    assert launched == []


def test_autocast_casts_as_in_the_plain_operators(launched):
    x = noise(1, 1, 9, 9)
    for mode in ("plain", "triton"):
        with choose.forced(mode), torch.autocast("cpu", torch.bfloat16):
            assert upfirdn2d(x, LOPSIDED, padding=2).dtype == torch.bfloat16
            assert bias_act(x, act="lrelu").dtype == torch.float32
            assert filtered_lrelu(x, low_pass(6), low_pass(6), None, 2, 2, 5).dtype == torch.float32
    assert set(launched) == {"upfirdn2d", "bias_lrelu", "filtered_lrelu"}


def test_on_the_cpu_kernels_must_be_forced():
    assert not triton_operators.available(noise(1))
    with choose.forced("triton"):
        assert triton_operators.available(noise(1))


def test_operators_work_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from lightning_modules.networks import bias_act, filtered_lrelu, kernel_choice, operators, triton_operators
x = torch.ones(1, 1, 4, 4)
with kernel_choice.choose.forced("triton"):
    assert not triton_operators.available(x)
    assert bias_act.bias_act(operators.upfirdn2d(x, None, 2), act="lrelu").shape == (1, 1, 8, 8)
"""
    subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, check=True)


def test_every_launch_compiles_for_a_card(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, TESTS / "compile_kernels.py", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == {"upfirdn2d", "bias_lrelu", "lrelu_gradient", "filtered_lrelu"}
    assert max(int(shared) for *_, shared in lines) <= 99 * 1024  # what every card from Ampere on has for a program


class Timer:
    """Takes times from a list."""

    def __init__(self, *times: float | Exception) -> None:
        self.times = list(times)

    def __call__(self, run: Callable[[Tensor], Tensor], x: Tensor) -> float:
        time = self.times.pop(0)
        if isinstance(time, Exception):
            raise time
        return time


X, PLAIN, KERNEL = torch.zeros(1), torch.zeros(1), torch.ones(1)


def chosen(choice: KernelChoice, key: str = "key", x: Tensor = X) -> Tensor:
    return choice(key, lambda _: PLAIN, lambda _: KERNEL, x)


def test_the_faster_one_is_found_once_per_key():
    timer = Timer(1.0, 2.0, 2.0, 1.0)  # kernel, plain
    choice = KernelChoice(measure=timer)
    assert [chosen(choice, key) for key in ("a", "b", "a", "b")] == [KERNEL, PLAIN, KERNEL, PLAIN]
    assert timer.times == []


@pytest.mark.parametrize("differentiated", [False, True])
def test_the_time_is_the_mean_of_runs_after_a_warm_up(monkeypatch, differentiated):
    class Clock(Function):
        """Ticks in each pass."""

        now = 0

        @staticmethod
        def forward(ctx, x):
            Clock.now += 1
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            Clock.now += 10
            return g

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = Clock.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    x = torch.zeros(1, requires_grad=differentiated)
    assert milliseconds(Clock.apply, x) == (11 if differentiated else 1)
    assert Clock.now == 7 * (11 if differentiated else 1)


def test_training_and_sampling_are_measured_apart():
    choice = KernelChoice(measure=Timer(1.0, 2.0, 2.0, 1.0))
    x = torch.zeros(1, requires_grad=True)
    assert chosen(choice, x=x) is KERNEL
    with torch.no_grad():
        assert chosen(choice, x=x) is PLAIN
    assert chosen(choice, x=x) is KERNEL


def test_a_kernel_that_fails_is_not_used():
    choice = KernelChoice(measure=Timer(RuntimeError("out of shared memory"), 3.0))
    with pytest.warns(UserWarning, match="out of shared memory"):
        assert chosen(choice) is PLAIN
    assert chosen(choice) is PLAIN


def test_plain_operators_without_memory_are_not_used():
    choice = KernelChoice(measure=Timer(3.0, torch.OutOfMemoryError("out of memory")))
    with pytest.warns(UserWarning, match="out of memory"):
        assert chosen(choice) is KERNEL


def test_a_forced_choice_measures_nothing():
    assert chosen(KernelChoice("plain", Timer())) is PLAIN
    assert chosen(KernelChoice("triton", Timer())) is KERNEL
    choice = KernelChoice(measure=Timer())
    with choice.forced("triton"):
        assert chosen(choice) is KERNEL
    assert choice.mode == "auto"


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="STANDIN_KERNELS is one of auto, plain, triton; got 'fast'"):
        KernelChoice("fast")


def test_similar_sizes_share_a_measurement():
    keys = [triton_operators.speed_key("f", noise(2, 3, n, n)) for n in (33, 64, 65)]
    assert keys[0] == keys[1] != keys[2]
