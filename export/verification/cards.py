"""Comparing what a file says about itself with the model: wrong labels or another resize make good numbers useless."""

from __future__ import annotations

import json
import os
from typing import Any

from .. import artifact

COMPARED = ("config", "preprocessing", "labels")


def check_metadata(path: str | os.PathLike[str], expected: dict[str, Any] | None) -> tuple[list[str], list[str]]:
    """Compare the card and the output kinds of a file or folder with what the model's would be.

    Args:
        path: File or folder.
        expected: The metadata that an export would write, or None to compare nothing. Labels that its card lacks are not
            compared: they came from `--labels`. Kinds are not compared with a file of version 0.1, which has none.

    Returns:
        `(problems, notes)`.
    """
    if expected is None:
        return [], []
    metadata, notes, compared = artifact.read_metadata(path), [], list(COMPARED)
    have, want = metadata.get("card") or {}, _plain(expected["card"])
    if have.get("labels") and not want["labels"]:
        compared.remove("labels")
        notes.append("its labels were not compared: the model has none (give --labels)")
    wrong = [key for key in compared if have.get(key) != want[key]]
    problems = [f"its card differs in {key}: {_shown(have.get(key))}, the model's says {_shown(want[key])}" for key in wrong]
    kinds = metadata.get("outputs")
    if kinds is not None and kinds != _plain(expected["outputs"]):
        problems.append(f"it says that its outputs are {_shown(kinds)}, and the model's are {_shown(expected['outputs'])}")
    return problems, notes


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _shown(value: Any, most: int = 120) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= most else f"{text[: most - 1]}…"
