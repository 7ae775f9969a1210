"""Checkpoints: whole, pruned to two, refused for another run."""

import errno
import shutil
import struct
from pathlib import Path

import fakes
import pytest
import torch

from mad.files import MadError, StorageError
from mad.stages import train
from mad.training import checkpoint


def state(value, identity="a"):
    return {"identity": {"recipe_digest": identity}, "weights": torch.full((3,), float(value))}


def test_keeps_the_last_two_and_loads_the_newest(tmp_path):
    for step in (5, 10, 1000):
        checkpoint.save(tmp_path, step, state(step))
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step_0000010.pt", "step_0001000.pt"]
    assert [path.name for path in tmp_path.iterdir() if path not in checkpoint.found(tmp_path)] == []
    loaded = checkpoint.load_latest(tmp_path, {"recipe_digest": "a"})
    assert loaded["step"] == 1000
    assert loaded["weights"].tolist() == [1000] * 3


def test_mapped_tensors_are_the_same_and_outlive_their_file(tmp_path):
    path = checkpoint.save(tmp_path, 5, state(5))
    mapped = checkpoint.load_latest(tmp_path, {"recipe_digest": "a"})
    assert str(path) in Path("/proc/self/maps").read_text()  # read when it is used, and shared by processes
    path.unlink()
    assert mapped["weights"].tolist() == [5] * 3
    checkpoint.save(tmp_path, 6, state(6)).write_bytes(b"PK half a file")
    with pytest.raises(MadError, match="none of 1"):
        checkpoint.load_latest(tmp_path, {"recipe_digest": "a"})


def test_an_unreadable_file_falls_back_to_the_one_before(tmp_path, capfd):
    checkpoint.save(tmp_path, 5, state(5))
    checkpoint.save(tmp_path, 6, state(6)).write_bytes(b"PK half a file")
    assert checkpoint.load_latest(tmp_path, {"recipe_digest": "a"})["step"] == 5
    assert "step_0000006.pt is passed over, it cannot be read: " in capfd.readouterr().err
    (tmp_path / "step_0000005.pt").write_bytes(b"")
    with pytest.raises(MadError, match="none of 2"):
        checkpoint.load_latest(tmp_path, {"recipe_digest": "a"})


def test_a_flipped_bit_falls_back_to_the_one_before(tmp_path, capfd):
    for step in (3, 6):
        checkpoint.save(tmp_path, step, {"identity": {}, "weights": torch.full((1000,), float(step))})
    path = tmp_path / "step_0000006.pt"
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<f", 6.0) * 10) + 400] ^= 1
    path.write_bytes(data)
    assert torch.equal(checkpoint.load_latest(tmp_path, {})["weights"], torch.full((1000,), 3.0))
    assert "step_0000006.pt is passed over" in capfd.readouterr().err


def test_leftovers_of_a_killed_save_are_removed_and_checkpoints_stay(tmp_path):
    path = checkpoint.save(tmp_path, 5, state(5))
    with pytest.MonkeyPatch.context() as patch:  # a killed process removes nothing
        patch.setattr(checkpoint.torch, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 6, state(6))
    assert len(list(tmp_path.iterdir())) == 2
    checkpoint.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_torn_checkpoint_takes_no_place_of_a_good_one_and_is_kept(tmp_path):
    for step in (1000, 2000):
        checkpoint.save(tmp_path, step, state(step))
    (tmp_path / "step_0002000.pt").write_bytes(b"PK half a file")
    loaded = checkpoint.load_latest(tmp_path, {"recipe_digest": "a"})
    checkpoint.set_aside(tmp_path, loaded)
    for step in (1500, 2500):  # around the torn one
        checkpoint.save(tmp_path, step, state(step))
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step_0001500.pt", "step_0002500.pt"]
    assert (tmp_path / "step_0002000.pt.unreadable").read_bytes() == b"PK half a file"
    checkpoint.set_aside(tmp_path, checkpoint.load_latest(tmp_path, {"recipe_digest": "a"}))
    assert len(checkpoint.found(tmp_path)) == 2


def test_a_run_resumed_past_a_torn_checkpoint_keeps_its_good_ones(tmp_path):
    """Through the stage: stopped after step 8, whose file is torn; checkpoints are saved at other steps from then on."""
    fakes.write_cohort(tmp_path)
    entry = fakes.tiny_run(steps=8)
    train.run(fakes.tiny_config(tmp_path, entry), "tiny")
    folder = tmp_path / "train" / "tiny"
    (folder / "checkpoints" / "step_0000008.pt").write_bytes(b"PK half a file")
    shutil.rmtree(folder / "encoder")
    entry["runtime"]["checkpoint_steps"] = 3
    train.run(fakes.tiny_config(tmp_path, entry), "tiny")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step_0000006.pt", "step_0000008.pt", "step_0000008.pt.unreadable"]


def test_another_run_is_refused_and_none_is_none(tmp_path):
    assert checkpoint.load_latest(tmp_path, {}) is None
    checkpoint.save(tmp_path, 5, state(5))
    with pytest.raises(MadError, match=r'another recipe.*\(recipe_digest: "a" -> "b"\)'):
        checkpoint.load_latest(tmp_path, {"recipe_digest": "b"})


def test_differences_name_the_keys_of_nested_recipes():
    former = {"run": {"lr": 1, "head": {"prototypes": 8}, "koleo": 0.1}, "seed": 3}
    present = {"run": {"lr": 2, "head": {"prototypes": 8, "hidden": 4}, "koleo": 0.1}, "seed": 3}
    assert checkpoint.differences(former, present) == ["run.head.hidden: none -> 4", "run.lr: 1 -> 2"]
    assert checkpoint.differences(former, former) == []


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    kept = checkpoint.save(tmp_path, 5, state(5))
    save = torch.save
    monkeypatch.setattr(checkpoint.torch, "save", lambda value, _: save(value, "/dev/full"))
    with pytest.raises(StorageError, match=r"step_0000006.pt: cannot be written.*resumes from the checkpoint before"):
        checkpoint.save(tmp_path, 6, state(6))
    assert list(tmp_path.iterdir()) == [kept]


def test_a_checkpoint_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"identity": {}, "x": Evil()}, tmp_path / "step_0000001.pt")
    with pytest.raises(MadError, match="none of 1"):
        checkpoint.load_latest(tmp_path, {})
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), StorageError, r"step_0000006.pt: cannot be read .*Input/output"),
        (RuntimeError("unable to mmap: Cannot allocate memory (12)"), RuntimeError, "Cannot allocate"),
        (torch.OutOfMemoryError("CUDA"), RuntimeError, "CUDA"),
    ],
)
def test_a_fault_of_the_machine_costs_no_checkpoint(tmp_path, monkeypatch, fault, kind, message):
    for step in (5, 6):
        checkpoint.save(tmp_path, step, state(step))

    def load(*_, **__):
        raise fault

    monkeypatch.setattr(checkpoint.torch, "load", load)
    with pytest.raises(kind, match=message):
        checkpoint.load_latest(tmp_path, {"recipe_digest": "a"})


def test_a_disk_that_fails_under_torchs_reader_is_told_from_a_torn_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 6, state(6))

    def load(*_, **__):
        raise RuntimeError("PytorchStreamReader failed reading file data/0: file read failed")

    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.torch, "load", load)
    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(StorageError, match="Input/output"):
        checkpoint.load_latest(tmp_path, {"recipe_digest": "a"})


def test_processes_that_loaded_different_steps_are_refused(tmp_path, monkeypatch):
    device = torch.device("cpu")
    checkpoint.check_same_step(tmp_path, None, device)
    monkeypatch.setattr(checkpoint.ranks, "all_max", lambda value: torch.maximum(value, torch.tensor([8, -8])))
    checkpoint.check_same_step(tmp_path, {"step": 8}, device)
    for saved, words in (({"step": 4}, "step 4, others between 4 and 8"), (None, "step 0, others between 0 and 8")):
        with pytest.raises(MadError, match=words):
            checkpoint.check_same_step(tmp_path, saved, device)
