"""Blocks and gates: every allowed pair learns and stays near the identity, every other pair is refused."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_resnet as kr
from keras_resnet.growth import GATES, KINDS, BlockSpec
from tests.growth.test_grow import noise, small
from tests.helpers import images

ALLOWED = [(block, gate) for block, kind in KINDS.items() for gate in GATES if gate not in kind.refused]
GATED = [(block, gate) for block, gate in ALLOWED if gate != "none"]


def test_the_table_of_allowed_pairs():
    preact = [
        (b, g)
        for b in ("preact", "bottleneck", "depthwise")
        for g in ("zero_conv", "zero_gamma", "rezero", "fixup", "layerscale", "none")
    ]
    postact = [("postact", g) for g in ("zero_gamma", "rezero", "layerscale", "none")]
    assert sorted(ALLOWED) == sorted(preact + postact + [("plain", "none")])
    assert {block: kind.gate for block, kind in KINDS.items()} == {
        "preact": "zero_conv", "bottleneck": "zero_conv", "depthwise": "zero_conv", "postact": "zero_gamma", "plain": "none"
    }  # fmt: skip


@pytest.fixture(scope="module")
def vgg():
    """A small VGG-like classifier with a trained-like scale of activations."""
    x = inputs = keras.Input((32, 32, 3))
    initializer = lambda seed: keras.initializers.HeNormal(seed)  # noqa: E731
    for stage, filters in enumerate((16, 32)):
        x = layers.Conv2D(
            filters, 3, padding="same", activation="relu", kernel_initializer=initializer(stage), name=f"conv{stage}"
        )(x)
        x = layers.MaxPooling2D(name=f"pool{stage}")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, kernel_initializer=initializer(9), name="logits")(x))


@pytest.mark.parametrize("block,gate", GATED)
def test_one_step_of_sgd_moves_every_block_a_little(vgg, block, gate):
    lr = 1e-3
    deep = kr.grow(vgg, "pool*", blocks=2, block=block, gate=gate, seed=1)
    x, y = images(16, 32) / 127.5 - 1, np.arange(16) % 10
    start = [d.max for d in kr.drift(deep, x)]
    if GATES[gate].exact:
        assert start == [0.0] * 4
    else:
        # The same first branch without the gate: later blocks of the control see another input.
        unscaled = next(iter(kr.drift(kr.grow(vgg, "pool*", blocks=2, block=block, gate="none", seed=1), x))).max
        assert start[0] == pytest.approx(GATES[gate].bound * unscaled, rel=1e-4) and all(0 < s < 100 * lr for s in start)
    before = {b.path: [np.array(w.value) for layer in b.branch for w in layer.trainable_weights] for b in kr.find_blocks(deep)}
    deep.compile(keras.optimizers.SGD(lr), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    deep.train_on_batch(x, y)
    for found in kr.find_blocks(deep):
        after = [np.array(w.value) for layer in found.branch for w in layer.trainable_weights]
        assert any(not np.array_equal(a, b) for a, b in zip(before[found.path], after, strict=True)), (
            f"{found.path} got no gradient"
        )
    assert all(d.max <= 100 * lr for d in kr.drift(deep, x))


def test_refused_pairs_are_dead_or_explosive_indeed():
    """The refusals are facts: rebuild the refused pairs by hand and look."""
    x, y = images(16, 8) / 127.5 - 1, np.arange(16) % 4

    def net(last_kernel, tail):
        inputs = keras.Input((8, 8, 3))
        h = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
        f = layers.Conv2D(8, 3, padding="same", kernel_initializer=last_kernel, use_bias=False, name="w")(layers.ReLU()(h))
        f = tail(f)
        out = layers.Dense(4)(layers.GlobalAveragePooling2D()(layers.ReLU()(kr.layers.ResidualAdd("b")([h, f]))))
        model = keras.Model(inputs, out)
        model.compile(keras.optimizers.SGD(1e-4), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    dead = net("zeros", kr.layers.Affine(initial=0.0, name="gate"))
    dead.train_on_batch(x, y)
    assert not np.any(dead.get_layer("w").kernel) and float(dead.get_layer("gate").scale) == 0
    explosive = net("zeros", layers.BatchNormalization(epsilon=1e-5))
    explosive.train_on_batch(x, y)
    shortcut, branch = explosive.layers[-4].input
    values = [np.asarray(v) for v in keras.Model(explosive.inputs, [shortcut, branch])(x, training=True)]
    assert np.linalg.norm(values[1]) / np.linalg.norm(values[0]) > 100 * 1e-4, "the norm undoes the identity within one step"


@pytest.mark.parametrize("block,gate", [("postact", "zero_conv"), ("postact", "fixup"), ("plain", "zero_gamma")])
def test_refused_everywhere(block, gate):
    x = keras.Input((8, 8, 4))
    for build in (
        lambda: kr.layers.ResidualBlock(kind=block, gate=gate),
        lambda: kr.residual_stack(layers.ReLU()(x), 1, block, gate),
        lambda: kr.grow(small(), "act_a", block=block, gate=gate),
        lambda: BlockSpec(block, gate),
    ):
        with pytest.raises(ValueError, match=f'gate "{gate}" cannot be used with block "{block}"'):
            build()


class _OwnReLU(layers.ReLU):
    def call(self, x):
        return x


def _own_relu():
    def relu(x):
        return keras.activations.relu(x, negative_slope=0.5)

    return relu


SIGNS = [
    ("relu", lambda x: layers.ReLU()(x), True),
    ("relu6", lambda x: layers.Activation("relu6")(x), True),
    ("sigmoid", lambda x: layers.Activation("sigmoid")(x), True),
    ("fused relu", lambda x: layers.Conv2D(3, 1, activation="relu")(x), True),
    ("pool of relu", lambda x: layers.MaxPooling2D()(layers.ReLU()(x)), True),
    ("dropout of relu", lambda x: layers.SpatialDropout2D(0.5)(layers.ReLU()(x)), True),
    (
        "sum and concat",
        lambda x: layers.Concatenate()([layers.Add()([layers.ReLU()(x), layers.ReLU()(x)]), layers.ReLU()(x)]),
        True,
    ),
    ("keras.ops relu", lambda x: keras.ops.relu(x), True),
    ("nested relu", lambda x: keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(3, 1), layers.ReLU()])(x), True),
    ("bilinear of relu", lambda x: layers.UpSampling2D(interpolation="bilinear")(layers.ReLU()(x)), True),
    ("the input", lambda x: x, False),
    ("conv", lambda x: layers.Conv2D(3, 1)(x), False),
    ("leaky relu", lambda x: layers.LeakyReLU()(x), False),
    ("relu with slope", lambda x: layers.ReLU(negative_slope=0.1)(x), False),
    ("gelu", lambda x: layers.Activation("gelu")(x), False),
    ("sum with a signed one", lambda x: layers.Add()([layers.ReLU()(x), x]), False),
    ("relu minus a constant", lambda x: layers.ReLU()(x) + (-5.0), False),
    ("difference", lambda x: layers.Subtract()([layers.ReLU()(x), layers.ReLU()(x)]), False),
    ("norm of relu", lambda x: layers.BatchNormalization()(layers.ReLU()(x)), False),
    ("sum with a constant array", lambda x: keras.ops.add(keras.ops.relu(x), np.full((8, 8, 3), -1.0, "float32")), False),
    (
        "minimum with an initial value",
        lambda x: keras.ops.min(keras.ops.relu(keras.ops.expand_dims(x, 1)), axis=1, initial=-2.0),
        False,
    ),
    ("a function called relu", lambda x: layers.Activation(_own_relu())(x), False),
    ("a subclass of ReLU", lambda x: _OwnReLU()(x), False),
    ("bicubic of relu", lambda x: layers.UpSampling2D(interpolation="bicubic")(layers.ReLU()(x)), False),
    ("rescaled relu", lambda x: layers.Rescaling(-1.0)(layers.ReLU()(x)), False),
]


@pytest.mark.parametrize("name,build,allowed", SIGNS, ids=[row[0] for row in SIGNS])
def test_post_activation_only_where_the_graph_proves_it(name, build, allowed):
    inputs = keras.Input((8, 8, 3))
    x = build(inputs)
    model = keras.Model(inputs, layers.Activation("linear", name="end")(x))
    place = x._keras_history.operation.name
    uses = (
        lambda: kr.residual_stack(x, 1, "postact"),
        lambda: kr.layers.ResidualBlock(kind="postact")(x),
    ) + ((lambda: kr.grow(model, place, block="postact"),) if name != "the input" else ())
    for use in uses:
        if allowed:
            use()
        else:
            with pytest.raises(ValueError, match='cannot be the identity .* block="preact"'):
                use()


def test_sign_inside_a_nested_model_depends_on_all_its_calls():
    inner_in = keras.Input((8, 8, 3))
    inner = keras.Model(inner_in, layers.Conv2D(3, 1)(layers.MaxPooling2D(1, name="pool")(inner_in)), name="inner")
    x = keras.Input((8, 8, 3))
    positive = keras.Model(x, inner(layers.ReLU()(x)))
    assert len(kr.find_blocks(kr.grow(positive, "inner/pool", block="postact"))) == 1
    both = keras.Model(x, inner(layers.ReLU()(x)) + inner(layers.LeakyReLU()(x)))
    with pytest.raises(ValueError, match="cannot be the identity"):
        kr.grow(both, "inner/pool", block="postact")


# ---------------------------------------------------------------- the layer and the builder


@pytest.mark.parametrize("block,gate", ALLOWED)
def test_layer_saves_loads_and_equals_the_builder(tmp_path, block, gate):
    value = np.abs(noise(small())[..., :1]).repeat(8, -1)
    layer = kr.layers.ResidualBlock(8, kind=block, gate=gate, seed=7, depth=1)
    model = keras.Sequential([keras.Input((16, 16, 8)), layers.ReLU(), layer])
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(np.asarray(model(value)), np.asarray(loaded(value)))
    x = keras.Input((16, 16, 8))
    built = keras.Model(x, kr.residual_stack(layers.ReLU()(x), 1, block, gate, seed=7))
    np.testing.assert_array_equal(np.asarray(built(value)), np.asarray(model(value)))
    if GATES[gate].exact:
        np.testing.assert_array_equal(np.asarray(model(value)), value)
    assert [b.gate for b in kr.find_blocks(model)] == ([gate] if block != "plain" else [])


def test_layer_refuses_a_change_of_width_and_rank():
    with pytest.raises(ValueError, match=r"`filters` must equal the input's channels \(8\), got 16"):
        kr.layers.ResidualBlock(16)(keras.Input((4, 4, 8)))
    with pytest.raises(ValueError, match="at most 3 spatial axes"):
        kr.layers.ResidualBlock()(keras.Input((2, 2, 2, 2, 8)))
    with pytest.raises(ValueError, match="no depthwise"):
        kr.layers.ResidualBlock(kind="depthwise")(keras.Input((4, 4, 4, 8)))
    with pytest.raises(ValueError, match=r"unknown block .resnet."):
        kr.layers.ResidualBlock(kind="resnet")


def test_seed_makes_new_weights_reproducible_and_blocks_different():
    a, b, c = (kr.grow(small(), "act_a", blocks=2, seed=s) for s in (1, 1, 2))
    kernels = [[np.asarray(m.get_layer(f"act_a_grow{k}_conv1").kernel) for k in (1, 2)] for m in (a, b, c)]
    np.testing.assert_array_equal(kernels[0][0], kernels[1][0])
    assert not np.array_equal(kernels[0][0], kernels[2][0]) and not np.array_equal(kernels[0][0], kernels[0][1])


def test_fixup_scales_by_the_depth_of_the_stack():
    stds = {}
    for blocks in (1, 16):
        x = keras.Input((8, 8, 64))
        model = keras.Model(x, kr.residual_stack(x, blocks, gate="fixup", seed=0))
        stds[blocks] = float(np.std(model.get_layer("residual1_conv1").kernel))
        assert not np.any(model.get_layer("residual1_conv2").kernel)
        assert not any(isinstance(layer, layers.BatchNormalization) for layer in model.layers)
    assert stds[16] / stds[1] == pytest.approx(16**-0.5, rel=0.02)  # L^(-1/(2m-2)) with m = 2


def test_plain_control_has_the_parameters_of_a_residual_block_but_is_not_the_identity():
    x = keras.Input((8, 8, 8))
    plain = keras.Model(x, kr.residual_stack(layers.ReLU()(x), 2, "plain"))
    postact = keras.Model(x, kr.residual_stack(layers.ReLU()(x), 2, "postact"))
    assert plain.count_params() == postact.count_params() and not kr.find_blocks(plain)


def test_the_proof_does_not_grow_with_the_number_of_paths():
    x = inputs = keras.Input((8, 8, 3))
    x = layers.ReLU()(x)
    for _ in range(40):
        x = layers.Add()([x, layers.AveragePooling2D(1)(x)])
    assert keras.Model(inputs, kr.residual_stack(x, 1, "postact")).output.shape == inputs.shape


def test_stacks_of_one_name_count_on():
    x = keras.Input((8, 8, 3))
    model = keras.Model(x, kr.residual_stack(layers.ReLU()(kr.residual_stack(x, 2)), 2))
    assert [b.path for b in kr.find_blocks(model)] == [f"residual{k}" for k in (1, 2, 3, 4)]
    for bad in (2.5, "2", -1):
        with pytest.raises(ValueError, match="`blocks` must be a whole number of at least 0"):
            kr.residual_stack(x, bad)


def test_block_inside_time_distributed_and_on_integers():
    value = np.random.default_rng(0).standard_normal((2, 3, 8, 8, 4)).astype("float32")
    np.testing.assert_array_equal(np.asarray(layers.TimeDistributed(kr.layers.ResidualBlock())(value)), value)
    with pytest.raises(ValueError, match="uint8, a block needs floats"):
        kr.layers.ResidualBlock()(keras.Input((8, 8, 3), dtype="uint8"))


def test_residual_stack_on_vgg_of_keras_applications():
    base = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    model = keras.Model(base.input, kr.residual_stack(base.output, blocks=13))
    value = images(2, 32)
    np.testing.assert_array_equal(np.asarray(base(value)), np.asarray(model(value)))
