"""Patients are divided reproducibly, as the paper did, or as a file says."""

import json

import pytest

from datamodules.splits import divide, divide_as_paper, divide_at_random, divide_by_file, paper_lists

NAMES = [f"P{number:03d}" for number in range(50)]


def sizes(division):
    return [len(division.patients(side)) for side in ("train", "val", "test")]


def test_random_split_has_the_asked_shares_and_everyone_once():
    division = divide_at_random(NAMES)
    assert sizes(division) == [35, 5, 10]
    assert sorted(division.sides) == NAMES


def test_random_split_depends_on_the_set_of_ids_and_the_seed_only():
    expected = divide_at_random(NAMES, seed=3)
    assert divide_at_random(NAMES[::-1], seed=3) == expected
    assert divide_at_random(set(NAMES), seed=3) == expected
    assert divide_at_random(NAMES, seed=4).sides != expected.sides


def test_random_split_stays_the_same_across_versions():
    # the last three of `printf 0:P0 | sha256sum` and so on, sorted by the sum
    assert divide_at_random([f"P{n}" for n in range(6)], (0.5, 0.0, 0.5)).patients("test") == ["P0", "P1", "P3"]


@pytest.mark.parametrize(
    ("count", "fractions", "expected"),
    [
        (3, (0.7, 0.1, 0.2), [1, 1, 1]),
        (4, (0.9, 0.05, 0.05), [2, 1, 1]),
        (2, (0.7, 0.1, 0.2), [1, 0, 1]),
        (1, (0.7, 0.1, 0.2), [1, 0, 0]),
        (15, (0.7, 0.1, 0.2), [11, 1, 3]),
        (15, (2 / 3, 0.0, 1 / 3), [10, 0, 5]),
        (24, (0.7, 0.1, 0.2), [17, 2, 5]),
        (5, (0.0, 0.0, 1.0), [0, 0, 5]),
    ],
)
def test_every_side_with_a_share_gets_a_patient_if_there_are_enough(count, fractions, expected):
    assert sizes(divide_at_random(NAMES[:count], fractions)) == expected


@pytest.mark.parametrize("fractions", [(0.7, 0.2, 0.2), (1.2, -0.2, 0.0), (0.5, 0.5)])
def test_fractions_that_are_no_shares_are_refused(fractions):
    with pytest.raises(ValueError, match=r"fractions=.*train, val and test.*add up to 1"):
        divide_at_random(NAMES, fractions)


def test_paper_lists_have_its_numbers_and_known_test_patients():
    lists = paper_lists()
    for prefix, train, test in (("BraTS20_", 313, 56), ("BraTS2021_", 1195, 56)):
        sides = [side for name, side in lists.items() if name.startswith(prefix)]
        assert (sides.count("train"), sides.count("test"), len(sides)) == (train, test, train + test)
    for name in ("BraTS20_Training_002", "BraTS20_Training_368", "BraTS2021_00006", "BraTS2021_01666"):
        assert lists[name] == "test"
    for name in ("BraTS20_Training_001", "BraTS2021_00000"):
        assert lists[name] == "train"


def test_paper_split_lists_the_absent_patients_of_the_data_set_at_hand():
    division = divide_as_paper(["BraTS2021_00000", "BraTS2021_00002"])
    assert division.sides == {"BraTS2021_00000": "train", "BraTS2021_00002": "test"}
    assert len(division.missing) == 1249
    assert division.missing[0] == "BraTS2021_00003"


def test_paper_split_refuses_patients_of_neither_list():
    with pytest.raises(
        ValueError, match=r"split=paper: BraTS2021_00001, P001 are in none of the paper's lists.*random"
    ):
        divide_as_paper(["P001", "BraTS2021_00001", "BraTS2021_00000"])


@pytest.mark.parametrize("ending", [".json", ".yaml"])
def test_a_file_may_say_who_is_where(tmp_path, ending):
    path = tmp_path / f"split{ending}"
    path.write_text(json.dumps({"train": ["A"], "test": ["B", "C"]}))
    division = divide(["A", "B", "C"], str(path))
    assert division.sides == {"A": "train", "B": "test", "C": "test"}
    assert division.source == f"file split{ending}"


def test_everything_wrong_with_a_split_file_is_said_at_once(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["A", "A", "B"], "val": ["B"], "test": ["X", "S"]}))
    with pytest.raises(ValueError, match="does not fit") as info:
        divide_by_file(["A", "B", "C", "D"], path, absent=["S"])
    text = str(info.value)
    assert "A is named 2 times in train" in text
    assert "B is on 2 sides (train, val)" in text
    assert "X is not among the patients found (name patients, not volumes or files)" in text
    assert "C, D are in the input, but on no side" in text
    assert "S " not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.json", "{", "s.json is not valid JSON"),
        ("s.yaml", "a: [", "s.yaml is not valid YAML"),
        ("s.json", '{"training": ["A"]}', r"expected {\"train\".*but got \['training'\]"),
        ("s.json", '["A"]', "but got list"),
        ("s.yaml", "train: [001]", r"train is \[1\]. Write ids in quotes"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        divide(["A"], str(tmp_path / name))


def test_an_unknown_kind_of_split_names_the_choices():
    with pytest.raises(ValueError, match="split=papers: expected random, paper, or the path"):
        divide(["A"], "papers")
