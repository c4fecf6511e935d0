"""`qlora-phi3 vram-check` as a person calls it, on a tiny model."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from fake_nvml import two_gpus
from workshop import Workshop, call, write_chats

import qlora_phi3.hardware.gpu
import qlora_phi3.memory.tables
from qlora_phi3.errors import NoDeviceError, NoDriverError
from qlora_phi3.hardware.gpu import Gpu, GpuProcess
from qlora_phi3.memory.margin import record_error
from qlora_phi3.memory.vram_check import VramChecker
from qlora_phi3.recipe.load import load_recipe
from qlora_phi3.units import GIB, MIB

KEYS = {
    "verdict", "memory", "budget_bytes", "margin_bytes",
    "micro_batch_size", "gradient_accumulation_steps", "micro_batch_tokens", "max_length", "checkpoint_every_n_layers",
    "keep_attention", "activation_offloading", "optim", "logits_tile_bytes", "mlp_tile_tokens", "processes",
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
    multiprocessors=28,
    bandwidth_bytes_per_second=3.6e11,
    tflops_16bit=25.5,
    is_local=True,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory, base):
    """A directory, its recipe, and the program's own directories, for all tests here: what was computed once is saved."""
    path = tmp_path_factory.mktemp("vram")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "LOCALAPPDATA"):
            patch.setenv(variable, str(path / "own"))
        patch.chdir(path)
        shop = Workshop(path, base)
        shop.write(quantization={"bnb_4bit_compute_dtype": "bfloat16"})
        yield shop


@pytest.fixture
def gpu_here(monkeypatch):
    """A GPU in this computer."""
    monkeypatch.setattr(qlora_phi3.hardware.gpu, "read_gpu", lambda: HERE)


def check(*words, recipe="mine.toml"):
    """`vram-check` of a recipe that is written once; the report as JSON."""
    result = call("vram-check", recipe, "--json", *words)
    assert result.exit_code in (0, 3), result.stderr
    return json.loads(result.stdout)


def test_a_recipe_that_fits_shows_its_plan_and_its_categories(home):
    result = call("vram-check", "mine.toml", "--vram", "8GB")
    assert result.exit_code == 0, result.stderr
    for text in ("8 GB", "It fits", "activations", "CUDA context", "micro_batch_tokens", "not measured"):
        assert text in result.stdout
    assert "█" in result.stdout
    assert result.stderr == ""


def test_a_program_gets_every_figure(home):
    report = check("--vram", "8GB")
    assert report.keys() >= KEYS
    assert report["verdict"] == "fits"
    memory = report["memory"]
    assert sum(memory["by_category"].values()) == memory["allocated_bytes"] == max(memory["by_phase"].values())
    assert "trace" not in memory
    assert report["budget_bytes"] == report["device"]["free_bytes"]
    assert (report["rows"]["assumed"], report["rows"]["count"]) == (False, 40)
    assert report["rows"]["longest"] < 128
    # 10 steps of 4 rows, and six evaluations of the 8 rows held out, which cost less than a step each
    assert (report["epochs"], report["total_steps"]) == (1.0, 10)
    assert 10 * report["seconds_per_step"] < report["run_seconds"] < 16 * report["seconds_per_step"]
    assert report["seconds_per_1000_rows"] == pytest.approx(250 * report["seconds_per_step"])


def test_the_time_of_the_run_is_told_and_that_of_1000_rows_where_the_rows_cannot_be_counted(home):
    words = ("vram-check", "mine.toml", "--vram", "8GB", "--set", "training.num_train_epochs=3")
    assert re.search(r"3 epochs of 40 rows \(30 steps\) in about \S+ s", call(*words).stdout)
    shown = call(*words, "--set", "data.train=missing.jsonl").stdout
    assert re.search(r"1,000 rows of 128 tokens take about \S+ ", shown)


def test_each_gpu_of_several_processes_needs_the_memory_of_its_share_of_the_rows(home):
    """All is exchanged through the computer's memory: a GPU holds nothing that a run of these rows alone would not."""
    several = json.loads(call("vram-check", "mine.toml", "--vram", "8GB", "--processes", "4", "--json").stdout)
    alone = json.loads(call("vram-check", "mine.toml", "--vram", "8GB", "--set", "training.batch_size=1", "--json").stdout)
    assert (several["batch_size"], several["rows_per_gpu"]) == (4, 1)
    assert (several["memory"], several["seconds_per_step"]) == (alone["memory"], alone["seconds_per_step"])
    shown = call("vram-check", "mine.toml", "--vram", "8GB", "--processes", "3").stdout
    assert "4 rows an optimizer step (2 of them at most on each GPU)" in shown
    assert call("vram-check", "mine.toml", "--vram", "8GB", "--processes", "5").exit_code == 2


def test_a_saved_report_is_shown_without_torch_or_pydantic(home):
    code = (
        "import sys\nfrom qlora_phi3.cli.main import main\n"
        "main(['vram-check', 'mine.toml', '--vram', '8GB', '--json'], standalone_mode=False)\n"
        "heavy = ['torch', 'transformers', 'datasets', 'huggingface_hub', 'pydantic', 'numpy', 'rich']\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )

    def show():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    saved = show().stdout  # in a process of its own, as earlier tests of this process may have left something behind
    shown = show()
    assert (shown.stdout, shown.stderr.splitlines()[-1]) == (saved, "[]")


def test_the_report_is_computed_again_where_the_data_changed(home):
    shutil.copy("chats.jsonl", "own-chats.jsonl")
    home.write(name="own.toml", data={"train": "own-chats.jsonl"})
    assert check("--vram", "8GB", recipe="own.toml")["rows"]["count"] == 40
    write_chats(home.path / "own-chats.jsonl", rows=20)
    assert check("--vram", "8GB", recipe="own.toml")["rows"]["count"] == 12


def test_the_report_is_computed_again_where_the_cache_is_damaged(home):
    before = check("--vram", "8GB")
    for path in (home.path / "own").rglob("vram-check/*.json"):
        path.write_text('{"result": {}, "files": {}}', encoding="utf-8")
    after = check("--vram", "8GB")
    assert {**after, "created": ""} == {**before, "created": ""}


def test_a_recipe_that_does_not_fit_is_exit_code_3_with_what_would_help(home):
    result = call("vram-check", "mine.toml", "--vram", "8GB", "--set", "memory.budget=300MiB")
    assert result.exit_code == 3, result.stderr
    for text in (
        "300 MiB",
        "▲",
        "the budget ends here",
        "─ 7.18 GiB",
        "It does not fit the budget",
        '1. Write [memory] budget = "auto"',
    ):
        assert text in result.stdout
    assert "the GPU ends here" not in result.stdout


def test_a_budget_that_suffices_is_in_the_verdict_and_the_bar(home):
    result = call("vram-check", "mine.toml", "--vram", "8GB", "--set", "memory.budget=2GiB")
    assert result.exit_code == 0, result.stderr
    assert "It fits the budget" in result.stdout
    bar = next(line for line in result.stdout.splitlines() if "█" in line)
    assert bar.startswith("─" * 70)


def test_a_size_represents_all_gpus_of_it_with_the_speed_of_the_slowest_and_the_fastest(home):
    # the small model's kernels are so short that each of these GPUs waits for the host: they differ with a real one
    full_size = ("--vram", "12GB", "--set", "model.name=microsoft/Phi-3-mini-4k-instruct")
    shown = call("vram-check", "mine.toml", *full_size).stdout
    size, represented = shown.splitlines()[:2]
    assert "about 11.45 GiB" in size
    for text in ("RTX 30, 40, 50 with 12 GB", "--gpu", "RTX 20"):
        assert text in represented
    assert "on the slowest of these GPUs" in shown
    report, one = check(*full_size), check("--gpu", "RTX 3060 12GB")
    assert report["device"]["estimated"]
    assert "RTX 3060 12GB" in report["device"]["represents"]
    assert report["slowest_tokens_per_second"] < report["tokens_per_second"] < report["fastest_tokens_per_second"]
    assert one["slowest_tokens_per_second"] == one["tokens_per_second"]
    shown = call("vram-check", "mine.toml", "--vram", "14GB").stdout
    assert "RTX 30, 40, 50 with 12 and 16 GB" in shown.splitlines()[1]
    shown = call("vram-check", "mine.toml", "--vram", "20GB").stdout
    assert "The smallest RTX A4500, RTX 4000 Ada with 20 GB" in shown.splitlines()[1]


def test_the_plan_is_shown_as_lines_of_a_recipe(home):
    report = check("--vram", "8GB")
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


def test_piped_lines_end_without_blanks_and_follow_the_variable_columns(home, monkeypatch):
    wide = call("vram-check", "mine.toml", "--vram", "8GB").stdout
    monkeypatch.setenv("COLUMNS", "70")
    narrow = call("vram-check", "mine.toml", "--vram", "8GB").stdout
    assert not [line for line in (wide + narrow).splitlines() if line != line.rstrip()]
    bars = [next(len(line) for line in text.splitlines() if "░" in line) for text in (wide, narrow)]
    assert bars == [100, 70]


DATA_PROBLEMS = {
    "missing": ({"train": "nowhere.jsonl"}, "'nowhere.jsonl'"),
    "missing to evaluate on": ({"eval": "nowhere.jsonl"}, "'nowhere.jsonl'"),
    "unusable": ({"train": "odd.jsonl"}, "(nose)"),
    "empty": ({"train": "empty.jsonl"}, "empty.jsonl"),
    "an empty list": ({"train": "list.json"}, "list.json"),
    "a header alone": ({"train": "header.csv"}, "header.csv"),
}


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("problem", DATA_PROBLEMS)
def test_data_that_no_run_can_use_are_noted_whether_the_tokenizer_is_here_or_not(home, problem, counted):
    (home.path / "odd.jsonl").write_text('{"nose": "long"}', encoding="utf-8")
    for name, text in (("empty.jsonl", ""), ("list.json", "[]"), ("header.csv", "instruction,output\n")):
        (home.path / name).write_text(text, encoding="utf-8")
    if not (home.path / "mute").is_dir():
        (home.copy_base("mute") / "tokenizer.json").unlink()
    keys, value = DATA_PROBLEMS[problem]
    home.write(name="data.toml", data=keys, model={"name": str(home.base) if counted else "mute"})
    result = call("vram-check", "data.toml", "--vram", "8GB")
    assert result.exit_code == 0, result.stderr
    assert "max_length = 128 tokens each" in result.stdout
    (note,) = [line for line in result.stdout.splitlines() if line.startswith("Note: ")]
    assert value in note
    report = check("--vram", "8GB", recipe="data.toml")
    assert report["rows"]["assumed"]
    assert value in report["rows"]["problem"]


@pytest.fixture
def no_gpu(monkeypatch):
    """A computer without a GPU."""

    def nothing_here():
        raise NoDeviceError("No NVIDIA driver answers on this machine.", qlora_phi3.hardware.gpu.OTHER_GPU_HINT)

    monkeypatch.setattr(qlora_phi3.hardware.gpu, "read_gpu", nothing_here)


@pytest.mark.parametrize("words", [["mine.toml"], []])
def test_without_a_gpu_here_the_exit_code_is_4(home, no_gpu, words):
    result = call("vram-check", *words)
    assert (result.exit_code, result.stdout) == (4, "")
    assert "--gpu" in result.stderr
    assert result.stderr.count("\n") == 1
    result = call("vram-check", *words, "--json")
    assert result.exit_code == 4
    report = json.loads(result.stdout)
    assert report["verdict"] == "cannot_tell"
    assert report["reason"]


@pytest.fixture
def cpu_only(monkeypatch):
    """A computer without an NVIDIA driver; the free memory of its 16 GiB can be set."""

    def no_driver():
        raise NoDriverError("No NVIDIA driver answers on this machine.", qlora_phi3.hardware.gpu.OTHER_GPU_HINT)

    def set_free(free_bytes):
        cpu = replace(qlora_phi3.hardware.gpu.read_cpu(), name="a CPU, 2 cores", total_bytes=16 * GIB, free_bytes=free_bytes)
        monkeypatch.setattr(qlora_phi3.hardware.gpu, "read_cpu", lambda: cpu)

    monkeypatch.setattr(qlora_phi3.hardware.gpu, "choose_gpu", lambda *_: None)
    monkeypatch.setattr(qlora_phi3.hardware.gpu, "read_gpu", no_driver)
    set_free(12 * GIB)
    return set_free


def test_without_a_driver_the_recipe_is_checked_for_the_processor_which_a_run_would_use(home, cpu_only, monkeypatch):
    result = call("vram-check", "mine.toml")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("No NVIDIA GPU here: ")
    assert all(option in lines[0] for option in ("--gpu", "--vram", "--all"))
    assert lines[1] == "a CPU, 2 cores: 12.00 GiB of 16.00 GiB free"
    for text in (
        "Used by other processes: 4.00 GiB",
        "A run may use half of it: 6.00 GiB\n",
        "It fits the budget",
        'optim = "adamw_torch"',
        "Tensors: ",
    ):
        assert text in result.stdout
    assert "on the GPU" not in result.stdout
    monkeypatch.setattr(VramChecker, "report", None)  # from here on it is saved
    report = check()
    assert report["device"]["is_cpu"]
    assert (report["verdict"], report["budget_bytes"]) == ("fits", 6 * GIB)
    assert report["memory"]["allocated_bytes"] == report["memory"]["on_gpu_bytes"] == max(report["memory"]["by_phase"].values())
    assert report["run_seconds"] > 0
    assert report["tokens_per_second"] == report["slowest_tokens_per_second"] == report["fastest_tokens_per_second"]
    assert {**check(), "created": ""} == {**report, "created": ""}


def test_the_processes_of_a_run_on_a_cpu_share_half_of_what_is_free(home, cpu_only):
    assert check("--processes", "4")["budget_bytes"] == 6 * GIB // 4


def test_a_recipe_that_does_not_fit_a_computers_memory_is_exit_code_3_with_what_would_help(home, cpu_only):
    cpu_only(256 * MIB)
    result = call("vram-check", "mine.toml", "--fit", "small.toml")
    assert result.exit_code == 3, result.stderr
    assert "It does not fit the budget" in result.stdout
    assert "Close other programs. Allows 7.88 GiB more; then it fits." in result.stdout  # half of what they hold
    assert not (home.path / "small.toml").exists()


def test_the_plan_for_a_cpu_is_written_as_a_recipe_that_makes_it_again(home, cpu_only):
    result = call("vram-check", "mine.toml", "--fit", "--json")
    assert result.exit_code == 0, result.stderr
    planned = json.loads(result.stdout)
    again = check(recipe="mine-cpu.toml")
    for key in ("micro_batch_tokens", "checkpoint_every_n_layers", "optim", "logits_tile_bytes", "memory"):
        assert again[key] == planned[key]


def test_without_a_recipe_a_driver_is_still_asked_for(home, cpu_only):
    result = call("vram-check")
    assert (result.exit_code, result.stdout) == (4, "")
    assert "No NVIDIA driver" in result.stderr


@pytest.mark.parametrize("name", ["nofolder", "./nofolder"])
def test_a_model_folder_that_is_not_there_is_bad_input(home, name):
    result = call("vram-check", "mine.toml", "--vram", "8GB", "--set", f"model.name={name}")
    assert result.exit_code == 2
    assert name in result.stderr


@pytest.mark.parametrize("name", ["microsoft/Phi-3.5-MoE-instruct", "microsoft/phi-2", "microsoft/Phi-4-multimodal-instruct"])
def test_a_model_of_another_architecture_is_refused_by_its_name(home, name):
    result = call("vram-check", "mine.toml", "--vram", "8GB", "--set", f"model.name={name}")
    assert result.exit_code == 2
    assert name in result.stderr
    assert "phi3" in result.stderr


@pytest.mark.parametrize("words", [["--gpu", "RTX 4O60"], ["--vram", "8GB", "--set", "lora.r=x"]])
def test_bad_input_is_json_for_a_program_that_asks_for_json(home, words):
    result = call("vram-check", "mine.toml", *words, "--json")
    assert result.exit_code == 2
    report = json.loads(result.stdout)
    assert report["verdict"] == "error"
    assert report["reason"] in result.stderr


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
    assert "someone/some-phi3" in result.stderr


def test_the_shapes_of_a_model_of_the_hub_are_known_offline(home):
    changes = ("--set", "model.name=microsoft/Phi-3-mini-4k-instruct", "--set", "training.max_length=5000")
    result = call("vram-check", "mine.toml", "--vram", "8GB", *changes)
    assert result.exit_code == 2
    assert "4096" in result.stderr


WRONG = {
    "an unknown GPU": (["--gpu", "RTX 4071"], "'RTX 4071'"),
    "a GPU of two sizes": (["--gpu", "RTX 4060 Ti"], "8 GB and 16 GB"),
    "a size without unit": (["--vram", "12.5"], "'12.5'"),
    "a negative size": (["--vram", "-3GB"], "'-3GB'"),
    "no size": (["--vram", "big"], "'big'"),
    "a size that no GPU has": (["--vram", "100KB"], "--vram"),
    "two GPUs": (["--vram", "8GB", "--gpu", "RTX 3060"], "'RTX 3060'"),
    "a budget over the GPU": (["--vram", "4GB", "--set", "memory.budget=11GiB"], '"11GiB"'),
    "an unreadable budget": (["--vram", "4GB", "--set", "memory.budget=lots"], "lots"),
    "a negative budget": (["--vram", "4GB", "--set", "memory.budget=-1GiB"], "-1GiB"),
    "a budget without unit": (["--vram", "4GB", "--set", "memory.budget=12"], "12GiB"),
    "a tile of nothing": (["--vram", "4GB", "--set", "memory.logits_tile=1KiB"], "1MiB"),
    "a tile of everything": (["--vram", "4GB", "--set", "memory.logits_tile=100GiB"], "16GiB"),
    "more layers than there are": (["--vram", "4GB", "--set", "memory.checkpoint_every_n_layers=100"], "100"),
    "no name": (["--gpu", ""], "''"),
    "an empty size": (["--vram", ""], "--vram"),
    "an old GPU": (["--gpu", "GTX 1080"], "GTX 1080"),
    "every GPU and one": (["--all", "--vram", "4GB"], "--all"),
    "two tables": (["--all", "--max-length"], "--max-length"),
    "a fit of a table": (["--all", "--fit", "x.toml"], "--fit"),
    "a fit on a file": (["--vram", "4GB", "--fit", "mine.toml"], "mine.toml"),
    "a fit in no directory": (["--vram", "4GB", "--fit", "nowhere/x.toml"], "nowhere"),
    "a fit that is no recipe": (["--vram", "4GB", "--fit", "x.json"], "x.json"),
    "an unknown key": (["--vram", "4GB", "--set", "lora.rnk=3"], "rnk"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_one_line_with_the_value_and_exit_code_2(home, no_gpu, wrong):
    words, value = WRONG[wrong]
    result = call("vram-check", "mine.toml", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert value in result.stderr


def test_a_number_behind_a_flag_is_answered_with_the_flags(home):
    assert "--max-length of vram-check takes no value" in call("vram-check", "--max-length", "100000").stderr
    result = call("vram-check", "mine.toml", "--max-length", "1024")
    assert (result.exit_code, "(1024). No value is taken by --max-length" in result.stderr) == (2, True)
    extra = call("docs", "data", "extra").stderr
    assert extra.endswith("(extra). `main docs --help` explains it.\n")  # no flag was given, and none is named


@pytest.mark.parametrize("words", [["--all"], ["--max-length"], ["--fit", "new.toml"], ["--set", "lora.r=3"]])
def test_an_option_about_a_recipe_needs_one(home, words):
    result = call("vram-check", *words)
    assert result.exit_code == 2
    assert words[0] in result.stderr


def test_a_recipe_that_does_not_exist_is_refused_with_the_nearest_name(home):
    result = call("vram-check", "mime.toml", "--vram", "8GB")
    assert result.exit_code == 2
    assert "mine.toml" in result.stderr


def test_without_a_recipe_the_gpu_here_and_its_processes_are_shown(home, gpu_here):
    result = call("vram-check")
    assert result.exit_code == 0
    for text in ("NVIDIA GeForce RTX 3060: 10.00 GiB of 12.00 GiB free", "Xorg", "process 11", "700 MiB", "game.exe"):
        assert text in result.stdout
    assert json.loads(call("vram-check", "--json").stdout)["other_processes_bytes"] == 2 * GIB


def test_without_a_recipe_a_gpu_of_the_table_is_shown(home):
    result = call("vram-check", "--gpu", "rtx3060 12gb")
    assert result.exit_code == 0
    assert "RTX 3060 12GB: 11.63 GiB" in result.stdout


def test_on_the_gpu_here_a_run_may_take_what_is_free_and_other_processes_are_named(home, gpu_here):
    report = check()
    assert report["budget_bytes"] == 10 * GIB
    assert [process["name"] for process in report["processes"]] == ["Xorg", "game.exe"]
    shown = call("vram-check", "mine.toml").stdout
    assert "2.00 GiB (Xorg 700 MiB, game.exe)" in shown


def test_the_gpu_that_the_recipe_names_is_checked_as_a_run_uses_it(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", two_gpus())
    assert check()["device"]["name"] == "NVIDIA GeForce RTX 4070"  # the one with the most free memory
    assert check("--set", "memory.gpu=1")["device"]["name"] == "NVIDIA GeForce RTX 4070 Ti SUPER"
    home.write(name="second.toml", memory={"gpu": "4070 Ti SUPER"})
    assert check(recipe="second.toml")["device"]["name"] == "NVIDIA GeForce RTX 4070 Ti SUPER"
    result = call("vram-check", "mine.toml", "--set", "memory.gpu=RTX 3060")
    assert result.exit_code == 2
    assert "'RTX 3060'" in result.stderr


def test_a_run_that_took_more_than_predicted_widens_the_margin_visibly(home, gpu_here):
    before = check()["margin_bytes"]
    record_error(HERE.name, 1000 * MIB, 2000 * MIB)
    assert check()["margin_bytes"] > before
    assert "150.0 % instead of 3 %" in call("vram-check", "mine.toml").stdout


def test_the_fitted_recipe_gives_the_same_plan_and_is_never_overwritten(home):
    result = call("vram-check", "mine.toml", "--vram", "8GB", "--fit")
    assert result.exit_code == 0, result.stderr
    assert "qlora-phi3 run mine-8gb.toml" in result.stderr
    assert load_recipe(home.path / "mine-8gb.toml").training.optim != "auto"
    first, second = check("--vram", "8GB"), check("--vram", "8GB", recipe="mine-8gb.toml")
    for key in KEYS - {"reasons", "versions"}:
        assert first[key] == second[key], key
    again = call("vram-check", "mine.toml", "--vram", "8GB", "--fit")
    assert again.exit_code == 2
    assert "mine-8gb.toml" in again.stderr


def test_fit_before_the_recipe_is_understood(home):
    shutil.copy("mine.toml", "first.toml")
    result = call("vram-check", "--vram", "8GB", "--fit", "first.toml")
    assert result.exit_code == 0, result.stderr
    assert (home.path / "first-8gb.toml").is_file()


def test_nothing_is_written_where_nothing_fits(home):
    words = ("--vram", "8GB", "--set", "memory.budget=300MiB", "--fit", "none.toml")
    result = call("vram-check", "mine.toml", *words)
    assert result.exit_code == 3
    assert "none.toml" in result.stderr
    assert not (home.path / "none.toml").exists()


@pytest.fixture
def few_gpus(monkeypatch):
    """Two sizes of GPUs instead of twelve."""
    chosen = [gpu for gpu in qlora_phi3.memory.tables.group_gpus() if gpu.name.startswith(("10 GB", "11 GB"))]
    monkeypatch.setattr(qlora_phi3.memory.tables, "group_gpus", lambda: chosen)


def test_a_table_of_all_gpus_has_the_one_here_on_top(home, few_gpus, gpu_here):
    shown = call("vram-check", "mine.toml", "--all")
    assert shown.exit_code == 0, shown.stderr
    lines = [line for line in shown.stdout.splitlines() if " yes " in line]
    assert [line.split("  ")[0].strip() for line in lines] == [HERE.name, "10 GB", "11 GB"]
    gpus = check("--all")["gpus"]
    assert [gpu["verdict"] for gpu in gpus] == ["fits"] * 3
    assert [gpu["series"] for gpu in gpus] == [HERE.name, "RTX 30", "RTX 20"]


def test_a_table_of_the_longest_rows(home, few_gpus):
    shown = call("vram-check", "mine.toml", "--max-length")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.count("512*") == 2
    assert [gpu["max_length"] for gpu in check("--max-length")["gpus"]] == [512, 512]
    (one,) = check("--max-length", "--vram", "4GB")["gpus"]
    assert one["max_length"] == 512


def test_no_row_fits_a_budget_that_is_too_small(home):
    result = call("vram-check", "mine.toml", "--max-length", "--vram", "4GB", "--set", "memory.budget=200MiB")
    assert result.exit_code == 3
    assert "none" in result.stdout


def test_data_in_place_of_a_recipe_is_said_before_the_missing_driver(shop, monkeypatch):
    write_chats(shop.path / "my-chats.jsonl")
    for words in ([], ["--vram", "8GB"]):
        assert call("vram-check", "my-chats.jsonl", *words).stderr.startswith("Error: my-chats.jsonl is data, not a recipe.")
