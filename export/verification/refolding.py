"""What the weights in a file must be, worked out from the Keras layers alone: the passes' folding, done a second way.

A convolution or dense layer absorbs the batch norms after it. How many of them it absorbed in a file depends on the graph form (a
dilated convolution of dynamic size absorbs none), so every number of them is accepted. Where something else may follow that could
be absorbed too (an addition, an activation that begins with one), only the ratios within a channel are known; where not even
those match, the weight is compared through the outputs only, which the report says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

# Layers and activation functions that cannot be absorbed into the weights before them, in whole or in part.
ENDS_FOLDING = (
    "ReLU LeakyReLU PReLU ELU Softmax Add Concatenate Maximum Average Multiply MaxPooling1D MaxPooling2D MaxPooling3D"
    " AveragePooling1D AveragePooling2D AveragePooling3D GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D"
    " GlobalMaxPooling2D Conv1D Conv2D Conv3D DepthwiseConv2D SeparableConv2D Dense Flatten ZeroPadding1D ZeroPadding2D"
    " ZeroPadding3D Cropping2D ResidualAdd"
).split()
ENDING_ACTIVATIONS = "relu relu6 sigmoid tanh softmax softplus softsign elu selu gelu silu leaky_relu exponential mish".split()


@dataclass(frozen=True)
class Expected:
    """A weight that a file must hold.

    Attributes:
        forms: The values that it may have, float64.
        sure: Whether it has one of them; False where a later operation may still have changed its channels.
        axis: The channel axis, for that case; None for a bias, of which nothing is known then.
        ordered: False where the rows may have been permuted (after a Flatten).
    """

    forms: tuple[np.ndarray, ...]
    sure: bool = True
    axis: int | None = 0
    ordered: bool = True


def refold(model: keras.Model) -> dict[str, list[Expected]]:
    """Return `{initialiser name: [Expected, …]}` of all convolutions, dense layers and free batch norms of a Keras model.

    Several entries where layers of nested models share a path. Layers that are called more than once are left out.
    """
    found: dict[str, list[Expected]] = {}
    for path, layer, followers in _layers_with_followers(model):
        for name, expected in _of_layer(path, layer, followers):
            found.setdefault(name, []).append(expected)
    return found


END, UNKNOWN = "end", "unknown"


def _layers_with_followers(model, prefix=""):
    """Every layer that is called once, with the chain of layers after it as long as each is the only user of the one before.

    Yields:
        `(path, layer, [follower, …])`; the last follower is `END` where the chain forks or ends, `UNKNOWN` where it leaves a
        nested model.
    """
    import keras

    from keras_resnet.graphs import nodes, symbolic_graph

    graph = symbolic_graph(model)
    users, calls = {}, {}
    for node in nodes(graph):
        calls[node.operation] = calls.get(node.operation, 0) + 1
        for tensor in node.input_tensors:
            users.setdefault(id(tensor), []).append(node)
    outputs = {id(tensor): UNKNOWN if prefix else END for tensor in graph.outputs}
    for node in nodes(graph):
        operation = node.operation
        if calls[operation] != 1:
            continue
        if isinstance(operation, keras.Model) and operation.inputs:
            yield from _layers_with_followers(operation, f"{prefix}{operation.name}/")
        elif isinstance(operation, keras.Layer):
            yield prefix + operation.name, operation, _chain(node, users, calls, outputs)


def _chain(node, users, calls, outputs):
    chain = []
    while True:
        tensor = id(node.output_tensors[0]) if len(node.output_tensors) == 1 else None
        after = users.get(tensor, [])
        if len(after) != 1 or tensor in outputs:
            return [*chain, outputs.get(tensor, END)]
        node = after[0]
        if calls[node.operation] != 1:
            return [*chain, UNKNOWN]
        chain.append(node.operation)


def _of_layer(path: str, layer: keras.Layer, followers: Sequence[Any]) -> Iterator[tuple[str, Expected]]:
    import keras

    kind = type(layer).__name__
    if isinstance(layer, keras.layers.BatchNormalization):
        yield from _free_batch_norm(path, layer)
    elif kind in _TO_ONNX and getattr(layer, "data_format", "channels_last") == "channels_last" and _has_plain_kernel(layer):
        yield from _folded(layer, followers, *_TO_ONNX[kind])


def _has_plain_kernel(layer: keras.Layer) -> bool:
    """Whether the kernel is a variable; with LoRA enabled it is computed from several."""
    return hasattr(layer.kernel, "path")


def _array(variable: Any) -> np.ndarray:
    return np.asarray(variable, "float64")


def _scale_and_shift(layer: keras.Layer) -> tuple[np.ndarray, np.ndarray]:
    variance, mean = _array(layer.moving_variance), _array(layer.moving_mean)
    scale = (_array(layer.gamma) if layer.scale else 1.0) / np.sqrt(variance + layer.epsilon)
    return scale, (_array(layer.beta) if layer.center else 0.0) - mean * scale


def _free_batch_norm(path: str, layer: keras.Layer) -> Iterator[tuple[str, Expected]]:
    scale, shift = _scale_and_shift(layer)
    yield f"{path}.1", Expected((scale,))
    yield f"{path}.2", Expected((shift,))


def _conv(kernel: np.ndarray) -> np.ndarray:
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _depthwise(kernel: np.ndarray) -> np.ndarray:
    spatial = kernel.shape[:-2]
    return np.moveaxis(kernel, (-2, -1), (0, 1)).reshape(-1, 1, *spatial)


_TO_ONNX = {
    "Conv2D": (_conv, 0),
    "Conv3D": (_conv, 0),
    "DepthwiseConv2D": (_depthwise, 0),
    "Conv2DTranspose": (_conv, 1),
    "Dense": (lambda kernel: kernel, 1),
}


def _folded(
    layer: keras.Layer, followers: Sequence[Any], to_onnx: Callable[[np.ndarray], np.ndarray], axis: int
) -> Iterator[tuple[str, Expected]]:
    """The kernel and the bias of a layer, with as many of the batch norms after it as may have been absorbed."""
    import keras

    kernel = to_onnx(_array(layer.kernel))
    scale, shift = np.ones(kernel.shape[axis]), np.zeros(kernel.shape[axis])
    if layer.use_bias:
        shift = shift + _array(layer.bias)
    folds, rest = [(scale, shift)], list(followers)
    linear = layer.activation is keras.activations.linear
    while linear and (_changes_nothing(rest[0]) or _normalises(rest[0], kernel.ndim)):
        follower = rest.pop(0)
        if not _changes_nothing(follower):
            factor, offset = _scale_and_shift(follower)
            scale, shift = scale * factor, shift * factor + offset
            folds.append((scale, shift))
    sure = _ends_folding(rest[0]) if linear else _is_ending(layer.activation)
    along = [1] * kernel.ndim
    along[axis] = -1
    kernels = tuple(kernel * factor.reshape(along) for factor, _ in folds)
    yield layer.kernel.path, Expected(kernels, sure, axis, ordered=type(layer).__name__ != "Dense")
    yield f"{layer.kernel.path.rsplit('/', 1)[0]}/bias", Expected(tuple(offset for _, offset in folds), sure, None)


def _changes_nothing(layer: Any) -> bool:
    import keras

    linear = isinstance(layer, keras.layers.Activation) and layer.activation is keras.activations.linear
    return linear or isinstance(layer, keras.layers.Dropout | keras.layers.SpatialDropout2D | keras.layers.Identity)


def _normalises(layer: Any, rank: int) -> bool:
    import keras

    return isinstance(layer, keras.layers.BatchNormalization) and layer.axis in (-1, rank - 1)


def _ends_folding(layer: Any) -> bool:
    import keras

    from keras_resnet.graphs import is_of_keras

    if layer == END:
        return True
    if isinstance(layer, keras.layers.Activation):
        return _is_ending(layer.activation)
    return isinstance(layer, keras.Layer) and is_of_keras(layer) and type(layer).__name__ in ENDS_FOLDING


def _is_ending(activation: Callable) -> bool:
    """Whether an activation function is one of Keras' own that does not begin with an addition or a multiplication."""
    import keras

    return any(activation is getattr(keras.activations, name, None) for name in ENDING_ACTIVATIONS)


def error(have: np.ndarray, expected: Expected) -> float:
    """Return how far an array is from the nearest form of an `Expected`, as a share of the largest value of its channel."""
    have = np.asarray(have, "float64")
    return min(_error(have, form, expected) for form in expected.forms)


def _error(have: np.ndarray, want: np.ndarray, expected: Expected) -> float:
    if have.shape != want.shape:
        return np.inf
    if not expected.sure and expected.axis is not None:
        want = _rescaled(want, have, expected.axis)
    largest = _per_channel_max(want, expected.axis)
    worst = float((np.abs(have - want) / largest).max(initial=0))
    if worst > 1e-6 and not expected.ordered and have.ndim == 2:
        worst = min(worst, float((np.abs(np.sort(have, 0) - np.sort(want, 0)) / largest).max(initial=0)))
    return worst


def _per_channel_max(array: np.ndarray, axis: int | None) -> np.ndarray | float:
    if array.ndim < 2 or axis is None:
        return max(float(np.abs(array).max(initial=0)), 1e-30)
    others = tuple(other for other in range(array.ndim) if other != axis)
    return np.maximum(np.abs(array).max(axis=others, keepdims=True), 1e-30)


def _rescaled(want: np.ndarray, have: np.ndarray, axis: int) -> np.ndarray:
    """`want` with each channel scaled to fit `have` best: all that is known where a later layer scales channels."""
    others = tuple(other for other in range(want.ndim) if other != axis)
    power = (want * want).sum(axis=others, keepdims=True)
    return want * np.divide((want * have).sum(axis=others, keepdims=True), power, where=power > 0, out=np.ones_like(power))


REFOLD_TOLERANCE = 2e-6


def compare_refolded(have: dict[str, np.ndarray], model: keras.Model) -> tuple[int, int, list[str]]:
    """Compare a file's weights with the refolded Keras weights.

    Args:
        have: `{initialiser name: array}`.
        model: Keras model.

    Returns:
        `(compared, through_outputs, problems)`: how many weights were compared number by number, how many could not be
        because the graph does not determine them, and messages on those that are wrong.
    """
    compared, through_outputs, problems = 0, 0, []
    for name, candidates in refold(model).items():
        if name not in have or name.endswith((".1", ".2")) and f"{name[:-2]}.4" not in have:  # no BatchNormalization node
            continue
        worst = min(error(have[name], expected) for expected in candidates)
        if worst <= REFOLD_TOLERANCE:
            compared += 1
        elif not np.isfinite(worst) or not all(expected.sure for expected in candidates):
            through_outputs += 1  # stored in another shape, or changed by what follows
        else:
            compared += 1
            problems.append(
                f"weight {name!r} is not the Keras weight with its batch norm folded in: error {worst:.3g} of its channel"
            )
    return compared, through_outputs, problems
