"""From a Keras model to a verified ONNX file or SavedModel folder: the whole flow, from top to bottom.

model -> prepare (copies, inputs, outputs) -> convert -> metadata -> temporary file -> verification of that file -> rename.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from . import artifact
from .conversion.convert import FALLBACK, FALLBACK_NOTE, convert, weights_of
from .conversion.prepare import prepare
from .conversion.savedmodel import MARK, SIGNATURE, write_savedmodel
from .errors import MismatchError, UsageError
from .metadata import TOLERANCES, metadata_of, stamp
from .options import ExportOptions
from .results import ExportResult, VerificationReport
from .verification.agreement import Budget, verify_int8
from .verification.inputs import load_samples, read_samples
from .verification.onnx_file import verify_onnx
from .verification.savedmodel import load, verify_savedmodel

if TYPE_CHECKING:
    import keras
    import numpy as np

    Images = str | os.PathLike[str] | np.ndarray
    Progress = Callable[[str], object]


def to_onnx(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    opset: int = 17,
    layout: str = "nhwc",
    input_dtype: str = "float32",
    resize: bool = False,
    outputs: Iterable[str] | None = None,
    output_kind: str | dict[str, str] | None = None,
    dynamic_size: bool = False,
    top_k: int | None = None,
    prune_identity: float | bool | None = None,
    labels: list[str] | None = None,
    external_data: bool | None = None,
    precision: str = "float32",
    calibration: Images | None = None,
    max_drop: float = 1.0,
    max_error: float = 0.1,
    target: str = "cpu",
    samples: Images | None = None,
    overwrite: bool = True,
    keep_failed: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a Keras model to a verified ONNX file.

    Unlike `model.export(format="onnx")`, a file whose outputs are not the model's is not written.

    Args:
        model: A built Keras model, Functional or Sequential. It is not changed; a model in mixed precision is converted as a copy
            in float32.
        path: File to write.
        opset: ONNX opset, 13 to 23.
        layout: `"nhwc"` or `"nchw"`: layout of image inputs.
        input_dtype: `"float32"` or `"uint8"`; the latter for a model that takes pixels.
        resize: Take uint8 images of any size, resized and cropped in the graph as the model's card says.
        outputs: Output names; by default the model's own outputs. See `conversion.signature.signature_of` for those on offer.
        output_kind: What the only output means, one of `options.KINDS`, or `{output name: kind}`. By default it is read from the
            model's graph.
        dynamic_size: Accept images of any height and width.
        top_k: Add the outputs `top_classes` and `top_probabilities` with that many classes.
        prune_identity: True leaves out residual blocks that compute the identity, a number those whose gate is at most that; see
            `keras_resnet.prune`.
        labels: Class names in the order of the classes; by default the card's.
        external_data: Whether weights go to a second file, `path + ".data"`; by default only where one file would pass 2 GB.
        precision: `"float32"`, `"float16"` or `"int8"`; see `to_float16` and `to_int8`, which get the verified float32 file.
        calibration: Images that set int8's ranges; see `to_int8`.
        max_drop: Allowed loss of agreement by int8, in percent; see `to_int8`.
        max_error: Allowed relative error of int8 outputs that score no classes; see `to_int8`.
        target: What int8 is for; see `to_int8`.
        samples: Images to verify on in addition to random batches: a folder, or an array in the file's layout.
        overwrite: Whether `path` may exist.
        keep_failed: Keep a file that failed verification as `path + ".failed"`.
        progress: Callback that gets the name of each step.

    Returns:
        `ExportResult`

    Raises:
        UsageError: An option or the model does not fit, or the file cannot be written.
        MismatchError: The file does not compute what the model computes. It is removed.

    Example:
        >>> result = rx.to_onnx(kr.resnet50(), "resnet50.onnx")
        >>> result.report.passed
        True
    """
    step = progress or (lambda name: None)
    options = ExportOptions(
        opset=opset,
        layout=layout,
        input_dtype=input_dtype,
        resize=resize,
        outputs=None if outputs is None else outputs if isinstance(outputs, str) else tuple(outputs),  # type: ignore[arg-type]
        output_kind=output_kind,
        dynamic_size=dynamic_size,
        top_k=top_k,
        prune_identity=prune_identity,
    )
    artifact.check_target(path, overwrite)
    if precision != "float32":
        lower = _lower_precision(precision, calibration, Budget(max_drop, max_error), target, external_data)
        return _through_float32(model, path, options, labels, samples, lower, precision, overwrite, keep_failed, step)
    prepared = prepare(model, options, labels)
    notes = list(prepared.notes)
    samples = None if samples is None else read_samples(samples, prepared.signature)
    with artifact.publishing(path, overwrite, keep_failed) as work:
        step("convert")
        converted, method = convert(prepared.signature, opset)
        if method == FALLBACK:
            notes.append(FALLBACK_NOTE)
        metadata = metadata_of(prepared, options, labels)
        stamp(converted, metadata)
        step("write")
        artifact.write_onnx(converted, work, external_data)
        step("verify")
        weights = weights_of(converted)
        del converted
        report = verify_onnx(work, prepared, opset=opset, weights=weights, metadata=metadata, samples=samples)
        return _result(path, work, report, method, notes)


def to_savedmodel(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    outputs: Iterable[str] | None = None,
    output_kind: str | dict[str, str] | None = None,
    layout: str = "nhwc",
    labels: list[str] | None = None,
    samples: Images | None = None,
    overwrite: bool = True,
    keep_failed: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Export a Keras model to a verified SavedModel folder, which loads without Keras and without this package.

    The signatures are `serving_default` (from `images` to the outputs), `features` (the input of the global pooling; only of
    classifiers) and, for image models of fixed size, `serving_bytes` (`image_bytes`: encoded JPEG, PNG, GIF or BMP files of any
    size).

    Args:
        model: A built Keras model, Functional or Sequential. A model in mixed precision is rebuilt in float32.
        path: Folder to write. The metadata are in its file `keras_resnet.json`.
        outputs, output_kind, layout, labels, samples: See `to_onnx`.
        overwrite: Whether the folder may exist; it is replaced at the end.
        keep_failed: Keep a folder that failed verification as `path + ".failed"`.
        progress: Callback that gets the name of each step.

    Returns:
        `ExportResult`

    Raises:
        UsageError: An option or the model does not fit, or the folder cannot be written.
        MismatchError: The folder does not compute what the model computes. It is removed.
    """
    step = progress or (lambda name: None)
    artifact.check_target(path, overwrite, MARK)
    names = None if outputs is None else outputs if isinstance(outputs, str) else tuple(outputs)
    options = ExportOptions(outputs=names, output_kind=output_kind, layout=layout)  # type: ignore[arg-type]
    prepared = prepare(model, options, labels)
    metadata = metadata_of(prepared, options, labels)
    samples = None if samples is None else read_samples(samples, prepared.signature)
    with artifact.publishing(path, overwrite, keep_failed, MARK) as work:
        step("write")
        write_savedmodel(prepared.signature, work)
        artifact.write_folder_metadata(work, metadata)
        step("verify")
        report = verify_savedmodel(work, prepared, metadata=metadata, samples=samples)
        return _result(path, work, report, "savedmodel", list(prepared.notes))


def verify(
    path: str | os.PathLike[str],
    model: keras.Model,
    *,
    labels: list[str] | None = None,
    samples: Images | None = None,
    seed: int = 0,
    max_drop: float = 1.0,
    max_error: float = 0.1,
) -> VerificationReport:
    """Compare an ONNX file or SavedModel folder with the model that it is said to come from.

    Args:
        path: File or folder.
        model: The Keras model.
        labels: Class names that the file must hold; by default those of the model's card.
        samples: Images to compare on in addition to random batches: a folder, or an array in the file's layout.
        seed: Seed of the random batches.
        max_drop, max_error: How much an int8 file may differ; see `to_int8`.

    Returns:
        `VerificationReport`; `passed` says whether everything agreed. Nothing is raised on a mismatch.

    Raises:
        UsageError: The file is missing or damaged, or the model cannot be read.
    """
    folder, metadata = Path(path).is_dir(), artifact.read_metadata(path)
    if "options" not in metadata and not folder:
        raise UsageError(
            f"{path} was not written by resnet-export, so it does not say how its inputs and outputs map to the model's"
        )
    options = ExportOptions.from_metadata(metadata.get("options") or {})
    is_old = "outputs" not in metadata
    if is_old and options.outputs is None and "options" in metadata:
        options = dataclasses.replace(options, outputs=_own_outputs_in(path))
    stated = labels if labels is not None else (metadata.get("card") or {}).get("labels")
    prepared = prepare(model, options, stated, old_names=is_old)
    expected = None if folder and "options" not in metadata else metadata_of(prepared, options, labels)
    precision = (metadata.get("tolerances") or {}).get("precision", "float32")
    if folder:
        return verify_savedmodel(path, prepared, metadata=expected, samples=samples, seed=seed)
    if precision == "int8":
        if samples is None:
            raise UsageError(f"{path} is int8; give images on which to compare it with the model (--samples)")
        return verify_int8(path, prepared, samples, expected, Budget(max_drop, max_error))
    return verify_onnx(path, prepared, opset=options.opset, precision=precision, metadata=expected, samples=samples, seed=seed)


def _own_outputs_in(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The outputs of a file or folder of version 0.1, without those that `top_k` adds."""
    if Path(path).is_dir():
        return tuple(load(path).signatures[SIGNATURE].structured_outputs)
    outputs = artifact.read_proto(path, external_data=False).graph.output
    return tuple(value.name for value in outputs if not value.name.startswith("top_"))


def require(report: VerificationReport) -> VerificationReport:
    """Return a report that passed; raise for one that did not.

    Raises:
        MismatchError: Carries the report.
    """
    if not report.passed:
        raise MismatchError(report.summary(), report)
    return report


def _result(path: str | os.PathLike[str], work: Path, report: VerificationReport, method: str, notes: list[str]) -> ExportResult:
    """The result of an export, if the file in the temporary folder passed."""
    problems = tuple(problem.replace(str(work), str(path)) for problem in report.problems)
    report = require(dataclasses.replace(report, path=str(path), problems=problems))
    return ExportResult(str(path), report, artifact.digest(work), method, artifact.disk_size(work), tuple(notes))


def _lower_precision(
    precision: str, calibration: Images | None, budget: Budget, target: str, external_data: bool | None
) -> Callable:
    """The function that makes the file in lower precision, its arguments checked before the float32 export begins."""
    import functools

    from .quantization.float16 import to_float16
    from .quantization.int8 import check_target, to_int8

    if precision not in TOLERANCES:
        raise UsageError(f"`precision` must be one of {', '.join(TOLERANCES)}, got {precision!r}")
    if external_data:
        raise UsageError(f"`external_data` needs float32, got {precision}")
    if precision == "float16":
        return to_float16
    if calibration is None:
        raise UsageError("`precision` int8 needs `calibration` images")
    check_target(target)
    return functools.partial(
        to_int8, calibration=load_samples(calibration), max_drop=budget.max_drop, max_error=budget.max_error, target=target
    )


def _through_float32(
    model: keras.Model,
    path: str | os.PathLike[str],
    options: ExportOptions,
    labels: list[str] | None,
    samples: Images | None,
    lower: Callable,
    precision: str,
    overwrite: bool,
    keep_failed: bool,
    step: Progress,
) -> ExportResult:
    """A float32 file in a temporary folder, and from it the file that was asked for."""
    from .quantization.source import open_source
    from .quantization.table import side_by_side

    target = artifact.check_target(path, overwrite)
    with artifact.temporary_folder(f".{target.name}.", target.parent) as folder:
        full = folder / target.name
        fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        first = to_onnx(model, full, **fields, labels=labels, samples=samples, progress=step)
        step(precision)
        source = open_source(full, name=f"the float32 form of {path}")
        result = lower(source, path, samples=samples, overwrite=overwrite, keep_failed=keep_failed)
        step("bench")
        result = side_by_side(source, result)
    return dataclasses.replace(result, notes=(*first.notes, *result.notes))
