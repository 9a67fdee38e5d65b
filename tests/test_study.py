"""The graph of a study: the whole way once at the smallest size, what each shipped study plans, and what runs again."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from fake_slices import ROOT, environment

from train import main

TINY: dict[str, Any] = {
    "title": "Smallest study",
    "seed": 1,
    "phantom": {"patients": 6, "spacing_mm": 8},
    "prepare": {"size_px": 16},
    "generators": {
        "stylegan2": {
            "config": "configs/laptop/stylegan2.yaml",
            "trainer.max_epochs": 1,
            "data.epoch_images": 16,
            "model.generator.init_args.img_resolution": 16,
            "model.discriminator.init_args.img_resolution": 16,
            "synthetic_slices": 48,
        }
    },
    "memorization": {"max_shift_px": 0, "false_alarm_rate": 0.2},
    "features": ["imagenet"],
    "segmenters": {
        "unet": {
            "config": "configs/laptop/unet.yaml",
            "trainer.max_epochs": 1,
            "data.epoch_images": 32,
            "model.network.init_args.filters": [4, 6, 8, 8],
        }
    },
    "arms": {
        "real": {"data.train": "[{path: REAL}]"},
        "synthetic": {"data.train": "[{path: SYNTHETIC}]"},
        "real+synthetic": {"data.train": "[{path: REAL}, {path: SYNTHETIC}]"},
    },
    "augmentations": {"augmented": {}},
    "seeds": [0],
}
STUDIES = {
    "quickstart": {"phantom": 1, "generator": 1, "memorization": 1, "quality": 1, "segmenter": 3},
    "laptop": {"phantom": 1, "generator": 6, "memorization": 6, "quality": 6, "copy_detector": 1, "segmenter": 52},
    "paper_brats2020": {"generator": 5, "memorization": 5, "quality": 5, "copy_detector": 1, "segmenter": 440},
    "paper_brats2021": {"generator": 5, "memorization": 5, "quality": 5, "copy_detector": 1, "segmenter": 440},
    "real15": {"generator": 2, "memorization": 2, "quality": 2, "copy_detector": 1, "segmenter": 15},
}
"""How many jobs of each rule that is not there exactly once."""


def snakemake(config: Path, *words: str) -> str:
    """Run a study, or plan it; give all that is printed."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", "study/Snakefile", "--configfile", str(config)]
    command += ["--cores", "1", "--nolock", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def jobs(plan: str) -> dict[str, int]:
    """How many jobs of each rule a plan has, less the total."""
    found = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", plan, flags=re.MULTILINE)}
    assert found.pop("total", 0) == sum(found.values())
    return found


def write_study(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def test_study_goes_from_phantom_to_report_and_reruns_exactly_what_depends_on_a_changed_value(tmp_path: Path) -> None:
    out = tmp_path / "study"
    config = write_study(tmp_path / "tiny.yaml", out=str(out))
    snakemake(config)
    summary = (out / "report" / "summary.txt").read_text()
    for words in ("Dice", "real", "relative to training on real", "Memorization", "index.html"):
        assert words in summary
    page = (out / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") > 5
    dice = pd.read_csv(out / "report" / "tables" / "dice.csv")
    assert dice["arm"].nunique() == 3
    assert dice["dice"].between(0, 1).any()
    for name in ("search", "sensitivity", "quality", "distances", "curves", "cost"):
        assert len(pd.read_csv(out / "report" / "tables" / f"{name}.csv")), name

    assert "Nothing to be done" in snakemake(config)
    backwards = {"stylegan2": dict(reversed(TINY["generators"]["stylegan2"].items()))}
    assert "Nothing to be done" in snakemake(write_study(tmp_path / "same.yaml", out=str(out), generators=backwards))

    def planned(*changes: str) -> dict[str, int]:
        return jobs(snakemake(config, "--dry-run", "--config", *changes))

    end = {"report": 1, "all": 1}
    slower = "generators={stylegan2: {model.generator_lr: 0.001}}"
    assert planned(slower) == {"generator": 1, "memorization": 1, "quality": 1, "segmenter": 2, **end}
    assert planned("arms={synthetic: {data.val_fraction: 0.1}}") == {"segmenter": 1, **end}
    assert planned("memorization={max_shift_px: 1}") == {"memorization": 1, **end}
    assert planned("seeds=[0, 1]") == {"segmenter": 3, **end}
    every = {"prepare": 1, "generator": 1, "memorization": 1, "quality": 1, "segmenter": 3, **end}
    assert planned("prepare={size_px: 32}") == every
    # How many GPUs and nodes a training gets makes no difference to its result.
    assert "Nothing to be done" in snakemake(config, "--dry-run", "--config", "gpus={stylegan2: 4}", "nodes={unet: 2}")

    # The run of other options is not gone on with, but kept.
    before = (out / "stylegan2" / "run.json").read_text()
    snakemake(config, "--config", slower, "--until", "generator")
    assert (out / "stylegan2.before-1" / "run.json").read_text() == before
    assert "model.generator_lr" in (out / "stylegan2" / "run.json").read_text()


@pytest.mark.parametrize("study", STUDIES)
def test_shipped_studies_plan_every_step(study: str, tmp_path: Path) -> None:
    plan = snakemake(
        ROOT / "study" / f"{study}.yaml",
        "--dry-run",
        "--forceall",
        "--config",
        f"root={tmp_path}",
        f"out={tmp_path}/out",
    )
    assert jobs(plan) == {**STUDIES[study], "prepare": 1, "report": 1, "all": 1}
    if study.startswith("paper"):  # the number that follows from the authors' scripts
        assert len(re.findall(r"Training unet-", plan)) == 220


def test_release_of_a_study_waits_for_report_and_copy_detector(tmp_path: Path) -> None:
    plan = snakemake(ROOT / "study" / "laptop.yaml", "--dry-run", "release", "--config", f"out={tmp_path}/out")
    assert jobs(plan) == {
        **STUDIES["laptop"], "prepare": 1, "report": 1, "release_of": 6, "release": 1,
    }  # fmt: skip


def test_gpus_of_a_machine_limit_what_a_training_gets(tmp_path: Path) -> None:
    words = ["--dry-run", "--printshellcmds", "--cores", "6", "--resources", "gpu=2"]
    where = ["--config", f"root={tmp_path}", f"out={tmp_path}/out"]
    plan = snakemake(ROOT / "study" / "paper_brats2020.yaml", *words, *where)
    gpus = dict(re.findall(r"start.py \S+/out/(\S+) --given .* --gpus (\d) --nodes 1 --", plan))
    assert gpus["stylegan2"] == "2"  # asks for four
    assert gpus["stylegan1"] == gpus["unet-real-plain-0"] == "1"


def test_study_without_patients_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="--config root=FOLDER"):
        snakemake(ROOT / "study" / "real15.yaml", "--dry-run")


def options_of(study: str) -> list[dict[str, Any]]:
    content = yaml.safe_load((ROOT / "study" / f"{study}.yaml").read_text())
    generators, segmenters = content["generators"].values(), content["segmenters"].values()
    steps = [*generators, *({**own, **more} for own in segmenters for more in content["augmentations"].values())]
    return [one for one in steps if len(one) > 1]


@pytest.mark.parametrize("options", [one for study in STUDIES for one in options_of(study)], ids=lambda o: o["config"])
def test_options_of_shipped_studies_are_understood(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"--{name}={'null' if value is None else value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--print_config"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, end.value.code
    assert "class_path" in capsys.readouterr().out


def start(folder: Path, *words: str, **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, "study/start.py", str(folder), *words]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environ}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_every_job_has_gpus_of_its_own_until_it_ends(tmp_path: Path) -> None:
    machine = {"CUDA_VISIBLE_DEVICES": "3,5", "TMPDIR": str(tmp_path)}

    def ask(name: str, gpus: int) -> subprocess.Popen[str]:
        words = ["--", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES $0 $*; read _", "train.py"]
        return start(tmp_path / name, "--gpus", str(gpus), *words, **machine)

    def line(job: subprocess.Popen[str]) -> str:
        assert job.stdout is not None
        return job.stdout.readline().strip()

    jobs = {line(job): job for job in (ask("a", 1), ask("b", 1))}
    assert set(jobs) == {"3 train.py", "5 train.py"}
    third = ask("c", 1)
    jobs["5 train.py"].kill()
    assert line(third) == "5 train.py"  # the first that is free, and not the first
    all_of_them = ask("d", 4)
    jobs["3 train.py"].communicate("\n")
    third.communicate("\n")
    assert line(all_of_them) == "3,5 train.py --trainer.devices=2"
    all_of_them.communicate("\n")


def test_machine_without_gpus_runs_on_the_cpu(tmp_path: Path) -> None:
    done = start(tmp_path / "a", "--gpus", "4", "--", "echo", "train.py", CUDA_VISIBLE_DEVICES="")
    assert done.communicate()[0] == "train.py\n"


def test_several_processes_under_slurm_are_started_by_srun(tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = start(tmp_path / "a", "--gpus", "8", "--nodes", "2", "--", "train.py", **slurm).communicate()[0]
    shape = "--nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --kill-on-bad-exit"
    assert done == f"{shape} train.py --trainer.devices=4 --trainer.num_nodes=2\n"


def test_folder_that_was_begun_with_something_else_is_kept_aside(tmp_path: Path) -> None:
    folder, given = tmp_path / "run", tmp_path / "dataset.json"
    make = ["--given", str(given), "--", "mkdir", "-p", str(folder)]

    def folders() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir() if path.is_dir())

    given.write_text("one")
    for _ in range(2):  # the same again goes on in the folder
        assert start(folder, *make).wait() == 0
        assert folders() == ["run"]
    given.write_text("two")
    assert start(folder, *make).wait() == 0
    assert folders() == ["run", "run.before-1"]
    assert start(folder, *make[:-3], "mkdir", str(folder)).wait() == 0
    assert folders() == ["run", "run.before-1", "run.before-2"]
