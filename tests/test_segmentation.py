"""The training rule of segmenters against independent oracles, and the trial of networks before a training."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_slices import SEGMENTERS, train, unet_args
from monai.networks.nets import DynUNet, UNet
from test_distributed import assert_same_training, start_weights
from torch import nn

from callbacks import EMA
from lightning_modules.learning_rates import Cosine, Polynomial
from lightning_modules.network_trial import heads_of
from lightning_modules.segmentation import SegmentationModule, normalize
from lightning_modules.segmentation_losses import CrossEntropy, SegmentationLoss


def segmenter(network: nn.Module | None = None, images_seen: int = 0, **options) -> SegmentationModule:
    """A segmenter of 8 px in a training of 10 epochs of 1000 images."""
    torch.manual_seed(0)
    module = SegmentationModule(network or nn.Conv2d(4, 4, 3, padding=1), **options)
    slices = SimpleNamespace(manifest=SimpleNamespace(size_px=(8, 8)))
    data = SimpleNamespace(epoch_images=1000, batch_size=4, real=slices)
    module._trainer = SimpleNamespace(world_size=1, max_epochs=10, datamodule=data, global_rank=0)
    module._trainer.optimizers = [module.configure_optimizers()]
    module.images_seen = images_seen
    return module


def fake_batch(count: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    slices = torch.randint(9, 200, (count, 5, 8, 8), generator=generator, dtype=torch.uint8)
    slices[:, 4] %= 4
    return {"slices": slices}


class MeanLogit(SegmentationLoss):
    """A term whose value is easy to tell."""

    def __call__(self, logits, label, target, sum_over_ranks):
        return logits.mean()


def test_normalization_is_a_z_score_inside_the_brain_and_zero_outside():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(20, 200, (2, 4, 16, 16)).astype(np.uint8))
    images[:, :, :4] = 3  # background that is nearly black
    out = normalize(images)
    assert (out[:, :, :4] == 0).all()
    inside = images[1, 2, 4:].numpy().astype(float)
    np.testing.assert_allclose(out[1, 2, 4:], (inside - inside.mean()) / inside.std(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [(None, (4 * 4.0 + 2 * 2.0 + 1 * 1.0) / 7), ([1.0, 0.4, 0.0], 4.0 + 0.4 * 2.0)],
    ids=["halves", "given"],
)
def test_loss_is_the_weighted_sum_over_heads_and_terms(weights, expected):
    module = segmenter(head_weights=weights, losses=[MeanLogit(), MeanLogit(weight=0.5)])
    heads = torch.stack([torch.full((2, 4, 8, 8), value) for value in (4.0, 2.0, 1.0)], dim=1)
    assert float(module.loss(heads, torch.zeros(2, 1, 8, 8))) == pytest.approx(1.5 * expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Polynomial(0.9), lambda o: torch.optim.lr_scheduler.PolynomialLR(o, total_iters=20, power=0.9)),
        (Polynomial(0.0), lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1.0)),
        (Cosine(0.1), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20, eta_min=0.1)),
    ],
    ids=["polynomial", "constant", "cosine"],
)
def test_learning_rates_fall_as_those_of_pytorch(ours, theirs):
    scheduler = theirs(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    for step in range(21):
        assert ours(step / 20) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        scheduler.optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("images_seen", [0, 599, 1000, 1199, 1200, 5000, 10_000])
def test_learning_rate_follows_the_images_seen(images_seen):
    module = segmenter(
        images_seen=images_seen,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=6e-5),
        no_decay=["bias"],
        decay=Polynomial(1.0),
        rampup_kimg=1.2,
    )
    module.on_train_batch_start(fake_batch(), 0)
    # mmsegmentation: the scheduled rate times the ramp.
    expected = 6e-5 * (1 - images_seen / 10_000) * min(1.0, (images_seen + 1) / 1200)
    rates = [group["lr"] for group in module.trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([expected, expected])


def test_named_parameters_are_without_weight_decay():
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    optimizer = segmenter(
        network, optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=0.1), no_decay=["1."]
    )
    optimizer = optimizer.trainer.optimizers[0]
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert [decay[id(weight)] for weight in network.parameters()] == [0.1, 0.1, 0.0, 0.0]


def test_optimizer_is_that_of_nnunet_if_none_is_named():
    options = segmenter().trainer.optimizers[0].defaults
    assert {key: options[key] for key in ("lr", "momentum", "weight_decay", "nesterov")} == {
        "lr": 0.01, "momentum": 0.99, "weight_decay": 3e-5, "nesterov": True,
    }  # fmt: skip


def test_impossible_options_are_refused_together():
    with pytest.raises(ValueError, match="losses must have") as refused:
        segmenter(losses=[], head_weights=[0.0], rampup_kimg=-1.0, no_decay=["bias", "norm"], mirror=["front-back"] * 2)
    for words in (
        "not all 0, but are [0.0]",
        "rampup_kimg must be",
        "an axis twice",
        "no parameter of Conv2d has norm",
    ):
        assert words in str(refused.value)


def test_dropout_follows_from_the_clock():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.5))

    def loss(images_seen: int) -> float:
        return float(segmenter(network, images_seen, losses=[CrossEntropy()]).training_step(fake_batch(), 0))

    assert loss(64) == loss(64) != loss(128)


def test_predictions_are_the_most_probable_classes():
    module = segmenter()
    batch = fake_batch()
    predicted = module.predict_step(batch, 0)
    assert (predicted.dtype, predicted.shape) == (torch.uint8, (4, 8, 8))
    assert torch.equal(predicted, module.network(normalize(batch["slices"][:, :4])).argmax(dim=1).byte())
    assert torch.equal(predicted, module.test_step(batch, 0))
    assert module.predict_step(fake_batch(0), 0).shape == (0, 8, 8)


def test_mirrored_predictions_are_the_mean_over_the_mirror_images():
    plain, once, twice = (segmenter(mirror=axes) for axes in ([], ["left-right"], ["left-right", "front-back"]))
    slices = fake_batch()["slices"]
    for module, flips in ((once, [[], [2]]), (twice, [[], [2], [3], [2, 3]])):
        expected = sum(plain.probabilities(slices.flip(axes)).flip(axes) for axes in flips) / len(flips)
        torch.testing.assert_close(module.probabilities(slices), expected)
        assert not torch.allclose(expected, plain.probabilities(slices), atol=1e-3)


def test_moving_average_follows_the_weights_and_predicts():
    module, callback = segmenter(), EMA(halflife_kimg=0.004, rampup=None)
    callback.setup(module.trainer, module, "fit")
    start = module.network.weight.detach().clone()
    callback.on_train_start(module.trainer, module)
    module.network.weight.data += 1.0
    module.advance(4)  # one half-life
    callback.on_train_batch_end(module.trainer, module, None, None, 0)
    torch.testing.assert_close(module.ema_network.weight, start + 0.5)
    slices = fake_batch()["slices"]
    expected = module.ema_network(normalize(slices[:, :4])).softmax(dim=1)
    torch.testing.assert_close(module.probabilities(slices), expected)


def deep_unet() -> DynUNet:
    """Five halvings."""
    return DynUNet(2, 4, 4, [3] * 6, [1, 2, 2, 2, 2, 2], [2] * 5, [4] * 6, deep_supervision=True, deep_supr_num=3)


def test_sizes_that_a_network_cannot_take_are_refused_with_those_that_it_can():
    sizes = ", ".join(str(size) for size in range(64, 513, 32))  # 32 would leave one pixel to normalize
    with pytest.raises(ValueError, match=rf"DynUNet cannot .* 80 x 80 px .* it takes {sizes}\."):
        heads_of(deep_unet(), (2, 4, 80, 80), 4)
    assert heads_of(deep_unet(), (2, 4, 64, 96), 4) == 4


def test_batch_normalization_of_a_single_pixel_is_refused():
    network = UNet(2, 4, 4, [4, 4, 4], [2, 2], norm="batch")
    assert heads_of(network, (2, 4, 4, 4), 4) == 1
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        heads_of(network, (1, 4, 4, 4), 4)


def test_trial_leaves_network_and_random_state_alone():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    assert heads_of(network, (2, 4, 16, 16), 4) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class LooksAtNumbers(nn.Conv2d):
    """Cannot run on shapes alone, draws at random and counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        assert float(x.sum() + torch.rand(1)) < math.inf
        return super().forward(x)


class GivesAList(nn.Conv2d):
    """As some networks do for deep supervision."""

    def forward(self, x):
        return [super().forward(x)]


def test_network_that_looks_at_numbers_is_tried_by_computing():
    network, state = LooksAtNumbers(4, 4, 1), torch.get_rng_state()
    assert heads_of(network, (512, 4, 16, 16), 4) == 1
    assert network.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (nn.Conv2d(4, 3, 1), "Conv2d gives 3 logits per pixel, but model.target needs 4"),
        (nn.Conv2d(3, 4, 1), "it takes none"),
        (nn.Conv2d(4, 4, 3), r"its output is \(2, 4, 14, 14\) instead of logits for every pixel"),
        (GivesAList(4, 4, 1), "its output is list instead of logits"),
    ],
    ids=["channels", "modalities", "shape", "type"],
)
def test_networks_that_give_something_else_are_refused(network, words):
    with pytest.raises(ValueError, match=words):
        heads_of(network, (2, 4, 16, 16), 4)


def test_number_of_weights_must_be_that_of_the_heads():
    with pytest.raises(ValueError, match=r"Conv2d has 1 heads in training, but there are 2 weights, \[1.0, 0.4\]"):
        segmenter(head_weights=[1.0, 0.4]).setup("fit")


def test_training_of_a_size_that_does_not_fit_does_not_begin(slice_set, tmp_path):
    words = ("strides=[1, 2, 2, 2, 2]", "kernel_size=[3, 3, 3, 3, 3]", "upsample_kernel_size=[2, 2, 2, 2]")
    deep = [f"--model.network.init_args.{word}" for word in (*words, "filters=[4, 4, 4, 4, 4]")]
    refused = train([*unet_args(tmp_path, slice_set), *deep], check=False)
    assert refused.returncode != 0
    assert "cannot be trained on 8 slices of 4 modalities and 16 x 16 px" in refused.stderr
    assert "it takes 32, 48, 64" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_fine_tuning_starts_from_the_moving_average_of_another_run(slice_set, tmp_path):
    average = ["--trainer.callbacks+=callbacks.EMA", "--trainer.callbacks.halflife_kimg=0.016"]
    train([*unet_args(tmp_path / "first", slice_set), *average, "--task=fit"])
    source = tmp_path / "first" / "checkpoints" / "last.ckpt"
    options = [f"--model.init_from={source}", "--model.optimizer.init_args.lr=0", "--trainer.max_epochs=1"]
    train([*unet_args(tmp_path / "second", slice_set), *options, "--task=fit"])
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (
        source, tmp_path / "second" / "checkpoints" / "last.ckpt"
    ))  # fmt: skip
    assert all(torch.equal(weight, before[name.replace("network", "ema_network", 1)]) for name, weight in after.items())
    assert not any(torch.equal(weight, before[name]) for name, weight in after.items() if name.endswith("conv.weight"))

    module = SegmentationModule.load_from_checkpoint(source, map_location="cpu")
    assert module.ema_network is not None
    other = ["--model.network.init_args.filters=[4, 6, 8, 10]", "--task=fit"]
    refused = train([*unet_args(tmp_path / "third", slice_set), *options, *other], check=False)
    assert "does not fit the configured one" in refused.stderr


def test_swin_with_batch_normalization_and_regions_on_two_processes(slice_set, tmp_path):
    words = (*SEGMENTERS["SwinUPerNet"], "drop_path_rate=0", "head_dropout=0", "out_channels=3")
    loss = "lightning_modules.segmentation_losses"
    command = [
        "--config=configs/laptop/swin.yaml", f"--data.root={slice_set}", "--data.batch_size=8",
        "--data.epoch_images=16", "--trainer.max_epochs=1",
        "--model.target=lightning_modules.segmentation_targets.Regions",
        f"--model.losses=[{{class_path: {loss}.Tversky}}, {{class_path: {loss}.Focal}}]",
        "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}",
        *(f"--model.network.init_args.{word}" for word in words),
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    train([*command, f"--run_dir={one}"])
    train([*command, f"--run_dir={two}", "--trainer.devices=2"])
    assert_same_training(one, two, start_weights([*command, f"--run_dir={one}"]), share=1e-4)
    assert (one / "dice_per_patient.csv").read_text() == (two / "dice_per_patient.csv").read_text()
