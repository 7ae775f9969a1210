"""The curves of a run: drawn from full records, from those of an earlier version, and from a single step."""

import cv2
import pytest

from mad.config.training import RunConfig
from mad.training.curves import draw_curves
from mad.training.watch import watch_of

HEALTH = {
    "teacher_entropy": 0.3, "target_entropy": 0.6, "student_entropy": 0.9, "mean_cosine": 0.5, "feature_std": 0.5,
    "rankme": 40.0, "prototype_perplexity": 9.0, "retrieval_at_1": 0.1, "pair_cosine_gap": 0.02,
}  # fmt: skip
NEWER = {"rankme_coarse": 20.0, "rankme_fine": 22.0, "scale_separation": 4.0, "knn_coarse_to_fine": None, "pairs": 80}


def record(step, **more):
    facts = {"lr": 1e-3, "grad_norm": 1.0 + step % 3, "kinds": "pair" if step % 2 else "multicrop"}
    return {"step": step, "dino_of_ln_k": 1 - step / 400, **facts, **more}


def checked(step, warnings, health):
    return record(step, health=health, warnings=warnings)


def picture(records, path):
    run = RunConfig(name="run", method="mad", head={"prototypes": 128})
    draw_curves(records, watch_of(run), "run (mad)", path)
    return cv2.imread(str(path))


def num_red(image):
    return int(((image == (0, 0, 255)).all(axis=2)).sum())


def test_warnings_are_marked(tmp_path):
    plain = [checked(step, [], HEALTH | NEWER) if step % 50 == 49 else record(step) for step in range(200)]
    warned = [old | ({"warnings": ["scale separation", "rank collapse"]} if "health" in old else {}) for old in plain]
    images = [picture(records, tmp_path / "curves.png") for records in (plain, warned)]
    assert images[0].shape == (770, 1540, 3) and num_red(images[0]) == 0 < num_red(images[1])
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("records", [[record(0)], [record(step) for step in range(5)], [checked(0, [], HEALTH)]])
def test_what_records_lack_is_left_out(tmp_path, records):
    assert picture(records, tmp_path / "curves.png").std() > 0


def test_the_curves_of_a_distillation(tmp_path):
    run = RunConfig(name="run", method="xmag", distill={"teacher": "t"})
    health = {"global_cosine": 0.5, "global_constant": 0.6, "rankme": 20.0, "rankme_teacher": 30.0, "mean_cosine": 0.2}
    records = [record(step, kinds="5x-20x", cosine=step / 99) for step in range(99)]
    records.append(record(99, cosine=1.0, health=health, warnings=["global term learns nothing"]))
    draw_curves(records, watch_of(run), "run (xmag)", tmp_path / "curves.png")
    assert num_red(cv2.imread(str(tmp_path / "curves.png"))) > 0
