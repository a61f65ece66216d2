"""Shape of the rows and the chat template they are rendered with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tunewright_cli.axolotl.draft import Draft, Kind

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3}
"""Chat templates by Axolotl's names that are the same for every model that uses them."""


@dataclass(frozen=True)
class Rows:
    """Shape of a data set's rows: format, columns, and a chat template of its own, by name and as text."""

    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    jinja: str | None = None


def convert_template(draft: Draft, rows: Rows | None) -> None:
    """Set model.chatTemplate where the configuration asks for another one than the tokenizer's own.

    Args:
        draft: The draft.
        rows: Shape of the rows; a chat template of their own wins over that of the whole file.
    """
    name, text = draft.take_text("chat_template"), draft.take_text("chat_template_jinja")
    key = "chat_template" if name is not None else "chat_template_jinja"
    name = "jinja" if name is None and text is not None else name
    if rows is not None and rows.template is not None:
        if name not in (None, rows.template):
            draft.note(Kind.NOT_CONVERTED, key, f"the data set has a chat template of its own, {rows.template}")
        name, text, key = rows.template, rows.jinja, "datasets"
    if name is None or name == "tokenizer_default":
        return
    if rows is not None and rows.format in ("Alpaca", "Text", "PromptCompletion"):
        draft.note(Kind.NOT_CONVERTED, key, f"rows of format {rows.format} are no chats; the tokenizer keeps its own")
    elif name == "jinja":
        if text is None or "{" not in text:
            draft.note(Kind.ERROR, key, "write the template itself into chat_template_jinja, not the name of a file")
        draft.set("model.chatTemplate", text, key)
    elif name in TEMPLATES:
        draft.set("model.chatTemplate", TEMPLATES[name], key)
    else:
        own = f"Axolotl's template {name!r} is not known here, the tokenizer's own is used; where it has none the run "
        draft.note(Kind.DIFFERS, key, own + "stops before training: set model.chatTemplate")
