"""Configuration of method `xmag`: defaults, what is refused, the recipe."""

import json

import fakes
import pytest

from mad.config.recipe import freeze_recipe
from mad.config.training import RunConfig
from mad.files import MadError, digest


def test_defaults_of_the_method_and_of_the_others():
    run_config = RunConfig(name="a", method="xmag", distill={"teacher": "t"})
    assert (run_config.weight_decay, run_config.weight_decay_end, run_config.clip, run_config.ema, run_config.ema_end) == (
        0.05, 0.05, 1.0, 0.999, 0.999,
    )  # fmt: skip
    assert (
        run_config.photometric.blur == (0, 0, 0)
        and run_config.distill.global_weight == 1
        and run_config.distill.local_weight == 0.5
    )
    own = RunConfig(name="a", method="xmag", clip=2.0, photometric={"jitter": 0.1}, distill={"teacher": "t"})
    assert own.clip == 2 and own.photometric.jitter == 0.1 and own.photometric.solarize == 0
    assert RunConfig(**json.loads(own.model_dump_json())) == own
    mad = RunConfig(name="a", method="mad")
    assert mad.distill is None and mad.clip == 3 and mad.photometric.jitter == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"distill": None}, "needs a section `distill`"),
        ({"method": "mad"}, "method 'mad' does not distil"),
        ({"distill": {"teacher": "t", "global_weight": 0, "local_weight": 0}}, "both 0"),
        ({"distill": {"teacher": "t", "teacher_level": "coarse", "local_weight": 0.5}}, "no local term"),
        ({"distill": {"teacher": "t", "teacher_level": "coarse", "input": "resized"}}, "need cache: false"),
        ({"distill": {"teacher": "t", "inpt": "resized"}}, "inpt"),
        ({"head": {"prototypes": 8}, "children": 3}, "head, children: without effect"),
        ({"koleo": 0.1, "photometric": {"solarize": 0.2}}, "koleo, photometric.solarize: without effect"),
        ({"mix": {"5x-20x": 1, "standalone": 1}}, r"not from \['standalone'\]"),
        ({"loader": "stream"}, "take indexed"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**{"name": "a", "method": "xmag", "distill": {"teacher": "t"}} | changes)


def test_teachers_are_encoders_of_the_configuration(tmp_path):
    with pytest.raises(MadError, match=r"teacher of 'tiny' is 'nobody'; encoders has \['teacher'\]"):
        fakes.distill_config(tmp_path, fakes.tiny_xmag(distill={"teacher": "nobody"}))
    with pytest.raises(MadError, match="its own encoder"):
        fakes.distill_config(tmp_path, teacher="run:tiny")


def test_the_recipe_holds_the_teacher_and_others_no_distill(tmp_path):
    config = fakes.distill_config(tmp_path)
    recipe, other = freeze_recipe(config, "tiny"), freeze_recipe(config, "source")
    assert recipe["teacher"]["spec"] == "random:source" and recipe["run"]["distill"]["cache"] is True
    assert "distill" not in other["run"] and "teacher" not in other
    assert digest(recipe) != digest(freeze_recipe(fakes.distill_config(tmp_path, teacher="colour"), "tiny"))
