from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.evaluation.folds import class_strata, patient_folds, value_strata
from mad.files import MadError


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(5, 14), min_size=1, max_size=4),
    folds=st.integers(5, 7),
    repeats=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_no_patient_is_on_two_sides_and_all_are_tested_once_per_repeat(counts, folds, repeats, seed):
    strata = {f"P{s}-{n}": f"class {s}" for s, count in enumerate(counts) for n in range(count)}
    splits = patient_folds(strata, folds=folds, repeats=repeats, seed=seed)
    assert len(splits) == folds * repeats
    for split in splits:
        assert not split.fit & split.val and not split.fit & split.test and not split.val & split.test
        assert split.fit | split.val | split.test == set(strata)
    for repeat in range(repeats):
        tested = [patient for split in splits if split.repeat == repeat for patient in split.test]
        assert sorted(tested) == sorted(strata)
        sizes = [len(split.test) for split in splits if split.repeat == repeat]
        assert max(sizes) - min(sizes) <= 1
        for stratum in set(strata.values()):
            share = [sum(strata[p] == stratum for p in split.test) for split in splits if split.repeat == repeat]
            assert max(share) - min(share) <= 1


def test_every_class_validates_and_trains():
    strata = {f"P{n}": "rare" if n < 5 else "common" for n in range(40)}
    for split in patient_folds(strata, folds=5, repeats=2, seed=1):
        assert {strata[p] for p in split.val} == {strata[p] for p in split.fit} == {"rare", "common"}
        assert len(split.val) <= 8


def test_folds_depend_on_seed_and_repeat_but_on_no_order():
    strata = {f"P{n:02d}": str(n % 2) for n in range(30)}
    one = patient_folds(strata, folds=5, repeats=2, seed=3)
    assert patient_folds(dict(reversed(strata.items())), folds=5, repeats=2, seed=3) == one
    assert [split.test for split in one[:5]] != [split.test for split in one[5:]]
    assert patient_folds(strata, folds=5, repeats=2, seed=4) != one


def test_class_strata_name_the_short_class():
    patients = [f"P{n}" for n in range(20)]
    labels = ["a"] * 4 + ["b"] * 16
    with pytest.raises(MadError, match=r"\{'a': 4\} \(of 20 patients\)"):
        class_strata(patients, labels, folds=5, what="target her2")
    with pytest.raises(MadError, match="needs two or more"):
        class_strata(patients, ["a"] * 20, folds=5, what="target her2")


def test_a_patient_of_two_classes_counts_for_both_and_stays_together():
    patients = [f"P{n}" for n in range(10)] + ["P0"]
    strata = class_strata(patients, ["a"] * 5 + ["b"] * 5 + ["b"], folds=5, what="t")
    assert strata["P0"] == "a + b" and Counter(strata.values()) == {"a": 4, "b": 5, "a + b": 1}


def test_value_strata_spread_the_values():
    patients = [f"P{n}" for n in range(20)]
    strata = value_strata(patients, [float(n) for n in range(20)], folds=5, what="t")
    for split in patient_folds(strata, folds=5, repeats=1, seed=0):
        values = sorted(int(p[1:]) for p in split.test)
        assert [value // 5 for value in values] == [0, 1, 2, 3]
    with pytest.raises(MadError, match="5 folds need 10 patients, but 9"):
        value_strata(patients[:9], [0.0] * 9, folds=5, what="t")
