"""The whole way once, as `make quickstart` goes it, at the smallest size."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml
from fake_slices import ROOT, environment

TINY = {
    "title": "Smallest study",
    "seed": 1,
    "phantom": {"patients": 6, "spacing_mm": 8},
    "prepare": "--size_px 16",
    "generators": {
        "stylegan2": "--config configs/laptop/stylegan2.yaml --trainer.max_epochs 1 --data.epoch_images 16"
        " --model.generator.init_args.img_resolution 16 --model.discriminator.init_args.img_resolution 16"
        " --synthetic_slices 48"
    },
    "segmenters": {
        "unet": "--config configs/laptop/unet.yaml --trainer.max_epochs 1 --data.epoch_images 32"
        " --model.network.init_args.filters '[4, 6, 8, 8]'"
    },
}


def snakemake(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--snakefile", "study/Snakefile", "--configfile", str(config)]
    command += ["--cores", "1", "--nolock", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )


def test_study_goes_from_phantom_to_report_and_leaves_nothing_to_do(tmp_path):
    out = tmp_path / "study"
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "out": str(out)}))
    done = snakemake(config)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    summary = (out / "report" / "summary.txt").read_text()
    for words in ("Dice", "real", "relative to training on real", "Memorization", "index.html"):
        assert words in summary
    page = (out / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") > 5
    dice = pd.read_csv(out / "report" / "tables" / "dice.csv")
    assert dice["arm"].nunique() == 3
    assert dice["dice"].between(0, 1).any()

    again = snakemake(config)
    assert "Nothing to be done" in again.stdout + again.stderr


def test_shipped_quickstart_plans_every_step():
    plan = snakemake(ROOT / "study" / "quickstart.yaml", "--dry-run", "--forceall")
    assert plan.returncode == 0, plan.stderr
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", plan.stdout + plan.stderr, flags=re.MULTILINE))
    assert jobs == {
        "phantom": "1",
        "prepare": "1",
        "generator": "1",
        "segmenter": "3",
        "report": "1",
        "all": "1",
        "total": "8",
    }
