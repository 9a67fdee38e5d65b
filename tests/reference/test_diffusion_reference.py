"""The diffusion chain, networks and samplers equal the published implementations number for number.

Every `*.npz` of a folder (default: diffusion/ beside this file; another one with `--reference-dir DIR`) is compared,
one test per file and array. What a file is follows from the beginning of its name; README.md in diffusion/ describes
the arrays. The families_diffusion_*.py beside this file give, for such a beginning,

    FAMILIES    a function from (name of the file, its arrays) to {array of the file: our value},
    TOLERANCES  the relative and the absolute tolerance, or these by the beginning of an array's name ("" is any other),
    INPUTS      the arrays that are given, a set of names or a tuple of beginnings; all others must be computed.
"""

import functools
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Arrays = dict[str, npt.NDArray[Any]]
Family = Callable[[str, Arrays], dict[str, Any]]

HERE = Path(__file__).parent
MODULES = [import_module(path.stem) for path in sorted(HERE.glob("families_diffusion_*.py"))]
FAMILIES: dict[str, Family] = {name: function for module in MODULES for name, function in module.FAMILIES.items()}
TOLERANCES: dict[str, Any] = {k: v for module in MODULES for k, v in module.TOLERANCES.items()}
INPUTS: dict[str, set[str] | tuple[str, ...]] = {k: v for module in MODULES for k, v in module.INPUTS.items()}
ELSEWHERE = {"nn_distance_gen_to_train", "r_all_channels", "meta"}
"""Arrays that only the files of other tests have: features, correlations, segmentation."""
NOT_COMPARED = "per_sample_seeds"
"""Numbers of PyTorch's generators, one for each image. Ours are counter-based: images are as independent of batches and
devices (tests/test_counter_random.py, test_distributed.py), but other ones."""


def longest_beginning(name: str, beginnings: Iterable[str]) -> str | None:
    return max(filter(name.startswith, beginnings), key=len, default=None)


def tolerances(name: str, key: str) -> tuple[float, float]:
    """Relative and absolute."""
    found = TOLERANCES[name]
    return found[longest_beginning(key, found)] if isinstance(found, dict) else found


def is_input(name: str, key: str) -> bool:
    inputs = INPUTS[name]
    return key.startswith(inputs) if isinstance(inputs, tuple) else key in inputs


@functools.lru_cache(maxsize=2)
def compare(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Expected arrays and our values of one file."""
    name = longest_beginning(path.stem, FAMILIES)
    assert name is not None, f"no comparison family for {path.name}"
    with np.load(path) as arrays:
        expected = dict(arrays)
    return expected, FAMILIES[name](path.stem, {key: value.copy() for key, value in expected.items()})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption("--reference-dir")
    folder = Path(option) if option else HERE / "diffusion"
    if not folder.is_dir():
        raise pytest.UsageError(f"--reference-dir {folder}: no such folder")
    cases = []
    for path in sorted(folder.rglob("*.npz")):
        file, name = path.relative_to(folder).with_suffix("").as_posix(), longest_beginning(path.stem, FAMILIES)
        if name is not None:
            keys = [key for key in np.load(path).files if not is_input(name, key)]
            cases += [pytest.param(path, key, id=f"{file}::{key}") for key in keys]
        elif not path.stem.startswith(NOT_COMPARED) and not set(np.load(path).files) & ELSEWHERE:
            cases.append(pytest.param(path, "all", id=file))  # fails: a file that nothing compares is no success
    metafunc.parametrize(("path", "quantity"), cases)


def test_equals_the_original(path: Path, quantity: str) -> None:
    expected, ours = compare(path)
    assert quantity in ours, f"{path.name} holds {quantity}, which no comparison computes"
    value = np.asarray(ours[quantity])
    assert value.shape == expected[quantity].shape
    rtol, atol = tolerances(longest_beginning(path.stem, FAMILIES), quantity)
    np.testing.assert_allclose(value, expected[quantity], rtol=rtol, atol=atol)
