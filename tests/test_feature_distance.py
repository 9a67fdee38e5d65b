"""Fréchet and kernel distance as torchmetrics: with a network of one's own, over batches, in two processes."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from metrics.feature_distance import FrechetDistance, KernelDistance
from metrics.fidelity import frechet_distance, polynomial_mmd

WIDTH = 6


def network():
    torch.manual_seed(1)
    layers = (nn.Conv2d(5, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers)


def images(n, seed):
    return torch.randn(n, 5, 8, 8, generator=torch.Generator().manual_seed(seed))


REAL, GENERATED = images(40, 0), 1.2 * images(33, 1)


def filled(metric, rows=slice(None)):
    for kind, real in ((REAL, True), (GENERATED, False)):
        for batch in kind[rows].split(7):
            metric.update(batch, real=real)
    return metric


def features():
    with torch.no_grad():
        return tuple(network().eval()(x) for x in (REAL, GENERATED))


def test_batches_give_the_distance_of_all_images():
    frechet, kernel = filled(FrechetDistance(network(), WIDTH)), filled(KernelDistance(network()))
    assert frechet.compute().item() == pytest.approx(frechet_distance(*features()).item(), rel=1e-6)
    assert kernel.compute().item() == pytest.approx(polynomial_mmd(*features()).item(), rel=1e-6)


def test_images_of_one_kind_are_not_enough():
    for metric in (FrechetDistance(network(), WIDTH), KernelDistance(network())):
        filled(metric).reset()
        metric.update(REAL, real=True)
        with pytest.raises(ValueError, match=r"generated images are needed; got"):
            metric.compute()


class Pooled(nn.Module):
    """Features that torchmetrics' own metrics take: of uint8 images, with their width said."""

    num_features = WIDTH

    def forward(self, x):
        return x.double().flatten(2).mean(2) / 255


def test_torchmetrics_gives_the_same_with_the_same_features():
    real, generated = (
        torch.randint(0, high, (30, WIDTH, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(high))
        for high in (200, 256)
    )
    theirs = FrechetInceptionDistance(feature=Pooled(), input_img_size=(WIDTH, 8, 8)).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=Pooled(), subsets=1, subset_size=30)
    ours = FrechetDistance(Pooled(), WIDTH), KernelDistance(Pooled())
    for metric in (theirs, kernel, *ours):
        metric.update(real, real=True)
        metric.update(generated, real=False)
    x, y = (Pooled()(z) for z in (real, generated))
    assert theirs.compute().item() == pytest.approx(frechet_distance(x, y, correction=1).item(), rel=1e-6)
    assert ours[0].compute().item() == pytest.approx(frechet_distance(x, y, correction=0).item(), rel=1e-9)
    assert ours[1].compute().item() == pytest.approx(kernel.compute()[0].item(), rel=1e-6)


def test_the_network_stays_frozen_inside_a_module_that_trains():
    metric = FrechetDistance(network(), WIDTH)
    parent = nn.ModuleDict({"metric": metric}).train()
    assert parent.training
    assert not metric.network.training
    before = {k: v.clone() for k, v in metric.network.state_dict().items()}
    filled(metric)
    assert all(torch.equal(v, before[k]) for k, v in metric.network.state_dict().items())
    assert not any(p.requires_grad for p in metric.parameters())


def test_maps_instead_of_vectors_are_refused():
    with pytest.raises(ValueError, match=r"features \(N, D\) from the network, but got \(40, 6, 6, 6\); pool them"):
        FrechetDistance(network()[:2], WIDTH).update(REAL, real=True)


def _distances_of_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    rows = slice(0, 25) if rank == 0 else slice(25, None)  # unequal: 25 and 15 real ones, 25 and 8 generated ones
    metrics = (filled(metric, rows) for metric in (FrechetDistance(network(), WIDTH), KernelDistance(network())))
    torch.save([metric.compute() for metric in metrics], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    mp.spawn(_distances_of_rank, args=(str(tmp_path),), nprocs=2)
    alone = [filled(metric).compute() for metric in (FrechetDistance(network(), WIDTH), KernelDistance(network()))]
    for rank in range(2):
        for found, expected in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            assert found.item() == pytest.approx(expected.item(), rel=1e-6)
