"""Write the shards of a slice set as a stream."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from datamodules.slice_set import Slices


class ShardWriter:
    """Write a known number of slices to shards of bounded size, holding none of them in memory.

    Args:
        out: folder of the slice set.
        shape: of one slice, (5, H, W).
        total: number of slices that will come.
        shard_mib: largest size of a shard (one slice at least).
    """

    def __init__(self, out: Path, shape: tuple[int, ...], total: int, shard_mib: int) -> None:
        self.out, self.shape, self.left = out, shape, total
        self.capacity = max(1, (shard_mib << 20) // int(np.prod(shape)))
        self.number = self.rows = 0

    def write(self, slices: Slices) -> None:
        """Append uint8 (N, 5, H, W); a shard gets its name when it is full, or the last slice has come."""
        while len(slices):
            path = self.out / f".slices-{self.number:05d}.npy.tmp"
            length = min(self.capacity, self.rows + self.left)
            with path.open("ab" if self.rows else "wb") as file:
                if self.rows == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (length, *self.shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                part = slices[: length - self.rows]
                file.write(np.ascontiguousarray(part).data)
                self.rows, self.left, slices = self.rows + len(part), self.left - len(part), slices[len(part) :]
                if self.rows == length:
                    file.flush()
                    os.fsync(file.fileno())
            if self.rows == length:
                path.replace(self.out / f"slices-{self.number:05d}.npy")
                self.number, self.rows = self.number + 1, 0
