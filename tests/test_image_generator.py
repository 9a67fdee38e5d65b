import pytest
import torch

from callbacks.ema import EMA
from lightning_modules.image_generator import ImageGenerator, images_to_slices, slices_to_images


def test_slices_survive_the_way_through_images():
    slices = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 5, 1, 1)
    slices[:, 4] %= 4
    images = slices_to_images(slices)
    assert float(images.min()) == -1
    assert float(images.max()) == 1
    assert torch.equal(images_to_slices(images), slices)


def test_classes_are_evenly_spaced_intensities():
    label = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 2, 2)
    images = slices_to_images(torch.cat([label] * 5, dim=1))
    torch.testing.assert_close(images[0, 4].flatten(), torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]))


def test_generated_label_becomes_the_nearest_class_and_values_are_clamped():
    image = torch.zeros(1, 5, 1, 6)
    image[0, 0, 0] = torch.tensor([-3.0, -1.0, 0.0, 0.004, 1.0, 2.0])
    image[0, 4, 0] = torch.tensor([-3.0, -0.68, -0.65, 0.01, 0.66, 0.68])
    slices = images_to_slices(image)
    assert slices[0, 0, 0].tolist() == [0, 0, 128, 128, 255, 255]
    assert slices[0, 4, 0].tolist() == [0, 0, 1, 2, 2, 3]


def test_classes_are_learned_as_the_grey_levels_that_the_user_gives():
    levels = [0, 51, 102, 204]
    slices = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 2, 2).repeat(1, 5, 1, 1)
    images = slices_to_images(slices, levels)
    torch.testing.assert_close((images[0, 4].flatten() + 1) * 127.5, torch.tensor([0.0, 51, 102, 204]))
    assert torch.equal(images_to_slices(images, levels), slices)
    images[:, 4] = torch.tensor([[25, 26], [152, 154]]) / 127.5 - 1
    assert images_to_slices(images, levels)[0, 4].flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("levels", [(0, 85, 170), (0, 85, 85, 255), (0, 170, 85, 255), (0, 51, 102, 256)])
def test_grey_levels_that_no_label_can_have_are_refused(levels):
    with pytest.raises(ValueError, match="Expected 4 label_levels from 0 to 255, increasing"):
        Toy(label_levels=levels)


class Toy(ImageGenerator):
    """One weight that starts at 0."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.network.weight)

    @property
    def sampled_network(self):
        return self.network

    def generate(self, index, seed):
        return index


@pytest.mark.parametrize(
    ("rampup", "images_before", "expected"),
    [(None, 0, 0.5), (0.5, 8, 0.75), (0.5, 1000, 0.5), (0.05, 0, 1.0)],
    ids=["no ramp", "ramp: half-life 4 images", "ramp is over", "first batch"],
)
def test_average_moves_towards_the_weights_by_the_half_life(rampup, images_before, expected):
    model, ema = Toy(), EMA(halflife_kimg=0.008, rampup=rampup)
    average = model.start_ema()
    torch.nn.init.ones_(model.network.weight)
    model.images_seen = images_before
    ema.on_train_start(None, model)
    model.images_seen += 8
    ema.on_train_batch_end(None, model, None, None, 0)
    assert float(average.weight) == pytest.approx(expected)
    assert not average.weight.requires_grad
    ema.on_before_optimizer_step(None, model, None)  # the clock has not moved
    assert float(average.weight) == pytest.approx(expected)


def test_checkpoint_with_an_average_makes_room_for_it():
    model, other = Toy(), Toy()
    model.start_ema()
    model.images_seen = 24
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert other.images_seen == 24


def test_emission_without_a_plan_says_what_is_missing():
    with pytest.raises(ValueError, match=r"add callbacks\.SyntheticDataset"):
        Toy().predict_dataloader()


def test_ema_of_zero_half_life_is_refused():
    with pytest.raises(ValueError, match="halflife_kimg to be positive"):
        EMA(halflife_kimg=0)
