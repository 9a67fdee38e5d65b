"""`standin export bundle`: a trained segmenter as a MONAI bundle, which runs without this package.

| file | content |
|---|---|
| `models/model.ts` | TorchScript: grey levels to probabilities, normalization and mirror images included |
| `configs/metadata.json` | what goes in and comes out |
| `configs/inference.json` | NIfTI volumes (H, W, Z, 4), such as `standin export decathlon` writes, to label maps |
| `docs/README.md` | how to run it |

`python -m monai.bundle verify_net_in_out network_def --meta_file configs/metadata.json --config_file
configs/inference.json` checks it; `python -m monai.bundle run --config_file configs/inference.json` needs
pytorch-ignite.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_modules.exported_network import CHANNELS, CLASSES, Source, open_source
from lightning_modules.model_export import new_folder, save_torchscript
from lightning_modules.segmentation import SegmentationModule
from lightning_modules.segmentation_targets import Classes, Regions, Target

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
DECODERS: Mapping[type[Target], str] = {
    Classes: "$lambda p: p.argmax(dim=0, keepdim=True)",
    Regions: "$lambda p: torch.where(p[2:] > 0.5, 3, torch.where(p[1:2] > 0.5, 1, torch.where(p[:1] > 0.5, 2, 0)))",
}
"""From probabilities p (C, H, W, Z) to class indices (1, H, W, Z), as `Target.decode`."""
SAVE = (
    "$lambda p: (os.makedirs(@output_dir, exist_ok=True), nibabel.save(nibabel.Nifti1Image("
    "p[0].cpu().numpy().astype('uint8'), p.affine.cpu().numpy()), "
    "os.path.join(@output_dir, os.path.basename(p.meta['filename_or_obj']))), p)[-1]"
)
"""MONAI's own SaveImage cannot write volumes of a single slice."""


def export_bundle(run: Path, out: Path, size_px: int | None = None) -> Path:
    """Write a segmenter as a MONAI bundle, which predicts label maps without this package.

    The bundle takes what `standin export decathlon` writes, or whole volumes of such slices. Its network is compared
    with the original first.

    Args:
        run: run folder, of which the best checkpoint is taken or else the last one, or a checkpoint.
        out: folder of the bundle; new.
        size_px: side of the slices; null: as those that it was trained on.

    Returns:
        The folder.

    Raises:
        ValueError: if there is no such checkpoint, it is not of a segmenter, the network cannot be exported or gives
            other numbers then, or the folder is not new.
    """
    source = open_source(run)
    model = source.model
    if not isinstance(model, SegmentationModule) or type(model.target) not in DECODERS:
        what = type(model.target).__name__ if isinstance(model, SegmentationModule) else type(model).__name__
        raise ValueError(f"{source.checkpoint}: a bundle is made of a segmenter of Classes or Regions, not of {what}.")
    network = source.network(size_px)
    names = CLASSES if isinstance(model.target, Classes) else ("whole tumour", "tumour core", "enhancing tumour")
    with new_folder(out) as folder:
        for name in ("models", "configs", "docs"):
            (folder / name).mkdir()
        difference = save_torchscript(network, folder / "models" / "model.ts", 1)
        side = network.inputs["modalities"].shape[-1]
        for name, content in (
            ("metadata", metadata(source, side, names, difference)),
            ("inference", inference(side, DECODERS[type(model.target)])),
        ):
            (folder / "configs" / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "docs" / "README.md").write_text(readme(network.name, side, names))
    return out


def metadata(source: Source, side: int, names: Sequence[str], difference: float) -> dict[str, Any]:
    """Say what the bundle is; `names` are those of its output channels."""
    common: dict[str, Any] = {"type": "image", "modality": "MR", "spatial_shape": [side, side], "dtype": "float32"}
    common["is_patch_data"] = False

    def channels(words: Sequence[str]) -> dict[str, str]:
        return {str(number): word for number, word in enumerate(words)}

    image = {**common, "format": "magnitude", "num_channels": len(CHANNELS) - 1, "value_range": [0, 255]}
    pred = {**common, "format": "probabilities", "num_channels": len(names), "value_range": [0, 1]}
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported from a StandIn run"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"nibabel": version("nibabel"), "pytorch-ignite": "0.5.5"},
        "task": "Brain tumour segmentation of MR slices",
        "description": "Core, oedema and enhancing tumour of gliomas on axial slices of four MR modalities",
        "authors": "to be filled in",
        "copyright": "to be filled in",
        "intended_use": "Research only",
        "network_data_format": {
            "inputs": {"image": {**image, "channel_def": channels(CHANNELS[:-1])}},
            "outputs": {"pred": {**pred, "channel_def": channels(names)}},
        },
        "standin": {**source.about(), "largest_difference": difference},
    }


def inference(side: int, decoder: str) -> dict[str, Any]:
    """Configure the prediction of all volumes of a folder, slice by slice."""
    return {
        "imports": ["$import glob", "$import os", "$import nibabel", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "images": "$sorted(glob.glob(@dataset_dir + '/*.nii.gz'))",
        "output_dir": "$@bundle_root + '/predictions'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "torch.jit.load",
            "f": "$@bundle_root + '/models/model.ts'",
            "map_location": "@device",
        },
        "preprocessing": {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @images]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {"_target_": "SliceInferer", "roi_size": [side, side], "sw_batch_size": 16, "spatial_dim": 2},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Lambdad", "keys": "pred", "func": decoder},
                {"_target_": "Lambdad", "keys": "pred", "func": SAVE},
            ],
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network_def",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "run": ["$@evaluator.run()"],
    }


def readme(network: str, side: int, names: Sequence[str]) -> str:
    """Describe the bundle to its user."""
    return f"""# Brain tumour segmentation of MR slices

A {network} that was trained with StandIn. It takes axial slices of {side} x {side} pixels with the grey levels 0 to 255
of {", ".join(CHANNELS[:-1])}, and gives the probabilities of {", ".join(names)}. Normalization is inside. Label maps
are {", ".join(f"{number} {name}" for number, name in enumerate(CLASSES))}.

Put slices, or volumes of them, as NIfTI files of {side} x {side} x Z x 4 voxels into `data`, then, with
`pytorch-ignite` and `nibabel`:

```
python -m monai.bundle run --config_file configs/inference.json
```

The label maps come into `predictions`. For research only.
"""
