"""Small ONNX graphs written as text, and random ones."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from resnet_export import artifact


def rng():
    return np.random.default_rng(0)


def normal(*shape, scale=1.0, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype("float32")


def write_graph(path, text, weights, *, opset=17, ir_version=8, weights_are_inputs=False, kinds=None, labels=None):
    """Write a graph in ONNX's text form, with weights as arrays, to a file.

    Args:
        path: File to write.
        text: The graph without header, e.g. `"g (float[N,3,8,8] x) => (float[N,4] y) { … }"`.
        weights: `{name: array}`.
        opset: Opset of the file.
        ir_version: IR version of the file; below 4, `weights_are_inputs` has to be true.
        weights_are_inputs: Whether the weights are listed as graph inputs too, as old exporters do.
        kinds: Kinds of the outputs for the metadata, or None for a file from elsewhere.
        labels: Class names for the metadata.
    """
    model = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n{text}')
    for name, content in weights.items():
        content = np.asarray(content)
        model.graph.initializer.append(numpy_helper.from_array(content, name))
        if weights_are_inputs:
            kind = helper.np_dtype_to_tensor_dtype(content.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, content.shape))
    if kinds is not None:
        metadata = {"outputs": kinds} | ({"card": {"name": "m", "labels": labels}} if labels else {})
        for key, value in artifact.encode_metadata(metadata).items():
            model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def random_graph(path, seed):
    """A random network of 3 to 9 steps whose numbers reach from 1e-9 to 1e7; every step but the first may be skipped over."""
    random = np.random.default_rng(seed)
    weights, lines, current, channels = {}, [], "x", 3
    scales = (1e-8, 1e-5, 1e-2, 1, 1, 1, 1, 100, 1e4)

    def weight(*shape, positive=False, scale=1.0):
        content = random.normal(size=shape) * scale
        weights[name := f"w{len(weights)}"] = (np.abs(content) + 0.1 * scale if positive else content).astype("float32")
        return name

    for step in range(random.integers(3, 10)):
        kind = random.choice(["conv", "scale", "square", "norm", "mask", "relu", "add", "mean", "sqrt", "clip", "pool"])
        kind, new, scale = "conv" if step == 0 else kind, f"t{step}", float(random.choice(scales))
        if kind == "conv":
            width = int(random.integers(2, 6))
            kernel = weight(width, channels, 3, 3, scale=scale / (3 * channels**0.5))
            lines.append(f"{new} = Conv<pads=[1,1,1,1]>({current}, {kernel})")
            channels = width
        elif kind == "scale":
            lines.append(f"{new} = Mul({current}, {weight(scale=scale)})")
        elif kind == "square":
            lines.append(f"{new} = Mul({current}, {current})")
        elif kind == "norm":
            parts = [
                weight(channels, positive=True),
                weight(channels),
                weight(channels, scale=scale),
                weight(channels, positive=True),
            ]
            lines.append(f"{new} = BatchNormalization({current}, {', '.join(parts)})")
        elif kind == "mask":
            lines += [
                f"{new}b = Greater({current}, {weight()})",
                f"{new}c = Cast<to=1>({new}b)",
                f"{new} = Mul({current}, {new}c)",
            ]
        elif kind == "relu":
            lines.append(f"{new} = {random.choice(['Relu', 'Sigmoid', 'HardSwish', 'Softplus'])}({current})")
        elif kind == "add":
            lines += [f"{new}a = Mul({current}, {weight(scale=scale)})", f"{new} = Add({current}, {new}a)"]
        elif kind == "mean":
            lines += [f"{new}m = ReduceMean<axes=[2,3]>({current})", f"{new} = Sub({current}, {new}m)"]
        elif kind == "sqrt":
            weights[epsilon := f"w{len(weights)}"] = np.float32(random.choice([1e-12, 1e-5, 1e-3]))
            lines += [f"{new}q = Mul({current}, {current})", f"{new}m = ReduceMean<axes=[1]>({new}q)"]
            lines += [f"{new}e = Add({new}m, {epsilon})", f"{new}s = Sqrt({new}e)", f"{new} = Div({current}, {new}s)"]
        elif kind == "clip":
            low, high = np.float32(-scale), np.float32(3 * scale)
            weights[f"low{step}"], weights[f"high{step}"] = low, high
            lines.append(f"{new} = Clip({current}, low{step}, high{step})")
        else:
            lines.append(f"{new} = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>({current})")
        current = new
    lines.append(f"y = Conv({current}, {weight(4, channels, 1, 1)})")
    text = "g (float[N,3,8,8] x) => (float[N,4,8,8] y) {\n" + "\n".join(lines) + "\n}"
    return write_graph(path, text, weights)
