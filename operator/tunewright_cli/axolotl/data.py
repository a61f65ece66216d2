"""Axolotl's data sets: their files, and the shape of their rows by the type that Axolotl calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunewright_api.v1alpha1.objective import ObjectiveType
from tunewright_cli.axolotl.draft import Draft, Keys, Kind
from tunewright_cli.axolotl.keys import SOURCE, Unmapped, report_left
from tunewright_cli.axolotl.sources import files_of
from tunewright_cli.axolotl.templates import TEMPLATES, Rows

SOURCE_FIELDS: dict[str, str] = {
    "path": "dataset.train[].uri",
    "data_files": "dataset.train[].uri",
    "name": "dataset.train[].uri",
    "revision": "dataset.train[].revision",
    "split": "dataset.train[].split, dataset.train[].maxSamples",
    "type": "dataset.format, dataset.columns, model.chatTemplate",
    "field": "dataset.columns.text",
    "field_messages": "dataset.columns.messages",
    "field_chosen": "dataset.columns.chosen",
    "field_rejected": "dataset.columns.rejected",
    "message_property_mappings": "dataset.format",
    "message_field_role": "dataset.format",
    "message_field_content": "dataset.format",
    "roles": "dataset.format",
    "roles_to_train": "objective.sft.loss",
    "train_on_eos": "objective.sft.loss",
    "chat_template": "model.chatTemplate",
    "chat_template_jinja": "model.chatTemplate",
    "conversation": "model.chatTemplate",
}
"""Keys of a data set -> what they become."""

MESSAGE_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SHAREGPT_ROLES |= {"chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "model": "assistant"}
SHAREGPT_ROLES |= {"tool": "tool", "function": "tool", "observation": "tool"}
"""Roles in the rows -> roles in the template, as the trainer reads the formats Messages and ShareGPT."""

_PAIRS: dict[str, dict[str, str]] = {
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "argilla_chat": {},
    "icr": {"prompt": "input"},
    "intel": {"prompt": "question"},
    "prompt_pairs": {},
    "ultra": {},
}
_VERDICTS: dict[str, dict[str, str]] = {
    "argilla": {"prompt": "instruction"},
    "intel": {"prompt": "question"},
    "prompt_pairs": {},
    "ultra": {},
}
_REWARDS: dict[str, dict[str, str]] = {"bradley_terry.chat_template": {"prompt": "input"}}
_PLAIN = (
    "where the model has a chat template, prompt and answer become one exchange of it; Axolotl writes them without one"
)
_SYSTEM = "a column named system is not read: write it into the prompt as a system turn"


def convert_data(draft: Draft, objective: ObjectiveType) -> Rows | None:
    """Set everything below dataset, and return the shape of the rows; None after an error."""
    shapes = _sources(draft, "datasets", "dataset.train", objective)
    if not draft.take("datasets"):
        draft.note(Kind.ERROR, "datasets", "missing: name at least one data set")
    shapes += _sources(draft, "test_datasets", "dataset.validation", objective)
    _validation_fraction(draft)
    found = [shape for shape in shapes if shape is not None]
    if not found:
        return None
    if any(shape != found[0] for shape in found):
        kinds = " and ".join(sorted({_described(shape) for shape in found}))
        draft.note(Kind.ERROR, "datasets", f"rows of one job have one shape, these are {kinds}: make them alike")
    draft.set("dataset.format", found[0].format, "datasets")
    draft.set("dataset.columns", dict(found[0].columns) or None, "datasets")
    return found[0]


def _described(shape: Rows) -> str:
    details = [f"{name}: {column}" for name, column in shape.columns.items()]
    if shape.template is not None:
        details.append(f"chat template {shape.template}")
    return f"{shape.format} ({', '.join(details)})" if details else shape.format


def _sources(draft: Draft, key: str, target: str, objective: ObjectiveType) -> list[Rows | None]:
    given = draft.take(key)
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        draft.note(Kind.ERROR, key, "must be a list of data sets, each with path and type")
        return []
    sources: list[dict[str, Any]] = []
    shapes = []
    for index, item in enumerate(given):
        keys = draft.inside(f"{key}[{index}]", item)
        sources += files_of(keys, "train" if key == "datasets" else "test")
        shapes.append(_rows(keys, objective))
        report_left(keys, SOURCE, frozenset(SOURCE_FIELDS))
    draft.set(target, sources or None, key)
    return shapes


def _validation_fraction(draft: Draft) -> None:
    share = draft.take_number("val_set_size")
    if not share:
        return
    if draft.spec.get("dataset", {}).get("validation"):
        draft.note(Kind.NOT_NEEDED, "val_set_size", "test_datasets has the validation rows")
    elif 0 < share < 1:
        draft.set("dataset.validationFraction", share, "val_set_size")
    else:
        text = f"{share} rows cannot be said, only a share: set dataset.validationFraction to {share} / all rows"
        draft.note(Kind.NOT_CONVERTED, "val_set_size", text)


def _rows(keys: Keys, objective: ObjectiveType) -> Rows | None:
    kind = keys.take("type")
    _conversation_keys(keys)
    if objective == "GRPO":
        return _prompt_rows(keys, kind)
    if kind is None:
        keys.note(Kind.ERROR, "type", "missing: rows that are tokenised already are not read")
        return None
    shape: Rows | None
    match objective:
        case "SFT" | "DPO" | "KTO" if isinstance(kind, dict):
            shape = _user_defined(keys.inside("type", kind), objective)
        case "SFT":
            shape = _sft_rows(keys, kind)
        case "DPO":
            shape = _judged_rows(keys, kind, "Preference", _PAIRS)
        case "KTO":
            shape = _judged_rows(keys, kind, "UnpairedPreference", _VERDICTS)
        case _:
            shape = _reward_rows(keys, kind)
    if shape is None and not any(note.path == keys.path_of("type") for note in keys.notes):
        shown = repr(kind) if isinstance(kind, str) else "of one's own"
        text = f"rows of type {shown} are not read with objective {objective}: {_remedy(objective)}"
        keys.note(Kind.ERROR, "type", text)
    return shape


def _remedy(objective: ObjectiveType) -> str:
    match objective:
        case "SFT":
            return "write them as chats (type: chat_template), as type: alpaca, or as whole texts (type: completion)"
        case "DPO":
            return "write them as two chats, chosen and rejected (type: chat_template.argilla_chat)"
        case "KTO":
            return "write them with prompt, completion and label (type: chatml.prompt_pairs)"
        case _:
            return "write them with input, chosen and rejected (type: bradley_terry.chat_template)"


def _conversation_keys(keys: Keys) -> None:
    """Check what decides about the learned tokens of a chat, where only one way is known here."""
    given, learned = keys.take("roles_to_train"), keys.take_texts("roles_to_train")
    if given is not None and (not learned or set(learned) - {"assistant", "gpt"}):
        text = f"all answers are learned and nothing else, not {given}; remove it, or set train_on_inputs: true"
        keys.note(Kind.ERROR, "roles_to_train", text)
    end = keys.take("train_on_eos")
    if end not in (None, "turn"):
        text = f"the end of every answer is learned, and no other, not {end!r}; remove the key to convert without it"
        keys.note(Kind.ERROR, "train_on_eos", text)


def _sft_rows(keys: Keys, kind: Any) -> Rows | None:
    column = keys.take_text("field")
    match kind:
        case "alpaca":
            keys.note(Kind.DIFFERS, "type", _PLAIN)
            return Rows("Alpaca")
        case "completion":
            keys.note(Kind.DIFFERS, "type", "texts longer than sequence_len are cut at the end; Axolotl splits them")
            return Rows("Text", _renamed(text=column))
        case "sharegpt":
            column = _other(keys.take_text("field_messages"), "conversations")
            return Rows("ShareGPT", _renamed(messages=column), keys.take_text("conversation"))
        case "chat_template":
            return _chat_rows(keys)
    return None


def _chat_rows(keys: Keys) -> Rows | None:
    columns = _renamed(messages=_other(keys.take_text("field_messages"), "messages"))
    formats = {("role", "content"): ("Messages", MESSAGE_ROLES), ("from", "value"): ("ShareGPT", SHAREGPT_ROLES)}
    role, content = _turn_names(keys)
    name, roles = formats.get((role or "role", content or "content"), (None, {}))
    if name is None:
        text = "turns must have role and content, or from and value: rename them in the rows"
        keys.note(Kind.ERROR, "message_property_mappings", text)
        return Rows("Messages", columns)
    _check_roles(keys, roles)
    return Rows(name, columns, *_own_template(keys))


def _turn_names(keys: Keys) -> tuple[Any, Any]:
    """Return what role and content of a turn are called in the rows; None where it is not said."""
    mapping = dict(keys.take_mapping("message_property_mappings"))
    role = keys.take_text("message_field_role") or mapping.pop("role", None)
    content = keys.take_text("message_field_content") or mapping.pop("content", None)
    for part in mapping:
        keys.note(Kind.ERROR, "message_property_mappings", f"turns have a role and a content: {part} is not read")
    return role, content


def _own_template(keys: Keys) -> tuple[str | None, str | None]:
    """Return the name of a data set's own chat template, and its text where it is given."""
    name, text = keys.take_text("chat_template"), keys.take_text("chat_template_jinja")
    return name or (None if text is None else "jinja"), text


def _check_roles(keys: Keys, known: Mapping[str, str]) -> None:
    for target, sources in keys.take_mapping("roles").items():
        for source in map(str, sources if isinstance(sources, list) else [sources]):
            if source not in known:
                text = f"{source!r} is no role known here: rename it in the rows to {target!r}"
                keys.note(Kind.DIFFERS, "roles", text)
            elif known[source] != target:
                text = f"{source!r} is read as {known[source]!r}, not as {target!r}: rename the role in the rows"
                keys.note(Kind.ERROR, "roles", text)


def _user_defined(keys: Keys, objective: ObjectiveType) -> Rows:
    """Return the shape of rows whose texts are columns as they stand."""
    match objective:
        case "SFT":
            shape = _user_defined_answer(keys)
        case "DPO":
            shape = Rows("Preference", _user_defined_columns(keys, "prompt", "chosen", "rejected"))
        case _:
            shape = Rows("UnpairedPreference", _user_defined_columns(keys, "prompt", "completion", "label"))
    keys.note(Kind.DIFFERS, "", _PLAIN)
    report_left(keys, Unmapped({}, {}, {}), frozenset())
    return shape


def _user_defined_answer(keys: Keys) -> Rows:
    formats = [keys.take_text(key) for key in ("format", "no_input_format")]
    prompt = keys.take_text("field_instruction") or "instruction"
    answer = keys.take_text("field_output") or "output"
    others = [keys.take(key) for key in ("field_input", "field_system", "system_prompt")]
    keys.take("system_format")
    if any(others) or any(text not in (None, "{instruction}") for text in formats):
        text = "prompts cannot be put together from columns: write them into the rows, with field_instruction and "
        keys.note(Kind.ERROR, "", text + "field_output alone, or use type: alpaca")
    return Rows("PromptCompletion", _renamed(prompt=prompt, completion=answer))


def _user_defined_columns(keys: Keys, *parts: str) -> dict[str, str]:
    columns = {part: keys.take_text(f"field_{part}") for part in parts}
    for part in parts:
        if keys.take_text(f"{part}_format") not in (None, f"{{{part}}}"):
            text = "texts cannot be put together from columns: write them into the rows, and remove the key"
            keys.note(Kind.ERROR, f"{part}_format", text)
    if keys.take("field_system") is not None:
        keys.note(Kind.DIFFERS, "field_system", _SYSTEM)
    return _renamed(**columns)


def _judged_rows(keys: Keys, kind: Any, name: str, types: Mapping[str, dict[str, str]]) -> Rows | None:
    fields = ("chosen", "rejected") if name == "Preference" else ()
    given = {field: _other(keys.take_text(f"field_{field}"), field) for field in fields}
    if name == "Preference" and kind in ("chat_template.argilla_chat", "chat_template.default"):
        if kind == "chat_template.default":
            text = "chosen and rejected must be text or lists of turns: put a single turn into a list"
            keys.note(Kind.DIFFERS, "type", text)
            given["prompt"] = keys.take_text("field_messages") or "messages"
        if _turn_names(keys) not in ((None, None), ("role", "content")):
            text = "turns must have role and content: rename them in the rows"
            keys.note(Kind.ERROR, "message_property_mappings", text)
        _check_roles(keys, MESSAGE_ROLES)
        return Rows(name, _renamed(**given), *_own_template(keys))
    template, _, row = kind.partition(".") if isinstance(kind, str) else ("", "", "")
    if template not in TEMPLATES or row not in types:
        return None
    if row != "argilla_chat":
        keys.note(Kind.DIFFERS, "type", _SYSTEM)
    return Rows(name, types[row], template)


def _reward_rows(keys: Keys, kind: Any) -> Rows | None:
    if not isinstance(kind, str) or kind not in _REWARDS:
        return None
    keys.note(Kind.DIFFERS, "type", _SYSTEM)
    return Rows("Preference", _REWARDS[kind])


def _prompt_rows(keys: Keys, kind: Any) -> Rows:
    if kind is not None:
        text = f"{kind} is code of your own, and not run: write the rows that it makes, with their prompt and what "
        keys.note(Kind.TO_DO, "type", text + "rewards read, to your own bucket, and give them as the data set")
    return Rows("Prompts")


def _other(given: str | None, usual: str) -> str | None:
    return None if given == usual else given


def _renamed(**columns: str | None) -> dict[str, str]:
    return {name: column for name, column in columns.items() if column is not None and column != name}
