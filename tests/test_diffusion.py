"""Diffusion models: what they learn, how they denoise, and what the rule does with both."""

import math

import pytest
import torch
from torch import nn

from lightning_modules.denoising import ChainObjective, EDMObjective, FlowObjective, Objective
from lightning_modules.diffusion import Diffusion
from lightning_modules.diffusion_chain import DiffusionChain
from lightning_modules.noise_levels import Karras, Level
from lightning_modules.sampling import DDIM, Ancestral, Heun
from lightning_modules.time_sampling import LossAwareTimes

CHAIN = DiffusionChain(1000)
MEAN, SPREAD = 0.3, 0.5  # of normally distributed "images", whose best denoiser is linear


def best_image(x: torch.Tensor, level: Level) -> torch.Tensor:
    """E[x0 | alpha x0 + sigma noise = x] of the normal distribution."""
    gain = level.alpha * SPREAD**2 / ((level.alpha * SPREAD) ** 2 + level.sigma**2)
    return MEAN + gain * (x - level.alpha * MEAN)


class Perfect(nn.Module):
    """Predicts what the objective asks for, knowing the distribution of the images."""

    condition_width = 0
    img_channels, img_resolution = 5, 4

    def __init__(self, kind: str, learn_variance: bool = False) -> None:
        super().__init__()
        self.kind, self.learn_variance = kind, learn_variance
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        return torch.cat([self.predict(one[None], float(t)) for one, t in zip(x, time, strict=True)])

    def predict(self, x: torch.Tensor, time: float) -> torch.Tensor:
        if self.kind == "edm":  # equation 7 of the paper, solved for the network
            sigma = math.exp(4 * time)
            total = sigma**2 + 0.25
            noisy = x * math.sqrt(total)
            return (best_image(noisy, Level(1.0, sigma)) - 0.25 / total * noisy) * math.sqrt(total) / (sigma * 0.5)
        if self.kind == "flow":
            level = Level(1 - time / 1000, time / 1000)
            image = best_image(x, level)
            return (x - level.alpha * image) / level.sigma - image
        # between two steps of the chain the logarithm of the ratio is interpolated
        ratio = torch.log(CHAIN.sigma / CHAIN.alpha)
        low = min(int(time), len(CHAIN) - 2)
        ratio = math.exp(torch.lerp(ratio[low], ratio[low + 1], time - low))
        level = Level(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))
        image = best_image(x, level)
        noise = (x - level.alpha * image) / level.sigma
        found = {"eps": noise, "x0": image, "v": level.alpha * noise - level.sigma * image}[self.kind]
        return torch.cat([found, torch.full_like(x, 0.5)], dim=1) if self.learn_variance else found


OBJECTIVES = {
    "eps": ChainObjective(CHAIN, "eps"),
    "x0": ChainObjective(CHAIN, "x0"),
    "v": ChainObjective(CHAIN, "v"),
    "edm": EDMObjective(sigma_data=0.5),
    "flow": FlowObjective(),
}


@pytest.mark.parametrize("path", ["chain", "edm", "flow"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_denoises_on_every_path(kind, path):
    levels = {
        "chain": [CHAIN.levels[999], CHAIN.levels[500], CHAIN.levels[3]],
        "edm": [Level(1.0, sigma) for sigma in (80.0, 1.7, 0.02)],
        "flow": [Level(1 - t, t) for t in (0.99, 0.4, 0.02)],
    }[path]
    denoise = OBJECTIVES[kind].denoiser(Perfect(kind), None)
    for level in levels:
        x = torch.linspace(-1.5, 1.5, 80, dtype=torch.float64).reshape(1, 5, 4, 4) * math.hypot(*level)
        image, share = denoise(x, level)
        # The network's own number is a float32, and eps is divided by the little that is left of the image.
        torch.testing.assert_close(image, best_image(x, level), rtol=2e-3, atol=3e-3)
        assert share is None


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_pure_noise_is_denoised_to_about_the_mean(kind):
    image, _ = OBJECTIVES[kind].denoiser(Perfect(kind), None)(torch.ones(1, 5, 4, 4), Level(0.0, 1.0))
    assert image.flatten().tolist() == pytest.approx([MEAN] * 80, abs=0.01)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_best_denoiser_has_the_least_loss(kind):
    objective, generator = OBJECTIVES[kind], torch.Generator().manual_seed(0)
    images = MEAN + SPREAD * torch.randn(400, 5, 4, 4, generator=generator)
    noise, uniform = torch.randn(400, 5, 4, 4, generator=generator), torch.rand(400, generator=generator)

    class Shifted(Perfect):
        def forward(self, x, time, condition):
            return super().forward(x, time, condition) + 0.2

    best, other = (objective.losses(net(kind), images, None, uniform, noise) for net in (Perfect, Shifted))
    assert float(other.loss.mean() - best.loss.mean()) == pytest.approx(0.04, abs=0.01)
    assert (best.step is not None) == isinstance(objective, ChainObjective)


def test_a_learned_variance_reaches_the_sampler():
    objective = ChainObjective(CHAIN, learn_variance=True)
    share = objective.denoiser(Perfect("eps", learn_variance=True), None)(torch.ones(1, 5, 4, 4), CHAIN.levels[10])[1]
    assert share.unique().tolist() == [0.75]


def test_min_snr_weights_and_a_learned_variance_exclude_each_other():
    with pytest.raises(ValueError, match="leave one of them out"):
        ChainObjective(CHAIN, learn_variance=True, min_snr_gamma=5.0)


def test_steps_that_the_chain_does_not_have_are_refused():
    with pytest.raises(ValueError, match="draws from 4000 steps, but the chain has 1000"):
        ChainObjective(CHAIN, times=LossAwareTimes())


def test_min_snr_weights_multiply_the_squared_error():
    plain, weighted = ChainObjective(CHAIN), ChainObjective(CHAIN, min_snr_gamma=5.0)
    images, noise, uniform = torch.zeros(6, 5, 4, 4), torch.randn(6, 5, 4, 4), torch.linspace(0, 0.9, 6)
    a, b = (o.losses(Perfect("eps"), images, None, uniform, noise) for o in (plain, weighted))
    expected = torch.clamp(CHAIN.snr[a.step], max=5.0) / CHAIN.snr[a.step]
    torch.testing.assert_close(b.loss / a.loss, expected.float())


def test_losses_decide_which_steps_are_drawn():
    objective = ChainObjective(DiffusionChain(50, "cosine"), times=LossAwareTimes(50, history=2))
    steps = torch.arange(50).repeat(2)
    objective.observe(steps, torch.where(steps == 7, 100.0, 1.0))
    _, weight = objective.times.draw(torch.linspace(0, 0.999, 500))
    images = torch.zeros(500, 5, 4, 4)
    drawn = objective.losses(Perfect("x0"), images, None, torch.linspace(0, 0.999, 500), images)
    assert (drawn.step == 7).float().mean() > 0.6
    torch.testing.assert_close(drawn.weight, weight)


def rule(kind: str = "edm", sampler=None, objective: Objective | None = None, network=None, **options) -> Diffusion:
    objective = OBJECTIVES[kind] if objective is None else objective
    return Diffusion(network or Perfect(kind), objective, sampler or Heun(6), **options)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_images_of_the_best_denoiser_have_the_distribution_of_the_data(kind):
    sampler = DDIM(200) if kind != "edm" else Heun(30)
    images = rule(kind, sampler).double().generate(torch.arange(16), seed=1)
    assert images.mean() == pytest.approx(MEAN, abs=0.05)
    assert images.std() == pytest.approx(SPREAD, rel=0.07)


@pytest.mark.parametrize("sampler", [Ancestral(5), Heun(5, churn=10, spacing=Karras())], ids=["ancestral", "churn"])
def test_an_image_depends_on_seed_and_index_alone(sampler):
    model = rule("eps", sampler)
    together = model.generate(torch.arange(6), seed=5)
    apart = torch.cat([model.generate(torch.tensor([i]), seed=5) for i in (0, 1, 2, 3, 4, 5)])
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-6)
    assert len(together.flatten(1).unique(dim=0)) == 6
    assert not torch.allclose(model.generate(torch.arange(6), seed=6), together)


def test_clipping_keeps_every_step_in_range():
    clipped, free = (rule("eps", DDIM(50), clip=clip).generate(torch.arange(8), seed=0) for clip in (True, False))
    assert clipped.abs().max() <= 1
    assert free.max() > 1.2


class Told(Perfect):
    """Moves the image by what it is told."""

    condition_width = 2

    def forward(self, x, time, condition):
        return super().forward(x, time, condition) + 0.1 * condition[:, 1:, None, None]


def test_guidance_exaggerates_the_condition():
    def mean(guidance: float) -> float:
        network = Told("x0")
        model = rule("x0", DDIM(1), network=network, conditions=["tumour"], guidance=guidance)
        model.conditions.counts += torch.tensor([0, 1])
        return float(model.generate(torch.arange(2), seed=0).mean())

    assert mean(1.0) == pytest.approx(mean(3.0) - 0.2, abs=1e-5)


def test_a_network_with_unknown_classes_emits_all_of_them_but_is_not_trained():
    model = rule("x0", DDIM(1), network=Told("x0"))
    plain = rule("x0", DDIM(1), network=Perfect("x0"))
    index = torch.arange(64)
    moved = (model.generate(index, seed=0) - plain.generate(index, seed=0)).mean(dim=(1, 2, 3))
    assert 20 < int((moved > 0.05).sum()) < 44
    with pytest.raises(ValueError, match="the 2 of this network have no names"):
        model.conditions.of(torch.zeros(1, 5, 8, 8, dtype=torch.uint8), torch.zeros(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conditions": ["tumour"]}, r"condition_width of the network is 0, but conditions \['tumour'\] need 2"),
        ({"condition_dropout": 1.0}, "condition_dropout must be from 0 to below 1"),
        ({"guidance": 2.0}, "guidance of 2.0 needs conditions"),
        ({"micro_batches": 0}, "micro_batches must be at least 1"),
        ({"sampler": DDIM(20_000, spacing=Karras())}, "at most 16384 steps"),
        ({"kind": "eps", "sampler": DDIM(1001)}, "1001"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        rule(**options)
