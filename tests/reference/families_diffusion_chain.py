"""The chain, its reverse steps and losses, respacing, the full variational bound, and the drawing of steps."""

import re
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from lightning_modules.diffusion_chain import DiffusionChain, space_steps
from lightning_modules.exact_sampling import GaussianMixture
from lightning_modules.noise_levels import CLEAN, Level
from lightning_modules.sampling import DDIM, Ancestral, Denoised, Sampler, to_level
from lightning_modules.time_sampling import LossAwareTimes
from lightning_modules.variational import (
    Parameterization,
    full_vlb,
    hybrid_loss,
    marginal,
    noised,
    posterior,
    prior_bits,
    reverse_step,
    simple_loss,
    variational_bits,
    velocity,
)

Arrays = dict[str, npt.NDArray[Any]]
TABLES = {"posterior_mean_coef1": "posterior_mean_image", "posterior_mean_coef2": "posterior_mean_x_t"}


def chain_of(stem: str) -> DiffusionChain:
    schedule, steps = re.search(r"_(linear|cosine)_T(\d+)", stem).groups()
    return DiffusionChain(int(steps), schedule)


def schedule(stem: str, ref: Arrays) -> dict[str, Any]:
    return {key: getattr(chain_of(stem), TABLES.get(key, key)) for key in ref}


def respacing(_stem: str, ref: Arrays) -> dict[str, Any]:
    ours: dict[str, Any] = {}
    for index, case in enumerate(ref["cases"].tolist()):
        steps, spacing = case.split("|")
        for name in ("linear", "cosine"):
            chain = DiffusionChain(int(steps), name).respaced(spacing)
            ours |= {f"case{index}_timesteps": chain.timesteps, f"case{index}_{name}_betas": chain.betas}
            ours[f"case{index}_{name}_posterior_variance"] = chain.posterior_variance
    for key in (key for key in ref if key.startswith("ddim_count_possible_T")):
        ours[key] = [has_stride(int(key.partition("_T")[2]), count) for count in range(len(ref[key]))]
    return ours


def has_stride(total: int, count: int) -> bool:
    try:
        return len(space_steps(total, f"ddim{count}")) == count
    except ValueError:
        return False


def single_step(stem: str, arrays: Arrays) -> dict[str, Any]:
    chain, ref = chain_of(stem), {key: torch.from_numpy(value) for key, value in arrays.items()}
    x0, x_t, t, noise = (ref[key] for key in ("x0", "x_t", "t", "noise"))
    ours: dict[str, Any] = {"x_t": noised(chain, x0, t, noise), "v_target": velocity(chain, x0, noise, t)}
    ours |= named("q", marginal(chain, x0, t), x0)
    ours |= named("posterior", posterior(chain, x0, x_t, t), x0, log_variance="log_variance_clipped")
    for key in (key for key in ref if key.endswith("_pred_xstart")):
        predict, variance, clip = re.match(r"(\w+?)_(\w+)_(clip|noclip)_pred", key).groups()
        step = reverse_step(
            chain, output(ref, predict, variance), x_t, t, Parameterization(predict, variance), clip == "clip"
        )
        ours |= named(key.removesuffix("_pred_xstart"), step.previous, x0) | {key: step.image}
    for predict, prefix in (("eps", "loss"), ("x0", "lossx0")):
        learned = Parameterization(predict, "learned_range")
        out = output(ref, predict, "learned_range")
        bits = variational_bits(chain, out, x0, x_t, t, learned)
        simple = simple_loss(chain, out, x0, x_t, noise, t, predict)
        for kind, weight in (("mse", 1.0), ("rescaled_mse", len(chain) / 1000)):
            hybrid = hybrid_loss(chain, out, x0, x_t, noise, t, learned, weight)
            parts = {"vb": weight * bits, "mse": simple, "loss": hybrid}
            ours |= {f"{prefix}_{kind}_{part}": value for part, value in parts.items()}
        ours |= {f"{prefix}_kl_loss": bits, f"{prefix}_rescaled_kl_loss": len(chain) * bits}
    eps = Parameterization("eps", "learned_range")
    for clip in ("clip", "noclip"):
        ours[f"vb_bpd_{clip}"] = variational_bits(chain, ref["eps_model_out"], x0, x_t, t, eps, clip == "clip")
    ours["loss_simple_only"] = simple_loss(chain, output(ref, "eps", "fixed"), x0, x_t, noise, t, "eps")
    return ours | {"prior_bpd": prior_bits(chain, x0)} | solver_steps(chain, ref)


def output(ref: dict[str, Tensor], predict: str, variance: str) -> Tensor:
    """The output of the network, without its second head if the variance is fixed."""
    both = ref[f"{predict}_model_out"]
    return both if variance.startswith("learned") else both[:, : ref["x0"].shape[1]]


def named(prefix: str, gaussian: Any, x0: Tensor, **renamed: str) -> dict[str, Tensor]:
    values = gaussian._asdict().items()
    return {f"{prefix}_{renamed.get(name, name)}": value.expand_as(x0) for name, value in values}


def solver_steps(chain: DiffusionChain, ref: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step of a solver from every sample's t to t - 1, and one of DDIM to t + 1."""
    levels = [CLEAN, *chain.levels, Level(0.0, 1.0)]  # levels[t + 1] is that of t
    eps = Parameterization("eps", "learned_range")

    def steps(sampler: Sampler | None, clip: bool) -> Tensor:
        results = []
        for index, t in enumerate(ref["t"].tolist()):
            x, out, z = (ref[key][index : index + 1] for key in ("x_t", "eps_model_out", "z"))
            image = reverse_step(chain, out, x, ref["t"][index : index + 1], eps, clip).image
            if sampler is None:
                results.append(to_level(x, image, levels[t + 1], levels[t + 2]))
                continue
            denoised = Denoised(image, (out[:, x.shape[1] :] + 1) / 2)
            path = [levels[t + 1], levels[t]] + [CLEAN] * (t > 0)
            results.append(next(sampler.trajectory(lambda _x, _level, d=denoised: d, path, x, lambda _k, z=z: z)))
        return torch.cat(results)

    ours = {"ddim_reverse_sample": steps(None, clip=True)}
    for variance, name in (("learned", "learned_range"), ("small", "fixed_small"), ("large", "fixed_large")):
        ours[f"ancestral_{name}_sample"] = steps(Ancestral(1, variance), clip=True)
    for key in (key for key in ref if key.startswith("ddim_eta")):
        eta = float(re.match(r"ddim_eta([\d.]+)", key)[1])
        ours[key] = steps(DDIM(1, eta), clip="noclip" not in key)
    return ours


def full_bound(stem: str, ref: Arrays) -> dict[str, Any]:
    """The exact predictor of the noise of the mixture, variance of the posterior, clipped."""
    long = chain_of(stem)
    means, log_weights = (torch.from_numpy(ref[key]) for key in ("gmm_means", "gmm_log_weights"))
    mixture = GaussianMixture(means, log_weights, float(ref["gmm_std"]))

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        level, x = long.levels[int(timesteps[0])], x.double()
        return (x - level.alpha * mixture(x, level).image) / level.sigma

    found = full_vlb(
        long.respaced(stem.rpartition("_")[2]),
        network,
        torch.from_numpy(ref["x0"]),
        lambda k: torch.from_numpy(ref["z"][k]),
        Parameterization("eps", "fixed_small"),
    )
    errors = {"xstart_mse": found.image_error, "mse": found.noise_error}
    return errors | {"vb": found.steps, "prior_bpd": found.prior, "total_bpd": found.total}


def importance_sampler(_stem: str, ref: Arrays) -> dict[str, Any]:
    steps = len(ref["weights_cold"])
    sampler, t, losses = LossAwareTimes(steps), torch.from_numpy(ref["timesteps"]), torch.from_numpy(ref["losses"])
    ours = {"weights_cold": sampler.probabilities}
    before = 0
    for seen in (9, 14):
        sampler.update(t[before : seen * steps], losses[before : seen * steps])
        ours[f"weights_after_{seen}_each"] = sampler.probabilities
        before = seen * steps
    # The original gives equal weights as ones, and normalizes them when it draws.
    scaled = {key: value * ref[key].sum() for key, value in ours.items()}
    return scaled | {"importance_weight": sampler.factors}


FAMILIES = {
    "schedule_": schedule,
    "respacing": respacing,
    "single_step_": single_step,
    "full_vlb_": full_bound,
    "importance_sampler": importance_sampler,
}
TOLERANCES = {
    "schedule_": (1e-12, 0.0),
    "respacing": (1e-12, 0.0),
    # DDIM of the original takes the noise from a difference of nearly equal float32 numbers, which leaves it up to
    # 2.4e-5 away from its own definition in float64.
    "single_step_": {"": (1e-5, 1e-7), "ddim_": (1e-5, 3e-5)},
    "full_vlb_": (1e-5, 1e-7),
    "importance_sampler": (1e-12, 0.0),
}
MIXTURE = {"gmm_means", "gmm_log_weights", "gmm_std"}
INPUTS: dict[str, set[str] | tuple[str, ...]] = {
    "schedule_": set(),
    "respacing": {"cases"},
    "single_step_": {"x0", "t", "noise", "z", "model_out", "eps_model_out", "x0_model_out", "xprev_model_out"},
    "full_vlb_": {"x0", "z", *MIXTURE},
    "importance_sampler": {"timesteps", "losses"},
}
