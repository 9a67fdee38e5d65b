import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from lightning_modules import sampler_check
from lightning_modules.diffusion_chain import DiffusionChain
from lightning_modules.exact_sampling import GaussianMixture
from lightning_modules.noise_levels import CLEAN, CosineChain, Geometric, Karras, Level, LinearBeta, Straight
from lightning_modules.sampler_check import SAMPLERS, expected_moments, gaussian_moments
from lightning_modules.sampling import DDIM, Ancestral, Denoised, Heun, clipped, guided

LINEAR, COSINE = DiffusionChain(1000, "linear"), DiffusionChain(1000, "cosine")
LEVELS = LINEAR.levels
PATHS = {"linear": LINEAR, "cosine": COSINE, "EDM": Karras(), "flow": Straight()}
DETERMINISTIC = {name: SAMPLERS[name] for name in ("DDIM", "Heun", "DPM-Solver++(2M)", "UniPC")}
MEANS, WEIGHTS, STD = np.array([-0.5, 0.4]), np.array([0.4, 0.6]), 0.2
MIXTURE = GaussianMixture(torch.tensor(MEANS), torch.tensor(WEIGHTS).log(), STD)

each_path = pytest.mark.parametrize("path", PATHS)
each_sampler = pytest.mark.parametrize("name", SAMPLERS)


@pytest.fixture(autouse=True)
def _one_thread():
    with sampler_check.one_thread():
        yield


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(x, level):
    """A denoiser with a variance head."""
    return Denoised(MIXTURE(x, level).image, torch.sigmoid(x))


def noise_like(x):
    return lambda k: normal(*x.shape, seed=k + 1).to(x.dtype)


def start(levels, *shape):
    return normal(*shape) * max(1.0, levels[0].sigma)


# Spacings


def test_karras_levels_are_even_in_the_root_of_sigma():
    levels = Karras(sigma_min=0.01, sigma_max=50.0, rho=3.0)(9)
    roots = [level.sigma ** (1 / 3) for level in levels[:-1]]
    np.testing.assert_allclose(roots, np.linspace(50 ** (1 / 3), 0.01 ** (1 / 3), 9), rtol=1e-12)
    assert levels[-1] == CLEAN
    assert {level.alpha for level in levels} == {1.0}


def test_one_step_begins_at_the_noisiest_level():
    assert Karras()(1) == [Level(1.0, pytest.approx(80.0)), CLEAN]
    assert Straight()(1) == [Level(0.0, 1.0), CLEAN]
    assert CosineChain()(1) == [CosineChain()(50)[0], CLEAN]
    assert LINEAR(1) == [LEVELS[-1], CLEAN]


def test_straight_levels_are_even_in_time():
    assert Straight()(4) == [Level(0.0, 1.0), Level(0.25, 0.75), Level(0.5, 0.5), Level(0.75, 0.25), CLEAN]


def test_geometric_levels_are_even_in_log_sigma():
    sigmas = [level.sigma for level in Geometric(0.1, 10.0)(5)]
    np.testing.assert_allclose(sigmas, [10, math.sqrt(10), 1, math.sqrt(0.1), 0.1, 0], rtol=1e-12)


def test_linear_beta_is_the_limit_of_the_linear_chain():
    chain = DiffusionChain(20_000, "linear")
    for level, t in zip(LinearBeta()(4), (1, 0.667, 0.334, 0.001), strict=False):
        index = round(t * 20_000) - 1
        assert level.sigma == pytest.approx(float(chain.sigma[index] / chain.alpha[index]), rel=3e-3)


def test_cosine_chain_gives_every_number_of_steps_up_to_its_length():
    spacing = CosineChain(length=60)
    longest = len(spacing.sigmas)
    assert 50 < longest < 60
    for steps in range(1, longest + 1):
        levels = DDIM(steps).levels(spacing)
        assert len(levels) == steps + 1
    with pytest.raises(ValueError, match=f"at most {longest} steps.*{longest + 1}"):
        spacing(longest + 1)


@pytest.mark.parametrize("spacing", [Karras(), Geometric(), LinearBeta(), CosineChain(), Straight(), LINEAR])
def test_no_steps_are_refused(spacing):
    with pytest.raises(ValueError, match=r"one step|0 of the 1000|1 to 1000"):
        spacing(0)
    with pytest.raises(ValueError, match="at least one step, but got 0"):
        DDIM(0)


def test_sampler_has_the_levels_of_its_own_spacing_else_those_of_the_model():
    assert DDIM(5).levels(Straight()) == Straight()(5)
    assert DDIM(5, spacing=Karras()).levels(Straight()) == Karras()(5)


def test_spacing_with_another_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="Expected 7 steps, but the spacing gives 6"):
        DDIM(7).levels(lambda steps: Straight()(steps - 1))
    with pytest.raises(ValueError, match="1001 of the 1000 steps"):
        DDIM(1001).levels(LINEAR)


@pytest.mark.parametrize(
    ("levels", "problem"),
    [
        ([CLEAN], "at least two"),
        ([Level(1.0, 3.0), Level(1.0, 1.0)], "the last of them"),
        ([Level(1.0, 3.0), Level(1.0, 1.0), Level(1.0, 1.0), CLEAN], "number 1 .* number 2"),
        ([Level(1.0, 1.0), Level(1.0, 3.0), CLEAN], "number 0 .* number 1"),
        ([Level(0.6, 0.8), Level(0.3, 0.4), CLEAN], "number 0 .* number 1"),  # scaled, but not less noisy
        ([Level(0.0, 1.0), Level(0.0, 0.5), CLEAN], "number 0 .* number 1"),
        ([Level(1.0, math.nan), CLEAN], "number 0 .* number 1"),
        ([CLEAN, CLEAN], "number 0 .* number 1"),
    ],
)
@each_sampler
def test_levels_that_do_not_fall_are_refused(name, levels, problem):
    x = normal(2, 1)
    with pytest.raises(ValueError, match=problem):
        SAMPLERS[name](mixture, levels, x, noise_like(x))


# Every sampler, every number of steps


@each_path
@each_sampler
def test_mean_and_spread_are_as_theory_says_at_every_number_of_steps(name, path):
    spacing = DiffusionChain(21, path) if path in ("linear", "cosine") else PATHS[path]
    for steps in range(1, 22):
        expected = expected_moments(SAMPLERS[name], spacing(steps))
        measured = gaussian_moments(SAMPLERS[name], spacing(steps))
        assert measured == pytest.approx(expected, rel=1e-10, abs=1e-11)


@pytest.mark.parametrize(("length", "steps"), [(1000, 250), (1000, 501), (1000, 600), (4000, 900)])
@each_sampler
def test_mean_and_spread_are_as_theory_says_at_awkward_numbers_of_steps(name, length, steps):
    levels = DiffusionChain(length, "linear")(steps)
    expected = expected_moments(SAMPLERS[name], levels)
    assert gaussian_moments(SAMPLERS[name], levels) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert expected.spread == pytest.approx(1, abs=10 / steps)


@each_path
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"Heun, churn 40"}))
def test_one_step_gives_the_denoised_image(name, path):
    levels = PATHS[path](1)
    x = start(levels, 5, 1)
    expected = MIXTURE(x, levels[0]).image
    torch.testing.assert_close(SAMPLERS[name](mixture, levels, x, noise_like(x)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 17])
@each_sampler
def test_evaluations_are_the_calls_of_the_denoiser(name, steps):
    calls = []

    def counted(x, level):
        calls.append(level)
        return mixture(x, level)

    x = normal(2, 1)
    SAMPLERS[name](counted, Straight()(steps), x, noise_like(x))
    assert len(calls) == SAMPLERS[name].evaluations(steps)


@each_sampler
def test_trajectory_ends_with_the_image(name):
    levels, x = LINEAR(6), normal(4, 2)
    states = list(SAMPLERS[name].trajectory(mixture, levels, x, noise_like(x)))
    assert len(states) == 6
    assert torch.equal(states[-1], SAMPLERS[name](mixture, levels, x, noise_like(x)))


@pytest.mark.parametrize("name", ["ancestral, small", "DDIM", "DPM-Solver++(2M)", "UniPC"])
def test_denoiser_sees_the_states_of_the_trajectory(name):
    seen = []

    def recorded(x, level):
        seen.append(x)
        return mixture(x, level)

    levels, x = LINEAR(6), normal(4, 2)
    states = [x, *SAMPLERS[name].trajectory(recorded, levels, x, noise_like(x))]
    assert all(torch.equal(a, b) for a, b in zip(seen, states[:-1], strict=True))


@each_path
@each_sampler
def test_an_image_does_not_depend_on_its_batch(name, path):
    levels = PATHS[path](7)
    x = start(levels, 5, 2)
    noises = noise_like(x)
    whole = SAMPLERS[name](mixture, levels, x, noises)
    part = SAMPLERS[name](mixture, levels, x[[3, 1]], lambda k: noises(k)[[3, 1]])
    torch.testing.assert_close(part, whole[[3, 1]], rtol=1e-11, atol=1e-11)


@each_path
@each_sampler
def test_float32_states_are_accurate_over_many_steps(name, path):
    levels = PATHS[path](100)
    x = start(levels, 4, 1)
    exact = SAMPLERS[name](mixture, levels, x, noise_like(x))
    single = SAMPLERS[name](mixture, levels, x.float(), noise_like(x.float()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-4)


@each_sampler
def test_states_keep_their_type_with_a_denoiser_in_half_precision(name):
    def half(x, level):
        return Denoised(*(v.bfloat16() for v in mixture(x, level)))

    def rounded(x, level):
        return Denoised(*(v.bfloat16().float() for v in mixture(x, level)))

    x = normal(3, 2).float()
    image = SAMPLERS[name](half, LINEAR(9), x, noise_like(x))
    assert image.dtype == torch.float32
    assert torch.equal(image, SAMPLERS[name](rounded, LINEAR(9), x, noise_like(x)))


# Orders of convergence: in one dimension probability flow keeps quantiles


def quantile(level, u):
    spread = math.hypot(level.alpha * STD, level.sigma)
    bound = 20 * spread + 2
    return brentq(
        lambda x: WEIGHTS @ norm.cdf((x - level.alpha * MEANS) / spread) - u, -bound, bound, xtol=1e-14, rtol=1e-14
    )


def transport_error(sampler, levels):
    x, image = (torch.tensor([quantile(level, u) for u in np.linspace(0.02, 0.98, 13)]) for level in (levels[0], CLEAN))
    return float((sampler(mixture, levels, x[:, None], None) - image[:, None]).abs().max())


@pytest.mark.parametrize(
    ("name", "spacing", "order"),
    [
        ("DDIM", Karras(1e-4, 20.0), 1),
        ("Heun", Karras(1e-4, 20.0), 2),
        ("DPM-Solver++(2M)", Karras(1e-4, 20.0), 2),
        ("UniPC", Karras(1e-4, 20.0), 3),  # its corrector adds one
        ("DDIM", Straight(), 1),
        ("Heun", Straight(), 2),
        ("UniPC", Straight(), 2),  # of the first step, which knows one value
        ("DDIM", LinearBeta(last_time=1e-6), 1),
        ("Heun", LinearBeta(last_time=1e-6), 2),
    ],
)
def test_flow_is_followed_with_the_order_of_the_sampler(name, spacing, order):
    errors = [transport_error(SAMPLERS[name], spacing(steps)) for steps in (80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)
    assert errors[1] < 0.02


# Ancestral sampling


def test_variance_of_ancestral_sampling_follows_the_tables_of_the_chain():
    chain = DiffusionChain(100, "cosine")
    std, variance = 0.5, 1.0
    for t in reversed(range(1, 100)):
        alpha, sigma = chain.levels[t]
        wiener = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        gain = float(chain.posterior_mean_x_t[t] + chain.posterior_mean_image[t] * wiener)
        variance = gain**2 * variance + float(chain.posterior_variance[t])
    alpha, sigma = chain.levels[0]
    spread = alpha * std / (alpha**2 * std**2 + sigma**2) * math.sqrt(variance)
    assert gaussian_moments(Ancestral(), chain(100)).spread == pytest.approx(spread, rel=1e-10)


@pytest.mark.parametrize("steps", [2, 3, 10, 77, 500])
@each_path
def test_exact_variance_keeps_the_spread_at_any_number_of_steps(steps, path):
    levels = PATHS[path](steps)
    alpha, sigma = levels[-2]  # from which the mean is taken, without noise
    moments = gaussian_moments(SAMPLERS["ancestral, exact"], levels)
    assert moments.spread == pytest.approx(alpha * 0.5 / math.hypot(alpha * 0.5, sigma), rel=1e-4)


def one_step(variance, this, following, share):
    z = normal(3, 2, seed=5)
    x = normal(3, 2)
    states = Ancestral(variance=variance).trajectory(
        lambda x, _level: Denoised(0 * x, share), [this, following, CLEAN], x, lambda _k: z
    )
    with_noise = next(states)
    kept = this.alpha / following.alpha * following.sigma**2 / this.sigma**2
    return (with_noise - kept * x) / z


def test_learned_variance_lies_between_the_logarithms_of_small_and_large():
    this, following = LEVELS[600], LEVELS[400]
    share = torch.rand(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    beta = 1 - LINEAR.alphas_cumprod[600] / LINEAR.alphas_cumprod[400]
    small = beta * following.sigma**2 / this.sigma**2
    expected = (share * beta.log() + (1 - share) * small.log()).exp()
    torch.testing.assert_close(one_step("learned", this, following, share) ** 2, expected)
    torch.testing.assert_close(one_step("small", this, following, None) ** 2, small.expand(3, 2))
    torch.testing.assert_close(one_step("large", this, following, None) ** 2, beta.expand(3, 2))


def test_learned_variance_of_a_model_without_it_is_refused():
    x = normal(2, 1)
    with pytest.raises(ValueError, match=r"learns its variance.*small or large"):
        Ancestral(variance="learned")(MIXTURE, LINEAR(3), x, noise_like(x))


@each_path
def test_ddim_with_eta_1_is_ancestral_sampling_with_small_variance(path):
    levels = PATHS[path](9)
    x = start(levels, 4, 2)
    ancestral = Ancestral(variance="small")(mixture, levels, x, noise_like(x))
    torch.testing.assert_close(DDIM(eta=1.0)(mixture, levels, x, noise_like(x)), ancestral, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(DETERMINISTIC)))
def test_noise_of_every_step_is_asked_for_once_and_none_for_the_clean_image(name):
    asked = []

    def noise(k):
        asked.append(k)
        return normal(2, 1, seed=k)

    SAMPLERS[name](mixture, LINEAR(5), normal(2, 1), noise)
    # Churn comes before a step, and spares very little noise.
    assert asked == ([0, 1, 2, 3] if name != "Heun, churn 40" else [1, 2, 3])


def test_churn_leaves_pure_noise_as_it_is():
    asked = []
    x = normal(2, 1)
    Heun(churn=10.0)(mixture, Straight()(5), x, lambda k: asked.append(k) or x)
    assert asked == [1, 2, 3, 4]


# Textbook forms on rectified flow


def velocity(x, t):
    """d x / d t of (1 - t) · image + t · noise."""
    image = MIXTURE(x, Level(1 - t, t)).image
    return (x - image) / t


def test_euler_on_rectified_flow():
    x = start_x = normal(5, 1)
    for k in range(8):
        x = x - velocity(x, 1 - k / 8) / 8
    torch.testing.assert_close(DDIM()(mixture, Straight()(8), start_x, None), x, rtol=1e-11, atol=1e-11)


def test_heun_on_rectified_flow():
    x = start_x = normal(5, 1)
    for k in range(8):
        slope = velocity(x, 1 - k / 8)
        ahead = velocity(x - slope / 8, 1 - (k + 1) / 8) if k < 7 else slope
        x = x - (slope + ahead) / 16
    torch.testing.assert_close(Heun()(mixture, Straight()(8), start_x, None), x, rtol=1e-11, atol=1e-11)


# Guidance, clipping, arguments


def test_clipping():
    def denoise(x, _level):
        return Denoised(3 * x, x)

    image, share = clipped(denoise)(torch.tensor([-2.0, -0.2, 0.1, 1.0]), CLEAN)
    torch.testing.assert_close(image, torch.tensor([-1.0, -0.6, 0.3, 1.0]))
    torch.testing.assert_close(share, torch.tensor([-2.0, -0.2, 0.1, 1.0]))


def test_guidance_moves_away_from_the_other_denoiser():
    def denoise(x, level):
        return Denoised(2 * x, x + level.sigma)

    def other(x, level):
        return Denoised(x - level.sigma)

    x, level = torch.tensor([1.0, -3.0]), Level(1.0, 0.5)
    for weight, expected in ((1.0, [2.0, -6.0]), (3.0, [5.0, -11.0]), (0.0, [0.5, -3.5])):
        image, share = guided(denoise, other, weight)(x, level)
        torch.testing.assert_close(image, torch.tensor(expected))
        torch.testing.assert_close(share, torch.tensor([1.5, -2.5]))


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_impossible_eta_is_refused(eta):
    with pytest.raises(ValueError, match=r"eta of DDIM from 0 to 1, but got (-0.1|1.1|nan)"):
        DDIM(eta=eta)


def test_negative_churn_is_refused():
    with pytest.raises(ValueError, match="churn of at least 0, but got -1"):
        Heun(churn=-1)


# The check itself


class NextOfTheLongChain(Ancestral):
    """What a widely used scheduler does: the step goes to t - 1, whichever level is visited next."""

    def _states(self, denoise, levels, x, noise):
        for k, (this, _) in enumerate(pairwise(levels)):
            t = LEVELS.index(this)
            to = [this, LEVELS[t - 1], CLEAN] if t > 0 else [this, CLEAN]
            x = next(super()._states(denoise, to, x, lambda _k, k=k: noise(k)))
            yield x


def test_check_finds_a_sampler_that_is_wrong_at_some_numbers_of_steps():
    rows = sampler_check.check_path("wrong", NextOfTheLongChain(), LINEAR, [250, 1000])
    wrong, right = [row for row in rows if row.expected is not None]
    assert wrong.verdict == "not as expected"
    assert wrong.measured.spread == pytest.approx(0.748 / 0.5, rel=0.01)
    assert right.verdict == "ok"


def leading(steps):
    """Steps of a rounded-down stride, which need not begin with noise."""
    stride = 1000 // steps
    return [*(LEVELS[k * stride] for k in reversed(range(steps))), CLEAN]


def test_check_finds_wrong_levels():
    (row,) = sampler_check.check_path("DDIM", DDIM(), leading, [501])
    assert row.verdict == "wrong start"


def refined_at_the_start(steps):
    """However many, five steps go below a sigma of 79."""
    return [*(Level(1.0, 80 - k / (steps - 4)) for k in range(max(steps - 4, 1))), *Karras()(5)[1:]]


def test_check_finds_errors_that_do_not_fall():
    (row,) = sampler_check.check_path("DDIM", DDIM(), refined_at_the_start, [200])
    assert row.verdict == "no convergence"


def test_all_samplers_pass_the_check(capsys):
    sampler_check.check_sampler([1, 20], chain_steps=21)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("DPM-Solver++(2M)") == 4 * 3  # on every path: two step counts, and the mixture at the second
    assert "All 104 results are as theory says" in shown


def test_command_fails_when_a_sampler_deviates(capsys, monkeypatch):
    monkeypatch.setattr(sampler_check, "SAMPLERS", {"Heun": Heun(), "DDIM": DDIM()})
    theory = sampler_check.gaussian_gain
    monkeypatch.setattr(sampler_check, "gaussian_gain", lambda _sampler, *law: theory(DDIM(), *law))
    with pytest.raises(ValueError, match="4 of 16 results deviate from theory"):
        sampler_check.check_sampler([1, 9], chain_steps=21, only_deviating=True)
    shown = capsys.readouterr().out
    assert shown.count("not as expected") == shown.count("Heun") == 4  # one step is the same


@pytest.mark.parametrize("chain_steps", [21, 1000, 4000])
def test_default_numbers_of_steps_are_possible(chain_steps):
    counts = sampler_check.step_counts("some", chain_steps)
    assert counts == sorted(set(counts))
    assert (counts[0], *counts[-2:]) == (1, chain_steps - 1, chain_steps)
    if chain_steps == 1000:
        assert {250, 501, 600, 750, 900} < set(counts)
