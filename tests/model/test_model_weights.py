"""Tensors are read from their files in row chunks, and an incomplete file is refused."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hub_server import serve_model
from safetensors.torch import load_file, save_file

from qlora_phi3.errors import ExportError, ModelError
from qlora_phi3.model import weights as weights_module
from qlora_phi3.model.weights import TensorInfo, open_file, open_weights, read_tensor, rows_per_chunk, split_rows


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "wide": torch.randn(200, 96),
        "half": torch.randn(130, 64).half(),
        "norm": torch.randn(64).bfloat16(),
        "packed": torch.randint(0, 255, (100, 1), dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
    }


@pytest.fixture
def sharded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    first, second = ("wide", "norm"), ("half", "packed", "scalar")
    for file_name, names in (("a.safetensors", first), ("b.safetensors", second)):
        save_file({name: tensors[name] for name in names}, tmp_path / file_name)
    where = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    return tmp_path


def test_shards_give_the_tensors_that_were_saved(sharded, tensors):
    weights = open_weights(sharded)
    assert weights.info == {name: TensorInfo(tuple(saved.shape), saved.dtype) for name, saved in tensors.items()}
    assert all(torch.equal(read_tensor(weights, name), saved) for name, saved in tensors.items())


def test_pieces_are_consecutive_rows_in_multiples_of_64(sharded, tensors, monkeypatch):
    monkeypatch.setattr(weights_module, "ROW_CHUNK_BYTES", 64 * 96 * 4)
    pieces = list(open_weights(sharded).iter_row_chunks("wide"))
    assert [len(piece) for piece in pieces] == [64, 64, 64, 8]
    assert torch.equal(torch.cat(pieces), tensors["wide"])
    assert [len(piece) for piece in split_rows(tensors["wide"])] == [64, 64, 64, 8]


def test_a_piece_of_phi3s_largest_layers_stays_within_its_bytes():
    for columns in (3072, 5120, 8192, 17920):
        rows = rows_per_chunk(TensorInfo((100_000, columns), torch.bfloat16))
        assert rows % 64 == 0
        assert rows * columns * 2 <= weights_module.ROW_CHUNK_BYTES


def test_one_file_comes_before_an_index(sharded, tensors):
    save_file({"only": tensors["wide"]}, sharded / "model.safetensors")
    assert list(open_weights(sharded).info) == ["only"]


def test_a_missing_shard_is_named_with_a_tensor_it_holds(sharded):
    (sharded / "b.safetensors").unlink()
    with pytest.raises(ModelError, match="half"):
        open_weights(sharded)


@pytest.mark.parametrize(("left", "named"), [(-1, "a.safetensors"), (20, "a.safetensors"), (3, "a.safetensors")])
def test_a_cut_shard_is_named(sharded, left, named):
    path = sharded / "a.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ModelError, match=named):
        open_weights(sharded)


def test_a_file_that_is_cut_while_it_is_read_is_named(sharded):
    weights = open_weights(sharded)
    (sharded / "a.safetensors").write_bytes((sharded / "a.safetensors").read_bytes()[:-100])
    with pytest.raises(ModelError, match="100 bytes"):
        [read_tensor(weights, name) for name in ("wide", "norm")]


def test_a_tensor_that_its_shard_does_not_hold_is_named(sharded):
    index = sharded / "model.safetensors.index.json"
    named = json.loads(index.read_text(encoding="utf-8"))
    named["weight_map"]["lost"] = "a.safetensors"
    index.write_text(json.dumps(named), encoding="utf-8")
    with pytest.raises(ModelError, match="lost"):
        open_weights(sharded)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "pytorch_model.bin"])
def test_an_index_that_leads_elsewhere_is_refused(sharded, shard):
    named = {"weight_map": {"x": shard}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(named), encoding="utf-8")
    with pytest.raises(ModelError, match=re.escape(shard)):
        open_weights(sharded)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": [1]}', "{}"])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError):
        open_weights(tmp_path)


def test_a_pickle_is_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError):
        open_weights(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ModelError):
        open_weights(tmp_path)


def test_bytes_that_belong_to_no_tensor_are_refused(tmp_path, tensors):
    save_file({"wide": tensors["wide"]}, tmp_path / "model.safetensors")
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelError):
        open_weights(tmp_path)


def test_a_file_that_is_no_safetensors_raises_the_error_asked_for(tmp_path):
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(ExportError):
        open_file(tmp_path / "x.safetensors", error=ExportError)


def test_an_element_type_that_is_not_known_is_named(tmp_path):
    save_file({"small": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="F8_E4M3"):
        open_weights(tmp_path)


def test_the_whole_is_what_the_library_reads(sharded):
    by_library = load_file(sharded / "a.safetensors")
    weights = open_file(sharded / "a.safetensors")
    assert weights.info.keys() == by_library.keys()
    assert all(torch.equal(read_tensor(weights, name), tensor) for name, tensor in by_library.items())


def test_weights_of_the_hub_are_downloaded_with_progress_and_found_the_second_time(tmp_path, monkeypatch):
    """From a hub on this computer. Other files of the repository are not downloaded."""
    for name, size in (("model-1.safetensors", 5), ("model-2.safetensors", 3), ("onnx.bin", 9)):
        (tmp_path / "repository" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "repository" / name).write_bytes(bytes(size * 2**20))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    heard: list[tuple[str, int, int]] = []
    with serve_model("owner/tiny", tmp_path / "repository") as address:
        from_here = partial(weights_module.snapshot_download, endpoint=address, cache_dir=tmp_path / "cache")
        monkeypatch.setattr(weights_module, "snapshot_download", from_here)
        folder = weights_module.download_weights("owner/tiny", None, lambda *progress: heard.append(progress))
        assert sorted(path.name for path in folder.iterdir()) == ["model-1.safetensors", "model-2.safetensors"]
        assert {what for what, _, _ in heard} == {"Downloading owner/tiny (MiB)"}
        assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
        assert heard[-1][1:] == (8, 8)
        assert all(done < total for _, done, total in heard[:-1])
        heard.clear()
        assert weights_module.download_weights("owner/tiny", None, lambda *progress: heard.append(progress)) == folder
        assert heard == []
