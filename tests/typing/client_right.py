"""A program that uses the public API as its documentation says; the type checker must find nothing."""

from typing import assert_type

import keras
import numpy as np

import keras_resnet as kr
import resnet_export as rx


def grow(photos: np.ndarray) -> keras.Model:
    model = kr.resnet50(weights="torchvision/resnet50.IMAGENET1K_V2", num_classes=10, drop_path=0.1)
    deep = kr.grow(model, after="stage4_*", total_blocks=3, block="bottleneck", gate="zero_gamma")
    report = kr.identity_report(model, deep, photos)
    assert_type(report.eager, float)
    assert_type(report.exact, bool)
    worst = max(block.max for block in kr.drift(deep, photos))
    small, pruned = kr.prune(deep, photos, tolerance=worst)
    print(kr.model_info("resnet50").macs, kr.list_models("resnet*")[0].upper(), pruned)
    labels = kr.card(small)
    return kr.replace_head(small, num_classes=3, labels=None if labels is None else labels.labels)


def export(model: keras.Model, path: str) -> float:
    result = rx.to_onnx(model, path, opset=18, layout="nchw", outputs=["logits", "features"], progress=print)
    assert_type(result, rx.ExportResult)
    assert_type(result.report, rx.VerificationReport)
    assert_type(result.path, str)
    assert_type(result.report.comparisons[0].top1, float | None)
    again = rx.verify(path, model)
    return again.worst() if again.passed else max(comparison.relative for comparison in result.report.comparisons)


def quantise(path: str) -> list[str]:
    half = rx.to_float16(path, "half.onnx")
    small = rx.to_int8(path, "small.onnx", calibration="photos", max_drop=0.5)
    return [*half.notes, *small.notes, half.report.summary()]


def run(path: str) -> np.ndarray:
    session = rx.session(path, "cpu", threads=1)
    outputs = session.run(np.zeros((1, 224, 224, 3), "float32"))
    best = rx.predict(session, ["dog.png"], top=3)[0]
    print(best.labels, best.probabilities[0] + 1.0, rx.inspect(path).parameters + 1)
    for timing in rx.bench([path], batches=(1, 8)):
        print(timing.file, timing.throughput)
    return outputs["logits"]


def report_problems(path: str, model: keras.Model) -> int:
    try:
        rx.to_savedmodel(model, path)
    except rx.MismatchError as error:
        print(error.report)
        return error.exit_code
    except rx.ExportError as error:
        return error.exit_code
    return len(rx.diagnose().findings)
