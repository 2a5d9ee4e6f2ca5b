"""`grow`: exactness on real architectures, weights, names, places, nesting, saving."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_resnet as kr
from tests.helpers import application, assert_unchanged, images, randomise, weights_of

TRUNKS = [
    ("VGG16", "block*_pool"),
    pytest.param("VGG19", "block[1-5]_conv2", marks=pytest.mark.slow),
    ("ResNet50", "conv[23]_block*_out"),
    pytest.param("ResNet50V2", "conv[23]_block1_out", marks=pytest.mark.slow),
    ("MobileNetV2", "*_add"),
    pytest.param("EfficientNetB0", "*_expand_activation", marks=pytest.mark.slow),
    pytest.param("DenseNet121", "pool[23]_relu", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name,after", TRUNKS)
def test_grown_application_is_equal(name, after):
    model = application(name)
    before = weights_of(model)
    deep = kr.grow(model, after, blocks=1)
    report = kr.identity_report(model, deep, images(2))
    assert report.eager == 0 and report.training == 0
    assert report.graph <= 1e-6 * report.scale
    assert report.scale > 0 and report.blocks == len(kr.find_blocks(deep)) > 0
    assert_unchanged(model, before)
    assert [x.name for x in deep.inputs] == [x.name for x in model.inputs]


def test_graph_mode_difference_inside_a_fused_group_is_reported():
    whole = application("ResNet50")
    stage = keras.Model(whole.input, whole.get_layer("conv2_block3_out").output)
    report = kr.identity_report(stage, kr.grow(stage, "conv2_block1_3_bn"), images(2))
    assert report.eager == 0 and report.training == 0
    assert 0 < report.graph <= 1e-6 * report.scale, "TensorFlow is expected to fuse Conv+BatchNorm+Add+ReLU differently"
    assert not report.graph_exact and report.holds and "relative" in str(report) and report.graph_noise > 0


def small(name="small", activation="relu", channels=8, data_format="channels_last", dtype=None):
    shape = (16, 16, 3) if data_format == "channels_last" else (3, 16, 16)
    common = {"padding": "same", "data_format": data_format, "dtype": dtype}
    axis = -1 if data_format == "channels_last" else 1
    x = inputs = keras.Input(shape, name="pixels")
    x = layers.Conv2D(channels, 3, name="conv_a", **common)(x)
    x = layers.BatchNormalization(axis=axis, name="norm_a", dtype=dtype)(x)
    x = layers.Activation(activation, name="act_a", dtype=dtype)(x)
    x = layers.Conv2D(2 * channels, 3, strides=2, name="conv_b", **common)(x)
    x = layers.ReLU(name="act_b", dtype=dtype)(x)
    x = layers.GlobalAveragePooling2D(data_format=data_format, dtype=dtype)(x)
    return randomise(keras.Model(inputs, layers.Dense(5, activation="softmax", name="head", dtype=dtype)(x), name=name))


def noise(model, count=4, seed=1):
    shapes = [(count, *tensor.shape[1:]) for tensor in model.inputs]
    arrays = [np.random.default_rng(seed).standard_normal(shape).astype("float32") for shape in shapes]
    return arrays[0] if len(arrays) == 1 else arrays


def assert_same(model, deep, x=None):
    x = noise(model) if x is None else x
    for a, b in zip(keras.tree.flatten(model(x)), keras.tree.flatten(deep(x)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_training_a_grown_model_leaves_the_original_alone():
    model = small()
    before = weights_of(model)
    deep = kr.grow(model, "act_*", blocks=2, seed=3)
    deep.compile("sgd", "sparse_categorical_crossentropy")
    deep.fit(noise(model, 8), np.arange(8) % 5, verbose=0)
    assert_unchanged(model, before)
    assert not np.array_equal(np.asarray(model(noise(model))), np.asarray(deep(noise(model))))


def test_names_count_on_and_stack_after_earlier_blocks():
    deep = kr.grow(kr.grow(small(), "act_a", blocks=2), "act_a", blocks=1)
    assert [block.path for block in kr.find_blocks(deep)] == ["act_a_grow1", "act_a_grow2", "act_a_grow3"]
    names = [layer.name for layer in deep.layers]
    assert names.index("act_a_grow2_add") < names.index("act_a_grow3_conv1") < names.index("conv_b")
    third = deep.get_layer("act_a_grow3_add")._inbound_nodes[0].arguments.args[0][0]
    assert third._keras_history.operation.name == "act_a_grow2_add"


@pytest.mark.parametrize("arguments", [{"blocks": 2}, {"total_blocks": 4}, {"total_layers": 8}, {"every": 1, "blocks": 2}])
@pytest.mark.parametrize("after", ["act_*", "*", None, lambda layer: "act" in layer.name or "relu" in layer.name])
def test_growing_again_by_the_same_words_means_the_trunk(after, arguments):
    if after is None and "every" not in arguments:
        arguments = {**arguments, "every": 1}
    model = keras.Model((m := small()).input, m.get_layer("act_b").output)
    once = kr.grow(model, after, **arguments)
    twice = kr.grow(once, after, **arguments)
    names = [block.path for block in kr.find_blocks(twice)]
    assert len(names) == 2 * len(kr.find_blocks(once)) > 0 and not any(name.count("_grow") > 1 for name in names)
    assert_same(model, twice)


def test_two_names_of_one_point_are_refused():
    deep = kr.grow(small(), "act_a")
    with pytest.raises(ValueError, match='"act_a" and "act_a_grow1_add" are one point'):
        kr.grow(deep, ["act_a", "act_a_grow1_add"])
    assert len(kr.find_blocks(kr.grow(deep, "act_a_grow1_relu1"))) == 2, "an exact name reaches inside"


def test_every_place_gets_other_weights():
    deep = kr.grow(kr.grow(small(), ["conv_a", "act_a"], seed=1), ["conv_a", "act_a"], seed=1)
    kernels = [np.asarray(block.branch[1].kernel) for block in kr.find_blocks(deep)]
    assert len(kernels) == 4 and len({kernel.tobytes() for kernel in kernels}) == 4


def test_regrowth_after_post_activation_blocks():
    model = small()
    deep = kr.grow(kr.grow(model, "act_a", block="postact"), "act_a", block="postact", blocks=2)
    order = [block.path for block in kr.find_blocks(deep)]
    assert order == ["act_a_grow1", "act_a_grow2", "act_a_grow3"]
    assert_same(model, deep)


def test_saved_grown_model_loads_and_grows_again(tmp_path):
    model = small()
    deep = randomise_new(kr.grow(model, "act_*", blocks=2, gate="rezero", seed=1))
    deep.save(tmp_path / "deep.keras")
    loaded = keras.saving.load_model(tmp_path / "deep.keras")
    assert_same(deep, loaded)
    again = kr.grow(loaded, "act_b", blocks=1)
    assert_same(deep, again)
    assert [b.path for b in kr.find_blocks(again)][-1] == "act_b_grow3"


def randomise_new(model, seed=5):
    rng = np.random.default_rng(seed)
    for block in kr.find_blocks(model):
        for layer in block.branch:
            for variable in layer.variables:
                if "variance" not in variable.name:
                    variable.assign(rng.normal(0, 0.2, variable.shape))
    return model


@pytest.mark.parametrize("block", ["preact", "bottleneck", "depthwise", "postact"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_every_block_is_the_identity_in_both_layouts(block, data_format):
    model = small(data_format=data_format)
    deep = kr.grow(model, "act_*", block=block)
    report = kr.identity_report(model, deep, noise(model))
    assert report.exact and report.blocks == 2
    axis = 1 if data_format == "channels_first" else -1
    norms = [layer for b in kr.find_blocks(deep) for layer in b.branch if isinstance(layer, layers.BatchNormalization)]
    assert norms and all(norm.axis % 4 == axis % 4 and norm.momentum == 0.9 for norm in norms)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"])
def test_exact_in_other_precisions(policy):
    model = small(dtype=policy)
    for block in ("preact", "postact"):
        deep = kr.grow(model, "act_*", blocks=2, block=block)
        report = kr.identity_report(model, deep, noise(model))
        assert report.eager == 0 and report.training == 0
        assert deep.get_layer("act_a_grow1_conv1").compute_dtype == model.get_layer("conv_a").compute_dtype


def test_a_mixed_block_on_a_float32_trunk_does_not_round_the_skip():
    x = keras.Input((16, 16, 8))
    y = kr.residual_stack(x, 2, dtype="mixed_float16")
    stack = keras.Model(x, y)
    value = np.random.default_rng(0).standard_normal((2, 16, 16, 8)).astype("float32")
    np.testing.assert_array_equal(np.asarray(stack(value)), value)
    assert y.dtype == "float32" and stack.get_layer("residual1_conv1").compute_dtype == "float16"
    layer = kr.layers.ResidualBlock(dtype="mixed_float16")
    np.testing.assert_array_equal(np.asarray(layer(value)), value)


def test_sequential_becomes_functional_and_stays_equal():
    model = randomise(
        keras.Sequential(
            [keras.Input((12, 12, 3)), layers.Conv2D(4, 3, activation="relu", name="a"), layers.Dropout(0.5, seed=1),
             layers.MaxPooling2D(name="pool"), layers.Flatten(), layers.Dense(3)]
        )
    )  # fmt: skip
    deep = kr.grow(model, ["a", "pool"], block="postact")
    assert_same(model, deep)
    # The copied seeds are in the same state, so even dropout draws the same.
    assert kr.identity_report(model, deep, noise(model)).training == 0


def test_unbuilt_sequential_and_subclassed_models_are_refused():
    with pytest.raises(ValueError, match="model.build"):
        kr.grow(keras.Sequential([layers.Conv2D(4, 3)]), "conv2d")

    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="functional API"):
        kr.grow(Own(), "conv2d")
    with pytest.raises(TypeError, match="must be a Keras model"):
        kr.grow("vgg16", "conv2d")


def two_inputs():
    a, b = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    conv = layers.Conv2D(4, 3, padding="same", activation="relu", name="shared")
    x = layers.Concatenate(name="both")([conv(a), conv(b)])
    y = layers.Conv2D(4, 3, name="last")(x)
    return randomise(keras.Model({"left": a, "right": b}, {"map": y, "mean": layers.GlobalAveragePooling2D()(y) + 1.0}))


def test_two_inputs_two_outputs_and_a_shared_layer():
    model = two_inputs()
    deep = kr.grow(model, ["both", "last"])
    x = {
        name: np.random.default_rng(i).standard_normal((2, 8, 8, 3)).astype("float32") for i, name in enumerate(("left", "right"))
    }
    report = kr.identity_report(model, deep, x)
    assert report.exact and sorted(x.name for x in deep.inputs) == ["left", "right"] and set(deep(x)) == {"map", "mean"}
    assert len(deep.get_layer("shared")._inbound_nodes) == 2, "sharing must be kept"


def test_a_layer_called_twice_needs_node():
    model = two_inputs()
    with pytest.raises(ValueError, match=r'"shared" is called 2 times; say which call with `node=0`'):
        kr.grow(model, "shared")
    x = {
        name: np.random.default_rng(i).standard_normal((2, 8, 8, 3)).astype("float32") for i, name in enumerate(("left", "right"))
    }
    for node in (0, 1):
        deep = kr.grow(model, "shared", node=node, gate="none", seed=1)
        changed = [name for name in x if not np.array_equal(*(np.asarray(_first_concat(m, x, name)) for m in (model, deep)))]
        assert changed == [["left", "right"][node]], "the block must follow the chosen call only"
    with pytest.raises(ValueError, match="must be below that, got 2"):
        kr.grow(model, "shared", node=2)


def _first_concat(model, x, name):
    both = model.get_layer("both")._inbound_nodes[0].arguments.args[0][["left", "right"].index(name)]
    return keras.Model(model.inputs, both)([x["left"], x["right"]])


def nested():
    trunk = small("trunk")
    features = keras.Model(trunk.input, trunk.get_layer("act_b").output, name="trunk")
    x = inputs = keras.Input((16, 16, 3))
    y = layers.Concatenate()([features(x), features(layers.Rescaling(-1.0)(x))])
    y = layers.Conv2D(3, 1, name="act_b")(y)  # a name that the trunk has too: paths repeat
    return randomise(keras.Model(inputs, y, name="outer"), seed=2)


def test_path_reaches_into_a_nested_model_and_sharing_is_kept():
    model = nested()
    deep = kr.grow(model, "trunk/act_b", blocks=2)
    assert kr.identity_report(model, deep, noise(model)).exact
    assert [b.path for b in kr.find_blocks(deep)] == ["trunk/act_b_grow1", "trunk/act_b_grow2"]
    assert len(deep.get_layer("trunk")._inbound_nodes) == 2
    assert len(kr.find_blocks(kr.grow(deep, "trunk/act_b"))) == 3
    outer = kr.grow(model, "trunk", node=1)
    assert [b.path for b in kr.find_blocks(outer)] == ["trunk_grow1"] and kr.identity_report(model, outer, noise(model)).exact


def test_nested_model_saves_and_loads(tmp_path):
    model = nested()
    deep = kr.grow(model, ["trunk/act_a", "act_b"])
    deep.save(tmp_path / "n.keras")
    assert_same(model, keras.saving.load_model(tmp_path / "n.keras"))


def test_frozen_parts_stay_frozen():
    model = nested()
    model.get_layer("trunk").trainable = False
    deep = kr.grow(model, "act_b")
    assert not deep.get_layer("trunk").trainable and not deep.get_layer("trunk").get_layer("conv_a").trainable
    assert len(deep.trainable_variables) == len(model.trainable_variables) + len(
        kr.grow(small(), "act_b").trainable_variables
    ) - len(small().trainable_variables)


def test_new_blocks_learn_in_a_frozen_model():
    model = small()
    model.trainable = False
    deep = kr.grow(model, "act_a")
    assert {v.path.split("/")[0] for v in deep.trainable_variables} == {
        f"act_a_grow1_{part}" for part in ("norm1", "conv1", "norm2", "conv2")
    }
    outer = nested()
    outer.get_layer("trunk").trainable = False
    inside = kr.grow(outer, "trunk/act_b")
    assert any("grow1" in v.path for v in inside.trainable_variables)
    assert not inside.get_layer("trunk").get_layer("conv_a").trainable
    model = small()
    model.get_layer("conv_a").kernel.trainable = False
    assert not kr.grow(model, "act_a").get_layer("conv_a").kernel.trainable


def test_vocabularies_come_along():
    lookup = layers.StringLookup()
    lookup.adapt(list("abcd"))
    inputs = keras.Input((6,), dtype="string")
    x = layers.Conv1D(3, 3, name="c")(layers.Embedding(20, 4)(lookup(inputs)))
    model = keras.Model(inputs, x)
    text = keras.ops.convert_to_tensor([list("abcdab"), list("zabbad")])
    np.testing.assert_array_equal(np.asarray(kr.grow(model, "c")(text)), np.asarray(model(text)))


def test_sharing_through_a_wrapper_is_refused():
    conv = layers.Conv2D(3, 1, name="conv")
    a, b = keras.Input((2, 8, 8, 3)), keras.Input((8, 8, 3))
    model = keras.Model([a, b], [layers.TimeDistributed(conv)(a), layers.ReLU(name="r")(conv(b))])
    with pytest.raises(ValueError, match='"conv" is shared by .* a copy cannot keep'):
        kr.grow(model, "r")


def test_layout_is_read_from_the_graph():
    x = keras.Input((3, 8, 8))
    y = layers.Conv2D(6, 3, data_format="channels_first", name="c")(x)
    stack = keras.Model(x, kr.residual_stack(y, 1))
    assert stack.get_layer("residual1_conv1").kernel.shape == (3, 3, 6, 6)
    turned = layers.Permute((2, 3, 1), name="turned")(y)
    deep = kr.grow(keras.Model(x, turned), "turned")
    assert deep.get_layer("turned_grow1_conv1").kernel.shape == (3, 3, 6, 6)
    assert deep.get_layer("turned_grow1_conv1").data_format == "channels_last"


def test_stateful_and_awkward_layers_come_along():
    x = inputs = keras.Input((8, 8, 3))
    normal = layers.Normalization()
    normal.adapt(np.random.default_rng(0).normal(3, 2, (64, 8, 8, 3)).astype("float32"))
    scale = 0.5
    x = layers.Lambda(lambda t: t * scale)(normal(x))
    x = layers.Conv2D(4, 3, name="conv")(x)
    x = ops.relu(x) + ops.ones_like(x)
    model = randomise(keras.Model(inputs, layers.SpatialDropout2D(0.3)(x)))
    deep = kr.grow(model, "conv")
    report = kr.identity_report(model, deep, noise(model))
    assert report.exact and report.scale > 0.1


def test_mask_goes_through_a_block():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(10, 4, mask_zero=True, name="embed")(inputs)
    model = keras.Model(inputs, layers.LSTM(3)(x))
    deep = kr.grow(model, "embed")
    tokens = np.array([[1, 2, 3, 0, 0, 0], [4, 5, 0, 0, 0, 0]], "int32")
    assert_same(model, deep, tokens)


@pytest.mark.parametrize("rank", [1, 3])
def test_one_and_three_dimensional_models(rank):
    conv = getattr(layers, f"Conv{rank}D")
    x = inputs = keras.Input((8,) * rank + (2,))
    x = conv(4, 3, activation="relu", name="conv")(x)
    model = randomise(keras.Model(inputs, conv(3, 2)(x)))
    for block in ("preact", "bottleneck", "postact"):
        assert kr.identity_report(model, kr.grow(model, "conv", block=block, blocks=2), noise(model)).exact


# ---------------------------------------------------------------- where and how many


def test_26_layers_on_vgg16_are_spread_as_the_paper_would():
    deep = kr.grow(application("VGG16"), "block*_pool", total_layers=26)
    places = [block.path.rpartition("_grow")[0] for block in kr.find_blocks(deep)]
    assert [places.count(f"block{i}_pool") for i in range(1, 6)] == [2, 2, 3, 3, 3]
    convs = [layer for block in kr.find_blocks(deep) for layer in block.branch if isinstance(layer, layers.Conv2D)]
    assert len(convs) == 26


def test_every_and_predicate_and_pattern():
    model = application("VGG16")
    every = kr.grow(model, every=4)
    convs = [layer.name for layer in model.layers if isinstance(layer, layers.Conv2D)]
    assert [b.path for b in kr.find_blocks(every)] == [f"{name}_grow1" for name in convs[3::4]]
    by_predicate = kr.grow(model, lambda layer: isinstance(layer, layers.MaxPooling2D) and layer.name != "block1_pool", every=2)
    assert [b.path for b in kr.find_blocks(by_predicate)] == ["block3_pool_grow1", "block5_pool_grow1"]
    assert len(kr.find_blocks(kr.grow(model, ["block1_pool", "block[23]_conv?"], blocks=2))) == 12


def test_total_blocks_count_only_the_trunk_when_grown_again():
    once = kr.grow(small(), "act_*", total_blocks=5)
    twice = kr.grow(once, ["act_a", "act_b"], total_blocks=4)
    counts = lambda m: [sum(b.path.startswith(p) for b in kr.find_blocks(m)) for p in ("act_a_", "act_b_")]  # noqa: E731
    assert counts(once) == [2, 3] and counts(twice) == [4, 5]


BAD = [
    ({"after": "blok1_pool"}, r'no layer of the model matches "blok1_pool"; did you mean "block1_pool"\?'),
    ({"after": "block9*"}, r'no layer of the model matches "block9\*"'),
    ({"after": []}, r"names no insertion point"),
    ({"after": lambda layer: False}, r"holds for no layer"),
    ({}, r"say where blocks go"),
    ({"after": "block1_pool", "blocks": 1, "total_blocks": 2}, r"one of `blocks`"),
    ({"after": "block1_pool", "blocks": -1}, r"at least 0, got -1"),
    ({"after": "block1_pool", "total_layers": 25}, r"divide by the 2 .* got 25; nearest are 24 and 26"),
    ({"after": "block1_pool", "total_layers": 26, "block": "bottleneck"}, r"nearest are 24 and 27"),
    ({"after": "block1_pool", "every": 2}, r"`every` must be at most the number of insertion points \(1\), got 2"),
    ({"after": "block1_pool", "every": 0}, r"at least 1, got 0"),
    ({"after": "block1_pool", "every": "2"}, r"`every` must be a whole number of at least 1, got '2'"),
    ({"after": "block1_pool", "blocks": 1.5}, r"`blocks` must be a whole number"),
    ({"after": "block1_pool", "total_layers": float("nan")}, r"`total_layers` must be a whole number"),
    ({"after": "block1_pool", "seed": -1}, r"`seed` must be a whole number of at least 0, got -1"),
    ({"after": "block1_pool", "node": "a"}, r"`node` must be a whole number"),
    ({"after": "block1_pool", "block": ["preact"]}, r"unknown block"),
    ({"after": lambda layer: layer.filters == 64}, r"the predicate `after` fails for layer"),
    ({"after": "input_layer*"}, r"no layer of the model matches"),
    ({"after": "block1_pool", "block": "preakt"}, r"unknown block .preakt.; did you mean .preact."),
    ({"after": "block1_pool", "gate": "zero_gama"}, r"did you mean .zero_gamma."),
    ({"after": "block1_pool", "block": "postact", "gate": "zero_conv"}, r"explosive"),
    ({"after": "block1_pool", "block": "postact", "gate": "fixup"}, r"cannot be used"),
    ({"after": "block1_pool", "block": "plain", "gate": "rezero"}, r"no shortcut"),
    ({"after": "block1_pool", "gate": "rezero+zero_conv"}, r"one gate"),
    ({"after": "block1_pool", "gate": ("zero_gamma", "zero_conv")}, r"never trains"),
]


@pytest.mark.parametrize("arguments,message", BAD)
def test_bad_arguments_say_what_and_how_to_fix(arguments, message):
    with pytest.raises(ValueError, match=message):
        kr.grow(application("VGG16"), **arguments)


def test_places_given_as_layers_classes_and_inputs():
    model = small()
    assert [b.path for b in kr.find_blocks(kr.grow(model, model.get_layer("act_b")))] == ["act_b_grow1"]
    with pytest.raises(ValueError, match="is not part of the model"):
        kr.grow(model, layers.ReLU())
    with pytest.raises(TypeError, match="not a class"):
        kr.grow(model, layers.ReLU)
    with pytest.raises(TypeError, match="got 5"):
        kr.grow(model, 5)
    with pytest.raises(ValueError, match="an input is not an insertion point"):
        kr.grow(model, "pixels")


def test_places_where_no_block_fits():
    x = keras.Input(())
    with pytest.raises(ValueError, match=r'no block fits at "r": its tensor has shape \(None,\)'):
        kr.grow(keras.Model(x, layers.ReLU(name="r")(x)), "r")
    x = keras.Input((8, 8, None))
    with pytest.raises(ValueError, match="number of channels .* is not known"):
        kr.grow(keras.Model(x, layers.ReLU(name="r")(x)), "r")
    x = keras.Input((8,), dtype="int32")
    with pytest.raises(ValueError, match="int32, a block needs floats"):
        kr.grow(keras.Model(x, layers.Reshape((2, 4), name="r")(x)), "r")


def test_a_layer_without_get_config_is_named():
    class Forgetful(layers.Layer):
        def __init__(self, factor, **kwargs):
            super().__init__(**kwargs)
            self.factor = factor

        def call(self, x):
            return x * self.factor

        def get_config(self):
            return super().get_config()

    x = keras.Input((8, 8, 3))
    with pytest.raises(ValueError, match='layer "oops" .* cannot be made again .*get_config'):
        kr.grow(keras.Model(x, layers.Conv2D(3, 1, name="c")(Forgetful(2.0, name="oops")(x))), "c")
