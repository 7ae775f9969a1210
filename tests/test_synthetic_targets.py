from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtri
from sklearn.metrics import roc_auc_score

from mad.config.synthetic import SyntheticConfig
from mad.slides.synthetic.cohort import sheet_rows
from mad.slides.synthetic.layout import layout
from mad.slides.synthetic.slide import write_slide
from mad.slides.synthetic.targets import SCORE, TARGETS, best_auroc, draw_target

WITH = SyntheticConfig(patients=40, width=1792, height=1792, targets=True)
WITHOUT = SyntheticConfig(patients=40, width=1792, height=1792)


def test_columns_are_there_on_request_alone():
    plain, more = sheet_rows(WITHOUT), sheet_rows(WITH)
    assert set(more[0]) - set(plain[0]) == {*TARGETS, SCORE}
    assert [{key: row[key] for key in plain[0]} for row in more] == plain
    assert float(more[3][SCORE]) == pytest.approx(draw_target(WITH, 3, "ordered_fibrils")[1], abs=1e-4)


def test_slides_without_targets_keep_their_bytes(tmp_path: Path):
    """The digest of a slide as it was before there were targets would pin codecs; the latents are what targets may move."""
    one = layout(WITHOUT, "S03")
    assert np.array_equal(one.architecture, one.cells)
    other = layout(WITH, "S03")
    for kept in ("classes", "depth_um", "along_um", "band", "plaques"):
        assert np.array_equal(getattr(one, kept), getattr(other, kept))
    assert np.array_equal(one.architecture[:2], other.architecture[:2])
    assert np.array_equal(one.cells[2], other.cells[2])
    assert not np.array_equal(one.cells[0], other.cells[0]) and not np.array_equal(one.cells[1], other.cells[1])
    write_slide(WITH, "S03", tmp_path)
    again = tmp_path / "again"
    write_slide(WITH, "S03", again)
    assert (tmp_path / "S03.tiff").read_bytes() == (again / "S03.tiff").read_bytes()


def test_classes_are_even_overlap_and_are_independent():
    large = SyntheticConfig(patients=4000, targets=True)
    drawn = {target: [draw_target(large, n, target) for n in range(4000)] for target in TARGETS}
    labels = {target: np.array([positive for positive, _ in pairs]) for target, pairs in drawn.items()}
    for target, pairs in drawn.items():
        assert labels[target].sum() == 2000
        reached = roc_auc_score(labels[target], [score for _, score in pairs])
        assert reached == pytest.approx(best_auroc(), abs=0.015) and best_auroc() == pytest.approx(0.9214, abs=1e-4)
    for one, other in pairwise([*TARGETS, TARGETS[0]]):
        assert abs(np.corrcoef(labels[one], labels[other])[0, 1]) < 0.06


def test_scores_move_what_they_say_and_nothing_else_tells():
    """Each class is read from the truth behind the pixels; of `scales_agree` either scale alone tells nothing."""
    rows, means, agree = sheet_rows(WITH), [], []
    for row in rows:
        truth = layout(WITH, row["slide_id"])
        a, c = (ndtri(np.clip(latents, 1e-6, 1 - 1e-6)) for latents in (truth.architecture, truth.cells))
        means.append([c[1].mean(), a[2].mean(), c[0].mean(), a[0].mean(), c[0].std(), a[0].std()])
        agree.append(np.corrcoef(c[0].ravel(), a[0].ravel())[0, 1])
    means = np.array(means)
    labels = {target: np.array([row[target] == "1" for row in rows]) for target in TARGETS}
    assert roc_auc_score(labels["ordered_fibrils"], means[:, 0]) > 0.8
    assert roc_auc_score(labels["patchy_texture"], means[:, 1]) > 0.8
    assert roc_auc_score(labels["scales_agree"], agree) > 0.8
    for column in range(2, 6):  # 40 slides: standard deviation .09 at chance
        assert abs(roc_auc_score(labels["scales_agree"], means[:, column]) - 0.5) < 0.25
