"""The direction of imports that the design draws."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lightning_modules", "datamodules", "metrics", "evaluation", "callbacks", "study")
ALLOWED = {
    "lightning_modules/networks": {"lightning_modules.networks"},
    "lightning_modules": {"lightning_modules"},
    "datamodules": {"datamodules"},
    "metrics": {"metrics"},
    "evaluation": {"evaluation", "datamodules", "lightning_modules", "metrics"},
    "callbacks": {"callbacks", "datamodules", "evaluation", "lightning_modules", "metrics"},
    "study": {"study", "datamodules", "evaluation", "metrics"},
    "train.py": set(),
    "cli.py": set(),
}
FILES = sorted([*(p for name in PACKAGES for p in (ROOT / name).rglob("*.py")), ROOT / "train.py", ROOT / "cli.py"])


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def place(path: Path) -> str:
    relative = path.relative_to(ROOT).as_posix()
    return next(name for name in ALLOWED if relative == name or relative.startswith(name + "/"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_arrows(path):
    ours = {name for name in imported(path) if name.split(".")[0] in PACKAGES}
    allowed = ALLOWED[place(path)]
    assert {name for name in ours if not any(name == a or name.startswith(a + ".") for a in allowed)} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_hold_one_idea(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("name", ["lightning_modules/networks", "metrics"])
def test_networks_and_metrics_know_no_lightning(name):
    for path in (ROOT / name).rglob("*.py"):
        assert not any(module.split(".")[0] in ("lightning", "pytorch_lightning") for module in imported(path)), path


def test_the_command_line_starts_without_torch():
    code = "import sys, cli; cli.main(['--help']); sys.exit(any(m in sys.modules for m in ('torch', 'monai', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prepare" in done.stdout
