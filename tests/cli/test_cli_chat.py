"""A conversation line by line, one answer, base beside tuned, Ctrl-C, the choice of a run, and the keys of the prompt."""

import json
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from trained_run import leave_trained
from workshop import call, read_lines

from qlora_phi3.cli import chat as chat_module
from qlora_phi3.cli.chat import Conversation, WordWriter, _open_input
from qlora_phi3.cli.main import main
from qlora_phi3.errors import Terminated
from qlora_phi3.inference import GREEDY, generate, load_for_inference
from qlora_phi3.runfolder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("chat") / "runs" / "mine" / "first"
    leave_trained(folder, base)
    (folder / "report.json").write_text(
        json.dumps({"status": "done", "eval_loss_before": 4.0, "eval_loss_after": 2.5}), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def loaded(run):
    return load_for_inference(run, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def loaded_once(loaded, monkeypatch):
    """A command gets the model that is loaded already."""
    monkeypatch.setattr("qlora_phi3.inference.load_for_inference", lambda *_, **__: loaded)


def talk(loaded, *, compare=False, limit=8):
    return Conversation(loaded, GREEDY, limit, 0, compare, "")


def answer_of(loaded, question, limit=8):
    pieces = []
    generate(loaded, [{"role": "user", "content": question}], max_new_tokens=limit, show=pieces.append)
    return "".join(pieces)


def converse(run, *lines, options=()):
    """What is printed on stdout and on stderr for these lines of input."""
    words = ["chat", str(run), "--max-new-tokens", "8", *options]
    result = CliRunner().invoke(main, words, input="".join(f"{line}\n" for line in lines))
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


def test_one_answer_is_that_of_the_model_and_its_figures_are_on_stderr(run, loaded):
    result = call("chat", str(run), "--prompt", "What is red?", "--max-new-tokens", "8")
    assert result.exit_code == 0, result.stderr
    expected = answer_of(loaded, "What is red?")
    assert result.stdout.splitlines()[0].encode() == chat_module.printable(expected).splitlines()[0].encode()
    assert "8 tokens, " in result.stderr
    assert "cut at --max-new-tokens" in result.stderr


def test_a_prompt_is_read_from_stdin(run):
    words = ["chat", str(run), "--max-new-tokens", "8", "--prompt"]
    piped = CliRunner().invoke(main, [*words, "-"], input="What is red?\n")
    assert piped.stdout == call(*words, "What is red?").stdout


def test_base_and_tuned_answer_below_each_other_where_there_is_no_terminal(run, loaded):
    stdout, _ = converse(run, "What is red?", options=("--compare",))
    with loaded.model.disable_adapter():
        base = answer_of(loaded, "What is red?")
    printed = chat_module.printable
    assert stdout == f"tuned:\n{printed(answer_of(loaded, 'What is red?'))}\nbase:\n{printed(base)}\n"


@pytest.fixture
def red(monkeypatch):
    """A model that answers `red`, or from the second on what a test appends: the answer and its figures."""
    answers = []
    monkeypatch.setattr(Conversation, "_answer", lambda *_: answers.pop(0) if answers else ("red", "1 token, ended by itself"))
    return answers


def test_a_conversation_is_saved_as_a_row_to_train_on_and_never_over_a_file(run, red, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, stderr = converse(run, "/save a.jsonl", "/system Be brief.", "What is red?", "And blue?", "/save a.jsonl", "/save a.jsonl")
    [row] = read_lines(tmp_path / "a.jsonl")
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert row["messages"][0]["content"] == "Be brief."
    assert [message["content"] for message in row["messages"][1::2]] == ["What is red?", "And blue?"]
    assert "nothing to save yet" in stderr
    assert "a.jsonl exists" in stderr


def test_answers_that_are_empty_stopped_or_cut_are_not_saved_which_is_said(run, red, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    red += [
        ("\n", "1 token, an empty answer: it ended its turn at once"),
        ("a bl", "stopped"),
        ("red", "cut at --max-new-tokens"),
    ]
    *_, stderr = converse(run, "1", "/save a.jsonl", "2", "3", "/save a.jsonl", "four", "/save a.jsonl")
    assert "There is nothing to save yet." in stderr
    assert "Nothing is written: 2 questions left out, whose answer was stopped or cut." in stderr
    assert "Written: a.jsonl (2 questions left out, whose answer was stopped or cut)" in stderr
    [row] = read_lines(tmp_path / "a.jsonl")
    assert row == {"messages": [{"role": "user", "content": "four"}, {"role": "assistant", "content": "red"}]}


def test_the_conversation_goes_on_from_an_answer_that_was_stopped_and_not_from_an_empty_one(loaded, red):
    red += [("", "an empty answer: it ended its turn at once"), ("a bl", "stopped")]
    conversation = talk(loaded)
    conversation.ask("one")
    conversation.ask("two")
    assert conversation.messages("tuned") == [{"role": "user", "content": "two"}, {"role": "assistant", "content": "a bl"}]


def test_reset_forgets_the_turns_and_keeps_the_system_turn(run, red, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    converse(run, "What is red?", "/reset", "And blue?", "/save a.jsonl", options=("--system", "Be brief."))
    [row] = read_lines(tmp_path / "a.jsonl")
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


def test_an_unknown_command_is_named_and_a_path_is_a_question(run):
    stdout, stderr = converse(run, "/hlep", "/etc/passwd?", "quit", "/quit", "never read")
    assert "To end, type /quit" in stderr
    assert "no command /hlep" in stderr
    assert stderr.count("tokens/s") == 1
    assert stdout


def test_an_error_ends_no_conversation(run):
    _, stderr = converse(run, "word " * 600, "What is red?")
    assert "600" not in stderr
    assert "512 positions" in stderr
    assert stderr.count("tokens/s") == 1


def test_ctrl_c_stops_an_answer_which_stays_as_far_as_it_came(loaded, monkeypatch, capsys):
    conversation, shown = talk(loaded, limit=200), []

    def interrupt(text, **_):
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("click.echo", interrupt)
        text, figures = conversation._answer("tuned", [{"role": "user", "content": "?"}], lambda pieces: interrupt(pieces[-1]))
    assert (text, figures) == ("".join(shown), "stopped")
    assert loaded.model.active_adapters == ["default"]


def test_ctrl_c_while_a_single_answer_is_generated_ends_the_program(run, monkeypatch):
    monkeypatch.setattr(Conversation, "_answer", lambda *_: ("", "stopped"))
    assert call("chat", str(run), "--prompt", "?").exit_code == 130


def test_ctrl_c_stops_the_sides_that_have_not_answered_yet(loaded, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(Conversation, "_answer", lambda _, side, *__: asked.append(side) or ("a part", "stopped"))
    conversation = talk(loaded, compare=True)
    assert conversation.ask("?") == "stopped"
    assert (asked, conversation.turns) == (["tuned"], {})


def test_ctrl_c_between_the_answers_ends_no_conversation(run, monkeypatch):
    monkeypatch.setattr(Conversation, "ask", lambda *_: signal.raise_signal(signal.SIGINT))
    _, stderr = converse(run, "What is red?", "/help")
    assert stderr.index("stopped") < stderr.index("/reset")


@pytest.mark.parametrize(("options", "shown"), [((), "Be brief."), (("--system", ""), None), (("--system", "Rhyme."), "Rhyme.")])
def test_the_system_turn_of_the_training_rows_is_used_unless_another_is_named(run, monkeypatch, options, shown):
    report = json.dumps({"status": "done", "data": {"system": "Be brief."}})
    monkeypatch.setattr(RunFolder, "read_report", lambda _: json.loads(report))
    systems = []
    monkeypatch.setattr(Conversation, "ask", lambda talk, _: systems.append(talk.system) or "")
    result = call("chat", str(run), "--prompt", "?", *options)
    assert result.exit_code == 0, result.stderr
    assert systems == [shown or ""]
    assert ("System turn, as in all training rows (none: --system ''): Be brief." in result.stderr) == (not options)


def test_the_sides_keep_conversations_of_their_own(loaded, capsys):
    conversation = talk(loaded, compare=True)
    conversation.ask("What is red?")
    conversation.ask("And blue?")
    base, tuned = conversation.messages("base"), conversation.messages("tuned")
    assert base[0] == tuned[0]
    assert base[1] != tuned[1]
    assert len(base) == len(tuned) == 4


def test_an_empty_answer_beside_another_is_said_to_be_empty(loaded, monkeypatch, capsys):
    monkeypatch.setattr(Conversation, "_answer", lambda _, side, *__: ("" if side == "base" else "a cherry", "figures"))
    talk(loaded, compare=True).ask("?")
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("base:") + 1] == "(empty)"
    table = chat_module._columns([("", "0 tokens"), ("a cherry", "3 tokens")], 20)
    assert [str(cell) for cell in table.columns[0].cells] == ["(empty)", "0 tokens"]
    assert [str(cell) for cell in chat_module._columns([("", "")], 20).columns[0].cells] == ["", ""]


def test_answers_stand_beside_each_other_on_a_wide_terminal(loaded, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(Conversation, "_answer", lambda _, side, *__: (f"I am {side}.\x1b[2J[red]", f"figures of {side}"))
    talk(loaded, compare=True).ask("?")
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "I am base." in line]
    assert "I am tuned." in line
    assert "\\x1b[2J[red]" in line
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize(
    ("pieces", "columns", "shown"),
    [
        (["she ", "i", "s a fie", "rce cat"], 10, "she is a\nfierce cat"),
        (["\n", " \nred", " ", "\n"], 10, "red"),
        (["a\n\n  b", " c"], 4, "a\n\n  b\nc"),
        (["\n", " "], 10, ""),
        (["12345 67890", "1 x"], 6, "12345\n678901\nx"),
        (["漢字漢 字漢"], 10, "漢字漢\n字漢"),
        (["x" * 50, "y"], 20, "x" * 50 + "y"),
        (["an ", "x" * 25, " b"], 20, "an\n" + "x" * 25 + "\nb"),
    ],
)
def test_a_streamed_answer_has_lines_that_end_between_words(pieces, columns, shown, capsys):
    writer = WordWriter(Console(width=columns, force_terminal=True))
    for piece in [*pieces, ""]:
        writer.write([piece], is_last=not piece)
    assert capsys.readouterr().out == shown


def test_an_empty_answer_on_a_terminal_is_said_to_be_empty(loaded, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(Conversation, "_answer", lambda talk, side, messages, show: show(["\n"]) or ("\n", "figures"))
    talk(loaded).ask("?")
    assert capsys.readouterr().out == "(empty)\n"


def test_a_run_is_chosen_by_its_number(run, monkeypatch):
    monkeypatch.chdir(run.parents[2])
    monkeypatch.setattr(chat_module, "_is_terminal", lambda: True)
    monkeypatch.setattr(chat_module, "_converse", lambda _, name: print(f"chatting with {name}"))
    result = CliRunner().invoke(main, ["chat"], input="1\n")
    assert f"1  {Path('runs', 'mine', 'first')}   done   held-out loss 4.0000 -> 2.5000" in result.stdout
    assert f"chatting with {Path('runs', 'mine', 'first')}" in result.stdout


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """A terminal whose keys a test types."""
    monkeypatch.setattr(chat_module, "_is_terminal", lambda: True)
    monkeypatch.setattr("qlora_phi3.files.user_state_dir", lambda: tmp_path / "state")
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


def test_alt_enter_begins_a_line_and_messages_are_remembered(typed, tmp_path):
    typed.send_text("one\x1b\rtwo\r")
    assert _open_input()() == "one\ntwo"
    typed.send_text("\x1b[A\r")
    assert _open_input()() == "one\ntwo"
    assert (tmp_path / "state" / "chat-history").stat().st_mode & 0o077 == 0


CTRL_C = KeyboardInterrupt


def typing(*events):
    """A function that reads these lines, or raises these errors."""
    left = iter(events)

    def read():
        event = next(left)
        if isinstance(event, type):
            raise event
        return event

    return read


@pytest.mark.parametrize(
    ("events", "asked", "lines"),
    [
        ((CTRL_C, "one", CTRL_C, "two", CTRL_C, CTRL_C, "never read"), ["one", "two"], 3),
        ((CTRL_C, EOFError), [], 1),
        (("one", Terminated, "never read"), ["one"], 0),
    ],
)
def test_a_second_ctrl_c_in_a_row_at_the_prompt_ends_the_chat(run, monkeypatch, events, asked, lines):
    questions = []
    monkeypatch.setattr(chat_module, "_open_input", lambda: typing(*events))
    monkeypatch.setattr(Conversation, "ask", lambda _, question: questions.append(question))
    result = call("chat", str(run))
    assert (result.exit_code, questions) == (0, asked)
    assert result.stderr.count("Ctrl-D or /quit ends the chat") == lines


def test_sigterm_ends_the_chat_also_during_an_answer(run, monkeypatch):
    monkeypatch.setattr(Conversation, "ask", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert "/reset" not in converse(run, "What is red?", "/help")[1]


def test_ctrl_c_clears_a_message_and_at_an_empty_prompt_is_raised(typed):
    typed.send_text("half\x03all\r\x03")
    read = _open_input()
    assert read() == "all"
    with pytest.raises(KeyboardInterrupt):
        read()


def test_ctrl_d_quits(typed):
    typed.send_text("\x04")
    with pytest.raises(EOFError):
        _open_input()()
