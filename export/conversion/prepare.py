"""The model as it will be converted: pruned, in float32 or with dynamic size where that was asked for or is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..options import ExportOptions
from .rebuild import in_float32, with_dynamic_size, without_identity_blocks
from .signature import Signature, signature_of

if TYPE_CHECKING:
    import keras


PRUNED, PRUNED_WITH_TOLERANCE, FLOAT32, DYNAMIC_SIZE = "pruned", "pruned with a tolerance", "float32", "dynamic size"


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for conversion.

    Attributes:
        original: The model that was given. Nothing changes it.
        signature: Inputs and outputs of the file, and the model that is converted: the original, or a copy.
        copied: Why a copy is converted: some of the constants of this module; empty for the original itself.
        notes: What the user should know about the copy.
    """

    original: keras.Model
    signature: Signature
    copied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def prepare(
    model: keras.Model, options: ExportOptions | None = None, labels: list[str] | None = None, old_names: bool = False
) -> Prepared:
    """Make the copies that a conversion needs and decide the file's inputs and outputs.

    Args:
        model: A built Keras model.
        options: See `ExportOptions`; by default its defaults.
        labels: Class names; they make a linear output `logits`.
        old_names: See `signature_of`.

    Raises:
        UsageError: The model or an option does not fit.
    """
    original, copied, notes = model, [], []
    options = options or ExportOptions()
    if options.prune_tolerance is not None:
        model, note = without_identity_blocks(model, options.prune_tolerance)
        copied.append(PRUNED_WITH_TOLERANCE if options.prune_tolerance else PRUNED)
        notes.append(note)
    model, note = in_float32(model)
    if note:
        copied.append(FLOAT32)
        notes.append(note)
    if options.dynamic_size and (opened := with_dynamic_size(model)) is not model:
        model = opened
        copied.append(DYNAMIC_SIZE)
    signature = signature_of(
        model,
        outputs=options.outputs,
        layout=options.layout,
        input_dtype=options.input_dtype,
        resize=options.resize,
        top_k=options.top_k,
        output_kind=options.output_kind,
        labels=labels,
        old_names=old_names,
    )
    return Prepared(original, signature, tuple(copied), tuple(notes))
