"""EDM's preconditioning and loss as an objective computes them."""

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from lightning_modules.denoising import EDMObjective
from lightning_modules.noise_levels import Level

Arrays = dict[str, npt.NDArray[Any]]


class Recorded(torch.nn.Module):
    """A network that gives recorded outputs and keeps what it was asked."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs, self.asked = outputs, []

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None) -> Tensor:
        self.asked.append((x, time))
        return self.outputs[len(self.asked) - 1 :][:1] if len(x) == 1 else self.outputs


def edm_precond_loss(name: str, ref: Arrays) -> dict[str, Any]:
    """All arrays of every standard deviation of the data that the file has: sd<value>_*."""
    ours: dict[str, Any] = {}
    for prefix in sorted({key.split("_")[0] for key in ref if key.startswith("sd")}):
        given = {key: torch.from_numpy(ref[f"{prefix}_{key}"]) for key in ("x", "F", "loss_y", "loss_u", "loss_noise")}
        p_mean, p_std = float(ref["P_mean"]), float(ref["P_std"])
        objective = EDMObjective(sigma_data=float(prefix[2:]), p_mean=p_mean, p_std=p_std)
        sigmas = torch.from_numpy(ref["sigma"])
        found = dict(zip(("c_skip", "c_out", "c_in"), objective.scaling(torch.ones_like(sigmas), sigmas), strict=True))
        found["loss_weight"] = objective.weight(sigmas)

        network = Recorded(given["F"])
        denoise = objective.denoiser(network, None)
        pairs = zip(given["x"], sigmas.tolist(), strict=True)
        found["D"] = torch.cat([denoise(x[None], Level(1.0, sigma)).image for x, sigma in pairs])
        found["net_input"] = torch.cat([x for x, _ in network.asked])
        found["c_noise"] = torch.cat([time for _, time in network.asked])

        y, noise, u = given["loss_y"], given["loss_noise"], given["loss_u"].double()
        found["loss_sigma"] = sigma = (p_mean + p_std * u).exp()
        network = Recorded(given["F"])
        noisy = [(y + sigma.float()[:, None, None, None] * noise)[k : k + 1] for k in range(len(y))]
        denoise = objective.denoiser(network, None)
        pairs = zip(noisy, sigma.tolist(), strict=True)
        denoised = torch.cat([denoise(x, Level(1.0, level)).image for x, level in pairs])
        found["loss"] = objective.weight(sigma).float()[:, None, None, None] * (denoised - y).square()
        # In training the times follow from uniform numbers, here those whose normal quantiles are the recorded ones.
        uniform = torch.special.ndtr(u) - 2.0**-25
        trained = objective.losses(Recorded(given["F"]), y, None, uniform, noise).loss
        torch.testing.assert_close(trained, found["loss"].flatten(1).mean(dim=1))
        ours |= {f"{prefix}_{key}": value.numpy() for key, value in (given | found).items()}
    return ours


FAMILIES: dict[str, Callable[[str, Arrays], dict[str, Any]]] = {"edm_precond_loss": edm_precond_loss}
INPUTS: dict[str, tuple[str, ...]] = {"edm_precond_loss": ("sigma", "P_")}
TOLERANCES: dict[str, Any] = {"edm_precond_loss": (1e-5, 1e-6)}
