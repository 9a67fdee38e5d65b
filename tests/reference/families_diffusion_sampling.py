"""Samplers along whole trajectories with the exact denoiser of a mixture, noise levels, and min-SNR weights."""

import math
import re
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from lightning_modules.diffusion_chain import DiffusionChain
from lightning_modules.exact_sampling import GaussianMixture
from lightning_modules.noise_levels import CLEAN, CosineChain, Geometric, Karras, Level, LinearBeta, Spacing, Straight
from lightning_modules.sampling import DDIM, Ancestral, Denoised, DPMSolverPP2M, Heun, Sampler, UniPC, clipped
from lightning_modules.variational import min_snr_weight

Arrays = dict[str, npt.NDArray[Any]]
MIXTURE = {"gmm_means", "gmm_log_weights", "gmm_std"}


def tensors(ref: Arrays) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in ref.items() if value.dtype.kind == "f"}


def mixture(ref: Arrays) -> GaussianMixture:
    means, log_weights, std = (tensors(ref)[key] for key in ("gmm_means", "gmm_log_weights", "gmm_std"))
    return GaussianMixture(means, log_weights, float(std))


def no_noise(_step: int) -> Tensor:
    raise AssertionError("a deterministic sampler asks for noise")


def sampling_loop(_stem: str, ref: Arrays) -> dict[str, Any]:
    chain = DiffusionChain(int(ref["T"]), str(ref["schedule"])).respaced(str(ref["respacing"]))
    levels, x, z = [*reversed(chain.levels), CLEAN], tensors(ref)["x_T"], tensors(ref)["z"]
    ours: dict[str, Any] = {"timestep_map": chain.timesteps}
    for key in (key for key in ref if key.endswith("_trajectory")):
        sampler: Sampler
        if eta := re.fullmatch(r"ddim_eta([\d.]+)_trajectory", key):
            sampler = DDIM(eta=float(eta[1]))
        else:
            sampler = Ancestral(variance="small" if "fixed_small" in key else "large")
        ours[key] = torch.stack(list(sampler.trajectory(clipped(mixture(ref)), levels, x, lambda k: z[k])))
    return ours


def edm_sampler(_stem: str, ref: Arrays) -> dict[str, Any]:
    ours: dict[str, Any] = {}
    for case in (key.removesuffix("_num_steps") for key in ref if key.endswith("_num_steps")):
        steps, low, high, rho = (
            ref[f"{case}_{name}"].item() for name in ("num_steps", "sigma_min", "sigma_max", "rho")
        )
        levels, z = Karras(low, high, rho)(steps), tensors(ref)[f"{case}_churn_z"]
        x = tensors(ref)["latents_unit"] * high
        calls: list[tuple[float, Tensor]] = []

        def recorded(x: Tensor, level: Level, calls: list[tuple[float, Tensor]] = calls) -> Denoised:
            calls.append((level.sigma, x))
            return mixture(ref)(x, level)

        churned = Heun(steps, *(float(ref[name]) for name in ("S_churn", "S_min", "S_max", "S_noise")))
        ours |= {
            f"{case}_sigma_steps": [level.sigma for level in levels],
            f"{case}_final": Heun(steps)(recorded, levels, x, no_noise),
            f"{case}_euler_final": DDIM(steps)(mixture(ref), levels, x, no_noise),
            f"{case}_churn_final": churned(mixture(ref), levels, x, lambda k, z=z: z[k]),
            f"{case}_denoiser_calls_sigma": [sigma for sigma, _ in calls],
            f"{case}_denoiser_calls_x": torch.stack([x for _, x in calls]),
        }
    return ours


def edm_sigma_schedules(_stem: str, ref: Arrays) -> dict[str, Any]:
    spacings: dict[str, Spacing] = {"vp": LinearBeta(), "ve": Geometric(), "iddpm": CosineChain(), "edm": Karras()}
    ours = {}
    for key in ref:
        name, steps = key.split("_n")
        ours[key] = [level.sigma for level in spacings[name](int(steps))[:-1]]
    return ours


def flow_and_fast_solvers(_stem: str, ref: Arrays) -> dict[str, Any]:
    given, denoise, steps = tensors(ref), mixture(ref), len(ref["rf_timesteps"]) - 1
    noisiest = int(ref["rf_timesteps"][0])
    times = [Straight()(noisiest)[noisiest - t] for t in ref["rf_t"].tolist()]
    alpha, sigma = (torch.tensor(values).reshape(-1, 1, 1, 1) for values in zip(*times, strict=True))
    (first_alpha, first_sigma), (last_alpha, last_sigma) = Straight()(1)
    x0, noise, x, levels = given["rf_x0"], given["rf_noise"], given["rf_x_T"], Straight()(steps)
    ours: dict[str, Any] = {
        "rf_timesteps": [round(noisiest * level.sigma) for level in levels],
        "rf_x_t": alpha * x0 + sigma * noise,
        "rf_velocity_target": (last_alpha - first_alpha) * x0 + (last_sigma - first_sigma) * noise,
        "rf_euler_trajectory": torch.stack(list(DDIM(steps).trajectory(denoise, levels, x, no_noise))),
    }
    for key in (key for key in ref if key.startswith("minsnr")):
        gamma, predict, schedule = re.fullmatch(r"minsnr(\d+)_(\w+)_weight_(\w+)", key).groups()
        ours[key] = min_snr_weight(DiffusionChain(len(ref[key]), schedule).snr, float(gamma), predict)
    for case in (key.removesuffix("_trajectory") for key in ref if re.match(r"(dpmpp2m|unipc2).*_trajectory", key)):
        ours |= fast_solver(case, ref, denoise)
    return ours


def fast_solver(case: str, ref: Arrays, denoise: GaussianMixture) -> dict[str, Any]:
    """At steps of the linear chain, or at Karras levels between its ends, whose steps are rounded."""
    chain, steps = DiffusionChain(len(ref["minsnr5_eps_weight_linear"]), "linear"), ref[f"{case}_timesteps"]
    ratios = (chain.sigma / chain.alpha).tolist()
    sigmas = [ratios[t] for t in steps]
    if case.endswith("_karras"):
        levels = Karras(ratios[0], ratios[-1])(len(steps))[:-1]
        steps, sigmas = [round(chain.timestep_of(level)) for level in levels], [level.sigma for level in levels]
    # The trajectories are those of the file's own levels, in float32.
    given = [Level(1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)) for sigma in ref[f"{case}_sigmas"].tolist()]
    sampler = UniPC() if case.startswith("unipc2") else DPMSolverPP2M()
    states = sampler.trajectory(denoise, given, torch.from_numpy(ref["rf_x_T"]), no_noise)
    return {
        f"{case}_timesteps": steps,
        f"{case}_sigmas": [*sigmas, 0.0],
        f"{case}_trajectory": torch.stack(list(states)),
    }


FAMILIES = {
    "sampling_loop_": sampling_loop,
    "edm_sampler": edm_sampler,
    "edm_sigma_schedules": edm_sigma_schedules,
    "flow_and_fast_solvers": flow_and_fast_solvers,
}
TOLERANCES = {
    "sampling_loop_": {"": (0, 5e-3), "timestep_map": (0, 0)},  # the original predicts noise, in float32
    "edm_sampler": (1e-11, 1e-11),
    "edm_sigma_schedules": {"": (1e-12, 0), "iddpm": (4e-6, 4e-6)},  # the original has cosines in float32
    # The original has levels in float32, in which the least of them, the end of the Karras levels, is off by 8e-5.
    "flow_and_fast_solvers": {"": (1e-6, 5e-6), "dpmpp2m_karras_sigmas": (1e-4, 0), "minsnr": (1e-12, 0)},
}
INPUTS = {
    "sampling_loop_": MIXTURE | {"T", "schedule", "respacing", "x_T", "z"},
    "edm_sampler": (
        *("gmm_", "latents_unit", "S_"),
        *(f"heun{i}_{name}" for i in range(10) for name in ("num_steps", "sigma_min", "sigma_max", "rho", "churn_z")),
    ),
    "edm_sigma_schedules": set[str](),
    "flow_and_fast_solvers": MIXTURE | {"rf_x0", "rf_noise", "rf_t", "rf_x_T", "num_steps"},
}
