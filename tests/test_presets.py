"""Presets: the numbers of DINOv2's published configurations, under what an entry says itself."""

from math import sqrt
from typing import Any

import pytest

from mad.config import parse_config
from mad.config.recipe import freeze_recipe
from mad.config.training import BackboneConfig, RunConfig
from mad.files import MadError
from mad.models.vit import build_backbone, local_crop_px, mean_std

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
SAME = {  # in both files
    "min_lr": 1e-6, "weight_decay": 0.04, "patch_embed_lr": 0.2, "clip": 3.0, "ema_end": 1.0, "student_temp": 0.1,
    "teacher_temp": 0.07, "teacher_temp_start": 0.04, "teacher_temp_warmup": 37500, "freeze_last_layer": 1250,
    "spread": "koleo", "koleo": 0.2, "backbone_lr": 1.0, "freeze_backbone": 0, "init": "random", "precision": "auto",
    "views": {"global_crops": 2, "local_crops": 8, "local_px": None, "global_scale": [0.32, 1.0], "local_scale": [0.05, 0.32]},
    "photometric": {
        "jitter": 1.0, "jitter_share": 0.8, "grayscale": 0.2, "blur": [1.0, 0.1, 0.5], "solarize": 0.2, "stain": 0.0,
    },
}  # fmt: skip
MASKS = {"weight": 1.0, "probability": 0.5, "ratio": [0.1, 0.5]}
PUBLISHED = {
    "dinov2_vitl16": SAME | {
        "backbone": {"model": "vit_large_patch16_224", "args": {"init_values": 1e-5}, "pooling": "cls"} | IMAGENET,
        "steps": 125_000, "warmup": 12_500, "batch": 2048, "lr": 0.004 * sqrt(2), "weight_decay_end": 0.4, "layer_decay": 0.9,
        "ema": 0.992, "centring": "ema", "centre_momentum": 0.9, "drop_path": 0.3,
        "head": {"hidden": 2048, "bottleneck": 256, "prototypes": 65536, "standardise": False},
        "ibot": MASKS | {"head": "shared", "hidden": None, "bottleneck": None, "prototypes": None},
    },
    "dinov2_vitg14": SAME | {
        "backbone": {"model": "vit_giant_patch14_dinov2", "args": {}, "pooling": "cls"},
        "steps": 625_000, "warmup": 100_000, "batch": 3072, "lr": 0.0002 * sqrt(3), "weight_decay_end": 0.2, "layer_decay": 1.0,
        "ema": 0.994, "centring": "sinkhorn", "drop_path": 0.4,
        "head": {"hidden": 2048, "bottleneck": 384, "prototypes": 131072, "standardise": False},
        "ibot": MASKS | {"head": "separate", "hidden": 2048, "bottleneck": 256, "prototypes": 131072},
    },
}  # fmt: skip


def recipe(**entry: Any) -> dict[str, Any]:
    config = parse_config({"runs": [{"name": "a", "method": "dinov2", **entry}]})
    return freeze_recipe(config, "a")["run"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_written_out_in_the_recipe(name: str) -> None:
    resolved = recipe(preset=name)
    for key, value in PUBLISHED[name].items():
        assert resolved[key] == (pytest.approx(value, rel=1e-12) if key == "lr" else value), key
    assert "preset" not in resolved and set(resolved) == set(recipe())


def test_what_an_entry_says_wins() -> None:
    resolved = recipe(preset="dinov2_vitg14", ema=0.9992, head={"prototypes": 4096}, ibot={"weight": 0}, steps=200_000)
    assert (resolved["ema"], resolved["steps"], resolved["warmup"]) == (0.9992, 200_000, 100_000)
    assert resolved["head"] == {"hidden": 2048, "bottleneck": 384, "prototypes": 4096, "standardise": False}
    assert resolved["ibot"] == PUBLISHED["dinov2_vitg14"]["ibot"] | {"weight": 0.0}


def test_the_learning_rate_is_that_of_the_batch() -> None:
    assert recipe(preset="dinov2_vitg14", batch=64)["lr"] == pytest.approx(2e-4 / 4)
    assert recipe(preset="dinov2_vitg14", batch=64, lr=1e-4)["lr"] == 1e-4
    assert recipe(preset="dinov2_vitg14", batch="4096")["lr"] == pytest.approx(2e-4 * 2)
    assert recipe(batch=64)["lr"] == 2e-4  # without a preset nothing rescales it


def test_another_model_takes_nothing_from_the_preset_s() -> None:
    assert recipe(preset="dinov2_vitl16", backbone={"model": "convnext_tiny"})["backbone"]["args"] == {}
    pooled = recipe(preset="dinov2_vitl16", backbone={"pooling": "avg"})["backbone"]
    assert pooled == {"model": "vit_large_patch16_224", "args": {"init_values": 1e-5}, "pooling": "avg"} | IMAGENET
    run = RunConfig(name="a", method="mad", preset="dinov2_vitl16", backbone=BackboneConfig())
    assert run.backbone == BackboneConfig()


def test_what_the_jobs_read_holds_the_numbers_and_reads_the_same() -> None:
    config = parse_config(
        {"runs": [{"name": "a", "method": "mad", "preset": "dinov2_vitl16", "batch": 256, "koleo": 0.1}]}
    )
    settings = config.model_dump(mode="json")
    assert "preset" not in settings["runs"][0]
    assert freeze_recipe(parse_config(settings), "a") == freeze_recipe(config, "a")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"preset": "dinov2_vitg16"}, "runs.0.preset: Input should be 'dinov2_vitl16' or 'dinov2_vitg14'"),
        ({"preset": ["dinov2_vitg14"]}, "runs.0.preset: Input should be 'dinov2_vitl16' or 'dinov2_vitg14'"),
        ({"preset": "dinov2_vitg14", "batch": "many"}, "runs.0.batch: Input should be a valid integer"),
        (
            {"preset": "dinov2_vitg14", "batch": 0},
            r"runs.0.batch: Input should be greater than or equal to 1 \(got 0\)$",
        ),
        ({"preset": "dinov2_vitg14", "steps": 1000}, r"warmup \(100000\) must be shorter than steps \(1000\)"),
        ({"preset": "dinov2_vitl16", "steps": 20000}, r"teacher_temp_warmup \(37500\) must not be longer than steps"),
        (
            {"preset": "dinov2_vitl16", "method": "xmag", "distill": {"teacher": "t"}},
            "preset: 'dinov2_vitl16' has the numbers of self-distillation, not of method 'xmag'",
        ),
        ({"preset": "dinov2_vitg14", "wramup": 1}, "no such key, did you mean 'warmup'"),
    ],
)
def test_faults_are_named(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(MadError, match=message):
        recipe(**entry)


def test_a_shared_head_has_no_sizes_of_its_own() -> None:
    masks = recipe(preset="dinov2_vitg14", ibot={"head": "shared", "probability": 0.4})["ibot"]
    assert (masks["weight"], masks["head"], masks["hidden"], masks["probability"]) == (1, "shared", None, 0.4)


@pytest.mark.parametrize("preset", ["dinov2_vitl16", "dinov2_vitg14"])
def test_images_are_normalised_as_dinov2_does(preset: str) -> None:
    run = RunConfig(name="a", method="dinov2", preset=preset)
    small = run.backbone.model_copy(update={"args": {"depth": 1, "embed_dim": 24, "num_heads": 3}})
    assert mean_std(build_backbone(small, 56 if "14" in preset else 64)) == (
        pytest.approx(IMAGENET["mean"]), pytest.approx(IMAGENET["std"]),
    )  # fmt: skip


@pytest.mark.parametrize(("patch", "side"), [(16, 96), (14, 98)])
def test_local_crops_are_theirs_at_224_px(patch: int, side: int) -> None:
    args = {"depth": 1, "embed_dim": 24, "num_heads": 3, "patch_size": patch}
    assert local_crop_px(build_backbone(BackboneConfig(model="vit_tiny_patch16_224", args=args), 224), 224) == side
