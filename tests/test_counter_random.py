import pytest
import torch
from scipy import stats

from lightning_modules.counter_random import Stream, philox, random_normal, random_uniform, random_words

# The known answers that Salmon et al. publish with Random123.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox([torch.tensor([c]) for c in counter], key)
    assert tuple(int(word) for word in words) == expected


def test_a_sample_does_not_depend_on_its_batch():
    whole = random_normal(7, Stream.NOISE, torch.arange(100), (3, 5))
    parts = [random_normal(7, Stream.NOISE, torch.tensor(i), (3, 5)) for i in ([41], [99, 0, 41])]
    assert torch.equal(parts[0][0], whole[41])
    assert torch.equal(parts[1], whole[[99, 0, 41]])


def test_a_longer_sample_begins_with_the_shorter_one():
    index = torch.arange(4)
    assert torch.equal(random_words(1, Stream.LATENT, index, 9)[:, :5], random_words(1, Stream.LATENT, index, 5))


def test_seeds_streams_and_positions_beyond_32_bits_differ():
    index = torch.tensor([5, 5 + (1 << 32)])
    base = random_words(1, Stream.LATENT, index, 4)
    others = [
        random_words(2, Stream.LATENT, index, 4),
        random_words(1 + (1 << 40), Stream.LATENT, index, 4),
        random_words(1, Stream.NOISE, index, 4),
    ]
    assert not torch.equal(base[0], base[1])
    assert all(not torch.equal(base, other) for other in others)


def test_distributions():
    index = torch.arange(500)
    normal = random_normal(3, Stream.LATENT, index, (41,)).flatten().double()
    uniform = random_uniform(3, Stream.LATENT, index, 41).flatten().double()
    assert stats.kstest(normal, "norm").pvalue > 0.01
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    pairs = random_normal(3, Stream.LATENT, index, (40,))
    assert abs(float(torch.corrcoef(pairs.T[:2])[0, 1])) < 0.15


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed from 0"):
        random_words(-1, Stream.LATENT, torch.arange(2), 4)
