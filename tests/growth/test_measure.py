"""identity_report, drift and prune."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_resnet as kr
from tests.growth.test_grow import nested, noise, randomise_new, small
from tests.helpers import assert_unchanged, images, randomise, weights_of


def test_report_moves_no_state_and_sees_a_planted_fault():
    model = small()
    deep = kr.grow(model, "act_*", gate="zero_gamma")
    states = weights_of(model), weights_of(deep)
    report = kr.identity_report(model, deep, noise(model))
    assert_unchanged(model, states[0])
    assert_unchanged(deep, states[1])
    assert report.exact and report.graph_exact and report.holds
    kernel = deep.get_layer("conv_b").kernel
    kernel.assign(np.array(kernel) * (1 + 1e-6))
    fault = kr.identity_report(model, deep, noise(model))
    assert fault.eager > 0 and fault.training > 0 and not fault.exact
    assert json.loads(json.dumps(report.to_json()))["exact"] is True


def dropping(rate=0.5):
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="c")(x)
    x = layers.Dropout(rate, name="drop", seed=3)(x)
    return keras.Model(inputs, layers.Conv2D(2, 1, name="d")(x))


def test_a_fault_in_training_mode_only_is_seen():
    model = dropping()
    deep = kr.grow(model, "drop")
    assert kr.identity_report(model, deep, noise(model)).training == 0
    deep.get_layer("drop").rate = 0.9
    report = kr.identity_report(model, deep, noise(model))
    assert report.eager == 0 and report.training > 0 and not report.exact


def test_gradients_are_those_of_training_mode():
    model = dropping(rate=0.999999)
    names = kr.identity_report(model, kr.grow(model, "d"), noise(model)).without_gradient
    assert "c/kernel" in names, "dropout lets nothing through in training mode"


def test_stateful_layers_are_copied_and_left_alone():
    x = inputs = keras.Input((6, 3), batch_size=2)
    x = layers.Conv1D(3, 3, padding="same", name="c")(x)
    model = keras.Model(inputs, layers.LSTM(4, stateful=True, name="r")(x))
    value = np.random.default_rng(0).standard_normal((2, 6, 3)).astype("float32")
    model(value)
    state = np.array(model.get_layer("r").states[0].value)
    deep = kr.grow(model, "c")
    report = kr.identity_report(model, deep, value)
    assert report.eager == 0 and state.any()
    for each in (model, deep):
        np.testing.assert_array_equal(np.array(each.get_layer("r").states[0].value), state)


def test_a_fault_below_float32_is_seen_in_float64():
    model = small(dtype="float64")
    deep = kr.grow(model, "act_b")
    kernel = deep.get_layer("conv_b").kernel
    kernel.assign(np.array(kernel) * (1 + 1e-12))
    assert 0 < kr.identity_report(model, deep, noise(model)).eager < 1e-9


def test_report_tells_of_frozen_blocks_and_bad_input():
    model = small()
    deep = kr.grow(model, "act_a")
    assert kr.identity_report(model, deep, noise(model)).added_trainable > 0
    deep.trainable = False
    assert "0 of them trainable" in str(kr.identity_report(model, deep, noise(model)))
    for bad in (None, np.zeros((0, 16, 16, 3), "float32"), []):
        with pytest.raises(ValueError, match="`x` must be inputs of the model"):
            kr.identity_report(model, deep, bad)


def test_report_names_the_parameters_that_cannot_learn_yet():
    model = small()
    deep = kr.grow(model, "act_a", gate="zero_gamma")
    names = kr.identity_report(model, deep, noise(model)).without_gradient
    closing = "act_a_grow1_norm3"
    branch = [v.path for layer in deep.layers if layer.name.startswith("act_a_grow1") for v in layer.trainable_variables]
    assert sorted(names) == sorted(path for path in branch if not path.startswith(closing)), (
        "only γ and β of the last norm learn at step 0"
    )
    deep = kr.grow(model, "act_a", gate="zero_conv")
    names = kr.identity_report(model, deep, noise(model)).without_gradient
    assert "act_a_grow1_conv2/kernel" not in names and "act_a_grow1_conv1/kernel" in names and "conv_a/kernel" not in names


@pytest.mark.parametrize("head", ["dense", "layer", "nested"])
def test_saturated_softmax_does_not_hide_gradients(head):
    x = inputs = keras.Input((4, 4, 3))
    x = layers.Conv2D(4, 3, name="c")(x)
    x = layers.Dense(3, activation="softmax" if head == "dense" else None, name="d")(layers.Flatten()(x))
    if head == "layer":
        x = layers.Softmax()(x)
    if head == "nested":
        x = keras.Sequential([keras.Input((3,)), layers.Activation("softmax")])(x)
    model = keras.Model(inputs, x)
    model.get_layer("d").bias.assign([1e4, 0, 0])
    report = kr.identity_report(model, kr.grow(model, "c"), noise(model))
    assert not any(path.startswith(("c/", "d/", "c_grow1_conv2")) for path in report.without_gradient)
    deep = kr.grow(model, "c")
    kr.identity_report(model, deep, noise(model))
    np.testing.assert_array_equal(
        np.asarray(deep(noise(model))), np.asarray(model(noise(model))), "softmax must be back in place"
    )


def by_hand(model, x, add):
    shortcut, branch = (np.asarray(v) for v in keras.Model(model.inputs, add.input)(x))
    norm = lambda a: np.sqrt((a.reshape(len(a), -1).astype("float64") ** 2).sum(1))  # noqa: E731
    return norm(branch) / norm(shortcut), branch.var() / (shortcut + branch).var()


def test_drift_agrees_with_a_hand_made_measurement():
    deep = randomise_new(kr.grow(small(), "act_*", blocks=2, gate="rezero"))
    x = noise(deep, 10)
    report = kr.drift(deep, x, batch_size=4)
    assert report.images == 10 and [d.block for d in report] == [b.path for b in kr.find_blocks(deep)]
    for d in report:
        ratios, share = by_hand(deep, x, deep.get_layer(f"{d.block}_add"))
        assert d.mean == pytest.approx(ratios.mean(), rel=1e-5) and d.max == pytest.approx(ratios.max(), rel=1e-5)
        assert d.variance_share == pytest.approx(share, rel=1e-4)
        assert d.gate_value == pytest.approx(abs(float(deep.get_layer(f"{d.block}_scale").scale)))
    assert "act_b_grow2" in str(report) and len(json.loads(json.dumps(report.to_json()))["blocks"]) == 4


def test_drift_takes_batches_and_datasets_and_enters_nested_models_and_layers():
    import tensorflow as tf

    deep = randomise_new(kr.grow(nested(), ["trunk/act_b", "act_b"], gate="zero_gamma"))
    x = noise(deep, 6)
    reports = [
        kr.drift(deep, data, 3)
        for data in (x, (x, np.arange(6)), [x[:4], x[4:]], tf.data.Dataset.from_tensor_slices((x, np.arange(6))).batch(4))
    ]
    for other in reports[1:]:
        assert [d.block for d in other] == ["trunk/act_b_grow1", "act_b_grow1"]
        np.testing.assert_allclose([d.mean for d in other], [d.mean for d in reports[0]], rtol=1e-6)
    sequential = keras.Sequential(
        [
            keras.Input((16, 16, 4)),
            kr.layers.ResidualBlock(gate="none", seed=1, name="first"),
            kr.layers.ResidualBlock(name="second"),
        ]
    )
    drifts = {d.block: d for d in kr.drift(sequential, np.ones((2, 16, 16, 4), "float32"))}
    assert (
        drifts["first"].mean > 0.1
        and drifts["first"].gate_value is None
        and drifts["second"].max == 0 == drifts["second"].gate_value
    )


def test_prune_of_untouched_blocks_changes_nothing_and_gives_the_original_back():
    for model in (small(), nested()):
        after = ["act_*"] if model.name == "small" else ["trunk/act_*", "act_b"]
        deep = kr.grow(model, after, blocks=2)
        back, report = kr.prune(deep)
        assert len(report.removed) == len(kr.find_blocks(deep)) and not report.kept and report.change == 0
        assert back.count_params() == model.count_params() and not kr.find_blocks(back)
        np.testing.assert_array_equal(np.asarray(back(noise(model))), np.asarray(model(noise(model))))
        assert len(kr.find_blocks(deep)) > 0, "the original is not touched"


def test_prune_by_gate_and_by_drift():
    model = small()
    deep = kr.grow(model, "act_*", blocks=2, block="postact", gate="rezero", seed=1)
    for k, value in ((1, 0.5), (2, 1e-4)):
        deep.get_layer(f"act_b_grow{k}_scale").scale.assign(value)
    assert kr.prune(deep)[1].removed == ["act_a_grow1", "act_a_grow2"]
    pruned, report = kr.prune(deep, tolerance=1e-3)
    assert (
        report.removed == ["act_a_grow1", "act_a_grow2", "act_b_grow2"] and report.kept == ["act_b_grow1"] and report.change > 0
    )
    x, y = noise(model, 8), np.arange(8) % 5
    by_data = kr.prune(deep, (x, y), tolerance=1e-2)[1]
    assert by_data.removed == report.removed and by_data.accuracy is not None
    change = np.abs(np.asarray(deep(x)) - np.asarray(pruned(x))).max()
    assert by_data.change == pytest.approx(float(change))
    relus = [layer.name for layer in pruned.layers if layer.name.endswith("_out")]
    assert relus == ["act_b_grow1_out"], "a pruned post-activation block takes its ReLU along"


def test_prune_leaves_other_readers_of_a_sum_alone():
    deep = kr.grow(small(), "act_a", block="postact")
    tapped = layers.GlobalAveragePooling2D(name="tap")(deep.get_layer("act_a_grow1_add").output)
    model = keras.Model(deep.inputs, [deep.output, tapped])
    pruned, report = kr.prune(model)
    assert report.change == 0 and report.removed == ["act_a_grow1"] and pruned.get_layer("tap") is not None


def test_accuracy_only_where_it_has_a_meaning():
    x = noise(small(), 6)
    classes = np.arange(6) % 5

    def accuracy(head, labels):
        inputs = keras.Input((16, 16, 3))
        h = layers.Conv2D(4, 3, name="c")(inputs)
        return kr.prune(kr.grow(keras.Model(inputs, head(h)), "c"), (x, labels), tolerance=0)[1].accuracy

    flat = lambda units: lambda h: layers.Dense(units)(layers.Flatten()(h))  # noqa: E731
    model = keras.Model((i := keras.Input((16, 16, 3))), flat(5)(layers.Conv2D(4, 3, name="c")(i)))
    expected = float((np.asarray(model(x)).argmax(-1) == classes).mean())
    for labels in (classes, classes[:, None], np.eye(5)[classes]):
        assert kr.prune(kr.grow(model, "c"), (x, labels))[1].accuracy == (expected, expected)
    assert accuracy(flat(1), (classes > 2).astype(int)) is None
    assert accuracy(flat(5), classes.astype("float32")) is None
    assert accuracy(lambda h: h, np.zeros((6, 14, 14), int)) is None
    assert accuracy(lambda h: h, classes) is None
    assert accuracy(flat(5), {"a": classes}) is None


def test_iterators_tuples_and_keyword_calls():
    deep = randomise_new(kr.grow(small(), "act_a"))
    x = noise(deep, 6)
    assert kr.prune(deep, (part for part in (x[:3], x[3:])))[1].change == 0
    a, b = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    two = kr.grow(keras.Model((a, b), layers.Conv2D(3, 1, name="c")(a + b)), "c", gate="none")
    pair = tuple(np.random.default_rng(i).standard_normal((4, 8, 8, 3)).astype("float32") for i in range(2))
    assert [d.mean for d in kr.drift(two, pair)] == [d.mean for d in kr.drift(two, (pair, np.arange(4)))]
    i = keras.Input((16, 16, 3))
    by_name = keras.Model(i, kr.layers.ResidualBlock(gate="none", name="rb")(inputs=deep.get_layer("conv_a")(i)))
    outer = keras.Model(i, by_name(inputs=i))
    assert len(kr.find_blocks(outer)) == 1 and kr.drift(outer, x).blocks[0].mean > 0


def test_prune_keeps_the_blocks_of_an_architecture_that_are_no_identity():
    x = inputs = keras.Input((8, 8, 4))
    for name, kind in (("v1", "postact"), ("v2", "preact")):
        f = layers.Conv2D(4, 1, kernel_initializer="zeros", name=f"{name}_conv")(x)
        x = kr.layers.ResidualAdd(name, "zero_conv", kind, name=f"{name}_add")([x, f])
        x = layers.ReLU()(x)
    shortcut = layers.Conv2D(6, 1)(x)
    x = kr.layers.ResidualAdd("projection", "zero_conv", name="p_add")(
        [shortcut, layers.Conv2D(6, 1, kernel_initializer="zeros")(x)]
    )
    model = randomise(keras.Model(inputs, x))
    for layer in ("v1_conv", "v2_conv"):
        model.get_layer(layer).bias.assign(np.zeros(4))
    pruned, report = kr.prune(model, tolerance=1e9)
    assert report.removed == ["v2"] and report.kept == ["v1", "projection"] and report.change == 0


def test_prune_of_residual_block_layers():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            kr.layers.ResidualBlock(name="a"),
            layers.ReLU(),
            kr.layers.ResidualBlock(kind="postact", name="b"),
            layers.Conv2D(2, 1),
        ]
    )
    pruned, report = kr.prune(model)
    assert (
        report.removed == ["a", "b"]
        and [layer.name for layer in pruned.layers if "residual" in type(layer).__name__.lower()] == []
    )
    np.testing.assert_array_equal(np.asarray(model(images(2, 8, 4))), np.asarray(pruned(images(2, 8, 4))))


def test_bad_arguments():
    with pytest.raises(ValueError, match="`tolerance` must be a number of at least 0, got -1"):
        kr.prune(small(), tolerance=-1)
    with pytest.raises(ValueError, match="no images in `data`"):
        kr.drift(kr.grow(small(), "act_a"), np.zeros((0, 16, 16, 3), "float32"))
    a, b = small(), keras.Model((m := small()).input, m.get_layer("act_b").output)
    with pytest.raises(ValueError, match="differ in their outputs"):
        kr.identity_report(a, b, noise(a))
    deep = kr.grow(small(), "act_a")
    for call, message in (
        (lambda: kr.prune(deep, tolerance="x"), "`tolerance` must be a number"),
        (lambda: kr.drift(deep, noise(deep), batch_size=0), "`batch_size` must be a whole number of at least 1, got 0"),
        (lambda: kr.drift(deep, 3), "`data` must be arrays or batches"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def test_report_takes_labels_and_datasets():
    import tensorflow as tf

    model = small()
    deep = kr.grow(model, "act_a", gate="zero_gamma")
    x = noise(model, 6)
    given = (x, (x, np.arange(6)), [x[:4], x[4:]], tf.data.Dataset.from_tensor_slices((x, np.arange(6))).batch(4))
    for data in given:
        report = kr.identity_report(model, deep, data)
        assert report.exact and report.scale > 0 and report.without_gradient
    kernel = deep.get_layer("head").kernel
    kernel.assign(np.array(kernel) + 1)
    quiet = np.zeros_like(x[:4])
    biases = [deep.get_layer(name).bias for name in ("conv_a", "conv_b")]
    assert all(np.any(b) for b in biases)
    assert kr.identity_report(model, deep, [quiet, x[4:]]).eager >= kr.identity_report(model, deep, x[4:]).eager > 0


def test_report_explains_a_difference_by_fusions_only_where_eager_agrees():
    model = small()
    deep = kr.grow(model, "act_a")
    bias = deep.get_layer("head").bias
    bias.assign(np.array(bias) + np.arange(5))
    text = str(kr.identity_report(model, deep, noise(model)))
    assert "the models differ without graph mode too" in text and "fuses" not in text


def test_report_warns_of_branches_that_are_too_small():
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="c", activation="relu")(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
    kernel = model.get_layer("c").kernel
    images_ = noise(model, 8)
    kernel.assign(1000 * np.array(kernel))
    for gate in ("zero_conv", "zero_gamma", "rezero", "layerscale"):
        with pytest.warns(UserWarning, match='1 new branch is more than 100 times smaller .*scale="match"'):
            report = kr.identity_report(model, kr.grow(model, "c", gate=gate), images_)
        assert list(report.small_branches) == ["c_grow1"] and 1e-4 < report.small_branches["c_grow1"] < 1e-2
        assert 'use grow(..., scale="match"' in str(report)
        matched = kr.grow(model, "c", gate=gate, scale="match", data=images_)
        assert not kr.identity_report(model, matched, images_).small_branches


def test_without_blocks_is_the_network_before_growth():
    model = small()
    deep = randomise_new(kr.grow(model, "act_*", blocks=2, gate="zero_gamma", scale=3.0))
    deep = randomise_new(kr.grow(deep, "act_b", block="postact", gate="rezero"))
    x = noise(model)
    assert not np.array_equal(np.asarray(deep(x)), np.asarray(model(x)))
    bare = kr.without_blocks(deep)
    np.testing.assert_array_equal(np.asarray(bare(x)), np.asarray(model(x)))
    assert [layer.name for layer in bare.layers] == [layer.name for layer in model.layers]
    assert bare.count_params() == model.count_params() and len(kr.find_blocks(deep)) == 5
    pruned, report = kr.prune(deep, x, blocks="grown")
    assert len(report.removed) == 5 and report.change > 0 and not report.kept
    np.testing.assert_array_equal(np.asarray(pruned(x)), np.asarray(model(x)))
    assert kr.without_blocks(model).count_params() == model.count_params()


def test_without_blocks_keeps_what_was_there_before():
    zoo = kr.create_model("resnet20", num_classes=3)
    deep = kr.grow(zoo, "stage1_block1_out", gate="rezero")
    deep.get_layer("stage1_block1_out_grow1_scale").scale.assign(0.5)
    bare = kr.without_blocks(deep)
    x = images(2, 32)
    assert len(kr.find_blocks(bare)) == len(kr.find_blocks(zoo)) == 9
    np.testing.assert_array_equal(np.asarray(bare(x)), np.asarray(zoo(x)))
    with pytest.raises(ValueError, match="belongs to a plain block"):
        kr.without_blocks(kr.grow(small(), "act_a", block="plain"))
    with pytest.raises(ValueError, match='`blocks` must be "identity" or "grown"'):
        kr.prune(zoo, blocks="all")


def masked(first="embedding"):
    if first == "embedding":
        inputs = keras.Input((10,), dtype="int32")
        x = layers.Embedding(20, 8, mask_zero=True, name="first")(inputs)
    else:
        inputs = keras.Input((10, 8))
        x = layers.Masking(name="first")(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.LSTM(4)(x)))


@pytest.mark.parametrize("first", ["embedding", "masking"])
@pytest.mark.parametrize("gate", ["zero_conv", "rezero", "fixup"])
def test_blocks_on_masked_tensors(first, gate, tmp_path):
    import warnings

    model = masked(first)
    x = np.random.default_rng(0).integers(1, 20, (4, 10, 8)[: 2 + (first == "masking")]).astype(model.inputs[0].dtype)
    x[:, 6:] = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*mask.*")
        deep = kr.grow(model, "first", blocks=2, gate=gate, block="preact")
        np.testing.assert_array_equal(np.asarray(deep(x)), np.asarray(model(x)))
        deep.save(tmp_path / "deep.keras")
        loaded = keras.saving.load_model(tmp_path / "deep.keras")
        for each in (deep, loaded):
            pruned, report = kr.prune(each)
            assert len(report.removed) == 2 and pruned.count_params() == model.count_params()
            np.testing.assert_array_equal(np.asarray(pruned(x)), np.asarray(model(x)))
        sequential = keras.Sequential(
            [*model.layers[:-1], kr.ResidualBlock(gate=gate, name="b")][:2] + [kr.ResidualBlock(gate=gate)]
        )
        sequential(x)


def test_normalization_set_by_set_weights_is_copied_as_it_computes():
    x = inputs = keras.Input((6, 6, 3))
    norm = layers.Normalization(name="n")
    x = layers.Conv2D(4, 3, name="c")(norm(x))
    model = keras.Model(inputs, x)
    norm.set_weights([np.array([1.0, 2, 3]), np.array([4.0, 5, 6]), np.array(7)])
    deep = kr.grow(model, "c")
    assert kr.identity_report(model, deep, noise(model)).exact
    norm.finalize_state()
    assert kr.identity_report(model, kr.grow(model, "c"), noise(model)).exact
    assert not kr.identity_report(model, deep, noise(model)).exact, "only now the layer uses what was set"


@pytest.mark.parametrize(
    "channels,size,stride,kernel,crashes",
    [(8, 32, 2, 1, True), (15, 32, 2, 1, True), (1, 33, 3, 1, True), (16, 32, 2, 1, False), (8, 33, 2, 1, False),
     (8, 32, 2, 3, False), (8, 32, 1, 1, False)],
)  # fmt: skip
def test_convolutions_that_crash_in_onednn_are_named_before_they_do(monkeypatch, channels, size, stride, kernel, crashes):
    from keras_resnet.growth import check_backward, onednn

    x = inputs = keras.Input((size, size, 3))
    x = layers.Conv2D(channels, 3, padding="same", name="a")(x)
    x = layers.Conv2D(8, kernel, strides=stride, padding="same", name="b")(x)
    model = keras.Model(inputs, layers.Dense(2, activation="softmax")(layers.GlobalAveragePooling2D()(x)))
    monkeypatch.setattr(onednn, "is_enabled", lambda: True)
    assert onednn.crashing_convolutions(model) == (["b"] if crashes else [])
    if not crashes:
        return check_backward(model)
    with pytest.raises(ValueError, match="layer 'b' can crash the process: .*TF_ENABLE_ONEDNN_OPTS=0"):
        check_backward(model)
    report = kr.identity_report(model, kr.grow(model, "a"), noise(model, 2))
    assert report.exact and report.without_gradient is None and "TF_ENABLE_ONEDNN_OPTS=0" in str(report)
    with pytest.raises(ValueError, match="can crash the process"):
        kr.growth_scores(model, (noise(model, 4), np.zeros(4, int)), after="a")
    from keras_resnet.training import TrainingError, fit

    with pytest.raises(TrainingError, match="TF_ENABLE_ONEDNN_OPTS=0"):
        fit(model, (np.zeros((4, size, size, 3), "uint8"), np.array([0, 1, 0, 1])), epochs=1, batch_size=2, quiet=True)
    monkeypatch.setattr(onednn, "is_enabled", lambda: False)
    assert not onednn.crashing_convolutions(model)
