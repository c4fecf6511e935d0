import ast
import json
import random
import re
from pathlib import Path

import make_demo_data
import pytest
from make_demo_data import (
    Documented,
    build_chat,
    build_chats,
    clean_paragraph,
    is_held_out,
    main,
    read_objects,
    read_signature,
    read_standard_library,
)

SOURCE = '''
"""Wrap paragraphs of text.

More about it.
"""

class Wrapper:
    """An object that wraps paragraphs."""

    def fill(self, text: str, *, width: int = 70) -> str:
        """Wrap the paragraph
        and join its lines."""

    @property
    def width(self):
        """The width of a line in characters."""

    def _hidden(self):
        """Nobody should ask about this one."""

async def wrap(text, /, *rest):
    """Wrap one paragraph."""

def repeated():
    """An object that wraps paragraphs."""
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    main(["--out", str(folder)])
    return folder


def read_chats(path):
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_public_objects_are_read_with_their_first_paragraph_and_signature():
    assert list(read_objects(SOURCE, "textwrap")) == [
        Documented(name="textwrap", kind="module", text="Wrap paragraphs of text.", signature=""),
        Documented(name="textwrap.Wrapper", kind="class", text="An object that wraps paragraphs.", signature=""),
        Documented(
            name="textwrap.Wrapper.fill",
            kind="method",
            text="Wrap the paragraph and join its lines.",
            signature="textwrap.Wrapper.fill(text, *, width=70)",
        ),
        Documented(name="textwrap.Wrapper.width", kind="property", text="The width of a line in characters.", signature=""),
        Documented(name="textwrap.wrap", kind="function", text="Wrap one paragraph.", signature="textwrap.wrap(text, /, *rest)"),
        Documented(
            name="textwrap.repeated",
            kind="function",
            text="An object that wraps paragraphs.",
            signature="textwrap.repeated()",
        ),
    ]


def test_a_library_folder_is_read_without_tests_private_modules_and_repeated_texts(tmp_path):
    (tmp_path / "textwrap.py").write_text(SOURCE, encoding="utf-8")
    for path in ("email/_policy.py", "email/test/x.py", "test/y.py", "not_of_python.py", "idlelib/z.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('"""This text must not be read."""', encoding="utf-8")
    (tmp_path / "email" / "message.py").write_text('"""Messages and their parts."""', encoding="utf-8")
    names = [item.name for item in read_standard_library(tmp_path)]
    assert names == [
        "email.message",
        "textwrap",
        "textwrap.Wrapper",
        "textwrap.Wrapper.fill",
        "textwrap.Wrapper.width",
        "textwrap.wrap",
    ]


@pytest.mark.parametrize(
    "docstring",
    ["Too short.", "x " * 300, "wrap(text) -> list of lines", "The choices are as follows:", ">>> wrap('a b c d')"],
)
def test_what_is_no_sentence_to_answer_with_is_left_out(docstring):
    assert clean_paragraph(docstring) == ""


def test_self_alone_is_cut_from_a_signature():
    def signature(source):
        return read_signature(ast.parse(source).body[0], "f", is_method=True)

    assert signature("def f(self): ...") == "f()"
    assert signature("def f(self, /, selfish): ...") == "f(selfish)"
    assert signature("def f(cls, *classes): ...") == "f(*classes)"
    assert signature("def f(name): ...") == "f(name)"
    assert signature(f"def f({', '.join('argument' + str(i) for i in range(20))}): ...") == ""


def test_a_conversation_alternates_user_and_assistant_and_answers_with_the_docstring():
    item = Documented(name="textwrap.wrap", kind="function", text="Wrap it all.", signature="textwrap.wrap(text)")
    draw = random.Random(0)
    chats = [build_chat(item, draw) for _ in range(50)]
    assert {len(chat) for chat in chats} == {2, 4}
    for chat in chats:
        assert [message["role"] for message in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert "textwrap.wrap" in chat[0]["content"]
        assert "Wrap it all." in chat[1]["content"]


def test_this_pythons_library_gives_a_few_thousand_conversations(made):
    training, held_out = read_chats(made / "chats.jsonl"), read_chats(made / "chats-heldout.jsonl")
    assert 2000 < len(training) < 10_000
    assert 100 < len(held_out) < 500
    assert all(message["content"].strip() for chat in training + held_out for message in chat)
    assert "Python Software Foundation" in (made / "chats-README.md").read_text(encoding="utf-8")


def test_no_module_and_no_docstring_is_on_both_sides(made):
    training, held_out = read_chats(made / "chats.jsonl"), read_chats(made / "chats-heldout.jsonl")

    def modules(chats):
        return {re.search(r"`(\w+)[.\w]*`", chat[0]["content"])[1] for chat in chats}

    assert all(is_held_out(module) for module in modules(held_out))
    assert not any(is_held_out(module) for module in modules(training))
    seen = {message["content"].casefold() for chat in training for message in chat if message["role"] == "assistant"}
    assert not seen & {chat[1]["content"].casefold() for chat in held_out}


def test_the_same_python_gives_the_same_files(made, tmp_path):
    main(["--out", str(tmp_path)])
    for name in ("chats.jsonl", "chats-heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


def test_reading_imports_no_module_it_reads_about():
    items = read_standard_library(Path(make_demo_data.sysconfig.get_paths()["stdlib"]))
    assert "turtle" in {item.module for item in items}
    assert "turtle" not in make_demo_data.sys.modules
    assert sum(len(part) for part in build_chats(items)) == len(items)


def test_a_python_without_sources_is_told_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(make_demo_data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(SystemExit, match="has no sources with docstrings"):
        main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
