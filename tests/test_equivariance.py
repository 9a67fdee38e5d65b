"""Equivariance metrics on generators with a known answer, and their transformations against sampled waves."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.networks.stylegan2 import StyleGAN2Generator
from lightning_modules.networks.stylegan3 import StyleGAN3Generator
from metrics.equivariance import equivariance, pseudo_rotate, rotate, translate, translate_by_pixels

WIDTH = 32
WAVES = torch.tensor([[1.0, 2.0], [-3.0, 1.0], [2.5, -2.0]])  # cycles per width (x, y), up to 0.1 per pixel


def pixels(width: int, scale: float) -> Tensor:
    """Centres of the pixels around that of the image: (H, W, 3), the last 1."""
    axis = (torch.arange(width) - (width - 1) / 2) / scale
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    return torch.stack([x, y, torch.ones_like(x)], 2)


def waves(points: Tensor, phases: Tensor) -> Tensor:
    """A smooth function of the plane: points (H, W, 3), in widths, phases (N, C, 3) -> (N, C, H, W)."""
    angles = 2 * math.pi * points[..., :2] @ WAVES.t() + phases[:, :, None, None]
    return angles.cos().mean(4)


class Input(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("transform", torch.eye(3))


class Synthesis(nn.Module):
    """Waves at the transformed pixels; `seen` is what it makes of the transform."""

    def __init__(self, seen) -> None:
        super().__init__()
        self.input, self.seen = Input(), seen

    def forward(self, ws: Tensor) -> Tensor:
        return waves(pixels(WIDTH, WIDTH) @ self.seen(self.input.transform).t(), ws)


class Generator(nn.Module):
    def __init__(self, seen=lambda matrix: matrix, synthesis: nn.Module | None = None, c_dim: int = 0) -> None:
        super().__init__()
        self.z_dim, self.c_dim = 6, c_dim
        self.synthesis = Synthesis(seen) if synthesis is None else synthesis
        self.labels: list[Tensor] = []

    def mapping(self, z: Tensor, c: Tensor | None) -> Tensor:
        if c is not None:
            self.labels.append(c)
        return z.reshape(-1, 2, 3) * 2


def translation_only(matrix: Tensor) -> Tensor:
    return torch.eye(3) + torch.cat([torch.zeros(3, 2), matrix[:, 2:] - torch.eye(3)[:, 2:]], 1)


def whole_pixels(matrix: Tensor) -> Tensor:
    return (translation_only(matrix) * WIDTH).round() / WIDTH


def glued(matrix: Tensor) -> Tensor:
    return torch.eye(3)


@pytest.mark.parametrize(
    ("seen", "exact"),
    [
        (lambda matrix: matrix, {"eqt_int", "eqt_frac", "eqr"}),
        (translation_only, {"eqt_int", "eqt_frac"}),
        (whole_pixels, {"eqt_int"}),
        (glued, set()),
    ],
)
def test_exact_equivariance_is_told_from_glued_details(seen, exact):
    found = equivariance(Generator(seen), count=20)
    assert {name for name, decibels in found.items() if decibels > 55} == exact
    assert {name for name, decibels in found.items() if decibels < 35} == found.keys() - exact


def test_untrained_stylegan3_is_equivariant_by_construction():
    found = {}
    for variant, layers in (("T", {}), ("R", {"use_radial_filters": True, "conv_kernel": 1})):
        torch.manual_seed(0)
        found[variant] = equivariance(StyleGAN3Generator(16, 16, 32, 2, 512, 16, **layers), count=4)
    assert min(found["T"]["eqt_int"], found["T"]["eqt_frac"], *found["R"].values()) > 60
    assert found["T"]["eqr"] < 45  # square filters and 3×3 kernels have axes


class Offset(nn.Module):
    """0 with the input as it is, 0.2 with a transformed one: the squared error is 0.04 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.input = Input()

    def forward(self, ws: Tensor) -> Tensor:
        moved = not torch.equal(self.input.transform, torch.eye(3))
        return torch.full((len(ws), 2, WIDTH, WIDTH), 0.2 if moved else 0.0)


def test_decibels_by_hand():
    found = equivariance(Generator(synthesis=Offset()), count=20)
    assert found == pytest.approx(dict.fromkeys(("eqt_int", "eqt_frac", "eqr"), 20.0), abs=1e-4)  # 10 log10(2² / 0.04)


def test_samples_depend_on_seed_and_index_only():
    net = Generator(translation_only, c_dim=3)
    first = equivariance(net, count=20, batch=16, seed=1)
    labels = torch.cat(net.labels)
    net.labels.clear()
    assert equivariance(net, count=20, batch=3, seed=1) == pytest.approx(first, rel=1e-6)
    assert torch.equal(torch.cat(net.labels), labels)
    assert labels.sum(1).eq(1).all()
    assert labels.sum(0).gt(0).all()
    assert equivariance(net, count=20, seed=2)["eqr"] != pytest.approx(first["eqr"], rel=1e-3)


def test_the_generator_is_left_as_it_was():
    def fails(matrix: Tensor) -> Tensor:
        if not torch.equal(matrix, torch.eye(3)):
            raise RuntimeError("out of memory")
        return matrix

    net = Generator(fails).train()
    mine = torch.eye(3) * 2
    net.synthesis.input.transform.copy_(mine)
    with pytest.raises(RuntimeError, match="out of memory"):
        equivariance(net, count=1)
    assert torch.equal(net.synthesis.input.transform, mine)
    assert net.training


def test_a_generator_without_transform_is_refused():
    net = StyleGAN2Generator(4, 4, 8, 1, 32, 4)
    with pytest.raises(ValueError, match=r"synthesis\.input\.transform.*StyleGAN2Generator does not"):
        equivariance(net, count=1)


PHASES = torch.tensor([[[0.3, 1.0, 2.0], [4.0, 0.0, 1.5]]])


def sampled(width: int, matrix: Tensor) -> Tensor:
    return waves(pixels(width, WIDTH) @ matrix.t(), PHASES)


def affine(*rows: list[float]) -> Tensor:
    return torch.tensor([*rows, [0, 0, 1.0]])


CASES = {
    "pixels": (lambda x: translate_by_pixels(x, 3, -2), affine([1, 0, -3 / WIDTH], [0, 1, 2 / WIDTH])),
    "fraction": (lambda x: translate(x, 2.3, -1.6), affine([1, 0, -2.3 / WIDTH], [0, 1, 1.6 / WIDTH])),
    "quarter": (lambda x: rotate(x, math.pi / 2), affine([0, -1, 0], [1, 0, 0])),
    "rotated": (
        lambda x: rotate(x, 0.7),
        affine([math.cos(0.7), -math.sin(0.7), 0], [math.sin(0.7), math.cos(0.7), 0]),
    ),
    "pseudo": (lambda x: pseudo_rotate(x, 0.7), torch.eye(3)),
}


@pytest.mark.parametrize("case", CASES)
def test_transformed_waves_are_the_waves_of_transformed_points(case):
    transformed, matrix = CASES[case]
    images, mask = transformed(sampled(WIDTH, torch.eye(3)))
    error = (images - sampled(WIDTH, matrix)).abs()[:, :, mask].max().item()
    assert error < (1e-6 if case == "pixels" else 5e-3)  # Lanczos windows of three lobes


@pytest.mark.parametrize("case", CASES)
def test_valid_pixels_do_not_know_where_the_image_ends(case):
    transformed, _ = CASES[case]
    torch.manual_seed(0)
    wide = torch.randn(2, 2, WIDTH + 40, WIDTH + 40)
    images, mask = transformed(wide[:, :, 20:-20, 20:-20])
    expected = transformed(wide)[0][:, :, 20:-20, 20:-20]
    torch.testing.assert_close(images[:, :, mask], expected[:, :, mask], rtol=0, atol=1e-4)
    assert mask.float().mean().item() > 0.3


def test_sizes_of_the_valid_regions():
    image = torch.zeros(1, 1, WIDTH, WIDTH)
    assert translate_by_pixels(image, 3, -2)[1].sum() == 29 * 30
    assert translate_by_pixels(image, 3, -2)[1].nonzero().amin(0).tolist() == [0, 3]  # y, x
    # Pixel p takes from p - whole - 3 ... p - whole + 2, where the whole part of the shift is 2 and -2.
    assert translate(image, 2.3, -1.6)[1].sum() == 27 * 27
    assert translate(image, 2.3, -1.6)[1].nonzero().amin(0).tolist() == [1, 5]
    assert pseudo_rotate(image, 0.7)[1].sum() == (WIDTH - 10) ** 2
    assert rotate(image, math.pi / 2)[1].sum() == (WIDTH - 12) ** 2


@pytest.mark.parametrize(
    ("cycles", "angle", "low", "high"), [(0.42, 45, 0, 0.2), (0.42, 0, 0.999, 1.001), (0.15, 45, 0.97, 1.03)]
)
def test_pseudo_rotation_removes_what_the_rotated_grid_cannot_hold(cycles, angle, low, high):
    axis = torch.arange(WIDTH) * 2 * math.pi * cycles
    wave = (axis[:, None] + axis).cos()[None, None]  # towards a corner of the spectrum
    filtered, mask = pseudo_rotate(wave, math.radians(angle))
    assert low < (filtered[0, 0, mask].norm() / wave[0, 0, mask].norm()).item() < high
