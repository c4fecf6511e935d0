"""The experiment trackers of `report_to`: transformers' callbacks, started before training, and open until the run ends.

transformers starts a tracker with the first step and ends it with the last. A run measures its adapter before and after that:
TensorBoard would begin in the working directory, and mlflow would begin a second run. Here a tracker that cannot start ends the
run in one line before its first step, and one that fails later is left out. A resumed run goes on under the same name.
"""

import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_available_reporting_integrations, is_flytekit_available
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from trl import SFTConfig

from qlora_phi3.errors import RecipeError, RunError
from qlora_phi3.files import foreign_errors
from qlora_phi3.recipe.schema import Training
from qlora_phi3.reporter import Reporter
from qlora_phi3.runfolder import RunFolder
from qlora_phi3.training.processes import own_rank

#: The trackers that are tested, each an extra of this package, and the project that they get where the environment names none.
EXTRAS, PROJECT = ("mlflow", "tensorboard", "trackio", "wandb"), "qlora-phi3"
ALL_FIGURES = "metrics.jsonl holds every figure"


def tracker_names(training: Training) -> list[str]:
    """The trackers that the recipe names; for "all" those that are installed."""
    if training.report_to == "all":
        return list(get_available_reporting_integrations())
    wanted = [training.report_to] if isinstance(training.report_to, str) else training.report_to
    return [name for name in dict.fromkeys(wanted) if name != "none"]


def check_trackers(training: Training) -> None:
    """Raise RecipeError for a tracker that is not installed, and for wandb without a key, which it would ask for."""
    installed = {*get_available_reporting_integrations(), *(["flyte"] if is_flytekit_available() else [])}
    for name in tracker_names(training):
        if name not in installed:
            install = f"Install it: pip install 'qlora-phi3[{name}]'" if name in EXTRAS else "Install it next to qlora-phi3"
            hint = f"{install}; or delete it: {ALL_FIGURES}."
            raise RecipeError(f"[training] report_to names {name}, which is not installed.", hint)
        if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
            import wandb  # type: ignore[import-not-found, unused-ignore]

            if not wandb.api.api_key:
                hint = "Run `wandb login`, or set WANDB_MODE=offline."
                raise RecipeError("[training] report_to names wandb, which has no API key here.", hint)


class Trackers(TrainerCallback):  # type: ignore[misc]
    """Passes the figures of a run on to its trackers."""

    def __init__(self, training: Training, args: SFTConfig, folder: RunFolder, reporter: Reporter) -> None:
        """Give `args` the name of the run, which trackers show."""
        self._names, self._folder, self._reporter = [] if own_rank() else tracker_names(training), folder, reporter
        self._callbacks: dict[str, Any] = {}
        args.run_name, args.project = f"{folder.path.parent.name}-{folder.path.name}", PROJECT

    def start(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Start every tracker; RecipeError, with its own words, for one that cannot."""
        for name in self._names:
            problem, hint = f"[training] report_to: {name} cannot be started: {{reason}}.", f"Delete it: {ALL_FIGURES}."
            with foreign_errors(RecipeError, problem, hint):
                _continue_run(name, args.run_name)
                (kind,) = get_reporting_integration_callbacks(name)
                callback = kind()
                if name == "tensorboard" and callback.logging_dir is None:
                    callback.logging_dir = str(self._folder.path / name)
                callback.on_train_begin(args, state, TrainerControl(), model=model)
            self._callbacks[name] = callback
        if self._callbacks:
            self._reporter.info(f"Trackers: {', '.join(self._callbacks)}, as {args.run_name}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass the figures of a step or of an evaluation on."""
        self._call_each("on_log", args, state, control, **kwargs)

    def finish(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any) -> None:
        """End every tracker, after the run's last figure."""
        self._call_each("on_train_end", args, state, control, model=model)
        self._callbacks.clear()

    def _call_each(self, event: str, args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        for name, callback in list(self._callbacks.items()):
            try:
                with foreign_errors(RunError, f"{name} failed after step {state.global_step}: {{reason}}.", ""):
                    getattr(callback, event)(args, state, *rest, **kwargs)
            except RunError as error:
                del self._callbacks[name]
                self._reporter.warning(f"{error.message} The run goes on without it: {ALL_FIGURES}.")


def _continue_run(name: str, run_name: str) -> None:
    """Make wandb and mlflow go on with the run of this name, if there is one; the others do so by themselves.

    What the user has set in the environment stays.
    """
    if name == "wandb":
        # Its own copy of the terminal would hold what the run prints, with names of files and rows.
        own = {"PROJECT": PROJECT, "RUN_ID": run_name, "RESUME": "allow", "CONSOLE": "off", "SILENT": "true"}
        for key, value in own.items():
            os.environ.setdefault(f"WANDB_{key}", value)
    elif name == "mlflow" and "MLFLOW_RUN_ID" not in os.environ:
        import mlflow  # type: ignore[import-not-found, unused-ignore]

        experiment = mlflow.get_experiment_by_name(os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT))
        wanted = {"filter_string": f"attributes.run_name = '{run_name}'", "output_format": "list", "max_results": 1}
        for found in mlflow.search_runs([experiment.experiment_id], **wanted) if experiment else ():
            os.environ.update(MLFLOW_RUN_ID=found.info.run_id, MLFLOW_MAX_LOG_PARAMS="0")  # it has its settings already
