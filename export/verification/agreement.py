"""Verifying an int8 file: its numbers are others by design, so its decisions are compared with the model's."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from ..artifact import find_scores
from ..conversion.prepare import Prepared
from ..results import Comparison, VerificationReport
from .cards import check_metadata
from .inputs import read_samples
from .metrics import measure
from .onnx_file import RUNTIMES, check_structure, onnx_runners
from .reference import Reference, expected

LEAST_AGREEMENT, MOST_SAMPLES, ROWS = 0.99, 512, 16


def verify_int8(
    path: str | os.PathLike[str], prepared: Prepared, samples: object, metadata: dict[str, Any] | None = None
) -> VerificationReport:
    """Compare the decisions of an int8 file with the model's on images: the best class, or the side of 0.5 per class.

    Args:
        path: ONNX file.
        prepared: The model and the file's inputs and outputs.
        samples: Folder of images (up to 512 are read), or an array in the file's layout.
        metadata: The metadata that an export would write, or None to compare none.

    Raises:
        UsageError: No output of the model scores classes, or the samples do not fit.
    """
    signature = prepared.signature
    shapes = {o.name: list(signature.model.outputs[o.index].shape) for o in signature.outputs if o.source != "layer"}
    scores = find_scores({"outputs": signature.kinds()}, shapes, file=str(path))
    output = next(output for output in signature.outputs if output.name == scores.output)
    problems = check_structure(path, signature)
    wrong, notes = check_metadata(path, metadata)
    problems, comparisons = problems + wrong, []
    if not problems:
        rows = read_samples(samples, signature, MOST_SAMPLES)
        want, got = [], []
        reference, runtime = Reference(signature), next(iter(RUNTIMES))
        run = onnx_runners(path)[runtime]
        for start in range(0, len(rows), ROWS):
            feeds = {signature.inputs[0].name: rows[start : start + ROWS]}
            found = run(feeds)
            if isinstance(found, str):
                problems.append(found)
                break
            want.append(expected(output, reference.values(feeds), signature.top))
            got.append(found[output.name])
        if not problems:
            want, got = np.concatenate(want), np.concatenate(got)
            share = scores.agreement(want, got)
            passed = share is not None and share >= LEAST_AGREEMENT
            comparison = Comparison(
                output.name, len(rows), list(rows.shape), "samples", runtime, passed=passed, **measure(want, got)
            )
            comparisons.append(dataclasses.replace(comparison, top1=share))
            if not passed:
                shown = "not measurable" if share is None else f"{share:.2%}"
                problems.append(
                    f"output `{output.name}`: agreement with the model is {shown} on {len(rows)} images, "
                    f"below {LEAST_AGREEMENT:.0%}"
                )
    return VerificationReport(
        str(path),
        not problems,
        "int8",
        1 - LEAST_AGREEMENT,
        tuple(comparisons),
        problems=tuple(problems),
        notes=tuple(notes),
    )
