"""A local Ray cluster under load: replicas killed and exchanged. Run by `test_cluster.py`: a folder as the argument."""

import dataclasses
import json
import sys
import threading
from pathlib import Path

import numpy as np
import ray
from ray import serve
from ray.serve.schema import ServeDeploySchema
from tiny_models import BIAS, WEIGHTS, classifier

from resnet_export.serving import cluster
from resnet_export.serving.batcher import BatchOptions
from resnet_export.serving.bulk import Item
from resnet_export.serving.client import RemoteClassifier, RemoteOptions
from resnet_export.serving.models import ModelOptions, Source

PORT = int(sys.argv[2])
URL = f"http://127.0.0.1:{PORT}"
IMAGES = np.random.default_rng(2).integers(0, 256, (50, 8, 8, 3)).astype("u1")


def png(pixels):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def shares(bias):
    logits = IMAGES.astype("f8").mean((1, 2)) / 255 @ WEIGHTS.astype("f8") + bias
    exponents = np.exp(logits)
    return exponents / exponents.sum(1, keepdims=True)


def settings(path):
    models = ModelOptions(device="cpu", batch=BatchOptions(max_rows=4))
    return cluster.ClusterSettings(sources=(Source("net", "1", path),), models=models, replicas=(2, 2), cpus=0.5, grace=20)


def under_load(change, retries, seen_enough):
    """Rows answered while `change()` runs, and for a while before and after."""
    changed, rows, stopping = threading.Event(), [], [10**9]
    encoded = [png(pixels) for pixels in IMAGES]

    def items():
        number = 0
        while number < stopping[0]:
            yield Item(str(number % len(IMAGES)), encoded[number % len(IMAGES)])
            number += 1

    def work():
        change()
        changed.set()

    changer = threading.Thread(target=work)
    classifier = RemoteClassifier(URL, "net", RemoteOptions(concurrency=6, retries=retries))
    for count, row in enumerate(classifier.rows(items())):
        rows.append(row)
        if count == 100:
            changer.start()
        if changed.is_set() and stopping[0] == 10**9:
            stopping[0] = count + seen_enough
    changer.join()
    return rows


def probabilities(row):
    assert row["error"] is None, row
    return np.array(row["probabilities"])[np.argsort(row["classes"])]


def kill_one_replica():
    names = [entry for entry in ray.util.list_named_actors(all_namespaces=True) if "SERVE_REPLICA" in entry["name"]]
    assert len(names) == 2, names
    ray.kill(ray.get_actor(names[0]["name"], namespace=names[0]["namespace"]))


def main(folder):
    old = settings(classifier(folder / "old.onnx", dtype="uint8"))
    new = settings(classifier(folder / "new.onnx", dtype="uint8", bias=np.zeros(5)))
    config = json.loads(cluster.config_yaml(old, "127.0.0.1", PORT))
    ServeDeploySchema(**config)
    assert cluster.ClusterSettings.from_json(config["applications"][0]["args"]) == old

    cluster.start(old, "127.0.0.1", PORT)
    try:
        before, after = shares(BIAS), shares(np.zeros(5))
        rows = under_load(kill_one_replica, retries=8, seen_enough=300)
        for row in rows:
            assert np.allclose(probabilities(row), before[int(row["file"])], rtol=1e-4)
        print(f"{len(rows)} answers, one replica killed")

        rows = under_load(lambda: cluster.start(new, "127.0.0.1", PORT), retries=0, seen_enough=100)
        answered_by = []
        for row in rows:
            found, image = probabilities(row), int(row["file"])
            is_old, is_new = (np.allclose(found, expected[image], rtol=1e-4) for expected in (before, after))
            assert is_old != is_new
            answered_by.append(is_new)
        assert not answered_by[0] and all(answered_by[-50:])
        print(f"{len(rows)} answers without a retry, {sum(answered_by)} by the new version")

        scaled = dataclasses.replace(new, replicas=(1, 3))
        assert cluster.deployment_options(scaled)["autoscaling_config"]["max_replicas"] == 3
        cluster.start(scaled, "127.0.0.1", PORT)
        assert len(list(RemoteClassifier(URL, "net").rows([Item("0", png(IMAGES[0]))]))) == 1
    finally:
        serve.shutdown()
        ray.shutdown()
    print("served")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
