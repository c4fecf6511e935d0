"""`qlora-phi3 vram-check` as a person calls it, on a tiny model."""

import json
import shutil
import subprocess
import sys

import pytest
from workshop import Workshop, call, write_chats

import qlora_phi3.hardware.gpu
import qlora_phi3.memory.tables
from qlora_phi3.errors import NoDeviceError
from qlora_phi3.hardware.gpu import Gpu, GpuProcess
from qlora_phi3.memory.margin import record_error
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.units import GIB, MIB

KEYS = {
    "verdict", "peak_allocated_bytes", "peak_reserved_bytes", "peak_on_card_bytes", "budget_bytes", "margin_bytes",
    "micro_batch_size", "gradient_accumulation_steps", "micro_batch_tokens", "max_length", "checkpoint_every_n_layers",
    "activation_offloading", "optim", "logits_tile_bytes", "mlp_tile_tokens",
    "paged_bytes", "host_bytes", "phases", "categories", "processes",
    "device", "rows", "reasons", "suggestions", "seconds_per_step", "tokens_per_second", "slowest_tokens_per_second",
    "fastest_tokens_per_second", "versions",
}  # fmt: skip
HERE = Gpu(
    name="NVIDIA GeForce RTX 3060",
    total_bytes=12 * GIB,
    free_bytes=10 * GIB,
    processes=(
        GpuProcess(name="Xorg", pid=11, used_bytes=700 * MIB),
        GpuProcess(name="game.exe", pid=12, used_bytes=None),
    ),
    compute_capability=(8, 6),
    bandwidth_bytes_per_second=3.6e11,
    tflops_16bit=25.5,
    is_local=True,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory, base):
    """A folder, its recipe, and the program's own folders, for all tests here: what was answered once is kept."""
    path = tmp_path_factory.mktemp("vram")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "LOCALAPPDATA"):
            patch.setenv(variable, str(path / "own"))
        patch.chdir(path)
        shop = Workshop(path, base)
        shop.write(quantization={"bnb_4bit_compute_dtype": "bfloat16"})
        yield shop


@pytest.fixture
def card_here(monkeypatch):
    """A card in this computer."""
    monkeypatch.setattr(qlora_phi3.hardware.gpu, "read_gpu", lambda: HERE)


def ask(*words, recipe="mine.toml"):
    """`vram-check` of a recipe that is written once; the answer as JSON."""
    result = call("vram-check", recipe, "--json", *words)
    assert result.exit_code in (0, 3), result.stderr
    return json.loads(result.stdout)


def test_a_recipe_that_fits_says_so_with_its_plan_and_its_tenants(home):
    result = call("vram-check", "mine.toml", "--vram", "8GB")
    assert result.exit_code == 0, result.stderr
    for text in ("an 8 GB card", "It fits, with", "on the card", "CUDA context", "micro_batch_tokens", "not measured"):
        assert text in result.stdout
    assert "█" in result.stdout
    assert result.stderr == ""


def test_a_program_gets_every_figure(home):
    report = ask("--vram", "8GB")
    assert report.keys() >= KEYS
    assert report["verdict"] == "fits"
    assert sum(report["categories"].values()) == report["peak_allocated_bytes"]
    assert report["budget_bytes"] == report["device"]["free_bytes"]
    assert (report["rows"]["assumed"], report["rows"]["count"]) == (False, 40)
    assert report["rows"]["longest"] < 128


def test_an_answer_that_was_kept_is_shown_without_torch_or_pydantic(home):
    kept = call("vram-check", "mine.toml", "--vram", "8GB", "--json").stdout
    code = (
        "import sys\nfrom qlora_phi3.cli.main import main\n"
        "main(['vram-check', 'mine.toml', '--vram', '8GB', '--json'], standalone_mode=False)\n"
        "heavy = ['torch', 'transformers', 'datasets', 'huggingface_hub', 'pydantic', 'numpy', 'rich']\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (shown.stdout, shown.stderr.splitlines()[-1]) == (kept, "[]")


def test_other_data_are_another_question(home):
    shutil.copy("chats.jsonl", "own-chats.jsonl")
    home.write(name="own.toml", data={"train": "own-chats.jsonl"})
    assert ask("--vram", "8GB", recipe="own.toml")["rows"]["count"] == 40
    write_chats(home.path / "own-chats.jsonl", rows=20)
    assert ask("--vram", "8GB", recipe="own.toml")["rows"]["count"] == 12


def test_a_spoilt_cache_is_worked_out_again(home):
    before = ask("--vram", "8GB")
    for path in (home.path / "own").rglob("vram-check/*.json"):
        path.write_text('{"answer": {}, "watched": {}}', encoding="utf-8")
    after = ask("--vram", "8GB")
    assert {**after, "answered": ""} == {**before, "answered": ""}


def test_a_recipe_that_does_not_fit_is_exit_code_3_with_what_would_help(home):
    result = call("vram-check", "mine.toml", "--vram", "8GB", "--set", "memory.budget=300MiB")
    assert result.exit_code == 3, result.stderr
    for text in (
        "[memory] budget: a run may take 300 MiB of it",
        "▲",
        "the budget ends here",
        "─ 7.18 GiB outside of [memory] budget",
        "It does not fit the budget:",
        '1. Write [memory] budget = "auto": all that is free on the card. Allows 7.18 GiB more; then it fits.',
    ):
        assert text in result.stdout
    assert "the card ends here" not in result.stdout


def test_a_budget_that_is_kept_is_named_in_the_verdict_and_the_bar(home):
    result = call("vram-check", "mine.toml", "--vram", "8GB", "--set", "memory.budget=2GiB")
    assert result.exit_code == 0, result.stderr
    assert "It fits the budget, with" in result.stdout
    bar = next(line for line in result.stdout.splitlines() if "█" in line)
    assert bar.startswith("─" * 70)


def test_a_card_of_a_size_stands_for_all_of_them_and_gets_the_speed_of_the_slowest_and_the_fastest(home):
    shown = call("vram-check", "mine.toml", "--vram", "12GB").stdout
    assert shown.splitlines()[:2] == [
        "a 12 GB card: about 11.45 GiB for programs, when nothing else is on the card",
        "That is the smallest RTX 30, 40, 50 with 12 GB: they differ a little; --gpu asks about one of them, "
        "or about an older RTX 20",
    ]
    assert "on the slowest of these cards; " in shown
    report, one = ask("--vram", "12GB"), ask("--gpu", "RTX 3060 12GB")
    assert report["device"]["estimated"]
    assert "RTX 3060 12GB" in report["device"]["represents"]
    assert report["slowest_tokens_per_second"] < report["tokens_per_second"] < report["fastest_tokens_per_second"]
    assert one["slowest_tokens_per_second"] == one["tokens_per_second"]
    assert "No card of the table has that size: its speed is that of RTX 30, 40, 50 with 16 and 24 GB" in (
        call("vram-check", "mine.toml", "--vram", "20GB").stdout
    )


def test_the_plan_is_shown_as_lines_of_a_recipe(home):
    report = ask("--vram", "8GB")
    shown = call("vram-check", "mine.toml", "--vram", "8GB").stdout
    for line in (
        f"[memory] micro_batch_tokens = {report['micro_batch_tokens']} ",
        "[training] gradient_checkpointing = false ",
        '[training] optim = "adamw_8bit" ',
        '[memory] logits_tile = "32MiB" ',
    ):
        assert line in shown
    pinned = call("vram-check", "mine.toml", "--vram", "8GB", "--set", "training.gradient_checkpointing=true").stdout
    assert "[memory] checkpoint_every_n_layers = 1 " in pinned


def test_piped_lines_end_without_blanks_and_heed_columns(home, monkeypatch):
    wide = call("vram-check", "mine.toml", "--vram", "8GB").stdout
    monkeypatch.setenv("COLUMNS", "70")
    narrow = call("vram-check", "mine.toml", "--vram", "8GB").stdout
    assert not [line for line in (wide + narrow).splitlines() if line != line.rstrip()]
    bars = [next(len(line) for line in text.splitlines() if "░" in line) for text in (wide, narrow)]
    assert bars == [100, 70]


DATA_PROBLEMS = {
    "missing": ({"train": "nowhere.jsonl"}, "There is no data file 'nowhere.jsonl' in"),
    "missing to measure on": ({"eval": "nowhere.jsonl"}, "There is no data file 'nowhere.jsonl' in"),
    "unusable": ({"train": "odd.jsonl"}, "odd.jsonl can be trained on: 1 x its columns (nose) fit no format"),
    "empty": ({"train": "empty.jsonl"}, "empty.jsonl is empty."),
}


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("problem", DATA_PROBLEMS)
def test_data_that_no_run_can_use_are_named_whether_the_tokenizer_is_here_or_not(home, problem, counted):
    (home.path / "odd.jsonl").write_text('{"nose": "long"}', encoding="utf-8")
    (home.path / "empty.jsonl").write_text("", encoding="utf-8")
    if not (home.path / "mute").is_dir():
        (home.copy_base("mute") / "tokenizer.json").unlink()
    keys, told = DATA_PROBLEMS[problem]
    home.write(name="data.toml", data=keys, model={"name": str(home.base) if counted else "mute"})
    result = call("vram-check", "data.toml", "--vram", "8GB")
    assert result.exit_code == 0, result.stderr
    assert "Rows: assumed to be max_length = 128 tokens each. The data cannot be used." in result.stdout
    assert "even if every row is that long" in result.stdout
    note = next(line for line in result.stdout.splitlines() if line.startswith("Note: a run would stop at its data. "))
    assert told in note
    report = ask("--vram", "8GB", recipe="data.toml")
    assert report["rows"]["assumed"]
    assert told in report["rows"]["problem"]


@pytest.fixture
def no_card(monkeypatch):
    """A computer without a card."""

    def nothing_here():
        raise NoDeviceError("No NVIDIA driver answers on this machine.", qlora_phi3.hardware.gpu.ELSEWHERE)

    monkeypatch.setattr(qlora_phi3.hardware.gpu, "read_gpu", nothing_here)


@pytest.mark.parametrize("words", [["mine.toml"], []])
def test_without_a_card_here_nothing_can_be_told_and_that_is_exit_code_4(home, no_card, words):
    result = call("vram-check", *words)
    assert (result.exit_code, result.stdout) == (4, "")
    assert "--gpu 'RTX 4070', --vram 12GB, or --all" in result.stderr
    assert result.stderr.count("\n") == 1
    result = call("vram-check", *words, "--json")
    assert result.exit_code == 4
    report = json.loads(result.stdout)
    assert (report["verdict"], "No NVIDIA driver" in report["reason"]) == ("cannot_tell", True)


@pytest.mark.parametrize("name", ["nofolder", "./nofolder"])
def test_a_model_folder_that_is_not_there_is_bad_input(home, name):
    result = call("vram-check", "mine.toml", "--vram", "8GB", "--set", f"model.name={name}")
    assert result.exit_code == 2
    assert f"There is no model folder {name}." in result.stderr


@pytest.mark.parametrize(
    "name", ["microsoft/Phi-3.5-MoE-instruct", "microsoft/phi-2", "microsoft/Phi-4-multimodal-instruct"]
)
def test_a_model_of_another_architecture_is_refused_by_its_name(home, name):
    result = call("vram-check", "mine.toml", "--vram", "8GB", "--set", f"model.name={name}")
    assert result.exit_code == 2
    assert f"{name} is a model of type 'phi" in result.stderr
    assert "not phi3. Supported is every model_type 'phi3': Phi-3-mini" in result.stderr


def test_a_model_whose_shapes_are_not_here_is_exit_code_4_for_people_and_programs(home):
    words = ("vram-check", "mine.toml", "--vram", "8GB", "--set", "model.name=someone/some-phi3")
    result = call(*words, "--json")
    assert result.exit_code == 4
    report = json.loads(result.stdout)
    assert report.keys() >= KEYS
    assert report["verdict"] == "cannot_tell"
    assert "someone/some-phi3" in report["reason"]
    result = call(*words)
    assert result.exit_code == 4
    assert result.stderr.count("\n") == 1
    assert "hf download someone/some-phi3 config.json" in result.stderr


def test_a_model_of_the_hub_is_known_offline_and_its_rows_are_assumed(home):
    changes = ("--set", "model.name=microsoft/Phi-3-mini-4k-instruct", "--set", "training.max_length=5000")
    result = call("vram-check", "mine.toml", "--vram", "8GB", *changes)
    assert result.exit_code == 2
    assert "has 4096 positions. Write max_length = 4096 or less." in result.stderr


WRONG = {
    "an unknown card": (["--gpu", "RTX 4071"], "The table has no card 'RTX 4071'. The nearest are RTX 40"),
    "a card of two sizes": (["--gpu", "RTX 4060 Ti"], "comes with 8 GB and 16 GB. Say which"),
    "a size without unit": (["--vram", "12"], "--vram: '12' has no unit: write 12GiB, 12GB or 12MiB."),
    "a negative size": (["--vram", "-3GB"], "it must be more than zero"),
    "no size": (["--vram", "big"], "'big' is no size"),
    "a card that is none": (["--vram", "100KB"], "There is no card of"),
    "two cards": (["--vram", "8GB", "--gpu", "RTX 3060"], "both name a card"),
    "a budget over the card": (
        ["--vram", "4GB", "--set", "memory.budget=11GiB"],
        '[memory] budget = "11GiB", and a 4 GB card has 3.6',
    ),
    "an unreadable budget": (
        ["--vram", "4GB", "--set", "memory.budget=lots"],
        '[memory] budget = "lots" is no size: write',
    ),
    "a negative budget": (
        ["--vram", "4GB", "--set", "memory.budget=-1GiB"],
        '[memory] budget = "-1GiB" is no size: it must be more than zero.\n',
    ),
    "a budget without unit": (
        ["--vram", "4GB", "--set", "memory.budget=12"],
        'budget = 12 has no unit: write "12GiB" or "12MiB".\n',
    ),
    "a tile of nothing": (["--vram", "4GB", "--set", "memory.logits_tile=1KiB"], 'must be "1MiB" to "16GiB".'),
    "a tile of everything": (["--vram", "4GB", "--set", "memory.logits_tile=100GiB"], 'must be "1MiB" to "16GiB".'),
    "more layers than there are": (
        ["--vram", "4GB", "--set", "memory.checkpoint_every_n_layers=100"],
        "checkpoint_every_n_layers = 100, and",
    ),
    "no card's name": (["--gpu", ""], "The table has no card ''."),
    "an empty size": (["--vram", ""], "--vram: '' is no size"),
    "an old card": (["--gpu", "GTX 1080"], "It knows GTX 16, RTX 20 to 50, and some more."),
    "every card and one": (["--all", "--vram", "4GB"], "--all asks about every card"),
    "two tables": (["--all", "--max-length"], "two tables"),
    "a fit of a table": (["--all", "--fit", "x.toml"], "--fit writes the set-up for one card"),
    "a fit on a file": (["--vram", "4GB", "--fit", "mine.toml"], "mine.toml is there already"),
    "a fit that is no recipe": (["--vram", "4GB", "--fit", "x.json"], "a recipe, whose name ends in .toml"),
    "a key nobody knows": (["--vram", "4GB", "--set", "lora.rnk=3"], "Did you mean 'r'?"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_one_line_and_exit_code_2(home, no_card, wrong):
    words, told = WRONG[wrong]
    result = call("vram-check", "mine.toml", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert told in result.stderr


@pytest.mark.parametrize("words", [["--all"], ["--max-length"], ["--fit", "new.toml"], ["--set", "lora.r=3"]])
def test_what_asks_about_a_recipe_needs_one(home, words):
    result = call("vram-check", *words)
    assert result.exit_code == 2
    assert f"{words[0]} asks about a recipe, and none is given." in result.stderr


def test_a_recipe_that_is_not_there_names_its_neighbour(home):
    result = call("vram-check", "mime.toml", "--vram", "8GB")
    assert result.exit_code == 2
    assert "there is no such recipe. Did you mean mine.toml?" in result.stderr
    result = call("vram-check", "else.toml", "--vram", "8GB")  # like the others by its ending alone
    assert "there is no such recipe. Give the path of a .toml file." in result.stderr


def test_without_a_recipe_the_card_here_and_who_is_on_it(home, card_here):
    result = call("vram-check")
    assert result.exit_code == 0
    for text in ("NVIDIA GeForce RTX 3060: 10.00 GiB of 12.00 GiB free", "Xorg", "process 11", "700 MiB", "game.exe"):
        assert text in result.stdout
    assert "not told by the driver" in result.stdout
    assert json.loads(call("vram-check", "--json").stdout)["other_processes_bytes"] == 2 * GIB


def test_without_a_recipe_a_card_of_the_table(home):
    result = call("vram-check", "--gpu", "rtx3060 12gb")
    assert result.exit_code == 0
    assert "RTX 3060 12GB: 11.63 GiB for programs" in result.stdout


def test_on_the_card_here_a_run_may_take_what_is_free_and_the_others_are_named(home, card_here):
    report = ask()
    assert report["budget_bytes"] == 10 * GIB
    assert [holder["name"] for holder in report["processes"]] == ["Xorg", "game.exe"]
    shown = call("vram-check", "mine.toml").stdout
    assert "Taken: 2.00 GiB (Xorg 700 MiB, game.exe)" in shown


def test_a_run_that_took_more_than_predicted_widens_the_margin_visibly(home, card_here):
    usual = ask()["margin_bytes"]
    record_error(HERE.name, 1000 * MIB, 2000 * MIB)
    assert ask()["margin_bytes"] > usual
    assert (
        "150.0% instead of 3%: a run on this card took more than was predicted"
        in call("vram-check", "mine.toml").stdout
    )


def test_the_fitted_recipe_gives_the_same_plan_and_is_never_overwritten(home):
    result = call("vram-check", "mine.toml", "--vram", "8GB", "--fit")
    assert result.exit_code == 0, result.stderr
    assert "Written: mine-8gb.toml. Train it with: qlora-phi3 run mine-8gb.toml" in result.stderr
    assert load_recipe(home.path / "mine-8gb.toml").training.optim != "auto"
    first, second = ask("--vram", "8GB"), ask("--vram", "8GB", recipe="mine-8gb.toml")
    for key in KEYS - {"reasons", "versions"}:
        assert first[key] == second[key], key
    again = call("vram-check", "mine.toml", "--vram", "8GB", "--fit")
    assert again.exit_code == 2
    assert "mine-8gb.toml is there already" in again.stderr


def test_fit_before_the_recipe_is_understood(home):
    shutil.copy("mine.toml", "first.toml")
    result = call("vram-check", "--vram", "8GB", "--fit", "first.toml")
    assert result.exit_code == 0, result.stderr
    assert (home.path / "first-8gb.toml").is_file()


def test_nothing_is_written_where_nothing_fits(home):
    words = ("--vram", "8GB", "--set", "memory.budget=300MiB", "--fit", "none.toml")
    result = call("vram-check", "mine.toml", *words)
    assert result.exit_code == 3
    assert "none.toml is not written, as nothing fits." in result.stderr
    assert not (home.path / "none.toml").exists()


@pytest.fixture
def few_cards(monkeypatch):
    """Two sizes of cards instead of twelve."""
    chosen = [group for group in qlora_phi3.memory.tables.group_gpus() if group.nominal_gb in (10, 11)]
    monkeypatch.setattr(qlora_phi3.memory.tables, "group_gpus", lambda: chosen)


def test_a_table_of_all_cards_with_the_one_here_on_top(home, few_cards, card_here):
    shown = call("vram-check", "mine.toml", "--all")
    assert shown.exit_code == 0, shown.stderr
    lines = [line for line in shown.stdout.splitlines() if " fits " in line]
    assert [line.split("  ")[0].strip() for line in lines] == [HERE.name, "10 GB", "11 GB"]
    cards = ask("--all")["cards"]
    assert [card["verdict"] for card in cards] == ["fits"] * 3
    assert [card["series"] for card in cards] == [HERE.name, "RTX 30", "RTX 20"]


def test_a_table_of_the_longest_rows(home, few_cards):
    shown = call("vram-check", "mine.toml", "--max-length")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.count("512*") == 2
    assert "* all the positions the model has" in shown.stdout
    assert [card["max_length"] for card in ask("--max-length")["cards"]] == [512, 512]
    (one,) = ask("--max-length", "--vram", "4GB")["cards"]
    assert (one["name"], one["max_length"]) == ("a 4 GB card", 512)


def test_no_row_fits_a_budget_without_room(home):
    result = call("vram-check", "mine.toml", "--max-length", "--vram", "4GB", "--set", "memory.budget=200MiB")
    assert result.exit_code == 3
    assert "none" in result.stdout
