"""Published encoders by name: their true sizes, and stand-ins of fewer blocks through the whole way of loading."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from fake_results import fake_config, fake_results
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from mad.cli import app
from mad.config import parse_config
from mad.config.training import BackboneConfig
from mad.files import MadError, read_json
from mad.models import hub
from mad.models.encoders import build_published, layer_classes, load_encoder
from mad.models.registry import PUBLISHED
from mad.models.vit import build_backbone
from mad.reporting.tables import table3, table4, table5
from mad.stages import embed, evaluate
from mad.stages.report import read_reports

ROOT = Path(__file__).parents[1]
MILLIONS = {  # of parameters, as published
    "uni": 303.35, "uni2-h": 681.4, "prov-gigapath": 1134.95, "virchow2": 631.2, "h-optimus-0": 1134.8, "dinov2-g-reg": 1136.5,
    "mad-np": 1134.8,
}  # fmt: skip
ONE_BLOCK = {"depth": 1}
PREFIX = {"uni": 1, "uni2-h": 9, "prov-gigapath": 1, "virchow2": 5, "h-optimus-0": 5, "dinov2-g-reg": 5, "mad-np": 5}
TILES = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3)).astype(np.uint8)


def configure(folder, name, **entry):
    encoders = [{"name": "e", "spec": f"published:{name}", "precision": "fp32", **entry}]
    return parse_config({"results": str(folder), "tile": {"tile_px": 112}, "encoders": encoders})


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_architecture_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = build_published(PUBLISHED[name], PUBLISHED[name].image_px)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(MILLIONS[name], rel=2e-3)
    per_token = 2 if PUBLISHED[name].pooling == "cls+avg" else 1
    assert PUBLISHED[name].dim == per_token * model.num_features
    assert model.num_prefix_tokens == PREFIX[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_in_their_published_layout_give_their_published_embedding(tmp_path, name):
    """A stand-in of one block at the published size is saved as the hub has it, and embeds tiles of 112 px at their own scale."""
    published = PUBLISHED[name]
    torch.manual_seed(0)
    theirs = build_published(published, published.image_px, ONE_BLOCK).eval()
    file = tmp_path / "weights" / "pytorch_model.bin"
    file.parent.mkdir()
    torch.save(theirs.state_dict(), file)
    encoder = load_encoder(configure(tmp_path, name, args=ONE_BLOCK, weights=str(file.parent)), "e")
    vectors = encoder(TILES)

    args = layer_classes({**published.args, **ONE_BLOCK})
    own = timm.create_model(published.model, num_classes=0, global_pool="token", img_size=112, **args).eval()
    state = {key: value for key, value in theirs.state_dict().items() if key != "pos_embed"}
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(
        theirs.pos_embed,
        [own.patch_embed.grid_size[0]] * 2,
        num_prefix_tokens=0 if own.no_embed_class else PREFIX[name],
    )
    own.load_state_dict(state)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in published.mean_std)
    with torch.no_grad():
        tokens = own.forward_features((torch.from_numpy(TILES).permute(0, 3, 1, 2) / 255 - mean) / std)
    wanted = tokens[:, 0]
    if published.pooling == "cls+avg":
        wanted = torch.cat([wanted, tokens[:, PREFIX[name] :].mean(dim=1)], dim=1)
    assert vectors.shape == (2, published.dim)
    np.testing.assert_allclose(vectors, wanted.numpy(), rtol=1e-3, atol=1e-4)
    assert encoder.audit["licence"] == published.licence
    assert encoder.audit["mean"] == list(published.mean_std[0]) and encoder.audit["resize"] is None


def test_weights_of_another_encoder_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(build_published(PUBLISHED["uni"], 224, ONE_BLOCK).state_dict(), file)
    with pytest.raises(
        MadError, match=r"^encoders.e.weights: .*these weights are of.*; Virchow2 has .*paige-ai"
    ) as caught:
        load_encoder(configure(tmp_path, "virchow2", args=ONE_BLOCK, weights=str(file)), "e")
    assert "backbone" not in str(caught.value)
    file.write_bytes(b"damaged")
    with pytest.raises(MadError, match=r"^encoders.e.weights: .*no readable weights"):
        load_encoder(configure(tmp_path, "virchow2", args=ONE_BLOCK, weights=str(file)), "e")


def test_names_and_places_that_are_wrong_say_what_mends_them(tmp_path):
    with pytest.raises(MadError, match="did you mean uni"):
        load_encoder(configure(tmp_path, "uni3"), "e")
    with pytest.raises(MadError, match=r"encoders.e.weights: .*no such file"):
        load_encoder(configure(tmp_path, "uni", weights=str(tmp_path / "none.bin")), "e")
    with pytest.raises(MadError, match="only `published:NAME` takes weights"):
        parse_config({"encoders": [{"name": "e", "spec": "colour", "weights": "x"}]})
    with pytest.raises(MadError, match="act_layer: neither timm.layers nor torch.nn has a class 'SiluLike'"):
        layer_classes({"act_layer": "SiluLike"})
    assert layer_classes({"act_layer": "SiLU", "depth": 3}) == {"act_layer": nn.SiLU, "depth": 3}


def test_an_encoder_whose_weights_cannot_be_had_is_an_absent_row(tmp_path, monkeypatch):
    def out_of_reach(*_args, **_kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", out_of_reach)
    fake_results(tmp_path, {"present": 0.0})
    config = fake_config(tmp_path, ["present"])
    value = config.model_dump(mode="json")
    value["encoders"].append({"name": "gated", "spec": "published:virchow2"})
    config = parse_config(value)
    embed.run(config, "gated")
    assert read_json(tmp_path / "embed" / "gated" / "audit.json")["status"] == "absent"
    for encoder in ("present", "gated"):
        evaluate.run(config, encoder)
    names, reports = ["present", "gated"], read_reports(tmp_path, ["present", "gated"])
    for table in (table3(names, reports, list(config.label.classes)), table4(names, reports), table5(names, reports)):
        absent = {row.name: row.absent for row in table.rows}
        assert absent["present"] is None
        assert "the hub is out of reach" in absent["gated"] and "encoders.gated.weights" in absent["gated"]
    strict = parse_config(value | {"on_missing_encoder": "fail"})
    with pytest.raises(MadError, match="out of reach"):
        embed.run(strict, "gated")


def test_the_list_names_licence_and_page():
    result = CliRunner().invoke(app, ["encoders"])
    assert result.exit_code == 0
    for name, published in PUBLISHED.items():
        (line,) = [line for line in result.output.splitlines() if line.startswith(f"{name} ")]
        assert published.hub in line and published.licence in line and ("gated" in line) == published.gated


@pytest.mark.parametrize("name", ["uni2-h", "virchow2"])
def test_a_run_may_start_from_it_as_another_size_of_dinov2s_vit_g(name):
    """The arguments of docs/encoders.md, which name no classes of layers: with equal weights a block of both gives equal tokens."""
    text = (ROOT / "docs" / "encoders.md").read_text()
    args = {
        "uni2-h": yaml.safe_load(text[text.index("args: {depth: 24") :].split("\n")[0])["args"],
        "virchow2": yaml.safe_load("{" + text[text.index("(Virchow2: `") + 12 :].split("`")[0] + "}"),
    }[name]
    with torch.device("meta"):
        whole = build_backbone(BackboneConfig(model="vit_giant_patch14_reg4_dinov2", args=args), 224)
    assert sum(value.numel() for value in whole.parameters()) / 1e6 == pytest.approx(MILLIONS[name], rel=2e-3)
    published = build_published(PUBLISHED[name], 112, ONE_BLOCK).eval()
    backbone = BackboneConfig(model="vit_giant_patch14_reg4_dinov2", args=args | ONE_BLOCK)
    ours = build_backbone(backbone, 112).eval()
    ours.load_state_dict(published.state_dict(), strict=True)
    images = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours.forward_features(images), published.forward_features(images))
