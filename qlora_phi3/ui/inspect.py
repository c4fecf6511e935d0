"""What `qlora-phi3 inspect` shows: rows with the learned text marked, and statistics; in a terminal, or as a page of HTML."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_phi3.data.inspect import CUT_SHARE, DataStatistics, Problem, RowView
from qlora_phi3.ui.console import shown
from qlora_phi3.units import format_count, format_percent

if TYPE_CHECKING:
    from rich.console import Console

LEARNED_STYLE, CONTEXT_STYLE = "green underline", "dim"
#: Where a style cannot be seen (a pipe, a file), learned text stands between these.
MARKS = ("[[", "]]")
#: Characters of one piece of a row that are shown, unless the row was asked for.
MOST_CHARACTERS = 600
BAR_WIDTH = 40
#: Rows that a page lists as left out or cut.
MOST_PROBLEMS = 100


def is_styled(console: "Console") -> bool:
    """Whether underlining can be seen: on a terminal that is not a dumb one. With NO_COLOR it stays."""
    return console.is_terminal and console.color_system is not None


def show_row(console: "Console", view: RowView, *, ids: bool = False, is_complete: bool = False) -> None:
    """Print a row; with `ids` a line for each token. Long pieces are shortened unless `is_complete`."""
    from rich.text import Text

    marks = ("", "") if is_styled(console) else MARKS
    console.print(Text(describe_row(view), style="bold"), soft_wrap=True)
    if ids:
        for piece in view.pieces:
            for token_id, token in zip(piece.ids, piece.tokens, strict=True):
                style = LEARNED_STYLE if piece.is_learned else CONTEXT_STYLE
                mark = "learned" if piece.is_learned else ""
                console.print(Text(f"{token_id:>8}  {mark:7}  {shown(repr(token)[1:-1])}", style=style), soft_wrap=True)
    else:
        text = Text()
        for piece in view.pieces:
            part = shown(piece.text if is_complete else shorten(piece.text))
            before, after = marks if piece.is_learned else ("", "")
            text.append(f"{before}{part}{after}", style=LEARNED_STYLE if piece.is_learned else CONTEXT_STYLE)
        console.print(text, soft_wrap=not console.is_terminal)
    console.print()


def describe_row(view: RowView) -> str:
    """A line above a row: its name, and how many of its tokens are learned or cut."""
    cut = f"; {view.num_cut:,} more are cut at max_length" if view.num_cut else ""
    held_out = "; held out for evaluation" if view.is_held_out else ""
    return shown(f"{view.name}: {format_count(view.num_tokens, 'token')}, {view.num_learned:,} learned{cut}{held_out}")


def shorten(text: str) -> str:
    """A text with at most `MOST_CHARACTERS` characters: its beginning and its end."""
    left_out = len(text) - MOST_CHARACTERS
    half = MOST_CHARACTERS // 2
    return text if left_out <= 0 else f"{text[:half]} ... {left_out:,} characters ... {text[-half:]}"


def show_problems(console: "Console", problems: Sequence[Problem]) -> None:
    """Print the rows that are left out or cut, each with the reason."""
    from rich.text import Text

    for problem in problems:
        console.print(Text(shown(f"{problem.name}: {problem.reason}"), style="bold"), soft_wrap=True)
        console.print(Text(shown(shorten(problem.content)), style=CONTEXT_STYLE), soft_wrap=not console.is_terminal)
        console.print()
    if not problems:
        console.print("No row is left out or cut.")


def legend(console: "Console") -> str:
    """How learned text is marked."""
    colour = "" if console.no_color else "green and "
    how = f"{colour}underlined" if is_styled(console) else f"between {MARKS[0]} and {MARKS[1]}"
    return f"Learned: {how}, with the token that ends an answer. The rest is only read."


def statistics_lines(figures: DataStatistics) -> list[str]:
    """The statistics as lines of plain text."""
    report, most = figures.report, max(rows for _, rows in figures.histogram)
    lines = [*report.summary_lines(), *report.warning_lines(), ""]
    least, low, middle, high, highest, most_tokens = (f"{length:,}" for length in figures.percentiles.values())
    of = ", held-out ones included" if report.eval_indices else " to train on"
    rows = format_count(sum(count for _, count in figures.histogram), "row") + of
    lines.append(f"Tokens of a row, before any is cut ({rows}): shortest {least}, median {middle}, longest {most_tokens}")
    lines.append(f"10 % of the rows have at most {low} tokens, 90 % at most {high}, 99 % at most {highest}")
    lines += ["", f"{'tokens':>15}  {'':{BAR_WIDTH}}  {'rows':>9}"]
    for longest, count in figures.histogram:
        bar = "█" * max(round(BAR_WIDTH * count / most), 1 if count else 0)
        lines.append(f"{f'up to {longest:,}':>15}  {bar:{BAR_WIDTH}}  {count:>9,}")
    lines += ["", f"{'max_length':>15}  {'rows cut':>9}  {'learned tokens lost':>20}  {'rows dropped':>13}"]
    for cut in figures.cuts:
        mark = "  < the recipe's" if cut.max_length == report.max_length else ""
        shares = f"{format_percent(cut.rows_share, 1):>9}  {format_percent(cut.learned_share, 1):>20}"
        lines.append(f"{cut.max_length:>15,}  {shares}  {cut.rows_dropped:>13,}{mark}")
    lines += ["", f"Learned: {format_percent(figures.learned_share, 1)} of the tokens to train on"]
    padding = format_percent(figures.padding_share)
    lines.append(f"Packing: nothing is padded; padded to the longest of their step, {padding} would be padding")
    cuts, length = {cut.max_length: cut for cut in figures.cuts}, figures.suggested_max_length
    at_most = {each: max(cut.rows_share, cut.learned_share) for each, cut in cuts.items()}
    reason = f"the least that cuts at most {format_percent(CUT_SHARE)} of the rows and of the learned tokens"
    if at_most[length] > CUT_SHARE:  # the model's positions bound the suggestion
        rows, tokens = (format_percent(share, 1) for share in (cuts[length].rows_share, cuts[length].learned_share))
        reason = f"all that the model has: {rows} of the rows are cut, {tokens} of the learned tokens lost. Split longer rows"
    if length == report.max_length and at_most[length] > CUT_SHARE:
        lines.append(f"max_length = {length} is {reason}")
    elif length < report.max_length or at_most[report.max_length] > CUT_SHARE:
        lines.append(f"Suggestion: max_length = {length}, {reason}")
    else:
        lines.append(f"max_length = {report.max_length:,} fits these rows")
    return [shown(line) for line in lines]


def render_page(figures: DataStatistics, views: Sequence[RowView], problems: Sequence[Problem], *, recipe: str) -> str:
    """The same as one page of HTML, without scripts and without other files. Text of the data is escaped."""
    from qlora_phi3.ui.page import render

    return render(
        "inspect.html.jinja",
        recipe=recipe,
        lines=statistics_lines(figures),
        rows=[(describe_row(view), view.pieces) for view in views],
        problems=[(shown(f"{problem.name}: {problem.reason}"), problem.content) for problem in problems[:MOST_PROBLEMS]],
        num_problems=len(problems),
    )
