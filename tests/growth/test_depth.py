"""`depth_curve`: the networks without some blocks are exactly those of `prune`, the search finds planted blocks, messages."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_resnet as kr
from keras_resnet.growth import depth
from keras_resnet.growth.program import Program
from keras_resnet.zoo.counting import count_macs
from tests.growth.test_grow import nested, noise, randomise_new, small
from tests.helpers import assert_unchanged, images, randomise, weights_of


def zoo(seed=0, **options):
    """A post-activation ResNet with three blocks that can be left out, of ten layers."""
    keras.utils.set_random_seed(seed)
    sizes = {"depths": (2, 2, 2), "widths": (8, 16, 16), "stem_widths": (8,), "input_shape": (16, 16, 3)}
    return randomise(kr.create_model("resnet20", num_classes=4, **sizes, **options), seed)


def array(outputs):
    return [np.asarray(output) for output in keras.tree.flatten(outputs)]


# ---------------------------------------------------------------- which blocks, and without them


def test_post_activation_blocks_can_go_where_the_shortcut_is_proven_non_negative():
    def removable(model):
        return [block.path for block in kr.find_blocks(model) if block.removable]

    expected = ["stage1_block1", "stage1_block2", "stage2_block2", "stage3_block2"]
    assert removable(zoo(shortcut="projection")) == expected
    assert removable(zoo(activation="silu")) == []
    x = inputs = keras.Input((8, 8, 4))
    for name, first in (("a", None), ("b", "relu"), ("c", "relu6")):
        x = x if first is None else layers.Activation(first)(x)
        x = kr.layers.ResidualAdd(name, None, "postact", name=f"{name}_add")([x, layers.Conv2D(4, 1)(x)])
        x = layers.ReLU(max_value=6 if name == "c" else None, name=f"{name}_out")(x)
    # The first may have negative inputs, the last is closed by a ReLU that cuts off at 6.
    assert removable(keras.Model(inputs, x)) == ["b"]


def test_a_shared_block_can_go_only_where_every_call_allows_it():
    add, relu, conv = kr.layers.ResidualAdd("s", None, "postact", name="s_add"), layers.ReLU(name="s_out"), layers.Conv2D(4, 1)
    block = lambda x: relu(add([x, conv(x)]))  # noqa: E731
    a, b = keras.Input((8, 8, 4)), keras.Input((8, 8, 4))
    positive = keras.Model([a, b], [block(layers.ReLU()(a)), block(layers.ReLU()(b))])
    assert [found.removable for found in kr.find_blocks(positive)] == [True]
    mixed = keras.Model([a, b], [block(layers.ReLU()(a)), block(b)])
    assert [found.removable for found in kr.find_blocks(mixed)] == [False]


def test_prune_of_named_blocks_is_the_network_whose_branches_are_zero():
    model = zoo()
    x = images(3, 16)
    names = [block.path for block in kr.find_blocks(model) if block.removable]
    assert len(names) == 4 and "stage2_block1" not in names  # Option A pads the shortcut of the wider block.
    for chosen in (names[:1], names[1:3], names):
        zero = kr.growth.copy_model(model)
        for block in kr.find_blocks(zero):
            if block.path in chosen:
                for variable in block.branch[-1].trainable_variables:
                    variable.assign(np.zeros(variable.shape))
        pruned, report = kr.prune(model, blocks=chosen)
        np.testing.assert_array_equal(np.asarray(pruned(x)), np.asarray(zero(x)))
        assert report.removed == chosen and report.criterion == "named"
        assert len(kr.find_blocks(pruned)) == 6 - len(chosen)
        assert not [layer.name for layer in pruned.layers if layer.name in {f"{name}_out" for name in chosen}]


def test_prune_takes_zero_gamma_blocks_of_a_post_activation_network():
    model = kr.create_model("resnet20", num_classes=3, gate="zero_gamma")
    pruned, report = kr.prune(model)
    assert len(report.removed) == 7 and report.change == 0


def test_prune_refuses_blocks_that_are_no_identity():
    model = zoo()
    with pytest.raises(ValueError, match="no residual block 'stage1_block9'; did you mean 'stage1_block"):
        kr.prune(model, blocks=["stage1_block9"])
    with pytest.raises(ValueError, match='"stage2_block1" cannot be removed: its branch does not start where its shortcut'):
        kr.prune(model, blocks=["stage2_block1"])
    with pytest.raises(ValueError, match="not proven to leave its shortcut as it is"):
        kr.prune(zoo(activation="silu"), blocks=["stage1_block1"])


# ---------------------------------------------------------------- the program


def shared_twice():
    """A nested model with a block, called twice, and an output that reads both calls."""
    inner_in = keras.Input((8, 8, 4))
    h = layers.Conv2D(4, 3, padding="same", activation="relu", name="c")(inner_in)
    inner = kr.grow(keras.Model(inner_in, h, name="inner"), "c", gate="none", seed=1)
    i = keras.Input((8, 8, 4), name="i")
    a = inner(i)
    b = inner(layers.ReLU()(a))
    return randomise(keras.Model(i, {"sum": layers.Add()([a, b]), "flat": layers.Flatten()(b)}))


def sequential():
    model = keras.Sequential(
        [keras.Input((8, 8, 4)), kr.ResidualBlock(gate="none", name="a"), layers.BatchNormalization(), layers.ReLU(),
         kr.ResidualBlock(kind="postact", gate="rezero", name="b"), kr.ResidualBlock(gate="none", name="c")]
    )  # fmt: skip
    model.layers[3].branch[-1].scale.assign(0.7)
    return randomise(model)


MODELS = {
    "zoo": zoo,
    "nested": lambda: randomise_new(kr.grow(nested(), ["trunk/act_*", "act_b"], blocks=2)),
    "shared": shared_twice,
    "sequential": sequential,
    "preact": lambda: randomise(kr.create_model("preresnet110", num_classes=3, depths=(3, 1, 1), input_shape=(16, 16, 3))),
    "squeeze": lambda: zoo(se_ratio=0.25),
    "frozen": lambda: (lambda m: setattr(m, "trainable", False) or m)(zoo()),
}


SLOW = ("squeeze", "frozen", "preact", "nested")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in MODELS])
def test_a_program_computes_what_prune_computes(kind):
    model = MODELS[kind]()
    before = weights_of(model)
    copied = depth._frozen_copy(model)
    blocks = [block for block in kr.find_blocks(copied) if block.removable]
    program = Program(copied, blocks)
    x = noise(model, 6)
    program.count(x)
    networks = [frozenset(), frozenset([0]), frozenset(range(len(blocks))), frozenset([len(blocks) - 1])]
    own = weights_of(copied)
    found = dict(program.branching(x, frozenset(), networks))
    for number, left in enumerate(networks):
        pruned = kr.prune(model, blocks=[blocks[index].path for index in left])[0]
        for got, want in zip(array(program.outputs(x, left)), array(pruned(x)), strict=True):
            np.testing.assert_array_equal(got, want)
        assert program.cost(left) == count_macs(pruned)
        for got, want in zip(array(found[number]), array(program.outputs(x, left, batch_statistics=True)), strict=True):
            np.testing.assert_array_equal(got, want)
    last, all_blocks = networks[3], networks[2]
    for _, outputs in program.branching(x, last, [all_blocks]):
        for got, want in zip(array(outputs), array(program.outputs(x, all_blocks, True)), strict=True):
            np.testing.assert_array_equal(got, want)
    for value, now in zip(own, weights_of(copied), strict=True):
        np.testing.assert_array_equal(value, now)
    assert_unchanged(model, before)


# ---------------------------------------------------------------- the curve


def labelled(model, count=48, seed=3):
    """Images that the model's statistics are made to fit, and the classes that it gives them."""
    x = images(count, model.inputs[0].shape[1], seed=seed)
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    for norm in norms:
        norm.momentum, momentum = 0.0, norm.momentum
    model(x, training=True)
    for norm in norms:
        norm.momentum = momentum
    return x, np.asarray(model(x)).argmax(-1).astype("int32")


def test_the_curve_finds_planted_blocks(monkeypatch):
    """Blocks whose branch is zero cost nothing to leave out; the search must take those first, and its networks are `prune`'s."""
    model = zoo()
    for name in ("stage3_block2", "stage1_block2"):
        (block,) = (block for block in kr.find_blocks(model) if block.path == name)
        for variable in block.branch[-1].trainable_variables:
            variable.assign(np.zeros(variable.shape))
    x, y = labelled(model)
    before = weights_of(model)
    curves = [kr.depth_curve(model, (x, y))]
    monkeypatch.setattr(depth, "EXACT_BLOCKS", 0)
    curves.append(kr.depth_curve(model, (x, y)))
    for curve in curves:
        assert curve.images == 36 and curve.calibration_images == 12 and curve.ranked_by == "loss"
        assert curve.points[0].removed == () and curve.points[0].accuracy == 1.0 == curve.points[0].share
        taken = {point.removed for point in curve}
        assert ("stage1_block2", "stage3_block2") in taken
        shares, losses = ([getattr(point, name) for point in curve] for name in ("share", "loss"))
        assert shares == sorted(shares, reverse=True) and losses[1:] == sorted(losses[1:])
        assert all(
            point.loss <= other.loss or point.share < other.share for point in curve.points[1:] for other in curve.by_drift[1:]
        )
        assert [len(point.removed) for point in curve.by_drift] == [0, 1, 2, 3, 4]
        assert set(curve.by_drift[2].removed) == {"stage1_block2", "stage3_block2"}
        for point in curve.points[-2:]:
            raw, pruned = curve.network(point, recalibrate=False), kr.prune(model, blocks=point.removed)[0]
            np.testing.assert_array_equal(np.asarray(raw(x)), np.asarray(pruned(x)))
            assert count_macs(raw) == point.macs == round(point.share * count_macs(model))
            rows = np.random.default_rng(0).permutation(48)[12:]  # the first quarter is for recalibration
            outputs = np.asarray(curve.network(point)(x[rows]))
            assert point.accuracy == (outputs.argmax(-1) == y[rows]).mean() == point.agreement
            entropy = keras.losses.sparse_categorical_crossentropy(y[rows], outputs, from_logits=True)
            assert point.loss == pytest.approx(float(np.mean(entropy)), rel=1e-5)
        assert json.loads(json.dumps(curve.to_json()))["points"][1]["removed"] == list(curve.points[1].removed)
        assert "by drift" in str(curve) and "100.00%" in str(curve)
        point = curve.point(0.9)
        assert point.share <= 0.9 and all(other.share > 0.9 or other.loss >= point.loss for other in curve)
    assert_unchanged(model, before)


def test_recalibration_takes_the_statistics_of_the_smaller_network():
    model = zoo()
    model.get_layer("stage1_block1_norm2").trainable = False
    x, y = labelled(model, 32)
    curve = kr.depth_curve(model, (x, y), calibration=x[:20], batch_size=20, budgets=(0.95,), compare_drift=False)
    point = dataclasses.replace(curve.points[-1], removed=("stage1_block2", "stage2_block2"))
    network = curve.network(point)
    pruned = kr.prune(model, blocks=point.removed)[0]
    after = [layer.name for layer in model.layers].index(f"{point.removed[0]}_add")
    changed = 0
    for layer in network.layers:
        if not isinstance(layer, layers.BatchNormalization):
            continue
        own, old = pruned.get_layer(layer.name), model.get_layer(layer.name)
        assert layer.trainable == old.trainable and layer.momentum == old.momentum
        np.testing.assert_array_equal(np.asarray(layer.gamma), np.asarray(own.gamma))
        if [other.name for other in model.layers].index(layer.name) < after:
            np.testing.assert_array_equal(np.asarray(layer.moving_mean), np.asarray(own.moving_mean))
            continue
        # What comes in, with all norms before it on the statistics of this one batch.
        inner = np.asarray(keras.Model(network.inputs, layer.input)(x[:20]), "float64")
        np.testing.assert_allclose(np.asarray(layer.moving_mean), inner.mean((0, 1, 2)), atol=1e-3, rtol=1e-3)
        np.testing.assert_allclose(np.asarray(layer.moving_variance), inner.var((0, 1, 2)), atol=1e-3, rtol=1e-3)
        changed += 1
    assert changed > 0


SECONDS = (3.0, 1.0, 3.0, 4.0)


@pytest.mark.slow
def test_other_costs_and_data(monkeypatch):
    model = zoo()
    x, y = labelled(model, 40)
    # Latency is noisy, so it is given here (plus one image): the first block takes half of it, the others nothing.
    monkeypatch.setattr(
        depth, "_interleaved", lambda calls: [len(call()) + second for call, second in zip(calls, SECONDS, strict=False)]
    )
    curve = kr.depth_curve(model, (x, y), cost="latency", budgets=[0.8], compare_drift=False)
    assert curve.point(0.8).share == pytest.approx(0.75) and curve.cost == "latency" and "latency" in str(curve)
    soft = kr.depth_curve(model, x, compare_drift=False)
    assert all(point.accuracy is None and point.agreement is not None for point in soft)
    assert soft.points[0].agreement == 1.0 and soft.points[0].loss < min(point.loss for point in soft.points[1:])
    batched = kr.depth_curve(model, [(x[:20], np.eye(4)[y[:20]]), (x[20:], np.eye(4)[y[20:]])], compare_drift=False)
    assert batched.points[0].accuracy == 1.0


def test_a_regression_without_labels_is_compared_with_itself():
    deep = randomise_new(kr.grow(nested(), ["trunk/act_a", "act_b"]))
    outer = keras.Model(deep.inputs, [deep.output, deep.get_layer("act_b").output])
    curve = kr.depth_curve(outer, noise(outer, 16))
    assert curve.points[0].loss == 0 and len(curve) > 1 and all(point.agreement is None for point in curve)
    with pytest.raises(ValueError, match="`loss` must be given"):
        kr.depth_curve(outer, (noise(outer, 16), np.zeros(16)))


def test_without_data_blocks_are_ranked_by_drift_and_keep_their_statistics():
    model = zoo()
    curve = kr.depth_curve(model, budgets=(0.75,))
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)).astype("float32")
    ranking = sorted(kr.drift(model, pixels), key=lambda d: d.mean)
    free = [block.path for block in kr.find_blocks(model) if block.removable]
    assert set(curve.points[1].removed) == {next(d.block for d in ranking if d.block in free)}
    assert curve.ranked_by == "drift" and curve.points[-1].share <= 0.75 < curve.points[-2].share
    assert all(point.loss is None for point in curve) and "-" in str(curve)
    x = images(2, 16)
    pruned = kr.prune(model, blocks=curve.point(0.75).removed)[0]
    np.testing.assert_array_equal(np.asarray(curve.at(0.75)(x)), np.asarray(pruned(x)))
    with pytest.raises(ValueError, match="made without data"):
        curve.figure()


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    model = zoo()
    figure = kr.depth_curve(model, labelled(model, 16)).figure()
    figure.savefig(tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 5000 and "accuracy" in figure.axes[0].get_ylabel()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": (0.75, 0.1)}, r"no network meets the budget 0.1: without all 4 blocks that can be left out, 0\.\d{3}"),
        ({"budgets": (1.5,)}, "`budgets` must be a share of the cost, above 0 and at most 1, got 1.5"),
        ({"budgets": ()}, "`budgets` must hold at least one share"),
        ({"cost": "watts"}, "`cost` must be one of 'macs', 'latency', got 'watts'"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    model = zoo()
    with pytest.raises(ValueError, match=message):
        kr.depth_curve(model, labelled(model, 8), **arguments)


def test_bad_models_and_data():
    with pytest.raises(ValueError, match="no residual block that can be left out"):
        kr.depth_curve(small(), noise(small()))
    model = zoo()
    with pytest.raises(ValueError, match="at least four images"):
        kr.depth_curve(model, labelled(model, 3))
    with pytest.raises(ValueError, match="`calibration` needs `data`"):
        kr.depth_curve(model, calibration=images(4, 16))
    curve = kr.depth_curve(model)
    with pytest.raises(ValueError, match=r"no network of the curve meets the budget 0.01; the smallest has 0\.\d+ of the mul"):
        curve.at(0.01)
    with pytest.raises(ValueError, match="`budget` must be a share"):
        curve.at(0)
    with pytest.raises(ValueError, match="sizes of the model's input are not fixed"):
        kr.depth_curve(open_size())


def open_size():
    return kr.create_model("resnet20", num_classes=4, depths=(2, 1, 1), input_shape=(None, None, 3))


# ---------------------------------------------------------------- stochastic depth


def drop_rates(model):
    return {layer.name: layer.rate for layer in model._flatten_layers() if isinstance(layer, kr.layers.DropPath)}


def test_stochastic_depth_follows_the_linear_rule_and_changes_nothing_in_inference(tmp_path):
    model = zoo()
    before = weights_of(model)
    stochastic = kr.with_drop_path(model, 0.5, seed=1)
    built = zoo(drop_path=0.5)
    assert drop_rates(stochastic) == pytest.approx(drop_rates(built)) and len(drop_rates(built)) == 5
    x = images(8, 16)
    np.testing.assert_array_equal(np.asarray(stochastic(x)), np.asarray(model(x)))
    assert_unchanged(model, before)
    # A block whose branch is dropped gives its shortcut: here for about half of the examples of the last one.
    last = [block for block in kr.find_blocks(stochastic) if block.path == "stage3_block2"][0].add
    probe = keras.Model(stochastic.inputs, last.input)
    shortcut, branch = (np.asarray(part) for part in probe(images(64, 16), training=True))
    dropped = (branch == 0).all((1, 2, 3))
    assert 16 <= dropped.sum() <= 48 and not (shortcut == 0).all((1, 2, 3)).any()
    again = kr.with_drop_path(stochastic, 0.2)
    assert drop_rates(again)["stage3_block2_drop_path"] == 0.2 and len(drop_rates(again)) == 5
    again.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(np.asarray(keras.saving.load_model(tmp_path / "m.keras")(x)), np.asarray(again(x)))
    assert [block.removable for block in kr.find_blocks(again)] == [block.removable for block in kr.find_blocks(model)]


def test_stochastic_depth_of_grown_and_nested_blocks():
    deep = randomise_new(kr.grow(nested(), ["trunk/act_*", "act_b"], blocks=2))
    stochastic = kr.with_drop_path(deep, 0.3)
    np.testing.assert_array_equal(np.asarray(stochastic(noise(deep))), np.asarray(deep(noise(deep))))
    blocks = kr.find_blocks(deep)
    # Blocks of the nested model and of the outer one have the same names.
    rates = [layer.rate for layer in stochastic._flatten_layers() if isinstance(layer, kr.layers.DropPath)]
    assert sorted(rates) == pytest.approx([0.3 * k / (len(blocks) - 1) for k in range(1, len(blocks))])
    for model, message in (
        (small(), "no residual block that training can drop"),
        (sequential(), "no residual block that training"),
    ):
        with pytest.raises(ValueError, match=message):
            kr.with_drop_path(model, 0.3)
    with pytest.raises(ValueError, match="`rate` must be at least 0 and below 1, got 1"):
        kr.with_drop_path(deep, 1)
