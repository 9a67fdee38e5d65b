"""Averages of any length after training: the mathematics by quadrature, the callback and the command by training."""

import json
from pathlib import Path

import pytest
import torch
from fake_slices import generator_args, train
from lightning.pytorch import Trainer
from scipy.integrate import quad

from callbacks.posthoc_ema import MAX_ERROR, PosthocEMA, reconstruct_ema
from callbacks.synthetic_dataset import weights_hash
from lightning_modules.image_generator import ImageGenerator
from lightning_modules.power_ema import Profile, decay, exponent, inner_products, reconstruct, relative_std
from train import build

STDS = (0.05, 0.1)
MOMENTS = [Profile(time, std) for time in range(1000, 16001, 1000) for std in STDS]


def density(profile: Profile):
    gamma = exponent(profile.std)
    return lambda t: (gamma + 1) / profile.images_seen * (t / profile.images_seen) ** gamma * (t <= profile.images_seen)


def integral(function, end, kinks=()):
    return quad(function, 0, end, points=kinks or None, epsabs=0, epsrel=1e-10, limit=500)[0]


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.25])
def test_profile_of_an_exponent_has_the_relative_standard_deviation(std):
    profile = Profile(3000, std)
    p = density(profile)
    mean, square = (integral(lambda t, k=k: p(t) * t**k, 3000) for k in (1, 2))
    assert (square - mean**2) ** 0.5 / 3000 == pytest.approx(std, rel=1e-6)
    assert relative_std(exponent(std)) == pytest.approx(std, rel=1e-14)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.289, 1.0])
def test_lengths_that_no_profile_has_are_refused(std):
    with pytest.raises(ValueError, match=r"above 0 and below 0\.2887"):
        exponent(std)


def test_decay_makes_the_average_of_the_profile():
    images_seen, gamma = [8, 24, 40, 100], exponent(0.1)
    weight = torch.eye(4, dtype=torch.float64)
    average, before = torch.full((4,), 7.0, dtype=torch.float64), 0
    for row, after in zip(weight, images_seen, strict=True):
        average = row.lerp(average, decay(gamma, before, after))
        before = after
    # The weights between two steps are those after the second: the integral of the profile between the two.
    edges = [0, *images_seen]
    p = density(Profile(100, 0.1))
    expected = [quad(p, low, high, epsabs=0)[0] for low, high in zip(edges, images_seen, strict=False)]
    assert average.tolist() == pytest.approx(expected, rel=1e-10)


def test_inner_products_equal_quadrature():
    first, second = (
        [Profile(1000, 0.05), Profile(1700, 0.1)],
        [Profile(1000, 0.2), Profile(1700, 0.05), Profile(800, 0.1)],
    )
    ours = inner_products(first, second)
    for i, p in enumerate(map(density, first)):
        for j, q in enumerate(map(density, second)):
            end = min(first[i].images_seen, second[j].images_seen)
            assert float(ours[i, j]) == pytest.approx(integral(lambda t, p=p, q=q: p(t) * q(t), end))


def test_error_is_the_distance_of_the_profiles():
    snapshots, target = MOMENTS[:8], Profile(4000, 0.15)
    coefficients, errors = reconstruct(snapshots, [target])
    profiles = [(float(c), density(s)) for c, s in zip(coefficients[:, 0], snapshots, strict=True)]
    wanted = density(target)
    kinks = [1000, 2000, 3000]
    distance = integral(lambda t: (sum(c * p(t) for c, p in profiles) - wanted(t)) ** 2, 4000, kinks)
    square = integral(lambda t: wanted(t) ** 2, 4000)
    assert float(errors[0]) == pytest.approx((distance / square) ** 0.5, rel=1e-6)
    assert float(coefficients.sum()) == pytest.approx(1)


@pytest.mark.parametrize("std", [0.03, 0.07, 0.12, 0.2])
@pytest.mark.parametrize("power", [0, 1, 3])
def test_reconstructed_average_of_a_known_path_is_within_the_stated_error(std, power):
    """Weights t^k have the average (gamma + 1) / (gamma + 1 + k) t^k."""

    def average(profile):
        gamma = exponent(profile.std)
        return (gamma + 1) / (gamma + 1 + power) * (profile.images_seen / 16000) ** power

    target = Profile(16000, std)
    coefficients, errors = reconstruct(MOMENTS, [target])
    found = sum(float(c) * average(s) for c, s in zip(coefficients[:, 0], MOMENTS, strict=True))
    # Cauchy and Schwarz: the error of the profile times the norms of profile and path.
    norm = (float(inner_products([target], [target])) * 16000 / (2 * power + 1)) ** 0.5
    assert abs(found - average(target)) <= float(errors[0]) * norm + 1e-12
    assert float(errors[0]) < MAX_ERROR


def test_tracked_averages_are_reconstructed_as_they_are():
    coefficients, errors = reconstruct(MOMENTS, MOMENTS[-2:])
    expected = torch.zeros(len(MOMENTS), 2, dtype=torch.float64)
    expected[-2, 0] = expected[-1, 1] = 1
    torch.testing.assert_close(coefficients, expected, rtol=0, atol=1e-10)
    assert float(errors.max()) < 1e-6


class Walk(ImageGenerator):
    """Two weights that walk along a known path; the buffer counts the steps."""

    def __init__(self, lr: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.network = torch.nn.Linear(2, 1, bias=False)
        self.network.register_buffer("steps", torch.zeros([], dtype=torch.int64))
        self.judge = torch.nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros([]))

    @staticmethod
    def at(images_seen: float) -> torch.Tensor:
        return torch.tensor([[images_seen, 100.0 * (images_seen // 24 % 2)]])

    @property
    def sampled_network(self):
        return self.network

    def generate(self, index, seed):
        return index

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(40), batch_size=8)

    def training_step(self, batch, batch_idx):
        self.advance(len(batch))
        self.network.weight.data.copy_(self.at(self.images_seen))
        self.network.steps += 1
        self.seen += len(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters())


def fit(folder: Path, epochs: int = 8, resume: bool = False, stds=STDS, **kwargs) -> Trainer:
    """Epochs of 40 images in batches of 8."""
    trainer = Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=[PosthocEMA(stds, **kwargs)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Walk(), ckpt_path=folder / "last.ckpt" if resume else None)
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer


def snapshots(folder: Path) -> dict[str, dict]:
    return {p.name: torch.load(p, weights_only=True) for p in sorted((folder / "checkpoints/ema").glob("*.pt"))}


def direct(images_seen: int, std: float) -> torch.Tensor:
    """The average as the integral of the profile over a path that stands still between its steps."""
    gamma = exponent(std)
    edges = torch.arange(0, images_seen + 1, 8, dtype=torch.float64).div(images_seen).pow(gamma + 1)
    path = torch.cat([Walk.at(t) for t in range(8, images_seen + 1, 8)]).double()
    return (edges.diff()[:, None] * path).sum(dim=0)


def test_snapshots_are_the_averages_at_the_ends_of_epochs(tmp_path):
    fit(tmp_path, epochs=5, every_n_epochs=2)
    found = snapshots(tmp_path)
    assert list(found) == [f"{t:09d}-std{s:g}.pt" for t in (80, 160, 200) for s in STDS]
    for content in found.values():
        images_seen = content["checkpoint"]["images_seen"]
        expected = direct(images_seen, content["std"])
        torch.testing.assert_close(content["parameters"]["weight"][0].double(), expected, rtol=1e-5, atol=1e-4)
        assert int(content["buffers"]["steps"]) == images_seen // 8


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole = fit(tmp_path / "whole")
    fit(tmp_path / "parts", epochs=3)
    parts = fit(tmp_path / "parts", resume=True)
    ours, theirs = (t.callbacks[0].state_dict() for t in (whole, parts))
    assert ours["run"] == theirs["run"]
    for std in STDS:
        assert torch.equal(ours["averages"][std]["weight"], theirs["averages"][std]["weight"])
    ours, theirs = snapshots(tmp_path / "whole"), snapshots(tmp_path / "parts")
    assert len(ours) == 16
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k]["parameters"]["weight"], theirs[k]["parameters"]["weight"]) for k in ours)


def test_run_is_not_resumed_with_other_averages(tmp_path):
    fit(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"tracks the relative standard deviations \[0\.05, 0\.1\], but stds is"):
        fit(tmp_path, resume=True, stds=(0.05, 0.2))


@pytest.mark.parametrize("std", [0.05, 0.07, 0.12])
@pytest.mark.parametrize("images_seen", [None, 240])
def test_reconstructed_checkpoint_holds_the_average_that_was_not_tracked(tmp_path, std, images_seen):
    fit(tmp_path)
    out = reconstruct_ema(tmp_path, tmp_path / "out.ckpt", std=std, images_seen=images_seen)
    content = torch.load(out, weights_only=True)
    moment = images_seen or 320
    assert content["images_seen"] == moment
    assert content["ema_std"] == std
    state = content["state_dict"]
    networks = {f"{name}.{key}" for name in ("network", "ema_network") for key in ("weight", "steps")}
    assert set(state) - networks == {"seen"}
    assert float(state["seen"]) == moment
    expected = direct(moment, std)
    # 0.05 is a stored average; the others are within the error of the profile, on a path of jumps of 100.
    torch.testing.assert_close(
        state["ema_network.weight"][0].double(), expected, rtol=0, atol=1e-3 if std == 0.05 else 2.0
    )
    assert state["ema_network.weight"].dtype == torch.float32
    assert int(state["ema_network.steps"]) == moment // 8
    model = Walk()
    model.start_from(str(out))
    assert torch.equal(model.ema_network.weight, state["network.weight"])


def test_what_the_snapshots_cannot_give_is_refused_with_what_they_can(tmp_path):
    fit(tmp_path)
    out = tmp_path / "out.ckpt"
    with pytest.raises(ValueError, match=r"cannot give an average of --std 0\.01: .* 53% off.* 0\.037 to 0\.171;"):
        reconstruct_ema(tmp_path, out, std=0.01)
    with pytest.raises(ValueError, match=r"no snapshots at 100 images seen, but at 40, 80, "):
        reconstruct_ema(tmp_path, out, std=0.1, images_seen=100)
    with pytest.raises(ValueError, match=r"holds no snapshots: train with callbacks\.PosthocEMA"):
        reconstruct_ema(tmp_path / "nowhere", out, std=0.1)
    last = tmp_path / "checkpoints/ema/000000320-std0.05.pt"
    last.write_bytes(last.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"000000320-std0\.05\.pt cannot be read as a snapshot of PosthocEMA"):
        reconstruct_ema(tmp_path, out, std=0.1)
    last.unlink()
    with pytest.raises(ValueError, match=r"The 15 snapshots .* off\. They can give 0\.\d+ to 0\.\d+;"):
        reconstruct_ema(tmp_path, out, std=0.05)
    assert not out.exists()
    out.touch()
    with pytest.raises(ValueError, match="to be a new file, but it exists"):
        reconstruct_ema(tmp_path, out, std=0.1)


def test_snapshots_of_another_run_are_refused(tmp_path):
    fit(tmp_path, epochs=2)
    other = PosthocEMA()
    trainer = Trainer(
        max_epochs=1, default_root_dir=tmp_path, callbacks=[other], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Walk(lr=2.0))
    with pytest.raises(
        ValueError, match=r"snapshots of 2 different runs, such as 000000040-std0\.05\.pt and 000000080"
    ):
        reconstruct_ema(tmp_path, tmp_path / "out.ckpt", std=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stds": (0.05,)}, "two different numbers or more"),
        ({"stds": (0.05, 0.05)}, "two different numbers or more"),
        ({"stds": (0.05, 0.3)}, "below 0.2887"),
        ({"every_n_epochs": 0}, "every_n_epochs to be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        PosthocEMA(**arguments)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="PosthocEMA averages image generators, but the model is a Linear"):
        PosthocEMA().setup(None, torch.nn.Linear(1, 1), "fit")


def test_stylegan2_resumes_and_is_sampled_with_an_average_chosen_afterwards(slice_set, tmp_path):
    def command(run_dir: Path) -> list[str]:
        return [
            *generator_args("stylegan2", run_dir, slice_set),
            "--trainer.callbacks+=callbacks.posthoc_ema.PosthocEMA",
        ]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train([*command(whole), "--task=fit", "--trainer.max_epochs=2"])
    train([*command(parts), "--task=fit", "--trainer.max_epochs=1"])
    train([*command(parts), "--task=fit", "--trainer.max_epochs=2"])
    for name, content in snapshots(whole).items():
        other = snapshots(parts)[name]
        assert other["run"] == content["run"]
        for kind in ("parameters", "buffers"):
            assert all(torch.equal(value, other[kind][key]) for key, value in content[kind].items()), name

    out = reconstruct_ema(parts, tmp_path / "out.ckpt", std=0.08)
    args = [*generator_args("stylegan2", tmp_path / "sampled", slice_set), f"--model.init_from={out}", "--task=predict"]
    train([*args, "--synthetic_slices=4"])
    manifest = json.loads((tmp_path / "sampled/synthetic/dataset.json").read_text())
    model = build(args).model
    model.start_from(str(out))
    assert manifest["weights_sha256"] == weights_hash(model.ema_network)
    raw = torch.load(parts / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert not torch.equal(model.generator.mapping.fc0.weight, raw["generator.mapping.fc0.weight"])
