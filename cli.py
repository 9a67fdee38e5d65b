"""The console command `standin`: each subcommand hands over to one function of a package.

Only the package of the subcommand that is asked for is imported, so `standin --help` is immediate.
"""

from __future__ import annotations

import importlib
import json
import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """Where the function of a subcommand is, an example of its use, and whether its first arguments are one list."""

    module: str
    function: str
    summary: str
    example: str
    takes_list: bool = False


COMMANDS = {
    "prepare": Command(
        "datamodules.prepare",
        "prepare",
        "turn a BraTS folder into a slice set",
        "standin prepare BraTS2021 data/brats2021 --size_px 128\n"
        "standin prepare BraTS2020 data/paper --preset paper --split paper",
    ),
    "phantom": Command(
        "datamodules.phantom",
        "write_phantom",
        "make BraTS-like patients from a template, without any download",
        "standin phantom data/phantom --patients 24 --seed 0",
    ),
    "import-images": Command(
        "datamodules.import_images",
        "import_images",
        "turn a folder of synthetic pictures, one PNG or TIFF per channel, into a slice set",
        "standin import-images BRGANDI/StyleGAN2 data/stylegan2 --trained_on paper-2020",
    ),
    "import": Command(
        "lightning_modules.importing",
        "import_checkpoint",
        "turn an official GAN or diffusion checkpoint into one of ours, executing nothing in it",
        "standin import network-snapshot.pkl imported --channels t1,t2,flair,t1ce,label\n"
        "python train.py --config configs/stylegan2.yaml --config imported/model.yaml --data.root SLICES\n"
        "standin import ema_0.9999_1200000.pt imported --channels t1,t2,flair,t1ce,label --flags.diffusion_steps 4000",
    ),
    "ema": Command(
        "callbacks.posthoc_ema",
        "reconstruct_ema",
        "make the moving average of another length from the snapshots of a run",
        "standin ema runs/diffusion runs/diffusion-ema-0.12.ckpt --std 0.12",
    ),
    "check-sampler": Command(
        "lightning_modules.sampler_check",
        "check_sampler",
        "check the samplers of diffusion models against closed forms, at any number of steps",
        "standin check-sampler\nstandin check-sampler --steps all --only_deviating true",
    ),
    "evaluate": Command(
        "evaluation.evaluate",
        "evaluate",
        "judge any folder of label maps against its references, per patient",
        "standin evaluate runs/unet/predictions BraTS2021 runs/unet/judged --labels reference --cases data/brats2021\n"
        "standin evaluate nnUNet_results/fold_0 labelsTr judged --labels '{core: 2, oedema: 1, enhancing: 3}'",
    ),
    "compare": Command(
        "evaluation.compare",
        "compare",
        "compare segmenters on the same patients; the first one is the baseline",
        "standin compare runs/unet-real runs/unet-synthetic --out comparison\n"
        "standin compare '{real: [runs/r-0, runs/r-1], synthetic: [runs/s-0, runs/s-1]}' --out comparison",
        takes_list=True,
    ),
    "memorization": Command(
        "evaluation.memorization",
        "memorization",
        "find the nearest training slices of every synthetic slice, beside what is by chance",
        "standin memorization runs/stylegan2/synthetic data/brats2021 runs/stylegan2/nearest",
    ),
    "quality": Command(
        "evaluation.quality",
        "quality",
        "score a synthetic set in feature spaces, beside what real slices of other patients get",
        "standin quality runs/stylegan2/synthetic data/brats2021 runs/stylegan2/quality\n"
        "standin quality runs/stylegan2/synthetic data/brats2021 runs/stylegan2/quality "
        "--features '[imagenet, runs/copy_detector/checkpoints/last.ckpt]'",
    ),
    "release": Command(
        "evaluation.release",
        "release",
        "filter a synthetic set, test what is left, and write it for sharing with a data card",
        "standin release runs/stylegan2/synthetic data/brats2021 runs/copy_detector/checkpoints/last.ckpt released",
    ),
    "report": Command(
        "study.report",
        "report",
        "compare segmenters trained on real and synthetic slices, and memorization, in one page",
        "standin report report --real data/slices --generators '[runs/stylegan2]' "
        "--segmenters '[runs/unet-real, runs/unet-synthetic]'",
    ),
    "export nnunet": Command(
        "datamodules.export_nnunet",
        "export_nnunet",
        "write a slice set as a raw data set of nnU-Net v2, with folds of whole patients",
        "standin export nnunet data/brats2021 nnUNet_raw/Dataset501_BraTS",
    ),
    "export decathlon": Command(
        "datamodules.export_decathlon",
        "export_decathlon",
        "write a slice set as NIfTI files with a Decathlon datalist, for MONAI",
        "standin export decathlon runs/stylegan2/synthetic exported/decathlon",
    ),
    "export images": Command(
        "datamodules.export_images",
        "export_images",
        "write a slice set as the paper's pictures, one PNG or TIFF per channel",
        "standin export images runs/stylegan2/synthetic exported/images",
    ),
    "export huggingface": Command(
        "datamodules.export_huggingface",
        "export_huggingface",
        "write a slice set as Parquet files with a card, for the `datasets` library",
        "standin export huggingface runs/stylegan2/synthetic exported/stylegan2-slices",
    ),
    "export onnx": Command(
        "lightning_modules.model_export",
        "export_onnx",
        "write the network of a generator or segmenter for ONNX, compared with the original",
        "standin export onnx runs/unet exported/unet-onnx",
    ),
    "export torchscript": Command(
        "lightning_modules.model_export",
        "export_torchscript",
        "write the network of a generator or segmenter for TorchScript, compared with the original",
        "standin export torchscript runs/stylegan2 exported/stylegan2-torchscript --batch_size 16",
    ),
    "export safetensors": Command(
        "lightning_modules.model_export",
        "export_safetensors",
        "write the weights of a generator or segmenter, with the configuration beside them",
        "standin export safetensors runs/stylegan2 exported/stylegan2-weights",
    ),
    "export bundle": Command(
        "lightning_modules.monai_bundle",
        "export_bundle",
        "write a segmenter as a MONAI bundle",
        "standin export bundle runs/unet exported/unet-bundle",
    ),
}


def overview(group: str = "") -> str:
    """Say which subcommands there are, or which kinds of the one whose names begin with `group`."""
    lines = ["usage: standin COMMAND ...", "", "May a synthetic set of brain MR images stand in for the real one?", ""]
    if group:
        lines = [f"usage: standin {group}KIND ...", ""]
    names = [name for name in COMMANDS if name.startswith(group)]
    width = max(map(len, names))
    lines += [f"  {name:<{width}}  {COMMANDS[name].summary}" for name in names]
    lines += ["", "`standin COMMAND --help` shows the options of a command. Training: `python train.py --help`."]
    return "\n".join(lines)


def _as_list(words: list[str]) -> list[str]:
    """Make one list of the words before the first option, unless it is a list or a mapping already."""
    count = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    if not count or words[0].startswith(("[", "{")):
        return words
    return [json.dumps(words[:count]), *words[count:]]


def main(args: list[str] | None = None) -> None:
    """Run one subcommand."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(overview() + "\n")
        return
    name, *rest = args
    group = f"{name} "
    if any(known.startswith(group) for known in COMMANDS):
        if not rest or rest[0] in ("-h", "--help"):
            sys.stdout.write(overview(group) + "\n")
            return
        name = group + rest.pop(0)
    if name not in COMMANDS:
        sys.exit(f"standin: there is no command {name!r}.\n\n{overview()}")
    command = COMMANDS[name]
    if command.takes_list:
        rest = _as_list(rest)
    from jsonargparse import DefaultHelpFormatter, auto_cli

    class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
        """Keep the lines of the examples as they are."""

    function: Any = getattr(importlib.import_module(command.module), command.function)
    examples = "examples:\n" + "\n".join(f"  {line}" for line in command.example.splitlines())
    try:
        auto_cli(function, args=rest, prog=f"standin {name}", epilog=examples, formatter_class=Formatter)
    except ValueError as error:
        sys.exit(f"standin {name}: {error}")


if __name__ == "__main__":
    main()
