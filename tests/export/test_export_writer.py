"""What is written a piece at a time is a checkpoint like any other."""

import errno
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_model import save_tiny_model
from transformers import Phi3ForCausalLM

from qlora_phi3.errors import ExportError
from qlora_phi3.export import writer
from qlora_phi3.export.writer import check_disk, ensure_dir, plan_shards, staging_dir, write_shards
from qlora_phi3.model.weights import TensorInfo, open_weights, read_tensor, split_rows


class Held:
    """Tensors in memory that note who was asked for, and may fail."""

    def __init__(self, tensors: dict[str, torch.Tensor], fail_at: str = "") -> None:
        self.tensors, self.fail_at, self.asked = tensors, fail_at, []
        self.info = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def iter_row_chunks(self, name: str) -> Iterator[torch.Tensor]:
        self.asked.append(name)
        if name == self.fail_at:
            raise KeyboardInterrupt
        yield from split_rows(self.tensors[name])


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "norm": torch.randn(63).bfloat16(),
        "wide": torch.randn(200, 64),
        "half": torch.randn(300, 64).half(),
        "last": torch.randn(150, 64).bfloat16(),
    }


def write(weights: Any, folder: Path, shard_bytes: int = 51_400, **options: Any) -> None:
    write_shards(weights, folder, shard_bytes, **options)


def test_the_library_reads_one_file_back(tmp_path, tensors):
    write(Held(tensors), tmp_path, shard_bytes=10**9)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned_to_its_type(tmp_path, tensors):
    write(Held(tensors), tmp_path, shard_bytes=10**9)
    for place in open_weights(tmp_path).locations.values():
        assert place.offset % place.info.dtype.itemsize == 0


def test_shards_and_their_index_are_read_back(tmp_path, tensors):
    write(Held(tensors), tmp_path)
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.glob("model*")) == [*names, "model.safetensors.index.json"]
    weights = open_weights(tmp_path)
    assert all(torch.equal(read_tensor(weights, name), tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_transformers_loads_what_was_written(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    target = tmp_path / "target"
    write(open_weights(base), target, shard_bytes=200_000)
    (target / "config.json").write_bytes((base / "config.json").read_bytes())
    assert len(list(target.glob("*.safetensors"))) > 2
    first, second = (Phi3ForCausalLM.from_pretrained(folder).state_dict() for folder in (base, target))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_size_is_known_to_the_byte_beforehand(tmp_path, tensors):
    shards = plan_shards(Held(tensors).info, 51_400)
    write(Held(tensors), tmp_path)
    assert [(tmp_path / shard.file_name).stat().st_size for shard in shards] == [shard.num_bytes for shard in shards]


def test_no_shard_is_larger_than_asked_unless_one_tensor_is(tensors):
    shards = plan_shards(Held(tensors).info, 45_000)
    assert [shard.names for shard in shards] == [("wide",), ("norm", "half"), ("last",)]
    assert [shard.names for shard in plan_shards(Held(tensors).info, 58_000)] == [("wide", "norm"), ("half", "last")]


def test_a_full_disk_is_one_line(tmp_path, tensors, monkeypatch):
    written, write_all = [], writer._write_all

    def fill_up(write: Any, data: Any) -> None:
        written.append(memoryview(data).nbytes)
        if sum(written) > 70_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(write, data)

    monkeypatch.setattr(writer, "_write_all", fill_up)
    with pytest.raises(ExportError, match="No space left on device"):
        write(Held(tensors), tmp_path)


def test_a_write_that_takes_only_a_part_is_continued(tmp_path):
    taken = []

    def take_a_little(view: Any) -> int:
        taken.append(bytes(view[:3]))
        return min(3, len(view))

    writer._write_all(take_a_little, b"0123456789")
    assert b"".join(taken) == b"0123456789"


def test_progress_ends_at_all_bytes(tmp_path, tensors):
    told: list[tuple[int, int]] = []
    write(Held(tensors), tmp_path, progress=lambda done, total: told.append((done, total)))
    total = sum(shard.num_bytes for shard in plan_shards(Held(tensors).info, 51_400))
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_of_a_draft_only_what_a_later_attempt_can_use_stays(tmp_path, tensors):
    draft, scored = tmp_path / "deep" / ".model.partial", ".scored.json"
    with pytest.raises(KeyboardInterrupt), staging_dir(draft, scored):
        write(Held(tensors, fail_at="half"), draft)
    assert not (tmp_path / "deep").exists()
    (draft / "figures" / "more").mkdir(parents=True)
    (draft / "tokenizer.model").touch()
    with suppress(KeyError), staging_dir(draft, scored):
        assert [*draft.iterdir()] == []
        (draft / scored).touch()
        write(Held(tensors), draft)
        raise KeyError
    assert [path.name for path in draft.iterdir()] == [scored]
    with staging_dir(draft, scored):
        draft.replace(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "other"]


def test_a_folder_is_made_at_once_and_goes_again_where_nothing_came_into_it(tmp_path):
    with ensure_dir(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    (tmp_path / "stood").mkdir()
    with ensure_dir(tmp_path / "stood"):
        assert [*(tmp_path / "stood").iterdir()] == []
    with ensure_dir(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").is_file()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    check_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(ExportError, match=r"931322574\.62 GiB"):
        check_disk(tmp_path / "not" / "yet", 10**18)
