"""Messages of `init`."""

from pathlib import Path

from message_table import Message

from qlora_phi3.cli.init import init
from qlora_phi3.errors import DataError, UserError

ROW = '{"prompt": "a", "completion": "b"}\n'


def _init(*words, content=None):
    def trigger(shop):
        if content is not None:
            Path("a.jsonl").write_text(content, encoding="utf-8")
        init.main(list(words), standalone_mode=False)

    return trigger


def _init_twice(*words):
    def trigger(shop):
        init.main(list(words), standalone_mode=False)
        init.main(list(words), standalone_mode=False)

    return trigger


MESSAGES = [
    Message(
        "init-recipe-exists",
        lambda shop: init.main(["chats.jsonl", "--out", shop.write().name], standalone_mode=False),
        UserError,
        2,
        ("mine.toml exists already",),
        "--out",
    ),
    Message(
        "init-example-exists",
        _init_twice(),
        UserError,
        2,
        ("example-chats.jsonl exists already",),
        "qlora-phi3 init example-chats.jsonl",
    ),
    Message(
        "init-out-is-no-recipe", _init("a.jsonl", "--out", "a.txt", content=ROW), UserError, 2, ("--out a.txt",), "Name it so"
    ),
    Message(
        "init-out-without-data", _init("--out", "a.toml"), UserError, 2, ("--out a.toml is for a recipe",), "Leave --out out"
    ),
    Message(
        "init-out-without-directory",
        _init("a.jsonl", "--out", "gone/a.toml", content=ROW),
        UserError,
        2,
        ("--out gone/a.toml: there is no directory ",),
        "Make it",
    ),
    Message(
        "init-cannot-write",
        _init("a.jsonl", "--yes", "--out", f"{'x' * 300}.toml", content=ROW),
        UserError,
        2,
        ("xxx.toml cannot be written: File name too long",),
        "name another file",
    ),
    Message(
        "init-one-column",
        _init("a.jsonl", "--answer", "y", content=ROW),
        UserError,
        2,
        ("--question and --answer belong together",),
        "both",
    ),
    Message(
        "init-column-missing",
        _init("a.jsonl", "--question", "x", "--answer", "z", content='{"x": 1, "y": 2}\n'),
        UserError,
        2,
        ("a.jsonl has no column 'z'",),
        "x, y",
    ),
    Message("init-data-missing", _init("a.jsonl"), DataError, 2, ("no data file 'a.jsonl'",), "Check the path"),
    Message(
        "init-data-mistyped",
        _init("aa.jsonl", content=ROW),
        DataError,
        2,
        ("no data file 'aa.jsonl'",),
        "Did you mean a.jsonl?",
    ),
    Message("init-recipe-as-data", _init("a.toml"), UserError, 2, ("a.toml is a recipe, not data",), "qlora-phi3 run a.toml"),
    Message("init-root", _init("/"), UserError, 2, ("/ is the whole file system",), "a folder of files"),
    Message(
        "init-one-column-twice",
        _init("a.jsonl", "--question", "x", "--answer", "x", content='{"x": 1, "y": 2}\n'),
        UserError,
        2,
        ("--question and --answer are both 'x'",),
        "Name two columns",
    ),
    Message(
        "init-data-of-unknown-columns",
        _init("a.jsonl", content='{"x": 1, "y": 2}\n'),
        DataError,
        2,
        ("The columns of a.jsonl are of no known format", "x, y"),
        "--question COLUMN --answer COLUMN",
    ),
]
