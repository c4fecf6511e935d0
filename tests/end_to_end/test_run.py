"""`qlora-phi3 run` from a recipe to an adapter, by the real command line, on a tiny model."""

import json
import os
import subprocess
import sys
from datetime import datetime

import pytest
import torch
from workshop import Workshop, call, read_json, read_lines

STEPS = 10


@pytest.fixture(scope="module")
def done(tmp_path_factory, base):
    """One finished run: the workshop, what the command said, and the run's folder."""
    shop = Workshop(tmp_path_factory.mktemp("done"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.path)
        shop.write()
        result = shop.run()
    assert result.exit_code == 0, result.stderr
    (folder,) = shop.runs()
    return shop, result, folder


def test_a_run_ends_with_0_says_what_it_did_and_nothing_on_stderr(done):
    shop, result, folder = done
    assert result.stderr == ""
    for words in (
        "Data: 40 rows",
        "NF4, computing in float32 on",
        "covers 100 % of the linear weights",
        "Optimizer: adamw_torch, 4 rows a step",
        f"step {STEPS}/{STEPS}  loss ",
        f"The adapter: {folder.relative_to(shop.path)}/adapter",
    ):
        assert words in result.stdout
    started = datetime.fromisoformat(read_json(folder / "report.json")["started"])
    assert folder.name == f"{started.astimezone():%Y-%m-%d_%H-%M-%S}"


def test_the_run_folder_holds_what_the_readme_promises(done):
    _, _, folder = done
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter", "base.json", "checkpoints", "held_out.jsonl", "metrics.jsonl", "recipe.toml", "report.html", "report.json",
    ]  # fmt: skip


def test_the_recipe_in_the_run_folder_is_the_one_that_ran_and_repeats_the_run(done, monkeypatch, tmp_path):
    from qlora_phi3.recipe.load import load_recipe

    shop, _, folder = done
    asked, kept = load_recipe(shop.path / "mine.toml"), load_recipe(folder / "recipe.toml")
    data = asked.data.model_copy(update={"train": str(shop.path / "chats.jsonl")})
    assert kept == asked.model_copy(update={"data": data})
    monkeypatch.chdir(tmp_path)  # from anywhere
    assert call("run", str(folder / "recipe.toml")).exit_code == 0
    (again,) = (tmp_path / "runs" / "mine").iterdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / "adapter" / name).read_bytes() == (folder / "adapter" / name).read_bytes()


def test_metrics_hold_every_step_and_every_evaluation(done):
    _, _, folder = done
    records = read_lines(folder / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if record["kind"] == "eval"] == [0, 5, 10]
    for record in steps:
        assert record["rows"] == 4
        assert 0 < record["supervised_tokens"] < record["tokens"]
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["step_seconds"])
        assert record["peak_memory_bytes"] > 100 * 2**20
        assert record["grad_norm"] > 0
        assert record["loss"] > 0
    assert max(record["learning_rate"] for record in steps) == pytest.approx(0.01)
    assert sum(record["tokens"] for record in steps) == read_json(folder / "report.json")["data"]["tokens"]


def test_the_report_says_how_it_ended_and_on_what(done):
    _, _, folder = done
    report = read_json(folder / "report.json")
    evaluations = [r["eval_loss"] for r in read_lines(folder / "metrics.jsonl") if r["kind"] == "eval"]
    assert report["status"] == "done"
    assert report["steps"] == STEPS
    assert report["seed"] == 42
    assert "CPU" in report["device"]
    assert report["compute_dtype"] == "float32"
    assert {"python", "torch", "transformers", "peft", "bitsandbytes", "trl", "qlora-phi3"} <= report["versions"].keys()
    assert len(report["recipe_sha256"]) == len(report["data"]["sha256"]) == 64
    assert len(report["data"]["eval_indices"]) == 8
    assert report["recipe"]["training"]["batch_size"] == 4
    assert (report["eval_loss_before"], report["eval_loss_after"]) == (evaluations[0], evaluations[-1])


def test_the_held_out_loss_falls(done):
    report = read_json(done[2] / "report.json")
    assert report["eval_loss_after"] < report["eval_loss_before"] - 2


def test_peft_puts_the_adapter_on_a_fresh_base_and_scores_the_held_out_rows_as_the_run_did(done, base):
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, Phi3ForCausalLM

    _, _, folder = done
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    fresh = Phi3ForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    for module in fresh.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes 0.50 computes in bf16 there, else
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(fresh, folder / "adapter").eval()
    total = learned = 0.0
    with torch.no_grad():
        for ids, spans in held_out_rows(done, folder / "adapter"):
            scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            for position in spans:
                total -= float(scores[position - 1, ids[position]])
                learned += 1
    assert total / learned == pytest.approx(read_json(folder / "report.json")["eval_loss_after"], rel=1e-4)


def held_out_rows(done, tokenizer_folder):
    """Ids of the held-out chats by the tokenizer given, and the positions of their answers, end of turn included."""
    from transformers import AutoTokenizer

    shop, _, folder = done
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    chats = read_lines(shop.path / "chats.jsonl")
    for index in read_json(folder / "report.json")["data"]["eval_indices"]:
        text = tokenizer.apply_chat_template(chats[index]["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        start = ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
        end = len(ids) - 1 - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|end|>"))
        yield ids, range(start, end + 1)


def test_the_tokenizer_beside_the_adapter_gives_the_ids_of_the_base(done, base):
    of_base, beside = list(held_out_rows(done, base)), list(held_out_rows(done, done[2] / "adapter"))
    assert [ids for ids, _ in beside] == [ids for ids, _ in of_base]


def test_a_true_process_does_the_same_and_prints_plain_lines(done):
    shop, _, folder = done
    command = [sys.executable, "-m", "qlora_phi3", "run", "mine.toml", "--set", "training.output_dir=elsewhere"]
    surroundings = {**os.environ, "PYTHONHASHSEED": "12"}  # sets are ordered by it
    ended = subprocess.run(command, cwd=shop.path, env=surroundings, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "\x1b" not in ended.stdout
    (again,) = (shop.path / "elsewhere" / "mine").iterdir()
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_shortest_recipe_trains_in_16_row_steps_with_5_percent_held_out(shop, base):
    shop.default_tables()
    shop.write(f"[model]\nname = {json.dumps(str(base))}\n[data]\ntrain = 'chats.jsonl'\n[training]\nmax_length = 512\n")
    result = shop.run()
    assert result.exit_code == 0, result.stderr
    report = read_json(shop.runs()[0] / "report.json")
    assert (report["data"]["train_rows"], report["data"]["evaluation_rows"], report["steps"]) == (46, 2, 3)
    assert report["status"] == "done"
