"""UPerNet with a Swin transformer against `transformers`, which it is made of, and published numbers."""

import pytest
import torch
import torch.nn.functional as F
from fake_slices import ROOT
from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

from lightning_modules.network_trial import heads_of
from lightning_modules.networks.upernet import SwinUPerNet

TINY = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "head_channels": 16,
        "auxiliary_channels": 8}  # fmt: skip


def original(drop_path_rate: float) -> UperNetForSemanticSegmentation:
    """The network of `transformers` in the size of TINY."""
    torch.manual_seed(0)
    swin = SwinConfig(
        num_channels=4, embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window_size=4,
        drop_path_rate=drop_path_rate, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=swin, num_labels=4, hidden_size=16, auxiliary_channels=8)
    )


def test_heads_are_those_of_transformers():
    torch.manual_seed(0)
    ours, theirs = SwinUPerNet(**TINY, drop_path_rate=0.0, head_dropout=0.0), original(drop_path_rate=0.0)
    images, label = torch.randn(2, 4, 40, 40), torch.randint(0, 4, (2, 40, 40))

    in_training = ours(images)
    assert in_training.shape == (2, 2, 4, 40, 40)
    main, auxiliary = in_training.unbind(1)
    loss = F.cross_entropy(main, label) + 0.4 * F.cross_entropy(auxiliary, label)
    torch.testing.assert_close(loss, theirs(images, labels=label).loss)
    ours.eval()
    theirs.eval()  # both have followed the same batch with their statistics
    torch.testing.assert_close(ours(images), theirs(images).logits)


@pytest.mark.parametrize(
    ("depths", "embed_dim", "num_heads", "million"),
    [
        ((2, 2, 6, 2), 96, (3, 6, 12, 24), 60),
        ((2, 2, 18, 2), 96, (3, 6, 12, 24), 81),
        ((2, 2, 18, 2), 128, (4, 8, 16, 32), 121),
    ],
    ids=["T", "S", "B"],
)
def test_numbers_of_parameters_are_those_of_liu_et_al(depths, embed_dim, num_heads, million):
    # Table 3 (ADE20K): three channels, 150 classes.
    with torch.device("meta"):
        network = SwinUPerNet(3, 150, embed_dim, depths, num_heads)
    assert round(sum(weight.numel() for weight in network.parameters()) / 1e6) == million


def test_the_paper_has_swin_b():
    with torch.device("meta"):
        ours, theirs = SwinUPerNet(), SwinUPerNet(4, 4, 128, (2, 2, 18, 2), (4, 8, 16, 32), 7, 4, 0.3, 512, 256)
    shapes = [{name: weight.shape for name, weight in net.named_parameters()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_every_parameter_has_a_gradient():
    network = SwinUPerNet(**TINY)  # DDP would stop at one without
    network(torch.randn(2, 4, 32, 32)).square().sum().backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("size_px", [16, 20, 64, 240])
def test_slices_of_any_size_are_taken(size_px):
    assert heads_of(SwinUPerNet(**TINY), (2, 4, size_px, size_px), 4) == 2


def test_dropout_comes_before_both_classifiers_and_in_training_only():
    torch.manual_seed(0)
    network = SwinUPerNet(**TINY, drop_path_rate=0.0, head_dropout=1.0)
    logits = network(torch.randn(2, 4, 32, 32))
    for head, module in zip(logits.unbind(1), (network.head, network.auxiliary_head), strict=True):
        bias = module.classifier[1].bias.reshape(1, 4, 1, 1)
        torch.testing.assert_close(head, bias.expand_as(head))
    assert (network.eval()(torch.randn(2, 4, 32, 32)).std(dim=(2, 3)) > 0).all()


def test_attention_heads_that_do_not_divide_the_features_are_refused():
    with pytest.raises(ValueError, match=r"got depths \[2, 2, 6, 2\] and num_heads \[3, 6, 12, 24\] for the features"):
        SwinUPerNet(embed_dim=128, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))


def test_transformers_is_imported_for_this_network_alone():
    code = {
        path.name: path.read_text()
        for name in ("lightning_modules", "callbacks")
        for path in (ROOT / name).rglob("*.py")
    }
    assert [name for name, text in code.items() if "transformers import" in text] == ["upernet.py"]
    assert [name for name, text in code.items() if "networks.upernet" in text] == []
