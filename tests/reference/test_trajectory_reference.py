"""A short training of StyleGAN 2 and 3 under Lightning ends where the original's ends, step by step."""

from pathlib import Path
from typing import Any

import families_stylegan2
import families_stylegan3
import pytest
import torch
from comparison import Meta, Tensors
from lightning.pytorch import Trainer
from safetensors import safe_open
from test_gan_reference import ELSEWHERE, HERE, family, read_meta
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks import EMA
from lightning_modules import image_generator
from lightning_modules.stylegan import StyleGAN2, StyleGAN3

TERMS = {
    "Gboth": "loss/generator",
    "Gmain": "loss/generator",
    "Greg": "loss/path_length",
    "Dmain": "loss/discriminator",
    "Dreg": "loss/r1",
}
STATS = {
    "Gboth": "Loss/G/loss",
    "Gmain": "Loss/G/loss",
    "Greg": "Loss/pl_penalty",
    "Dmain": "Loss/D/loss",
    "Dreg": "Loss/r1_penalty",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption("--reference-dir")
    folder = Path(option) if option else HERE / "gan"
    found = [p for p in sorted(folder.rglob("*.safetensors")) if family(*_kind(p)) in ELSEWHERE]
    metafunc.parametrize("path", [pytest.param(p, id=p.stem) for p in found])


def _kind(path: Path) -> tuple[Meta, set[str]]:
    meta, keys = read_meta(path)
    return meta, set(keys)


class Replay:
    """A rule with the recorded latents and noise instead of drawn ones."""

    images_seen: int
    batch: int

    def replay(self, ref: Tensors, meta: Meta) -> None:
        self.ref, self.batch, self.seen = ref, meta["batch"], []
        self.pl_noise = {s["iteration"]: s["pl_noise"] for s in meta["steps"] if s["pl_noise"]}
        recorded = {s["phase"]: s["z_index"] for s in meta["steps"]}
        draws = {"Gboth": 0, "Gmain": 0, "Greg": 1, "Dmain": 2}
        self.z_index = {draws[phase]: index for phase, index in recorded.items() if phase in draws}

    @property
    def iteration(self) -> int:
        return self.images_seen // self.batch

    def latents(self, position: Tensor, draw: int) -> Tensor:
        latents = self.ref[f"in/z{self.iteration:02d}"][self.z_index[draw]]
        return latents[position - self.iteration * self.batch]

    def noise(self, position: Tensor, draw: int) -> Any:
        return "none"

    def path_direction(self, position: Tensor, shape: Any) -> Tensor:
        return self.ref[self.pl_noise[self.iteration]]

    def log_mean(self, name: str, value: Tensor) -> None:
        self.seen.append((self.iteration, name, float(value.detach().mean())))


class ReplayedStyleGAN2(Replay, StyleGAN2):
    pass


class ReplayedStyleGAN3(Replay, StyleGAN3):
    pass


def build_rule(meta: Meta, networks: list[nn.Module]) -> ReplayedStyleGAN2 | ReplayedStyleGAN3:
    args = meta["loss_args"]
    common = {
        "generator_lr": meta["glr"],
        "discriminator_lr": meta["dlr"],
        "adam_betas": tuple(meta["betas"]),
        "r1_gamma": args["r1_gamma"],
        "r1_interval": meta["D_reg_interval"],
        "w_avg_decay": args.get("w_avg_beta", 0.998),
    }
    if "magnitude_ema_beta" in meta["g_ctor"]:
        sigma = args.get("blur_init_sigma", 0)
        blur = {"blur_sigma_px": sigma, "blur_fade_kimg": args["blur_fade_kimg"]} if sigma else {}
        return ReplayedStyleGAN3(*networks, **common, **blur)
    path_length = {
        "path_length_weight": args["pl_weight"],
        "path_length_interval": meta["G_reg_interval"],
        "path_length_decay": args["pl_decay"],
        "path_length_batch_shrink": args["pl_batch_shrink"],
    }
    return ReplayedStyleGAN2(*networks, **common, **path_length, style_mixing_probability=0.0)


def test_training_follows_the_original(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_generator, "slices_to_images", lambda images, _: images)  # they were never slices
    meta, _ = _kind(path)
    with safe_open(path, "pt") as file:
        ref = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    is_sg3 = "magnitude_ema_beta" in meta["g_ctor"]
    noisy = not is_sg3 and meta["g_ctor"].get("use_noise", True)
    if meta["loss_args"].get("style_mixing_prob") or noisy or meta["g_ctor"]["c_dim"]:
        pytest.fail("the recording has random numbers or classes that the file does not hold")

    generator: Any = (families_stylegan3 if is_sg3 else families_stylegan2).build_generator(meta["g_ctor"])
    discriminator = families_stylegan2.build_discriminator(meta["d_ctor"])
    generator.load_state_dict({k[3:]: v for k, v in ref.items() if k.startswith("G0/")})
    discriminator.load_state_dict({k[3:]: v for k, v in ref.items() if k.startswith("D0/")})
    model = build_rule(meta, [generator.train(), discriminator.train()])
    model.replay(ref, meta)
    steps = 1 + max(s["iteration"] for s in meta["steps"])
    batches = [
        {
            "slices": ref[f"in/real{i:02d}"],
            "position": torch.arange(i * meta["batch"], (i + 1) * meta["batch"]),
        }
        for i in range(steps)
    ]
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[EMA(meta["ema_kimg"], meta["ema_rampup"])],
    )
    trainer.fit(model, DataLoader(batches, batch_size=None))

    ours = {(iteration, name): value for iteration, name, value in model.seen}
    for step in meta["steps"]:
        expected = step["stats"][STATS[step["phase"]]]
        assert ours[step["iteration"], TERMS[step["phase"]]] == pytest.approx(expected, rel=1e-3), step

    assert model.ema_network is not None
    networks = {"G_end": generator, "D_end": discriminator, "G_ema_end": model.ema_network}
    for key in (k for k in ref if k.split("/")[0] in networks):
        end, name = key.split("/", 1)
        begin = ref[f"{end[0]}0/{name}"]
        moved, off = (ref[key] - begin).norm(), (networks[end].state_dict()[name] - ref[key]).norm()
        assert off <= 5e-3 * moved + 1e-12, f"{key}: off by {off / moved:.1e} of the way"
    if "out/pl_mean_end" in ref:
        torch.testing.assert_close(model.path_length_mean, ref["out/pl_mean_end"], rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        image = model.ema_network(ref["in/z_test"], noise="none")
    torch.testing.assert_close(image, ref["out/img_ema_end"], rtol=1e-3, atol=1e-4 * float(image.abs().max()))
