"""What of a trained model goes to other programs, and how they call it.

The network that makes the images, or the probabilities, with the moving average of the weights where there is one:

| model | inputs | output |
|---|---|---|
| GAN | `z` (N, width), and `noise` (N, pixels of all noise images) if it has noise inputs | `images` (N, 5, H, W) |
| diffusion | `x` (N, C, H, W) and `t` (N,), of a step of the sampler | `prediction`: the network, without the sampler |
| segmenter | `modalities` (N, 4, H, W), grey levels | `probabilities` (N, classes, H, W) |

A network that is told a condition has it as another input, `condition` (N, width). Normalization and mirror images of
segmenters are inside.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_modules.diffusion import Diffusion
from lightning_modules.image_generator import ImageGenerator
from lightning_modules.progressive_gan import ProgressiveGAN
from lightning_modules.segmentation import N_MODALITIES, SegmentationModule
from lightning_modules.stylegan import StyleGAN

TOLERANCE = 1e-4
"""Largest difference to the original, as a share of the largest value. Float32 sums in another order made up to 6e-6 in
trained networks at 64 px; one grey level is 8e-3."""
CHANNELS = ("T1", "T1ce", "T2", "FLAIR", "label")
CLASSES = ("background", "core", "oedema", "enhancing")


@dataclass(frozen=True)
class Input:
    """What a network is called with.

    Attributes:
        shape: of one, without the batch.
        meaning: in words.
        values: the smallest and the largest; None: standard normal.
    """

    shape: tuple[int, ...]
    meaning: str
    values: tuple[float, float] | None = None

    def examples(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw a batch."""
        if self.values is None:
            return torch.randn((count, *self.shape), generator=generator)
        low, high = self.values
        return low + (high - low) * torch.rand((count, *self.shape), generator=generator)


@dataclass(frozen=True)
class Network:
    """A network as other programs call it.

    Attributes:
        name: of its class.
        module: called with the inputs by their names.
        inputs: what it takes.
        output: name of what it gives.
        is_plain: it has no autograd functions of ours, which TorchScript cannot follow.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Input]
    output: str
    is_plain: bool = False

    def examples(self, count: int) -> dict[str, Tensor]:
        """Draw a batch of every input."""
        generator = torch.Generator().manual_seed(count)
        return {name: given.examples(count, generator) for name, given in self.inputs.items()}

    def recorded(self, count: int, any_batch: bool) -> torch.export.ExportedProgram:
        """Record what is computed for a batch of that size, or of any."""
        given = self.examples(count)
        shapes = {name: {0: torch.export.Dim("batch")} for name in given} if any_batch else None
        with torch.no_grad():
            return torch.export.export(self.module, (), given, dynamic_shapes=shapes, strict=False)

    def largest_difference(self, theirs: Callable[[Mapping[str, Tensor]], Tensor], count: int) -> float:
        """Compare what it gives elsewhere with the original, as a share of the largest value.

        Raises:
            ValueError: if the difference is more than rounding.
        """
        given = self.examples(count)
        with torch.no_grad():
            expected, found = self.module(**given), theirs(given)
        largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = float((found - expected).abs().max() / largest)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"The exported {self.name} gives other numbers than the original: they differ by {difference:.2g} of "
                f"the largest value, where rounding explains {TOLERANCE:g}. Nothing was written."
            )
        return difference


@dataclass(frozen=True)
class Source:
    """A checkpoint and the model in it.

    Attributes:
        checkpoint: the file.
        model: in evaluation mode, without gradients, on the CPU.
        arguments: that the model was made with.
    """

    checkpoint: Path
    model: LightningModule
    arguments: Mapping[str, Any]

    def weights(self) -> tuple[nn.Module, str]:
        """Give the network that is used, and the name of the argument that describes it.

        Raises:
            ValueError: if the model is neither a generator nor a segmenter.
        """
        model = self.model
        if not isinstance(model, (ImageGenerator, SegmentationModule)):
            raise ValueError(f"{self.checkpoint} is of a {type(model).__name__}, not of a generator or segmenter.")
        name = model.sampled_name if isinstance(model, ImageGenerator) else "network"
        return (getattr(model, name) if model.ema_network is None else model.ema_network), name

    def network(self, size_px: int | None) -> Network:
        """Give the network in the form that others call; `size_px` is the side of the slices of a segmenter.

        Raises:
            ValueError: if the model is neither a generator nor a segmenter, or the size is unknown.
        """
        model: Any = self.model
        used, _ = self.weights()
        name = type(used).__name__
        if isinstance(model, SegmentationModule):
            size = self._trained_px() if size_px is None else size_px
            grey = Input((N_MODALITIES, size, size), f"grey levels of {', '.join(CHANNELS[:-1])}", (0.0, 255.0))
            return Network(name, _Segmenter(model, used), {"modalities": grey}, "probabilities", is_plain=True)
        if size_px is not None:
            raise ValueError(f"size_px is for segmenters; the images of {name} have a size of their own. Leave it out.")
        network: Any = used
        told = {"condition": Input((model.conditions.width,), "a one for each class that holds", (0.0, 1.0))}
        told = told if model.conditions.width else {}
        if isinstance(model, Diffusion):
            shape = (network.img_channels, network.img_resolution, network.img_resolution)
            noisy = {"x": Input(shape, "noisy images, scaled as model.objective of config.yaml does")}
            time = {"t": Input((), "times, in the numbers of model.objective", (0.0, 1.0))}
            return Network(name, used, {**noisy, **time, **told}, "prediction")
        latent = {"z": Input((network.z_dim,), "standard normal")}
        if isinstance(model, ProgressiveGAN):
            return Network(name, used, latent, "images")
        assert isinstance(model, StyleGAN)
        pixels = sum(height * width for height, width in network.noise_shapes)
        noise = {"noise": Input((pixels,), "standard normal, the noise images of all layers")} if pixels else {}
        return Network(name, _StyleGAN(model, network), {**latent, **noise, **told}, "images")

    def _trained_px(self) -> int:
        """Look up in the run folder how large the slices were that a segmenter was trained on."""
        try:
            config = yaml.safe_load((self.checkpoint.absolute().parent.parent / "config.yaml").read_text())
            manifest = Path(config["data"]["init_args"]["root"]) / "dataset.json"
            return int(json.loads(manifest.read_text())["size_px"][0])
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.checkpoint}: how large the slices were that it was trained on is no longer known ({error}). "
                "State --size_px."
            ) from error

    def about(self) -> dict[str, Any]:
        """Say where the weights come from."""
        return {
            "checkpoint": self.checkpoint.name,
            "checkpoint_sha256": hashlib.sha256(self.checkpoint.read_bytes()).hexdigest(),
            "moving_average": getattr(self.model, "ema_network", None) is not None,
            "images_seen": getattr(self.model, "images_seen", 0),
            "software": f"standin {version('standin')}, torch {torch.__version__}",
        }

    def describe(self, folder: Path, network: Network, said: Mapping[str, Any]) -> None:
        """Write what others must know to `model.json`, and the configuration."""
        inputs = {
            name: {"shape": ["batch", *given.shape], "meaning": given.meaning} for name, given in network.inputs.items()
        }
        model: Any = self.model
        meaning: dict[str, Any] = {"channels": CHANNELS, "label_levels": getattr(model, "label_levels", None)}
        if isinstance(model, SegmentationModule):
            meaning = {"target": type(model.target).__name__}
        content = {**said, "tolerance": TOLERANCE, "network": network.name, "inputs": inputs, "output": network.output}
        content |= {**meaning, "classes": CLASSES, **self.about()}
        (folder / "model.json").write_text(json.dumps(content, indent=1) + "\n")
        self.write_config(folder)

    def write_config(self, folder: Path) -> None:
        """Write the model as a configuration has it to `config.yaml`, without the path that it once started from."""
        known = {key: value for key, value in self.arguments.items() if not key.startswith("_") and key != "init_from"}
        content = {"model": {"class_path": self.arguments["_class_path"], "init_args": known}}
        (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


class _StyleGAN(nn.Module):
    """Mapping, truncation and synthesis, with all noise images in one input."""

    def __init__(self, model: StyleGAN, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network
        self.truncation = {"truncation_psi": model.truncation_psi, "truncation_cutoff": model.truncation_cutoff}

    def forward(self, z: Tensor, noise: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Give images (N, 5, H, W) in about [-1, 1]; z (N, z_dim), noise (N, pixels), condition (N, c_dim)."""
        shapes = self.network.noise_shapes
        parts = () if noise is None else torch.split(noise, [height * width for height, width in shapes], dim=1)
        each = [part.reshape(-1, 1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        images: Tensor = self.network(z, condition, **self.truncation, noise=each)
        return images


class _Segmenter(nn.Module):
    """Normalization, network, mirror images and the meaning of the channels."""

    def __init__(self, model: SegmentationModule, network: nn.Module) -> None:
        super().__init__()
        self.network, self.ema_network = network, None
        self.target, self.mirror_axes = model.target, model.mirror_axes

    def forward(self, modalities: Tensor) -> Tensor:
        """Give probabilities (N, C, H, W) of grey levels (N, 4, H, W)."""
        # TorchScript looks at all properties of a module, and those of a LightningModule want a Trainer.
        predict: Any = SegmentationModule.probabilities
        probabilities: Tensor = predict(self, modalities)
        return probabilities


def open_source(run: Path) -> Source:
    """Load the model of a run folder or checkpoint, in float32 throughout.

    Raises:
        ValueError: if there is none, or it is not one that `train.py` wrote.
    """
    names = ("best.ckpt", "last.ckpt")
    checkpoint = next((path for name in names if (path := Path(run) / "checkpoints" / name).is_file()), Path(run))
    if not checkpoint.is_file():
        raise ValueError(f"Expected a run folder with checkpoints/last.ckpt, or a checkpoint, at {run}: there is none.")
    try:
        content = torch.load(checkpoint, map_location="meta", weights_only=True, mmap=True)
        arguments: dict[str, Any] = content["hyper_parameters"]
        class_path: str = arguments["_class_path"]
    except Exception as error:
        raise ValueError(f"{checkpoint} cannot be read as a checkpoint that train.py wrote ({error!r}).") from error
    if not class_path.startswith("lightning_modules."):
        raise ValueError(f"{checkpoint} is of a {class_path}, and not of a model of lightning_modules.")
    importlib.import_module(class_path.rpartition(".")[0])
    whole = {
        name: {**value, "init_args": {**value["init_args"], "num_half_res": 0}}
        for name, value in arguments.items()
        if isinstance(value, dict) and "num_half_res" in value.get("init_args", ())
    }
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, **whole}
    try:
        with quiet():
            model = LightningModule.load_from_checkpoint(checkpoint, **options)
    except Exception as error:
        raise ValueError(f"{checkpoint}: the model cannot be made again. {error}") from error
    return Source(checkpoint, model.eval().requires_grad_(False), {**arguments, **whole})


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what exporters say of their own future, and of packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
