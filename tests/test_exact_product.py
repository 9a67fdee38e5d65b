"""Products of int8 without rounding: every way to them gives the integers that int64 gives."""

import numpy as np
import pytest
import torch

from metrics import exact_product
from metrics.exact_product import _float32, _float64, _for_cublas, _int8, _is_exact, sums, sums_of_squares

CPU = torch.device("cpu")


def factors(rows, columns, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(-128, 128, (n, length), dtype=torch.int8, generator=generator) for n in (rows, columns))
    x[0], y[0] = -128, -128
    x[1, ::2], y[-1] = 127, 127
    return x, y


def in_int64(x, y):
    return x.numpy().astype(np.int64) @ y.numpy().astype(np.int64).T


@pytest.mark.parametrize("length", [1, 37, 1024, 5000])
@pytest.mark.parametrize("product", [_int8, _float32, _float64])
def test_all_ways_give_the_integers(product, length):
    x, y = factors(19, 7, length)
    out = torch.full((19, 7), 99, dtype=torch.int32)
    assert product(x, y, out) is out
    np.testing.assert_array_equal(out.numpy(), in_int64(x, y))


def test_rows_longer_than_int32_can_hold():
    length = 3 * (1 << 16) + 11
    x, y = factors(3, 2, length)
    found = exact_product.exact_product(x, y)
    assert found.dtype == torch.int64
    assert found[0, 0] == length * 2**14 > 2**31  # no int32 holds it
    np.testing.assert_array_equal(found.numpy(), in_int64(x, y))


def test_parts_of_larger_arrays_and_reused_memory():
    x, y = factors(9, 6, 300)
    out = torch.full((4, 5), -7, dtype=torch.int32)
    found = exact_product.exact_product(x[::2][:4, 20:200], y[:5, 20:200], out)
    assert found is out
    np.testing.assert_array_equal(found.numpy(), in_int64(x[::2][:4, 20:200], y[:5, 20:200]))


@pytest.mark.parametrize(("rows", "columns", "length"), [(1, 1, 1), (17, 8, 8), (16, 9, 15), (33, 16, 24)])
def test_cublas_gets_the_shapes_that_it_accepts(monkeypatch, rows, columns, length):
    shapes = []

    def int_mm(x, y, **kwargs):
        shapes.append((*x.shape, y.shape[1]))
        return original(x, y, **kwargs)

    original = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    x, y = (t[:n] for t, n in zip(factors(33, 16, length), (rows, columns), strict=True))
    found = _for_cublas(x, y, torch.empty(rows, columns, dtype=torch.int32))
    np.testing.assert_array_equal(found.numpy(), in_int64(x, y))
    ((m, k, n),) = shapes
    assert m > 16
    assert (k % 8, n % 8) == (0, 0)


def saturating(x, y, out):
    """As processors without VNNI: pairs of products are added in int16."""
    pairs = (x[:, None].int() * y[None].int()).unflatten(2, (-1, 2)).sum(dim=3).clamp(-(2**15), 2**15 - 1)
    return out.copy_(pairs.sum(dim=2))


def rounding(x, y, out):
    """As float32 sums of full length, which lose the last bits."""
    return out.copy_((x.float() @ y.float().T).int())


def missing(x, y, out):
    raise RuntimeError("no kernel")


@pytest.mark.parametrize("product", [saturating, rounding, missing])
def test_ways_that_lose_something_are_refused(product):
    assert not _is_exact(product, CPU)


@pytest.mark.parametrize("product", [_float32, _float64])
def test_exact_ways_are_accepted(product):
    assert _is_exact(product, CPU)


def test_the_next_way_serves_where_one_fails(monkeypatch):
    monkeypatch.setattr(exact_product, "_int8", saturating)
    exact_product._fastest.cache_clear()
    assert exact_product._fastest(CPU) is _float32
    exact_product._fastest.cache_clear()


@pytest.mark.parametrize("count", [0, 1, 32, 45])
def test_sums_of_values_and_of_squares(count):
    x = factors(45, 2, 70)[0][:count]
    wide = x.numpy().astype(np.int64)
    np.testing.assert_array_equal(sums(x).numpy(), wide.sum(axis=1))
    np.testing.assert_array_equal(sums_of_squares(x).numpy(), (wide**2).sum(axis=1))
