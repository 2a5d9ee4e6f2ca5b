"""The real ImageNet VGG16 trunk on real photographs, and two replicas."""

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr


@pytest.fixture(scope="module")
def trunk_and_photos(shared_data):
    def trunk(dtype, size):
        keras.config.set_dtype_policy(dtype)
        try:
            model = keras.applications.VGG16(weights=None, include_top=False, input_shape=(size, size, 3))
        finally:
            keras.config.set_dtype_policy("float32")
        with np.load(shared_data / "weights" / "vgg16_imagenet_notop.npz") as weights:
            for layer in model.layers:
                if layer.weights:
                    layer.set_weights([weights[f"{layer.name}/kernel"], weights[f"{layer.name}/bias"]])
        return model

    files = [path for path in sorted((shared_data / "photos").iterdir()) if path.suffix in (".png", ".jpg")][:3]
    photos = np.stack([np.asarray(Image.open(path).convert("RGB").resize((128, 128)), "float32") for path in files])
    return trunk, keras.applications.vgg16.preprocess_input(photos.copy())


# Its features are thousands of times larger than what a fresh branch computes, of which `identity_report` warns.
@pytest.mark.filterwarnings("ignore:.* more than 100 times smaller")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("mixed_float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("block", ["preact", pytest.param("postact", marks=pytest.mark.slow)])
def test_real_vgg16_is_unchanged_by_26_layers(trunk_and_photos, dtype, block):
    make, photos = trunk_and_photos
    if dtype == "mixed_float16":  # half precision is slow on a CPU
        photos = photos[:1, 32:64, 32:64]
    vgg = make(dtype, photos.shape[1])
    report = kr.identity_report(vgg, kr.grow(vgg, "block*_pool", total_layers=26, block=block), photos)
    assert report.blocks == 13 and report.scale > 10
    assert report.eager == 0 and report.training == 0 and report.graph <= 1e-6 * report.scale


@pytest.mark.slow
def test_two_replicas_see_the_identity_too():
    """MirroredStrategy over two logical CPUs, in a process of its own: devices are fixed once TensorFlow has started."""
    script = """
        import numpy as np, tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        import keras, keras_resnet as kr
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        with strategy.scope():
            x = inputs = keras.Input((16, 16, 3))
            for n in range(2):
                x = keras.layers.Conv2D(8, 3, padding="same", name=f"conv{n}")(x)
                x = keras.layers.BatchNormalization()(x)
                x = keras.layers.ReLU(name=f"relu{n}")(x)
            model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(x)))
            deep = kr.grow(model, "relu*", blocks=2)
            deep.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        value = np.random.default_rng(0).standard_normal((8, 16, 16, 3)).astype("float32")
        data = tf.data.Dataset.from_tensors(value)
        run = tf.function(lambda m, batch: strategy.run(lambda b: m(b, training=False), (batch,)))
        half = lambda context: tf.constant(value[4 * context.replica_id_in_sync_group :][:4])
        per_replica = strategy.experimental_distribute_values_from_function(half)
        for a, b in zip(*(strategy.experimental_local_results(run(m, per_replica)) for m in (model, deep))):
            assert a.device == b.device and float(tf.reduce_max(tf.abs(a - b))) == 0, (a, b)
        before = [np.asarray(v) for v in model.variables]
        deep.fit(value, np.arange(8) % 4, batch_size=8, verbose=0)
        assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(before, model.variables))
        assert max(d.max for d in kr.drift(deep, value)) > 0
        print("replicas", strategy.num_replicas_in_sync)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "replicas 2" in done.stdout, done.stderr[-2000:]
