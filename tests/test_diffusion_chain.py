"""The diffusion chain, its variational bound and the drawing of steps, against closed forms and brute force."""

import math
from collections import deque

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lightning_modules.diffusion_chain import DiffusionChain, space_steps
from lightning_modules.noise_levels import CLEAN, Level, check_levels
from lightning_modules.time_sampling import LossAwareTimes, UniformTimes
from lightning_modules.variational import (
    Parameterization,
    full_vlb,
    hybrid_loss,
    marginal,
    min_snr_weight,
    noised,
    posterior,
    predicted_image,
    prior_bits,
    reverse_step,
    simple_loss,
    target,
    variational_bits,
    velocity,
)

CHAINS = {
    "linear": DiffusionChain(200),
    "cosine": DiffusionChain(200, "cosine"),
    "respaced": DiffusionChain(4000).respaced(30),
}


@pytest.fixture(params=CHAINS)
def chain(request):
    return CHAINS[request.param]


@pytest.fixture
def batch():
    """Images, their steps, noise and an output with two heads, in float64."""
    generator = torch.Generator().manual_seed(1)
    t = torch.tensor([0, 1, 12, 29])
    x0, noise = (torch.randn(4, 5, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    output = torch.randn(4, 10, 6, 6, generator=generator, dtype=torch.float64)
    return x0.clamp(-1, 1), t, noise, output


# the chain


@pytest.mark.parametrize("t", [1, 2, 15, 29])
def test_the_posterior_is_that_of_bayes_on_a_grid(chain, t):
    x0, x_t = torch.tensor(0.4, dtype=torch.float64), torch.tensor(-0.3, dtype=torch.float64)
    previous = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    before = Normal(chain.alpha[t - 1] * x0, chain.sigma[t - 1]).log_prob(previous)
    step = Normal((1 - chain.betas[t]).sqrt() * previous, chain.betas[t].sqrt()).log_prob(x_t)
    weight = torch.softmax(before + step, dim=0)
    mean = (weight * previous).sum()
    found = posterior(chain, x0.reshape(1, 1, 1, 1), x_t.reshape(1, 1, 1, 1), torch.tensor([t]))
    torch.testing.assert_close(found.mean.squeeze(), mean)
    torch.testing.assert_close(found.variance.squeeze(), (weight * (previous - mean) ** 2).sum())


def test_single_steps_add_up_to_the_marginal(chain):
    mean, variance = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t, beta in enumerate(chain.betas):
        mean, variance = (1 - beta).sqrt() * mean, (1 - beta) * variance + beta
        torch.testing.assert_close(torch.stack([mean, variance]), torch.stack([chain.alpha[t], chain.sigma[t] ** 2]))


def test_the_first_step_has_the_variances_of_the_second_where_its_own_is_zero(chain):
    assert chain.posterior_variance[0] == 0
    assert chain.posterior_log_variance_clipped[0] == chain.posterior_variance[1].log()
    assert chain.fixed_large_variance[0] == chain.posterior_variance[1]


def test_linear_chains_of_any_length_end_alike():
    ends = [-math.log(DiffusionChain(steps).alphas_cumprod[-1]) for steps in (1000, 4000, 16000)]
    assert ends == pytest.approx([10.05] * 3, rel=0.01)  # T times the mean beta


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DiffusionChain(20), r"linear schedule needs at least 21 steps, but got 20.* cosine"),
        (lambda: DiffusionChain(0, "cosine"), "cosine schedule needs at least 1 step, but got 0"),
        (lambda: space_steps(100, 0), "asks for 0 of the 100 steps from 0 to 99; expected 1 to 100"),
        (lambda: space_steps(100, 101), "asks for 101 of the 100 steps"),
        (lambda: space_steps(100, "10,51"), "asks for 51 of the 50 steps from 50 to 99"),
        (lambda: space_steps(100, "fast"), "a number of steps like 250.* but got 'fast'"),
        (lambda: space_steps(100, "10,,20"), "but got '10,,20'"),
        (lambda: space_steps(100, "ddim"), "but got 'ddim'"),
        (lambda: space_steps(100, -3), "but got -3"),
        (lambda: space_steps(1000, "ddim201"), "gives 201 of 1000 steps.* are 200 and 250"),
        (lambda: space_steps(1000, "ddim1"), "gives 1 of 1000 steps.* are 2"),
        (lambda: space_steps(1000, "ddim1001"), "gives 1001 of 1000 steps.* are 1000"),
        (lambda: UniformTimes(0), "at least one step to draw from, but got 0"),
        (lambda: LossAwareTimes(10, history=0), "history of at least one loss per step, but got 0"),
        (lambda: LossAwareTimes(10, uniform_share=0), "uniform_share above 0 .* at most 1, but got 0"),
        (lambda: LossAwareTimes(10, uniform_share=1.5), "but got 1.5"),
    ],
)
def test_impossible_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# which steps are visited


@pytest.mark.parametrize("count", range(1, 61))
def test_every_number_of_steps_is_equidistant_from_the_noisiest_to_the_first(count):
    steps = space_steps(60, count)
    exact = [59 * index / (count - 1) for index in range(count)] if count > 1 else [59]
    assert len(set(steps)) == count
    assert steps[-1] == 59
    assert all(abs(step - position) < 0.5 + 1e-9 for step, position in zip(steps, exact, strict=True))
    assert space_steps(60, str(count)) == steps


def test_half_way_steps_are_rounded_as_in_the_original():
    """Its positions are added up: the middle of 15 is 49.5, which rounds to 50, but the additions stay below."""
    assert space_steps(100, 15)[7] == 49


def test_sections_have_their_own_numbers_of_steps():
    assert space_steps(11, "2,3,2") == [0, 3, 4, 6, 7, 8, 10]
    assert space_steps(9, "1,2,1") == [0, 3, 5, 8]  # from pure noise to the first step at last


@pytest.mark.parametrize("total", [2, 7, 60, 100])
def test_integer_strides_exist_exactly_where_brute_force_finds_one(total):
    possible = {}
    for stride in range(total - 1, 0, -1):
        possible[len(range(0, total, stride))] = list(range(0, total, stride))
    for count in range(total + 2):
        if count in possible:
            assert space_steps(total, f"ddim{count}") == possible[count]
        else:
            with pytest.raises(ValueError, match=f"No integer stride gives {count} of {total}"):
                space_steps(total, f"ddim{count}")


def test_a_respaced_chain_keeps_the_noise_levels_and_the_steps_that_the_network_knows():
    long = DiffusionChain(300, "cosine")
    short = long.respaced("10,20")
    assert short.timesteps.tolist() == space_steps(300, "10,20")
    assert short.levels == [long.levels[step] for step in short.timesteps.tolist()]
    assert short.respaced(7).levels == [short.levels[step] for step in space_steps(30, 7)]
    assert short.respaced(7).timesteps.tolist() == [int(short.timesteps[step]) for step in space_steps(30, 7)]
    assert len(long) == 300  # untouched
    assert long.timesteps.tolist() == list(range(300))


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 199, 200])
def test_as_a_spacing_it_starts_at_the_noisiest_level_and_ends_clean(steps):
    chain = CHAINS["linear"]
    levels = chain(steps)
    check_levels(levels)
    assert len(levels) == steps + 1
    assert levels[0] == Level(float(chain.alpha[-1]), float(chain.sigma[-1]))
    assert levels[-1] == CLEAN


def test_a_chain_of_one_step_has_finite_tables():
    single = DiffusionChain(100).respaced(1)
    assert single.timesteps.tolist() == [99]
    torch.testing.assert_close(single.posterior_log_variance_clipped, single.betas.log())
    torch.testing.assert_close(single.fixed_large_variance, single.betas)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_levels_of_the_chain_are_integer_timesteps_at_any_scale(schedule):
    chain = DiffusionChain(4000, schedule)
    for scale in (1.0, 0.3, 1 / float(chain.alpha[-1])):
        found = [chain.timestep_of(Level(scale * alpha, scale * sigma)) for alpha, sigma in chain.levels[::7]]
        assert found == list(range(0, 4000, 7))
    short = chain.respaced(60)
    assert [short.timestep_of(level) for level in short.levels] == short.timesteps.tolist()
    assert [chain.timestep_of(level) for level in short.levels] == short.timesteps.tolist()


def test_between_levels_the_logarithm_of_the_noise_is_interpolated():
    chain = DiffusionChain(1000)
    (a, s), (a_next, s_next) = chain.levels[400:402]
    quarter = (s / a) ** 0.75 * (s_next / a_next) ** 0.25
    assert chain.timestep_of(Level(1.0, quarter)) == pytest.approx(400.25, abs=1e-9)
    assert chain.timestep_of(Level(0.5, quarter / 2)) == pytest.approx(400.25, abs=1e-9)


def test_levels_outside_the_chain_are_its_ends():
    chain = DiffusionChain(1000)
    assert [chain.timestep_of(level) for level in (CLEAN, Level(1.0, 1e-6))] == [0.0, 0.0]
    assert [chain.timestep_of(level) for level in (Level(0.0, 1.0), Level(1.0, 1e6))] == [999.0, 999.0]


# the model and its bound


@pytest.mark.parametrize("predict", ["eps", "x0", "xprev", "v"])
def test_the_right_prediction_is_the_right_image(chain, batch, predict):
    x0, t, noise, _ = batch
    x_t = noised(chain, x0, t, noise)
    truth = target(chain, x0, x_t, noise, t, predict)
    torch.testing.assert_close(predicted_image(chain, truth, x_t, t, predict), x0, rtol=0, atol=1e-8)
    step = reverse_step(chain, truth, x_t, t, Parameterization(predict, "fixed_small"), clip=False)
    torch.testing.assert_close(step.previous.mean, posterior(chain, x0, x_t, t).mean, rtol=0, atol=1e-8)


def test_velocity_is_the_change_of_x_t_with_the_angle(batch):
    x0, t, noise, _ = batch
    chain = CHAINS["cosine"]
    angle, small = torch.atan2(chain.sigma, chain.alpha)[t].reshape(-1, 1, 1, 1), 1e-6

    def at(angle):
        return angle.cos() * x0 + angle.sin() * noise

    change = (at(angle + small) - at(angle - small)) / (2 * small)
    torch.testing.assert_close(velocity(chain, x0, noise, t), change, rtol=0, atol=1e-8)


def test_learned_ranges_reach_from_the_small_to_the_large_variance(chain, batch):
    x0, t, _, output = batch

    def variance(kind, head):
        out = torch.cat([output[:, :5], torch.full_like(x0, head)], dim=1) if kind == "learned_range" else output[:, :5]
        return reverse_step(chain, out, x0, t, Parameterization("eps", kind), clip=True).previous.variance.expand_as(x0)

    later = t > 0  # where the fixed ones are the two of the range
    torch.testing.assert_close(variance("learned_range", -1.0)[later], variance("fixed_small", None)[later])
    torch.testing.assert_close(variance("learned_range", 1.0)[later], variance("fixed_large", None)[later])
    geometric = (variance("fixed_small", None) * variance("fixed_large", None)).sqrt()
    torch.testing.assert_close(variance("learned_range", 0.0)[later], geometric[later])


def test_the_terms_are_divergences_and_the_likelihood_of_grey_levels(chain, batch):
    x0, t, noise, output = batch
    x_t = noised(chain, x0, t, noise)
    kind = Parameterization("eps", "learned_range")
    found = variational_bits(chain, output, x0, x_t, t, kind)
    model, truth = reverse_step(chain, output, x_t, t, kind, clip=False).previous, posterior(chain, x0, x_t, t)
    divergence = kl_divergence(
        *(Normal(d.mean, (d.log_variance / 2).exp().expand_as(x0), validate_args=False) for d in (truth, model))
    )
    torch.testing.assert_close(found[1:], divergence.mean(dim=(1, 2, 3))[1:] / math.log(2))
    end = marginal(chain, x0, torch.full_like(t, len(chain) - 1))
    prior = kl_divergence(Normal(end.mean, end.variance.sqrt().expand_as(x0)), Normal(0.0, 1.0))
    torch.testing.assert_close(prior_bits(chain, x0), prior.mean(dim=(1, 2, 3)) / math.log(2))


def grey_level_bits(mean, deviation):
    """Bits of each of the 256 grey levels under a predicted image with that deviation, from the term of t = 0."""
    levels = (torch.arange(256, dtype=torch.float64) * 2 / 255 - 1).reshape(256, 1, 1, 1)
    output = torch.tensor([mean, 2 * math.log(deviation)], dtype=torch.float64).reshape(1, 2, 1, 1).expand(256, 2, 1, 1)
    t = torch.zeros(256, dtype=torch.int64)
    # At t = 0 the mean of the reverse step is the predicted image.
    return levels.flatten(), variational_bits(
        CHAINS["linear"], output, levels, levels, t, Parameterization("x0", "learned")
    )


@pytest.mark.parametrize("mean", [-1.0, -0.2, 0.99])
def test_the_grey_levels_have_the_probability_of_their_bins_and_one_in_all(mean):
    levels, bits = grey_level_bits(mean, 0.05)
    probability = 2.0**-bits
    assert float(probability.sum()) == pytest.approx(1, abs=1e-9)
    edges = torch.cat([torch.tensor([-math.inf]), levels[:-1] + 1 / 255, torch.tensor([math.inf])]).double()
    exact = Normal(mean, 0.05, validate_args=False).cdf(edges).diff()
    assert float((probability - exact).abs().max()) < 6e-4  # the tanh approximation


def test_an_impossible_grey_level_costs_no_more_than_the_floor():
    _, bits = grey_level_bits(1.0, 0.001)
    assert float(bits.max()) == pytest.approx(-math.log2(1e-12))


@pytest.mark.parametrize("steps", [3, 20])
def test_the_bound_of_an_exact_model_is_the_entropy_of_the_data(steps):
    """Independent normal pixels: every reverse step is normal too, so the bound is tight for any number of steps."""
    mean, deviation, half_bin = 0.1, 0.2, 1 / 255
    long = DiffusionChain(1000, "cosine")
    chain = long.respaced(steps)
    x0 = mean + deviation * torch.randn(8, 1, 96, 96, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    data = Normal(mean, deviation)
    true_bits = -torch.log2(data.cdf(x0 + half_bin) - data.cdf(x0 - half_bin)).mean()

    def exact(x_t, timesteps):
        assert timesteps.dtype == torch.int64
        alpha, sigma = long.levels[int(timesteps[0])]
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        image = mean + gain * (x_t - alpha * mean)
        k = chain.timesteps.tolist().index(int(timesteps[0]))
        uncertain = deviation**2 * (1 - alpha * gain)  # variance of x0 given x_t
        variance = chain.posterior_variance[k] + chain.posterior_mean_image[k] ** 2 * uncertain
        return torch.cat([image, torch.full_like(image, float(variance.log()))], dim=1)

    def noise(k):
        return torch.randn(x0.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)

    found = full_vlb(chain, exact, x0, noise, Parameterization("x0", "learned"), clip=False)
    assert float(found.total.mean()) == pytest.approx(float(true_bits), abs=0.01)
    small = Parameterization("x0", "fixed_small")
    assert full_vlb(chain, lambda x, t: exact(x, t)[:, :1], x0, noise, small, clip=False).total.mean() > true_bits + 0.1
    # The noisiest step comes first: the mean of the data is predicted. Errors of noise and image differ by the SNR.
    assert float(found.image_error[:, 0].mean()) == pytest.approx(deviation**2, rel=0.02)
    torch.testing.assert_close(found.noise_error, found.image_error * chain.snr.flip(0))


def test_the_hybrid_loss_trains_the_mean_by_the_squares_and_the_variance_by_the_bound(chain, batch):
    x0, t, noise, output = batch
    x_t = noised(chain, x0, t, noise)
    kind = Parameterization("eps", "learned_range")

    def gradient(loss):
        out = output.clone().requires_grad_()
        return torch.autograd.grad(loss(out).sum(), out)[0].split(5, dim=1)

    mean, variance = gradient(lambda out: hybrid_loss(chain, out, x0, x_t, noise, t, kind, 0.3))
    of_squares, _ = gradient(lambda out: simple_loss(chain, out, x0, x_t, noise, t, "eps"))
    _, of_bound = gradient(lambda out: variational_bits(chain, out, x0, x_t, t, kind))
    torch.testing.assert_close(mean, of_squares)
    torch.testing.assert_close(variance, 0.3 * of_bound)
    assert of_bound.abs().min() > 0


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_min_snr_weights_clamp_the_weight_of_the_error_of_the_image(chain, batch, predict):
    x0, t, noise, output = batch
    x_t = noised(chain, x0, t, noise)
    weight = min_snr_weight(chain.snr[t], 5.0, predict)
    weighted = weight * simple_loss(chain, output, x0, x_t, noise, t, predict)
    image = predicted_image(chain, output[:, :5], x_t, t, predict)
    torch.testing.assert_close(weighted, chain.snr[t].clamp(max=5) * (image - x0).square().mean(dim=(1, 2, 3)))


def test_min_snr_weights_do_not_exist_for_the_previous_image():
    with pytest.raises(ValueError, match=r"eps, x0 and v, but got xprev"):
        min_snr_weight(torch.ones(1), 5.0, "xprev")


@pytest.mark.parametrize(("channels", "variance", "expected"), [(5, "learned_range", 10), (10, "fixed_large", 5)])
def test_outputs_must_have_the_channels_of_their_heads(batch, channels, variance, expected):
    x0, t, _, output = batch
    words = rf"Expected {expected} channels .* eps of 5 channels with {variance} variance, but got {channels}"
    with pytest.raises(ValueError, match=words):
        reverse_step(CHAINS["linear"], output[:, :channels], x0, t, Parameterization("eps", variance), clip=True)


def test_outputs_in_half_precision_are_computed_with_in_that_of_the_images(batch):
    x0, t, noise, output = (v.float() if v.is_floating_point() else v for v in batch)
    x_t = noised(CHAINS["linear"], x0, t, noise)
    half, full = (
        hybrid_loss(CHAINS["linear"], out, x0, x_t, noise, t, Parameterization("eps", "learned_range"), 1.0)
        for out in (output.bfloat16(), output.bfloat16().float())
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=0)


# the drawing of steps


def test_uniform_numbers_below_one_give_every_step_alike():
    uniform = torch.arange(1 << 12) / (1 << 12)
    for sampler in (UniformTimes(64), LossAwareTimes(64)):
        t, factor = sampler.draw(uniform)
        assert t.tolist() == [step for step in range(64) for _ in range(64)]
        assert factor.tolist() == [1.0] * len(t)
    assert UniformTimes(3).draw(torch.tensor([1 - 2.0**-24]))[0].tolist() == [2]


def warmed_up(steps=12):
    sampler = LossAwareTimes(steps)
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(steps).repeat(10)
    sampler.update(t, torch.rand(len(t), generator=generator) * 10.0 ** (-t / 4))
    return sampler


def test_weighted_losses_are_unbiased_whatever_the_probabilities():
    sampler = warmed_up()
    loss = torch.linspace(1, 5, 12, dtype=torch.float64) ** 3
    assert sampler.probabilities.max() > 100 * sampler.probabilities.min()
    assert float((sampler.probabilities * sampler.factors * loss).sum()) == pytest.approx(float(loss.mean()))
    t, factor = sampler.draw((torch.arange(1 << 20) + 0.5).double() / (1 << 20))
    assert factor.dtype == torch.float32
    assert float((factor * loss[t]).mean()) == pytest.approx(float(loss.mean()), rel=1e-3)
    shares = torch.bincount(t, minlength=12) / len(t)
    torch.testing.assert_close(shares.double(), sampler.probabilities, rtol=0, atol=2e-6)


def test_probabilities_follow_the_last_ten_losses_once_every_step_has_them():
    remembered = [deque(maxlen=10) for _ in range(5)]
    generator = torch.Generator().manual_seed(4)
    together, one_by_one = LossAwareTimes(5), LossAwareTimes(5)
    # At first one step alone has ten; of the last batch every step has more than ten.
    for t in (torch.zeros(12, dtype=torch.int64), *(torch.randint(5, (n,), generator=generator) for n in (20, 40, 64))):
        losses = torch.rand(len(t), generator=generator, dtype=torch.float64)
        together.update(t, losses)
        for step, loss in zip(t, losses, strict=True):
            one_by_one.update(step[None], loss[None])
            remembered[step].append(float(loss))
        complete = all(len(values) == 10 for values in remembered)
        rms = torch.tensor([math.sqrt(sum(v * v for v in values) / 10) for values in remembered], dtype=torch.float64)
        expected = 0.999 * rms / rms.sum() + 0.001 / 5 if complete else torch.full((5,), 0.2, dtype=torch.float64)
        torch.testing.assert_close(together.probabilities, expected)
        torch.testing.assert_close(one_by_one.probabilities, expected)
    assert complete


def test_losses_that_are_not_finite_are_left_out():
    sampler = warmed_up()
    before = sampler.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    sampler.update(torch.tensor([3, 4]), torch.tensor([math.nan, math.inf]))
    torch.testing.assert_close(dict(sampler.state_dict()), before)


def test_the_history_is_in_the_checkpoint():
    sampler, other = warmed_up(), LossAwareTimes(12)
    other.load_state_dict(sampler.state_dict())
    uniform = torch.rand(100, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(other.draw(uniform), sampler.draw(uniform), rtol=0, atol=0)
