"""Stages of a run in words: files name the controls, people read what they were trained on."""

from __future__ import annotations

__all__ = ["TRAINED_ON", "in_words"]

# Stacks trained equally long with nothing to learn.
TRAINED_ON = {"control_iid": "i.i.d. tokens", "control_permuted": "permuted targets"}


def in_words(text: str) -> str:
    """``text`` with the controls' names as files have them replaced by words.

    >>> in_words("R, control_iid")
    'R, trained on i.i.d. tokens'
    >>> in_words("R below control_permuted")
    'R below a stack trained on permuted targets'
    """
    for stage, tokens in TRAINED_ON.items():
        for word in ("below", "above"):
            text = text.replace(f"{word} {stage}", f"{word} a stack trained on {tokens}")
        text = text.replace(stage, f"trained on {tokens}")
    return text
