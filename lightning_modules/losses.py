"""Losses and regularizers of the generative adversarial networks: pure functions of logits, images and latents.

Sources: Goodfellow et al. 2014 (NeurIPS, arXiv 1406.2661), Mescheder et al. 2018 (ICML, arXiv 1801.04406),
Karras et al. 2020 (StyleGAN 2, CVPR, arXiv 1912.04958).
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
