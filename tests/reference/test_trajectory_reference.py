"""A short training of StyleGAN 2 by our rule under Lightning ends where the original's ends, step by step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import Meta, Tensors
from families_stylegan2 import build_discriminator, build_generator
from lightning.pytorch import Trainer
from safetensors import safe_open
from test_gan_reference import HERE, family, read_meta
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import EMA
from lightning_modules.stylegan import StyleGAN2

TERMS = {"Gmain": "loss/generator", "Greg": "loss/path_length", "Dmain": "loss/discriminator", "Dreg": "loss/r1"}
STATS = {
    "Gmain": "Loss/G/loss",
    "Greg": "Loss/pl_penalty",
    "Dmain": "Loss/D/loss",
    "Dreg": "Loss/r1_penalty",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption("--reference-dir")
    folder = Path(option) if option else HERE / "gan"
    found = [p for p in sorted(folder.rglob("*.safetensors")) if family(*_kind(p)) == "train_trajectory_sg2"]
    metafunc.parametrize("path", [pytest.param(p, id=p.stem) for p in found])


def _kind(path: Path) -> tuple[Meta, set[str]]:
    meta, keys = read_meta(path)
    return meta, set(keys)


class Replay(StyleGAN2):
    """The rule with the recorded latents and noise instead of drawn ones."""

    def replay(self, ref: Tensors, pl_noise: dict[int, str]) -> None:
        self.ref, self.pl_noise, self.seen = ref, pl_noise, []

    @property
    def iteration(self) -> int:
        return self.images_seen // self.batch

    batch: int

    def latents(self, position: Tensor, draw: int) -> Tensor:
        return self.ref[f"in/z{self.iteration:02d}"][draw][position - self.iteration * self.batch]

    def noise(self, position: Tensor, draw: int) -> Any:
        return "none"

    def path_direction(self, position: Tensor, shape: Any) -> Tensor:
        return self.ref[self.pl_noise[self.iteration]]

    def log_mean(self, name: str, value: Tensor) -> None:
        self.seen.append((self.iteration, name, float(value.detach().mean())))


def as_stored(images: Tensor) -> Tensor:
    """Undo the conversion that the rule does first."""
    return torch.cat([(images[:, :-1] + 1) * 127.5, (images[:, -1:] + 1) * 1.5], dim=1)


def test_training_follows_the_original(path: Path, tmp_path: Path) -> None:
    meta, _ = _kind(path)
    with safe_open(path, "pt") as file:
        ref = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if meta["loss_args"]["style_mixing_prob"] or meta["g_ctor"].get("use_noise", True):
        pytest.fail("the recording is not deterministic")

    generator, discriminator = build_generator(meta["g_ctor"]), build_discriminator(meta["d_ctor"])
    generator.load_state_dict({k[3:]: v for k, v in ref.items() if k.startswith("G0/")})
    discriminator.load_state_dict({k[3:]: v for k, v in ref.items() if k.startswith("D0/")})
    args = meta["loss_args"]
    model = Replay(
        generator.train(),
        discriminator.train(),
        generator_lr=meta["glr"],
        discriminator_lr=meta["dlr"],
        adam_betas=tuple(meta["betas"]),
        r1_gamma=args["r1_gamma"],
        r1_interval=meta["D_reg_interval"],
        path_length_weight=args["pl_weight"],
        path_length_interval=meta["G_reg_interval"],
        path_length_decay=args["pl_decay"],
        path_length_batch_shrink=args["pl_batch_shrink"],
        style_mixing_probability=0.0,
        w_avg_decay=args.get("w_avg_beta", 0.998),
    )
    pl_noise = {s["iteration"]: s["pl_noise"] for s in meta["steps"] if s["pl_noise"]}
    model.replay(ref, pl_noise)
    model.batch = meta["batch"]
    steps = 1 + max(s["iteration"] for s in meta["steps"])
    batches = [
        {
            "slices": as_stored(ref[f"in/real{i:02d}"]),
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
    torch.testing.assert_close(model.path_length_mean, ref["out/pl_mean_end"], rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        image = model.ema_network(ref["in/z_test"], noise="none")
    torch.testing.assert_close(image, ref["out/img_ema_end"], rtol=1e-3, atol=1e-4 * float(image.abs().max()))
