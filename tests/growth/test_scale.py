"""`grow(scale=…)`: exact at the start in every dtype and layout, stored in the model, and what it changes in training."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_resnet as kr
from keras_resnet.growth import GATES, KINDS, BlockSpec, block_scales
from tests.growth.test_grow import nested, noise, small
from tests.helpers import randomise

PAIRS = [(block, gate) for block in KINDS if KINDS[block].residual for gate in GATES if gate not in KINDS[block].refused]
# TensorFlow has no float64 and float16 convolutions for channels first on the CPU.
FORMATS = [
    ("channels_last", "float32"),
    ("channels_last", "mixed_float16"),
    ("channels_first", "mixed_bfloat16"),
    pytest.param("channels_last", "float64", marks=pytest.mark.slow),
    pytest.param("channels_last", "mixed_bfloat16", marks=pytest.mark.slow),
    pytest.param("channels_first", "float32", marks=pytest.mark.slow),
]


def backbone(dtype="float32", data_format="channels_last", rank=2, size=1.0):
    """A network without norms whose features have about the given size; its insertion point is "act"."""
    shape = (6,) * rank
    shape = (*shape, 3) if data_format == "channels_last" else (3, *shape)
    x = inputs = keras.Input(shape)
    if rank:
        conv = getattr(layers, f"Conv{rank}D")
        x = conv(4, 3, padding="same", data_format=data_format, dtype=dtype, name="conv")(x)
    else:
        x = layers.Dense(4, dtype=dtype, name="conv")(x)
    x = layers.Activation("relu", dtype=dtype, name="act")(x)
    x = layers.Flatten(dtype=dtype)(x)
    model = keras.Model(inputs, layers.Dense(2, dtype=dtype, name="head")(x))
    kernel = model.get_layer("conv").kernel
    kernel.assign(size * np.array(kernel))
    return model


def batch(model, count=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *model.inputs[0].shape[1:])).astype("float32")


def rms_at(model, layer, x):
    values = np.asarray(keras.Model(model.inputs, model.get_layer(layer).output)(x)).astype("float64")
    return np.sqrt(np.mean(values**2))


@pytest.mark.parametrize("data_format,dtype", FORMATS)
def test_every_block_and_gate_starts_as_the_identity(dtype, data_format):
    model = backbone(dtype, data_format, size=300.0)
    x = batch(model)
    before = np.asarray(model(x))
    for block, gate in PAIRS:
        deep = kr.grow(model, "act", block=block, gate=gate, scale="match", data=x, seed=1)
        (found,) = kr.find_blocks(deep)
        assert found.add.scale == pytest.approx(rms_at(model, "act", x), rel=1e-3) and found.add.scale > 50
        for after in (np.asarray(deep(x)), np.asarray(deep(x, training=True))):
            if GATES[gate].exact:
                np.testing.assert_array_equal(after, before, f"{block}, {gate}")
            elif gate == "layerscale" and dtype in ("float32", "float64"):
                assert 0 < np.abs(after - before).max() < 0.1 * np.abs(before).max()


@pytest.mark.parametrize("rank", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_other_ranks_start_as_the_identity(rank):
    model = backbone(rank=rank, size=300.0)
    x = batch(model)
    for block, gate in PAIRS:
        if block == "depthwise" and rank in (0, 3):
            with pytest.raises(ValueError, match=r'no depthwise convolution for .*; use block "preact"'):
                kr.grow(model, "act", block=block, gate=gate)
            continue
        deep = kr.grow(model, "act", block=block, gate=gate, blocks=2, scale="match", data=x)
        if GATES[gate].exact:
            np.testing.assert_array_equal(np.asarray(deep(x)), np.asarray(model(x)), f"{block}, {gate}")


def test_a_closed_gate_stays_zero_where_the_scaled_branch_would_overflow_float16():
    model = backbone("mixed_float16", size=3e3)
    x = batch(model)
    deep = kr.grow(model, "act", gate="rezero", scale=6e4, seed=0)
    probe = keras.Model(deep.inputs, deep.get_layer("act_grow1_add").input)
    branch = np.asarray(keras.Model(deep.inputs, deep.get_layer("act_grow1_conv2").output)(x)).astype("float64")
    assert np.isfinite(branch).all() and 6e4 * np.abs(branch).max() > np.finfo("float16").max
    assert np.isfinite(np.asarray(probe(x)[1])).all()
    np.testing.assert_array_equal(np.asarray(deep(x)), np.asarray(model(x)))


def test_layerscale_keeps_its_bound_times_the_scale():
    model = backbone()
    x = batch(model)
    spec = BlockSpec("preact", "layerscale", scale=40.0)
    assert spec.bound == pytest.approx(40 * GATES["layerscale"].bound) and not spec.is_exact
    deep = kr.grow(model, "act", gate="layerscale", scale=40.0, seed=2)
    ends = keras.Model(deep.inputs, [deep.get_layer("act").output, deep.get_layer("act_grow1_add").output])
    before, after = (np.asarray(value).astype("float64") for value in ends(x))
    unscaled = np.asarray(keras.Model(deep.inputs, deep.get_layer("act_grow1_conv2").output)(x)).astype("float64")
    assert np.all(np.abs(after - before) <= spec.bound * np.abs(unscaled) + 1e-6)
    assert np.abs(after - before).max() == pytest.approx(spec.bound * np.abs(unscaled).max(), rel=1e-3)


def test_the_scale_multiplies_the_branch_after_its_gate():
    model = backbone(size=20.0)
    x = batch(model)
    plain, scaled = (kr.grow(model, "act", seed=3, scale=scale) for scale in (None, 8.0))
    for deep in (plain, scaled):
        gate = deep.get_layer("act_grow1_conv2")
        gate.kernel.assign(np.random.default_rng(0).standard_normal(gate.kernel.shape))
    sums = [np.asarray(keras.Model(m.inputs, m.get_layer("act_grow1_add").output)(x)) for m in (plain, scaled)]
    shortcut = np.asarray(keras.Model(plain.inputs, plain.get_layer("act").output)(x))
    np.testing.assert_allclose(sums[1] - shortcut, 8 * (sums[0] - shortcut), rtol=1e-3, atol=1e-2)
    ratios = [kr.drift(m, x).blocks[0].mean for m in (plain, scaled)]
    assert ratios[1] == pytest.approx(8 * ratios[0], rel=1e-4), "drift measures what is added"


def test_the_scale_is_stored_in_the_model(tmp_path):
    model = backbone(size=50.0)
    x = batch(model)
    deep = kr.grow(model, "act", blocks=2, scale="match", data=x, seed=1)
    deep.save(tmp_path / "deep.keras")
    loaded = keras.saving.load_model(tmp_path / "deep.keras")
    assert block_scales(loaded) == block_scales(deep) == {f"act_grow{k}": kr.find_blocks(deep)[0].add.scale for k in (1, 2)}
    # A run that resumes grows again without the data, from what its checkpoint says.
    again = kr.grow(model, "act", blocks=2, scale=block_scales(loaded), seed=1)
    assert block_scales(again) == block_scales(deep)
    with pytest.raises(ValueError, match='no number for block "act_grow3"; did you mean'):
        kr.grow(model, "act", blocks=3, scale=block_scales(loaded))
    config = deep.get_layer("act_grow1_add").get_config()
    config.pop("scale")
    assert kr.layers.ResidualAdd.from_config(config).scale == 1, "configs of version 0.1 have no scale"


def test_a_nested_model_is_measured_over_all_its_calls():
    model = nested()
    x = noise(model, 6)
    deep = kr.grow(model, "trunk/act_b", scale="match", data=(x, np.zeros(6)))
    (found,) = kr.find_blocks(deep)
    trunk = model.get_layer("trunk")
    values = [np.asarray(keras.Model(trunk.inputs, trunk.get_layer("act_b").output)(x)).astype("float64")]
    assert found.path == "trunk/act_b_grow1" and found.add.scale == pytest.approx(np.sqrt(np.mean(values[0] ** 2)), rel=0.5)
    np.testing.assert_array_equal(np.asarray(deep(x)), np.asarray(model(x)))


def test_blocks_on_top_of_trained_blocks_are_measured_after_them():
    model = backbone(size=5.0)
    x = batch(model)
    first = randomise(kr.grow(model, "act", scale="match", data=x, seed=0))
    second = kr.grow(first, "act", scale="match", data=x, seed=1)
    assert kr.find_blocks(second)[1].add.scale == pytest.approx(rms_at(first, "act_grow1_add", x), rel=1e-5)
    assert kr.find_blocks(second)[0].add.scale == kr.find_blocks(first)[0].add.scale
    np.testing.assert_array_equal(np.asarray(second(x)), np.asarray(first(x)))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"scale": "match"}, "pass `data=x`"),
        ({"scale": None, "data": np.ones((1, 6, 6, 3))}, 'only used by `scale="match"`'),
        ({"scale": 2.0, "data": np.ones((1, 6, 6, 3))}, 'only used by `scale="match"`'),
        ({"scale": "rms"}, '`scale` must be "match"'),
        ({"scale": 0}, "positive finite number, got 0"),
        ({"scale": float("nan")}, "positive finite number, got nan"),
        ({"scale": -1.0}, "positive finite number"),
        ({"scale": True}, "positive finite number"),
        ({"scale": {}}, 'no number for block "act_grow1"'),
        ({"scale": {"act_grow1": 0.0}}, "positive finite number"),
        ({"scale": 2.0, "block": "plain"}, 'block "plain" has none'),
        ({"scale": "match", "data": np.zeros((0, 6, 6, 3), "float32")}, "no inputs"),
        ({"scale": "match", "data": -np.zeros((2, 6, 6, 3), "float32")}, 'output of "act" has a root mean square of 0'),
        ({"scale": "match", "data": np.full((2, 6, 6, 3), np.inf, "float32")}, "no scale matches it"),
    ],
)
def test_scales_that_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kr.grow(backbone(), "act", **options)


@pytest.mark.parametrize("optimizer,power", [("sgd", 2), ("adam", 1)])
def test_the_first_step_of_a_scaled_branch_is_larger_by_the_scale(optimizer, power):
    """SGD moves a branch by the square of its scale, Adam by the scale: as much as the layers next to it move."""
    model = backbone(size=100.0)
    x = batch(model, 16)
    y = np.random.default_rng(1).standard_normal((16, 2)).astype("float32")
    moved = []
    for scale in (None, 10.0):
        deep = kr.grow(model, "act", scale=scale, seed=5)
        rule = keras.optimizers.SGD(1e-9) if optimizer == "sgd" else keras.optimizers.Adam(1e-6, epsilon=1e-12)
        deep.compile(rule, "mse")
        deep.train_on_batch(x, y)
        moved.append(kr.drift(deep, x).blocks[0].mean)
    assert moved[1] / moved[0] == pytest.approx(10.0**power, rel=0.05)


def test_repeated_names_get_several_blocks():
    model = small()
    deep = kr.grow(model, ["act_b", "act_a", "act_b"], gate="rezero")
    assert [b.path for b in kr.find_blocks(deep)] == ["act_a_grow1", "act_b_grow1", "act_b_grow2"]
    assert len(kr.find_blocks(kr.grow(model, ["act_b", "act_b", "act_*"], blocks=2))) == 6
    with pytest.raises(ValueError, match="cannot be combined with `total_blocks`"):
        kr.grow(model, ["act_b", "act_b"], total_blocks=4)


def test_an_exported_file_holds_the_scale(tmp_path):
    """The file computes what Keras computes; that the scale matters shows in the same network without it."""
    import onnxruntime

    import resnet_export as rx

    model = backbone(size=30.0)
    x = batch(model)
    outputs = {}
    for name, options in {"plain": {}, "scaled": {"scale": "match", "data": x}}.items():
        deep = kr.grow(model, ["act", "head"] if name == "plain" else "act", gate="rezero", seed=0, **options)
        deep.get_layer("act_grow1_scale").scale.assign(0.3)
        path = tmp_path / f"{name}.onnx"
        rx.to_onnx(deep, str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x}
        outputs[name] = session.run(None, feed)[0]
        np.testing.assert_allclose(outputs[name], np.asarray(deep(x)), rtol=1e-4, atol=1e-3)
    assert np.abs(outputs["scaled"] - outputs["plain"]).max() > 1


FAMILIES = [
    ("VGG16", "block[3-5]_pool"),
    ("ResNet50V2", "conv[34]_block1_out"),
    ("MobileNetV2", "block_[36]_project_BN"),
    ("MobileNetV3Small", "expanded_conv_[47]_add"),
    ("EfficientNetB0", "block3a_project_bn"),
    ("DenseNet121", "pool[23]_relu"),
    ("ConvNeXtTiny", "*/convnext_tiny_downsampling_conv_1"),
    ("MobileNet", "conv_pw_[36]_relu"),
    ("NASNetMobile", "activation_10*"),
    ("Xception", "block[3-5]_pool"),
    ("InceptionV3", "mixed[0-2]"),
    ("ResNet50", "conv[23]_block1_out"),
]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("name,after", FAMILIES)
def test_applications_stay_equal_with_a_matched_scale(name, after, policy):
    from tests.helpers import images

    size = 96
    keras.config.set_dtype_policy(policy)
    try:
        make = getattr(keras.applications, name)
        model = make(weights=None, include_top=False, input_shape=(size, size, 3))
        x = images(2, size)
        deep = kr.grow(model, after, scale="match", data=x, seed=0)
    finally:
        keras.config.set_dtype_policy("float32")
    blocks = kr.find_blocks(deep)
    assert blocks and all(block.add.scale != 1 for block in blocks if block.add.grown)
    np.testing.assert_array_equal(np.asarray(deep(x)), np.asarray(model(x)))
    with np.errstate(all="ignore"):
        graph = [m.predict(x, verbose=0).astype("float64") for m in (model, deep)]
    bound = 1e-6 if policy == "float32" else 4e-3
    assert np.abs(graph[0] - graph[1]).max() <= bound * np.abs(graph[0]).max()
    np.testing.assert_array_equal(np.asarray(kr.without_blocks(deep)(x)), np.asarray(model(x)))
