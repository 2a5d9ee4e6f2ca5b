"""What the builder makes of a config: options, ranks, layouts, precision, refusals. Outputs are compared, not shapes."""

import functools

import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.models.registry import catalogue, config_of
from tests.helpers import randomise

# All block features at once, small enough to build in every test.
TINY = {"depths": (1, 2), "widths": (8, 16), "stem_widths": (8,), "num_classes": 7, "norm_groups": 4}
KINDS = {
    "basic": kr.ResNetConfig(**TINY, block="basic"),
    "v1": kr.ResNetConfig(**TINY, stride_in="1x1", shortcut="projection_all"),
    "wide_grouped": kr.ResNetConfig(**TINY, groups=2, base_width=64, se_ratio=0.25),
    "d": kr.ResNetConfig(**{**TINY, "stem_widths": (4, 4, 8)}, stem_kernel=3, shortcut="average", stem_pool="conv"),
    "blur": kr.ResNetConfig(**TINY, antialias=True, activation="silu"),
    "option_a": kr.ResNetConfig(**TINY, block="basic", shortcut="pad", stem_pool=None),
    "option_a_end": kr.ResNetConfig(**TINY, block="basic", shortcut="pad_end", padding="same"),
    "option_a_average": kr.ResNetConfig(**TINY, block="basic", shortcut="pad_average"),
    "preact": kr.ResNetConfig(**TINY, preact=True, dropout=0.3, drop_path=0.2, head_dropout=0.1, gate="zero_conv"),
    "keras_v2": kr.ResNetConfig(**TINY, preact=True, shortcut="subsample", stride_block="last", conv_bias=("stem", "last")),
    "bit": kr.ResNetConfig(**TINY, preact=True, norm="group", weight_standardization=True, stem_pool="max_zero"),
    "plain": kr.ResNetConfig(**TINY, block="basic", shortcut="none"),
    "gated": kr.ResNetConfig(**TINY, gate="zero_gamma", norm_epsilon=1e-3, norm_momentum=0.7),
    "vgg": kr.VGGConfig(stages=(1, 2), widths=(8, 8), head_widths=(6,), head_size=3, num_classes=7, activation="gelu"),
    "vgg_bn": kr.VGGConfig(stages=(1, 2), widths=(8, 8), batch_norm=True, head="pool", head_widths=(), num_classes=7),
}


def build(kind, seed=0, **options):
    keras.utils.set_random_seed(seed)
    rank = options.pop("rank", 2)
    config = KINDS[kind].replace(rank=rank)
    options.setdefault("input_shape", (21, 18, 16)[:rank] + (3,))
    return randomise(kr.create_model(config, preprocessing="torch", **options), seed)


@functools.cache
def shared(kind):
    """`build(kind)`, made once: leave it as it is."""
    return build(kind)


def pixels(shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, (2, *shape)).astype("float32")


def channels_first(model, kind):
    other = build(kind, data_format="channels_first", input_shape=(3, 21, 18))
    other.set_weights(model.get_weights())
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_models_give_the_same_outputs(kind, tmp_path):
    model = shared(kind)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    x = pixels((21, 18, 3))
    np.testing.assert_array_equal(model(x), loaded(x))
    assert kr.config_from_dict(kr.card(loaded).config) == KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_survives_json_and_every_field_counts(kind):
    import json

    data = json.loads(json.dumps(KINDS[kind].to_dict()))
    assert kr.config_from_dict(data) == KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_channels_first_equals_channels_last(kind):
    model = shared(kind)
    x = pixels((21, 18, 3))
    expected = model(x).numpy()
    found = channels_first(model, kind)(np.moveaxis(x, -1, 1)).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Left out: pooling that needs two rows, reflection at a single row, standardisation that would count the zero rows.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith(("vgg", "blur", "bit"))])
def test_rank_one_is_rank_two_on_a_line(kind):
    """A 1-D net with weights w equals a 2-D net whose kernels hold w in the middle row, on an image one pixel high."""
    line = build(kind, rank=1)
    plane = kr.create_model(KINDS[kind].replace(rank=2), preprocessing="torch", input_shape=(None, 21, 3))
    names = {(layer.name, weight.name): weight for layer in plane.layers for weight in layer.weights}
    for layer in line.layers:
        for weight in layer.weights:
            target = names[layer.name, weight.name]
            value = np.array(weight)
            if value.ndim == 3:
                kernel = np.zeros(target.shape, "float32")
                kernel[kernel.shape[0] // 2] = value
                value = kernel
            target.assign(value)
    x = pixels((21, 3))
    expected, found = line(x).numpy(), plane(x[:, None]).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["basic", "wide_grouped", "d", "blur", "option_a", "keras_v2", "bit", "vgg"])
def test_rank_three_runs_and_depends_on_every_axis(kind):
    model = build(kind, rank=3)
    x = pixels((21, 18, 16, 3))
    base = model(x).numpy()
    assert base.shape == (2, 7) and np.isfinite(base).all()
    for axis in (1, 2, 3):
        assert np.abs(model(np.flip(x, axis).copy()).numpy() - base).max() > 1e-6 * np.abs(base).max()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", ["basic", "preact", "bit", "vgg_bn"])
def test_mixed_precision_keeps_pixels_and_logits_in_float32(kind, policy):
    exact, mixed = shared(kind), build(kind, dtype=policy)
    mixed.set_weights(exact.get_weights())
    x = pixels((21, 18, 3))
    first = keras.Model(mixed.input, mixed.get_layer("preprocessing").output)
    plain = keras.Model(exact.input, exact.get_layer("preprocessing").output)
    np.testing.assert_array_equal(first(x), plain(x))
    expected, found = exact(x).numpy(), mixed(x).numpy()
    assert found.dtype == "float32"
    assert str(mixed.get_layer("card").compute_dtype) == "float32"
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_output_stride_keeps_the_dense_outputs_of_the_strided_net():
    """Every second pixel of the dilated map is the strided map: dilation changes where a net looks from, not what it sees."""
    strided = build("basic", include_top=False, input_shape=(33, 33, 3))
    dilated = build("basic", include_top=False, input_shape=(33, 33, 3), output_stride=4)
    dilated.set_weights(strided.get_weights())
    x = pixels((33, 33, 3))
    small, large = strided(x).numpy(), dilated(x).numpy()
    assert small.shape[1:3] == (5, 5) and large.shape[1:3] == (9, 9)
    # The block after the first of the dilated stage sees further out at the border, so the middle is compared.
    np.testing.assert_allclose(large[:, ::2, ::2][:, 2:3, 2:3], small[:, 2:3, 2:3], rtol=0, atol=1e-5 * np.abs(small).max())


def test_stage_outputs_are_the_trunks_own_maps():
    whole = build("d", include_top=False)
    parts = build("d", features_only=True, input_shape=(21, 18, 3))
    assert list(parts.output) == ["stem", "stage1", "stage2"]
    parts.set_weights(whole.get_weights())
    x = pixels((21, 18, 3))
    maps = parts(x)
    np.testing.assert_array_equal(maps["stage2"], whole(x))
    for row in kr.feature_info(KINDS["d"]):
        assert maps[row["name"]].shape[-1] == row["channels"]
        assert maps[row["name"]].shape[1] == -(-21 // row["reduction"])
    chosen = build("d", features_only=("stage1",))
    assert list(chosen.output) == ["stage1"]


def test_feature_info_follows_the_output_stride():
    rows = kr.feature_info(config_of("resnet50").replace(output_stride=8))
    assert [row["reduction"] for row in rows] == [2, 4, 8, 8, 8]
    assert [row["channels"] for row in rows] == [64, 256, 512, 1024, 2048]


def test_drop_path_follows_the_linear_rule_and_drops_whole_samples():
    model = kr.create_model("resnet20", drop_path=0.4)
    rates = [layer.rate for layer in model.layers if isinstance(layer, kr.layers.DropPath)]
    # The first block's rate is 0, so it has no such layer.
    np.testing.assert_allclose(rates, [0.4 * k / 8 for k in range(1, 9)])
    layer = kr.layers.DropPath(0.25, seed=1)
    x = np.ones((4000, 2, 1), "float32")
    out = layer(x, training=True).numpy()
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (out[:, 0] == out[:, 1]).all()
    assert abs((out[:, 0, 0] == 0).mean() - 0.25) < 0.03
    np.testing.assert_array_equal(layer(x, training=False), x)


@pytest.mark.parametrize(("kind", "gate"), [("basic", "zero_gamma"), ("preact", "zero_conv")])
def test_a_gate_makes_every_branch_zero(kind, gate):
    config = KINDS[kind].replace(gate=gate)
    model = kr.create_model(config, input_shape=(24, 24, 3))
    adds = [layer for layer in model.layers if isinstance(layer, kr.layers.ResidualAdd)]
    assert len(adds) == 3 and {layer.gate for layer in adds} == {gate}
    probe = keras.Model(model.input, [layer.input[1] for layer in adds])
    assert all(not np.any(branch) for branch in probe(pixels((24, 24, 3))))


def test_blur_pool_blurs_along_every_axis():
    x = np.random.default_rng(0).standard_normal((1, 7, 6, 2)).astype("float32")
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
    expected = np.zeros((1, 4, 3, 2))
    for row in range(4):
        for column in range(3):
            window = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            expected[:, row, column] = (window * kernel[None, :, :, None]).sum((1, 2))
    np.testing.assert_allclose(kr.layers.BlurPool()(x), expected, atol=1e-6)


def test_option_a_puts_its_zeros_where_its_name_says():
    x = np.arange(1, 9, dtype="float32").reshape(1, 1, 2, 4)
    both = kr.layers.ChannelPad(8, "both")(x).numpy()
    end = kr.layers.ChannelPad(8, "end")(x).numpy()
    assert both[0, 0, 0].tolist() == [0, 0, 1, 2, 3, 4, 0, 0]
    assert end[0, 0, 0].tolist() == [1, 2, 3, 4, 0, 0, 0, 0]


def test_a_made_up_variant_needs_one_row(monkeypatch):
    config = kr.ResNetConfig(depths=(1, 1), widths=(16, 32), groups=4, base_width=16, se_ratio=0.5, num_classes=3, input_size=48)
    monkeypatch.setitem(catalogue(), "made_up", (config, "test"))
    assert "made_up" in kr.list_models("made*")
    model = kr.made_up(preprocessing="tf")
    assert model.output_shape == (None, 3) and kr.card(model).name == "made_up"
    assert kr.model_info("made_up").total == model.count_params()


def test_pixels_may_be_integers():
    model = shared("basic")
    x = pixels((21, 18, 3)).astype("uint8")
    np.testing.assert_array_equal(model.predict(x, verbose=0), model.predict(x.astype("float32"), verbose=0))


def test_input_tensor_continues_another_graph():
    inputs = keras.Input((21, 18, 3), name="raw")
    scaled = keras.layers.Rescaling(0.5)(inputs)
    model = build("basic", input_tensor=scaled)
    plain = build("basic")
    plain.set_weights(model.get_weights())
    x = pixels((21, 18, 3))
    np.testing.assert_array_equal(model(x), plain(x * 0.5))
    assert model.inputs[0] is inputs


def test_pooling_without_a_top():
    flat, average, largest = (build("basic", include_top=False, pooling=kind) for kind in (None, "avg", "max"))
    for model in (average, largest):
        model.set_weights(flat.get_weights())
    x = pixels((21, 18, 3))
    maps = flat(x).numpy()
    np.testing.assert_allclose(average(x), maps.mean((1, 2)), atol=1e-5 * np.abs(maps).max())
    np.testing.assert_array_equal(largest(x), maps.max((1, 2)))


def test_vgg_pools_to_the_size_its_dense_layers_know():
    """At the head's own size nothing is pooled; at twice that size pooling is the mean of 2×2."""
    small = build("vgg", input_shape=(12, 12, 3))
    large = build("vgg", input_shape=(24, 24, 3))
    assert "head_pool" not in [layer.name for layer in small.layers]
    large.set_weights(small.get_weights())
    features = keras.Model(large.input, large.get_layer("block2_pool").output)
    x = pixels((24, 24, 3))
    pooled = features(x).numpy().reshape(2, 3, 2, 3, 2, 8).mean((2, 4))
    hidden = pooled.reshape(2, -1)
    for name in ("fc1", "predictions"):
        hidden = large.get_layer(name)(hidden)
    expected = hidden.numpy()
    np.testing.assert_allclose(large(x), expected, atol=1e-5 * np.abs(expected).max())


def test_vgg_layers_are_named_as_in_keras_applications():
    theirs = [layer.name for layer in keras.applications.VGG16(weights=None, include_top=False).layers[1:]]
    ours = [layer.name for layer in kr.create_model("vgg16", include_top=False).layers if layer.name.startswith("block")]
    assert ours == theirs


REFUSED = [
    (lambda: kr.ResNetConfig.cifar(21), "`depth` must be of the form 6n+2, got 21; the nearest are 20 and 26"),
    (
        lambda: kr.ResNetConfig.cifar(12, block="bottleneck"),
        "`depth` must be of the form 9n+2, got 12; the nearest are 11 and 20",
    ),
    (lambda: kr.ResNetConfig.wide(20, 2), "`depth` must be of the form 6n+4, got 20; the nearest are 16 and 22"),
    (lambda: kr.create_model("resnt50"), "unknown model 'resnt50'; did you mean 'resnet50'"),
    (lambda: kr.create_model("resnet50", input_shape=(16, 40, 3)), "sides of at least 32, got (16, 40, 3)"),
    (lambda: kr.create_model("vgg16_w25", input_shape=(31, 40, 3)), "sides of at least 32"),
    (lambda: kr.create_model("resnet20", input_shape=(32, 32)), "`input_shape` must have 3 entries"),
    (lambda: kr.create_model("resnet20", input_shape=(32, 32, None)), "`input_shape` must give the number of channels"),
    (lambda: kr.create_model("resnet18", grups=2), "unknown argument `grups` for a resnet model; did you mean 'groups'"),
    (lambda: kr.create_model("resnet18", groups=2), '`groups` and `base_width` need block="bottleneck"'),
    (lambda: kr.create_model("resnet50", stride_in="5x5"), "`stride_in` must be one of '3x3', '1x1', got '5x5'"),
    (lambda: kr.create_model("resnet50", output_stride=12), "`output_stride` must be one of 4, 8, 16, 32, got 12"),
    (lambda: kr.create_model("resnet50", gate="zero_conv"), '`gate` of a post-activation net must be None or "zero_gamma"'),
    (lambda: kr.create_model("plain20", gate="zero_gamma"), "`gate` must be None in a plain net"),
    (lambda: kr.create_model("resnet50", norm="group", norm_groups=48), "`norm_groups` must divide the filters (64), got 48"),
    (lambda: kr.create_model("resnet50", drop_path=1.0), "`drop_path` must be at least 0 and below 1, got 1.0"),
    (lambda: kr.create_model("resnet50", depths=(3, 4)), "`depths` and `widths` must have one entry per stage"),
    (lambda: kr.create_model("resnet50", num_classes=0), "`num_classes` must be a whole number of at least 1, got 0"),
    (lambda: kr.create_model("resnet50", preprocessing="imagenet"), "preprocessing must be one of 'none', 'torch'"),
    (lambda: kr.create_model("resnet50", features_only="stage9"), "`features_only` may name stem, stage1"),
    (lambda: kr.create_model("resnet50", pooling="mean"), '`pooling` must be None, "avg" or "max", got \'mean\''),
    (lambda: kr.config_from_dict({"family": "resnet", "depths": [1], "widths": [8], "colour": 1}), "has no field colour"),
    (
        lambda: kr.blocks.bottleneck(keras.Input((8, 8, 16)), 256, groups=3, name="b"),
        "`groups` must divide the filters (64), got 3",
    ),
    (lambda: kr.create_model("resnet20", input_shape=32), "`input_shape` must be a tuple of whole numbers"),
    (
        lambda: kr.create_model("resnet20", input_shape=(32, "32", 3)),
        "`input_shape[1]` must be a whole number of at least 1, got '32'",
    ),
    (lambda: kr.create_model("resnet20", input_shape=(0, 32, 3)), "`input_shape[0]` must be a whole number of at least 1, got 0"),
    (lambda: kr.create_model("resnet20", depths=3), "`depths` must be a tuple, got 3"),
    (lambda: kr.create_model("resnet20", drop_path="some"), "`drop_path` must be at least 0 and below 1, got 'some'"),
    (lambda: kr.create_model("resnet20", norm_epsilon=0), "`norm_epsilon` must be a number above 0, got 0"),
    (lambda: kr.create_model("resnet20", se_ratio=-1), "`se_ratio` must be a number of at least 0, got -1"),
    (lambda: kr.create_model("resnet20", channels=5, input_shape=(32, 32, 4)), "`channels` is 5, but the input has 4"),
    (lambda: kr.create_model("resnet20", labels=["a", "b"]), "`labels` must have one name per logit (10), got 2"),
    (lambda: kr.create_model("resnet20", labels="abcdefghij"), "`labels` must be a list of class names"),
    (lambda: kr.set_card(kr.create_model("resnet20"), labels=["a"]), "`labels` must have one name per logit (10), got 1"),
    (lambda: kr.ResNetConfig((1,), (8,), growth=3), "`growth` must be a Growth or None, got 3"),
    (lambda: kr.Growth([3]), "`blocks` must be pairs of an insertion point and a number, got [3]"),
    (
        lambda: kr.create_model("vgg11_w12", growth=kr.Growth([("block9_pool", 1)])),
        'no layer of the model matches "block9_pool"',
    ),
    (lambda: kr.Growth([("a", 0)]), "`growth of a` must be a whole number of at least 1, got 0"),
    (
        lambda: kr.create_model("vgg16_w16_grown26", input_tensor=keras.Input((32, 32, 3))),
        "`input_tensor` does not go with the grown model 'vgg16_w16_grown26'",
    ),
    (lambda: kr.layers.ChannelPad(2)(np.zeros((1, 2, 2, 4))), "`filters` must be at least the channels that come in (4), got 2"),
]


@pytest.mark.parametrize(("action", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_bad_input_is_refused_in_one_sentence(action, message):
    with pytest.raises(ValueError) as caught:
        action()
    assert message in str(caught.value)


@pytest.mark.parametrize("weights", [3, True, ["a"]])
def test_weights_that_are_no_name_are_refused(weights):
    with pytest.raises(TypeError, match=r"`weights` must be None, a file, or a name from `list_weights\(\)`"):
        kr.create_model("resnet20", weights=weights)


@pytest.mark.parametrize("make", [kr.blocks.basic, kr.blocks.bottleneck, kr.blocks.preactivation, kr.blocks.plain])
def test_public_builders_work_on_any_feature_map(make):
    inputs = keras.Input((9, 8, 16))
    model = randomise(keras.Model(inputs, make(inputs, 32, stride=2, name="block")))
    x = np.random.default_rng(0).standard_normal((2, 9, 8, 16)).astype("float32")
    out = model(x).numpy()
    assert out.shape == (2, 5, 4, 32)
    assert (out.min() < 0) == (make is kr.blocks.preactivation)


@pytest.mark.slow
@pytest.mark.parametrize("name", kr.list_models())
def test_every_variant_survives_saving(name, tmp_path):
    """All rows of the table, one block per stage, non-default arguments."""
    config = config_of(name)
    if config.family == "resnet":
        changes = {"depths": (1,) * len(config.depths), "drop_path": 0.1, "head_dropout": 0.2}
    else:
        changes = {"stages": (1,) * 5, "head_widths": (8,), "head_dropout": 0.1}
    shape = (37, 41, 4)
    model = kr.create_model(name, num_classes=5, input_shape=shape, preprocessing={"mean": 0.4, "std": 0.3}, **changes)
    randomise(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = pixels(shape)
    np.testing.assert_array_equal(model.predict(x, verbose=0), loaded.predict(x, verbose=0))
    assert kr.config_from_dict(kr.card(loaded).config) == config.replace(num_classes=5, channels=4, **changes)


@pytest.mark.slow
def test_depth_1202_is_built_saved_and_loaded(tmp_path):
    model = kr.create_model("resnet1202", preprocessing="cifar10")
    assert model.count_params() == 19_510_906
    model.save(tmp_path / "deep.keras")
    loaded = keras.saving.load_model(tmp_path / "deep.keras")
    x = pixels((32, 32, 3))
    np.testing.assert_array_equal(model.predict(x, verbose=0), loaded.predict(x, verbose=0))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_dense_head_on_small_and_uneven_maps_pools_like_torch(data_format):
    """Cell i averages the places from ⌊i·side/7⌋ to ⌈(i+1)·side/7⌉, which for small maps repeats them."""
    x = np.random.default_rng(0).standard_normal((2, 3, 9, 5)).astype("float32")
    expected = np.empty((2, 7, 7, 5))
    for i in range(7):
        for j in range(7):
            rows, columns = slice(i * 3 // 7, -(-(i + 1) * 3 // 7)), slice(j * 9 // 7, -(-(j + 1) * 9 // 7))
            expected[:, i, j] = x[:, rows, columns].astype("float64").mean((1, 2))
    layer = kr.layers.AdaptiveAverage(7, data_format=data_format)
    turned = x if data_format == "channels_last" else x.transpose(0, 3, 1, 2)
    found = np.asarray(layer(turned))
    np.testing.assert_allclose(
        found if data_format == "channels_last" else found.transpose(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-6
    )
    vgg = kr.create_model("vgg11", input_shape=(32, 64, 3), width=3, num_classes=4)
    assert np.isfinite(np.asarray(vgg(np.full((1, 32, 64, 3), 100.0, "float32")))).all()


def test_slim_vggs_have_any_width_by_name_and_models_any_name():
    model = kr.create_model("vgg16_bn_w16", name="mine")
    assert model.name == "mine" and kr.card(model).config["width"] == 16 and kr.card(model).config["batch_norm"]
    assert kr.create_model("vgg16_w25").count_params() == kr.create_model("vgg16_w50", width=25).count_params()
    for wrong in ("vgg16_w0", "vgg16_w999", "vgg12_w25"):
        with pytest.raises(ValueError, match="unknown model"):
            kr.create_model(wrong)


def test_random_weights_differ_between_layers_and_repeat_with_the_seed():
    def kernels(seed):
        keras.utils.set_random_seed(seed)
        model = kr.create_model("resnet20", weights=None)
        return [keras.ops.convert_to_numpy(v) for v in model.trainable_variables if v.name == "kernel"]

    first, again, other = kernels(3), kernels(3), kernels(4)
    for i, kernel in enumerate(first):
        np.testing.assert_array_equal(kernel, again[i])
        assert not any(np.array_equal(kernel, twin) for twin in [*first[i + 1 :], other[i]])
