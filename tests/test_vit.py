"""Backbones: creation, pooling, errors, and the export that timm alone loads again."""

import resource

import fakes
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import infer_imagenet_subset

from mad.config.recipe import freeze_recipe
from mad.config.training import BackboneConfig, RunConfig
from mad.files import MadError, StorageError, read_json, sha256_file
from mad.models.export import export_encoder, export_untrained, load_exported, model_card, read_provenance
from mad.models.hub import card_licence
from mad.models.vit import build_backbone, embedding_dim, initial_backbone, local_crop_px, local_side, mean_std

VIT = BackboneConfig(model="vit_tiny_patch16_224", args={"depth": 1, "embed_dim": 24, "patch_size": 8, "reg_tokens": 2})
HYBRID = BackboneConfig(
    model="vit_tiny_r_s16_p8_224", args={"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 4}, pooling="avg"
)
GIANT = BackboneConfig(model="vit_giant_patch14_reg4_dinov2", args={"depth": 1, "embed_dim": 24, "num_heads": 2})
CONVNET = BackboneConfig(model="test_convnext2", pooling="avg")
PLAIN = {"image_px": 32, "card": "card", "provenance": {"recipe_digest": "r"}}


@pytest.mark.parametrize("config", [VIT, VIT.model_copy(update={"pooling": "avg"}), HYBRID, CONVNET])
def test_export_gives_equal_outputs_through_timm_alone(tmp_path, config):
    torch.manual_seed(0)
    model = build_backbone(config, 32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # away from any init that a fresh model shares
    sha256 = export_encoder(model, tmp_path / "encoder", **PLAIN)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
        assert model(images).shape == (3, embedding_dim(model))
    assert sha256 == sha256_file(tmp_path / "encoder" / "model.safetensors")
    settings = read_json(tmp_path / "encoder" / "config.json")
    assert settings["architecture"] == config.model
    assert settings["num_features"] == model.num_features
    assert settings["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert {"mean", "std"} <= set(settings["pretrained_cfg"])


def test_a_full_disk_is_named_where_weights_are_written(tmp_path):
    """A limit on the size of files stands for it: the same error of the same writer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"model.safetensors: cannot be written .*; make room and run it again"):
            export_encoder(build_backbone(VIT, 32), tmp_path / "encoder", **PLAIN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "encoder").iterdir())


def test_export_is_the_same_bytes_again_and_knows_its_weights(tmp_path):
    model = build_backbone(VIT, 32)
    first, second = (export_encoder(model, tmp_path / name, **PLAIN) for name in ("a", "b"))
    assert first == second
    assert read_provenance(tmp_path / "a") == {"recipe_digest": "r", "weights_sha256": first}
    (tmp_path / "a" / "model.safetensors").write_bytes(b"cut short")
    assert read_provenance(tmp_path / "a") is None
    assert read_provenance(tmp_path / "nothing") is None


def test_mean_and_deviation_go_out_with_the_encoder(tmp_path):
    chosen = {"mean": (0.7, 0.5, 0.6), "std": (0.2, 0.3, 0.1)}
    model = build_backbone(VIT.model_copy(update=chosen), 32)
    assert mean_std(model) == tuple(chosen.values()) != mean_std(build_backbone(VIT, 32))
    export_encoder(model, tmp_path, **PLAIN)
    assert mean_std(load_exported(tmp_path)) == tuple(chosen.values())


@pytest.mark.parametrize(
    ("model", "local_px", "words"),
    [
        ("vit_small_patch14_dinov2", 24, "takes no local crops of 24 px"),
        ("beit_base_patch16_224", None, "takes no local crops of 32 px"),
    ],
)
def test_local_crops_that_a_model_refuses_are_named(model, local_px, words):
    args = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    run = RunConfig(**fakes.tiny_run(backbone={"model": model, "args": args}, views={"local_px": local_px}))
    backbone = build_backbone(run.backbone, 112 if "14" in model else 80)
    with pytest.raises(MadError, match=words):
        local_side(backbone, run, 112 if "14" in model else 80)
    none = run.model_copy(update={"views": run.views.model_copy(update={"local_crops": 0})})
    local_side(backbone, none, 80)


def test_vits_take_local_crops_of_another_size():
    model = build_backbone(VIT, 32).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 24)


@pytest.mark.parametrize(("patch", "image_px", "expected"), [(14, 224, 98), (16, 224, 96), (16, 112, 48), (8, 32, 16)])
def test_local_crops_are_whole_patches(patch, image_px, expected):
    config = VIT.model_copy(update={"args": {"depth": 1, "embed_dim": 12, "patch_size": patch}})
    assert local_crop_px(build_backbone(config, image_px), image_px) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "vit_tinny_patch16_224"}, "vit_tiny_patch16"),
        ({"args": {"depht": 3}}, "depht"),
        ({"args": {"patch_size": 8, "embed_dim": 25}}, "backbone"),
        ({"model": "test_convnext2", "args": {}}, "global_pool"),
    ],
)
def test_a_wrong_backbone_is_explained(changes, words):
    with pytest.raises(MadError, match=words):
        build_backbone(VIT.model_copy(update=changes), 32)


@pytest.mark.parametrize("config", [VIT, VIT.model_copy(update={"pooling": "avg"}), HYBRID, CONVNET, GIANT])
def test_the_export_of_an_export_is_equal(tmp_path, config):
    first = export_encoder(build_backbone(config, 224), tmp_path / "a", image_px=224, card="card", provenance={})
    loaded = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    assert export_encoder(loaded, tmp_path / "b", image_px=224, card="card", provenance={}) == first
    for name in ("model.safetensors", "config.json", "provenance.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("config", [VIT, VIT.model_copy(update={"pooling": "avg"}), HYBRID, CONVNET, GIANT])
def test_transformers_makes_the_same_encoder_of_the_same_folder(tmp_path, config):
    """As `TimmWrapperConfig` and `TimmWrapperModel` do: the root of config.json, with num_classes beside model_args."""
    model = build_backbone(config, 224).eval()
    export_encoder(model, tmp_path, image_px=224, card="card", provenance={})
    settings = read_json(tmp_path / "config.json")
    assert settings["model_type"] == "timm_wrapper"
    assert settings["architectures"] == ["TimmWrapperModel"]
    assert settings["num_classes"] == settings["pretrained_cfg"]["num_classes"] == 0
    assert infer_imagenet_subset(settings) is None  # otherwise it would be given ImageNet's labels
    args = settings["model_args"]
    wrapped = timm.create_model(settings["architecture"], pretrained=False, num_classes=0, **args).eval()
    wrapped.load_state_dict(load_file(tmp_path / "model.safetensors"))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(wrapped.forward_head(wrapped.forward_features(images)), model(images))


@pytest.mark.parametrize("config", [VIT, HYBRID, CONVNET, GIANT])
def test_transformers_itself_loads_the_folder(tmp_path, config):
    transformers = pytest.importorskip("transformers")
    model = build_backbone(config, 224).eval()
    export_encoder(model, tmp_path, image_px=224, card="card", provenance={})
    wrapped = transformers.AutoModel.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(wrapped(images).pooler_output, model(images))


@pytest.mark.parametrize(
    ("init", "licence", "front", "told"),
    [
        ("random", "apache-2.0", "apache-2.0", "Licence: Apache-2.0."),
        ("timm", "apache-2.0", "apache-2.0", "init `timm` (licence of these weights: apache-2.0)"),
        ("hf-hub:a/b", "cc-by-nc-4.0", "cc-by-nc-4.0", "(licence of these weights: cc-by-nc-4.0)"),
        ("file:w.pth", None, "other", "(licence of these weights: unknown)"),
    ],
)
def test_card_and_config_name_the_licence_of_the_initial_weights(tmp_path, init, licence, front, told):
    config = fakes.tiny_config(tmp_path, fakes.tiny_run(init=init))
    model, recipe = build_backbone(VIT, 32), freeze_recipe(config, "tiny")
    card = model_card(config.run("tiny"), recipe, model, "title", [], {}, {}, "1 step", licence)
    assert card.startswith(f"---\nlicense: {front}\n") and told in card
    assert ("Licence: Apache-2.0" in card) == (init == "random")
    export_encoder(model, tmp_path / "encoder", **{**PLAIN, "card": card}, licence=licence)
    assert read_json(tmp_path / "encoder" / "config.json")["pretrained_cfg"]["license"] == front
    assert card_licence(tmp_path / "encoder" / "README.md") == front


def test_untrained_export_is_the_start_of_the_run(tmp_path):
    config = fakes.tiny_config(tmp_path, fakes.tiny_run(init="hf-hub:owner/name"))
    export_untrained(config, "tiny", tmp_path / "random")
    assert "init `random`" in (tmp_path / "random" / "README.md").read_text()
    from mad.training.loop import build_networks

    student, _ = build_networks(config.run("tiny"), fakes.TILE_PX, config.seed)
    images = torch.randn(2, 3, fakes.TILE_PX, fakes.TILE_PX)
    with torch.no_grad():
        expected = student.backbone.eval()(images)
        np.testing.assert_array_equal(load_exported(tmp_path / "random")(images), expected)
        np.testing.assert_array_equal(initial_backbone(config, "tiny").eval()(images), expected)
