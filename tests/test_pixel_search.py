"""`standin memorization`: tables against brute force, restart, shares, memory, and what is refused."""

import json
import weakref

import numpy as np
import pandas as pd
import pytest
from fake_sets import real_set
from scipy.stats import pearsonr

from datamodules.slice_set import SliceSet, class_pixels, finish_slice_set, save_shard
from evaluation import pixel_search
from evaluation.detectors import thinned
from evaluation.memorization import memorization, training_and_held_out
from evaluation.pixel_search import PixelSearch, pixel_values, search_slices
from metrics.correlation_search import Search
from metrics.pixel_loader import PixelLoader

SIDES = {"A": "train", "B": "train", "C": "train", "D": "val", "E": "test"}
NO_SHIFT = PixelSearch(k=3, mirror=True, max_shift_px=0)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return SliceSet(real_set(tmp_path_factory.mktemp("real") / "set", SIDES))


@pytest.fixture(scope="module")
def training(real):
    return real.subset((real.index["split"] == "train").to_numpy())


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory, real):
    """Noise, a copy of training slice 7, its mirror image, the same shifted by 2 and -1 px, and a blank slice."""
    root = tmp_path_factory.mktemp("synthetic") / "set"
    root.mkdir()
    rng = np.random.default_rng(0)
    original = real.read([7])[0]
    slices = rng.integers(0, 256, (9, 5, 16, 16), np.uint8)
    slices[:, 4] &= 3
    slices[4], slices[5] = original, original[:, ::-1]
    slices[6] = np.roll(original, (2, -1), (1, 2))
    slices[7] = 0
    save_shard(root / "slices-00000.npy", slices)
    name = [f"s{i}" for i in range(9)]
    index = class_pixels(slices[:, 4]).assign(patient=name, volume=name, z=0, split="train")
    description = {"kind": "synthetic", "spacing_mm": 1.0, "patients_seen": ["A", "B", "C"]}
    finish_slice_set(root, index, description)
    return SliceSet(root)


def pick(table, position, score, rank=1):
    rows = table[(table["position"] == position) & (table["score"] == score) & (table["rank"] == rank)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_copies_are_found_with_what_was_done_to_them(synthetic, training, tmp_path):
    table = search_slices("synthetic", synthetic, training, tmp_path, PixelSearch(k=2, max_shift_px=2))
    patient = training.index["patient"][7]
    for position, change in ((4, (False, 0, 0)), (5, (True, 0, 0)), (6, (False, -2, 1))):
        for score in ("T1", "label", "all", "brain all", "distance FLAIR", "distance all + label"):
            row = pick(table, position, score)
            assert (row["nearest"], row["nearest_patient"]) == (7, patient)
            assert (row["mirrored"], row["rows_px"], row["columns_px"]) == change
            assert row["value"] == pytest.approx(0.0 if "distance" in score else 1.0, abs=1e-15)
    blank = table[(table["position"] == 7) & ~table["score"].str.startswith("distance")]
    assert (blank["rank"] == 1).all()
    assert (blank["nearest"] == -1).all()
    assert blank["value"].isna().all()
    assert blank["nearest_patient"].isna().all()
    assert not blank["mirrored"].any()
    assert set(table["position"]) == set(range(9))


def test_every_row_is_the_value_of_its_pair(synthetic, training, tmp_path):
    table = search_slices("synthetic", synthetic, training, tmp_path, NO_SHIFT)
    queries, references = synthetic.read(range(9)).astype(float), training.read(range(len(training))).astype(float)
    for channel, name in enumerate(("T1", "T1ce", "T2", "FLAIR")):
        for position in (0, 5):
            images = {False: queries[position, channel], True: queries[position, channel, ::-1]}
            r = np.max([[pearsonr(x.ravel(), y[channel].ravel())[0] for y in references] for x in images.values()], 0)
            rows = table[(table["position"] == position) & (table["score"] == name)]
            np.testing.assert_allclose(rows["value"], -np.sort(-r)[:3], rtol=0, atol=1e-13)
            np.testing.assert_array_equal(rows["rank"], [1, 2, 3])
            rows = table[(table["position"] == position) & (table["score"] == f"distance {name}")]
            for _, row in rows.iterrows():
                difference = images[row["mirrored"]] - references[row["nearest"], channel]
                assert row["value"] == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-14)


def test_the_table_does_not_depend_on_memory_or_shards(synthetic, training, tmp_path, monkeypatch):
    whole = search_slices("synthetic", synthetic, training, tmp_path / "whole", NO_SHIFT)
    monkeypatch.setattr(pixel_search, "TILE", {"cpu": (4, 4)})
    monkeypatch.setattr(pixel_search, "STRIPE_BYTES", {"cpu": 1})
    monkeypatch.setattr(pixel_search, "CHUNK_BYTES", 1)
    load, in_memory = PixelLoader.load, []

    def load_alone(self, positions):
        assert not any(share() for share in in_memory)  # the share before was let go
        pixels = load(self, positions)
        in_memory.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr(PixelLoader, "load", load_alone)
    little = PixelSearch(k=3, max_shift_px=0, memory_gib=1.4e-5)
    divided = search_slices("synthetic", synthetic, training, tmp_path / "little", little)
    plan = json.loads(next((tmp_path / "little").rglob("plan.json")).read_text())
    assert plan == {"share": 2, "block": 1}
    assert len(in_memory) == 5
    pd.testing.assert_frame_equal(divided, whole)
    shards = [PixelSearch(k=3, max_shift_px=0, memory_gib=1.4e-5, shard=n, shards=2) for n in range(2)]
    assert search_slices("synthetic", synthetic, training, tmp_path / "shards", shards[1]) is None
    joined = search_slices("synthetic", synthetic, training, tmp_path / "shards", shards[0])
    pd.testing.assert_frame_equal(joined, whole)


def test_an_interrupted_search_goes_on_where_it_stopped(synthetic, training, tmp_path, monkeypatch):
    whole = search_slices("synthetic", synthetic, training, tmp_path / "whole", NO_SHIFT)
    monkeypatch.setattr(pixel_search, "TILE", {"cpu": (2048, 4)})
    monkeypatch.setattr(pixel_search, "SECONDS_BETWEEN_SAVES", 0.0)
    compare, compared = Search.compare, []

    def until_the_third_block(self, block, first):
        if len(compared) == 3:
            raise KeyboardInterrupt
        compared.append(first)
        compare(self, block, first)

    monkeypatch.setattr(Search, "compare", until_the_third_block)
    with pytest.raises(KeyboardInterrupt):
        search_slices("synthetic", synthetic, training, tmp_path, NO_SHIFT)
    assert compared == [0, 4, 8]
    after = []
    monkeypatch.setattr(
        Search, "compare", lambda self, block, first: after.append(first) or compare(self, block, first)
    )
    pd.testing.assert_frame_equal(search_slices("synthetic", synthetic, training, tmp_path, NO_SHIFT), whole)
    assert after == [12, 16]
    search_slices("synthetic", synthetic, training, tmp_path, NO_SHIFT)
    assert after == [12, 16]
    search_slices("synthetic", synthetic, training, tmp_path, PixelSearch(k=2, max_shift_px=0))
    assert after[2:] == [0, 4, 8, 12, 16]  # other settings begin anew


def test_the_command_writes_tables_with_both_nulls(synthetic, real, tmp_path, capsys):
    out = tmp_path / "out"
    memorization(synthetic.root, real.root, out, k=1, max_shift_px=0, false_alarm_rate=0.1)
    assert str(out) in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        ".search",
        "correlations.png",
        "judgement.csv",
        "nearest-held-out.parquet",
        "nearest-synthetic.parquet",
        "nearest-train.parquet",
        "pairs.png",
        "patients.csv",
        "search.json",
        "sensitivity.csv",
        "suspicious.csv",
    ]
    tables = {name: pd.read_parquet(out / f"nearest-{name}.parquet") for name in ("synthetic", "held-out", "train")}
    assert pick(tables["synthetic"], 4, "all")["value"] == pytest.approx(1.0, abs=1e-15)
    training, held_out = training_and_held_out(synthetic, real)
    assert (training.patients, held_out.patients) == (["A", "B", "C"], ["D", "E"])
    for name, slices in (("held-out", held_out), ("train", training)):
        rows = tables[name][tables[name]["score"] == "all"]
        assert list(rows["position"]) == list(range(len(slices)))
        own = slices.index["patient"].to_numpy()
        assert (rows["nearest_patient"].astype(str).to_numpy() != own).all()
        assert (training.index["patient"].to_numpy()[rows["nearest"]] == rows["nearest_patient"]).all()
    found = pd.read_csv(out / "sensitivity.csv").set_index("kind")
    assert found.loc["exact", ["rate", "false_alarm_rate", "slices"]].tolist() == [1.0, 0.1, 18]  # all there are
    content = json.loads((out / "search.json").read_text())
    assert content["sets"]["held_out"]["patients"] == ["D", "E"]


def test_the_last_of_several_shards_writes_the_tables(synthetic, real, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pixel_search, "TILE", {"cpu": (4, 4)})
    monkeypatch.setattr(pixel_search, "STRIPE_BYTES", {"cpu": 1})
    monkeypatch.setattr(pixel_search, "CHUNK_BYTES", 1)
    options = {"k": 1, "max_shift_px": 0, "false_alarm_rate": 0.1}
    for shard, says in (
        (1, "other shards are still at work on synthetic, held-out, train"),
        (0, "2 held-out patients"),
    ):
        memorization(synthetic.root, real.root, tmp_path, **options, shard=shard, shards=2, memory_gib=1.4e-5)
        assert says in capsys.readouterr().out
    memorization(synthetic.root, real.root, tmp_path / "whole", **options)
    for name in ("synthetic", "held-out", "train"):
        tables = [pd.read_parquet(folder / f"nearest-{name}.parquet") for folder in (tmp_path, tmp_path / "whole")]
        pd.testing.assert_frame_equal(*tables)


def test_slices_in_memory_get_the_values_of_the_table(synthetic, training, tmp_path):
    table = search_slices("synthetic", synthetic, training, tmp_path, NO_SHIFT)
    first = table[table["rank"] == 1].pivot(index="position", columns="score", values="value")
    found = pixel_values(training, NO_SHIFT, tmp_path)(synthetic.read(range(9)))
    assert list(found.columns) == list(table["score"].cat.categories)
    np.testing.assert_array_equal(found, first[found.columns])
    shifted = pixel_values(training, PixelSearch(1, mirror=False, max_shift_px=1), tmp_path)(synthetic.read(range(9)))
    assert (shifted["all"] > found["all"]).any()  # what is known of one search is not taken for another


def test_nulls_are_thinned_evenly(training):
    assert thinned(training, None) is training
    assert thinned(training, 100) is training
    assert list(thinned(training, 3).index["row"]) == [0, 8, 17]


def test_what_cannot_be_searched_is_refused(synthetic, real, training, tmp_path):
    with pytest.raises(ValueError, match=r"memory_gib=9.99e-07 is too little.*16 x 16"):
        search_slices("s", synthetic, training, tmp_path, PixelSearch(memory_gib=1e-6))
    with pytest.raises(ValueError, match=r"expected training slices"):
        search_slices("s", synthetic, training.subset([]), tmp_path, NO_SHIFT)
    large = SliceSet(real_set(tmp_path / "large", {"A": "train"}, size=32))
    with pytest.raises(ValueError, match=r"slices of one size.*16, 16.*32, 32"):
        search_slices("s", synthetic, large, tmp_path, NO_SHIFT)
    with pytest.raises(ValueError, match=r"has not seen"):
        training_and_held_out(synthetic, training)
    with pytest.raises(ValueError, match=r"patients that the generator .* has seen"):
        training_and_held_out(synthetic, real.subset((real.index["split"] != "train").to_numpy()))
    with pytest.raises(ValueError, match=r"expected patients_seen"):
        memorization(real.root, real.root, tmp_path / "out")
    for wrong, text in (
        ({"k": 0}, "k=0"),
        ({"device": "meta"}, "device=meta"),
        ({"max_shift_px": -1}, "max_shift_px=-1"),
        ({"shard": 2}, "shard=2"),
    ):
        with pytest.raises(ValueError, match=text):
            PixelSearch(**wrong)
