import pytest
import torch

from trainers.checkpoints import CheckpointFile, CheckpointFileError


def test_what_is_saved_is_what_is_loaded(tmp_path):
    file = CheckpointFile(tmp_path / "deep" / "checkpoint.pt")
    assert file.load() is None
    file.save({"weights": {"a": torch.arange(3)}, "metrics": [{"step": 1, "loss": 0.5}], "none": None})
    state = file.load()
    assert torch.equal(state["weights"]["a"], torch.arange(3))
    assert state["metrics"] == [{"step": 1, "loss": 0.5}]
    file.remove()
    assert file.load() is None
    assert not list((tmp_path / "deep").iterdir())


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path):
    class Dies:
        def __reduce__(self):
            raise KeyboardInterrupt

    file = CheckpointFile(tmp_path / "checkpoint.pt")
    file.save({"step": 1})
    with pytest.raises(KeyboardInterrupt):
        file.save({"step": 2, "bad": Dies()})
    assert file.load()["step"] == 1


def test_a_damaged_checkpoint_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "checkpoint.pt"
    CheckpointFile(path).save({"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointFileError, match=r"checkpoint\.pt: unreadable.*remove it"):
        CheckpointFile(path).load()


def test_a_checkpoint_of_another_version_is_not_continued(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"code_version": 1, "policy": {}}, path)
    with pytest.raises(CheckpointFileError, match="version 1"):
        CheckpointFile(path).load()
