"""Encoders: what is embedded is what their audit says."""

import errno
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from mad.config import Config, parse_config
from mad.files import MadError, sha256_file
from mad.models.encoders import load_encoder, weights_sha256
from mad.models.export import export_encoder
from mad.models.hub import MissingWeightsError
from mad.models.vit import build_backbone

TILES = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3)).astype(np.uint8)
VIT = {"model": "vit_tiny_patch16_224", "args": {"embed_dim": 48, "depth": 2, "num_heads": 2, "reg_tokens": 3}}


def configure(folder: Path, spec: str, **entry: object) -> Config:
    run = {"name": "tiny", "method": "mad", "steps": 10, "warmup": 1, "freeze_last_layer": 1, "backbone": VIT}
    encoders = [{"name": "e", "spec": spec, "precision": "fp32", **entry}]
    return parse_config({"results": str(folder), "tile": {"tile_px": 64}, "runs": [run], "encoders": encoders})


def images() -> torch.Tensor:
    """The tiles as the model is to see them: ImageNet's normalisation is that of neither test nor default config."""
    mean, std = torch.tensor([0.5] * 3).view(1, 3, 1, 1), torch.tensor([0.5] * 3).view(1, 3, 1, 1)
    return (torch.from_numpy(TILES).permute(0, 3, 1, 2) / 255 - mean) / std


def test_colour_is_each_channels_mean_and_deviation(tmp_path: Path) -> None:
    vectors = load_encoder(configure(tmp_path, "colour"), "e")(TILES)
    expected = [
        [TILES[n, ..., c].mean() / 255 for c in range(3)] + [TILES[n, ..., c].std() / 255 for c in range(3)]
        for n in range(5)
    ]
    assert np.allclose(vectors, expected, atol=1e-5)


def test_random_is_the_initial_state_of_the_run(tmp_path: Path) -> None:
    first, second = (load_encoder(configure(tmp_path, "random:tiny"), "e") for _ in range(2))
    assert np.array_equal(first(TILES), second(TILES))
    assert first.audit["weights_sha256"] == second.audit["weights_sha256"]
    assert first.audit["dim"] == 48 and first.audit["resize"] is None


@pytest.mark.parametrize("pooling", ["auto", "cls", "avg", "cls+avg"])
def test_a_run_is_loaded_from_its_folder_and_pooled_as_asked(tmp_path: Path, pooling: str) -> None:
    config = configure(tmp_path, "run:tiny", pooling=pooling)
    torch.manual_seed(1)
    model = build_backbone(config.run("tiny").backbone, 64).eval()
    export_encoder(model, tmp_path / "train" / "tiny" / "encoder", image_px=64, card="", provenance={})
    encoder = load_encoder(config, "e")
    with torch.no_grad():
        tokens = model.forward_features(images())
    parts = {"cls": [tokens[:, 0]], "avg": [tokens[:, 4:].mean(1)], "cls+avg": [tokens[:, 0], tokens[:, 4:].mean(1)]}
    expected = torch.cat(parts.get(pooling, parts["cls"]), dim=1)
    assert np.allclose(encoder(TILES), expected.numpy(), atol=1e-4)
    assert encoder.audit["weights_sha256"] == weights_sha256(
        timm.create_model(f"local-dir:{tmp_path}/train/tiny/encoder", pretrained=True)
    )


def test_tokens_that_nobody_pools_are_refused_before_a_tile_is_embedded(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, num_classes=0, global_pool="", embed_dim=48, depth=1, num_heads=2
    ).eval()
    export_encoder(model, tmp_path / "own", image_px=64, card="", provenance={})
    with pytest.raises(MadError, match=r"gives an array \(17, 48\) per tile.*set the entry's `pooling`"):
        load_encoder(configure(tmp_path, f"local-dir:{tmp_path}/own"), "e")
    pooled = load_encoder(configure(tmp_path, f"local-dir:{tmp_path}/own", pooling="cls"), "e")
    with torch.no_grad():
        expected = model((torch.from_numpy(TILES).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)[:, 0]
    assert np.allclose(pooled(TILES), expected.numpy(), atol=1e-4)


def test_a_local_model_of_another_size_is_made_for_the_tiles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one of the hub is: position embeddings are resampled, the tiles keep their um/px; with weights under their older name."""
    args = {"num_classes": 0, "embed_dim": 48, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, **args).eval()
    export_encoder(model, tmp_path / "own", image_px=96, card="", provenance={})
    (tmp_path / "own" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "own" / "pytorch_model.bin")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    twin = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        pretrained=True,
        pretrained_cfg_overlay={"file": tmp_path / "w.pth"},
        **args,
    ).eval()
    encoder = load_encoder(configure(tmp_path, f"local-dir:{tmp_path}/own"), "e")
    assert encoder.audit["resize"] is None and encoder.audit["mpp_factor"] == 1
    with torch.no_grad():
        expected = twin((torch.from_numpy(TILES).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    assert np.allclose(encoder(TILES), expected.numpy(), atol=1e-4)
    assert "unseen_px" not in encoder.audit and "not seen" not in capsys.readouterr().err


def test_the_audit_holds_what_leaves_no_trace_in_the_weights(tmp_path: Path) -> None:
    """It decides whether embeddings are fresh: arguments, and the file that timm reads further ones from."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, embed_dim=48, depth=1, num_heads=2)
    export_encoder(model, tmp_path / "own", image_px=64, card="", provenance={})
    spec, file = f"local-dir:{tmp_path}/own", tmp_path / "own" / "config.json"
    plain, other = (load_encoder(configure(tmp_path, spec, args=args), "e") for args in ({}, {"act_layer": "SiLU"}))
    assert plain.audit["weights_sha256"] == other.audit["weights_sha256"]
    assert not np.allclose(plain(TILES), other(TILES), atol=1e-3)
    assert other.audit == plain.audit | {"args": {"act_layer": "SiLU"}}
    file.write_text(file.read_text().replace('"num_heads": 2', '"num_heads": 3'))
    changed = load_encoder(configure(tmp_path, spec), "e")
    assert not np.allclose(plain(TILES), changed(TILES), atol=1e-5)
    assert changed.audit == plain.audit | {"config_sha256": sha256_file(file)} != plain.audit


def test_the_config_of_a_hub_model_is_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, embed_dim=48, depth=1, num_heads=2)
    for revision in ("aa", "bb"):
        (repository / "refs" / {"aa": "main", "bb": "v2"}[revision]).write_text(revision)
        export_encoder(
            model, repository / "snapshots" / revision, image_px=64, card="", provenance={}, licence=revision
        )
    for name, revision in (("owner/name", "aa"), ("owner/name@v2", "bb")):
        config = configure(tmp_path, f"hf-hub:{name}", args={"cache_dir": str(tmp_path / "hub")})
        found = load_encoder(config, "e").audit["config_sha256"]
        assert found == sha256_file(repository / "snapshots" / revision / "config.json")


def test_a_border_outside_the_patches_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=70, patch_size=14, num_classes=0, embed_dim=48, depth=1, num_heads=2
    )
    export_encoder(model, tmp_path / "own", image_px=70, card="", provenance={})
    encoder = load_encoder(configure(tmp_path, f"local-dir:{tmp_path}/own"), "e")
    changed = TILES.copy()
    changed[:, 56:] = changed[:, :, 56:] = 0
    assert np.array_equal(encoder(TILES), encoder(changed)) and encoder.audit["unseen_px"] == 8
    assert "last 8 columns and rows of every tile are not seen" in capsys.readouterr().err


def test_a_model_of_another_size_resizes_and_says_so(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, num_classes=0, embed_dim=48, depth=1, num_heads=2
    ).eval()
    export_encoder(model, tmp_path / "own", image_px=96, card="", provenance={})
    encoder = load_encoder(configure(tmp_path, f"local-dir:{tmp_path}/own", args={"img_size": 96}), "e")
    assert encoder.audit["resize"] == [64, 96] and encoder.audit["mpp_factor"] == pytest.approx(64 / 96)
    raw = torch.from_numpy(TILES).permute(0, 3, 1, 2).float()
    large = F.interpolate(raw, size=(96, 96), mode="bicubic", antialias=True).clamp(0, 255)
    with torch.no_grad():
        expected = model((large / 255 - 0.5) / 0.5)
    assert np.allclose(encoder(TILES), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("run:tiny", "train run 'tiny' first"),
        ("local-dir:/nowhere", "no config.json of timm beside model.safetensors or pytorch_model.bin"),
        ("vit_small", "known forms are run:NAME"),
        ("timm:no_such_model", "cannot be loaded"),
    ],
)
def test_missing_weights_say_what_mends_it(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(MadError, match=message):
        load_encoder(configure(tmp_path, spec), "e")


def test_an_encoder_of_ones_own_is_a_function_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of docs/encoders.md."""
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n\n"
        "def brightness(tile_px):\n"
        "    return lambda tiles: tiles.reshape(len(tiles), -1).mean(axis=1, keepdims=True)\n\n"
        "def broken(tile_px):\n"
        "    return lambda tiles: np.zeros(3)\n"
    )
    monkeypatch.chdir(tmp_path)
    encoder = load_encoder(configure(tmp_path, "python:mine:brightness"), "e")
    assert encoder.audit == {"spec": "python:mine:brightness", "dim": 1}
    assert np.allclose(encoder(TILES)[:, 0], TILES.mean(axis=(1, 2, 3)))
    with pytest.raises(MadError, match="one vector per tile"):
        load_encoder(configure(tmp_path, "python:mine:broken"), "e")
    for spec in ("python:mine:absent", "python:no_such_module:f", "python:"):
        with pytest.raises(MadError, match="cannot be imported"):
            load_encoder(configure(tmp_path, spec), "e")


def test_an_encoder_of_ones_own_keeps_its_errors_and_may_not_claim_to_be_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "claims.py").write_text(
        "def claiming(tile_px):\n"
        "    def embed(tiles):\n"
        "        return tiles.reshape(len(tiles), -1)[:, :2]\n"
        "    embed.audit = {'spec': 'colour', 'dim': 9, 'status': 'absent', 'licence': 'mine'}\n"
        "    return embed\n\n"
        "def raising(tile_px):\n"
        "    raise ValueError(f'no weights for {tile_px} px')\n"
    )
    monkeypatch.chdir(tmp_path)
    encoder = load_encoder(configure(tmp_path, "python:claims:claiming"), "e")
    assert encoder.audit == {"spec": "python:claims:claiming", "dim": 2, "licence": "mine"}
    with pytest.raises(ValueError, match="no weights for 64 px"):
        load_encoder(configure(tmp_path, "python:claims:raising"), "e")


@pytest.mark.parametrize(("number", "absent"), [(errno.ENOSPC, False), (errno.ECONNREFUSED, True)])
def test_a_full_disk_is_no_missing_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, absent: bool
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "said so")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(MadError, match="said so") as caught:
        load_encoder(configure(tmp_path, "hf-hub:owner/name"), "e")
    assert isinstance(caught.value, MissingWeightsError) == absent


def test_bf16_is_near_fp32_and_said(tmp_path: Path) -> None:
    exact, rounded = (
        load_encoder(configure(tmp_path, "random:tiny", precision=precision), "e") for precision in ("fp32", "bf16")
    )
    assert (exact.audit["dtype"], rounded.audit["dtype"]) == ("float32", "bfloat16")
    a, b = exact(TILES), rounded(TILES)
    assert b.dtype == np.float32 and not np.array_equal(a, b)
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > 0.999
