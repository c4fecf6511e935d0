"""Messages of `vram-check`."""

from message_table import Message
from workshop import Workshop

from qlora_phi3.cli.vram_check import vram_check
from qlora_phi3.errors import CannotTellError, DeviceError, UserError


def _check(shop: Workshop, *words: str) -> None:
    """`vram-check mine.toml`, whose errors are raised."""
    shop.write()
    vram_check.main(["mine.toml", *words], standalone_mode=False)


MESSAGES = [
    Message(
        name="budget-over-the-gpu",
        trigger=lambda shop: _check(shop, "--vram", "4GB", "--set", "memory.budget=11GiB"),
        error=DeviceError,
        exit_code=2,
        says=('[memory] budget = "11GiB"', "3.6"),
        hint='budget = "auto"',
    ),
    Message(
        name="vram-unreadable",
        trigger=lambda shop: _check(shop, "--vram", "12G B"),
        error=DeviceError,
        exit_code=2,
        says=("--vram", "'12G B'"),
        hint="--vram 12GB",
    ),
    Message(
        name="model-shapes-not-here",
        trigger=lambda shop: _check(shop, "--vram", "8GB", "--set", "model.name=someone/some-phi3"),
        error=CannotTellError,
        exit_code=4,
        says=("someone/some-phi3", "config.json"),
        hint="hf download someone/some-phi3 config.json",
    ),
    Message(
        name="vram-check-two-gpus",
        trigger=lambda shop: _check(shop, "--vram", "8GB", "--gpu", "RTX 3060"),
        error=UserError,
        exit_code=2,
        says=("--gpu 'RTX 3060'", "--vram 8GB"),
        hint="Keep one",
    ),
    Message(
        name="vram-check-without-recipe",
        trigger=lambda shop: vram_check.main(["--all"], standalone_mode=False),
        error=UserError,
        exit_code=2,
        says=("--all",),
        hint="chat or my.toml",
    ),
    Message(
        name="vram-check-all-and-one-gpu",
        trigger=lambda shop: _check(shop, "--all", "--vram", "4GB"),
        error=UserError,
        exit_code=2,
        says=("--all", "--gpu and --vram"),
        hint="Keep one",
    ),
    Message(
        name="vram-check-two-tables",
        trigger=lambda shop: _check(shop, "--all", "--max-length"),
        error=UserError,
        exit_code=2,
        says=("--all and --max-length",),
        hint="one after the other",
    ),
    Message(
        name="fit-of-a-table",
        trigger=lambda shop: _check(shop, "--all", "--fit", "x.toml"),
        error=UserError,
        exit_code=2,
        says=("--fit",),
        hint="Leave --all and --max-length out",
    ),
    Message(
        name="fit-without-toml",
        trigger=lambda shop: _check(shop, "--vram", "4GB", "--fit", "x.json"),
        error=UserError,
        exit_code=2,
        says=("--fit x.json", ".toml"),
        hint="Name it so",
    ),
    Message(
        name="fit-exists",
        trigger=lambda shop: _check(shop, "--vram", "4GB", "--fit", "mine.toml"),
        error=UserError,
        exit_code=2,
        says=("mine.toml exists already",),
        hint="another file with --fit",
    ),
    Message(
        name="fit-without-directory",
        trigger=lambda shop: _check(shop, "--vram", "4GB", "--fit", "nowhere/x.toml"),
        error=UserError,
        exit_code=2,
        says=("--fit nowhere/x.toml", "nowhere"),
        hint="name another file",
    ),
]
