from collections import Counter
from itertools import chain

import numpy as np
import pandas as pd
import pytest

from datamodules.samplers import MixedOrder, StreamOrder, StreamSampler, volume_batches


def test_stream_shows_every_slice_equally_often():
    order = StreamOrder(7, seed=0)
    seen = order(range(21))
    assert Counter(seen.tolist()) == dict.fromkeys(range(7), 3)
    assert sorted(seen[:7]) == sorted(seen[7:14]) == list(range(7))
    assert seen[:7].tolist() != seen[7:14].tolist()


def test_a_position_can_be_looked_up_without_those_before_it():
    assert StreamOrder(7, seed=1)([16])[0] == StreamOrder(7, seed=1)(range(21))[16]


def mixed(seed=0, batch_size=8):
    groups = [np.arange(5), np.arange(5, 25), np.arange(25, 28)]
    return MixedOrder(groups, [0.25, 0.625, 0.125], batch_size, seed)


def test_every_batch_has_the_share_of_each_group():
    seen = mixed()(range(80 * 8)).reshape(80, 8)
    counts = np.stack([(seen < 5).sum(1), ((seen >= 5) & (seen < 25)).sum(1), (seen >= 25).sum(1)])
    assert (counts == [[2], [5], [1]]).all()
    places = np.flatnonzero(seen.ravel() < 5) % 8
    assert set(places) == set(range(8))  # and so all ranks get slices of all groups


@pytest.mark.parametrize("share", [0.05, 1 / 3, 0.9])
def test_shares_that_do_not_divide_the_batch_hold_over_many(share):
    order = MixedOrder([np.arange(3), np.arange(3, 10)], [share, 1 - share], batch_size=7, seed=1)
    first = (order(range(700)) < 3).reshape(100, 7).sum(1)
    assert set(first.tolist()) <= {int(7 * share), int(7 * share) + 1}
    assert (np.abs(first.cumsum() - 7 * share * np.arange(1, 101)) < 1).all()


def test_slices_of_a_group_come_equally_often():
    seen = mixed()(range(160))  # 40, 100 and 20 of the groups: 8, 5 and 6 2/3 passes
    assert Counter(seen[seen < 5].tolist()) == dict.fromkeys(range(5), 8)
    assert Counter(seen[(seen >= 5) & (seen < 25)].tolist()) == dict.fromkeys(range(5, 25), 5)
    assert set(Counter(seen[seen >= 25].tolist()).values()) <= {6, 7}


def test_a_mixture_depends_on_seed_and_position_alone():
    whole = mixed()(range(200))
    positions = [171, 3, 100, 4, 199]
    assert mixed()(positions).tolist() == whole[positions].tolist()
    assert mixed(seed=1)(range(200)).tolist() != whole.tolist()
    ranks = [mixed()(range(rank, 200, 2)) for rank in (0, 1)]
    assert np.stack(ranks, axis=1).ravel().tolist() == whole.tolist()


def test_epochs_follow_each_other_and_ranks_share_each_batch():
    one = StreamSampler(8)
    one.set_epoch(3)
    assert list(one) == list(range(24, 32))
    ranks = [StreamSampler(8, rank, 2) for rank in (0, 1)]
    for sampler in ranks:
        sampler.set_epoch(3)
    assert [list(sampler) for sampler in ranks] == [[24, 26, 28, 30], [25, 27, 29, 31]]
    assert len(ranks[0]) == 4


def test_epoch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="multiple of 2 processes"):
        StreamSampler(9, 0, 2)


def index_of(sizes: dict[str, int]) -> pd.DataFrame:
    rows = [{"patient": p, "volume": p, "z": z} for p, n in sizes.items() for z in range(n)]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_every_slice_once_and_keeps_patients_together(world_size):
    index = index_of({"a": 5, "b": 9, "c": 2, "d": 4})
    dealt = [list(chain(*volume_batches(index, 4, rank, world_size))) for rank in range(world_size)]
    assert sorted(chain(*dealt)) == list(range(20))
    patients = [set(index["patient"].iloc[positions]) for positions in dealt]
    assert sum(len(p) for p in patients) == 4
    for positions in dealt:
        rows = index.iloc[positions][["patient", "z"]]
        assert rows.to_numpy().tolist() == rows.sort_values(["patient", "z"]).to_numpy().tolist()
    loads = [len(positions) for positions in dealt]
    assert max(loads) <= max(9, -(-20 // world_size) + 5)


def test_a_rank_without_patients_gets_one_empty_batch():
    assert volume_batches(index_of({"a": 3}), 2, 1, 2) == [[]]


def test_batches_have_at_most_the_size_asked_for():
    batches = volume_batches(index_of({"a": 5}), 2)
    assert [len(b) for b in batches] == [2, 2, 1]
    assert np.concatenate(batches).size == 5
