"""`standin import`: official checkpoints come in with their weights and images, hostile and broken files do not."""

import collections
import hashlib
import importlib
import inspect
import io
import json
import os
import pickle
import random
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fake_slices import ROOT, train, write_slice_set
from safetensors.torch import load_file

from cli import main
from datamodules.slice_set import CHANNELS as CHANNELS_OF_SLICE_SETS
from datamodules.slice_set import SliceSet
from lightning_modules.counter_random import Stream, random_normal
from lightning_modules.diffusion import STEPS_PER_IMAGE
from lightning_modules.image_generator import images_to_slices
from lightning_modules.importing import CHANNELS, channel_names, import_checkpoint, read_official
from lightning_modules.networks.diffusion_unet import DiffusionUNet
from lightning_modules.official_diffusion import Flags, unet_arguments
from lightning_modules.official_tensorflow import tensorflow_checkpoint
from lightning_modules.pickled_networks import NetworkRecord, read_network_pickle
from lightning_modules.stylegan import StyleGAN2

REFERENCE = ROOT / "tests" / "reference"
OFFICIAL = REFERENCE / "official_pickles"
PICKLES = sorted(OFFICIAL.glob("*.nosrc.pkl"))
HOSTILE = sorted((OFFICIAL / "hostile").glob("*.pkl"))
IN_FILE = "t1,t2,flair,t1ce,label"
ORDER = [0, 3, 1, 2, 4]  # of our channels in that file
NETWORKS = {"G": "generator", "D": "discriminator", "G_ema": "ema_network"}

by_pickle = pytest.mark.parametrize("path", PICKLES, ids=lambda path: path.name.removesuffix(".nosrc.pkl"))


@pytest.fixture(autouse=True)
def nothing_runs():
    """No test leaves a canary in the temporary folder."""
    canaries = Path(tempfile.gettempdir())
    assert not list(canaries.glob("gan_pickle_canary_*"))
    yield
    assert not list(canaries.glob("gan_pickle_canary_*"))


def expected_of(path):
    return load_file(path.with_name(path.name.replace(".nosrc.pkl", ".expected.safetensors")))


def imported(path, out, channels=IN_FILE):
    """Import, and build what was written: content of the checkpoint, configuration, networks."""
    import_checkpoint(path, out, channels)
    content = torch.load(out / "imported.ckpt", weights_only=True)
    model = yaml.safe_load((out / "model.yaml").read_text())["model"]
    networks = {}
    for name in ("generator", "discriminator", "ema_network"):
        settings = model["init_args"]["generator" if name == "ema_network" else name]
        module, _, class_name = settings["class_path"].rpartition(".")
        network = getattr(importlib.import_module(module), class_name)(**settings["init_args"])
        own = {k.removeprefix(f"{name}."): v for k, v in content["state_dict"].items() if k.startswith(f"{name}.")}
        network.load_state_dict(own)
        networks[name] = network.eval()
    return content, model, networks


def assert_all_arguments_are_stated(model):
    """A configuration that comes before must not decide what the network is, only how it is computed and trained."""
    for name in ("generator", "discriminator"):
        settings = model["init_args"][name]
        module, _, class_name = settings["class_path"].rpartition(".")
        possible = set(inspect.signature(getattr(importlib.import_module(module), class_name)).parameters)
        assert possible - set(settings["init_args"]) <= {"num_half_res", "half_dtype", "freeze_layers"}


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_channels_are_those_of_a_slice_set():
    assert CHANNELS == CHANNELS_OF_SLICE_SETS


def test_there_are_files_to_test():
    assert len(PICKLES) == 3
    assert len(HOSTILE) == 4


@by_pickle
def test_every_parameter_and_buffer_comes_out(path, tmp_path):
    content, _, _ = imported(path, tmp_path / "out", ",".join(CHANNELS))
    expected = expected_of(path)
    theirs = {
        f"{NETWORKS[network]}.{name}": tensor
        for network, _, name, tensor in ((*key.partition("/"), tensor) for key, tensor in expected.items())
        if network in NETWORKS
    }
    assert set(content["state_dict"]) == set(theirs)
    for name, tensor in content["state_dict"].items():
        assert torch.equal(tensor, theirs[name]), name
    augment = read_network_pickle(path.read_bytes())["augment_pipe"].tensors()
    assert {f"augment_pipe/{name}" for name in augment} == {key for key in expected if key.startswith("augment_pipe/")}
    for name, tensor in augment.items():
        assert torch.equal(tensor, expected[f"augment_pipe/{name}"]), name


@by_pickle
@torch.no_grad()
def test_images_and_logits_are_those_of_the_original_with_channels_in_our_order(path, tmp_path):
    _, _, networks = imported(path, tmp_path / "out")
    expected = expected_of(path)
    z, c = expected["in/z"], expected.get("in/c")
    images = networks["ema_network"](z, c)
    assert_close(images, expected["out/img_ema"][:, ORDER])
    assert_close(networks["ema_network"](z, c, truncation_psi=0.5), expected["out/img_ema_trunc"][:, ORDER])
    assert_close(networks["discriminator"](images, c), expected["out/logits"])


@by_pickle
def test_the_checkpoint_says_where_it_is_from(path, tmp_path):
    content, model, _ = imported(path, tmp_path / "out")
    number = 3 if "sg3t" in path.name else 2
    meta = json.loads(path.with_name(path.name.replace(".nosrc.pkl", ".expected.json")).read_text())
    assert content["channels"] == list(CHANNELS)
    assert content["images_seen"] == 0
    assert content["augment_p"] == pytest.approx(meta["augment_p"])
    assert content["imported_from"] == {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "kind": f"network pickle of StyleGAN {number} (PyTorch)",
    }
    assert model["class_path"] == f"lightning_modules.stylegan.StyleGAN{number}"
    assert model["init_args"]["init_from"] == str(tmp_path / "out" / "imported.ckpt")
    assert_all_arguments_are_stated(model)


def test_the_grey_levels_of_the_label_are_those_that_the_user_states(tmp_path):
    arguments = {"checkpoint": PICKLES[0], "channels": IN_FILE}
    for name, levels, expected in (("even", None, [0, 85, 170, 255]), ("paper", "0,51,102,204", [0, 51, 102, 204])):
        import_checkpoint(**arguments, out=tmp_path / name, label_levels=levels)
        model = yaml.safe_load((tmp_path / name / "model.yaml").read_text())["model"]
        assert model["init_args"]["label_levels"] == expected
    with pytest.raises(ValueError, match="--label_levels 0,51,102: expected four increasing numbers"):
        import_checkpoint(**arguments, out=tmp_path / "bad", label_levels="0,51,102")
    assert not (tmp_path / "bad").exists()


def test_an_imported_generator_is_sampled_by_predict(tmp_path):
    _, _, networks = imported(OFFICIAL / "sg2ada_5ch_32.nosrc.pkl", tmp_path / "imported")
    slices = write_slice_set(tmp_path / "slices", size_px=32)
    configs = [ROOT / "configs" / "laptop" / "stylegan2.yaml", tmp_path / "imported" / "model.yaml"]
    train(
        [
            *(f"--config={config}" for config in configs),
            f"--run_dir={tmp_path / 'run'}",
            f"--data.root={slices}",
            "--synthetic_slices=4",
            "--task=predict",
        ]
    )
    model = StyleGAN2(networks["generator"], networks["discriminator"])
    model.ema_network = networks["ema_network"]
    expected = model.generate_slices(torch.arange(4), 0).numpy()
    np.testing.assert_array_equal(SliceSet(tmp_path / "run" / "synthetic").read(range(4)), expected)


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.stem)
def test_hostile_files_are_refused(path, tmp_path):
    reasons = {
        "module_src": r"G is not a network",
        "nested_storage": r"byte 144: in torch\.storage\._load_from_bytes: nested stream, byte 28: .*'posix\.system'",
        "reduce_os_system": r"byte 39: the global 'posix\.system'",
        "truncated": r"byte 133030: a frame of 67260 bytes is announced, but only 39034 remain",
    }
    with pytest.raises(ValueError, match=f"{path.name}: {reasons[path.stem]}"):
        import_checkpoint(path, tmp_path / "out", IN_FILE)
    assert not list(tmp_path.iterdir())


def test_source_text_in_the_file_is_not_executed(tmp_path):
    """The embedded program is replaced by one that would leave a canary; the import is the same."""
    path, changed = OFFICIAL / "sg2ada_5ch_32.nosrc.pkl", tmp_path / "changed.pkl"
    source, canary = b"# source text removed from this copy\n", b"open('gan_pickle_canary_source','w')"
    data = path.read_bytes()
    assert data.count(source) == 1
    changed.write_bytes(data.replace(source, canary.ljust(len(source))))
    theirs, _, _ = imported(path, tmp_path / "original")
    ours, _, _ = imported(changed, tmp_path / "out")
    assert all(torch.equal(tensor, theirs["state_dict"][name]) for name, tensor in ours["state_dict"].items())
    assert not Path("gan_pickle_canary_source").exists()


@by_pickle
def test_cut_off_files_are_refused(path, tmp_path):
    data = path.read_bytes()
    offsets = [*range(0, 60, 7), *random.Random(0).sample(range(len(data)), 25), len(data) - 1]
    for offset in offsets:
        cut = tmp_path / "cut.pkl"
        cut.write_bytes(data[:offset])
        with pytest.raises(ValueError, match=r"cut\.pkl: (byte \d+: |the file is neither)"):
            import_checkpoint(cut, tmp_path / "out", IN_FILE)
    assert [file.name for file in tmp_path.iterdir()] == ["cut.pkl"]


@by_pickle
def test_damaged_files_are_read_or_refused_and_import_nothing(path):
    data, rng = path.read_bytes(), random.Random(1)
    "".encode("raw_unicode_escape")  # decoding a text operand may load this codec of the standard library
    before = set(sys.modules)
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 4, 16))):
            damaged[rng.randrange(rng.choice((3000, len(data))))] = rng.randrange(256)
        try:
            read_official(bytes(damaged))
        except ValueError:
            refused += 1
    assert refused > 20
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "neither a pickle"),
        (b"not a pickle", "neither a pickle"),
        (pickle.dumps(["G", "D"], 4), "neither a dict with G_ema"),
        (pickle.dumps({"G_ema": 1}, 4), "G_ema is not a network"),
        (pickle.dumps(1, 4) + b"x", "1 bytes follow the end"),
    ],
)
def test_other_files_are_refused(data, reason, tmp_path):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=f"file: .*{reason}"):
        import_checkpoint(tmp_path / "file", tmp_path / "out")


# TensorFlow pickles: instances of a class that is named as the original, with the state that its __getstate__ gives.


def pickled_networks(module_name, networks, protocol):
    """Pickle (build function, arguments, variables, components) as objects of `module_name`.Network."""
    module = types.ModuleType(module_name)
    module.Network = type("Network", (), {"__module__": module_name})

    def instance(function, name, arguments, variables, components=None):
        network = module.Network()
        network.__dict__ = {
            "version": 2 if components is None else 3,
            "name": name,
            "static_kwargs": arguments,
            "build_module_src": "open('gan_pickle_canary_source', 'w')",
            "build_func_name": function,
            "variables": [(key, value[()]) for key, value in variables.items()],
        }
        if components is not None:
            network.components = {key: instance(*component, {}) for key, component in components.items()}
        return network

    parts = module_name.split(".")
    parents = {".".join(parts[:depth]): types.ModuleType(parts[0]) for depth in range(1, len(parts))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (parents | {module_name: module}).items():
            patch.setitem(sys.modules, name, value)
        return pickle.dumps(tuple(instance(*network) for network in networks), protocol)


def reference(name):
    meta = json.loads((REFERENCE / "gan" / f"{name}.json").read_text())
    return meta, load_file(REFERENCE / "gan" / f"{name}.safetensors")


def variables_of(tensors, prefix):
    return {key.removeprefix(prefix): t.numpy() for key, t in tensors.items() if key.startswith(prefix)}


def progressive_gan(protocol):
    meta, tensors = reference("pggan_32_5ch")
    g = ("G_paper", "G", meta["g_ctor"], variables_of(tensors, "G/"))
    d = ("D_paper", "D", meta["d_ctor"], variables_of(tensors, "D/"))
    return pickled_networks("tfutil", [g, d, ("G_paper", "Gs", *g[2:])], protocol), tensors


def stylegan1(protocol):
    meta, tensors = reference("stylegan1_32_5ch")
    own = {key: value for key, value in variables_of(tensors, "G/").items() if not key.startswith("G_")}
    mapping, synthesis = (variables_of(tensors, f"G/G_{name}/") for name in ("mapping", "synthesis"))
    both = meta["mapping_ctor"] | meta["synthesis_ctor"]
    components = {
        "synthesis": ("G_synthesis", "G_synthesis", meta["synthesis_ctor"], synthesis),
        "mapping": ("G_mapping", "G_mapping", meta["mapping_ctor"], mapping),
    }
    arguments = {"num_channels": both["num_channels"], "resolution": both["resolution"], "label_size": 0}
    g = ("G_style", "G", arguments, own | {"lod": np.float32(0)}, components)
    d = ("D_basic", "D", meta["d_ctor"], variables_of(tensors, "D/"), {})
    return pickled_networks("dnnlib.tflib.network", [g, d, ("G_style", "Gs", *g[2:])], protocol), tensors


TENSORFLOW = {
    "progressive_gan": (progressive_gan, "lightning_modules.progressive_gan.ProgressiveGAN", "progressive GAN"),
    "stylegan1": (stylegan1, "lightning_modules.stylegan1.StyleGAN1", "StyleGAN 1"),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", TENSORFLOW)
@torch.no_grad()
def test_tensorflow_pickles_make_the_images_and_scores_of_the_original(kind, protocol, tmp_path):
    write, class_path, words = TENSORFLOW[kind]
    data, tensors = write(protocol)
    (tmp_path / "network.pkl").write_bytes(data)
    before = set(sys.modules)
    content, model, networks = imported(tmp_path / "network.pkl", tmp_path / "out")
    assert not {name for name in set(sys.modules) - before if name.startswith(("tfutil", "dnnlib", "tensorflow"))}
    assert not Path("gan_pickle_canary_source").exists()
    assert_close(networks["ema_network"](tensors["in/z"]), tensors["out/lod0/images"][:, ORDER])
    assert_close(networks["discriminator"](tensors["in/images"][:, ORDER]), tensors["out/lod0/scores"])
    assert model["class_path"] == class_path
    assert_all_arguments_are_stated(model)
    assert model["init_args"]["growing"] == {"img_resolution": 32, "lod_initial_resolution": 32}
    assert content["imported_from"]["kind"] == f"network pickle of {words} (TensorFlow)"
    assert content["lod"] == 0
    assert content["augment_p"] is None


def test_the_level_of_detail_of_an_unfinished_network_is_kept():
    g, d, gs = read_network_pickle(progressive_gan(4)[0])
    gs.variables["lod"] = np.asarray(1.5)
    assert tensorflow_checkpoint(g, d, gs).lod == 1.5
    gs.variables["lod"] = np.zeros(2)
    with pytest.raises(ValueError, match="G_paper has no level of detail"):
        tensorflow_checkpoint(g, d, gs)


def test_tensorflow_networks_of_other_models_are_refused():
    networks = [
        (f, n, {}, {"lod": np.float32(0)}, {}) for f, n in (("G_main", "G"), ("D_stylegan2", "D"), ("G_main", "Gs"))
    ]
    with pytest.raises(ValueError, match=r"'G_main', 'D_stylegan2' and 'G_main', but only those of progressive GAN"):
        read_official(pickled_networks("dnnlib.tflib.network", networks, 4))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda g: g.variables.pop("ToRGB_lod0/bias"), "ToRGB_lod0"),
        (lambda g: g.arguments.update(fmap_max=2**19, fmap_base=2**20), "fewer than"),
        (lambda g: g.arguments.update(resolution=2**30), "'resolution' is out of range"),
        (lambda g: g.arguments.update(use_pixelnorm=g), "'use_pixelnorm' is neither"),
        (lambda g: g.variables.update({"8x8/Conv1/weight": np.zeros((3, 3, 1, 1), np.float32)}), "Conv1"),
        (lambda g: g.variables.update({"Conv0_up/weight": np.zeros(3, np.float32)}), "does not fit"),
        (lambda g: g.arguments.update(label_size="many"), "does not fit"),
    ],
)
def test_tensorflow_variables_that_do_not_fit_are_refused(change, reason):
    g, d, gs = read_network_pickle(progressive_gan(4)[0])
    assert all(type(network) is NetworkRecord for network in (g, d, gs))
    change(g)
    with pytest.raises(ValueError, match=reason):
        tensorflow_checkpoint(g, d, gs)


# State dicts of diffusion models.

SMALL = {"img_resolution": 8, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "num_heads": 4}
SMALL |= {"attention_resolutions_px": [8]}


def unet(**arguments):
    """A state dict of our network, which has the names of the original."""
    torch.manual_seed(0)
    return DiffusionUNet(**(SMALL | arguments)).state_dict()


def saved(content, path, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def built(model):
    """Build the network of a configuration that the import wrote."""
    settings = model["init_args"]["network"]
    assert settings["class_path"] == "lightning_modules.networks.diffusion_unet.DiffusionUNet"
    possible = set(inspect.signature(DiffusionUNet).parameters)
    assert possible - set(settings["init_args"]) <= {"dropout", "gradient_checkpointing"}
    return DiffusionUNet(**settings["init_args"]).eval()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("learn_variance", [False, True])
def test_state_dicts_of_diffusion_models_come_in(legacy, learn_variance, tmp_path):
    state = unet(learn_variance=learn_variance)
    path = saved(collections.OrderedDict(state), tmp_path / "ema_0.9999_1200000.pt", legacy)
    out = import_checkpoint(path, tmp_path / "out", IN_FILE, "0,51,102,204", Flags(diffusion_steps=4000))
    content = torch.load(out / "imported.ckpt", weights_only=True)
    order = ORDER + ([index + 5 for index in ORDER] if learn_variance else [])
    expected = state | {
        "input_blocks.0.0.weight": state["input_blocks.0.0.weight"][:, ORDER],
        "out.2.weight": state["out.2.weight"][order],
        "out.2.bias": state["out.2.bias"][order],
    }
    assert set(content["state_dict"]) == {f"network.{name}" for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(content["state_dict"][f"network.{name}"], tensor), name
    assert content["channels"] == list(CHANNELS)
    assert content["imported_from"]["kind"] == "state dict of guided or improved diffusion"
    model = yaml.safe_load((out / "model.yaml").read_text())["model"]
    assert model["class_path"] == "lightning_modules.diffusion.Diffusion"
    built(model)
    del model["init_args"]["network"]
    assert model["init_args"] == {
        "objective": {
            "class_path": "lightning_modules.denoising.ChainObjective",
            "init_args": {
                "chain": {
                    "class_path": "lightning_modules.diffusion_chain.DiffusionChain",
                    "init_args": {"steps": 4000, "schedule": "linear"},
                },
                "predict": "eps",
                "learn_variance": learn_variance,
                "rescale_timesteps": False,
            },
        },
        "sampler": {
            "class_path": "lightning_modules.sampling.Ancestral",
            "init_args": {"steps": 4000, "variance": "learned" if learn_variance else "large"},
        },
        "clip": True,
        "label_levels": [0, 51, 102, 204],
        "init_from": str(out / "imported.ckpt"),
    }


@pytest.mark.parametrize("name", ["guided", "improved"])
@torch.no_grad()
def test_imported_diffusion_networks_predict_as_the_original_with_channels_in_our_order(name, tmp_path):
    with np.load(REFERENCE / "diffusion" / f"unet_tiny_{name}.npz") as arrays:
        reference = {key: torch.tensor(arrays[key]) for key in arrays.files if key != "config"}
    state = {key.removeprefix("param/"): value for key, value in reference.items() if key.startswith("param/")}
    path = saved(state, tmp_path / "model030000.pt")
    import_checkpoint(path, tmp_path / "out", IN_FILE, flags=Flags(num_heads=2))
    network = built(yaml.safe_load((tmp_path / "out" / "model.yaml").read_text())["model"])
    content = torch.load(tmp_path / "out" / "imported.ckpt", weights_only=True)
    network.load_state_dict({key.removeprefix("network."): value for key, value in content["state_dict"].items()})
    ours = network(reference["x"][:, ORDER], reference["t"])
    order = ORDER + [index + 5 for index in ORDER]
    torch.testing.assert_close(ours, reference["y"][:, order], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"img_channels": 3, "learn_variance": True, "condition_width": 4},
        {"use_scale_shift_norm": False, "model_channels": 64},
        {"img_resolution": 32, "channel_mult": [1, 2, 2], "num_res_blocks": 2, "attention_resolutions_px": [16, 8]},
        {"img_resolution": 16, "channel_mult": [1, 1], "resblock_updown": True},
        {"img_resolution": 32, "channel_mult": [1, 1, 3], "resblock_updown": True, "num_res_blocks": 2},
        {"img_resolution": 16, "channel_mult": [2, 1], "conv_resample": False},
        {"img_resolution": 32, "channel_mult": [1, 1, 1], "conv_resample": False, "num_res_blocks": 2},
        {"img_resolution": 32, "model_channels": 64, "channel_mult": [0.5, 1, 1.5], "num_res_blocks": 3},
    ],
)
def test_shapes_tell_what_a_diffusion_network_is(arguments):
    defaults = {name: p.default for name, p in inspect.signature(DiffusionUNet).parameters.items()}
    expected = defaults | SMALL | arguments
    found = unet_arguments(unet(**arguments), Flags())
    assert found == {name: expected[name] for name in found}
    assert set(expected) - set(found) == {"dropout", "gradient_checkpointing"}


def test_what_shapes_do_not_tell_is_stated_by_flags(tmp_path):
    path = saved(unet(num_heads=2, attention_resolutions_px=[]), tmp_path / "ema.pt")
    with pytest.raises(
        ValueError, match=r"no attention that would tell the size of the images: say --flags\.image_size"
    ):
        import_checkpoint(path, tmp_path / "out", IN_FILE)
    words = ["image_size=16", "num_heads=2", "num_head_channels=16", "num_heads_upsample=8", "diffusion_steps=500"]
    words += ["use_new_attention_order=true", "noise_schedule=cosine", "predict_xstart=true", "sigma_small=true"]
    flags = [f"--flags.{word}" for word in (*words, "rescale_timesteps=true")]
    main(["import", str(path), str(tmp_path / "out"), "--channels", IN_FILE, *flags])
    arguments = yaml.safe_load((tmp_path / "out" / "model.yaml").read_text())["model"]["init_args"]
    network, objective = arguments["network"]["init_args"], arguments["objective"]["init_args"]
    for name, value in (("img_resolution", 16), ("num_heads", 2), ("num_head_channels", 16), ("num_heads_upsample", 8)):
        assert network[name] == value
    assert network["use_new_attention_order"] is True
    assert objective["chain"]["init_args"] == {"steps": 500, "schedule": "cosine"}
    assert objective["predict"] == "x0"
    assert objective["rescale_timesteps"] is True
    assert arguments["sampler"]["init_args"] == {"steps": 500, "variance": "small"}


def test_flags_for_another_kind_of_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--flags are those of guided or improved diffusion, but"):
        import_checkpoint(PICKLES[0], tmp_path / "out", IN_FILE, flags=Flags(image_size=32))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("middle_block.1.proj_out.bias"), "middle_block.1.proj_out.bias is missing"),
        (lambda state: state.update({"encoder.weight": torch.zeros(2)}), "'encoder.weight' is unknown"),
        (lambda state: state.update({"out.0.weight": torch.zeros(64)}), r"out.0.weight is \(64,\) instead of \(32,\)"),
        (lambda state: state.update({"time_embed.0.weight": torch.zeros(8, 0)}), "time_embed.0.weight is missing or"),
        (lambda state: state.pop("input_blocks.1.0.in_layers.2.weight"), "input_blocks.1.0.in_layers.2.weight is miss"),
    ],
)
def test_diffusion_weights_that_do_not_fit_are_refused(change, reason, tmp_path):
    state = unet()
    change(state)
    with pytest.raises(ValueError, match=reason):
        import_checkpoint(saved(state, tmp_path / "model.pt"), tmp_path / "out", IN_FILE)


def test_an_imported_diffusion_model_makes_the_images_of_the_original_from_the_same_noise(tmp_path):
    """The reverse process is written out here as Ho et al. 2020 do, algorithm 2, with clipped images."""
    torch.manual_seed(0)
    network = DiffusionUNet(**SMALL)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    steps, count, seed = 25, 3, 0
    path = saved(network.state_dict(), tmp_path / "ema.pt")
    import_checkpoint(path, tmp_path / "imported", ",".join(CHANNELS), flags=Flags(diffusion_steps=steps))
    slices = write_slice_set(tmp_path / "slices", size_px=8)
    configs = [ROOT / "configs" / "laptop" / "diffusion.yaml", tmp_path / "imported" / "model.yaml"]
    train(
        [
            *(f"--config={config}" for config in configs),
            f"--run_dir={tmp_path / 'run'}",
            f"--data.root={slices}",
            f"--synthetic_slices={count}",
            "--task=predict",
        ]
    )
    betas = torch.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1), kept[:-1]])
    posterior = betas * (1 - before) / (1 - kept)
    variance = torch.cat([posterior[1:2], betas[1:]])  # "fixed large"
    index = torch.arange(count)
    x = random_normal(seed, Stream.EMISSION_LATENT, index, (5, 8, 8))
    with torch.no_grad():
        for k, t in enumerate(reversed(range(steps))):
            noise = network(x, torch.full((count,), float(t)))
            image = ((x - (1 - kept[t]).sqrt() * noise) / kept[t].sqrt()).clamp(-1, 1)
            mean = betas[t] * before[t].sqrt() / (1 - kept[t]) * image
            mean = mean + (1 - before[t]) * (1 - betas[t]).sqrt() / (1 - kept[t]) * x
            z = random_normal(seed, Stream.EMISSION_NOISE, index * STEPS_PER_IMAGE + k, (5, 8, 8))
            x = (mean + (variance[t].sqrt() * z if t else 0)).float()
    expected = images_to_slices(x).int()
    made = torch.tensor(SliceSet(tmp_path / "run" / "synthetic").read(range(count))).int()
    assert int((made[:, :4] - expected[:, :4]).abs().max()) <= 1  # grey levels are rounded
    assert (made[:, 4] == expected[:, 4]).float().mean() > 0.99
    assert float(expected[:, :4].float().std()) > 20


class Malice:
    def __reduce__(self):
        return os.system, (f"touch {tempfile.gettempdir()}/gan_pickle_canary_pt",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({**unet(), "payload": Malice()}, rf"byte \d+: the global '{os.name}\.system'"),
        ({**unet(), "epoch": 3}, "not a state dict, tensors by name"),
        ({"weight": torch.zeros(3)}, "not one of guided or improved diffusion"),
        ({**unet(img_channels=6), "out.2.weight": torch.zeros(3, 32, 3, 3)}, "enlarge images"),
        (torch.zeros(3), "not a state dict"),
    ],
    ids=["hostile", "number", "other", "upsampler", "tensor"],
)
def test_other_files_of_torch_save_are_refused(legacy, content, reason, tmp_path):
    path = saved(content, tmp_path / "model.pt", legacy)
    with pytest.raises(ValueError, match=rf"model\.pt: .*{reason}"):
        import_checkpoint(path, tmp_path / "out", IN_FILE)
    assert not (tmp_path / "out").exists()


# Channels and the folder.


@pytest.mark.parametrize(
    ("given", "count", "names"),
    [
        ("t1,t2,flair,t1ce,label", 5, ["T1", "T2", "FLAIR", "T1ce", "label"]),
        ("T1, T1CE, T2, Flair, LABEL", 5, list(CHANNELS)),
        ("red,green,blue", 3, ["red", "green", "blue"]),
        ("flair,t2", 2, ["FLAIR", "T2"]),
        (None, 3, ["channel0", "channel1", "channel2"]),
    ],
)
def test_channels_are_named(given, count, names):
    assert channel_names(given, count) == names


@pytest.mark.parametrize(
    ("given", "count", "reason"),
    [
        (None, 5, "say which is which, .* --channels t1,t1ce,t2,flair,label"),
        ("t1,t2,flair,label", 5, "the images have 5 channels, but --channels names 4"),
        ("red,green,blue", 5, "names 3"),
        ("t1,T1,t2,flair,label", 5, "names a channel twice"),
        ("t1,t2,flair,t1ce,seg", 5, "names seg, but knows t1, t1ce, t2, flair, label"),
        ("red,red,blue", 3, "names a channel twice"),
    ],
)
def test_channels_that_do_not_fit_are_refused(given, count, reason):
    with pytest.raises(ValueError, match=reason):
        channel_names(given, count)


def test_images_of_other_channels_keep_their_order(tmp_path):
    state = unet(img_channels=3)
    import_checkpoint(saved(state, tmp_path / "rgb.pt"), tmp_path / "out")
    content = torch.load(tmp_path / "out" / "imported.ckpt", weights_only=True)
    assert content["channels"] == ["channel0", "channel1", "channel2"]
    assert torch.equal(content["state_dict"]["network.out.2.weight"], state["out.2.weight"])


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="new or empty folder"):
        import_checkpoint(PICKLES[0], tmp_path / "out", IN_FILE)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    import_checkpoint(saved(unet(), tmp_path / "ema.pt"), tmp_path / "out", IN_FILE)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ema.pt", "out"]
    assert (tmp_path / "out" / "imported.ckpt").is_file()


def test_a_failed_import_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(content, file):
        file.write(b"half")
        raise OSError("no space left")

    path = saved(unet(), tmp_path / "ema.pt")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        import_checkpoint(path, tmp_path / "out", IN_FILE)
    assert [file.name for file in tmp_path.iterdir()] == ["ema.pt"]


def test_the_command_imports_and_says_what_is_wrong_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=rf"^standin import: Expected a checkpoint at {tmp_path}/missing, but .*"):
        main(["import", str(tmp_path / "missing"), str(tmp_path / "out")])
    main(["import", str(PICKLES[0]), str(tmp_path / "out"), "--channels", IN_FILE])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["imported.ckpt", "model.yaml"]
    assert io.BytesIO((tmp_path / "out" / "imported.ckpt").read_bytes()).read(4) == b"PK\x03\x04"
