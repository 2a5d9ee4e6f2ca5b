"""What the recipe for speed adds to a run: Muon, a learning rate of β, a linear schedule, test-time augmentation."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_resnet as kr
from keras_resnet import data, training
from keras_resnet.training import precision
from keras_resnet.training.fused import fuse
from keras_resnet.training.optimizers import make_optimizer
from keras_resnet.training.schedules import make_schedule
from keras_resnet.training.views import averaged_over_views

from ..helpers import randomise
from .models import network, run


def value(variable):
    return keras.ops.convert_to_numpy(variable)


def speed_network(**changes):
    """A narrow `cifar_speed` on 16 pixels."""
    keras.utils.set_random_seed(2)
    fields = {"widths": (8, 12, 16), "stem_widths": (8,), "input_shape": (16, 16, 1), "preprocessing": {"mean": 0.3, "std": 0.4}}
    return kr.create_model("cifar_speed", **{**fields, **changes})


def network_of_16():
    """A residual network of 16 pixels."""
    keras.utils.set_random_seed(5)
    config = kr.ResNetConfig.cifar(8, channels=1, input_size=16)
    return kr.create_model(config, input_shape=(16, 16, 1), preprocessing={"mean": 0.3, "std": 0.38})


def images(count=600):
    """Digits of 16 pixels."""
    split = data.load("digits").train
    return split.images[:count].repeat(2, 1).repeat(2, 2), split.labels[:count]


# ---------------------------------------------------------------- Muon


def orthogonalised(gradient, iterations=3):
    """As airbench94 has it, on `(filters, rest)`."""
    x = np.moveaxis(gradient, -1, 0).reshape(gradient.shape[-1], -1)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    x = x.T if is_tall else x
    return np.moveaxis(x.reshape(gradient.shape[-1], *gradient.shape[:-1]), 0, -1)


def test_muon_takes_the_steps_of_its_reference_and_sgd_all_others():
    rng = np.random.default_rng(0)
    model, twin = speed_network(), speed_network()
    description = run(
        optimizer="muon", learning_rate=0.4, base_batch=128, batch_size=128, momentum=0.85, muon_rate=0.2, muon_momentum=0.6,
        beta_lr_multiplier=8.0, weight_decay=0.01,
    )  # fmt: skip
    groups = training.parameter_groups(model, beta_lr_multiplier=8.0, orthogonal=True)
    optimizer = make_optimizer(description, 0.4, groups)
    plain = make_optimizer(description.replace(optimizer="sgd"), 0.4, training.parameter_groups(twin, beta_lr_multiplier=8.0))
    optimizer.build(model.trainable_variables), plain.build(twin.trainable_variables)
    kernels = [layer.kernel for layer in model.layers if "_conv" in layer.name and layer.trainable]
    assert len(kernels) == 6
    expected = {kernel.path: (value(kernel).astype("float64"), 0.0) for kernel in kernels}
    for _ in range(3):
        gradients = [rng.normal(size=v.shape).astype("float32") for v in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)
        plain.apply(gradients, twin.trainable_variables)
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
            if variable.path in expected:
                weights, momentum = expected[variable.path]
                momentum = 0.6 * momentum + gradient
                weights = weights * weights.shape[-1] ** 0.5 / np.linalg.norm(weights)
                expected[variable.path] = weights - 0.2 * orthogonalised(gradient + 0.6 * momentum), momentum
    for ours, theirs in zip(model.trainable_variables, twin.trainable_variables, strict=True):
        if ours.path in expected:
            np.testing.assert_allclose(value(ours), expected[ours.path][0], rtol=0, atol=2e-5, err_msg=ours.path)
        else:
            np.testing.assert_array_equal(value(ours), value(theirs), err_msg=ours.path)


def test_updates_of_muon_are_orthogonal():
    optimizer = make_optimizer(run(optimizer="muon"), 0.1, [])
    for shape in ((216, 64), (12, 40), (30, 30)):
        matrix = np.random.default_rng(1).normal(size=shape).astype("float32")
        found = np.linalg.svd(optimizer._orthogonal(matrix), compute_uv=False)
        # The smallest singular values of a square matrix need more iterations.
        assert found.max() < 1.3 and np.median(found) > 0.5


def test_only_kernels_before_a_norm_are_orthogonal():
    """Gates, the classifier, and convolutions whose scale no norm takes out are not."""
    found = {
        group.name: {v.path for v in group.variables}
        for group in training.parameter_groups(kr.grow(network(), "stage1_block1_out", seed=0), orthogonal=True)
    }
    kernels = found["backbone, orthogonal"] | found["new, orthogonal"]
    assert len(found["backbone, orthogonal"]) == 1 + 6 + 2 and len(found["new, orthogonal"]) == 1
    assert not any("predictions" in path for path in kernels)
    assert any("grow1_conv2" in path for path in found["gates"])
    plain = training.parameter_groups(kr.create_model("vgg11_w12", preprocessing="cifar10"), orthogonal=True)
    assert not any(group.is_orthogonal for group in plain)


def test_groups_of_beta():
    model = network()
    by_name = {
        group.name: group for group in training.parameter_groups(model, beta_lr_multiplier=64.0, backbone_lr_multiplier=0.5)
    }
    assert {v.name for v in by_name["backbone, β"].variables} == {"beta"} and by_name["backbone, β"].lr_multiplier == 32.0
    assert by_name["backbone, β"].decay == 0 and by_name["head, not decayed"].lr_multiplier == 1.0
    decayed = training.parameter_groups(model, beta_decay_multiplier=0.25)
    assert {group.decay for group in decayed if group.name.endswith("β")} == {0.25}
    assert {group.lr_multiplier for group in decayed} == {1.0}
    counted = [id(v) for group in by_name.values() for v in group.variables]
    assert sorted(counted) == sorted(id(v) for v in model.trainable_variables)


def test_linear_schedule_is_a_triangle():
    description = run(epochs=4, schedule="linear", warmup_epochs=1.0, learning_rate=0.8)
    schedule = make_schedule(description, 10)
    found = [float(schedule(step)) for step in range(41)]
    np.testing.assert_allclose(found, np.interp(range(41), (0, 10, 40), (0, 0.8, 0)), rtol=1e-5, atol=1e-7)
    assert float(make_schedule(run(epochs=4, schedule="linear", learning_rate=0.8), 10)(0)) == pytest.approx(0.8)


# ---------------------------------------------------------------- test-time augmentation


@pytest.mark.parametrize("kind", ["flip", "flip-shift"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_views_are_weighted_as_in_airbench(kind, data_format):
    first = data_format == "channels_first"
    model = speed_network(data_format=data_format, input_shape=(1, 16, 16) if first else (16, 16, 1))
    x = np.random.default_rng(0).uniform(0, 255, (3, 16, 16, 1)).astype("float32")
    to = (lambda y: np.moveaxis(y, -1, 1)) if first else (lambda y: y)
    answer = lambda y: (value(model(to(y))) + value(model(to(y[:, :, ::-1])))) / 2  # noqa: E731
    expected = answer(x)
    if kind == "flip-shift":
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
        expected = expected / 2 + answer(padded[:, :-2, :-2]) / 4 + answer(padded[:, 2:, 2:]) / 4
    np.testing.assert_allclose(averaged_over_views(model, kind)(to(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_recipe_learns_resumes_and_reports_both_accuracies(tmp_path):
    x, y = images()
    options = {"epochs": 2, "batch_size": 100, "base_batch": 100, "flip": False, "alternate_flips": False, "seed": 1}

    def train(out, **changes):
        return training.fit(
            speed_network(), ((x, y), (x[:200], y[:200])), recipe="cifar-speed", out=out, quiet=True, deterministic=True,
            **{**options, **changes},
        )  # fmt: skip

    whole = train(tmp_path / "whole")
    summary = whole.summary
    assert summary["test_accuracy"] > 0.3 and summary["test_accuracy"] != summary["test_accuracy_tta"]
    measured = averaged_over_views(whole.model, "flip-shift").predict(x[:200], verbose=0).argmax(-1)
    assert np.mean(measured == y[:200]) == pytest.approx(summary["test_accuracy_tta"], abs=1e-6)
    assert np.mean(whole.model.predict(x[:200], verbose=0).argmax(-1) == y[:200]) == pytest.approx(summary["test_accuracy"])

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.fit(
            speed_network(), ((x, y), (x[:200], y[:200])), recipe="cifar-speed", out=tmp_path / "broken", quiet=True,
            deterministic=True, save_every=2, callbacks=[Stop()], **options,
        )  # fmt: skip
    again = train(tmp_path / "broken", tta="none")
    for ours, theirs in zip(again.model.variables, whole.model.variables, strict=True):
        np.testing.assert_array_equal(value(ours), value(theirs), err_msg=ours.path)
    assert "test_accuracy_tta" not in again.summary
    assert not np.array_equal(value(whole.model.get_layer("stage1_block1_norm1").beta), np.zeros(8))


def test_train_fills_a_whitening_stem_from_training_images(tmp_path):
    x, y = images(120)
    x3 = np.repeat(x, 3, -1) // np.array([1, 2, 3], "uint8")
    np.savez(tmp_path / "data.npz", x_train=x3, y_train=y, x_test=x3[:20], y_test=y[:20])
    fields = {"widths": (8, 8, 8)}
    description = training.Run.of("cifar-speed", data=str(tmp_path / "data.npz"), epochs=1, batch_size=60, model_options=fields)
    trained = training.train(description, quiet=True).model
    numbers = {key: kr.card(trained).preprocessing[key] for key in ("mean", "std")}
    twin = kr.create_model("cifar_speed", input_shape=(16, 16, 3), preprocessing=numbers, **fields)
    kr.whiten_stem(twin, x3)
    np.testing.assert_allclose(
        value(trained.get_layer("stem_conv").kernel), value(twin.get_layer("stem_conv").kernel), rtol=1e-3, atol=1e-3
    )


# ---------------------------------------------------------------- fused batch norm


@pytest.mark.parametrize("norm_scale", [True, False])
def test_fused_norms_compute_the_same(norm_scale):
    x = np.random.default_rng(0).uniform(0, 255, (32, 16, 16, 1)).astype("float32")
    plain, fused = (randomise(speed_network(norm_scale=norm_scale)) for _ in range(2))
    norms = [layer for layer in fused.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert fuse(norms) == 6 and fuse(norms) == 0  # Once is enough.
    inference = value(plain(x, training=False))
    np.testing.assert_array_equal(value(fused(x, training=False)), inference)
    gradients = []
    for model in (plain, fused):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True)))
        gradients.append([value(g) for g in tape.gradient(loss, model.trainable_variables)])
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max() + 1e-8)
    for ours, theirs in zip(fused.variables, plain.variables, strict=True):
        np.testing.assert_allclose(value(ours), value(theirs), rtol=1e-5, atol=1e-6, err_msg=ours.path)
    assert not np.array_equal(value(fused(x, training=False)), inference)  # The statistics have moved.
    # Frozen ones keep theirs, and what is saved does not know about it.
    for norm in norms:
        norm.trainable = False
    before = [value(v) for v in fused.variables]
    fused(x, training=True)
    assert all(np.array_equal(value(v), b) for v, b in zip(fused.variables, before, strict=True))
    for norm in norms:
        assert norm.get_config() == plain.get_layer(norm.name).get_config() | {"trainable": False}


def test_what_the_fused_operation_cannot_do_is_left_alone():
    vectors = keras.layers.BatchNormalization()
    vectors.build((None, 5))
    first = keras.layers.BatchNormalization(axis=1)
    first.build((None, 5, 4, 4))
    wide = keras.layers.BatchNormalization(dtype="float64")
    wide.build((None, 4, 4, 5))
    together = keras.layers.BatchNormalization(synchronized=True)
    together.build((None, 4, 4, 5))
    assert fuse([vectors, first, wide, together]) == 0 and "call" not in vars(vectors)


@pytest.mark.slow
def test_a_run_with_fused_norms_is_the_same_run():
    x, y = images()
    losses = []
    for fused in (False, True):
        result = training.fit(network_of_16(), (x, y), run=run(epochs=1, fused_norm=fused, seed=3), quiet=True)
        losses.append(result.summary["loss"])
        assert all("call" not in vars(layer) for layer in result.model.layers)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] != losses[1]


# ---------------------------------------------------------------- precision


def precision_of(monkeypatch, flags, gain, out=None, **changes):
    lines = []
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(precision, "measured_gain", lambda: gain)
    description = run(precision="auto", **changes)
    return precision.chosen_precision(description, training.place(description), out, lines.append), lines


def test_auto_takes_bfloat16_where_the_cpu_has_it_and_is_faster(monkeypatch):
    assert precision_of(monkeypatch, ["avx512f"], None) == ("float32", ["precision float32: this CPU has no bfloat16 units"])
    found, (line,) = precision_of(monkeypatch, ["avx512f", "avx512_bf16"], 2.0)
    assert found == "mixed_bfloat16" and "0.50 of its float32 time" in line
    assert precision_of(monkeypatch, ["amx_bf16"], 1.05)[0] == "float32"
    description = run(precision="mixed_float16")
    assert precision.chosen_precision(description, training.place(description), None, print) == "mixed_float16"


def test_the_choice_is_written_and_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset(["avx512_bf16"]))
    monkeypatch.setattr(precision, "measured_gain", lambda: 2.0)
    options = {"data": "digits", "model": "resnet20", "image_size": 8, "epochs": 1, "batch_size": 700, "validate": "none"}
    description = training.Run.of(precision="auto", **options)
    training.train(description, tmp_path, quiet=True)
    assert training.Run.load(tmp_path / "run.yaml").precision == "mixed_bfloat16"
    monkeypatch.setattr(precision, "measured_gain", lambda: pytest.fail("a run that resumes measures nothing"))
    model = training.train(description, tmp_path, quiet=True).model
    assert model.get_layer("stem_conv").compute_dtype == "bfloat16"
    with pytest.raises(training.TrainingError, match="precision 'mixed_bfloat16' there, 'float32' here"):
        training.train(description.replace(precision="float32"), tmp_path, quiet=True)


def test_the_measurement_measures():
    assert 0.01 < precision.measured_gain() < 100


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "muon", "momentum": 0.0}, "`momentum` must be above 0 with the optimizer 'muon'"),
        ({"alternate_flips": True}, "needs `flip`"),
        ({"tta": "crop"}, "`tta` must be one of 'none', 'flip', 'flip-shift'"),
        ({"crop_border": "black"}, "`crop_border` must be one of 'mean', 'reflect'"),
    ],
)
def test_what_contradicts_itself_is_refused(changes, message):
    with pytest.raises(training.TrainingError, match=message):
        training.Run.of(**changes)
