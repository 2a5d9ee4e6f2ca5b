"""`training.fit` computes what Keras' `fit` computes: data of every kind, tasks, weights, several outputs; bit for bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_resnet as kr
from keras_resnet import training

RNG = np.random.default_rng(0)
N, FEATURES = 22, 6
X = RNG.normal(size=(N, FEATURES)).astype("float32")
IMAGES = RNG.integers(0, 256, (N, 6, 6, 2)).astype("uint8")
CLASSES = RNG.integers(0, 3, N)
ONE_HOT = np.eye(3, dtype="float32")[CLASSES]
SEVERAL = RNG.integers(0, 2, (N, 3)).astype("float32")
BINARY = RNG.integers(0, 2, N)
TARGETS = RNG.normal(size=(N, 2)).astype("float32")
WEIGHTS = RNG.uniform(0.2, 2, N).astype("float32")


def vector(units=3, activation=None):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.BatchNormalization(momentum=0.8)(keras.layers.Dense(5, activation="tanh")(inputs))
    return keras.Model(inputs, keras.layers.Dense(units, activation=activation, name="out")(hidden), name="vector")


def convolutional():
    keras.utils.set_random_seed(2)
    inputs = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(3, 3, strides=2)(keras.layers.Rescaling(1 / 255)(inputs))
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(x)))


def two_by_two():
    keras.utils.set_random_seed(3)
    inputs = {"a": keras.Input((FEATURES,), name="a"), "b": keras.Input((2,), name="b")}
    x = keras.layers.Concatenate()([keras.layers.Dense(4)(inputs["a"]), inputs["b"]])
    return keras.Model(inputs, {"kind": keras.layers.Dense(3, name="kind")(x), "size": keras.layers.Dense(2, name="size")(x)})


def list_of_two():
    keras.utils.set_random_seed(3)
    inputs = [keras.Input((FEATURES,)), keras.Input((2,))]
    x = keras.layers.Concatenate()([keras.layers.Dense(4)(inputs[0]), inputs[1]])
    return keras.Model(inputs, [keras.layers.Dense(3, name="kind")(x), keras.layers.Dense(2, name="size")(x)])


SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CATEGORICAL = keras.losses.CategoricalCrossentropy
ADAM = dict(optimizer=lambda: keras.optimizers.Adam(0.01))


def dataset():
    return tf.data.Dataset.from_tensor_slices((X, CLASSES, WEIGHTS)).batch(8)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        part = slice(8 * index, 8 * index + 8)
        return X[part], CLASSES[part], WEIGHTS[part]


def generator():
    while True:
        for index in range(3):
            yield Batches()[index]


# name: model, data of `fit`, and the arguments of `compile` that Keras must be given (ours chooses them where `chosen`).
CASES = {
    "class numbers": (vector, (X, CLASSES), dict(loss=SPARSE, metrics=["accuracy"]), True),
    "column of class numbers": (vector, (X, CLASSES[:, None]), dict(loss=SPARSE), True),
    "uint8 images": (convolutional, (IMAGES, CLASSES), dict(loss=SPARSE), True),
    "float64 arrays": (vector, (X.astype("float64"), CLASSES), dict(loss=SPARSE), True),
    "one-hot": (
        vector, (X, ONE_HOT), dict(loss=CATEGORICAL(from_logits=True), weighted_metrics=[keras.metrics.F1Score()]), True
    ),
    "softmax head": (lambda: vector(3, "softmax"), (X, CLASSES), dict(loss="sparse_categorical_crossentropy"), True),
    "several labels": (lambda: vector(3), (X, SEVERAL), dict(loss=keras.losses.BinaryCrossentropy(from_logits=True)), True),
    "sigmoid head": (lambda: vector(3, "sigmoid"), (X, SEVERAL), dict(loss="binary_crossentropy"), True),
    "binary": (lambda: vector(1), (X, BINARY), dict(loss=keras.losses.BinaryCrossentropy(from_logits=True)), True),
    "binary with sigmoid": (lambda: vector(1, "sigmoid"), (X, BINARY), dict(loss="binary_crossentropy"), True),
    "regression": (lambda: vector(2), (X, TARGETS), dict(loss="mse", metrics=["mae"]), False),
    "own loss": (lambda: vector(2), (X, TARGETS), dict(loss=lambda y, p: keras.ops.mean(keras.ops.abs(y - p) ** 3)), False),
    "sample weights": (vector, (X, CLASSES, WEIGHTS), dict(loss=SPARSE, weighted_metrics=["accuracy"]), True),
    "two inputs, two outputs": (
        two_by_two, ({"a": X, "b": TARGETS}, {"kind": CLASSES, "size": TARGETS}),
        dict(loss={"kind": SPARSE, "size": "mae"}, loss_weights={"kind": 0.3, "size": 2.0}, metrics={"size": ["mse"]}), False,
    ),
    "lists": (list_of_two, ([X, TARGETS], [CLASSES, TARGETS]), dict(loss=[SPARSE, "mse"], loss_weights=[1.0, 0.1]), False),
    "tf.data": (vector, (dataset,), dict(loss=SPARSE, metrics=["accuracy"]), True),
    "PyDataset": (vector, (Batches,), dict(loss=SPARSE), True),
    "generator": (vector, (generator,), dict(loss=SPARSE), True),
}  # fmt: skip


def same(ours, theirs):
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


def fitted(make, given, compiled, optimizer, chosen=False, class_weight=None, **options):
    """`(our result, Keras' model, Keras' history)` after two epochs in the same order."""
    made = [data() if callable(data) else data for data in given]
    more = {"steps_per_epoch": 3} if given[0] is generator else {}
    arrays = dict(zip(("y", "sample_weight"), made[1:], strict=False)) | ({"class_weight": class_weight} if class_weight else {})
    mine = {key: value for key, value in compiled.items() if not chosen or key == "weighted_metrics"}
    ours = training.fit(
        make(),
        made[0],
        **arrays,
        **mine,
        **more,
        optimizer=optimizer(),
        epochs=2,
        batch_size=8,
        shuffle=False,
        quiet=True,
        **options,
    )
    made = [data() if callable(data) else data for data in given]
    model = make()
    model.compile(optimizer=optimizer(), jit_compile=False, **compiled)
    history = model.fit(
        made[0], **arrays, **more, epochs=2, batch_size=None if callable(given[0]) else 8, shuffle=False, verbose=0
    )
    return ours, model, history.history


# Those that differ from another case in one conversion only.
RARER = (
    "column of class numbers", "float64 arrays", "binary", "several labels", "own loss", "PyDataset", "lists", "uint8 images",
    "one-hot", "sigmoid head",
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in RARER else n for n in CASES])
def test_weights_and_figures_are_those_of_plain_fit(name):
    make, given, compiled, chosen = CASES[name]
    ours, theirs, history = fitted(make, given, compiled, lambda: keras.optimizers.Adam(0.01), chosen)
    same(ours.model, theirs)
    for key, values in history.items():
        # A metric per class has a column for each.
        keys = [f"{key}_{i}" for i in range(3)] if np.ndim(values) > 1 else key
        logged = [[row[name] for name in keys] if isinstance(keys, list) else row[key] for row in ours.history]
        np.testing.assert_allclose(logged, values, atol=6e-7, err_msg=key)


UNUSUAL = ("weighted validation", "validation PyDataset", "validation data set", "sample weights")
OPTIONS = {
    "validation arrays": dict(validation_data=(X[:10], CLASSES[:10])),
    "weighted validation": dict(validation_data=(X[:10], CLASSES[:10], WEIGHTS[:10])),
    "validation data set": dict(validation_data=dataset().take(2)),
    "validation PyDataset": dict(validation_data=Batches()),
    "validation split": dict(validation_split=0.25),
    "class weights": dict(class_weight={0: 3.0, 2: 0.25}),
    "sample weights": dict(sample_weight=WEIGHTS),
    "steps": dict(steps_per_epoch=2, validation_data=(X, CLASSES), validation_steps=2),
    "validation batch size": dict(validation_data=(X, CLASSES), validation_batch_size=5, validation_freq=2),
    "validation epochs": dict(validation_data=Batches(), validation_freq=[1]),
    "initial epoch": dict(initial_epoch=1, validation_data=(X, CLASSES), validation_freq=2),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in UNUSUAL else n for n in OPTIONS],
)
def test_options_of_fit_mean_what_they_mean_in_keras(name):
    options = OPTIONS[name]
    ours = training.fit(
        vector(), X, CLASSES, optimizer=keras.optimizers.SGD(0.1), epochs=2, batch_size=8, shuffle=False, quiet=True, **options
    )
    model = vector()
    model.compile(keras.optimizers.SGD(0.1), loss=SPARSE, metrics=["accuracy"], jit_compile=False)
    if "steps_per_epoch" in options:
        # Keras takes up the arrays where the first epoch stopped; a run begins every epoch at its own start.
        options = {**options, "x": X[:16], "y": CLASSES[:16]}
    history = model.fit(**{"x": X, "y": CLASSES, **options}, epochs=2, batch_size=8, shuffle=False, verbose=0).history
    same(ours.model, model)
    for key, values in history.items():
        np.testing.assert_allclose([row[key] for row in ours.history if key in row], values, atol=6e-7, err_msg=key)
    if "val_loss" in ours.history[-1]:
        assert ours.summary["val_loss"] == ours.history[-1]["val_loss"]


LATER = [pytest.param(name, marks=pytest.mark.slow) for name in ("AdamW", "Nadam", "RMSprop", "Lion", "Adafactor")]


class Loader:
    """Batches on every iteration, as a PyTorch `DataLoader`."""

    def __len__(self):
        return 3

    def __iter__(self):
        return ([X[i : i + 8], CLASSES[i : i + 8]] for i in range(0, N, 8))


def test_an_iterable_of_batches_is_data():
    options = dict(optimizer=keras.optimizers.SGD(0.1), epochs=2, batch_size=8, shuffle=False, quiet=True)
    loader = training.fit(vector(), Loader(), loss=SPARSE, validation_data=Loader(), **options)
    arrays = training.fit(vector(), X, CLASSES, loss=SPARSE, validation_data=(X, CLASSES), **options)
    same(loader.model, arrays.model)
    assert loader.summary["val_loss"] == arrays.summary["val_loss"] and loader.history[0]["step"] == 3
    iterator = training.fit(vector(), iter([*Loader(), *Loader()]), loss=SPARSE, steps_per_epoch=3, **options)
    same(iterator.model, arrays.model)


@pytest.mark.parametrize("optimizer", ["SGD", *LATER])
def test_optimisers_of_keras_do_what_they_do_there(optimizer):
    settings = {
        "AdamW": dict(weight_decay=0.1, use_ema=True),
        "SGD": dict(momentum=0.9, gradient_accumulation_steps=2, clipnorm=0.1),
    }
    make = lambda: getattr(keras.optimizers, optimizer)(learning_rate=0.02, **settings.get(optimizer, {}))  # noqa: E731
    ours, theirs, _ = fitted(vector, (X, CLASSES), dict(loss=SPARSE), make, True)
    same(ours.model, theirs)


def test_accumulated_gradients_are_those_of_the_larger_batch():
    plain = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(3)])
    common = dict(epochs=2, shuffle=False, learning_rate=0.1, base_batch=16, schedule="cosine", quiet=True)
    one = training.fit(plain, X[:16], CLASSES[:16], batch_size=16, **common).model
    four = training.fit(plain, X[:16], CLASSES[:16], batch_size=4, accumulate=4, **common).model
    for a, b, start in zip(one.weights, four.weights, plain.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-7)
        assert np.abs(a.numpy() - start.numpy()).max() > 1e-3


def followed_by(operation):
    model = vector(3, "softmax")
    return keras.Model(model.inputs, operation(model.outputs[0]))


REFUSED = [
    (lambda: followed_by(lambda p: p * 2.0), (X, CLASSES), {}, "something follows the softmax of layer 'out'.*kr.replace_head"),
    (lambda: followed_by(lambda p: keras.ops.softmax(p, axis=1)), (X, CLASSES), {}, "softmax over axis 1.*kr.replace_head"),
    (lambda: vector(3, "hard_sigmoid"), (X, SEVERAL), {}, "hard sigmoid, for which no loss is chosen.*or give `loss`"),
    (lambda: vector(3, "softmax"), (X, SEVERAL), {}, "several labels need sigmoids"),
    (lambda: vector(2), (X, TARGETS), {}, 'loss="mse"'),
    (two_by_two, ({"a": X, "b": TARGETS}, {"kind": CLASSES, "size": TARGETS}), {}, "a loss per output"),
    (lambda: vector(2), (X, CLASSES), {}, "at least 3 logits.*kr.replace_head"),
    (vector, (X, CLASSES[:5]), {}, "same number of examples, got 5, 22"),
    (vector, (X, CLASSES), dict(validation_split=0.5, validation_freq=0), "`validation_freq` must be a whole number"),
    (vector, (X, CLASSES), dict(validation_data=Batches(), validation_batch_size=4), "`validation_batch_size` is for arrays"),
    (vector, (X, CLASSES), dict(validation_split=1.5), "`validation_split` must be between 0 and 1"),
    (vector, (X, CLASSES), dict(class_weight={"a": 1}), "not a class number"),
    (vector, (X, CLASSES), dict(steps_per_epoch=9), "`steps_per_epoch` must be at most 3"),
    (vector, (X, CLASSES), dict(flip=True), "`flip` changes training images"),
    (vector, (generator,), {}, "give `steps_per_epoch`"),
    (vector, (dataset,), dict(y=CLASSES), "`y` is for arrays"),
    (vector, (X, CLASSES), dict(optimizer=keras.optimizers.Adam(), learning_rate=0.1), "`learning_rate` is decided by the Adam"),
    (vector, (X, CLASSES), dict(optimizer="adam"), "must be a Keras optimizer, or one of 'sgd'"),
    (vector, (lambda: dataset().map(lambda x, y, w: (x, y + 5, w)),), {}, r"^Received a label value of \d which is outside"),
    (vector, (object(),), dict(loss="mse"), "data of type object cannot be trained on"),
    (vector, (X[:, :5], CLASSES), {}, "do not take a batch"),
    (vector, (lambda: iter([X]),), dict(loss=SPARSE, steps_per_epoch=1), r"must return a tuple.*sample_weights\)\.$"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=[case[3][:30] for case in REFUSED])
def test_what_cannot_be_trained_is_one_short_message(case):
    make, given, options, says = case
    data = [part() if callable(part) else part for part in given]
    with pytest.raises(training.TrainingError, match=says) as refused:
        training.fit(make(), *data, epochs=1, batch_size=8, quiet=True, **options)
    assert len(str(refused.value)) < 700 and "function_node" not in str(refused.value)


def test_half_precision_softmax_trains_like_the_logits_before_it():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        halves = [vector(3, "softmax"), vector(3)]
    finally:
        keras.config.set_dtype_policy("float32")
    losses = [
        training.fit(model, X, CLASSES, epochs=1, batch_size=22, learning_rate=0.0, quiet=True).history[0]["loss"]
        for model in halves
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=5e-3)


def test_classes_in_another_order_are_refused_and_sorted_by_a_new_head():
    model = kr.with_card(convolutional(), labels=["ant", "bee", "cat"])
    images, classes = np.repeat(IMAGES, 2, 0), np.repeat(CLASSES, 2)
    options = dict(epochs=1, batch_size=8, quiet=True, loss=SPARSE)
    with pytest.raises(training.TrainingError, match="class 1 is 'cat' in the data and 'bee' in the model.*kr.replace_head"):
        training.fit(model, images, classes, labels=["ant", "cat", "bee"], **options)
    sorted_model = kr.replace_head(model, 3, labels=["ant", "cat", "bee"])
    np.testing.assert_array_equal(sorted_model(IMAGES), model(IMAGES).numpy()[:, [0, 2, 1]])
    for fits in (sorted_model, kr.with_card(convolutional(), labels=["x", "y", "z"])):
        trained = training.fit(fits, images, classes, labels=["ant", "cat", "bee"], **options).model
        assert kr.card(trained).labels == ["ant", "cat", "bee"]
