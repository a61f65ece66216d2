"""When the model is evaluated, and which of its states is the result."""

from __future__ import annotations

from typing import Any

from tunewright_api.v1alpha1.objective import ObjectiveType
from tunewright_cli.axolotl.draft import Draft, Kind

_SELECTION = ("load_best_model_at_end", "early_stopping_patience", "metric_for_best_model", "greater_is_better")
_METRICS = {"loss": "Loss", "accuracy": "Accuracy"}


def convert_evaluation(draft: Draft, objective: ObjectiveType) -> None:
    """Set the evaluation; data and hyperparameters must be there already."""
    dataset = draft.spec.get("dataset", {})
    has_rows = bool(dataset.get("validation") or dataset.get("validationFraction"))
    _strategy(draft, has_rows=has_rows)
    asked, patience = draft.take_flag("load_best_model_at_end"), draft.take_whole("early_stopping_patience")
    metric, greater = draft.take_text("metric_for_best_model"), draft.take_flag("greater_is_better")
    given = dict(zip(_SELECTION, (asked, patience or None, metric, greater), strict=True))
    if not has_rows:
        _unused(draft, given, "there are no validation rows")
    elif objective not in ("SFT", "Reward"):
        text = "Axolotl has it for supervised fine-tuning and reward models alone; to have it here, set evaluation"
        _unused(draft, given, text)
    elif asked or patience or (asked is None and _saves_with_evaluations(draft)):
        _best(draft, patience)
        _metric(draft, objective, metric, greater)
    else:
        _unused(draft, {**given, "load_best_model_at_end": None}, "the model of the last step is the result")
        if asked is False:
            draft.note(Kind.NOT_NEEDED, "load_best_model_at_end", "off, as here")


def _unused(draft: Draft, given: dict[str, Any], text: str) -> None:
    for key, value in given.items():
        if value is not None:
            draft.note(Kind.NOT_NEEDED, key, text)


def _strategy(draft: Draft, *, has_rows: bool) -> None:
    per_epoch, every = draft.take_number("evals_per_epoch"), draft.take_number("eval_steps")
    keys = ("eval_strategy", "evaluation_strategy")
    strategies = {key: value for key in keys if (value := draft.take(key)) is not None}
    if not has_rows:
        _unused(
            draft, {"evals_per_epoch": per_epoch, "eval_steps": every, **strategies}, "there are no validation rows"
        )
    # kubectl's YAML, like PyYAML's, reads a bare no as false.
    elif any(value in ("no", False) for value in strategies.values()):
        draft.set("evaluation.strategy", "None", "eval_strategy")
    elif every is not None and every >= 1:
        draft.set("evaluation.strategy", "Steps", "eval_steps")
        draft.set("evaluation.steps", int(every), "eval_steps")
    elif every is not None or per_epoch not in (None, 0, 1):
        key = "eval_steps" if every is not None else "evals_per_epoch"
        text = "evaluated once per epoch; for more, set evaluation.strategy to Steps and evaluation.steps"
        draft.note(Kind.NOT_CONVERTED, key, text)


def _intervals(draft: Draft) -> tuple[float, float]:
    """Return after how many steps, or after which share of them, Axolotl evaluates and saves; 0 where it does not."""

    def interval(steps: str, per_epoch: str) -> float:
        epochs = draft.spec["hyperparameters"].get("epochs", 1)
        for key, of in ((steps, float), (per_epoch, lambda count: 1 / (count * epochs))):
            value = draft.value(key)
            if isinstance(value, int | float) and value > 0:
                return of(value)
        return 0.0

    return interval("eval_steps", "evals_per_epoch"), interval("save_steps", "saves_per_epoch")


def _saves_with_evaluations(draft: Draft) -> bool:
    """Tell whether Axolotl publishes the best model unasked: where every saved state has been evaluated."""
    evaluates, saves = _intervals(draft)
    return evaluates > 0 and saves > 0 and saves % evaluates == 0


def _best(draft: Draft, patience: int | None) -> None:
    # Without early stopping Axolotl takes the best one unasked wherever it saves what it evaluates.
    keys = ("load_best_model_at_end", "early_stopping_patience", "save_steps", "saves_per_epoch")
    key = next(key for key in keys if draft.value(key))
    if patience:
        draft.set("evaluation.earlyStopping.patience", patience, "early_stopping_patience")
    draft.set("evaluation.loadBest", True, key)
    evaluates, saves = _intervals(draft)
    if evaluates != saves:
        text = (
            "the model of the best evaluation is the result; Axolotl takes the best of those evaluations that it saves"
        )
        draft.note(Kind.DIFFERS, key, text)


def _metric(draft: Draft, objective: ObjectiveType, metric: str | None, greater: bool | None) -> None:
    name = _METRICS.get((metric or "loss").removeprefix("eval_"))
    if name is None or (name == "Accuracy" and objective != "Reward"):
        text = f"the loss, and for reward models the accuracy, is what the best model is chosen by, not {metric!r}"
        draft.note(Kind.ERROR, "metric_for_best_model", text)
    elif greater is not None and greater != (name == "Accuracy"):
        text = f"the best model is the one with the {'highest' if name == 'Accuracy' else 'lowest'} {metric or 'loss'}"
        draft.note(Kind.ERROR, "greater_is_better", text)
    elif name != "Loss":
        draft.set("evaluation.metric", name, "metric_for_best_model")
