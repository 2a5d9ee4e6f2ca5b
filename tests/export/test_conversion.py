"""Conversion without verification: what onnxruntime computes from the graph is what the untouched Keras model computes."""

import hashlib

import keras
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tensorflow as tf
from keras import layers

import resnet_export as rx
from resnet_export.conversion import rebuild
from resnet_export.conversion.convert import convert
from resnet_export.conversion.passes import finish
from resnet_export.conversion.signature import signature_of
from resnet_export.errors import UsageError
from tests.export import ops_table
from tests.export.conftest import run_onnx
from tests.helpers import randomise


def chain(*steps, shape=(None, None, 3)):
    x = entry = keras.Input(shape)
    for step in steps:
        x = step(x)
    return randomise(keras.Model(entry, x))


def converted(model, opset=17, **options):
    """`(serialised file, ops in order, method)`."""
    keras.utils.set_random_seed(0)
    found, method = convert(signature_of(model, **options), opset)
    proto = ir.to_proto(found)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True), [node.op_type for node in found.graph], method


def outputs_of(content, feeds, optimise=True):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: feed for value, feed in zip(session.get_inputs(), feeds, strict=True)})


def feeds_of(model, sizes, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [[2, *(size or sizes[axis % len(sizes)] for axis, size in enumerate(tensor.shape[1:]))] for tensor in model.inputs]
    return [rng.uniform(-2, 2, shape).astype(tensor.dtype) for shape, tensor in zip(shapes, model.inputs, strict=True)]


def check(model, opset=17, sizes=(9, 11, 10), tolerance=1e-5, **options):
    """Compare outputs of both of onnxruntime's modes with Keras; returns the ops in order."""
    content, ops, _ = converted(model, opset, **options)
    feeds = feeds_of(model, sizes)
    expected = keras.tree.flatten(model(feeds if len(feeds) > 1 else feeds[0], training=False))
    for optimise in (True, False):
        for got, want in zip(outputs_of(content, feeds, optimise), expected, strict=True):
            want = np.asarray(want)
            assert got.shape == want.shape and got.dtype == want.dtype
            scale = max(np.abs(want).max(), 1e-9) if want.size else 1
            np.testing.assert_allclose(got / scale, want / scale, atol=tolerance, rtol=0)
    return ops


# ---------------------------------------------------------------- convolutions of dynamic size

TRANSPOSED = [  # kernel, stride, padding, output padding
    (1, 1, "same", None),
    (1, 2, "valid", None),
    (1, 3, "same", None),
    (2, 3, "same", None),
    (3, 2, "same", None),
    (4, 2, "same", None),
    (5, 2, "valid", None),
    (5, 2, "same", 1),
    (7, 3, "valid", 2),
    ((3, 2), (1, 3), "same", None),
]


@pytest.mark.parametrize("shape", [(None, None, 3), (9, 11, 3)])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_convolutions_are_one_node(case, shape):
    kernel, stride, padding, more = case
    transposed = layers.Conv2DTranspose(4, kernel, strides=stride, padding=padding, output_padding=more)
    model = chain(transposed, layers.BatchNormalization(), layers.ReLU(), layers.Conv2D(2, 1), shape=shape)
    assert check(model) == ["Transpose", "ConvTranspose", "Relu", "Conv", "Transpose"]


@keras.saving.register_keras_serializable("tests")
class OwnSize(layers.Layer):
    """A transposed convolution whose output's size is not a fixed number of pixels from a multiple of the input's."""

    def call(self, x):
        batch, height, width = tf.unstack(tf.shape(x)[:3])
        return tf.nn.conv2d_transpose(x, tf.ones((5, 5, 2, 3)), [batch, 2 * height - height % 2, 2 * width, 2], 2)

    def compute_output_shape(self, shape):
        return (*shape[:3], 2)


def test_transposed_convolution_of_any_computed_size():
    for sizes in ((9, 11), (10, 8)):
        check(chain(OwnSize(), layers.Conv2D(2, 1)), sizes=sizes)


DILATED = {
    "convolution": lambda padding: layers.Conv2D(4, (2, 3), dilation_rate=(2, 3), padding=padding),
    "grouped": lambda padding: layers.Conv2D(6, 3, dilation_rate=2, padding=padding, groups=3),
    "depthwise": lambda padding: layers.DepthwiseConv2D(3, dilation_rate=2, padding=padding, depth_multiplier=2),
    "separable": lambda padding: layers.SeparableConv2D(4, 3, dilation_rate=2, padding=padding),
    "transposed": lambda padding: layers.Conv2DTranspose(4, 3, dilation_rate=2, padding=padding),
}


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kind", DILATED)
def test_dilated_convolutions_absorb_what_follows(kind, padding):
    ops = check(chain(DILATED[kind](padding), layers.BatchNormalization(), layers.ReLU()))
    assert set(ops) <= {"Transpose", "Conv", "ConvTranspose", "Relu"} and len(ops) <= 5


def test_dilation_with_stride():
    for padding in ("same", "valid"):
        check(chain(layers.DepthwiseConv2D(3, strides=2, dilation_rate=2, padding=padding), layers.BatchNormalization()))


LINES_AND_VOLUMES = {
    "line": (layers.Conv1D(4, 3, dilation_rate=2, padding="same"), 1),
    "causal": (layers.Conv1D(4, 3, dilation_rate=2, padding="causal"), 1),
    "transposed line": (layers.Conv1DTranspose(4, 3, strides=2, padding="same"), 1),
    "volume": (layers.Conv3D(4, 3, dilation_rate=2, padding="same"), 3),
    "transposed volume": (layers.Conv3DTranspose(4, 3, strides=2, padding="same"), 3),
}


@pytest.mark.parametrize("case", LINES_AND_VOLUMES)
def test_lines_and_volumes(case):
    layer, rank = LINES_AND_VOLUMES[case]
    layer = type(layer).from_config(layer.get_config())
    check(chain(layer, layers.BatchNormalization(), layers.ReLU(), shape=(*[None] * rank, 3)))


# ---------------------------------------------------------------- resizing


@pytest.mark.parametrize("opset", [13, 18, 23])
@pytest.mark.parametrize("shape", [(None, None, 3), (9, 11, 3), (9, 11, 1)])
@pytest.mark.parametrize("head", ["none", "pooling", "1x1"])
def test_resizing_gives_the_size_it_is_told(head, shape, opset):
    """14 / 11 as a float32 times 11 is a little less than 14, and its integer part 13."""
    heads = {"none": [], "pooling": [layers.AveragePooling2D(2)], "1x1": [layers.Conv2D(2, 1)]}
    for kind in ({}, {"interpolation": "nearest"}, {"crop_to_aspect_ratio": True}):
        model = chain(layers.Resizing(16, 14, **kind), *heads[head], shape=shape)
        keras_again = chain(layers.Conv2D(3, 1), layers.Resizing(16, 14, **kind), shape=shape)
        check(model, opset)
        if opset == 18:
            check(keras_again, opset)


# ---------------------------------------------------------------- ops


class Apply(layers.Layer):
    """Functions of the inputs, each an output of its own."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def call(self, inputs):
        return {f"output_{index:03}": function(*inputs) for index, function in enumerate(self.functions)}


def check_functions(table, open_size, opset):
    """Convert a table of functions as one model; all that are wrong are reported by name."""
    names = [name for name in table if not (open_size and name in ops_table.FIXED_SIZE_ONLY)]
    apply = Apply([table[name] for name in names])
    shape = (None, None, 4) if open_size else (6, 8, 4)
    inputs = [keras.Input(shape, name=name, dtype=dtype) for name, dtype in (("x", None), ("p", None), ("k", "int32"))]
    rng = np.random.default_rng(0)
    feeds = [rng.uniform(-2, 2, (2, 6, 8, 4)), rng.uniform(0.1, 0.9, (2, 6, 8, 4)), rng.integers(0, 8, (2, 6, 8, 4))]
    feeds = [feed.astype(dtype) for feed, dtype in zip(feeds, ("float32", "float32", "int32"), strict=True)]
    content, _, _ = converted(keras.Model(inputs, apply(inputs)), opset)
    expected = apply([keras.ops.convert_to_tensor(feed) for feed in feeds])
    wrong = {}
    for optimise in (True, False):
        for name, want, got in zip(names, expected.values(), outputs_of(content, feeds, optimise), strict=True):
            want = np.asarray(want)
            scale = max(1, np.nanmax(np.abs(want.astype("float64"))))
            same = got.shape == want.shape and got.dtype == want.dtype
            if not same or not np.allclose(got, want, rtol=0, atol=1e-5 * scale, equal_nan=True):
                wrong[name] = (got.shape, got.dtype, want.shape, want.dtype)
    assert not wrong


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("open_size", "opset"),
    [(False, 17), (True, 17), pytest.param(True, 13, marks=SLOW), pytest.param(False, 23, marks=SLOW)],
)
@pytest.mark.parametrize("group", ops_table.GROUPS)
def test_functions_of_keras_ops(group, open_size, opset):
    check_functions(ops_table.GROUPS[group], open_size, opset)


@pytest.mark.parametrize("open_size", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_images_are_resized_as_tensorflow_does_it(open_size):
    check_functions(ops_table.IMAGES if open_size else ops_table.IMAGES | ops_table.FIXED_SIZE_IMAGES, open_size, 17)


@pytest.mark.parametrize("shape", [(107, 131, 3), (None, None, 3)])
@pytest.mark.parametrize("method", ["bilinear", "nearest", "lanczos3", "area"])
def test_large_images_have_the_same_pixels(method, shape):
    """The Resize of ONNX has other coordinates, by so much that nearest pixels are others in images of some hundred pixels."""
    model = chain(layers.Lambda(lambda x: tf.image.resize(x, (224, 192), method)), shape=shape)
    assert "Resize" not in check(model, sizes=(107, 131), tolerance=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos3"])
def test_upsampling_of_dynamic_size(interpolation):
    check(chain(layers.UpSampling2D((2, 3), interpolation=interpolation), layers.Conv2D(2, 3)))


@pytest.mark.parametrize("shape", [(9, 11, 3), (None, None, 3)])
def test_adaptive_pooling(shape):
    for size in ((1, 1), (1, 4), (3, 11), (4, 5)):
        check(chain(layers.AdaptiveAveragePooling2D(size), shape=shape))
    check(chain(layers.AdaptiveMaxPooling2D((4, 5)), shape=shape))
    assert "GlobalAveragePool" in check(chain(layers.Conv2D(4, 1), layers.AdaptiveAveragePooling2D(1), shape=shape))


def test_adaptive_pooling_of_every_rank_and_layout():
    check(chain(layers.AdaptiveAveragePooling1D(3), shape=(7, 4)))
    check(chain(layers.AdaptiveAveragePooling3D((2, 1, 3)), shape=(4, 5, 6, 3)))
    check(chain(layers.AdaptiveMaxPooling2D((2, 3), data_format="channels_first"), shape=(3, 8, 9)))
    assert check(chain(layers.AdaptiveMaxPooling2D((2, 3)), shape=(8, 9, 3))) == ["Transpose", "MaxPool", "Transpose"]


def test_random_crop_of_dynamic_size():
    check(chain(layers.RandomCrop(4, 5), layers.Conv2D(2, 1)))


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize(
    "head",
    [
        lambda x: [x, x],
        lambda x: (lambda y: [y, x, y])(layers.Conv2D(2, 1)(layers.GlobalMaxPooling2D(keepdims=True)(x))),
        lambda x: [layers.Reshape((8, 9, 3))(layers.Reshape((72, 3))(x)), layers.Permute((1, 2, 3))(x)],
        lambda x: [layers.Conv2D(2, 1, activation="sigmoid")(layers.GlobalMaxPooling2D(keepdims=True)(x))] * 2,
    ],
)
def test_outputs_that_are_one_tensor_or_an_input(head, opset):
    x = keras.Input((8, 9, 3))
    check(randomise(keras.Model(x, head(x))), opset)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_center_crop_of_dynamic_size(data_format):
    """An unrolled loop over the crop needs its size, which is that of the layer."""
    crop = layers.CenterCrop(4, 5, data_format=data_format)
    check(chain(crop, layers.Lambda(lambda x: keras.ops.max(x, 1)), layers.SimpleRNN(3, unroll=True)))


@pytest.mark.parametrize("kind", [layers.SimpleRNN, layers.GRU, layers.LSTM])
def test_unrolled_layers_of_dynamic_length(kind):
    layer = kind(3, unroll=True, go_backwards=True)
    check(chain(layers.Reshape((-1, 3)), layer, shape=(None, None, 3)))
    assert layer.unroll


@pytest.mark.parametrize(
    "inner",
    [
        lambda: layers.Conv1D(4, 2, padding="same", strides=2),
        lambda: layers.Conv1D(6, 3, groups=3),
        lambda: layers.BatchNormalization(),
        lambda: layers.LSTM(3),
        lambda: chain(layers.Conv1D(4, 2), layers.Dense(5, activation="softmax"), shape=(None, 3)),
    ],
)
def test_time_distributed_of_dynamic_length(inner):
    check(chain(layers.TimeDistributed(inner()), shape=(None, None, 3)))


@pytest.mark.parametrize("kind", ["DepthwiseConv2D", "SeparableConv2D", "Conv2D", "Conv2DTranspose"])
def test_bias_of_channels_first_layout(kind):
    filters = () if kind.startswith("Depthwise") else (4,)
    layer = getattr(layers, kind)(*filters, 3, data_format="channels_first")
    for shape in ((3, 9, 11), (3, None, None)):
        check(chain(layer, shape=shape))


def test_same_padding_of_strides_larger_than_the_window():
    for kind in (layers.AveragePooling2D, layers.MaxPooling2D, lambda *options: layers.Conv2D(2, *options)):
        for stride in (2, 3, 4):
            model = chain(kind(2, stride, "same"))
            for side in range(8, 12):
                check(model, sizes=(side, side + 1))


def test_variance_of_large_groups():
    """onnxruntime adds the numbers of a mean over inner axes one by one."""
    check(chain(layers.Conv2D(4, 3, activation="relu"), layers.GroupNormalization(2)), sizes=(107, 131))


def test_the_table_of_ops_is_complete():
    """A new function of Keras is either tested or left out with a reason."""
    tested = {name.split()[0] for group in ops_table.GROUPS.values() for name in group}
    public = {name for name in dir(keras.ops) if not name.startswith("_")}
    assert not public - tested - set(ops_table.NO_COUNTERPART)
    assert set(ops_table.NO_COUNTERPART) <= public and not tested & set(ops_table.NO_COUNTERPART)


def test_activations():
    functions = [name for name in dir(keras.activations) if not name.startswith("_")]
    functions = {name: getattr(keras.activations, name) for name in functions if name not in ("get", "serialize", "deserialize")}
    assert {"celu", "sparsemax", "glu", "mish"} <= set(functions)
    options = {"threshold": (0.5, -1.0)}
    table = {
        name: (lambda x, p, k, name=name, function=function: function(x, *options.get(name, ())))
        for name, function in functions.items()
    }
    for open_size in (False, True):
        check_functions(table, open_size, 17)


def test_small_numbers_keep_their_digits():
    """`log(1 + x)` and `exp(x) - 1` as written would lose all digits of 1e-8."""
    x = keras.Input((5,))
    model = keras.Model(x, [keras.ops.log1p(x), keras.ops.expm1(x)])
    feed = np.array([[1e-8, -3e-6, 0, 1e-3, 30], [-0.0, 1e-20, -0.999, 5, np.inf]], "float32")
    content, _, _ = converted(model)
    for got, want in zip(outputs_of(content, [feed]), (np.log1p, np.expm1), strict=True):
        np.testing.assert_allclose(got, want(feed.astype("float64")).astype("float32"), rtol=1e-6)


def test_an_op_without_a_counterpart_is_refused_by_name():
    x = keras.Input((4,))
    model = keras.Model(x, layers.Lambda(keras.ops.erfinv, name="inverse")(x))
    with pytest.raises(UsageError, match="'Erfinv' of layer 'inverse' has no counterpart in ONNX"):
        converted(model)


IDENTITY_IN_INFERENCE = {
    "RandomBrightness": (0.3,),
    "RandomContrast": (0.3,),
    "RandomColorDegeneration": (0.5,),
    "RandomColorJitter": (),
    "RandomElasticTransform": (),
    "RandomErasing": (),
    "RandomFlip": (),
    "RandomGaussianBlur": (),
    "RandomGrayscale": (),
    "RandomHue": (0.3,),
    "RandomInvert": (0.3,),
    "RandomPerspective": (),
    "RandomPosterization": (4,),
    "RandomRotation": (0.3,),
    "RandomSaturation": (0.3,),
    "RandomSharpness": (0.3,),
    "RandomShear": (),
    "RandomTranslation": (0.2, 0.2),
    "RandomZoom": (0.2,),
}
NOT_IDENTITY = {"RandomCrop"}  # it crops the centre


@pytest.mark.parametrize("shape", [(9, 11, 3), (None, None, 3)])
def test_augmentation_is_left_out(shape):
    public = {name for name in dir(layers) if name.startswith("Random")}
    assert public == set(IDENTITY_IN_INFERENCE) | NOT_IDENTITY
    steps = [getattr(layers, name)(*options) for name, options in IDENTITY_IN_INFERENCE.items()]
    assert check(chain(*steps, layers.Conv2D(2, 3), shape=shape)) == ["Transpose", "Conv", "Transpose"]


def test_layers_that_place_numbers_in_bins():
    check(chain(layers.Discretization([-1.0, 0.0, 0.5]), shape=(6, 8, 4)))
    check(chain(layers.RandomCrop(4, 5), layers.Conv2D(2, 1), shape=(9, 11, 3)))


# ---------------------------------------------------------------- the fallback


def test_fallback_then_convolution():
    model = chain(layers.ConvLSTM2D(4, 3, padding="same"), layers.Conv2D(2, 1), shape=(4, 8, 8, 3))
    assert check(model)[-2:] == ["Conv", "Transpose"]
    assert converted(model)[2] == "stock"


@pytest.mark.parametrize(
    "layer",
    [
        layers.Resizing(5, 9, interpolation="lanczos3", crop_to_aspect_ratio=True),
        layers.Conv2D(2, 3, dilation_rate=2),
        layers.DepthwiseConv2D(3, dilation_rate=2, padding="same"),
        layers.AdaptiveAveragePooling2D((3, 5)),
    ],
    ids=lambda layer: layer.name,
)
def test_what_the_conversion_replaces_is_replaced_in_the_fallback_too(layer):
    recurrent = layers.ConvLSTM2D(4, 3, padding="same", dilation_rate=2)
    check(chain(recurrent, layer, layers.Resizing(6, 7), shape=(3, 8, 8, 3)))


def test_fallback_of_a_sequence():
    assert check(chain(layers.LSTM(3), layers.Dense(2), shape=(6, 4)))
    assert check(chain(layers.GRU(3, return_sequences=True), layers.Conv1D(2, 1), shape=(6, 4)))


def test_fallback_of_a_square_in_another_layout():
    """tf2onnx's own pass over transposes moves the axes of `x * x` twice, which axes of size 1 let pass for a Reshape."""
    layer = layers.Conv2D(1, 3, padding="same", activation="sigmoid")
    model = chain(layers.GRU(2), layers.Reshape((2, 1, 1)), layer, layers.UnitNormalization(), shape=(6, 4))
    assert converted(model)[2] == "stock"
    check(model)


TWICE = {
    "resizing with pads": lambda: layers.Resizing(16, 14, pad_to_aspect_ratio=True),
    "resizing with crop": lambda: layers.Resizing(16, 14, crop_to_aspect_ratio=True),
    "group norm": lambda: layers.GroupNormalization(2),
    "layer norm": lambda: layers.LayerNormalization(),
    "transposed": lambda: layers.Conv2DTranspose(3, 3, strides=2),
    "dilation with stride": lambda: layers.DepthwiseConv2D(3, strides=2, dilation_rate=2, padding="same"),
    "pooling": lambda: layers.AveragePooling2D(3, 2, padding="same"),
    "cropped at random": lambda: layers.RandomCrop(4, 4),
}


@pytest.mark.parametrize("shape", [(9, 11, 4), (None, None, 4)])
@pytest.mark.parametrize("case", TWICE)
def test_same_bytes_twice_in_one_process(case, shape):
    if case == "cropped at random" and None in shape:
        pytest.skip("Keras needs the size")
    model = chain(layers.Conv2D(4, 1), TWICE[case](), layers.Conv2D(2, 1), shape=shape)
    first = hashlib.sha256(converted(model)[0]).hexdigest()
    converted(chain(layers.Conv2D(4, 1), layers.Resizing(5, 5, pad_to_aspect_ratio=True), shape=shape))  # moves all counters
    assert hashlib.sha256(converted(model)[0]).hexdigest() == first


LOOPS = {
    "SimpleRNN": lambda: layers.SimpleRNN(3),
    "GRU": lambda: layers.GRU(3, return_sequences=True),
    "stacked cells": lambda: layers.RNN(layers.StackedRNNCells([layers.GRUCell(3), layers.LSTMCell(2)])),
    "LSTM": lambda: layers.LSTM(3),
    "Bidirectional": lambda: layers.Bidirectional(layers.GRU(2)),
}


@pytest.mark.parametrize("steps", [None, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", LOOPS)
def test_loops_have_the_same_bytes_too(case, steps):
    """tf2onnx copies loop-carried values in either direction."""
    model = chain(LOOPS[case](), layers.Dense(2), shape=(steps, 4))
    assert len({hashlib.sha256(converted(model)[0]).hexdigest() for _ in range(3)}) == 1


def test_order_and_names_do_not_depend_on_old_names():
    """Branches are sorted by what they compute, in nested graphs too."""
    texts = []
    for names in (("left", "right", "p"), ("z", "b", "q")):
        left, right, inner = names
        text = (
            f"{left} = Neg(x) {right} = Relu(x) s = ReduceMax <keepdims = 0> ({left}) c = Greater(s, s) "
            f"i = If (c) <then_branch = t () => (float[] {inner}) {{ {inner} = Relu({left}) }}, "
            f"else_branch = e () => (float[] {inner}2) {{ {inner}2 = Neg({right}) }}> y = Add(i, {right})"
        )
        if left == "z":  # the same nodes in another order
            text = text.replace(f"{left} = Neg(x) {right} = Relu(x)", f"{right} = Relu(x) {left} = Neg(x)")
        model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> net (float[2] x) => (float[2] y) {{ {text} }}')
        model = ir.from_proto(model)
        finish.canonical_names(model.graph, ["images"], ["output"])
        finish.strip(model)
        onnx.checker.check_model(ir.to_proto(model))
        texts.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert texts[0] == texts[1]


# ---------------------------------------------------------------- copies


class Unserialisable(layers.Layer):
    def __init__(self, function, **options):
        super().__init__(**options)
        self.function = function

    def call(self, x):
        return self.function(x)


def _with(policy, layer):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return chain(
            layers.Conv2D(4, 3, activation="relu"), layer(), layers.GlobalAveragePooling2D(), layers.Dense(2), shape=(9, 11, 3)
        )
    finally:
        keras.config.set_dtype_policy(before)


class WithoutConfig(layers.Layer):
    """Layers in a list and a dict, a variable, and no `get_config`."""

    def __init__(self, units):
        super().__init__()
        self.steps = [layers.Conv2D(units, 3, padding="same"), layers.BatchNormalization()]
        self.gates = {"gate": layers.Dense(units, activation="sigmoid")}

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        y = x * self.scale
        for step in self.steps:
            y = step(y)
        return y * self.gates["gate"](x)


OWN_LAYERS = {
    "without a config": lambda: WithoutConfig(4),
    "a function of TensorFlow": lambda: layers.Dense(4, activation=tf.nn.softmax),
    "a function without a name": lambda: layers.Dense(4, activation=lambda x: 2 * tf.nn.relu(x)),
    "unserialisable": lambda: Unserialisable(lambda x: 2 * x + 1),
    "lambda": lambda: layers.Lambda(lambda x: 2 * x + 1),
    "batch norm": lambda: layers.BatchNormalization(),
}


@pytest.mark.parametrize("own", OWN_LAYERS)
@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16"])
def test_other_precisions_are_rebuilt_in_float32(policy, own):
    model = _with(policy, OWN_LAYERS[own])
    before = model.get_weights()
    copied, note = rebuild.in_float32(model)
    assert policy in note and {layer.compute_dtype for layer in copied.layers} == {"float32"}
    x = feeds_of(copied, (9, 11))[0]
    tolerance = 1e-5 if policy == "float64" else 3e-2
    np.testing.assert_allclose(np.asarray(model(x), "float32"), copied(x), rtol=tolerance, atol=tolerance)
    check(copied)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert old.dtype == new.dtype and (old == new).all()


def test_a_layer_that_returns_its_input_itself_is_rebuilt_in_float32():
    x = keras.Input((8, 12, 3), dtype="float32")
    model = keras.Model(x, layers.Conv2D(2, 3, dtype="float64")(layers.Equalization(dtype="float64")(x)))
    check(rebuild.in_float32(model)[0])


@pytest.mark.parametrize("own", OWN_LAYERS)
def test_dynamic_size_of_layers_without_a_config(own):
    model = _with("float32", OWN_LAYERS[own])
    opened = rebuild.with_dynamic_size(model)
    x = feeds_of(model, (9, 11))[0]
    np.testing.assert_array_equal(model(x), opened(x))
    check(opened, sizes=(14, 12))


def test_dynamic_size_of_a_network_that_takes_some_sizes_only():
    x = entry = keras.Input((16, 24, 3))
    for _ in range(2):
        x = layers.Concatenate()([x, layers.UpSampling2D()(layers.Conv2D(2, 3, strides=2, padding="same")(x))])
    half = layers.Conv2D(2, 3, strides=4, padding="same")(x)
    model = randomise(keras.Model(entry, layers.Add()([layers.Conv2D(2, 1)(x), layers.UpSampling2D(4)(half)])))
    check(rebuild.with_dynamic_size(model), sizes=(32, 40))


def test_a_layer_that_needs_a_fixed_size_is_named():
    model = chain(layers.Conv2D(2, 3), layers.Reshape((7 * 9 * 2,)), layers.Dense(3, name="last"), shape=(9, 11, 3))
    with pytest.raises(UsageError, match="layer 'reshape.*' of model .* needs a fixed image size"):
        rebuild.with_dynamic_size(model)


def test_layers_with_lora():
    model = chain(layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(3), shape=(9, 11, 3))
    for layer in model.layers[1::2]:
        layer.enable_lora(2)
    randomise(model)
    assert (
        check(model) == check(rebuild.with_dynamic_size(model)) == ["Transpose", "Conv", "GlobalAveragePool", "Flatten", "Gemm"]
    )


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_grouped_convolutions_of_every_rank(rank, groups, padding, tmp_path):
    layer = getattr(keras.layers, f"Conv{rank}D")
    for options in ({"strides": 2}, {"dilation_rate": 2}, {}):
        x = keras.Input((*(9, 8, 7)[:rank], 4))
        model = randomise(keras.Model(x, layer(8, 3, groups=groups, padding=padding, **options)(x)))
        rx.to_onnx(model, tmp_path / "m.onnx")
        feed = np.random.default_rng(rank).normal(size=(2, *x.shape[1:])).astype("float32")
        want = np.asarray(model(feed, training=False))
        np.testing.assert_allclose(run_onnx(tmp_path / "m.onnx", feed)[0], want, rtol=1e-4, atol=1e-5)
    rx.to_savedmodel(model, tmp_path / "m")
    (got,) = tf.saved_model.load(str(tmp_path / "m")).signatures["serving_default"](tf.constant(feed)).values()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_with_channels_first(rank, groups, tmp_path):
    x = keras.Input((4, *(9, 8, 7)[:rank]))
    # As many filters as the output is wide, and Keras' `add` would take the bias for one along the width, but not in every graph.
    layer = getattr(layers, f"Conv{rank}D")(10, 3, groups=groups, data_format="channels_first")
    model = randomise(keras.Model(x, layer(x)))
    feed = np.random.default_rng(rank).normal(size=(2, *x.shape[1:])).astype("float32")
    want = np.asarray(model(feed, training=False))
    rx.to_onnx(model, tmp_path / "m.onnx")
    np.testing.assert_allclose(run_onnx(tmp_path / "m.onnx", feed)[0], want, rtol=1e-4, atol=1e-5)
    rx.to_savedmodel(model, tmp_path / "m")
    (got,) = tf.saved_model.load(str(tmp_path / "m")).signatures["serving_default"](tf.constant(feed)).values()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_layer_with_inner_layers_is_rebuilt_from_its_config():
    """Keras wraps `build` of the layer and of its cell; these two functions of one name are none that a config names."""
    model = chain(layers.ConvLSTM1D(2, 3), shape=(12, 14, 3))
    assert model.layers[1].built and not rebuild._again(model.layers[1]).built


def scaled(factor):
    def act(x):
        return keras.ops.tanh(x) * factor

    return act


def relu(x):
    return -keras.ops.relu(x)


def test_functions_of_one_name_stay_apart_in_a_rebuilt_copy(tmp_path):
    """A copy in float32 has each layer's own function, also where another has its name, as one of Keras does."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        functions = (scaled(2.0), scaled(3.0), "relu", relu)
        model = chain(*(layers.Dense(4, activation=function) for function in functions), shape=(5,))
    finally:
        keras.config.set_dtype_policy("float32")
    rx.to_onnx(model, tmp_path / "m.onnx")
    x = np.random.default_rng(0).normal(size=(3, 5)).astype("float32")
    want = x
    for layer, function in zip(model.layers[1:], (lambda x: 2 * np.tanh(x), lambda x: 3 * np.tanh(x), lambda x: np.maximum(x, 0),
                                                   lambda x: -np.maximum(x, 0)), strict=True):  # fmt: skip
        want = function(want @ np.asarray(layer.kernel) + np.asarray(layer.bias))
    np.testing.assert_allclose(run_onnx(tmp_path / "m.onnx", x)[0], want, rtol=1e-4, atol=1e-5)
