"""A network that recognizes copies of slices, trained without annotation on the slices themselves.

Pizzi et al. 2022, "A Self-Supervised Descriptor for Image Copy Detection" (CVPR, arXiv 2202.10261): two views of a
slice are to be near each other and far from all others (InfoNCE, as in Chen et al. 2020, arXiv 2002.05709), blends near
both slices that they are made of, and no slice near its nearest stranger (differential entropy, as in Sablayrolles et
al. 2019, "Spreading vectors for similarity search", ICLR, arXiv 1806.03198).

Neighbouring slices of a patient are no copies of each other, but more alike than any two patients are. They are no
positives, and as negatives they count the less the nearer they are (`negative_weights`). The entropy keeps apart slices
of different patients only; that is what a detector is judged by: how near does a slice come that owes nothing to the
training set?
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam

from lightning_modules.base import ImageClockModule
from lightning_modules.copy_views import N_MODALITIES, copy_views
from lightning_modules.counter_random import Stream, random_uniform
from lightning_modules.image_generator import N_CLASSES
from lightning_modules.networks.embedding import EmbeddingNetwork
from lightning_modules.segmentation import normalize

FARTHEST = 2.0
"""Distance of opposite points of the unit sphere."""
NEAREST = 1e-6
"""Distances count as at least that, so that equal embeddings have a finite entropy."""


class CopyDetector(ImageClockModule):
    """Embed slices so that copies are near each other in cosine, however they were changed.

    Modalities are normalized inside the brain, so that brightness and contrast of each do not matter at all; every
    class of the label but the background is a channel.

    Args:
        widths: feature channels at every resolution, the first one half that of the slices.
        blocks: residual blocks at every resolution.
        embedding_width: numbers in an embedding.
        norm_groups: groups of the normalizations; divides all widths.
        with_label: embed the label too, else the four modalities alone.
        blend: probability that the second view of a slice is one of a blend with another slice.
        temperature: of InfoNCE.
        entropy_weight: of the differential entropy.
        neighbour_height: how far from a slice, as a share of the height of the volume, slices of the same patient begin
            to count as negatives: 39 % at this distance, 86 % at twice as much.
        learning_rate: of Adam at the start; falls linearly to 0 at the end of training.
        seed: views follow from it and the position of the sample.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128, 256, 512),
        blocks: int = 2,
        embedding_width: int = 256,
        norm_groups: int = 8,
        with_label: bool = True,
        blend: float = 0.5,
        temperature: float = 0.05,
        entropy_weight: float = 5.0,
        neighbour_height: float = 0.05,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        channels = N_MODALITIES + (N_CLASSES - 1 if with_label else 0)
        self.network = EmbeddingNetwork(channels, widths, blocks, embedding_width, norm_groups)
        self.with_label = with_label
        self.blend = blend
        self.temperature = temperature
        self.entropy_weight = entropy_weight
        self.neighbour_height = neighbour_height
        self.learning_rate = learning_rate
        self.seed = seed

    def configure_optimizers(self) -> Adam:
        """Adam."""
        return Adam(self.network.parameters(), lr=self.learning_rate)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Set the learning rate for this position of the clock."""
        self.set_learning_rate(self.learning_rate * (1.0 - self.progress))

    def embed(self, slices: Tensor) -> Tensor:
        """Give the embeddings of slices.

        Args:
            slices: uint8 or float (N, 5, H, W): grey levels 0..255 and, last, the class index.

        Returns:
            float32 (N, embedding_width) of length 1; their products are cosines.
        """
        image = normalize(slices[:, :N_MODALITIES])
        if self.with_label:
            classes = F.one_hot(slices[:, -1].long(), N_CLASSES).movedim(-1, 1)  # (N, classes, H, W)
            image = torch.cat([image, classes[:, 1:].to(image.dtype)], dim=1)
        embeddings: Tensor = self.network(image)
        return embeddings

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """InfoNCE and entropy of two views of each slice, over the batch of all processes.

        Args:
            batch: slices uint8 (N, 5, H, W); position, patient int64 (N,); height float (N,), 0 to 1 in the volume.
            batch_idx: unused.
        """
        slices, index = batch["slices"].float(), 3 * batch["position"]
        weight = self._blend_weights(index)
        blended = blend_with_next(self.over_ranks(slices), self.over_ranks(weight))
        blended = blended[self.global_rank :: self.trainer.world_size]
        views = [copy_views(slices, self.seed, index + 1), copy_views(blended, self.seed, index + 2)]
        embeddings = torch.cat([self.over_ranks(part) for part in self.embed(torch.cat(views)).chunk(2)])  # (2N, D)
        patient, height = (self.over_ranks(batch[name]).repeat(2) for name in ("patient", "height"))
        affinity = copy_affinity(self.over_ranks(weight))
        negatives = negative_weights(patient, height, self.neighbour_height)
        contrast = info_nce(embeddings, affinity, negatives, self.temperature)
        entropy = differential_entropy(embeddings, (patient[:, None] != patient) & (affinity == 0))
        self.log_mean("loss/contrast", contrast)
        self.log_mean("entropy", entropy)
        self.advance(len(slices))
        return contrast - self.entropy_weight * entropy

    def _blend_weights(self, index: Tensor) -> Tensor:
        """Draw the weight of each slice in its second view, 0.5 to 1: (N,)."""
        chance, share = random_uniform(self.seed, Stream.AUGMENTATION, index, 2).unbind(1)
        return torch.where(chance < self.blend, 0.5 + 0.5 * share, 1.0)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Embed slices: float32 (N, embedding_width); N may be 0."""
        return self.embed(batch["slices"])

    @torch.no_grad()
    def embed_array(self, slices: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed slices as the data has them: uint8 (N, 5, H, W) -> float32 (N, embedding_width)."""
        array: npt.NDArray[np.float32] = self.embed(torch.from_numpy(slices).to(self.device)).cpu().numpy()
        return array


def blend_with_next(slices: Tensor, weight: Tensor) -> Tensor:
    """Blend each slice with the one after it, the last with the first; the label stays.

    Args:
        slices: float (N, 5, H, W).
        weight: (N,), of each slice itself.

    Returns:
        float (N, 5, H, W).
    """
    grey = slices[:, :-1].lerp(slices[:, :-1].roll(-1, 0), 1.0 - weight[:, None, None, None])
    return torch.cat([grey, slices[:, -1:]], dim=1)


def copy_affinity(weight: Tensor) -> Tensor:
    """Say how much of one view is in another: (N,) blend weights -> (2N, 2N), first views, then second ones.

    The second view of slice i holds `weight[i]` of slice i and the rest of slice i + 1; the last one of the first.
    """
    own, rest = torch.diag(weight), torch.diag(1.0 - weight)
    shares = own + rest.roll(1, dims=1)  # (second views, slices)
    nothing = torch.zeros_like(shares)
    return torch.cat([torch.cat([nothing, shares.T], dim=1), torch.cat([shares, nothing], dim=1)])


def negative_weights(patient: Tensor, height: Tensor, neighbour_height: float) -> Tensor:
    """Say how much slices count as negatives of each other: 1 in different patients, 1 - exp(-(d / s)^2 / 2) in one.

    d is the difference of their heights and s `neighbour_height`: a slice is no negative of itself, neighbours hardly.

    Args:
        patient: int64 (N,).
        height: (N,), 0 to 1.
        neighbour_height: s.

    Returns:
        (N, N).
    """
    distance = (height[:, None] - height) / neighbour_height
    in_one = -torch.expm1(-0.5 * distance.square())
    return torch.where(patient[:, None] == patient, in_one, 1.0)


def info_nce(embeddings: Tensor, affinity: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of picking the copies of each view among all other views, by cosine.

    The mean over i of -sum_j a_ij log(exp(s_ij / t) / sum_k w_ik exp(s_ik / t)) / sum_j a_ij with cosines s,
    temperature t, affinities a, and w_ii = 0, w = 1 where a > 0 and that of the negatives elsewhere. Without blends and
    with all weights 1 it is equation 1 of Chen et al. 2020.

    Args:
        embeddings: (M, D) of length 1.
        affinity: (M, M), at least 0; 0 on the diagonal, not all 0 in any row.
        negatives: (M, M), 0 to 1.
        temperature: t.

    Returns:
        scalar, nats.
    """
    weights = torch.where(affinity > 0, 1.0, negatives).fill_diagonal_(0.0)
    logits = embeddings @ embeddings.T / temperature + weights.log()
    log_share = logits.log_softmax(dim=1).masked_fill(affinity == 0, 0.0)
    return -((affinity * log_share).sum(dim=1) / affinity.sum(dim=1)).mean()


def differential_entropy(embeddings: Tensor, strangers: Tensor) -> Tensor:
    """Estimate the entropy, up to constants (Kozachenko, Leonenko): the mean log distance of the nearest stranger.

    Args:
        embeddings: (M, D) of length 1.
        strangers: bool (M, M); who has none counts as farthest from all.

    Returns:
        scalar, at most log 2.
    """
    with torch.no_grad():
        nearest = (embeddings @ embeddings.T).masked_fill(~strangers, -torch.inf).argmax(dim=1)
    distance = (embeddings - embeddings[nearest]).norm(dim=1)
    distance = torch.where(strangers.any(dim=1), distance, FARTHEST)
    return distance.clamp(min=NEAREST).log().mean()
