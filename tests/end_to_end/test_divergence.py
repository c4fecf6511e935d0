"""Runs that diverge: they stop in one line, before the weights are written again."""

import torch
from safetensors.torch import load_file, save_file
from workshop import read_json, read_lines


def change_weight(shop, name, value):
    path = shop.copy_base() / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, path, {"format": "pt"})
    return {"model": {"name": "copy"}}


def stopped(shop, *words, **tables):
    shop.write(**tables)
    result = shop.run()
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    for word in words:
        assert word in line
    (folder,) = shop.runs()
    report = read_json(folder / "report.json")
    assert report["status"] == "failed"
    assert line.removeprefix("Error: ") == report["error"]
    assert not (folder / "adapter").exists()
    return folder


def test_a_learning_rate_that_blows_the_run_up_stops_it_at_the_next_step(shop):
    tables = {"training": {"learning_rate": 1e30, "warmup_steps": 0, "save_steps": 1}}
    folder = stopped(shop, "step 2", **tables)
    assert [record["step"] for record in read_lines(folder / "metrics.jsonl") if record["kind"] == "train"] == [1]


def test_a_base_that_gives_nan_stops_before_a_step(shop):
    shop.default_tables()
    tables = change_weight(shop, "model.norm.weight", float("nan"))
    stopped(shop, "nan", **tables)


def test_a_gradient_of_exactly_zero_is_refused_at_the_first_step(shop):
    shop.default_tables()
    tables = change_weight(shop, "lm_head.weight", 0.0)
    stopped(shop, "step 1", "zero", **tables)
