"""Reading in blocks: the same pixels and sums as all at once, from memory that is used again."""

import numpy as np
import torch

import metrics.pixels as pixels
from metrics.pixel_loader import PixelLoader
from metrics.pixels import Pixels


class Slices:
    def __init__(self, images):
        self.images, self.asked = images, []

    def __len__(self):
        return len(self.images)

    def read(self, positions):
        self.asked.append(len(positions))
        return self.images[positions]


def source(n=11):
    return Slices(np.random.default_rng(0).integers(0, 256, (n, 2, 4, 6), np.uint8))


def view(images):
    return [images[:, 1], 255 - images[:, 0], images[:, 0]]


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("values", "total", "square", "group"))


def test_blocks_are_the_images_all_at_once(monkeypatch):
    monkeypatch.setattr(pixels, "CHUNK_BYTES", 2 * 3 * 24)  # two images at a time
    slices, group = source(), torch.arange(11) // 2
    whole = Pixels.of(torch.from_numpy(slices.images), group, view)
    assert whole.values.shape == (3, 11, 4, 6)
    loader = PixelLoader(slices, view, group=group)
    for _ in range(2):
        for first, block in loader.blocks(4):
            assert same(block, whole[first : first + 4])
    assert [first for first, _ in loader.blocks(4, first=4)] == [4, 8]
    assert same(next(loader.blocks(4, first=5))[1], whole[5:9])
    assert max(slices.asked) == 2


def test_blocks_share_memory_and_sums_are_made_once(monkeypatch):
    loader, summed = PixelLoader(source(), view), []
    original = pixels.sums
    monkeypatch.setattr(pixels, "sums", lambda x: summed.append(len(x)) or original(x))
    assert len({block.values.data_ptr() for _, block in loader.blocks(3)}) == 1
    assert sum(summed) == 3 * 11
    list(loader.blocks(3))
    assert sum(summed) == 3 * 11


def test_chosen_slices_are_loaded_in_the_order_asked():
    slices, group = source(), torch.arange(11)
    positions = np.array([7, 0, 7, 3])
    found = PixelLoader(slices, view, group=group).load(positions)
    assert same(found, Pixels.of(torch.from_numpy(slices.images[positions]), group[positions], view))


def test_an_empty_source_has_no_blocks():
    loader = PixelLoader(source(0), view)
    assert list(loader.blocks(4)) == []
    assert len(loader.load(np.arange(0))) == 0
