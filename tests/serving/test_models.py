"""How served models run on a GPU, with a session that says it has one."""

import asyncio
import threading

import numpy as np
import pytest
from tiny_models import classifier_logits

from resnet_export.runtime import sessions as runtime
from resnet_export.serving import models as serving_models
from resnet_export.serving.batcher import BatchOptions
from resnet_export.serving.models import ModelOptions, ServedModel, Source

# The number of the GPU of every run.
used = []


@pytest.fixture
def gpu(monkeypatch):
    """Sessions that run here and name another device; gives what was asked of them and the batch sizes they ran."""
    opened, sizes = [], []
    used.clear()

    def open_session(path, device, **options):
        opened.append((device, options.get("batches")))
        number = options.pop("device_id", 0)
        found = runtime.session(path, "cpu", **options)
        found.device = "cuda"
        run_here = found.ort.run

        class Recorded:
            def run(self, names, feeds):
                sizes.append(len(next(iter(feeds.values()))))
                return run_here(names, feeds)

        found.ort, run = Recorded(), found.run
        found.run = lambda feeds, outputs=None: (used.append(number), run(feeds, outputs))[1]
        return found

    monkeypatch.setattr(serving_models, "session", open_session)
    return opened, sizes


def served(path, **batch):
    options = ModelOptions(device="auto", threads=1, batch=BatchOptions(max_rows=6, **batch))
    model = ServedModel(Source("net", "1", path), options)
    model.warm_up()
    return model


def answers(model, images):
    """What a request of all images, and one of three, get."""

    async def ask():
        found = [(await model.infer(model.prepare({"images": part}))).outputs["logits"] for part in (images, images[:3])]
        await model.close()
        return found

    return asyncio.run(ask())


def assert_answers(model, images):
    both = answers(model, images)
    for found, part in zip(both, (images, images[:3]), strict=True):
        np.testing.assert_allclose(found, classifier_logits(part), rtol=1e-5, atol=1e-6)


def test_fixed_sizes_get_buffers_for_every_batch_size(models, gpu, pixels):
    opened, sizes = gpu
    model = served(models["bytes"])
    assert opened == [("auto", None), ("cuda", [1, 2, 4, 6])]
    assert model.session.buckets.sizes == (1, 2, 4, 6)
    assert_answers(model, np.concatenate([pixels, pixels[:3]]))
    # All went through the buffers.
    assert sizes == []


@pytest.mark.parametrize("name, batch", [("open", {}), ("bytes", {"instances": 2})])
def test_others_are_filled_up_to_sizes_that_were_warmed_up(models, gpu, pixels, name, batch):
    opened, sizes = gpu
    model = served(models[name], **batch)
    # The card of the open model names no size to warm up at.
    warm = [] if name == "open" else [1, 2, 4, 6]
    assert opened == [("auto", None)] and sizes == warm
    dtype = "u1" if name == "bytes" else "f4"
    assert_answers(model, np.concatenate([pixels, pixels[:3]]).astype(dtype))
    assert sorted(sizes[len(warm) :]) == [4, 4, 6]


def test_models_without_batch_axis_run_as_they_are(models, gpu, pixels):
    opened, sizes = gpu
    model = served(models["single"])
    assert opened == [("auto", None)] and sizes == [1]
    found = asyncio.run(model.infer({"images": pixels[:1].astype("f4")})).outputs["logits"]
    np.testing.assert_allclose(found, classifier_logits(pixels[:1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("instances", "gpus", "shares"), [(4, 2, [2, 2]), (3, 4, [1, 1, 1]), (3, 1, [3]), (2, 0, [2])])
def test_instances_are_spread_over_gpus(gpu, models, monkeypatch, instances, gpus, shares):
    """Every instance runs a batch at the same time as all others; each GPU has its share of them."""
    monkeypatch.setattr(serving_models, "gpu_count", lambda: gpus)
    opened, _ = gpu
    model = served(models["bytes"], instances=instances)
    alone = instances == len(shares)
    assert opened[-1] == (("cuda", [1, 2, 4, 6]) if alone else ("cuda" if gpus > 1 else "auto", None))
    assert sorted(set(used)) == list(range(len(shares))), "all GPUs are warmed up"
    assert [used.count(number) for number in set(used)] == [4] * len(shares)
    used.clear()
    meet, run_on = threading.Barrier(instances, timeout=10), model._run_on

    def run_together(opened, inputs):
        meet.wait()
        return run_on(opened, inputs)

    model._run_on = run_together
    images = np.random.default_rng(5).integers(0, 256, (instances, 6, 8, 8, 3)).astype("u1")

    async def ask():
        found = await asyncio.gather(*(model.infer(model.prepare({"images": part})) for part in images))
        await model.close()
        return [answer.outputs["logits"] for answer in found]

    for found, part in zip(asyncio.run(ask()), images, strict=True):
        np.testing.assert_allclose(found, classifier_logits(part), rtol=1e-5, atol=1e-6)
    assert sorted(used.count(number) for number in set(used)) == sorted(shares)
