"""Which checkpoints count as complete."""

from qlora_phi3.training.checkpoint import MANIFEST, find_checkpoint, is_complete, write_manifest


def make_checkpoint(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "inner").mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"1234")
    (checkpoint / "inner" / "state").write_bytes(b"12")
    write_manifest(checkpoint)
    return checkpoint


def test_a_checkpoint_is_complete_while_every_file_has_the_size_of_the_manifest(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2)
    assert is_complete(checkpoint)
    (checkpoint / "inner" / "state").write_bytes(b"1")
    assert not is_complete(checkpoint)
    (checkpoint / "inner" / "state").unlink()
    assert not is_complete(checkpoint)


def test_without_a_readable_manifest_no_checkpoint_is_complete(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2)
    (checkpoint / MANIFEST).write_text("{", encoding="utf-8")
    assert not is_complete(checkpoint)
    (checkpoint / MANIFEST).unlink()
    assert not is_complete(checkpoint)


def test_the_newest_complete_checkpoint_is_found_by_number_not_by_name(tmp_path):
    make_checkpoint(tmp_path, 9)
    newest, incomplete = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 11)
    (incomplete / MANIFEST).unlink()
    (tmp_path / "checkpoint-other").mkdir()
    assert find_checkpoint(tmp_path) == (newest, [incomplete])
    assert find_checkpoint(tmp_path / "none") == (None, [])
