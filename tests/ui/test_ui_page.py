"""report.html: every section, hostile text, sizes, and what it says of runs that failed or whose files are damaged."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
from run_files import data_report, divergence_record, evaluation_record, memory_record, sample, step_record, write_run

from qlora_phi3.errors import RunError
from qlora_phi3.memory.report import MemoryReport
from qlora_phi3.ui import page
from qlora_phi3.ui.page import MOST_POINTS, draw_comparison, thin, write_page
from qlora_phi3.ui.runs import read_run, verdict, warnings

SECTIONS = ["verdict", "curves", "answers", "memory", "speed", "data", "events", "recipe", "versions"]
HOSTILE = "<script>alert(1)</script>\x1b[31mred\u202egnp.exe \u05e9\u05dc\u05d5\u05dd </pre>{{ 7 * 7 }}"


class Page(HTMLParser):
    """The ids of the sections, the tags, and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.sections, self.tags, self.words = [], set(), []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "section":
            self.sections.append(dict(attrs)["id"])

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def with_charts(pages_have_no_charts, monkeypatch):
    monkeypatch.setattr(page, "draw_charts", pages_have_no_charts)


@pytest.fixture
def full(tmp_path):
    return write_full(tmp_path / "mine" / "1")


@pytest.fixture(scope="module")
def shown(tmp_path_factory, pages_have_no_charts):
    """The page of a run with everything in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "draw_charts", pages_have_no_charts)
        return Page(write_page(write_full(tmp_path_factory.mktemp("run") / "mine" / "1")))


def write_full(path):
    records = [evaluation_record(0, 4.0), *(step_record(n, 4 - n / 10) for n in range(1, 11)), evaluation_record(10, 2.5)]
    samples = [sample() for _ in range(8)]
    return write_run(path, records=[*records, memory_record(), divergence_record()], samples=samples)


def test_the_page_has_every_section_and_no_script_or_network(shown):
    assert shown.sections == SECTIONS
    assert not shown.tags & {"script", "img", "iframe", "object"}
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:|//)|url\(\s*[\"']?http|@import", shown.source)
    assert shown.source.count("<svg") == 4
    assert "prefers-color-scheme: dark" in shown.source


@pytest.mark.parametrize(
    "words",
    [
        "The held-out loss fell from 4.0000 to 2.5000. 8 of 8 sample answers ended by themselves.",
        "4-bit weights 1.00 GiB 1.00 GiB",
        "activations 512 MiB",
        "forward (peak) 2.00 GiB",
        "1,000 tokens in 0:05 of steps; the median step has 200 tokens/s",
        "2 rows skipped: no answer (chats.jsonl:3, chats.jsonl:8)",
        "5 of 48 rows cut at max_length = 128",
        "Learned tokens 400 (40 %)",
        "chats.jsonl:7 chats.jsonl:9",
        "memory ran out in 4 rows",
        "What is blue?",
        "cut at the limit",
        "ended by itself",
        '[model] name = "phi"',
        "torch 2.13.0",
        "d" * 64,
        "e" * 64,
        "f" * 64,
        "NVIDIA Test, computing in bfloat16",
    ],
)
def test_the_page_says(shown, words):
    assert words in shown.text


def test_the_charts_follow_the_colors_of_the_page_and_their_ids_differ(shown):
    charts = re.findall(r"<svg.*?</svg>", shown.source, flags=re.DOTALL)
    for chart in charts:
        assert "currentColor" in chart
        assert not re.search(r"stroke: (black|#000000)", chart)
    paths = [set(re.findall(r'<clipPath id="(\w+)"', chart)) for chart in charts]
    assert len(set.union(*paths)) == sum(map(len, paths))


def test_text_of_data_files_stays_text(tmp_path):
    rows = [sample(prompt=HOSTILE, row=HOSTILE, tuned={"text": HOSTILE, "tokens": 3, "ended": True})]
    folder = write_run(
        tmp_path / "mine" / "1", samples=rows, device=HOSTILE, error=HOSTILE, versions={HOSTILE: HOSTILE},
        records=[step_record(1), divergence_record((HOSTILE,))], data=asdict(data_report(sources=(HOSTILE,))),
    )  # fmt: skip
    folder.recipe.write_text(HOSTILE, encoding="utf-8")
    shown = Page(write_page(folder))
    assert "script" not in shown.tags
    assert not set("\x1b\u202e") & set(shown.source)
    assert "49" not in shown.text.split()
    assert shown.text.count("<script>alert(1)</script>\\x1b[31mred\\u202egnp.exe \u05e9\u05dc\u05d5\u05dd </pre>{{ 7 * 7 }}") >= 8


def test_a_long_run_makes_no_long_page(tmp_path, with_charts):
    records = [step_record(n, 3 + n % 7 / 10, grad_norm=n % 5 + 0.1) for n in range(1, 5001)]
    answer = {"text": "word " * 128, "tokens": 128, "ended": False}
    folder = write_run(tmp_path / "1", records=records, samples=[sample(base=answer, tuned=answer)] * 8)
    assert write_page(folder).stat().st_size < 200_000


def test_thinning_takes_the_mean_of_equal_groups_and_keeps_the_last_step():
    steps, values = thin(range(1, 2 * MOST_POINTS + 1), [1.0, 3.0] * MOST_POINTS)
    assert len(steps) == MOST_POINTS
    assert steps[-1] == 2 * MOST_POINTS
    assert set(values) == {2.0}
    assert thin([1, 2], [5.0, 6.0]) == ([1, 2], [5.0, 6.0])
    assert thin([], []) == ([], [])


def test_without_matplotlib_the_page_has_a_table_and_says_what_to_install(full, monkeypatch, pages_have_no_charts):
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    monkeypatch.setattr(page, "draw_charts", pages_have_no_charts)
    shown = Page(write_page(full))
    assert "svg" not in shown.tags
    assert "pip install 'qlora-phi3[report]'" in shown.text
    assert "3 3.7000 0.000333 1.5 200" in shown.text
    with pytest.raises(RunError, match="matplotlib"):
        draw_comparison(read_run(full), read_run(full))


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_a_run_that_did_not_end_has_a_page_as_far_as_it_came(tmp_path, status):
    folder = write_run(tmp_path / "1", records=[step_record(1)])
    report = {"status": status, "error": "memory ran out", "started": "2026-11-29T07:00:00+00:00"}
    folder.report.write_text(json.dumps(report), encoding="utf-8")
    shown = Page(write_page(folder))
    assert shown.sections == SECTIONS
    assert f"This run is not done: {status.replace('running', 'killed')} after step 1." in shown.text
    assert "memory ran out" in shown.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"kind": "train", "step": 1, "loss": "x"}\n[]\n\x00'),
        ("samples.json", '{"samples": 3}'),
        ("samples.json", "["),
        ("recipe.toml", "\x00"),
    ],
)
def test_a_damaged_file_leaves_the_rest_of_the_page(full, name, text):
    (full.path / name).write_text(text, encoding="utf-8")
    assert Page(write_page(full)).sections == SECTIONS


def test_a_damaged_report_is_an_error_of_one_line(full):
    full.report.write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=r"report\.json"):
        write_page(full)
    full.report.write_text('{"recipe": {"model": 3}, "versions": {"a": [1]}, "files": {"x": null}}', encoding="utf-8")
    assert Page(write_page(full)).sections == SECTIONS


def test_the_verdict_names_a_held_out_loss_that_rose_and_one_that_rose_again(tmp_path):
    rose = read_run(write_run(tmp_path / "a", records=[evaluation_record(0, 2.0), step_record(1), evaluation_record(1, 2.5)]))
    again = [evaluation_record(0, 3.0), step_record(1), evaluation_record(1, 2.0), step_record(2), evaluation_record(2, 2.5)]
    again = read_run(write_run(tmp_path / "b", records=again))
    assert verdict(rose) == "The held-out loss rose from 2.0000 to 2.5000."
    assert "higher than before training" in warnings(rose)[0]
    assert "lowest after step 1 (2.0000)" in warnings(again)[0]


def test_answers_that_run_on_an_adapter_that_learned_nothing_and_repeated_rows_are_pointed_out(tmp_path):
    runaway = [sample(tuned={"text": "on and on", "tokens": 128, "ended": False})] * 4
    changes = {"unlearned": "The adapter learned nothing.", "data": asdict(data_report(repeated=3))}
    lines = warnings(read_run(write_run(tmp_path / "a", samples=runaway, **changes)))
    assert lines[0] == "The adapter learned nothing."
    assert lines[1].startswith("4 of 4 sample answers did not end")
    assert "3 of 8 held-out rows are training rows too" in lines[2]
    assert warnings(read_run(write_run(tmp_path / "b", samples=runaway[:3]))) == []


def test_empty_answers_are_not_counted_as_answers_that_ended_by_themselves(tmp_path):
    run = read_run(write_run(tmp_path / "a", samples=[sample(), *[sample(tuned={"text": "", "tokens": 1, "ended": True})] * 2]))
    assert verdict(run) == "The held-out loss fell from 4.0000 to 2.5000. 2 of 3 sample answers are empty."
    assert warnings(run) == ["2 of 3 sample answers are empty: the model ends its turn at once."]


def test_a_prediction_without_phases_is_not_called_none(tmp_path, with_charts):
    by_category = {"4-bit weights": 2**30}
    sizes = [
        MemoryReport(allocated_bytes=0, by_category=by_category, by_phase={}, resident_bytes=2**30, process_bytes=size)
        for size in (2**30, 3 * 2**29)
    ]
    memory = {name: report.as_dict() for name, report in zip(("predicted", "measured"), sizes, strict=True)}
    text = Page(write_page(write_run(tmp_path / "a", memory=memory))).text
    assert "Process on a CPU, libraries included 1.00 GiB 1.50 GiB" in text
    assert "Nothing was predicted" not in text
    assert "Nothing was predicted" in Page(write_page(write_run(tmp_path / "b", memory={"measured": memory["measured"]}))).text


def test_an_answer_without_text_is_called_as_in_chat(tmp_path):
    rows = [sample(base={"text": "", "tokens": 1, "ended": True})]
    shown = write_page(write_run(tmp_path / "mine" / "1", samples=rows, records=[step_record(1)])).read_text(encoding="utf-8")
    assert "<small>1 token, ended by itself</small>" in shown
    assert '<pre dir="auto">(empty)</pre>' in shown
