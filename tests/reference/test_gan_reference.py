"""The GAN networks, operators and losses equal the published implementations number for number.

Every `*.safetensors` of a folder (default: gan/ beside this file; another one with `--reference-dir DIR`) is compared,
one test per file and quantity. What a file is follows from its metadata (header key `meta`), never from its name;
README.md in gan/ describes the format. A comparison family is a function from (meta, tensors) to {key of the file: our
value}; the families_*.py beside this file list them.
"""

import functools
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from comparison import Family, Meta, Tensors, stated
from safetensors import safe_open
from torch import Tensor

HERE = Path(__file__).parent
MODULES = [import_module(path.stem) for path in sorted(HERE.glob("families_*.py")) if "diffusion" not in path.stem]
FAMILIES: dict[str, Family] = {kind: function for module in MODULES for kind, function in module.FAMILIES.items()}
ELSEWHERE = {"train_trajectory_sg2", "train_trajectory_sg3"}  # compared with the training rules in another test
SCHEDULES = ("stylegan_rows", "pggan_rows")
SCHEDULED = ("lod", "resolution", "minibatch", "G_lrate", "D_lrate")  # the tick_kimg of the originals is not ours


def family(meta: Meta, keys: set[str]) -> str:
    """What a file holds: by network class and by the keys that must exist; else by the name of its recipe."""
    cls, fixture = meta.get("cls", ""), re.sub(r"(_\d+)?(_\d+ch)?$", "", meta.get("fixture", "file without metadata"))
    case = (meta.get("cases") or [{}])[0]
    if "g_ctor" in meta and "steps" in meta:
        return "train_trajectory_" + ("sg3" if "magnitude_ema_beta" in meta["g_ctor"] else "sg2")
    for name, kind in (("stylegan2.Gen", "sg2_generator"), ("stylegan2.Disc", "sg2_discriminator")):
        if name in cls:
            return kind
    if "stylegan3.Generator" in cls:
        return "sg3_generator"
    if "out/pl_lengths" in keys and "G/mapping.w_avg" in keys:
        return "sg2_path_length"
    if "enabled" in meta or "enabled" in case:
        return "ada_r1" if "r1_gamma" in meta else "ada_augment"
    if "wgan" in meta or "mapping_ctor" in meta:
        return "pggan" if "wgan" in meta else "stylegan1"
    if any(rows in meta for rows in SCHEDULES):
        return "progressive_schedule"
    if "fid" in meta.get("expected", {}):
        return "metric_cores"
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


INPUTS = {"x", "b", "r", "w", "styles", "noise"}  # of operator tables
GRADIENT = re.compile(r"(^|/)(d2?[xbw]|(\w+_)?grad(_\w+)?)(/|$)")


def in_words(meta: Meta) -> Tensors:
    """Expected numbers that are in the metadata instead of in tensors."""
    found = {f"expected/{name}": torch.tensor(value) for name, value in meta.get("expected", {}).items()}
    for rows in (name for name in SCHEDULES if name in meta):
        found |= {f"{rows}/{column}": torch.tensor([row[column] for row in meta[rows]]) for column in SCHEDULED}
    return found


def quantities(meta: Meta, keys: list[str]) -> list[str]:
    ours = re.compile(rf"out/|const/|reals/.*/out|case\d+/(?!(?:{'|'.join(INPUTS)})$)")
    return [key for key in keys if ours.match(key)] + list(in_words(meta))


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
        expected = {k: f.get_tensor(k) for k in keys} | in_words(meta)
    kind = family(meta, set(keys))
    assert kind in FAMILIES, f"{path.name}: nothing compares files of the kind {kind}"
    ours = FAMILIES[kind](meta, {k: v.clone() for k, v in expected.items()})
    return meta, expected, {k: v.detach() for k, v in ours.items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption("--reference-dir")
    folder = Path(option) if option else HERE / "gan"
    if not folder.is_dir():
        raise pytest.UsageError(f"--reference-dir {folder}: no such folder")
    cases = []
    for path in sorted(folder.rglob("*.safetensors")):
        if path.stem.endswith(".expected"):  # of an official checkpoint: compared by the test of the import
            continue
        meta, keys = read_meta(path)
        name, kind = path.relative_to(folder).with_suffix("").as_posix(), family(meta, set(keys))
        if kind in FAMILIES:
            cases += [pytest.param(path, q, id=f"{name}::{q}") for q in quantities(meta, keys)]
        elif kind not in ELSEWHERE:
            cases.append(pytest.param(path, kind, id=name))  # fails: a file that nothing compares is no success
    metafunc.parametrize(("path", "quantity"), cases)


def test_equals_the_original(path: Path, quantity: str) -> None:
    meta, expected, ours = compare(path)
    assert quantity in ours, f"{path.name} holds {quantity}, which no comparison computes"
    rtol, atol = tolerances(meta, quantity, expected[quantity])
    torch.testing.assert_close(ours[quantity], expected[quantity], rtol=rtol, atol=atol)
