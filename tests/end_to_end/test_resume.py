"""Runs that are stopped, are killed or fail, and then continue with `--resume`."""

import json
import os
import shutil
import signal

import pytest
import torch
from workshop import Workshop, call, read_json, read_lines, write_chats

from qlora_phi3.model import attention
from qlora_phi3.runfolder import RunFolder, list_runs, lock_run, write_report
from qlora_phi3.ui.console import describe_ends
from qlora_phi3.ui.runs import list_summaries

FILES = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json")
STEPS = 10


def press_ctrl_c_in(monkeypatch, step):
    """Ctrl-C while a step's figures are shown: the run stops after the step that follows."""
    from qlora_phi3.ui.console import ConsoleReporter

    shown = ConsoleReporter.step

    def show_and_press(self, record):
        shown(self, record)
        if record.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ConsoleReporter, "step", show_and_press)


def interrupt(shop, step, *words):
    with pytest.MonkeyPatch.context() as patch:
        press_ctrl_c_in(patch, step)
        return shop.run(*words)


def steps_of(folder, kind="train"):
    return [record["step"] for record in read_lines(folder / "metrics.jsonl") if record["kind"] == kind]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, base):
    """A finished run in a workshop of its own; the workshop and the run's folder."""
    return finished(Workshop(tmp_path_factory.mktemp("undisturbed"), base))


def finished(shop, **tables):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.path)
        shop.write(**tables)
        result = shop.run()
    assert result.exit_code == 0, result.stderr
    return shop, shop.runs()[-1]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, base):
    """A workshop whose only run was stopped after step 5, with checkpoints 2, 4 and 5."""
    shop = Workshop(tmp_path_factory.mktemp("stopped"), base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop.path)
        shop.write()
        result = interrupt(shop, 4)
    return shop, result


@pytest.fixture
def halfway(stopped, tmp_path, monkeypatch):
    """A copy of the stopped workshop and its run's folder."""
    return copied(stopped[0], tmp_path, monkeypatch)


def copied(workshop, tmp_path, monkeypatch):
    shop = Workshop(tmp_path / "shop", workshop.base)
    shutil.copytree(workshop.path, shop.path)
    monkeypatch.chdir(shop.path)
    (folder,) = shop.runs()
    report, recipe = read_json(folder / "report.json"), folder / "recipe.toml"  # they name the data by its full path
    write_report(RunFolder(folder), json.loads(json.dumps(report).replace(str(workshop.path), str(shop.path))))
    recipe.write_text(recipe.read_text(encoding="utf-8").replace(str(workshop.path), str(shop.path)), encoding="utf-8")
    return shop, folder


def assert_same_end(folder, other):
    for name in FILES:
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert steps_of(folder) == list(range(1, STEPS + 1))
    assert steps_of(folder, "eval") == [0, 5, 10]


def test_ctrl_c_ends_with_130_and_names_the_command_to_go_on(stopped):
    shop, result = stopped
    (folder,) = shop.runs()
    place = folder.relative_to(shop.path)
    report = read_json(folder / "report.json")
    assert result.exit_code == 130
    note, last = result.stderr.splitlines()
    assert note.startswith("Note: Ctrl-C: ")
    assert f"step 5 of {STEPS}" in last
    assert last.endswith(f"qlora-phi3 run --resume {place}")
    assert report["status"] == "interrupted"
    assert not (folder / "adapter").exists()
    assert steps_of(folder) == [1, 2, 3, 4, 5]


def test_a_second_ctrl_c_stops_at_once(shop, monkeypatch):
    from qlora_phi3.training.callbacks import SaveByTime

    monkeypatch.setattr(SaveByTime, "on_step_end", lambda *args, **kwargs: [signal.raise_signal(signal.SIGINT) for _ in "12"])
    shop.write()
    result = shop.run()
    assert result.exit_code == 130
    assert f"step 0 of {STEPS}" in result.stderr.splitlines()[-1]
    assert read_json(shop.runs()[0] / "report.json")["status"] == "interrupted"


def test_a_second_ctrl_c_names_the_checkpoint_to_go_on_from(shop, monkeypatch):
    from qlora_phi3.ui.console import ConsoleReporter

    shown = ConsoleReporter.step

    def show_and_press_twice(self, record):
        shown(self, record)
        if record.step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    shop.write()
    with monkeypatch.context() as patch:
        patch.setattr(ConsoleReporter, "step", show_and_press_twice)
        result = shop.run()
    (folder,) = (path.relative_to(shop.path) for path in shop.runs())
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    assert f"step 5 of {STEPS}" in last
    assert "step 4" in last
    assert last.endswith(f"qlora-phi3 run --resume {folder}")
    assert shop.run("--resume").exit_code == 0


def test_ctrl_c_before_the_first_step_loses_nothing(shop, monkeypatch):
    import qlora_phi3.training.run as training

    def press(*args, **kwargs):
        raise KeyboardInterrupt

    shop.write()
    monkeypatch.setattr(training, "prepare", press)
    result = shop.run()
    assert (result.exit_code, len(result.stderr.splitlines())) == (130, 1)
    assert shop.runs() == []


@pytest.mark.parametrize(
    "words", [["mine.toml", "--resume"], ["OWN", "--resume", "RUN"], ["--resume", "mine.toml"], ["--resume", "RUN"]]
)
def test_resuming_ends_in_the_adapter_of_the_undisturbed_run(halfway, undisturbed, words):
    shop, folder = halfway
    names = {"RUN": str(folder), "OWN": str(folder / "recipe.toml")}
    result = call("run", *(names.get(word, word) for word in words))
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert shop.runs() == [folder]
    assert_same_end(folder, undisturbed[1])
    report, expected = read_json(folder / "report.json"), read_json(undisturbed[1] / "report.json")
    for key in ("status", "steps", "eval_loss_before", "eval_loss_after", "seed", "versions"):
        assert report[key] == expected[key]
    assert report.keys() == expected.keys()
    losses = [record["loss"] for record in read_lines(folder / "metrics.jsonl") if record["kind"] == "train"]
    assert describe_ends(losses) in result.stdout  # of the first session, too


def test_resuming_with_dropout_draws_the_same_masks(shop, base, tmp_path):
    (tmp_path / "whole").mkdir()
    tables = {"lora": {"r": 4, "lora_dropout": 0.1}}
    whole = finished(Workshop(tmp_path / "whole", base), **tables)[1]
    shop.write(**tables)
    assert interrupt(shop, 5).exit_code == 130
    assert shop.run("--resume").exit_code == 0
    assert_same_end(shop.runs()[0], whole)


def test_attention_that_is_kept_before_resuming_and_not_afterwards_changes_nothing(shop, base, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    tables = {"lora": {"r": 4, "lora_dropout": 0.1}, "training": {"gradient_checkpointing": True}}
    whole = finished(Workshop(tmp_path / "whole", base), **tables)[1]
    shop.write(**tables)
    calls, run = [], attention.KeptKernels.run
    monkeypatch.setattr(attention.KeptKernels, "run", lambda *kernel: calls.append(kernel) or run(*kernel))
    assert interrupt(shop, 5, "--set", "memory.keep_attention=true").exit_code == 130
    kept = len(calls)
    assert shop.run("--resume").exit_code == 0
    assert len(calls) == kept > 0
    assert_same_end(shop.runs()[0], whole)


def test_a_run_stopped_twice_still_ends_the_same(halfway, undisturbed):
    shop, folder = halfway
    assert interrupt(shop, 7, "--resume").exit_code == 130
    assert shop.run("--resume").exit_code == 0
    assert_same_end(folder, undisturbed[1])


@pytest.mark.parametrize("spoil", ["cut short", "no optimizer", "no manifest"])
def test_a_newest_checkpoint_that_is_incomplete_is_ignored(halfway, undisturbed, spoil):
    shop, folder = halfway
    newest = folder.relative_to(shop.path) / "checkpoints" / "checkpoint-5"
    if spoil == "cut short":
        weights = newest / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        (newest / {"no optimizer": "optimizer.pt", "no manifest": "sealed.json"}[spoil]).unlink()
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    assert [line.split()[1] for line in result.stderr.splitlines()] == [str(newest)]
    assert {"cut short": "SHA-256", "no optimizer": "optimizer.pt is missing", "no manifest": "removed"}[spoil] in result.stderr
    assert str(newest.with_name("checkpoint-4")) in result.stdout
    assert_same_end(folder, undisturbed[1])


def test_a_checkpoint_of_another_run_is_named(halfway, undisturbed):
    shop, folder = halfway
    newest = folder / "checkpoints" / "checkpoint-5"
    shutil.rmtree(newest)
    shutil.copytree(undisturbed[1] / "checkpoints" / "checkpoint-8", newest.with_name("checkpoint-8"))
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    assert "checkpoint-8 is of a run that started at" in result.stderr
    assert read_json(folder / "report.json")["started"] in result.stderr


def test_without_any_complete_checkpoint_the_run_starts_again_from_its_first_step(halfway, undisturbed):
    shop, folder = halfway
    for manifest in (folder / "checkpoints").glob("*/sealed.json"):
        manifest.unlink()
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    assert_same_end(folder, undisturbed[1])


def test_a_kill_while_a_checkpoint_is_written_costs_only_that_checkpoint(shop, undisturbed, monkeypatch):
    import qlora_phi3.training.trainer as trainer

    class Killed(BaseException):
        """No clean-up of ours catches it, as none runs at a kill."""

    def die(checkpoint):
        if checkpoint.name == "checkpoint-6":
            (checkpoint / "optimizer.pt").write_bytes((checkpoint / "optimizer.pt").read_bytes()[:50])
            raise Killed
        write_manifest(checkpoint)

    write_manifest = trainer.write_manifest
    shop.write()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_manifest", die)
        with pytest.raises(Killed):
            shop.run()
    (folder,) = shop.runs()
    report = read_json(folder / "report.json")
    # As a kill leaves it, which nobody can write down.
    write_report(RunFolder(folder), {**report, "status": "running", "seconds": 0.0})
    lines = read_lines(folder / "metrics.jsonl")
    trained = sum(line.get("step_seconds", line.get("seconds", 0)) for line in lines)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # and a last line cut short
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    assert "checkpoint-6" in result.stderr
    assert_same_end(folder, undisturbed[1])
    again = sum(line["step_seconds"] for line in read_lines(folder / "metrics.jsonl")[-5:] if "step_seconds" in line)
    assert read_json(folder / "report.json")["seconds"] > trained + again


def refused(result, *words):
    """One line on stderr that holds all of these, exit code 2."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert word in line
    return True


def test_a_run_that_is_done_is_not_resumed(undisturbed, monkeypatch):
    shop, folder = undisturbed
    monkeypatch.chdir(shop.path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert refused(shop.run("--resume"), str(folder.relative_to(shop.path)))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


LAST = f"checkpoints/checkpoint-{STEPS}"


@pytest.fixture
def done(undisturbed, tmp_path, monkeypatch):
    """A copy of the finished run that can be changed."""
    return copied(undisturbed[0], tmp_path, monkeypatch)


def mark(folder, status):
    report = read_json(folder / "report.json")
    write_report(RunFolder(folder), {**report, "status": status})


@pytest.mark.parametrize("steps", [{}, {"training": {"max_steps": STEPS}}])
def test_a_run_killed_after_its_last_checkpoint_has_nothing_left_to_train(shop, undisturbed, base, steps):
    shop.write(**steps)
    assert shop.run().exit_code == 0
    (folder,) = shop.runs()
    mark(folder, "running")
    shutil.rmtree(folder / "adapter")
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")  # the copy in the checkpoint is used
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    assert_same_end(folder, undisturbed[1])
    report, expected = read_json(folder / "report.json"), read_json(undisturbed[1] / "report.json")
    for key in ("status", "steps", "eval_loss_before", "eval_loss_after"):
        assert report[key] == expected[key]


@pytest.mark.parametrize(
    "name",
    ["adapter/adapter_model.safetensors", "adapter/tokenizer.json", "metrics.jsonl", "base.json", "held_out.jsonl"],
)
@pytest.mark.parametrize("spoil", ["empty", "zeros", "missing"])
def test_a_finished_run_that_lost_a_file_is_made_again_from_its_last_checkpoint(done, undisturbed, name, spoil):
    shop, folder = done
    if spoil == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(b"" if spoil == "empty" else bytes((folder / name).stat().st_size))
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    line, *restored = result.stderr.splitlines()
    assert name in line
    assert all("base.json" in line and name == "base.json" for line in restored)
    assert_same_end(folder, undisturbed[1])
    names = ("adapter/tokenizer.json", "held_out.jsonl", "base.json")
    assert all((folder / name).read_bytes() == (undisturbed[1] / name).read_bytes() for name in names)
    assert refused(shop.run("--resume"), "is done")


def test_more_steps_can_be_asked_for_of_a_finished_run_in_a_copy_of_it_and_fewer_cannot(done):
    shop, folder = done
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    more = ("--resume", "--set", f"training.max_steps={STEPS + 4}", "--set", "training.logging_steps=2")
    stopped = interrupt(shop, STEPS + 1, *more)
    (copy,) = set(shop.runs()) - {folder}
    assert stopped.exit_code == 130, stopped.stderr
    assert f"is done and stays as it is; a copy of it is trained on: {copy.relative_to(shop.path)}\n" in stopped.stdout
    assert stopped.stderr.splitlines()[-1].endswith(f"qlora-phi3 run --resume {copy.relative_to(shop.path)}")
    assert f"step {STEPS + 4}, not {STEPS}" in stopped.stderr.splitlines()[0]
    result = call("run", "--resume", str(copy))
    assert (result.exit_code, result.stderr) == (0, "")
    assert steps_of(copy) == list(range(1, STEPS + 5))
    was, now = read_json(folder / "report.json"), read_json(copy / "report.json")
    assert was["started"] == now["training_began"] < now["started"]
    assert now["started"] == read_json(copy / "report.json")["started"]
    assert [RunFolder(folder), RunFolder(copy)] == list_runs(folder.parents[1])
    assert [summary.path for summary in list_summaries(folder.parents[1])] == [str(copy), str(folder)]
    rates = [record["learning_rate"] for record in read_lines(copy / "metrics.jsonl") if record["kind"] == "train"]
    assert rates[STEPS] > 0  # not the end of the former schedule
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert refused(call("run", "--resume", str(copy), "--set", f"training.max_steps={STEPS}"), "is done")
    for words in (("--resume",), ("--resume", str(folder))):  # the recipe's file asks for more steps, the command does not
        shop.write(training={"num_train_epochs": 9})
        assert refused(shop.run(*words), "is done", "--set training.num_train_epochs=N (or max_steps=N)")


def test_settings_left_out_are_named_before_anything_is_computed(halfway, undisturbed):
    shop, folder = halfway
    before = (folder / "report.json").read_bytes()
    shop.write(training={"num_train_epochs": 2, "save_steps": 3})
    go_on = f"qlora-phi3 run --resume {folder.relative_to(shop.path)}"
    refusal = shop.run("--resume")
    assert refused(refusal, "num_train_epochs 1.0 -> 2.0", go_on, "--set training.num_train_epochs=2")
    assert (folder / "report.json").read_bytes() == before
    asked = interrupt(shop, 6, "--resume", "--set", "training.num_train_epochs=1")
    assert asked.stderr.splitlines()[0] == f"Note: Changed since the run began: [training] save_steps 2 -> 3. Unchanged: {go_on}"
    assert call("run", "--resume", str(folder)).exit_code == 0
    assert_same_end(folder, undisturbed[1])


def test_the_checkpoint_at_the_end_of_an_epoch_holds_the_measurement_of_it(shop, base, tmp_path):
    training = {"eval_strategy": "epoch", "save_steps": 5, "num_train_epochs": 2, "early_stopping_patience": 3}
    (tmp_path / "whole").mkdir()
    whole = finished(Workshop(tmp_path / "whole", base), training=training)[1]
    for place in (whole / "checkpoints").iterdir():
        step = int(place.name.rpartition("-")[2])
        assert steps_of(place, "eval") == [each for each in (0, 10, 20) if each <= step]
    shop.write(training=training)
    interrupt(shop, 9)
    (folder,) = shop.runs()
    assert shop.run("--resume").exit_code == 0
    assert steps_of(folder, "eval") == [0, 10, 20]
    for name in FILES:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_another_interval_of_checkpoints_and_evaluations_is_used_from_the_resumed_step_on(halfway, undisturbed):
    shop, folder = halfway
    result = shop.run("--resume", "--set", "training.save_steps=3", "--set", "training.eval_steps=4")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert steps_of(folder, "eval") == [0, 5, 8, 10]
    for name in FILES:
        assert (folder / name).read_bytes() == (undisturbed[1] / name).read_bytes()
    saved = {path.name for path in (folder / "checkpoints").glob("checkpoint-*")}
    assert saved == {f"checkpoint-{step}" for step in (6, 9, 10)}


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "trainer_state.json", "metrics.jsonl", "sealed.json"])
def test_a_flipped_bit_costs_one_checkpoint_and_is_named(halfway, undisturbed, name):
    shop, folder = halfway
    newest = folder / "checkpoints" / "checkpoint-5"
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 3] ^= 4
    (newest / name).write_bytes(content)
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert "damaged-checkpoint-5" in line
    assert_same_end(folder, undisturbed[1])


def test_a_damaged_checkpoint_does_not_count_for_the_limit_of_checkpoints(halfway, undisturbed):
    shop, folder = halfway
    shutil.copytree(folder / "checkpoints" / "checkpoint-5", folder / "checkpoints" / "checkpoint-9")  # of another step
    assert interrupt(shop, 6, "--resume", "--set", "training.save_total_limit=1").exit_code == 130
    assert {path.name for path in (folder / "checkpoints").glob("checkpoint-*")} == {"checkpoint-7"}
    assert shop.run("--resume").exit_code == 0
    assert_same_end(folder, undisturbed[1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda text: text.replace('"rope_theta": 10000', '"rope_theta": 20000')),
        ("tokenizer_config.json", lambda text: text.replace("{", '{"padding_side": "left", ', 1)),
        ("chat_template.jinja", lambda text: text + "{# a remark #}"),
        ("generation_config.json", lambda text: text.replace("{", '{"max_length": 7, ', 1)),
    ],
)
def test_a_base_with_other_files_is_not_resumed_and_the_file_is_named(shop, name, change):
    base = shop.copy_base()
    shop.write(model={"name": str(base)})
    assert interrupt(shop, 4).exit_code == 130
    before = (base / name).read_text(encoding="utf-8")
    (base / name).write_text(change(before), encoding="utf-8")
    assert (base / name).read_text(encoding="utf-8") != before
    assert refused(shop.run("--resume"), name)


def test_one_process_at_a_time_writes_a_run_and_the_refusal_names_it(halfway, undisturbed):
    shop, folder = halfway
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("checkpoint-*")}
    with lock_run(RunFolder(folder)):
        assert refused(shop.run("--resume"), f"Process {os.getpid()} ", str(folder.relative_to(shop.path)))
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("checkpoint-*")} == before
    assert shop.run("--resume").exit_code == 0
    assert_same_end(folder, undisturbed[1])


def test_the_newest_run_is_the_one_that_started_last_whatever_its_name(halfway):
    shop, folder = halfway
    older = folder.with_name("2099-12-31_00-00-00")
    shutil.copytree(folder, older)
    report = read_json(older / "report.json")
    # 03:00 by a clock two hours ahead is earlier than 02:00 UTC.
    for path, started in ((older, "2020-10-25T03:00:00+02:00"), (folder, "2020-10-25T02:00:00+00:00")):
        write_report(RunFolder(path), {**report, "started": started})
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    assert read_json(folder / "report.json")["status"] == "done"
    assert read_json(older / "report.json")["status"] == "interrupted"


def test_a_checkpoint_of_an_8_bit_optimizer_is_refused_where_another_one_trains(halfway):
    from qlora_phi3.training.artifacts import write_manifest

    shop, folder = halfway
    checkpoint = folder / "checkpoints" / "checkpoint-5"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for state in saved["state"].values():
        state["state1"], state["state2"] = state.pop("exp_avg"), state.pop("exp_avg_sq")
    torch.save(saved, checkpoint / "optimizer.pt")
    write_manifest(checkpoint)
    assert refused(shop.run("--resume"), "checkpoint-5", "adamw_torch")


def test_another_device_is_reported(halfway, undisturbed):
    shop, folder = halfway
    report = read_json(folder / "report.json")
    write_report(RunFolder(folder), {**report, "device": "NVIDIA RTX"})
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert "NVIDIA RTX" in line
    assert_same_end(folder, undisturbed[1])


def test_a_run_that_was_moved_still_ends_with_its_best_checkpoint(shop, base, tmp_path):
    (tmp_path / "whole").mkdir()
    tables = {"training": {"load_best_model_at_end": True, "eval_steps": 2, "save_steps": 2, "learning_rate": 0.1}}
    whole = finished(Workshop(tmp_path / "whole", base), **tables)[1]
    shop.write(**tables)
    assert interrupt(shop, 8).exit_code == 130
    (folder,) = shop.runs()
    moved = folder.rename(shop.path / "moved")
    result = shop.run("--resume", "moved")
    assert result.exit_code == 0, result.stderr
    for name in FILES:
        assert (moved / name).read_bytes() == (whole / name).read_bytes()


def test_names_that_are_too_long_are_no_run(shop):
    shop.write()
    assert refused(shop.run("--resume", "x" * 300), "There is no run")
    assert refused(call("run", "--resume", "x" * 300), "There is no run")


def test_what_killed_processes_left_is_removed(halfway):
    shop, folder = halfway
    left = [folder / ".report.json.1.partial", folder / ".adapter.partial", folder / "checkpoints" / "rehearsal-x"]
    for path in left:
        path.mkdir()
    assert shop.run("--resume").exit_code == 0
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize(
    "change",
    [{"seconds": "x"}, {"recipe": []}, {"recipe": {"training": 3}}, {"versions": 1}, {"data": "x"}, {"files": []}],
)
def test_a_report_with_values_of_another_kind_is_refused(halfway, change):
    shop, folder = halfway
    report = read_json(folder / "report.json")
    write_report(RunFolder(folder), {**report, **change})
    assert refused(shop.run("--resume"), "report.json")


def spoil_with(path, content):
    path.unlink()
    if content == "pipe":
        os.mkfifo(path)
    elif content != "missing":
        path.write_bytes(content)


DAMAGES = (b"[" * 100_000, b"\xed\xa0\x80", b"{}", b"", b"\xff", "pipe", "missing")


@pytest.mark.parametrize("content", DAMAGES)
def test_a_damaged_report_ends_in_one_line(halfway, content):
    shop, folder = halfway
    spoil_with(folder / "report.json", content)
    words = "no run of mine" if content == "missing" else "report.json"
    assert refused(shop.run("--resume"), words)


@pytest.mark.parametrize("content", DAMAGES)
def test_a_damaged_record_of_the_base_is_restored_from_the_checkpoint(halfway, undisturbed, content):
    shop, folder = halfway
    intact = (folder / "base.json").read_bytes()
    spoil_with(folder / "base.json", content)
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert "base.json" in line
    assert "checkpoint-5" in line
    assert_same_end(folder, undisturbed[1])
    assert (folder / "base.json").read_bytes() == intact


def test_a_run_of_an_older_version_that_lacks_a_key_is_resumed(halfway, undisturbed):
    shop, folder = halfway
    report = read_json(folder / "report.json")
    del report["recipe"]["training"]["adam_beta1"]
    report["recipe"]["lora"]["unknown_key"] = 1
    report["versions"]["transformers"] = "4.0.0"
    write_report(RunFolder(folder), report)
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert "transformers 4.0.0" in line
    assert_same_end(folder, undisturbed[1])


def test_another_recipe_is_not_resumed_and_what_differs_is_named(halfway):
    shop, folder = halfway
    before = (folder / "report.json").read_bytes()
    result = shop.run("--resume", "--set", "lora.r=8", "--set", "training.seed=1")
    assert refused(result, "[lora] r, [training] seed", f"qlora-phi3 run --resume {folder.relative_to(shop.path)}")
    assert (folder / "report.json").read_bytes() == before


def test_changed_data_are_not_resumed(halfway):
    shop, folder = halfway
    write_chats(shop.path / "chats.jsonl", rows=48, seed=1)
    before = (folder / "report.json").read_bytes()
    assert refused(shop.run("--resume"), "sha256")
    assert (folder / "report.json").read_bytes() == before


def test_a_directory_that_is_no_run_is_not_resumed(halfway):
    shop, folder = halfway
    newest = folder.relative_to(shop.path)
    assert refused(shop.run("--resume", "nowhere"), "nowhere", str(newest))
    assert refused(call("run", "--resume", "nowhere"), "nowhere")
    assert refused(shop.run("--resume", str(shop.path)), "report.json")
    (folder / "report.json").write_text("{", encoding="utf-8")
    assert refused(shop.run("--resume"), "report.json")
    (folder / "report.json").write_text("[1]", encoding="utf-8")
    assert refused(shop.run("--resume"), "report.json")


def test_resume_without_any_run_says_so(shop):
    shop.write()
    assert refused(shop.run("--resume"), "mine", "runs")
    assert not (shop.path / "runs").exists()


def test_the_best_checkpoint_is_handed_out_after_a_resumed_run_too(shop, base, tmp_path):
    (tmp_path / "whole").mkdir()
    tables = {
        "training": {
            "load_best_model_at_end": True, "eval_steps": 2, "save_steps": 2, "save_total_limit": 1, "learning_rate": 0.1,
        }
    }  # fmt: skip
    whole = finished(Workshop(tmp_path / "whole", base), **tables)[1]
    shop.write(**tables)
    assert interrupt(shop, 6).exit_code == 130
    result = shop.run("--resume")
    assert result.exit_code == 0, result.stderr
    (folder,) = shop.runs()
    for name in FILES:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    records = [record for record in read_lines(whole / "metrics.jsonl") if record["kind"] == "eval"]
    assert read_json(whole / "report.json")["eval_loss_after"] == pytest.approx(
        min(record["eval_loss"] for record in records if record["step"] > 0)
    )


def test_a_run_with_8_bit_adam_is_resumed(shop):
    """accelerate wraps the optimizer, whose class tells whether a checkpoint has its state; on a GPU it is the default one."""
    shop.write(training={"optim": "adamw_8bit", "max_steps": 2})
    assert shop.run().exit_code == 0
    more = shop.run("--resume", "--set", "training.max_steps=3")
    assert more.exit_code == 0, more.stderr
    assert [read_json(run / "report.json")["steps"] for run in shop.runs()] == [2, 3]


def test_a_run_from_loftq_with_noise_lora_plus_and_early_stopping_is_resumed_and_proved(shop):
    tables = {
        "lora": {"r": 4, "lora_alpha": 8, "init_lora_weights": "loftq"},
        "training": {"neftune_noise_alpha": 5.0, "loraplus_lr_ratio": 4.0, "early_stopping_patience": 1, "eval_steps": 2},
    }
    for _ in "12":
        shop.write(**tables)
        assert interrupt(shop, 3).exit_code == 130
        assert shop.run("--resume").exit_code == 0
    first, second = shop.runs()
    weights = "adapter/adapter_model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()
    assert read_json(first / "adapter/adapter_config.json")["init_lora_weights"] is True
    shop.write(lora={"r": 4, "lora_alpha": 8})
    assert shop.run("--set", "training.max_steps=1").exit_code == 0
    plain, started = (read_json(run / "report.json")["eval_loss_before"] for run in (shop.runs()[-1], first))
    assert plain != started  # the adapter that corrects the base is measured before the first step
    result = call("export", str(first), "--onto", "nf4")
    assert result.exit_code == 0, result.stderr
    scores = {score["name"]: score for score in read_json(first / "merged-nf4/export_report.json")["proof"]["scores"]}
    assert scores["nf4"]["mean_kl"] < 1e-6
