"""Every use of a private API of Keras, TensorFlow or tf2onnx by the conversion, in one place.

Checked against Keras 3.15.1 with TensorFlow 2.21.0 and tf2onnx 1.17.0; `tests/export/test_keras_internals.py` fails when one of
them changes.

| private API | why it is needed |
|---|---|
| `keras.src.backend.tensorflow.nn.tf` | grouped and dilated convolutions are traced as one node each |
| `keras.src.backend.tensorflow.core.tf` | names of models and layers that TensorFlow refuses as name scopes |
| `keras.src.backend.tensorflow.nn.adaptive_…_pool` | adaptive pooling to one pixel, and of dynamic size, is traced |
| `keras.layers.RandomCrop.get_random_transformation` | it crops nothing in inference, but computes where, from known sizes only |
| `keras.layers.CenterCrop.transform_images` | the size of its output is noted |
| `keras.layers.Equalization.compute_output_spec` | returns its input itself, of which no model can be built |
| `keras.layers.TimeDistributed.call` | is traced as one call where the number of steps is unknown |
| `keras.layers.RNN.call` | with `unroll=True` it is traced as a loop where the number of steps is unknown |
| `keras.src.ops.image.resize` | `UpSampling2D` with interpolation is traced with dynamic height and width |
| `tf.image.resize` | public, but replaced for a moment, because ONNX lacks most of its filters |
| `keras.Layer.__call__` | public, but replaced for a moment, to learn which layer made a tensor |
| `keras.layers.BatchNormalization.call` | public, but replaced for a moment, to learn what batch norms get |
| `object_name_uids` of Keras' global state | layers inside a rebuilt layer are named the same each time |
| `tf2onnx.tfonnx.run_rewriters` | searches for loops in graphs without any are left out |
| `tf.Variable._handle_name` | names of variables that TensorFlow refuses as name scopes when it saves |
"""

from __future__ import annotations

import collections
import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras
    import tensorflow as tf


class _Overlay:
    """A module seen through a few replacements."""

    def __init__(self, module: object, **replacements: object) -> None:
        self._module = module
        self.__dict__.update(replacements)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


@contextlib.contextmanager
def _replaced(owner: object, name: str, replacement: object) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, real)


@contextlib.contextmanager
def plain_grouped_convolutions(to_convert: bool) -> Iterator[None]:
    """Trace grouped convolutions without the `tf.function(jit_compile=True)` around them, which no converter can enter.

    With `to_convert` unset, the graph is to run in TensorFlow, which has those of three dimensions only with XLA.
    """
    import keras.src.backend.tensorflow.nn as keras_nn

    real = keras_nn.conv

    @functools.wraps(real)
    def conv(inputs: tf.Tensor, *args: Any, **kwargs: Any) -> tf.Tensor:
        if not to_convert and len(inputs.shape) == 5:
            return real(inputs, *args, **kwargs)
        # Made at the call, over what other patches have made of `tf` by then.
        with _replaced(keras_nn, "tf", _Overlay(keras_nn.tf, function=_without_function)):
            return real(inputs, *args, **kwargs)

    with _replaced(keras_nn, "conv", conv):
        yield


def _without_function(func: Callable | None = None, **options: object) -> Callable:
    return func if func is not None else lambda wrapped: wrapped


@contextlib.contextmanager
def native_dilation() -> Iterator[None]:
    """Trace dilated convolutions as one node with `dilations`, which TensorFlow has but cannot run on every device.

    `tf.nn.convolution` and `tf.nn.depthwise_conv2d` compute them through SpaceToBatchND instead, with about 20 nodes of shape
    arithmetic where height and width are dynamic. A graph traced here is for conversion only.
    """
    import keras.src.backend.tensorflow.nn as keras_nn

    replacements = {f.__name__: f for f in (convolution, depthwise_conv2d, separable_conv2d)}
    with _replaced(keras_nn, "tf", _Overlay(keras_nn.tf, nn=_Overlay(keras_nn.tf.nn, **replacements))):
        yield


@contextlib.contextmanager
def other_resize(resize: Callable[..., tf.Tensor]) -> Iterator[None]:
    """Trace `tf.image.resize` as another function, which gets the real one as its first argument."""
    import tensorflow as tf

    with _replaced(tf.image, "resize", functools.partial(resize, tf.image.resize)):
        yield


@contextlib.contextmanager
def names_from_the_start() -> Iterator[None]:
    """Let Keras name new layers as in a new process, and carry on afterwards as if they had not been made."""
    from keras.src.backend.common import global_state

    before = global_state.get_global_attribute("object_name_uids")
    global_state.set_global_attribute("object_name_uids", collections.defaultdict(int))
    try:
        yield
    finally:
        global_state.set_global_attribute("object_name_uids", before)


@contextlib.contextmanager
def other_adaptive_pooling(average: Callable[..., tf.Tensor], maximum: Callable[..., tf.Tensor]) -> Iterator[None]:
    """Trace adaptive pooling by other functions."""
    import keras.src.backend.tensorflow.nn as keras_nn

    with _replaced(keras_nn, "adaptive_average_pool", average), _replaced(keras_nn, "adaptive_max_pool", maximum):
        yield


@contextlib.contextmanager
def random_crop_of_dynamic_size() -> Iterator[None]:
    """Trace `RandomCrop`, which crops nothing in inference, without computing where."""
    import keras

    with _replaced(keras.layers.RandomCrop, "get_random_transformation", lambda *args, **options: (0, 0)):
        yield


@contextlib.contextmanager
def center_crop_of_dynamic_size() -> Iterator[None]:
    """Trace `CenterCrop` with the size of its output, which TensorFlow does not know where that of the input is a tensor."""
    import keras

    real = keras.layers.CenterCrop.transform_images

    @functools.wraps(real)
    def crop(layer: keras.layers.CenterCrop, *args: Any, **options: Any) -> tf.Tensor:
        result = real(layer, *args, **options)
        size, rank = [layer.height, layer.width], len(result.shape)
        before = rank - 2 if layer.data_format == "channels_first" else rank - 3
        result.set_shape([None] * before + size + [None] * (rank - 2 - before))
        return result

    with _replaced(keras.layers.CenterCrop, "transform_images", crop):
        yield


@contextlib.contextmanager
def upsampling_of_dynamic_size() -> Iterator[None]:
    """Trace `UpSampling2D` with interpolation where the size is a tensor, which Keras' check of a positive size cannot read."""
    import keras.src.ops.image as keras_image
    import tensorflow as tf

    real = keras_image.resize

    def resize(images: object, size: tuple, *args: object, **options: object) -> object:
        symbolic = any(tf.is_symbolic_tensor(side) for side in size)
        return (keras_image.backend.image.resize if symbolic else real)(images, size, *args, **options)

    with _replaced(keras_image, "resize", resize):
        yield


@contextlib.contextmanager
def unrolling_of_dynamic_length() -> Iterator[None]:
    """Trace recurrent layers with `unroll=True` as a loop where the number of steps is a tensor; the numbers are the same."""
    import keras

    real = keras.layers.RNN.call

    @functools.wraps(real)
    def call(layer: keras.layers.RNN, sequences: tf.Tensor, *args: Any, **options: Any) -> Any:
        if layer.unroll and sequences.shape[1] is None:
            rolled = object.__new__(type(layer))  # the same weights and states; the layer itself is not touched
            rolled.__dict__ |= layer.__dict__ | {"unroll": False}
            layer = rolled
        return real(layer, sequences, *args, **options)

    with _replaced(keras.layers.RNN, "call", call):
        yield


@contextlib.contextmanager
def time_distribution_of_dynamic_length() -> Iterator[None]:
    """Trace `TimeDistributed` as one call for the steps of all rows where the number of steps is a tensor.

    Keras maps the layer over the steps, and the shapes inside have no rank then. Layers of the user's may see the rows together,
    and stateful ones know how many there are; those stay as they are.
    """
    import keras

    from keras_resnet.graphs import is_of_keras, layers_in

    real = keras.layers.TimeDistributed.call

    @functools.wraps(real)
    def call(layer: keras.layers.TimeDistributed, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        plain = all(is_of_keras(inner) and not getattr(inner, "stateful", False) for inner in layers_in(layer.layer))
        if inputs.shape[1] is not None or mask is not None or not plain:
            return real(layer, inputs, training=training, mask=mask)
        rows, steps, *rest = keras.ops.shape(inputs)
        merged = keras.ops.reshape(inputs, [rows * steps, *rest])
        outputs = layer.layer.call(merged, **({"training": training} if layer.layer._call_has_training_arg else {}))
        return keras.ops.reshape(outputs, [rows, steps, *keras.ops.shape(outputs)[1:]])

    with _replaced(keras.layers.TimeDistributed, "call", call):
        yield


@contextlib.contextmanager
def equalization_of_an_input() -> Iterator[None]:
    """Build models in which `Equalization` comes first; in the dtype of its input it returns the symbolic input itself."""
    import keras

    def compute_output_spec(layer: keras.Layer, inputs: keras.KerasTensor, **options: Any) -> keras.KerasTensor:
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    with _replaced(keras.layers.Equalization, "compute_output_spec", compute_output_spec):
        yield


LOOP_OPS = frozenset("Enter If LoopCond Merge StatelessIf StatelessWhile Switch While".split())
RANDOM_OPS = frozenset("RandomStandardNormal RandomUniform RandomUniformLike".split())
LOOP_REWRITERS = (
    "rewrite_bi_direction_gru rewrite_bi_direction_lstm rewrite_cond rewrite_custom_rnn_cell rewrite_generic_loop rewrite_gru_tf2"
    " rewrite_single_direction_gru rewrite_single_direction_lstm rewriter_lstm_tf2"
).split()
RANDOM_REWRITERS = "rewrite_dropout rewrite_random_normal rewrite_random_uniform rewrite_random_uniform_fold_const".split()
# What tf2onnx' searches start from; without such an op in the graph they find nothing, and take a tenth of the conversion.
REWRITERS = {
    **dict.fromkeys(LOOP_REWRITERS, LOOP_OPS),
    **dict.fromkeys(RANDOM_REWRITERS, RANDOM_OPS),
    "rewrite_eye": frozenset({"MatrixDiag", "MatrixDiagV3", "MatrixSetDiag"}),
    "rewrite_quantize_and_dequantize": frozenset(f"QuantizeAndDequantizeV{version}" for version in (2, 3, 4)),
}


@contextlib.contextmanager
def needed_rewriters(ops: Set[str]) -> Iterator[None]:
    """Let tf2onnx run only those of its searches through a graph that can find something.

    Args:
        ops: The types of all ops in the graph and its functions.
    """
    from tf2onnx import tfonnx

    real = tfonnx.run_rewriters

    def run(graph: Any, rewriters: list, *args: Any) -> None:
        real(graph, [one for one in rewriters if REWRITERS.get(one.__name__, ops) & ops], *args)

    with _replaced(tfonnx, "run_rewriters", run):
        yield


def convolution(
    input: tf.Tensor,
    filters: tf.Tensor,
    strides: int | Sequence[int] = 1,
    padding: str = "VALID",
    data_format: str | None = None,
    dilations: int | Sequence[int] | None = 1,
) -> tf.Tensor:
    """Return `tf.nn.convolution` as one node."""
    import tensorflow as tf

    rank = filters.shape.rank - 2
    strides, dilations = _per_axis(strides, rank), _per_axis(dilations, rank)
    if rank == 1:
        return tf.nn.conv1d(input, filters, strides[0], padding, data_format or "NWC", dilations[0])
    op, formats = (tf.nn.conv2d, ("NHWC", "NCHW")) if rank == 2 else (tf.nn.conv3d, ("NDHWC", "NCDHW"))
    data_format = data_format or formats[0]
    around = (lambda sizes: [1, 1, *sizes]) if data_format == formats[1] else (lambda sizes: [1, *sizes, 1])
    return op(input, filters, around(strides), padding, data_format, around(dilations))


def depthwise_conv2d(
    input: tf.Tensor,
    filter: tf.Tensor,
    strides: Sequence[int],
    padding: str,
    data_format: str | None = None,
    dilations: int | Sequence[int] | None = None,
    name: str | None = None,
) -> tf.Tensor:
    """Return `tf.nn.depthwise_conv2d` as one node."""
    import tensorflow as tf

    dilations, data_format = _per_axis(dilations, 2), data_format or "NHWC"
    return tf.raw_ops.DepthwiseConv2dNative(
        input=input,
        filter=filter,
        strides=list(strides),
        padding=padding,
        data_format=data_format,
        dilations=[1, 1, *dilations] if data_format == "NCHW" else [1, *dilations, 1],
        name=name,
    )


def separable_conv2d(
    input: tf.Tensor,
    depthwise_filter: tf.Tensor,
    pointwise_filter: tf.Tensor,
    strides: Sequence[int],
    padding: str,
    data_format: str | None = None,
    dilations: int | Sequence[int] | None = None,
) -> tf.Tensor:
    """Return `tf.nn.separable_conv2d` as two nodes."""
    import tensorflow as tf

    depthwise = depthwise_conv2d(input, depthwise_filter, strides, padding, data_format, dilations)
    return tf.nn.conv2d(depthwise, pointwise_filter, 1, "VALID", data_format or "NHWC")


def _per_axis(sizes: int | Sequence[int] | None, rank: int) -> list[int]:
    if sizes is None:
        return [1] * rank
    return [sizes] * rank if isinstance(sizes, int) else list(sizes) * (rank if len(sizes) == 1 else 1)


def clean_name(name: str) -> str:
    """Return a name that TensorFlow takes for a scope."""
    return re.sub(r"^[^A-Za-z0-9.]", "x", re.sub(r"[^A-Za-z0-9_.\\/>-]", "_", name)) if name else name


@contextlib.contextmanager
def clean_scope_names() -> Iterator[None]:
    """Let models and layers have names, with spaces for example, that TensorFlow refuses as name scopes."""
    import keras.src.backend.tensorflow.core as keras_core

    real = keras_core.tf
    with _replaced(keras_core, "tf", _Overlay(real, name_scope=lambda name: real.name_scope(clean_name(name)))):
        yield


@contextlib.contextmanager
def clean_variable_names(variables: Sequence[tf.Variable]) -> Iterator[None]:
    """Let variables have such names too while TensorFlow saves them, which opens a name scope per variable."""
    before = [variable._handle_name for variable in variables]
    try:
        for variable, name in zip(variables, before, strict=True):
            variable._handle_name = ":".join(map(clean_name, name.split(":")))
        yield
    finally:
        for variable, name in zip(variables, before, strict=True):
            variable._handle_name = name


@contextlib.contextmanager
def calls_of_layers(noted: Callable[[str, object], object]) -> Iterator[None]:
    """Call `noted(path, result)` for every Keras layer that returns while the block runs; inner layers return first."""
    import keras

    stack: list[str] = []
    original = keras.Layer.__call__

    def told(layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:
        stack.append(layer.name)
        try:
            result = original(layer, *args, **kwargs)
            noted("/".join(stack[1:]) or stack[0], result)
            return result
        except Exception as error:
            if not hasattr(error, "layer_path"):  # the innermost layer is the first to be left
                error.layer_path = "/".join(stack[1:]) or stack[0]  # type: ignore[attr-defined]
            raise
        finally:
            stack.pop()

    with _replaced(keras.Layer, "__call__", told):
        yield


@contextlib.contextmanager
def before_batch_norms(seen: Callable[[object, np.ndarray], object]) -> Iterator[None]:
    """Call `seen(layer, inputs)` before every eager call of a `BatchNormalization` layer while the block runs."""
    import keras

    original = keras.layers.BatchNormalization.call

    def told(layer: keras.Layer, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen(layer, np.asarray(inputs))
        return original(layer, inputs, *args, **kwargs)

    with _replaced(keras.layers.BatchNormalization, "call", told):
        yield
