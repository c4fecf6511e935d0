"""`qlora-phi3 init` as a person calls it, on a tiny model."""

import json
import os
import select
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from workshop import call, write_chats

import qlora_phi3.hardware.gpu
from qlora_phi3.recipe.load import load_recipe


@pytest.fixture
def chats(shop):
    """120 chats in an empty directory."""
    return write_chats(shop.path / "my-chats.jsonl", rows=120)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(qlora_phi3.hardware.gpu, "choose_gpu", lambda wanted: None)


def test_without_data_eight_chats_are_written_that_init_reads(shop):
    assert call("init").exit_code == 0
    result = call("init", "example-chats.jsonl")
    assert (result.exit_code, "8 usable rows read as messages" in result.stdout) == (0, True)
    assert "without an NVIDIA GPU" in result.stdout
    recipe = load_recipe(shop.path / "example-chats.toml", check_files=True)
    assert (recipe.training.do_eval, recipe.training.num_train_epochs, recipe.training.max_length) == (False, 5, 64)
    assert call("init").exit_code == 2
    assert call("init", "example-chats.jsonl").exit_code == 2


def test_the_columns_of_a_csv_are_named_and_not_only_their_format(shop):
    rows = "".join(f"What is {number}?,,A number\n" for number in range(30))
    (shop.path / "a.csv").write_text(f"instruction,input,output\n{rows}", encoding="utf-8")
    result = call("init", "a.csv", "--model", str(shop.base))
    assert result.stdout.startswith("30 usable rows read as Alpaca's instruction, input and output\n")
    assert f"\nThe model: {shop.base} (--model names another one)\n" in result.stdout
    shown = call("inspect", "a.toml").stdout
    assert "from a.csv (Alpaca's instruction, input and output)" in shown
    assert "(30 rows, held-out ones included)" in shown


def test_a_row_longer_than_the_model_is_counted_as_cut_with_its_own_length(shop):
    from qlora_phi3.family import read_architecture

    positions = read_architecture(str(shop.base)).max_position_embeddings
    chats = write_chats(shop.path / "a.jsonl", rows=24)
    lines = chats.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[3])
    row["messages"][-1]["content"] += " what is" * positions
    lines[3] = json.dumps(row)
    chats.write_text("\n".join(lines), encoding="utf-8")
    result = call("init", "a.jsonl", "--model", str(shop.base), "--yes")
    assert result.exit_code == 0, result.stderr
    longest = json.loads(call("inspect", "a.toml", "--json").stdout)["statistics"]["percentiles"]["100"]
    assert longest > positions
    assert f"the longest {longest:,}\n" in result.stdout
    (line,) = (line for line in (shop.path / "a.toml").read_text(encoding="utf-8").splitlines() if "max_length" in line)
    assert f"cuts or drops 1 of 24 rows, the longest {longest:,}; the model ends at {positions:,} (counted" in line
    shown = call("inspect", "a.toml", "--set", "lora.r=8", "--set", "training.output_dir=a b")
    assert f"max_length = {positions} is all that the model has: 4.2 % of the rows are cut" in shown.stdout
    assert "Suggestion" not in shown.stdout
    assert f"longest row of all {positions:,} after cuts;" in shown.stdout
    assert shown.stderr == "Then train: qlora-phi3 run a.toml --set lora.r=8 --set 'training.output_dir=a b'\n"


def test_faulty_rows_come_in_one_error_that_counts_them_and_names_the_first_five(shop):
    lines = write_chats(shop.path / "a.jsonl", rows=12).read_text(encoding="utf-8").splitlines()
    lines[1::2] = [line.replace('"user"', '"customer"') for line in lines[1::2]]
    lines[4] = lines[4][:30]
    (shop.path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    error = call("init", "a.jsonl").stderr.splitlines()
    assert error[0] == "Error: 7 rows of a.jsonl are faulty, the first of them:"
    assert [line.partition(":")[2].partition(":")[0] for line in error[1:]] == ["2", "4", "5", "6", "8"]
    assert error[1] == "a.jsonl:2: unknown role 'customer'."
    assert error[3].startswith("a.jsonl:5: not valid JSON (")
    assert error[5].startswith("a.jsonl:8: unknown role 'customer'. Rename it in the data; the known roles are ")
    (shop.path / "a.jsonl").write_text("\n".join([*lines[:2], lines[0]]), encoding="utf-8")
    assert call("init", "a.jsonl").stderr.startswith("Error: a.jsonl:2: unknown role 'customer'. Rename it")


def test_columns_that_are_not_read_are_named_and_the_example_s_hint_keeps_the_model(shop):
    rows = "".join(f"{number},What is {number}?,A number\n" for number in range(30))
    (shop.path / "faq.csv").write_text(f"Ticket,Q,A\n{rows}", encoding="utf-8")
    result = call("init", "faq.csv", "--question", "Q", "--answer", "A", "--model", str(shop.base))
    assert "\nColumns not read: Ticket (30 rows)\n" in result.stdout
    words = f"qlora-phi3 init example-chats.jsonl --model {shop.base} --vram '8 GB'"
    example = ("init", "--model", str(shop.base), "--vram", "8 GB")
    assert call(*example).stdout.endswith(f"Next: {words}\n")
    assert call(*example).stderr.endswith(f"Go on with it: {words}\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a terminal of its own needs os.fork")
def test_ctrl_c_at_a_question_ends_in_a_line_of_its_own(shop, chats):
    import pty

    words = [sys.executable, "-m", "qlora_phi3", "init", "my-chats.jsonl", "--model", str(shop.base)]
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, words)
    shown = b""
    while not shown.endswith(b"]: "):
        shown += os.read(terminal, 4096)
    end = b""
    # Python loses a Ctrl-C between readline's prompt and its wait for a key, about every second one here: it is pressed again.
    with suppress(OSError):  # the terminal is closed
        while b"Stopped" not in end:
            os.write(terminal, b"\x03")
            while select.select([terminal], [], [], 1)[0]:
                end += os.read(terminal, 4096)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    os.close(terminal)
    assert end.decode().replace("^C", "").splitlines() == ["", "Stopped."]
    assert not (shop.path / "my-chats.toml").exists()


def test_a_recipe_for_a_gpu_is_counted_simulated_and_accepted_by_recipe_check(shop, chats):
    result = call("init", "my-chats.jsonl", "--model", str(shop.base), "--vram", "8GB", "--yes")
    assert result.exit_code == 0, result.stderr
    assert "qlora-phi3 inspect my-chats.toml" in result.stdout
    assert "estimated at" not in result.stdout
    text = (shop.path / "my-chats.toml").read_text(encoding="utf-8")
    assert "an 8 GB GPU" in text
    assert "counted by its tokenizer" in text
    recipe = load_recipe(shop.path / "my-chats.toml")
    assert (recipe.model.name, recipe.data.train, recipe.data.eval_size) == (str(shop.base), "my-chats.jsonl", 12)
    assert call("recipe", "check", "my-chats.toml").exit_code == 0


def test_the_recipe_may_stand_elsewhere_and_still_finds_the_data(shop, chats):
    (shop.path / "recipes").mkdir()
    assert call("init", "my-chats.jsonl", "--out", "recipes/mine.toml").exit_code == 0
    assert load_recipe(shop.path / "recipes" / "mine.toml", check_files=True).data.train == "../my-chats.jsonl"


def test_rows_longer_than_what_fits_are_cut_to_what_fits(shop, monkeypatch):
    from qlora_phi3.memory import proposal

    def find(checker, devices, progress, longest):
        return [SimpleNamespace(max_length=longest)]

    report = proposal.VramChecker.report

    def report_small(checker, *arguments, **options):
        fits = checker.context.recipe.training.max_length <= 64
        return replace(report(checker, *arguments, **options), verdict="fits" if fits else "does_not_fit")

    monkeypatch.setattr(proposal.VramChecker, "report", report_small)
    monkeypatch.setattr(proposal, "find_max_lengths", partial(find, longest=100))
    write_chats(shop.path / "a.jsonl", rows=30)
    rows = (shop.path / "a.jsonl").read_text(encoding="utf-8").replace("What is", "Tell me " + "once more " * 30 + "what is")
    (shop.path / "a.jsonl").write_text(rows, encoding="utf-8")
    assert call("init", "a.jsonl", "--model", str(shop.base), "--vram", "8GB").exit_code == 0
    assert load_recipe(shop.path / "a.toml").training.max_length == 64
    monkeypatch.setattr(proposal, "find_max_lengths", partial(find, longest=0))
    result = call("init", "a.jsonl", "--out", "b.toml", "--model", str(shop.base), "--vram", "8GB")
    assert (result.exit_code, (shop.path / "b.toml").exists()) == (3, False)


def test_a_folder_of_data_gives_the_recipe_its_name(shop, chats, monkeypatch):
    (shop.path / "data").mkdir()
    chats.rename(shop.path / "data" / "my-chats.jsonl")
    monkeypatch.chdir(shop.path / "data")
    result = call("init", ".")
    assert result.exit_code == 0, result.stderr
    assert load_recipe(shop.path / "data.toml", check_files=True).data.train == "data"


@pytest.mark.parametrize("words", [["gone/a.jsonl"], ["my-chats.jsonl", "--out", "b.toml"], ["my-chats.jsonl"]])
def test_what_cannot_be_read_or_written_is_said_first_and_by_its_name(shop, chats, monkeypatch, words):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    error = call("init", *words).stderr
    if words[0].startswith("gone"):
        assert error.startswith("Error: There is no data file 'gone/a.jsonl'")
    else:
        assert error.startswith(f"Error: {' '.join(words[1:]) or 'my-chats.toml'}: you may not write to {shop.path}.")
    assert ("--out" in error) == ("--out" in words)


def test_at_80_columns_the_table_says_what_each_model_is_good_for(capsys):
    from rich.console import Console

    from qlora_phi3.memory.proposal import MODELS
    from qlora_phi3.ui.vram import show_models

    report = SimpleNamespace(memory=SimpleNamespace(on_gpu_bytes=10**10), fits=True, tokens_per_second=1e4, run_seconds=80_000)
    models = [SimpleNamespace(name=name, note=note, max_length=131_072, report=report) for name, note in MODELS.items()]
    show_models(Console(width=80, force_terminal=True, color_system=None), models)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line.strip() for line in lines[2:12:2]] == list(MODELS.values())
    assert lines[1].split()[:2] == ["1", "phi-4"]
    assert [line.split()[-2:] for line in lines[1:11:2]] == [["15", "min"]] * 5
    assert "14.7B: 14.7 billion" in lines[-1]


def test_an_error_at_a_question_is_wrapped_between_words(monkeypatch):
    import click

    from qlora_phi3.cli.init import _read_target

    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(click.BadParameter) as raised:
        _read_target("gone/a.toml")
    lines = f"Error: {raised.value.message}".splitlines()
    assert lines[0] == "Error: gone/a.toml: there is no"
    assert lines[-1].endswith("name another file.")
