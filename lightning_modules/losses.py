"""Losses and regularizers of the generative adversarial networks: pure functions of logits, images and latents.

Sources: Goodfellow et al. 2014 (NeurIPS, arXiv 1406.2661), Arjovsky et al. 2017 (ICML, arXiv 1701.07875), Gulrajani et
al. 2017 (NeurIPS, arXiv 1704.00028), Odena et al. 2017 (ICML, arXiv 1610.09585), Karras et al. 2018 (progressive GAN,
ICLR, arXiv 1710.10196), Mescheder et al. 2018 (ICML, arXiv 1801.04406), Karras et al. 2020 (StyleGAN 2, CVPR, arXiv
1912.04958).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_nonsaturating_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss of the generator (Goodfellow et al. 2014, section 3: maximize log D(G(z))).

    Args:
        fake_logits: D(G(z)), any shape.

    Returns:
        mean softplus(-D(G(z))), a scalar.
    """
    return F.softplus(-fake_logits).mean()


def discriminator_real_loss(real_logits: Tensor) -> Tensor:
    """Half of :func:`discriminator_logistic_loss` that sees real images: mean softplus(-D(x)), a scalar."""
    return F.softplus(-real_logits).mean()


def discriminator_fake_loss(fake_logits: Tensor) -> Tensor:
    """Half of :func:`discriminator_logistic_loss` that sees generated images: mean softplus(D(G(z))), a scalar."""
    return F.softplus(fake_logits).mean()


def discriminator_logistic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Logistic loss of the discriminator (Goodfellow et al. 2014, equation 1, on logits).

    Args:
        real_logits: D(x), any shape.
        fake_logits: D(G(z)), any shape.

    Returns:
        mean softplus(-D(x)) + mean softplus(D(G(z))), a scalar.
    """
    return discriminator_real_loss(real_logits) + discriminator_fake_loss(fake_logits)


def wasserstein_generator_loss(fake_scores: Tensor) -> Tensor:
    """Generator's part of the Wasserstein distance (Arjovsky et al. 2017, equation 3): -mean D(G(z)), a scalar."""
    return -fake_scores.mean()


def wasserstein_discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Negative Wasserstein distance (Arjovsky et al. 2017, equation 3): mean D(G(z)) - mean D(x), a scalar."""
    return fake_scores.mean() - real_scores.mean()


def wasserstein_drift(real_scores: Tensor) -> Tensor:
    """Squared scores of real images, which keep the critic near 0 (Karras et al. 2018, appendix A.1, without epsilon).

    Args:
        real_scores: D(x), any shape.

    Returns:
        D(x)² of every sample, of the same shape.
    """
    return real_scores.square()


def gradient_penalty(mixed_images: Tensor, mixed_scores: Tensor, target: float = 1.0) -> Tensor:
    """Deviation of the critic's gradient from its target norm (Gulrajani et al. 2017, equation 3, without lambda).

    It is relative to the target, which is 750 for CIFAR-10 in Karras et al. 2018 and 1 elsewhere.

    Args:
        mixed_images: (N, C, H, W), with `requires_grad`, from which the scores were computed: real + (fake - real) · t
            with t in [0, 1] per sample.
        mixed_scores: Their scores, any shape with N first.
        target: Norm that the gradient should have.

    Returns:
        (||d sum D(x) / dx_n|| - target)² / target², (N,), differentiable with respect to the parameters of D.
    """
    return (gradient_norms(mixed_images, mixed_scores) / target - 1).square()


def gradient_norms(images: Tensor, scores: Tensor) -> Tensor:
    """||d sum D(x) / dx_n||, (N,), of scores that were computed from images (N, C, H, W); differentiable."""
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    norms: Tensor = torch.linalg.vector_norm(gradient.float(), dim=(1, 2, 3))
    return norms


def auxiliary_classifier_loss(label_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the auxiliary classifier (Odena et al. 2017, equation 3).

    Args:
        label_logits: (N, classes) of real or generated images.
        labels: One-hot float (N, classes), those that the images have or were generated for.

    Returns:
        The mean over samples, a scalar.
    """
    return F.cross_entropy(label_logits, labels)


def r1_penalty(real_images: Tensor, real_logits: Tensor) -> Tensor:
    """Squared gradient of the discriminator at real images (Mescheder et al. 2018, equation 9, without gamma / 2).

    Args:
        real_images: (N, C, H, W), with `requires_grad`, from which the logits were computed.
        real_logits: D(x), any shape with N first.

    Returns:
        ||d sum D(x) / dx_n||², (N,), differentiable with respect to the parameters of D.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real_images, create_graph=True)
    return gradient.float().square().sum((1, 2, 3))


def path_lengths(images: Tensor, ws: Tensor, noise: Tensor) -> Tensor:
    """Lengths of the Jacobian-vector products of the generator (Karras et al. 2020, equation 4, inside the brackets).

    The penalty is the squared deviation of the lengths from their moving mean a.

    Args:
        images: g(w), (N, C, H, W), computed from `ws`.
        ws: (N, num_ws, w_dim), with `requires_grad`.
        noise: y, unit-variance noise of the shape of the images; divided by sqrt(H W) here, so that the lengths do not
            depend on the resolution (appendix B).

    Returns:
        ||J_w^T y||, the root mean square over layers of the norm over w_dim, (N,), differentiable.
    """
    scale = 1 / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * noise).sum() * scale, ws, create_graph=True)  # (N, num_ws, w_dim)
    return gradient.float().square().sum(2).mean(1).sqrt()
