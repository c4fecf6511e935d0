"""A question about a recipe, and its answer: the one that was kept, or one worked out now and kept."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qlora_phi3.device import Device
from qlora_phi3.memory.answer import Answer, Bench, as_json, from_json, read_subject
from qlora_phi3.memory.cache import find_kept, keep, question_key, watch
from qlora_phi3.memory.margin import budget_of, read_margin
from qlora_phi3.memory.survey import (
    CardGroup,
    LongestOnCard,
    SurveyRow,
    find_longest_rows,
    longest_from_json,
    survey,
    survey_as_json,
    survey_from_json,
)

if TYPE_CHECKING:
    from qlora_phi3.recipe.load import Recipe

Result = TypeVar("Result")


class Teller(Protocol):
    """Whom to tell how far the work is."""

    def say(self, what: str) -> None:
        """Name what is being done now."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Say how far the data have been read."""

    def card(self, name: str, done: int, total: int) -> None:
        """Say which card is looked at, of how many."""

    def close(self) -> None:
        """The work is done."""


@dataclass(frozen=True)
class Question:
    """A recipe file with what the command line changes in it."""

    path: Path
    overrides: tuple[str, ...]
    teller: Teller

    @cached_property
    def recipe(self) -> "Recipe":
        """The recipe; RecipeError where it cannot be used."""
        from qlora_phi3.recipe.load import load_recipe

        return load_recipe(self.path, self.overrides)

    @property
    def text(self) -> str:
        """The file's."""
        return self.path.read_text(encoding="utf-8-sig")

    def about_card(self, device: Device) -> Answer:
        """Whether the recipe fits a card.

        Raises:
            UserError: see `read_subject`, `budget_of` and `Bench.answer`.
        """

        def work_out() -> Answer:
            budget_bytes = budget_of(self.recipe, device)
            return self._bench().answer(device, budget_bytes)

        answer = self._ask("card", [device], work_out, as_json, from_json)
        return replace(answer, device=device)  # who else is on it may have other numbers by now

    def about_every_card(self, groups: Sequence[CardGroup]) -> list[SurveyRow]:
        """The plan on each group of cards."""
        devices = [group.device for group in groups]
        return self._ask(
            "every card",
            devices,
            lambda: survey(self._bench(), groups, self.teller.card),
            survey_as_json,
            survey_from_json,
        )

    def about_length(self, devices: Sequence[Device]) -> list[LongestOnCard]:
        """The longest row on each card."""
        return self._ask(
            "length",
            devices,
            lambda: find_longest_rows(self._bench(), devices, self.teller.card),
            lambda rows: [asdict(row) for row in rows],
            longest_from_json,
        )

    def _bench(self) -> Bench:
        """Ready to work answers out."""
        recipe = self.recipe
        if "torch" not in sys.modules:
            self.teller.say("Starting torch, transformers and peft")
        return Bench(read_subject(recipe, self.path.parent, self.teller.progress), self.teller.say)

    def _ask(
        self,
        kind: str,
        devices: Sequence[Device],
        work_out: Callable[[], Result],
        encode: Callable[[Result], Any],
        decode: Callable[[Any], Result],
    ) -> Result:
        key = self._key(kind, devices)
        kept = find_kept(key) if key else None
        if kept is not None:
            try:
                return decode(kept)
            except ValueError:
                pass  # somebody edited the cache
        result = work_out()
        if key:
            from qlora_phi3.memory.lengths import files_of

            keep(key, encode(result), watch(files_of(self.recipe, self.path.parent)))
        return result

    def _key(self, kind: str, devices: Sequence[Device]) -> str | None:
        """None for a recipe that cannot be read: loading it will say why."""
        try:
            text = self.path.read_bytes()
        except OSError:
            return None
        return question_key(
            {
                "kind": kind,
                "recipe": hashlib.sha256(text).hexdigest(),
                "overrides": self.overrides,
                "folders": [str(self.path.absolute().parent), str(Path.cwd())],
                "devices": [asdict(replace(device, others=())) for device in devices],
                "margins": [read_margin(device.name).share for device in devices],
            }
        )
