"""What the weights in a file must be, worked out from the Keras layers alone: the passes' folding, done a second way."""

from dataclasses import dataclass

import numpy as np

# What may follow a folded convolution without changing its weights any further.
ENDS_FOLDING = (
    "Activation ReLU LeakyReLU PReLU ELU Softmax Add Concatenate Maximum Average Multiply MaxPooling1D MaxPooling2D MaxPooling3D"
    " AveragePooling1D AveragePooling2D AveragePooling3D GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D"
    " GlobalMaxPooling2D Conv1D Conv2D Conv3D DepthwiseConv2D SeparableConv2D Dense Flatten ZeroPadding1D ZeroPadding2D"
    " ZeroPadding3D Cropping2D ResidualAdd"
).split()


@dataclass(frozen=True)
class Expected:
    """A weight that a file must hold.

    Attributes:
        array: its values, float64.
        exact: False where a later layer may still scale its channels; then only the ratios within a channel are known.
        axis: the channel axis, for that case.
        ordered: False where the rows may have been permuted (behind a Flatten).
    """

    array: np.ndarray
    exact: bool = True
    axis: int = 0
    ordered: bool = True


def refold(model):
    """`{initialiser name: [Expected, …]}` of all convolutions, dense layers and free batch norms of a Keras model.

    Several entries where layers of nested models share a path. Layers that are called more than once are left out.
    """
    found = {}
    for path, layer, followers in _layers_with_followers(model):
        for name, expected in _of_layer(path, layer, followers):
            found.setdefault(name, []).append(expected)
    return found


END, UNKNOWN = "end", "unknown"


def _layers_with_followers(model, prefix=""):
    """Every layer that is called once, with the chain of layers behind it as long as each is the only user of the one before.

    Yields:
        `(path, layer, [follower, …])`; the last follower is `END` where the chain forks or ends, `UNKNOWN` where it leaves a
        nested model.
    """
    import keras

    graph = getattr(model, "_functional", None) or model
    nodes = [node for depth in sorted(graph._nodes_by_depth, reverse=True) for node in graph._nodes_by_depth[depth]]
    users, calls = {}, {}
    for node in nodes:
        calls[node.operation] = calls.get(node.operation, 0) + 1
        for tensor in node.input_tensors:
            users.setdefault(id(tensor), []).append(node)
    outputs = {id(tensor): UNKNOWN if prefix else END for tensor in graph.outputs}
    for node in nodes:
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


def _of_layer(path, layer, followers):
    import keras

    kind = type(layer).__name__
    if isinstance(layer, keras.layers.BatchNormalization):
        yield from _free_batch_norm(path, layer)
    elif kind in _TO_ONNX and getattr(layer, "data_format", "channels_last") == "channels_last":
        yield from _folded(layer, followers, *_TO_ONNX[kind])


def _array(variable):
    return np.asarray(variable, "float64")


def _scale_and_shift(layer):
    variance, mean = _array(layer.moving_variance), _array(layer.moving_mean)
    scale = (_array(layer.gamma) if layer.scale else 1.0) / np.sqrt(variance + layer.epsilon)
    return scale, (_array(layer.beta) if layer.center else 0.0) - mean * scale


def _free_batch_norm(path, layer):
    scale, shift = _scale_and_shift(layer)
    yield f"{path}.1", Expected(scale)
    yield f"{path}.2", Expected(shift)


def _conv(kernel):
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _depthwise(kernel):
    spatial = kernel.shape[:-2]
    return np.moveaxis(kernel, (-2, -1), (0, 1)).reshape(-1, 1, *spatial)


_TO_ONNX = {
    "Conv2D": (_conv, 0),
    "Conv3D": (_conv, 0),
    "DepthwiseConv2D": (_depthwise, 0),
    "Conv2DTranspose": (_conv, 1),
    "Dense": (lambda kernel: kernel, 1),
}


def _folded(layer, followers, to_onnx, axis):
    import keras

    kernel = to_onnx(_array(layer.kernel))
    scale, shift = np.ones(kernel.shape[axis]), _array(layer.bias) if layer.use_bias else 0.0
    rest = list(followers)
    plain = layer.activation is keras.activations.linear
    while plain and _changes_nothing(rest[0]) or plain and _normalises(rest[0], kernel.ndim):
        follower = rest.pop(0)
        if not _changes_nothing(follower):
            factor, offset = _scale_and_shift(follower)
            scale, shift = scale * factor, shift * factor + offset
    exact = not plain or _ends_folding(rest[0])
    along = [1] * kernel.ndim
    along[axis] = -1
    yield layer.kernel.path, Expected(kernel * scale.reshape(along), exact, axis, ordered=type(layer).__name__ != "Dense")
    if exact and np.ndim(shift):
        yield f"{layer.kernel.path.rsplit('/', 1)[0]}/bias", Expected(shift)


def _changes_nothing(layer):
    import keras

    linear = isinstance(layer, keras.layers.Activation) and layer.activation is keras.activations.linear
    return linear or isinstance(layer, keras.layers.Dropout | keras.layers.SpatialDropout2D)


def _normalises(layer, rank):
    import keras

    return isinstance(layer, keras.layers.BatchNormalization) and layer.axis in (-1, rank - 1)


def _ends_folding(layer):
    import keras

    return layer == END or isinstance(layer, keras.Layer) and type(layer).__name__ in ENDS_FOLDING


def error(have, expected):
    """How far an array is from an `Expected`, as a share of the largest value of its channel."""
    have, want = np.asarray(have, "float64"), expected.array
    if have.shape != want.shape:
        return np.inf
    if not expected.exact:
        want = _rescaled(want, have, expected.axis)
    largest = _per_channel_max(want, expected.axis)
    worst = float((np.abs(have - want) / largest).max(initial=0))
    if worst > 1e-6 and not expected.ordered and have.ndim == 2:
        worst = min(worst, float((np.abs(np.sort(have, 0) - np.sort(want, 0)) / largest).max(initial=0)))
    return worst


def _per_channel_max(array, axis):
    if array.ndim < 2:
        return max(float(np.abs(array).max(initial=0)), 1e-30)
    others = tuple(other for other in range(array.ndim) if other != axis)
    return np.maximum(np.abs(array).max(axis=others, keepdims=True), 1e-30)


def _rescaled(want, have, axis):
    """`want` with each channel scaled to fit `have` best: all that is known where a later layer scales channels."""
    others = tuple(other for other in range(want.ndim) if other != axis)
    power = (want * want).sum(axis=others, keepdims=True)
    return want * np.divide((want * have).sum(axis=others, keepdims=True), power, where=power > 0, out=np.ones_like(power))


REFOLD_TOLERANCE = 2e-6


def compare_refolded(have, model):
    """Compare a file's weights with the refolded Keras weights.

    Args:
        have: `{initialiser name: array}`.
        model: Keras model.

    Returns:
        `(number compared, problems)`.
    """
    compared, problems = 0, []
    for name, candidates in refold(model).items():
        if name not in have or name.endswith((".1", ".2")) and f"{name[:-2]}.4" not in have:  # no BatchNormalization node
            continue
        compared += 1
        worst = min(error(have[name], expected) for expected in candidates)
        if worst > REFOLD_TOLERANCE:
            problems.append(
                f"weight {name!r} is not the Keras weight with its batch norm folded in: error {worst:.3g} of its channel"
            )
    return compared, problems
