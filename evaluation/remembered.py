"""Results of slow functions of slices, kept on disk."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from datamodules.slice_set import Slices, write_atomically

Kind = TypeVar("Kind", bound=np.floating[Any])


def remembered(
    function: Callable[[Slices], npt.NDArray[Kind]], settings: str, folder: Path
) -> Callable[[Slices], npt.NDArray[Kind]]:
    """Keep the results of a slow function of slices on disk, so that an interrupted command need not repeat them.

    Args:
        function: uint8 (N, 5, H, W) -> (N, ...).
        settings: everything else that its results depend on.
        folder: for the results.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def remembering(slices: Slices) -> npt.NDArray[Kind]:
        digest = hashlib.sha256(f"{settings}{slices.shape}".encode())
        digest.update(np.ascontiguousarray(slices).data)
        path = folder / f"{digest.hexdigest()[:32]}.npy"
        if path.exists():
            stored: npt.NDArray[Kind] = np.load(path)
            return stored
        result = function(slices)
        buffer = io.BytesIO()
        np.save(buffer, result)
        write_atomically(path, buffer.getvalue())
        return result

    return remembering
