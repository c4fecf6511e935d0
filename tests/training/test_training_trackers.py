"""Every figure arrives at every tracker with its step, by the real package, also after a run is resumed; skipped without it."""

import json
import struct

import pytest
from workshop import read_lines

from qlora_phi3.errors import RecipeError
from qlora_phi3.recipe.schema import Training
from qlora_phi3.runfolder import RunFolder, write_report
from qlora_phi3.training.trackers import EXTRAS, check_trackers, tracker_names

CALLBACKS = "qlora_phi3.training.trackers.get_reporting_integration_callbacks"
NAMES = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "eval_loss", "eval_token_accuracy")


def expected(folder):
    """Name -> {step: value}, of metrics.jsonl."""
    records = read_lines(folder / "metrics.jsonl")
    return {name: {record["step"]: record[name] for record in records if name in record} for name in NAMES}


def assert_arrived(folder, arrived):
    for name, values in expected(folder).items():
        assert arrived[name].keys() == values.keys(), name
        for step, value in values.items():
            assert arrived[name][step] == pytest.approx(value, rel=1e-4), (name, step)


def train_and_resume(shop, tracker, between=lambda: None):
    """Six steps, and then four more in a second session; the run's folder. `between`: what the end of a process does."""
    shop.write(training={"report_to": tracker, "max_steps": 6})
    first = shop.run()
    assert first.exit_code == 0, first.stderr
    assert f"Trackers: {tracker}, as mine-" in first.stdout
    between()
    (folder,) = shop.runs()
    write_report(RunFolder(folder), RunFolder(folder).read_report() | {"status": "interrupted"})
    more = shop.run("--resume", "--set", "training.max_steps=10")
    assert (more.exit_code, len(more.stderr.splitlines())) == (0, 1), more.stderr  # the learning rate follows the new number
    return folder


def test_tensorboard(shop):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train_and_resume(shop, "tensorboard")
    assert sorted(path.name for path in shop.path.iterdir() if path.is_dir()) == ["runs"]
    assert [path.name for path in (shop.path / "runs").iterdir()] == ["mine"]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    arrived = {}
    for tag in events.Tags()["scalars"]:
        name = f"eval_{tag[5:]}" if tag.startswith("eval/") else tag.removeprefix("train/")
        arrived[name] = {event.step: event.value for event in events.Scalars(tag)}
    assert_arrived(folder, arrived)


def test_mlflow(shop, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy", reason="the complete mlflow has it, for its database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shop.path / 'tracked.db'}")
    mlflow.set_tracking_uri(None)  # that of the test before, where there was one
    folder = train_and_resume(shop, "mlflow")
    (run,) = mlflow.search_runs(experiment_names=["qlora-phi3"], output_format="list")
    assert (run.info.run_name, run.info.status) == (f"mine-{folder.name}", "FINISHED")
    client = mlflow.MlflowClient()
    arrived = {name: {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)} for name in NAMES}
    assert_arrived(folder, arrived)


def test_trackio(shop, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(shop.path / "tracked"))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    folder = train_and_resume(shop, "trackio")
    assert SQLiteStorage.get_runs("qlora-phi3") == [f"mine-{folder.name}"]
    arrived = {name: {} for name in NAMES}
    for line in SQLiteStorage.get_logs("qlora-phi3", f"mine-{folder.name}"):
        for key, value in line.items():
            name = f"eval_{key[5:]}" if key.startswith("eval/") else key.removeprefix("train/")
            arrived.setdefault(name, {})[line["train/global_step"]] = value
    assert_arrived(folder, arrived)


def test_wandb(shop, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = train_and_resume(shop, "wandb", between=wandb.finish)
    wandb.finish()
    arrived = {name: {} for name in NAMES}
    places = sorted((shop.path / "wandb").glob("offline-run-*"))
    assert {place.name.split("-", 3)[3] for place in places} == {f"mine-{folder.name}"}
    for line in (line for place in places for line in history(place)):
        for key, value in line.items():
            name = f"eval_{key[5:]}" if key.startswith("eval/") else key.removeprefix("train/")
            arrived.setdefault(name, {})[line["train/global_step"]] = value
    assert_arrived(folder, arrived)


def history(place):
    """The lines that an offline run of wandb logged: LevelDB's log format, of records as Protocol Buffers."""
    from wandb.proto import wandb_internal_pb2

    content, at, data = next(place.glob("*.wandb")).read_bytes(), 7, b""  # after wandb's own header
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # a block ends
            at += 32768 - at % 32768
        length, part = struct.unpack_from("<HB", content, at + 4)
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # complete, or the last part
            record, data = wandb_internal_pb2.Record.FromString(data), b""
            if record.history.item:
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


@pytest.mark.parametrize("name", EXTRAS)
def test_a_tracker_that_is_absent_names_its_extra(name, monkeypatch):
    monkeypatch.setattr("qlora_phi3.training.trackers.get_available_reporting_integrations", list)
    with pytest.raises(RecipeError, match=name) as caught:
        check_trackers(Training(report_to=name))
    assert f"pip install 'qlora-phi3[{name}]'" in caught.value.hint


def test_no_tracker_is_started_twice_and_none_where_nothing_is_asked_for():
    assert tracker_names(Training(report_to=["tensorboard", "none", "tensorboard"])) == ["tensorboard"]
    assert tracker_names(Training()) == []


def broken(fails_in):
    """A tracker one of whose calls fails as no library of ours does."""

    class Tracker:
        logging_dir = ""

        def __getattr__(self, name):
            def call(*args, **kwargs):
                if name == fails_in:
                    raise ValueError("server says no")

            return call

    return Tracker


def test_a_tracker_that_cannot_start_ends_the_run_before_its_first_step(shop, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(CALLBACKS, lambda name: [broken("on_train_begin")])
    shop.write(training={"report_to": "tensorboard"})
    result = shop.run()
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "[training] report_to: tensorboard cannot be started: server says no" in result.stderr


def test_a_tracker_that_fails_later_is_left_out_and_the_run_is_not_changed(shop, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(CALLBACKS, lambda name: [broken("on_log")])
    shop.write(training={"report_to": "tensorboard", "max_steps": 2})
    result = shop.run()
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("Note: tensorboard failed after step 0: server says no.")
