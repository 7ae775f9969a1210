"""Where runs start: each form of `init` finds its file and licence, or says what would mend it."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fakes
import pytest
import torch
from conftest import heed_permissions
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import save_file

from mad.config import parse_config
from mad.config.training import BackboneConfig, MaskConfig, RunConfig
from mad.files import MadError, read_json, sha256_file
from mad.models import hub
from mad.models.hub import MissingWeightsError, Source, card_licence
from mad.models.initial import check_normalisation, find_source, initial_licence
from mad.models.registry import PUBLISHED
from mad.models.vit import build_backbone
from mad.models.weights import Loaded
from mad.stages import train
from mad.training import loop

CARD = "---\nlicense: cc-by-nc-4.0\n---\n# theirs\n"


def run_from(init):
    return RunConfig(**fakes.tiny_run(init=init))


def failure(kind):
    return kind("said so", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize("init", ["random", "timm"])
def test_no_file_stands_for_random_and_timm(tmp_path, init):
    assert find_source(run_from(init), tmp_path) is None


def test_a_run_starts_from_another_runs_encoder(tmp_path):
    with pytest.raises(MadError, match="train the run"):
        find_source(run_from("run:first"), tmp_path)
    folder = tmp_path / "train" / "first" / "encoder"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    (folder / "README.md").write_text(CARD)
    assert find_source(run_from("run:first"), tmp_path) == Source(folder / "model.safetensors", "cc-by-nc-4.0")


def test_a_file_or_its_folder(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for init in (f"file:{path}", f"file:{tmp_path}"):
        with pytest.raises(MadError, match=r"name a .safetensors or .pth file or its folder"):
            find_source(run_from(init), tmp_path)
        path.touch()
        assert find_source(run_from(init), tmp_path) == Source(path, None)
        assert run_from(init).init_file == path
        path.unlink()
    path.touch()
    (tmp_path / "README.md").write_text(CARD)
    assert find_source(run_from(f"file:{path}"), tmp_path) == Source(path, None)  # a neighbour's card tells nothing
    assert find_source(run_from(f"file:{tmp_path}"), tmp_path) == Source(path, "cc-by-nc-4.0")
    (tmp_path / "model.safetensors").touch()
    assert find_source(run_from(f"file:{tmp_path}"), tmp_path).path.name == "model.safetensors"
    assert run_from("random").init_file is None


@pytest.mark.parametrize("spec", ["weights", "weights/model.safetensors", "local-dir"])
def test_weights_that_may_not_be_entered_say_so(tmp_path, spec):
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).touch()
    ask = f"""
from pathlib import Path
from mad.files import MadError
from mad.config.encoders import EncoderConfig
from mad.models.encoders import _load_local
from mad.models.hub import local_weights
try:
    if {spec!r} == "local-dir":
        _load_local(Path("weights"), EncoderConfig(name="e", spec="local-dir:weights"), 112)
    else:
        local_weights({spec!r}, "key")
except MadError as error:
    print(error)
"""
    folder.chmod(0)
    try:
        told = subprocess.run(
            [sys.executable, "-c", ask], cwd=tmp_path, preexec_fn=heed_permissions, capture_output=True, text=True
        )
    finally:
        folder.chmod(0o755)
    assert told.stdout.endswith("Permission denied; mend its permissions\n"), told


def test_weights_go_on_with_the_colours_that_they_know(tmp_path):
    """As timm, transformers and this package tell them beside the weights; an entry that names others has its way."""
    (tmp_path / "model.safetensors").touch()
    told = {"mean": [0.7, 0.55, 0.69], "std": [0.21, 0.24, 0.17]}
    theirs = {"image_mean": told["mean"], "image_std": told["std"]}
    run, asks = run_from(f"file:{tmp_path}"), {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    model = build_backbone(run.backbone, 32)
    check_normalisation(run, find_source(run, tmp_path), model)  # nothing is told
    for name, content in (("config.json", {"pretrained_cfg": told}), ("preprocessor_config.json", theirs)):
        (tmp_path / "config.json").write_text('{"architectures": ["Dinov2Model"]}')
        (tmp_path / name).write_text(json.dumps(content))
        source = find_source(run, tmp_path)
        assert source.mean_std == ((0.7, 0.55, 0.69), (0.21, 0.24, 0.17))
        with pytest.raises(
            MadError, match=r"set backbone.mean: \[0.7, 0.55, 0.69\] and backbone.std: \[0.21, 0.24, 0.17\]"
        ):
            check_normalisation(run, source, model)
        for mean_std in (asks, told):
            named = run_from(run.init).model_copy(
                update={"backbone": BackboneConfig(**run.backbone.model_dump() | mean_std)}
            )
            check_normalisation(named, source, build_backbone(named.backbone, 32))
        (tmp_path / name).unlink()


@pytest.mark.parametrize("card", ["no front matter", "---\nlicense: [a, b]\n---\n", "---\n: : :\n---\n"])
def test_a_card_without_a_licence(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    assert card_licence(tmp_path / "README.md") is None


def test_the_hub_is_asked_for_safetensors_first_and_for_the_card(tmp_path, monkeypatch):
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        if name == "model.safetensors":
            raise failure(RemoteEntryNotFoundError)
        if name == "config.json":
            raise failure(HfHubHTTPError)
        (tmp_path / name).write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}' if ".json" in name else CARD)
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    found = find_source(run_from("hf-hub:owner/name@v1"), tmp_path)
    assert found == Source(tmp_path / "pytorch_model.bin", "cc-by-nc-4.0", ((0, 0, 0), (1, 1, 1)))
    files = ("model.safetensors", "pytorch_model.bin", "README.md", "config.json", "preprocessor_config.json")
    assert asked == [("owner/name", name, "v1") for name in files]
    uni = find_source(run_from("hf-hub:MahmoodLab/UNI"), tmp_path)
    assert uni.mean_std == PUBLISHED["uni"].mean_std, "known without asking"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (failure(GatedRepoError), r"licence at https://huggingface.co/owner/name.*HF_TOKEN.*file:PATH"),
        (failure(RepositoryNotFoundError), r"no such repository.*https://huggingface.co/owner/name"),
        (failure(RemoteEntryNotFoundError), r"no model.safetensors or pytorch_model.bin.*file:PATH"),
        (failure(HfHubHTTPError), r"cannot be downloaded \(said so"),
        (LocalEntryNotFoundError("offline"), r"out of reach.*HF_HOME.*file:PATH"),
        (ConnectionError("no route"), r"cannot be downloaded \(no route"),
    ],
)
def test_what_the_hub_refuses_is_explained(tmp_path, monkeypatch, error, words):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(MadError, match=r"runs.tiny.init: hf-hub:owner/name.*" + words):
        find_source(run_from("hf-hub:owner/name"), tmp_path)


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EACCES", "EROFS", "EIO"])
def test_a_fault_of_this_machine_is_no_missing_weight(tmp_path, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(getattr(errno, number), "said so")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(MadError, match=r"runs.tiny.init.*to this machine .*said so.*HF_HOME") as caught:
        find_source(run_from("hf-hub:owner/name"), tmp_path)
    assert not isinstance(caught.value, MissingWeightsError)


def test_offline_the_cached_file_is_used_without_its_card(tmp_path, monkeypatch):
    def download(repository, name, revision=None):
        if name == "pytorch_model.bin":
            return str(tmp_path / name)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert find_source(run_from("hf-hub:owner/name"), tmp_path) == Source(tmp_path / "pytorch_model.bin", None)


def test_licences_of_what_a_run_starts_from():
    model = torch.nn.Identity()
    model.pretrained_cfg = {"license": "mit"}
    assert initial_licence(run_from("random"), None, model) == "apache-2.0"
    assert initial_licence(run_from("timm"), None, model) == "mit"
    assert initial_licence(run_from("file:x"), Source(Path("x"), None), model) is None
    assert initial_licence(run_from("run:a"), Source(Path("x"), "mit"), model) == "mit"


@pytest.mark.parametrize("init", ["file:", "hf-hub:owner", "hf-hub:a/b/c", "hf_hub:a/b", "run:../x", "dinov2"])
def test_other_forms_of_init_are_refused(init):
    with pytest.raises(MadError, match="init"):
        parse_config({"runs": [fakes.tiny_run(init=init)]})


def test_a_run_is_known_by_the_bytes_that_it_starts_from(tmp_path):
    """Training from a file records its digest; other bytes under the same name are another run, kept beside the first."""
    fakes.write_cohort(tmp_path)
    path = tmp_path / "start.safetensors"
    config = fakes.tiny_config(tmp_path, fakes.tiny_run(init=f"file:{path}", steps=3))
    folder = tmp_path / "train" / "tiny"
    digests = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_file(build_backbone(config.run("tiny").backbone, fakes.TILE_PX).state_dict(), path)
        train.run(config, "tiny")
        summary = read_json(folder / "summary.json")
        assert summary["init_sha256"] == sha256_file(path)
        digests.append(summary["weights_sha256"])
    assert digests[0] != digests[1]
    (archived,) = (folder / "archive").iterdir()
    assert sha256_file(archived / "encoder" / "model.safetensors") == digests[0]
    assert "licence of these weights: unknown" in (folder / "encoder" / "README.md").read_text()
    path.unlink()
    with pytest.raises(MadError, match="no such file"):
        train.run(config, "tiny")


def test_a_run_starts_from_the_teacher_in_anothers_checkpoint(tmp_path, monkeypatch):
    """What a user does after a loss that is not finite: another lr, from the last good weights."""
    fakes.write_cohort(tmp_path)
    masked = {"ibot": {"weight": 1}}
    train.run(fakes.tiny_config(tmp_path, fakes.tiny_run(**masked)), "tiny")
    path = tmp_path / "train" / "tiny" / "checkpoints" / "step_0000008.pt"
    second = fakes.tiny_run(name="second", init=f"file:{path}", lr=5e-4, steps=3, **masked)
    starts, built = [], loop.build_networks
    monkeypatch.setattr(train, "build_networks", lambda *given: starts.append(built(*given)) or starts[-1])
    monkeypatch.setattr(train, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.run(fakes.tiny_config(tmp_path, second), "second")
    former = torch.load(path, weights_only=True)["teacher"]
    student = starts[0][0].state_dict()
    for name, tensor in former.items():
        assert torch.equal(student[name], tensor) == (name.startswith("backbone.") or name == "mask_token"), name
    assert read_json(tmp_path / "train" / "second" / "identity.json")["init_sha256"] == sha256_file(path)


def test_masked_patches_continue_with_the_mask_token_of_the_weights(tmp_path):
    run = run_from("random").model_copy(update={"ibot": MaskConfig(weight=1)})
    student, _ = loop.build_networks(run, 32, 0)
    token = torch.linspace(-1, 1, student.mask_token.shape[-1])

    def load(backbone):
        return Loaded("meta", token, None, ())

    student, teacher = loop.build_networks(run, 32, 0, load)
    assert torch.equal(student.mask_token[0], token) and torch.equal(teacher.mask_token[0], token)
    plain, _ = loop.build_networks(run_from("random"), 32, 0, load)
    assert plain.mask_token is None
