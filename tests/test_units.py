"""Sizes and counts as people write and read them."""

import re
from pathlib import Path

import pytest

import qlora_phi3
from qlora_phi3.units import (
    describe_duration,
    describe_epochs,
    format_count,
    format_duration,
    format_gib,
    format_percent,
    parse_size,
    round_to_100,
)

PACKAGE = Path(qlora_phi3.__file__).parent


def test_rounded_shares_add_up_to_100():
    assert round_to_100([75.7, 8.65, 7.55, 7.0, 1.1]) == [76, 9, 7, 7, 1]  # each rounded alone: 76 + 9 + 8 + 7 + 1 = 101
    assert round_to_100([1, 1, 1]) == [34, 33, 33]
    assert round_to_100([2.0]) == [100]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("11GiB", 11 * 2**30),
        ("12 GB", 12 * 10**9),
        ("500MiB", 524_288_000),
        ("11.5g", 11_500_000_000),
        (" 1.5 gib ", 1_610_612_736),
        ("0.5KiB", 512),
        (".5kb", 500),
        ("2TB", 2 * 10**12),
        ("7B", 7),
    ],
)
def test_a_size_is_read_with_its_unit(text, size):
    assert parse_size(text) == size


def test_a_size_is_never_rounded_up():
    assert parse_size("1.9B") == 1


def test_on_the_box_of_a_gpu_a_gb_is_a_gib():
    assert parse_size("12GB", binary=True) == parse_size("12g", binary=True) == parse_size("12GiB") == 12 * 2**30
    assert parse_size("8192MB", binary=True) == 8 * 2**30


@pytest.mark.parametrize("text", ["12", "11.5", "-3"])
def test_a_number_without_a_unit_is_refused_with_the_two_ways_to_write_it(text):
    amount = text.lstrip("-")
    with pytest.raises(ValueError, match=f"'{text}' has no unit: write {amount}GiB, {amount}GB or {amount}MiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "GiB", "big", "12 apples", "1,5GiB", "1e3GiB", "12GiBs", "nanGB", "٣GB", "9" * 400 + "GB"])
def test_a_text_that_is_not_a_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size: write a number and its unit"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0GiB", "-4GB", "0.2B"])
def test_a_size_is_more_than_zero(text):
    with pytest.raises(ValueError, match=f"'{text}' is not a size: it must be more than zero"):
        parse_size(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (3_886_945_403, "3.62 GiB"),
        (412 * 2**20, "412 MiB"),
        (2**30, "1.00 GiB"),
        (2**30 - 1, "1.00 GiB"),
        (2**30 - 2**20, "1023 MiB"),
        (0, "0 MiB"),
        (-(2**19) + 1, "0 MiB"),
        (-3 * 2**30 // 2, "-1.50 GiB"),
        (139 * 2**30, "139.00 GiB"),
    ],
)
def test_a_size_is_written_in_gib_or_when_small_in_mib(num_bytes, text):
    assert format_gib(num_bytes) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 rows"), (1, "1 row"), (1200, "1,200 rows")])
def test_one_thing_is_not_several(number, text):
    assert format_count(number, "row") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (7, "0:07"), (59.6, "1:00"), (750, "12:30"), (3599.5, "1:00:00"), (11100, "3:05:00")],
)
def test_a_duration_is_read_as_on_a_clock(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s"), (89.4, "89 s"), (89.6, "1 min"), (1520, "25 min"), (89 * 60, "89 min"), (90 * 60, "1 h 30 min"),
    (11_400, "3 h 10 min"), (7150, "2 h"), (36 * 3600, "1.5 days"),
])  # fmt: skip
def test_an_estimated_duration_is_rounded(seconds, text):
    assert describe_duration(seconds) == text


def test_a_share_has_a_space_before_its_sign_wherever_it_is_shown():
    assert (format_percent(0.7512), format_percent(0.7512, 1), format_percent(1.0, 2)) == ("75 %", "75.1 %", "100.00 %")
    files = [path for kind in ("*.py", "*.jinja", "*.toml") for path in PACKAGE.rglob(kind)]
    assert len(files) > 100
    form = re.compile(r":\.\d%|[\d}]%(?=[ ,.;)\"']|$)", re.MULTILINE)
    styles = re.compile(r"<style>.*?</style>|\{%.*?%\}|style=\"[^\"]*\"", re.DOTALL)
    assert [
        (path.name, found) for path in files if (found := form.findall(styles.sub("", path.read_text(encoding="utf-8"))))
    ] == []


def test_epochs_are_counted_in_words():
    assert [describe_epochs(epochs) for epochs in (1.0, 3.0, 0.3333, 2.5)] == [
        "1 epoch",
        "3 epochs",
        "0.333 epochs",
        "2.5 epochs",
    ]
