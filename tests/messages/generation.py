"""Messages of `chat` and `eval`."""

from unittest.mock import patch

import torch
from message_table import Message
from trained_run import leave_trained

from qlora_phi3.cli.chat import Conversation, _obey, chat
from qlora_phi3.cli.eval import eval as evaluate
from qlora_phi3.errors import ModelError, RunError, UserError
from qlora_phi3.evaluation import EvalRows, EvalSettings, answer_questions, read_own_rows, score_rows
from qlora_phi3.inference import GREEDY, load_for_inference
from qlora_phi3.runfolder import RunFolder

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
ROW = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}


def call(command, *words):
    return command.main(list(words), standalone_mode=False)


def save_over(shop):
    (shop.path / "there.jsonl").touch()
    talk = Conversation(None, GREEDY, 1, 0, False, "")
    talk.turns = {"tuned": [{"role": "user", "content": "?"}]}
    _obey(talk, "/save", "there.jsonl")


def without_held_out(shop):
    leave_trained(shop.path / "a-run", shop.base)
    path = shop.path / "a-run" / "recipe.toml"
    text = path.read_text(encoding="utf-8").replace("do_eval = true", "do_eval = false")
    path.write_text(text.replace('eval_strategy = "steps"', 'eval_strategy = "no"'), encoding="utf-8")
    (shop.path / "a-run" / "report.json").write_text("{}", encoding="utf-8")
    return read_own_rows(None, RunFolder(shop.path / "a-run"), None)


def without_rouge(shop):
    with patch("importlib.util.find_spec", return_value=None):
        call(evaluate, str(shop.base), "--data", "x.jsonl")


def on_a_full_gpu(shop, measure):
    inference = load_for_inference(shop.base, device=torch.device("cpu"))
    with patch.object(type(inference.model), "forward", side_effect=FULL):
        return measure(inference)


def score(inference):
    return score_rows(inference, EvalRows([ROW], "rows"), lambda *_: None)


def answer(inference):
    settings = EvalSettings(rows=1, max_new_tokens=4, sampling=GREEDY, seed=0)
    return answer_questions(inference, [([3, 4], "x"), ([3, 4, 5], "x")], settings, lambda *_: None)


def run_listed(shop):
    leave_trained(shop.path / "runs" / "mine" / "first", shop.base)
    (shop.path / "runs" / "mine" / "first" / "report.json").write_text('{"status": "done"}', encoding="utf-8")
    return call(chat)


def row(name, trigger, says, hint, error=UserError):
    return Message(name=name, trigger=trigger, error=error, exit_code=2, says=says, hint=hint)


MESSAGES = [
    row("chat-without-a-run", lambda _: call(chat), ("under runs",), "qlora-phi3 run", RunError),
    row("chat-without-a-terminal", run_listed, ("1  runs/mine/first   done",), "chat runs/mine/first", RunError),
    row("chat-with-an-empty-prompt", lambda shop: call(chat, str(shop.base), "--prompt", " "), ("empty",), "--prompt"),
    row(
        "chat-compares-a-base",
        lambda shop: call(chat, str(shop.base), "--compare", "--prompt", "?"),
        ("tiny-phi3", "no adapter"),
        "--compare",
    ),
    row(
        "sampling-without-temperature",
        lambda shop: call(chat, str(shop.base), "--top-p", "0.9"),
        ("--top-p 0.9",),
        "--temperature",
    ),
    row("chat-saves-over-a-file", save_over, ("there.jsonl exists",), "another name", RunError),
    row("eval-of-a-base-without-data", lambda shop: call(evaluate, str(shop.base)), ("tiny-phi3",), "--data", RunError),
    row("eval-of-a-run-without-held-out-rows", without_held_out, ("a-run", "do_eval = false"), "--data", RunError),
    row("eval-without-rouge-score", without_rouge, ("rouge_score",), "qlora-phi3[eval]"),
    row("eval-runs-out-of-memory", lambda shop: on_a_full_gpu(shop, score), ("2 GiB",), "Close", ModelError),
    row("eval-answer-runs-out-of-memory", lambda shop: on_a_full_gpu(shop, answer), ("3 tokens", "2 GiB"), "Close", ModelError),
]
