"""Trained networks for other programs: what they give there is what our own forward gives."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from fake_slices import COPY_DETECTOR, SEGMENTERS, generator_args
from monai.bundle import verify_net_in_out
from safetensors import safe_open
from torch import nn

from lightning_modules.counter_random import Stream, random_normal
from lightning_modules.exported_network import open_source
from lightning_modules.model_export import export_onnx, export_safetensors, export_torchscript
from lightning_modules.monai_bundle import DECODERS, export_bundle
from lightning_modules.networks.stylegan2 import StyleGAN2Generator
from lightning_modules.segmentation_targets import Classes, Regions
from train import build

SEED, INDEX = 7, torch.arange(5)
CLASSES_OF = [f"--model.{net}.init_args.c_dim=2" for net in ("generator", "discriminator")]
CONDITIONS = ["--model.conditions=[tumour, height]", "--model.network.init_args.condition_width=10"]
FEW_LAYERS = ["--model.generator.init_args.num_layers=3"]
RECORDED = {
    "stylegan3_r": ["--model.truncation_cutoff=2", "--model.truncation_psi=0.7", *FEW_LAYERS],
    "stylegan1": [],
    "progressive_gan": [],
    "diffusion": CONDITIONS,
}


def save_run(args, run_dir, with_ema=True):
    """A run folder as training leaves it, of a model with random weights; its moving average has others."""
    cli = build(args)
    model, trainer = cli.model, cli.trainer
    torch.manual_seed(0)
    if with_ema:
        model.start_ema()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is zero or constant, as it is at first
            parameter += 0.1 * torch.randn(parameter.shape)
    trainer.strategy.connect(model)
    (run_dir / "checkpoints").mkdir(parents=True)
    trainer.save_checkpoint(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    cli.parser.save(cli.config, run_dir / "config.yaml", skip_check=True)
    return model.eval()


def segmenter_args(run_dir, slices, network, *words):
    config = {"DynUNet": "unet", "SwinUPerNet": "swin", "SegResNet": "segresnet", "UNet": "monai_unet"}[network]
    return [
        f"--config=configs/{config}.yaml",
        f"--run_dir={run_dir}",
        f"--data.root={slices}",
        *(f"--model.network.init_args.{word}" for word in SEGMENTERS[network]),
        *words,
    ]


def drawn_as_emitted(model, network):
    """The inputs that `generate` draws for images 0 to 4."""
    shapes = {name: given.shape for name, given in network.inputs.items()}
    given = {"z": random_normal(SEED, Stream.EMISSION_LATENT, INDEX, shapes["z"])}
    if "noise" in shapes:
        given["noise"] = random_normal(SEED, Stream.EMISSION_NOISE, INDEX, shapes["noise"])
    if "condition" in shapes:
        given["condition"] = model.conditions.draw(INDEX, SEED)
    return given


def run_onnx(path, given):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == list(given)
    return session.get_outputs()[0].name, session.run(None, {name: value.numpy() for name, value in given.items()})[0]


@pytest.mark.parametrize("name", RECORDED)
def test_network_of_a_generator_is_recorded_for_any_batch(name, slice_set, tmp_path):
    model = save_run([*generator_args(name, tmp_path / "run", slice_set), *RECORDED[name]], tmp_path / "run")
    network = open_source(tmp_path / "run").network(None)
    program = network.recorded(2, any_batch=True).module()
    with torch.no_grad():
        if name == "diffusion":
            given = network.examples(5)
            expected = model.ema_network(given["x"], given["t"], given["condition"])
        else:
            given = drawn_as_emitted(model, network)
            expected = model.generate(INDEX, SEED)
        torch.testing.assert_close(program(**given), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_onnx_of_a_generator_makes_the_images_that_it_would_emit(slice_set, tmp_path):
    args = generator_args("stylegan2", tmp_path / "run", slice_set)
    model = save_run([*args, "--model.truncation_psi=0.7", *CLASSES_OF], tmp_path / "run")
    out = export_onnx(tmp_path / "run", tmp_path / "out")
    about = json.loads((out / "model.json").read_text())
    given = drawn_as_emitted(model, open_source(tmp_path / "run").network(None))
    name, images = run_onnx(out / "model.onnx", given)
    expected = model.generate(INDEX, SEED).detach().numpy()
    np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert (name, about["output"], about["batch"], about["moving_average"]) == ("images", "images", "any", True)
    assert {key: value["shape"] for key, value in about["inputs"].items()} == {
        "z": ["batch", 64],
        "noise": ["batch", 16 + 2 * 64 + 2 * 256],
        "condition": ["batch", 2],
    }
    assert about["label_levels"] == [0, 85, 170, 255]
    assert about["largest_difference"] < 1e-5
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "model.json", "model.onnx"]


def test_onnx_of_a_segmenter_gives_the_probabilities_of_its_own_prediction(slice_set, tmp_path):
    words = ["--model.mirror=[left-right]", "--model.target=lightning_modules.segmentation_targets.Regions"]
    words.append("--model.network.init_args.out_channels=3")
    model = save_run(segmenter_args(tmp_path / "run", slice_set, "DynUNet", *words), tmp_path / "run")
    out = export_onnx(tmp_path / "run", tmp_path / "out")
    slices = torch.from_numpy(np.load(slice_set / "slices-00000.npy")[:3])
    name, probabilities = run_onnx(out / "model.onnx", {"modalities": slices[:, :4].float()})
    expected = model.probabilities(slices).detach().numpy()
    assert (name, expected.shape) == ("probabilities", (3, 3, 16, 16))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-6)
    assert json.loads((out / "model.json").read_text())["target"] == "Regions"


def test_torchscript_of_a_generator_makes_as_many_images_as_asked_for(slice_set, tmp_path):
    model = save_run(generator_args("stylegan3_t", tmp_path / "run", slice_set), tmp_path / "run")
    out = export_torchscript(tmp_path / "run", tmp_path / "out", batch_size=5)
    loaded = torch.jit.load(out / "model.ts")
    with torch.no_grad():
        images = loaded(**drawn_as_emitted(model, open_source(tmp_path / "run").network(None)))
        expected = model.generate(INDEX, SEED)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert json.loads((out / "model.json").read_text())["batch"] == 5


def test_torchscript_of_a_segmenter_takes_any_number_of_slices(slice_set, tmp_path):
    model = save_run(segmenter_args(tmp_path / "run", slice_set, "SwinUPerNet"), tmp_path / "run", with_ema=False)
    out = export_torchscript(tmp_path / "run", tmp_path / "out")
    slices = torch.from_numpy(np.load(slice_set / "slices-00000.npy")[:5])
    with torch.no_grad():
        probabilities = torch.jit.load(out / "model.ts")(slices[:, :4].float())
        torch.testing.assert_close(probabilities, model.probabilities(slices))


def test_safetensors_and_configuration_make_the_same_network(slice_set, tmp_path):
    args = generator_args("stylegan2", tmp_path / "run", slice_set)
    model = save_run([*args, "--model.generator.init_args.num_half_res=1"], tmp_path / "run")
    out = export_safetensors(tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        about = file.metadata()
    assert (about["format"], about["network"], about["moving_average"]) == ("pt", "generator", "True")
    config = yaml.safe_load((out / "config.yaml").read_text())["model"]
    assert config["class_path"] == "lightning_modules.stylegan.StyleGAN2"
    assert "init_from" not in config["init_args"]
    described = config["init_args"][about["network"]]
    assert described["class_path"].endswith(".StyleGAN2Generator")
    network = StyleGAN2Generator(**described["init_args"])
    network.load_state_dict(weights)
    z = torch.randn(2, 64)
    torch.testing.assert_close(network(z), model.ema_network(z), rtol=1e-2, atol=1e-2)  # the run has half precision
    assert all(torch.equal(value, model.ema_network.state_dict()[name]) for name, value in weights.items())


def test_configuration_beside_the_weights_is_one_that_training_reads(slice_set, tmp_path):
    args = generator_args("diffusion", tmp_path / "run", slice_set)
    save_run(args, tmp_path / "run")
    out = export_safetensors(tmp_path / "run", tmp_path / "out")
    given = [f"--run_dir={tmp_path / 'next'}", f"--data.root={slice_set}"]
    again = build(["--config=configs/laptop/diffusion.yaml", f"--config={out / 'config.yaml'}", *given]).model
    assert again.network.img_resolution == 16  # 64 in the shipped one
    assert dict(again.hparams) == dict(build(args).model.hparams)


def test_bundle_passes_monai_own_check_and_decodes_as_the_segmenter(slice_set, tmp_path):
    model = save_run(segmenter_args(tmp_path / "run", slice_set, "SegResNet"), tmp_path / "run", with_ema=False)
    out = export_bundle(tmp_path / "run", tmp_path / "bundle")
    configs = {"meta_file": str(out / "configs/metadata.json"), "config_file": str(out / "configs/inference.json")}
    verify_net_in_out("network_def", **configs, bundle_root=str(out))
    outputs = "_meta_#network_data_format#outputs#pred#num_channels"
    with pytest.raises(ValueError, match="output channel number `4` doesn't match: `3`"):
        verify_net_in_out("network_def", **configs, bundle_root=str(out), **{outputs: 3})
    slices = torch.from_numpy(np.load(slice_set / "slices-00000.npy")[:2])
    with torch.no_grad():
        probabilities = torch.jit.load(out / "models" / "model.ts")(slices[:, :4].float())
        torch.testing.assert_close(probabilities, model.probabilities(slices))


@pytest.mark.parametrize("target", [Classes(), Regions()])
def test_bundle_decodes_as_the_target(target):
    probabilities = torch.rand(1, target.channels, 32, 32)
    decode = eval(DECODERS[type(target)].removeprefix("$"), {"torch": torch})
    assert torch.equal(decode(probabilities[0][..., None])[..., 0], target.decode(probabilities))


def test_export_that_gives_other_numbers_is_refused_and_nothing_is_written(slice_set, tmp_path, monkeypatch):
    save_run(segmenter_args(tmp_path / "run", slice_set, "UNet"), tmp_path / "run", with_ema=False)
    load = torch.jit.load

    class Other(nn.Module):
        def __init__(self, path):
            super().__init__()
            self.same = load(path)

        def forward(self, modalities):
            return self.same(modalities) * 1.001

    monkeypatch.setattr(torch.jit, "load", Other)
    with pytest.raises(ValueError, match=r"exported UNet gives other numbers .* differ by 0\.001 of the largest value"):
        export_torchscript(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_cannot_be_exported_is_refused_with_the_reason(slice_set, tmp_path):
    with pytest.raises(ValueError, match=r"Expected a run folder .* at .*nowhere: there is none"):
        export_safetensors(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "torn.ckpt").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match=r"torn\.ckpt cannot be read as a checkpoint that train\.py wrote"):
        export_safetensors(tmp_path / "torn.ckpt", tmp_path / "out")
    detector = ["--config=configs/copy_detector.yaml", f"--data.root={slice_set}", f"--run_dir={tmp_path / 'detector'}"]
    save_run([*detector, *COPY_DETECTOR], tmp_path / "detector", with_ema=False)
    with pytest.raises(ValueError, match=r"last\.ckpt is of a CopyDetector, not of a generator or segmenter"):
        export_torchscript(tmp_path / "detector", tmp_path / "out")
    save_run(generator_args("progressive_gan", tmp_path / "gan", slice_set), tmp_path / "gan")
    with pytest.raises(ValueError, match=r"bundle is made of a segmenter of Classes or Regions, not of ProgressiveGAN"):
        export_bundle(tmp_path / "gan", tmp_path / "out")
    with pytest.raises(ValueError, match=r"size_px is for segmenters"):
        export_torchscript(tmp_path / "gan", tmp_path / "out", size_px=16)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"Expected .*full to be a new or empty folder"):
        export_safetensors(tmp_path / "gan", tmp_path / "full")


def test_checkpoint_of_a_foreign_class_is_not_imported(slice_set, tmp_path):
    save_run(generator_args("progressive_gan", tmp_path / "run", slice_set), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["_class_path"] = "antigravity.Model"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"is of a antigravity\.Model, and not of a model of lightning_modules"):
        export_safetensors(tmp_path / "run", tmp_path / "out")
    assert "antigravity" not in sys.modules


def test_size_of_a_segmenter_is_that_of_its_slices_or_stated(slice_set, tmp_path):
    save_run(segmenter_args(tmp_path / "run", slice_set, "UNet"), tmp_path / "run", with_ema=False)
    assert open_source(tmp_path / "run").network(None).inputs["modalities"].shape == (4, 16, 16)
    (tmp_path / "run" / "config.yaml").unlink()
    source = open_source(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no longer known .* State --size_px"):
        source.network(None)
    assert source.network(32).inputs["modalities"].shape == (4, 32, 32)
