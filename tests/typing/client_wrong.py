"""Wrong uses of the public API; each must be an error of the kind named, since an unneeded `type: ignore` is one too."""

import keras

import keras_resnet as kr
import resnet_export as rx


def grow() -> None:
    model = kr.resnet50(weight="imagenet")  # type: ignore[call-arg]
    kr.resnet50("imagenet")  # type: ignore[call-arg]
    kr.resnet50(num_classes="10")  # type: ignore[arg-type]
    kr.resnet51()  # type: ignore[attr-defined]
    kr.grow(model, blocks="2")  # type: ignore[arg-type]
    kr.grow(model, "block5_pool", 2)  # type: ignore[call-arg]
    kr.grow()  # type: ignore[call-arg]
    kr.list_models(5)  # type: ignore[arg-type]
    kr.list_models().upper()  # type: ignore[attr-defined]
    kr.drift(model, None).blocks[0].gait  # type: ignore[attr-defined]
    kr.model_info("resnet50").mac  # type: ignore[attr-defined]


def export(model: keras.Model, path: str) -> None:
    rx.to_onnx(model)  # type: ignore[call-arg]
    rx.to_onnx(model, path, opsett=18)  # type: ignore[call-arg]
    rx.to_onnx(model, path, opset="18")  # type: ignore[arg-type]
    rx.to_onnx(model, path, 18)  # type: ignore[call-arg]
    result = rx.to_onnx(model, path)
    result.paht  # type: ignore[attr-defined]
    result.report.passed = True  # type: ignore[misc]
    result.size + result.path  # type: ignore[operator]
    result.report.comparisons[0].top2  # type: ignore[attr-defined]
    rx.to_onxn(model, path)  # type: ignore[attr-defined]


def run(path: str) -> None:
    rx.to_int8(path, "small.onnx")  # type: ignore[call-arg]
    rx.predict(path, "dog.png", top="3")  # type: ignore[arg-type]
    rx.session(path).run([1.0], outputs=1)  # type: ignore[arg-type]
    rx.bench(path, batches=8)  # type: ignore[arg-type]
    rx.inspect(path).parameters.append(1)  # type: ignore[attr-defined]
    rx.MismatchError("it differs", 3)  # type: ignore[arg-type]
