"""What a run does to a model: growing, unfreezing, averages, groups, schedules, recipes."""

import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet import data, training
from keras_resnet.blocks.gates import GATES
from keras_resnet.training.optimizers import Slots, carry_state, make_optimizer
from keras_resnet.training.schedules import make_schedule
from keras_resnet.training.segments import segments

from ..helpers import assert_unchanged, weights_of
from .models import Losses, network, run


def value(variable):
    return keras.ops.convert_to_numpy(variable)


LATER = ("elastic", "rsb-a1", "rsb-a2", "rsb-a3", "from-scratch", "finetune", "finetune-grown", "goyal2017", "bag-of-tricks")


@pytest.mark.parametrize("recipe", [pytest.param(n, marks=pytest.mark.slow) if n in LATER else n for n in training.RECIPES])
def test_recipes_learn(recipe):
    changes = {"small_crops": 1.0} if recipe == "cpu-budget" else {}
    description = training.Run.of(
        recipe,
        data="digits",
        batch_size=64,
        base_batch=64,
        epochs=3,
        image_size=None,
        model_options={},
        validate="none",
        seed=1,
        **changes,
    )
    losses = Losses()
    model = network()
    if recipe == "finetune-grown":
        # Its first phase takes the trunk as it is, so that must have learned something.
        model = kr.grow(training.fit(model, "digits", run=run(epochs=1), quiet=True).model, "stage*_block1_out", seed=1)
    result = training.fit(model, "digits", run=description, callbacks=[losses], quiet=True)
    assert len(losses.values) == 66
    assert result.history[-1]["loss"] < 0.99 * result.history[0]["loss"]


def test_model_is_not_touched_and_learns_as_plain_keras_does():
    """One step of SGD with L2, no augmentation: the same weights as a step of Keras with the decay written into the loss."""
    source = data.load("digits")
    x, y = source.train.images[:128], source.train.labels[:128]
    model = network()
    before = weights_of(model)
    description = run(epochs=1, weight_decay=0.01, label_smoothing=0.1, schedule="constant", momentum=0.0, nesterov=False)
    result = training.fit(model, (x, y), run=description, quiet=True)
    assert_unchanged(model, before)

    twin = network()
    decayed = [v for group in training.parameter_groups(twin) if group.decay for v in group.variables]
    assert {v.name for v in decayed} == {"kernel"}
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)(
            np.eye(10, dtype="float32")[y], twin(x.astype("float32"), training=True)
        )
        loss += sum(0.005 * tf.reduce_sum(v.value**2) for v in decayed)
    for variable, gradient in zip(twin.trainable_variables, tape.gradient(loss, twin.trainable_variables), strict=True):
        variable.assign_sub(0.1 * gradient)
    for ours, theirs in zip(result.model.trainable_variables, twin.trainable_variables, strict=True):
        np.testing.assert_allclose(value(ours), value(theirs), rtol=1e-4, atol=2e-6, err_msg=ours.path)


def test_growth_shows_no_jump_and_carries_momentum():
    plain, grown = Losses(), Losses()
    seen = {}

    def look(segment, model):
        seen[segment.start] = model

    common = dict(epochs=3, schedule="constant", learning_rate=0.02)
    training.fit(network(), "digits", run=run(**common), callbacks=[plain], quiet=True)
    events = ((1, "stage*_block1_out", 1),)
    result = training.fit(network(), "digits", run=run(**common, growth=events), callbacks=[grown, look], quiet=True)
    blocks = [block for block in kr.find_blocks(result.model) if block.add.grown]
    assert len(blocks) == 3 and len(kr.find_blocks(seen[0])) == 3
    # The first step after growth sees the same network, with the same momentum: the same loss.
    np.testing.assert_allclose(grown.values[:12], plain.values[:12], rtol=2e-3)
    assert max(np.abs(value(v)).max() for v in blocks[0].branch[-1].weights) > 0


@pytest.mark.slow
def test_growth_inside_a_nested_model_changes_nothing_and_carries_all_slots():
    inputs, whole = keras.Input((8, 8, 1)), network(name="inner")
    trunk = keras.Model(whole.inputs, whole.get_layer("stage3_block1_out").output, name="trunk")
    pooled = keras.layers.GlobalAveragePooling2D()(trunk(inputs))
    model = keras.Model(inputs, keras.layers.Dense(10, name="predictions")(pooled))
    images, seen = data.load("digits").test.images[:32].astype("float32"), []

    class Look(keras.callbacks.Callback):
        """Logits, and the slots of a layer in the trunk and of the head, at the ends of every segment."""

        def look(self, logs=None):
            kernels = [
                self.model.get_layer("trunk").get_layer("stage2_block1_conv1").kernel,
                self.model.get_layer("predictions").kernel,
            ]
            optimizer = self.model.optimizer
            moments = [slot for slot in optimizer.variables if slot.name.rsplit("_", 1)[-1] in ("momentum", "average")]
            slots = [value(slot) for kernel in kernels for slot in moments if kernel.path.replace("/", "_") in slot.name]
            seen.append((value(self.model(images)), slots))

        on_train_begin = on_train_end = look

    description = run(ema=0.9, growth=((1, "trunk/stage*_block1_out", 1),))
    result = training.fit(model, "digits", run=description, callbacks=[lambda segment, model: Look()], quiet=True)
    _, (logits, slots), (grown_logits, carried), _ = seen
    np.testing.assert_allclose(grown_logits, logits, rtol=1e-6, atol=1e-6)
    assert len(slots) == 4 and all(np.abs(slot).max() > 0 for slot in slots)
    for ours, theirs in zip(carried, slots, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    blocks = [block for block in kr.find_blocks(result.model) if block.add.grown]
    assert len(blocks) == 3 and all(block.path.startswith("trunk/") for block in blocks)
    assert all(np.abs(value(variable)).max() > 0 for block in blocks for variable in block.branch[-1].weights)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb", "muon"])
def test_slots_are_carried_by_variable(optimizer):
    model = network()
    grown = kr.grow(model, "stage1_block1_out", seed=0)
    description = run(optimizer=optimizer, ema=0.9)
    make = lambda m: make_optimizer(description, 0.1, training.parameter_groups(m))  # noqa: E731
    old, new = make(model), make(grown)
    old_slots, new_slots = Slots(old), Slots(new)
    old.build(model.trainable_variables)
    new.build(grown.trainable_variables)
    old.iterations.assign(7)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        for slot in old_slots.of(variable).values():
            slot.assign(rng.normal(size=slot.shape))
    names = {layer.name: layer for layer in grown.layers}
    pairs = [
        (a, b) for layer in model.layers for a, b in zip(layer.variables, names[layer.name].variables, strict=True) if a.trainable
    ]
    carry_state(old, old_slots, new, new_slots, pairs)
    assert int(new.iterations) == 7
    counts = {"sgd": 2, "adamw": 3, "lamb": 3, "muon": 2}
    for a, b in pairs:
        assert len(new_slots.of(b)) == counts[optimizer]
        for name, slot in old_slots.of(a).items():
            np.testing.assert_array_equal(value(new_slots.of(b)[name]), value(slot))
    fresh = next(v for v in grown.trainable_variables if "grow1_conv1" in v.path)
    np.testing.assert_array_equal(value(new_slots.of(fresh)["average"]), value(fresh))
    assert not any(value(slot).any() for name, slot in new_slots.of(fresh).items() if name != "average")


@pytest.mark.slow
def test_two_phases_freeze_the_trunk_with_its_statistics_then_let_it_follow_slowly():
    model = kr.grow(network(), "stage*_block1_out", seed=1)
    description = run(epochs=2, frozen_epochs=1, backbone_lr_multiplier=0.1, schedule="constant", learning_rate=0.05)
    at = {}

    def keep(segment, current):
        at[segment.start] = {v.path: value(v) for v in current.variables}

    result = training.fit(model, "digits", run=description, callbacks=[keep], quiet=True)
    start, unfrozen, end = at[0], at[1], {v.path: value(v) for v in result.model.variables}
    is_new = lambda path: "_grow" in path or "predictions" in path  # noqa: E731
    for path in start:
        moved = not np.array_equal(start[path], unfrozen[path])
        assert moved == is_new(path) or (is_new(path) and "shift" in path), path
        assert not np.array_equal(unfrozen[path], end[path]) or "shift" in path, path


@pytest.mark.parametrize("gate", [name for name in GATES if name != "none"])
def test_groups_hold_every_variable_once_and_gates_do_not_decay(gate):
    model = kr.grow(network(), "stage*_block1_out", gate=gate, seed=1)
    groups = training.parameter_groups(model, gate_lr_multiplier=7.0, backbone_lr_multiplier=0.5)
    held = [id(v) for group in groups for v in group.variables]
    assert sorted(held) == sorted(id(v) for v in model.trainable_variables)
    gates = next(group for group in groups if group.name == "gates")
    assert gates.lr_multiplier == 7.0 and not gates.decay
    assert len(gates.variables) == {"zero_conv": 6, "zero_gamma": 6, "rezero": 3, "layerscale": 3, "fixup": 6}[gate]
    for group in groups:
        for variable in group.variables:
            assert bool(group.decay) == (variable.name == "kernel" and group.name != "gates"), variable.path
            if group.name.startswith("backbone"):
                assert group.lr_multiplier == 0.5 and "_grow" not in variable.path and "predictions" not in variable.path


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_multiplier_scales_the_step_and_decay_follows_the_group(optimizer):
    variables = [keras.Variable(np.full((2, 2), 2.0, "float32"), name="kernel") for _ in range(3)]
    groups = [
        training.Group("fast", variables[:1], 5.0, decay=False),
        training.Group("slow", variables[1:2], 1.0, decay=False),
        training.Group("decayed", variables[2:], 1.0, decay=True),
    ]
    made = make_optimizer(run(optimizer=optimizer, weight_decay=0.1, momentum=0.0, nesterov=False), 0.01, groups)
    made.build(variables)
    gradient = keras.ops.ones((2, 2))
    made.apply([gradient] * 3, variables)
    fast, slow, decayed = (2.0 - value(v) for v in variables)
    np.testing.assert_allclose(fast, 5 * slow, rtol=1e-4)
    np.testing.assert_allclose(decayed - slow, 0.1 * 2.0 * 0.01, rtol=2e-2)


def test_clipping_bounds_the_global_norm_across_groups():
    variables = [keras.Variable(np.zeros(4, "float32"), name=f"v{i}") for i in range(2)]
    made = make_optimizer(run(clip_norm=1.0, momentum=0.0, nesterov=False), 1.0, [])
    made.build(variables)
    made.apply([keras.ops.ones(4) * 3, keras.ops.ones(4) * 4], variables)
    np.testing.assert_allclose(np.concatenate([value(v) for v in variables]), [-0.3] * 4 + [-0.4] * 4, rtol=1e-6)


def test_schedules_at_their_corners():
    def rates(steps, **changes):
        schedule = make_schedule(training.Run.of(batch_size=256, learning_rate=0.4, **changes), 10)
        return [float(schedule(step)) for step in steps]

    step = dict(schedule="step", epochs=9, milestones=(3, 6), warmup_epochs=1.0)
    np.testing.assert_allclose(
        rates([0, 5, 10, 29, 30, 59, 60, 89], **step), [0, 0.2, 0.4, 0.4, 0.04, 0.04, 0.004, 0.004], rtol=1e-5
    )
    np.testing.assert_allclose(rates([0, 25, 50], schedule="cosine", epochs=5), [0.4, 0.2, 0], atol=1e-7)
    one = dict(schedule="one-cycle", epochs=10)
    np.testing.assert_allclose(rates([0, 30, 100], **one), [0.016, 0.4, 0.00004], rtol=1e-4)
    scaled = training.Run.of("goyal2017", batch_size=8192)
    schedule = make_schedule(scaled, 10)
    np.testing.assert_allclose([float(schedule(s)) for s in (0, 50, 299, 300)], [0.1, 3.2, 3.2, 0.32], rtol=1e-5)


def test_averages_are_what_is_validated_and_kept():
    description = run(epochs=1, ema=0.5, schedule="constant", learning_rate=0.05)
    history = []

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            history.append(value(self.model.get_layer("predictions").kernel))

    result = training.fit(network(), "digits", run=description, callbacks=[Keep()], quiet=True)
    average = history[0]
    for kernel in history[1:]:
        average = 0.5 * average + 0.5 * kernel
    np.testing.assert_allclose(value(result.model.get_layer("predictions").kernel), average, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_steps_per_execution_changes_no_result():
    one, several = (training.fit(network(), "digits", run=run(epochs=1, steps_per_execution=n), quiet=True) for n in (1, 20))
    for a, b in zip(one.model.weights, several.model.weights, strict=True):
        np.testing.assert_allclose(value(a), value(b), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_mixed_precision_scales_the_loss_and_learns():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy("float32")
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            # A scale that overflows in the first step: it is halved, and nothing moves.
            self.model.optimizer.dynamic_scale.assign(2.0**30)
            self.before = value(self.model.get_layer("predictions").kernel)

        def on_train_batch_end(self, batch, logs=None):
            moved = not np.array_equal(value(self.model.get_layer("predictions").kernel), self.before)
            seen.append((type(self.model.optimizer), float(self.model.optimizer.dynamic_scale), moved))

    result = training.fit(model, "digits", run=run(epochs=4), callbacks=[Look()], quiet=True)
    assert seen[0] == (keras.optimizers.LossScaleOptimizer, 2.0**29, False)
    assert seen[-1][1] < 2.0**25 and seen[-1][2]
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.model.get_layer("predictions").kernel.dtype == "float32"


def test_small_crops_train_a_model_of_one_size_and_are_refused_where_they_cannot():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (256, 16, 16, 1)).astype("uint8")
    labels = (x[:, 4:12, 4:12].mean((1, 2, 3)) > 127).astype(int)
    description = run(epochs=4, small_crops=0.75, small_epochs=0.5, batch_size=64)
    shapes = []

    class Shapes(keras.layers.Layer):
        def call(self, inputs):
            shapes.append(inputs.shape[1])
            return inputs

    inputs = keras.Input((16, 16, 1))
    pooled = keras.layers.GlobalAveragePooling2D()(Shapes()(keras.layers.Conv2D(4, 3)(inputs)))
    training.fit(keras.Model(inputs, keras.layers.Dense(2)(pooled)), (x, labels), run=description, quiet=True)
    assert {10, 14} <= set(shapes)
    flat = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(inputs)))
    with pytest.raises(training.TrainingError, match="does not take images of 12×12; set `small_crops` to 1"):
        training.fit(flat, (x, labels), run=description, quiet=True)


def test_early_stopping_ends_the_run_for_good(tmp_path):
    class Enough(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    result = training.fit(network(), "digits", run=run(epochs=5), out=tmp_path, callbacks=[Enough()], quiet=True)
    assert len(result.history) == 2 and result.summary["epochs"] == 2
    losses = Losses()
    again = training.fit(network(), "digits", run=run(epochs=5), out=tmp_path, callbacks=[losses], quiet=True)
    assert not losses.values and again.summary == result.summary


@pytest.mark.slow
def test_layers_that_were_frozen_stay_so():
    model = network()
    model.get_layer("stage1_block1_conv1").trainable = False
    before = value(model.get_layer("stage1_block1_conv1").kernel)
    result = training.fit(model, "digits", run=run(epochs=2, frozen_epochs=1), quiet=True)
    layer = result.model.get_layer("stage1_block1_conv1")
    np.testing.assert_array_equal(value(layer.kernel), before)
    assert not layer.trainable and result.model.get_layer("stage2_block1_conv1").trainable


def test_label_smoothing_gives_all_classes_alike_what_it_takes():
    """Also under binary cross-entropy, where Keras would move every class towards a half."""
    source = data.load("digits")
    x, y = source.train.images[:64], source.train.labels[:64]
    losses = Losses()
    model = network()
    description = run(epochs=1, batch_size=64, loss="sigmoid", label_smoothing=0.1)
    training.fit(model, (x, y), run=description, callbacks=[losses], quiet=True)
    logits, targets = value(model(x.astype("float32"), training=True)), np.eye(10)[y] * 0.9 + 0.01
    expected = np.mean(np.logaddexp(0, logits) - targets * logits)
    np.testing.assert_allclose(losses.values[0], expected, rtol=1e-5)


def test_a_shorter_run_of_a_description_shrinks_along(tmp_path):
    training.Run.of("he2015-cifar", model_options={"norm_momentum": 0.8}).save(tmp_path / "run.yaml")
    short = training.Run.load(tmp_path / "run.yaml", epochs=41, model_options={"head_dropout": 0.1})
    assert short.milestones == (20.5, 30.75) and short.model_options == {"norm_momentum": 0.8, "head_dropout": 0.1}
    assert training.Run.of("finetune-grown", epochs=3).frozen_epochs == 1


def test_segments_of_a_run():
    description = training.Run.of(epochs=10, frozen_epochs=2, growth=((5, "x", 1),), small_crops=0.5, small_epochs=0.5)
    found = [(s.start, s.end, len(s.growth), s.frozen, s.small) for s in segments(description)]
    assert found == [(0, 2, 0, True, True), (2, 5, 0, False, True), (5, 10, 1, False, False)]
    assert [(s.start, s.end) for s in segments(description.replace(initial_epoch=3))] == [(3, 5), (5, 10)]


def test_results_on_disk(tmp_path):
    result = training.train(run(model="resnet20", data="digits", epochs=1, holdout=100, validate="auto"), tmp_path, quiet=True)
    names = {"model.keras", "log.csv", "run.yaml", "summary.json", "curves.png", "checkpoint.safetensors", ".lock"}
    assert names == {path.name for path in tmp_path.iterdir()}
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = data.load("digits").test.images[:4].astype("float32")
    np.testing.assert_allclose(loaded(x), result.model(x), rtol=1e-5, atol=1e-5)
    card = kr.card(loaded)
    assert card.labels == list("0123456789") and card.preprocessing["mode"] == "custom"
    assert {"holdout_accuracy", "test_accuracy", "seconds"} <= set(result.summary)
    assert training.Run.load(tmp_path / "run.yaml") == run(
        model="resnet20", data="digits", epochs=1, holdout=100, validate="auto"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": "he2016"}, "unknown recipe 'he2016'"),
        ({"lerning_rate": 1.0}, "did you mean 'learning_rate'"),
        ({"optimizer": "adam"}, "must be one of 'sgd'"),
        ({"batch_size": 0}, "whole number of at least 1, got 0"),
        ({"momentum": 1.5}, "between 0 and 1"),
        ({"epochs": 2, "frozen_epochs": 3}, "at most `epochs`"),
        ({"epochs": 2, "growth": ((2, "x", 1),)}, "epoch below 2"),
        ({"epochs": 2, "initial_epoch": 2}, "`initial_epoch` must be below `epochs`"),
        ({"epochs": 3, "initial_epoch": 2, "growth": ((1, "x", 1),)}, "before `initial_epoch`.*give the grown model"),
        ({"workers": ("a:1",), "index": 1}, "below the number of workers"),
        ({"index": 1}, "`index` needs `workers`"),
        ({"workers": ("a", "b:1")}, "host:port, with a port from 1 to 65535, got 'a'"),
        ({"workers": ("a:1", "b:65536")}, "got 'b:65536'"),
        ({"workers": ("a:1", " b:2")}, "got ' b:2'"),
        ({"workers": ("a:1", "a:1")}, "must all be different"),
        ({"workers": (1, 2)}, "a list of strings"),
        ({"devices": (0,)}, "a list of strings"),
        ({"milestones": ("a",)}, "a list of numbers"),
        ({"milestones": (5, 3)}, "epochs in their order"),
        ({"milestones": (-1, 1)}, "epochs in their order"),
        ({"workers": ("a:" + "9" * 5000, "b:1")}, "with a port"),
        ({"seed": 2**32}, "between 0 and"),
        ({"learning_rate": float("inf")}, "number of at least 0, got inf"),
        ({"learning_rate": True}, "`learning_rate` must be a number"),
        ({"growth_scale": "macht"}, "`growth_scale` must be one of 'match' or a number above 0, got 'macht'"),
        ({"growth_scale": 0}, "`growth_scale` must be a number above 0, got 0"),
        ({"growth_scale": True}, "`growth_scale` must be a string or a number, got True"),
        ({"epochs": 2.0}, "`epochs` must be a whole number"),
        ({"flip": "maybe"}, "`flip` must be true or false"),
        ({"sync_batch_norm": 1}, "`sync_batch_norm` must be true or false"),
        ({"model": 5}, "`model` must be a string"),
        ({"data": None}, "`data` must be a string"),
        ({"model_options": 3}, "pairs of name and value"),
        ({"recipe": ("a",)}, "unknown recipe"),
        ({"growth": (5,)}, "`growth` holds"),
        ({"growth": (("a", "x", 1),)}, "`growth` holds"),
        ({"growth": ((0, "x", 0),)}, "`growth` holds"),
    ],
)
def test_bad_options_are_named(changes, says):
    with pytest.raises(training.TrainingError, match=says):
        training.Run.of(**changes)


def test_descriptions_of_version_0_1_load(tmp_path):
    """A flat list of options, some under former names."""
    flat = "model: resnet56\nmodel_options: {gate: rezero}\nrecipe: he2015-cifar\nepochs: 7\nmilestones: [3.5, 5.25]\n"
    (tmp_path / "run.yaml").write_text(flat + "trunk_lr_multiplier: 0.5\nloss: softmax\ngrowth: [[1, x, 2]]\nworkers: []\n")
    with pytest.warns(DeprecationWarning, match="was renamed to 'backbone_lr_multiplier'"):
        told = training.Run.load(tmp_path / "run.yaml")
    assert (told.model, told.model_options, told.recipe, told.epochs) == ("resnet56", {"gate": "rezero"}, "he2015-cifar", 7)
    assert told.milestones == (3.5, 5.25) and told.growing.backbone_lr_multiplier == told.trunk_lr_multiplier == 0.5
    assert told.crop_padding == 4 and told.growth == ((1, "x", 2),)
    told.save(tmp_path / "new.yaml")
    assert (
        training.Run.load(tmp_path / "new.yaml") == told and "optimization:\n  epochs: 7" in (tmp_path / "new.yaml").read_text()
    )


@pytest.mark.parametrize("name", ["class_weigth", "verbose", "lr", "batches"])
def test_hints_suggest_what_fits(name):
    expected = {"verbose": "quiet", "lr": "learning_rate"}.get(name)
    with pytest.raises(training.TrainingError) as refused:
        training.Run.of(**{name: 1})
    assert f"unknown option {name!r}" in str(refused.value) and "'weights'" not in str(refused.value)
    assert expected is None or expected in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"model: \xe9", "cannot be read"),
        (b"5: 3", "option: value"),
        (b"recipe: [a]", "`recipe` must be a string"),
        (b"epochs: 0", "whole number of at least 1"),
        (b"epochs: null", "`epochs` must be a whole number"),
        (b"epochs: 4\nmilestones: null", "`milestones` must be a list of numbers"),
        (b"epochs: 4\nmilestones: [a]", "`milestones` must be a list of numbers"),
        (b"epochs: 4\nwarmup_epochs: x", "`warmup_epochs` must be a number"),
        (b"epochs: 4\nfrozen_epochs: x", "`frozen_epochs` must be a whole number"),
        (b"model_options: 3", "pairs of name and value"),
        (b"growth: [[a, x, 1]]", "`growth` holds"),
    ],
)
def test_bad_descriptions_are_named(tmp_path, text, says):
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(training.TrainingError, match=says):
        training.Run.load(tmp_path / "run.yaml", **({} if text == b"epochs: 0" else {"epochs": 6, "model_options": {"a": 1}}))


def test_paths_and_numbers_of_numpy_are_taken_and_can_be_saved(tmp_path):
    changes = {
        "milestones": [np.int64(2), np.float32(3)],
        "growth": ([np.int64(1), "x", np.int32(2)],),
        "factor": np.float64(0.5),
    }
    told = training.Run.of(model=tmp_path / "a.keras", data=tmp_path, seed=np.int64(3), flip=np.bool_(True), **changes)
    assert told.model == str(tmp_path / "a.keras") and told.growth == ((1, "x", 2),)
    told.save(tmp_path / "run.yaml")
    assert training.Run.load(tmp_path / "run.yaml") == told


def test_bad_models_and_data_are_named():
    cases = [
        (network(channels=3), "digits", {}, "must take one image"),
        (network(), "digits", {"batch_size": 5000}, "at most the number of training images"),
        (network(), "digits", {"devices": ("CPU:7",)}, "no device CPU:7"),
        (network(), "digits", {"growth": ((1, "nowhere", 1),)}, "nowhere"),
        (
            kr.create_model("resnet20", weights=None, num_classes=4, channels=1, input_shape=(8, 8, 1)),
            "digits",
            {},
            "at least 10 logits",
        ),
    ]
    x, y = np.zeros((200, 8, 8, 1), "uint8"), np.zeros(200, int)
    cases += [
        (network(), (x, np.eye(10)[y]), {"flip": True}, "one class number for each image"),
        (network(), (x, y - 1), {"flip": True}, "whole numbers from 0 to 999,999, got -1"),
        (network(), (x, y - 1), {}, "not whole numbers of at least 0"),
        (network(), "digits", {"holdout": 5000}, "`holdout` must be between"),
    ]
    for model, source, changes, says in cases:
        with pytest.raises(training.TrainingError, match=says):
            training.fit(model, source, run=run(**changes), quiet=True)
    with pytest.raises(training.TrainingError, match="`precision` is an option of `train`"):
        training.fit(network(), "digits", precision="mixed_float16")


def test_other_backends_are_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(training.TrainingError, match="KERAS_BACKEND=tensorflow, it is jax"):
        training.place(run())


def test_a_trained_model_is_fine_tuned_where_options_leave_open_how(capsys):
    """The default learning rate is for new networks; it made a trained VGG diverge."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 6)).astype("float32"), rng.integers(0, 2, 24)
    fresh = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(2)])
    trained = training.fit(fresh, x, y, epochs=1, batch_size=8, learning_rate=1.0, quiet=True).model
    for model, options, says in (
        (fresh, {}, False), (trained, {}, True), (trained, {"learning_rate": 0.1}, False),
        (trained, {"optimizer": keras.optimizers.Adam()}, False), (trained, {"recipe": "from-scratch"}, False),
    ):  # fmt: skip
        capsys.readouterr()
        training.fit(model, x, y, epochs=3, batch_size=8, **options)
        assert ("recipe finetune: the head alone first" in capsys.readouterr().err) == says, options


def test_new_blocks_have_a_learning_rate_and_a_decay_of_their_own():
    model = kr.grow(network(), "stage1_block1_out", gate="rezero", seed=1)
    groups = {g.name: g for g in training.parameter_groups(model, new_lr_multiplier=3.0, new_decay_multiplier=0.5)}
    assert (groups["new, decayed"].lr_multiplier, groups["new, decayed"].decay) == (3.0, 0.5)
    assert (groups["new, not decayed"].lr_multiplier, groups["new, not decayed"].decay) == (3.0, 0.0)
    assert (groups["head, decayed"].lr_multiplier, groups["head, decayed"].decay) == (1.0, 1.0)
    assert all("_grow" in v.path for v in groups["new, decayed"].variables)
    kernel = keras.Variable(np.full((2, 2), 2.0, "float32"), name="kernel")
    made = make_optimizer(run(weight_decay=0.1, momentum=0.0, nesterov=False), 0.01, [training.Group("new", [kernel], 3.0, 0.5)])
    made.build([kernel])
    made.apply([keras.ops.zeros((2, 2))], [kernel])
    np.testing.assert_allclose(value(kernel), 2.0 - 3.0 * 0.01 * (0.5 * 0.1 * 2.0), rtol=1e-6)
    with pytest.warns(DeprecationWarning, match="backbone_lr_multiplier"):
        assert training.parameter_groups(model, trunk_lr_multiplier=0.1)[0].lr_multiplier == 0.1
