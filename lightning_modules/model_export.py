"""`standin export onnx`, `torchscript` and `safetensors`: trained networks for other programs.

Which inputs they have says `exported_network`. Before anything is written, the result runs on random numbers beside the
original.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.exported_network import Network, open_source, quiet

EXAMPLES = 2


def export_onnx(run: Path, out: Path, size_px: int | None = None) -> Path:
    """Write the network of a generator or segmenter for ONNX, for any number of images at once.

    ONNX Runtime runs it on random numbers, and it is compared with the original. Needs `pip install 'standin[export]'`.

    Args:
        run: run folder, of which the best checkpoint is taken or else the last one, or a checkpoint.
        out: folder for model.onnx, model.json, which says what goes in and comes out, and config.yaml; new.
        size_px: side of the slices of a segmenter; null: as those that it was trained on.

    Returns:
        The folder.

    Raises:
        ValueError: if there is no such checkpoint, the network cannot be exported or gives other numbers then, or the
            folder is not new.
    """
    try:
        runtime: Any = importlib.import_module("onnxruntime")
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise ValueError(f"ONNX needs other packages ({error}): pip install 'standin[export]'.") from error
    source = open_source(run)
    network = source.network(size_px)
    with new_folder(out) as folder:
        try:
            with quiet():
                program = torch.onnx.export(
                    network.recorded(EXAMPLES, any_batch=True), output_names=[network.output], verbose=False
                )
                assert program is not None
                program.save(folder / "model.onnx")
            session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ValueError(f"{source.checkpoint}: {network.name} cannot be exported to ONNX. {error}") from error

        def run_there(inputs: Mapping[str, Tensor]) -> Tensor:
            return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

        difference = network.largest_difference(run_there, EXAMPLES + 1)
        source.describe(folder, network, {"format": "onnx", "batch": "any", "largest_difference": difference})
    return out


def export_torchscript(run: Path, out: Path, size_px: int | None = None, batch_size: int = 1) -> Path:
    """Write the network of a generator or segmenter for TorchScript, and compare it with the original.

    Args:
        run: run folder, of which the best checkpoint is taken or else the last one, or a checkpoint.
        out: folder for model.ts, model.json, which says what goes in and comes out, and config.yaml; new.
        size_px: side of the slices of a segmenter; null: as those that it was trained on.
        batch_size: images that a generator makes at once, always as many; a segmenter takes any number.

    Returns:
        The folder.

    Raises:
        ValueError: if there is no such checkpoint, the network cannot be exported or gives other numbers then, or the
            folder is not new.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected 1 or more.")
    source = open_source(run)
    network = source.network(size_px)
    with new_folder(out) as folder:
        difference = save_torchscript(network, folder / "model.ts", batch_size)
        batch = "any" if network.is_plain else batch_size
        source.describe(folder, network, {"format": "torchscript", "batch": batch, "largest_difference": difference})
    return out


def export_safetensors(run: Path, out: Path) -> Path:
    """Write the weights of a generator or segmenter as safetensors, with the configuration beside them.

    Args:
        run: run folder, of which the best checkpoint is taken or else the last one, or a checkpoint.
        out: folder for model.safetensors, the weights of the network that the metadata in it name, and config.yaml;
            new.

    Returns:
        The folder.

    Raises:
        ValueError: if there is no such checkpoint, or the folder is not new.
    """
    from safetensors.torch import save_file

    source = open_source(run)
    network, name = source.weights()
    weights = {key: value.clone(memory_format=torch.contiguous_format) for key, value in network.state_dict().items()}
    about = {key: str(value) for key, value in source.about().items()}
    with new_folder(out) as folder:
        save_file(weights, folder / "model.safetensors", {"format": "pt", "network": name, **about})
        source.write_config(folder)
    return out


def save_torchscript(network: Network, path: Path, batch_size: int) -> float:
    """Write TorchScript; give the largest difference to the original, as a share of the largest value.

    Raises:
        ValueError: if that is not possible, or the difference is more than rounding.
    """
    count = EXAMPLES if network.is_plain else batch_size
    try:
        with torch.no_grad(), quiet():
            module = network.module
            if not network.is_plain:
                module = network.recorded(count, any_batch=False).module(check_guards=False)
            jit: Any = torch.jit
            jit.trace(module, example_kwarg_inputs=network.examples(count), check_trace=False).save(path)
            loaded = jit.load(path)
    except Exception as error:
        raise ValueError(f"{network.name} cannot be exported to TorchScript. {error}") from error
    return network.largest_difference(lambda given: loaded(**given), count + network.is_plain)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name, which becomes `out` when everything is there.

    Raises:
        ValueError: if `out` exists and is not an empty folder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"Expected {out} to be a new or empty folder, but it is not. Choose another.")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
