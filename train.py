"""Train, then do what naturally follows: a generator emits its synthetic set, a segmenter is tested.

`python train.py --config configs/stylegan2.yaml --data.root SLICES`; the same command again resumes. `--help`,
`--print_config` and `--model.help CLASS` show everything that can be set.
"""

from __future__ import annotations

import dis
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf.errors import OmegaConfBaseException

NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning's own use of torch
    r".*forward_sync_buffers.*",  # the new name of broadcast_buffers exists from torch 2.13 on only
    r".*no `validation_step`.*",  # generators share the DataModule of the segmenters
    r".*in eval mode at the start of training.*",  # the moving average of a generator
    r".*Grad strides do not match bucket view strides.*",  # channels_last weights: a copy per step
    r".*does not have many workers.*",  # memory-mapped slices need none
    r".*It is recommended to use `self.log.*sync_dist=True.*",  # what we log is the same on all ranks
)
BASE = Path(__file__).parent / "configs" / "base.yaml"
OURS = ("callbacks", "datamodules", "lightning_modules", "evaluation", "metrics")
Task = Literal["fit", "validate", "test", "predict"]


class Parser(LightningArgumentParser):
    """LightningCLI's parser, which gives the reason of an error alone instead of after forty lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the reason; the inner parsers of classes hand it on."""
        if not self.exit_on_error:
            super().error(message, ex)
        sys.exit(f"train.py: {message}\n`python train.py --help` lists the options.")


class SaveConfigOfTraining(SaveConfigCallback):
    """Keep the configuration that a run was trained with; single steps later do not change it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save before training."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class StandInCLI(LightningCLI):
    """LightningCLI with the options that are neither model, data nor trainer."""

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """Add the options of a run; configs pass them on by `${...}`."""
        parser.add_argument("--run_dir", type=str, help="Folder of everything that this run writes.")
        parser.add_argument("--synthetic_slices", type=int, default=10_000, help="How many slices a generator emits.")
        parser.add_argument("--task", type=Task | None, default=None, help="Do only this step; default: all.")


def readable_checkpoint(folder: Path, names: tuple[str, ...] = ("*.ckpt",)) -> Path | None:
    """Find the newest checkpoint that can be read; a torn one is passed over with a warning."""
    candidates = {path for name in names for path in folder.glob(name)}
    for path in sorted(candidates, key=lambda p: (p.stat().st_mtime_ns, p.name == "last.ckpt"), reverse=True):
        try:
            torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except Exception as error:
            warnings.warn(f"{path} cannot be read ({type(error).__name__}); trying the one before it.", stacklevel=2)
        else:
            return path
    if candidates:
        sys.exit(
            f"train.py: none of the checkpoints in {folder} can be read. Restore one, or choose another --run_dir."
        )
    return None


def run(trainer: Trainer, model: LightningModule, data: LightningDataModule, run_dir: Path, task: Task | None) -> None:
    """Do one step, or train and then test (segmenters) or emit (generators)."""
    checkpoints = run_dir / "checkpoints"
    steps = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
    possible = ["fit", *(name for name, step in steps.items() if is_overridden(step, model))]
    if task is not None and task not in possible:
        sys.exit(f"train.py: a {type(model).__name__} knows the tasks {', '.join(possible)}, but not {task}.")
    if task in (None, "fit"):
        last = readable_checkpoint(checkpoints, ("last.ckpt", "epoch=*.ckpt"))
        trainer.fit(model, datamodule=data, ckpt_path=last)
    if task == "fit":
        return
    best = readable_checkpoint(checkpoints, ("best.ckpt",)) or readable_checkpoint(checkpoints)
    if best is None and getattr(model, "init_from", None) is None:
        sys.exit(f"train.py: expected a checkpoint in {checkpoints}, but there is none. Train first: leave out --task.")
    if task == "validate":
        trainer.validate(model, datamodule=data, ckpt_path=best)
    elif task == "test" or (task is None and is_overridden("test_step", model)):
        trainer.test(model, datamodule=data, ckpt_path=best)
    else:
        trainer.predict(model, datamodule=data, ckpt_path=best, return_predictions=False)


def quiet() -> None:
    """Leave out messages that are no news to the user, each for the reason beside it."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)


def build(args: list[str] | None = None) -> StandInCLI:
    """Parse, build everything and open the data, so that whatever does not fit is said before anything slow starts."""
    parser_kwargs: dict[str, Any] = {
        "parser_mode": "omegaconf+",
        "allow_abbrev": False,
        "default_config_files": [str(BASE)],
    }
    cli = StandInCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveConfigOfTraining,
        save_config_kwargs={"overwrite": True},
        parser_class=Parser,
        parser_kwargs=parser_kwargs,
        args=args,
    )
    run_dir = Path(cli.config.run_dir).absolute()
    foreign = [str(path) for path in _folders(cli.trainer) if not path.is_relative_to(run_dir)]
    if foreign:
        raise ValueError(
            f"expected everything of the run in run_dir {run_dir}, but the configuration also names "
            f"{', '.join(foreign)}. A saved config.yaml belongs to its own run: start new ones from configs/."
        )
    cli.datamodule.setup("fit")
    return cli


def _folders(trainer: Trainer) -> list[Path]:
    """Where this trainer writes."""
    checkpoints = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [Path(folder).absolute() for folder in (trainer.default_root_dir, *checkpoints) if folder is not None]


def main(args: list[str] | None = None) -> None:
    """Build, then run."""
    quiet()
    try:
        cli = build(args)
    except (ValueError, TypeError, MisconfigurationException, OmegaConfBaseException) as error:
        sys.exit(f"train.py: {error}")
    try:
        run(cli.trainer, cli.model, cli.datamodule, Path(cli.config.run_dir), cli.config.task)
    except ValueError as error:
        if not is_refusal(error):
            raise
        sys.exit(f"train.py: {error}")


def is_refusal(error: ValueError) -> bool:
    """Whether a `raise` of ours says what does not fit; other errors keep their traceback."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    frame = last.tb_frame
    raised = dis.opname[frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    return raised and str(frame.f_globals.get("__name__")).partition(".")[0] in OURS


if __name__ == "__main__":
    main()
