"""Progressive GAN and StyleGAN 1 at several levels of detail, their losses, and the schedule of growing."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from comparison import Family, Meta, Tensors, UnsupportedError, stated
from torch import Tensor

from lightning_modules import losses
from lightning_modules.growing import GrowingSchedule, fade_real
from lightning_modules.networks import tensorflow_weights
from lightning_modules.networks.progressive_gan import ProgressiveDiscriminator, ProgressiveGenerator
from lightning_modules.networks.stylegan1 import StyleGAN1Discriminator, StyleGAN1Generator


def network(function: Any, ctor: Meta, ref: Tensors, prefix: str) -> Any:
    try:
        net = tensorflow_weights.build(function, ctor)
    except ValueError as error:
        raise UnsupportedError(str(error)) from error
    variables = {k.removeprefix(prefix): v.numpy() for k, v in ref.items() if k.startswith(prefix)}
    tensorflow_weights.load(net, variables, ctor.get("fused_scale", "auto"))
    return net.eval()


def per_sample(loss: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """A loss, which is a mean, of every sample alone: (N, 1)."""
    return torch.stack([loss(*(v[n : n + 1] for v in values)) for n in range(len(values[0]))])[:, None]


def gradient_norms(net: Any, loss: Tensor, order: list[str]) -> Tensor:
    parameters = [net.get_parameter(tensorflow_weights.parameter_name(net, name)) for name in order]
    # Parameters beyond the level have no gradient, in the original a gradient of zero.
    found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.stack([gradient.norm() for gradient in found])


def levels(ref: Tensors) -> list[tuple[str, float]]:
    """Prefix of the keys and level of detail."""
    found = {key.split("/")[1] for key in ref if key.startswith("out/lod")}
    return [(f"out/{name}", float(name.removeprefix("lod"))) for name in sorted(found)]


def pggan(meta: Meta, ref: Tensors) -> Tensors:
    g: ProgressiveGenerator = network("G_paper", meta["g_ctor"], ref, "G/")
    d: ProgressiveDiscriminator = network("D_paper", meta["d_ctor"], ref, "D/")
    z, real, labels, wgan = ref["in/z"], ref["in/images"], ref.get("in/labels"), meta["wgan"]
    ours: Tensors = {}
    for key, lod in levels(ref):
        g.lod = d.lod = lod
        fake = g(z, labels)
        mixed = real.lerp(fake, ref["in/mix"]).detach().requires_grad_()
        real_scores, real_labels = d.scores_and_labels(real)
        fake_scores, fake_labels = d.scores_and_labels(fake)
        mixed_scores = d(mixed)
        penalty = losses.gradient_penalty(mixed, mixed_scores, wgan["wgan_target"])

        # Per sample the original adds columns (N, 1) and rows (N,) to a matrix; only its mean matters.
        loss_g = per_sample(losses.wasserstein_generator_loss, fake_scores)
        loss_d = per_sample(losses.wasserstein_discriminator_loss, real_scores, fake_scores)
        loss_d = loss_d + losses.wasserstein_drift(real_scores) * wgan["wgan_epsilon"] + penalty * wgan["wgan_lambda"]
        if labels is not None and labels.shape[1]:
            of_fakes = per_sample(losses.auxiliary_classifier_loss, fake_labels, labels).t() * wgan["cond_weight"]
            of_reals = per_sample(losses.auxiliary_classifier_loss, real_labels, labels).t() * wgan["cond_weight"]
            loss_g, loss_d = loss_g + of_fakes, loss_d + of_fakes + of_reals
        ours |= {
            f"{key}/images": fake,
            f"{key}/scores": d(real),
            f"{key}/label_logits": real_labels,
            f"{key}/real_scores": real_scores,
            f"{key}/fake_scores": fake_scores,
            f"{key}/mixed_scores": mixed_scores,
            f"{key}/mixed_norms": losses.gradient_norms(mixed, mixed_scores),
            f"{key}/loss_g": loss_g,
            f"{key}/loss_d": loss_d,
            f"{key}/grad_norms_g": gradient_norms(g, loss_g.mean(), meta["param_order_g"]),
            f"{key}/grad_norms_d": gradient_norms(d, loss_d.mean(), meta["param_order_d"]),
        }
    return ours


def stylegan1(meta: Meta, ref: Tensors) -> Tensors:
    g: StyleGAN1Generator = network("G_style", meta["mapping_ctor"] | meta["synthesis_ctor"], ref, "G/")
    d: StyleGAN1Discriminator = network("D_basic", meta["d_ctor"], ref, "D/")
    z, c = ref["in/z"], ref.get("in/labels")
    truncated = g.mapping(z, c, meta["truncation_psi"], meta["truncation_cutoff"])
    ours = {"out/w": g.mapping(z, c), "out/w_trunc": truncated}
    first_mixed = int(stated(json.dumps(meta["definitions"]), r"layers >= (\d+)", "4"))
    for key, lod in levels(ref):
        g.lod = d.lod = lod
        real = ref["in/images"].requires_grad_()
        ws = g.mapping(z, c)
        mixed = torch.cat([ws[:, :first_mixed], ws.flip(0)[:, first_mixed:]], 1)
        fake = g.synthesis(ws)
        fake_scores, real_scores = d(fake, c), d(real, c)
        penalty = losses.r1_penalty(real, real_scores)
        loss_g = per_sample(losses.generator_nonsaturating_loss, fake_scores)
        loss_d = per_sample(losses.discriminator_logistic_loss, real_scores, fake_scores)
        loss_d = loss_d + penalty * (meta["r1_gamma"] / 2)  # a matrix, as above
        ours |= {
            f"{key}/images": fake,
            f"{key}/images_trunc": g.synthesis(truncated),
            f"{key}/images_mixed": g.synthesis(mixed),
            f"{key}/scores": real_scores,
            f"{key}/real_scores": real_scores,
            f"{key}/fake_scores": fake_scores,
            f"{key}/r1_penalty": penalty,
            f"{key}/loss_g": loss_g,
            f"{key}/loss_d": loss_d,
            f"{key}/grad_norms_g": gradient_norms(g, loss_g.mean(), meta["param_order_g"]),
            f"{key}/grad_norms_d": gradient_norms(d, loss_d.mean(), meta["param_order_d"]),
        }
    return ours


def schedules(resolution: int, num_gpus: int, args: Meta) -> dict[str, GrowingSchedule]:
    """The schedules of G and D, equal but for the learning rates, in the terms of one process."""
    if args.get("lrate_rampup_kimg", 0):
        raise UnsupportedError("a learning rate that ramps up")
    per_gpu = {int(r): n for r, n in args.get("max_minibatch_per_gpu", {}).items()}
    minibatch_base = args.get("minibatch_base", 16)
    minibatch = dict.fromkeys(per_gpu, minibatch_base) | {int(r): n for r, n in args.get("minibatch_dict", {}).items()}
    common = {
        "img_resolution": resolution,
        "lod_initial_resolution": args.get("lod_initial_resolution", 4),
        "training_kimg": args.get("lod_training_kimg", 600),
        "transition_kimg": args.get("lod_transition_kimg", 600),
        "minibatch_base": minibatch_base - minibatch_base % num_gpus,
        "minibatch": {r: min(n - n % num_gpus, per_gpu.get(r, n) * num_gpus) for r, n in minibatch.items()},
    }
    rates = {name: {int(r): lr for r, lr in args.get(f"{name}_lrate_dict", {}).items()} for name in "GD"}
    return {
        name: GrowingSchedule(**common, lr_base=args.get(f"{name}_lrate_base", 0.001), lr=rates[name]) for name in "GD"
    }


def progressive_schedule(meta: Meta, ref: Tensors) -> Tensors:
    ours: Tensors = {}
    for rows, args in (("stylegan_rows", "stylegan_args"), ("pggan_rows", "pggan_args")):
        if rows not in meta:
            continue
        g, d = schedules(meta["resolution"], meta.get("num_gpus", 1), meta[args]).values()
        images = [round(row["kimg"] * 1000) for row in meta[rows]]
        columns: dict[str, list[float]] = {
            "lod": [g.lod(n) for n in images],
            "resolution": [g.resolution(n) for n in images],
            "minibatch": [g.minibatch_size(n) for n in images],
            "G_lrate": [g.learning_rate(n) for n in images],
            "D_lrate": [d.learning_rate(n) for n in images],
        }
        ours |= {f"{rows}/{name}": torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}
    for key in (key.removesuffix("/in") for key in ref if key.startswith("reals/") and key.endswith("/in")):
        # Repeated pixels have the stored image as their average.
        stored = F.interpolate(ref[f"{key}/in"], ref[f"{key}/out"].shape[2:]) / 127.5 - 1
        ours[f"{key}/out"] = fade_real(stored, float(key.split("lod")[1]))
    return ours


FAMILIES: dict[str, Family] = {"pggan": pggan, "stylegan1": stylegan1, "progressive_schedule": progressive_schedule}
