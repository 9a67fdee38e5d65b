"""Nearest embeddings: exact products, ties, independence of blocks, the table of a search."""

import math

import numpy as np
import pytest

import evaluation.embedding_search as embedding_search
from datamodules.slice_set import SliceSet
from evaluation.embedding_search import EmbeddingIndex, embed_set, nearest_embedding


def unit(count, width=64, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def on_grid(vectors):
    return np.rint(vectors.astype(np.float64) * 2**25) / 2**25


def embed(slices):
    """Means of the quarters of all channels."""
    n, channels, height, width = slices.shape
    parts = slices.reshape(n, channels, 2, height // 2, 2, width // 2).mean(axis=(3, 5)).reshape(n, -1) + 1.0
    return (parts / np.linalg.norm(parts, axis=1, keepdims=True)).astype(np.float32)


def test_cosines_are_exact():
    queries, references = unit(20), unit(50, seed=1)
    found = nearest_embedding(queries, references)
    for query, cosine, index in zip(on_grid(queries), found.cosine, found.index, strict=True):
        exact = [math.fsum(query * reference) for reference in on_grid(references)]  # products fit into 50 bits
        assert cosine == max(exact)
        assert index == int(np.argmax(exact))
    rounding = np.abs(found.cosine - (queries.astype(np.float64) @ references.T.astype(np.float64)).max(axis=1))
    assert rounding.max() <= math.sqrt(64) * 2**-25


def test_no_bit_depends_on_blocks_or_the_order_of_summation(monkeypatch):
    queries, references = unit(300), unit(500, seed=1)
    whole = nearest_embedding(queries, references)
    shuffled = np.random.default_rng(0).permutation(64)
    other_order = nearest_embedding(queries[:, shuffled], references[:, shuffled])
    monkeypatch.setattr(embedding_search, "QUERY_ROWS", 7)
    monkeypatch.setattr(embedding_search, "REFERENCE_ROWS", 13)
    blocks = nearest_embedding(queries, references)
    for other in (blocks, other_order):
        assert np.array_equal(other.cosine, whole.cosine)
        assert np.array_equal(other.index, whole.index)


@pytest.mark.parametrize("rows", [2, 100])
def test_equal_cosines_give_the_lowest_position(rows, monkeypatch):
    monkeypatch.setattr(embedding_search, "REFERENCE_ROWS", rows)
    queries = unit(3)
    references = np.concatenate([unit(4, seed=1), queries, queries])
    assert nearest_embedding(queries, references).index.tolist() == [4, 5, 6]


def test_a_copy_is_told_from_one_that_float32_cannot_tell():
    query = unit(1, width=256)
    near = query.copy()
    near[0, 3] += np.float32(2**-20)
    assert (query @ near.T).item() == pytest.approx((query @ query.T).item(), abs=2**-22)
    found = nearest_embedding(query, np.concatenate([near - 2 * (near - query), query, near]))
    sign = np.sign(query[0, 3])
    assert found.index.item() == (2 if sign > 0 else 0)  # the one that is longer along the query


def test_what_is_no_embedding_is_refused():
    wrong = unit(3)
    wrong[2] *= 2
    with pytest.raises(ValueError, match="length 1, but number 2 has length 2"):
        nearest_embedding(wrong, unit(2))
    wrong[1] = np.nan
    with pytest.raises(ValueError, match="length 1, but number 1 has length nan"):
        nearest_embedding(unit(2), wrong)
    with pytest.raises(ValueError, match="to compare with, but got none"):
        nearest_embedding(unit(2), unit(0))


def test_sets_are_embedded_in_order_piece_by_piece(slice_set, monkeypatch):
    monkeypatch.setattr(embedding_search, "READ_ROWS", 1)  # more than 20 pieces show their progress
    training = SliceSet(slice_set, "train")
    assert np.array_equal(embed_set(training, embed), embed(training.read(range(len(training)))))


def test_search_lists_synthetic_and_held_out_slices_with_their_nearest(slice_set):
    training, held_out = SliceSet(slice_set, "train"), SliceSet(slice_set, "test")
    copies = training.subset([30, 2, 17])
    table = embedding_search.embedding_search(copies, training, held_out, embed)
    assert table["set"].tolist() == ["synthetic"] * 3 + ["held-out"] * len(held_out)
    assert table["position"].tolist() == [*range(3), *range(len(held_out))]
    assert table["nearest"].tolist()[:3] == [30, 2, 17]
    assert table["cosine"].tolist()[:3] == pytest.approx([1.0] * 3, abs=1e-6)
    patients = training.index["patient"].to_numpy()
    assert table["nearest_patient"].tolist() == [patients[row] for row in table["nearest"]]
    slices = held_out.read(range(len(held_out)))
    cosine = on_grid(embed(slices)) @ on_grid(embed(training.read(range(len(training))))).T
    assert table["cosine"].to_numpy()[3:].tolist() == cosine.max(axis=1).tolist()
    assert table["nearest"].to_numpy()[3:].tolist() == cosine.argmax(axis=1).tolist()
    found = EmbeddingIndex(training, embed).nearest(slices)
    assert found.cosine.tolist() == table["cosine"].tolist()[3:]


def test_held_out_patients_of_the_training_set_are_refused(slice_set):
    training = SliceSet(slice_set, "train")
    with pytest.raises(ValueError, match=r"outside the training set, but it has 5 of them \(P0, P1"):
        embedding_search.embedding_search(training, training, SliceSet(slice_set), embed)
