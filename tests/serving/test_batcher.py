"""The batcher alone: which rows run together, when, and that every answer goes to the one who asked."""

import asyncio
import threading
import time

import numpy as np
import pytest

from resnet_export.serving.batcher import Batcher, BatchOptions, DeadlineExceeded, QueueFull


class Recorder:
    """A model that doubles its rows, notes what it was given, and can be held in the middle of a run."""

    def __init__(self, held=False):
        self.batches, self.gate = [], threading.Event()
        if not held:
            self.gate.set()

    def __call__(self, inputs):
        self.batches.append({name: array.copy() for name, array in inputs.items()})
        assert self.gate.wait(10)
        return {"y": inputs["x"] * 2}

    @property
    def sizes(self):
        return [len(batch["x"]) for batch in self.batches]


def rows(*values, width=3, dtype="f4"):
    return {"x": np.repeat(np.array(values, dtype)[:, None], width, 1)}


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def options(**changes):
    return BatchOptions(**{"max_rows": 8, "max_delay": 0.02, "queue_rows": 64} | changes)


def test_idle_batcher_sends_at_once():
    async def main():
        model = Recorder()
        batcher = Batcher(model, options(max_delay=60))
        assert (await batcher.submit(rows(1, 2))).outputs["y"].tolist() == [[2] * 3, [4] * 3]
        await batcher.close()

    run(main())


def test_waiting_requests_run_together_and_rows_are_not_mixed_up():
    async def main():
        model, seen = Recorder(held=True), []
        batcher = Batcher(model, options(), seen.append)
        first = asyncio.create_task(batcher.submit(rows(0)))
        await until(lambda: model.batches)
        sizes = [1, 3, 2, 1, 5, 8, 1]
        tasks = [asyncio.create_task(batcher.submit(rows(*range(100 * i, 100 * i + n)))) for i, n in enumerate(sizes, 1)]
        await until(lambda: batcher.waiting == sum(sizes))
        model.gate.set()
        answers = await asyncio.gather(first, *tasks)
        for i, (n, answer) in enumerate(zip(sizes, answers[1:], strict=True), 1):
            assert np.array_equal(answer.outputs["y"], 2 * rows(*range(100 * i, 100 * i + n))["x"])
            assert answer.queued > 0
        assert model.sizes == [1, 7, 5, 8, 1]
        assert [timing.rows for timing in seen] == model.sizes and all(timing.infer > 0 for timing in seen)
        await batcher.close()

    run(main())


def test_full_batch_never_exceeds_the_limit_and_large_requests_are_split():
    async def main():
        model = Recorder()
        batcher = Batcher(model, options(max_rows=4))
        answer = await batcher.submit(rows(*range(11)))
        assert model.sizes == [4, 4, 3] and len(answer.runs) == 3
        assert np.array_equal(answer.outputs["y"], 2 * rows(*range(11))["x"])
        await batcher.close()

    run(main())


def test_shapes_and_dtypes_are_grouped():
    async def main():
        model = Recorder(held=True)
        batcher = Batcher(model, options())
        first = asyncio.create_task(batcher.submit(rows(0)))
        await until(lambda: model.batches)
        requests = [rows(1), rows(2, width=5), rows(3), rows(4, width=5), rows(5, dtype="u1")]
        tasks = [asyncio.create_task(batcher.submit(request)) for request in requests]
        await until(lambda: batcher.waiting == 5)
        model.gate.set()
        answers = await asyncio.gather(first, *tasks)
        assert all(np.array_equal(a.outputs["y"], 2 * r["x"]) for a, r in zip(answers[1:], requests, strict=True))
        assert [batch["x"].shape for batch in model.batches[1:]] == [(2, 3), (2, 5), (1, 3)]
        await batcher.close()

    run(main())


def test_announced_request_is_waited_for_no_longer_than_the_delay():
    async def main():
        model = Recorder()
        batcher = Batcher(model, options(max_delay=0.05))

        async def late(announce):
            with batcher.announced():
                await announce.wait()
            return await batcher.submit(rows(2))

        announce = asyncio.Event()
        task = asyncio.create_task(late(announce))
        await asyncio.sleep(0)
        first = asyncio.create_task(batcher.submit(rows(1)))
        await asyncio.sleep(0)
        assert not model.batches
        announce.set()
        await asyncio.gather(first, task)
        assert model.sizes == [2]

        announce.clear()
        task = asyncio.create_task(late(announce))
        await asyncio.sleep(0)
        await batcher.submit(rows(1))
        assert model.sizes == [2, 1] and not task.done()
        # A full batch is not held back, and neither is anything once the announced request has gone.
        await batcher.submit(rows(*range(8)))
        assert model.sizes == [2, 1, 8]
        waiting = asyncio.create_task(batcher.submit(rows(1)))
        await asyncio.sleep(0)
        task.cancel()
        await waiting
        assert model.sizes == [2, 1, 8, 1] and batcher._coming == 0
        await batcher.close()

    run(main())


def test_clients_that_come_back_keep_their_batch_together():
    async def main():
        model = Recorder(held=True)
        batcher = Batcher(model, options(max_delay=0.2))

        async def client(number):
            for turn in range(5):
                answer = await batcher.submit(rows(10 * number + turn))
                assert answer.outputs["y"].tolist() == [[20 * number + 2 * turn] * 3]

        clients = [asyncio.create_task(client(number)) for number in range(8)]
        await until(lambda: model.batches and batcher.waiting == 7)
        model.gate.set()
        await asyncio.gather(*clients)
        # One that was there first, and from then on all together.
        assert model.sizes == [1, 8, 8, 8, 8, 7]
        await batcher.close()

    run(main())


def test_one_client_alone_never_waits():
    async def main():
        model = Recorder()
        batcher = Batcher(model, options(max_delay=60))
        for turn in range(5):
            await batcher.submit(rows(turn))
        assert model.sizes == [1] * 5
        await batcher.close()

    run(main())


def test_queue_is_bounded_and_recovers():
    async def main():
        model = Recorder(held=True)
        batcher = Batcher(model, options(queue_rows=4))
        first = asyncio.create_task(batcher.submit(rows(0)))
        await until(lambda: model.batches)
        waiting = asyncio.create_task(batcher.submit(rows(1, 2, 3)))
        await until(lambda: batcher.waiting == 3)
        with pytest.raises(QueueFull, match="3 rows wait already; at most 4 may"):
            await batcher.submit(rows(4, 5))
        fits = asyncio.create_task(batcher.submit(rows(4)))
        await until(lambda: batcher.waiting == 4)
        model.gate.set()
        await asyncio.gather(first, waiting, fits)
        assert batcher.waiting == 0
        # With nobody waiting, one large request may exceed the bound: it could never be taken otherwise.
        assert len((await batcher.submit(rows(*range(9)))).outputs["y"]) == 9
        await batcher.close()

    run(main())


@pytest.mark.parametrize("how", ["deadline", "hang-up"])
def test_request_nobody_waits_for_does_not_run(how):
    async def main():
        model = Recorder(held=True)
        batcher = Batcher(model, options())
        first = asyncio.create_task(batcher.submit(rows(0)))
        await until(lambda: model.batches)
        task = asyncio.create_task(batcher.submit(rows(*range(9)), 0.01 if how == "deadline" else None))
        keep = asyncio.create_task(batcher.submit(rows(7)))
        await until(lambda: batcher.waiting in (1, 10))
        if how == "deadline":
            with pytest.raises(DeadlineExceeded, match="no answer within 0.01 s"):
                await task
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert batcher.waiting == 1
        model.gate.set()
        await asyncio.gather(first, keep)
        assert model.sizes == [1, 1]
        await batcher.close()

    run(main())


def test_next_full_batch_begins_without_the_event_loop():
    async def main():
        model = Recorder(held=True)
        batcher = Batcher(model, options())
        first = asyncio.create_task(batcher.submit(rows(0)))
        await until(lambda: model.batches)
        tasks = [asyncio.create_task(batcher.submit(rows(i))) for i in range(1, 11)]
        await until(lambda: batcher.waiting == 10)
        model.gate.set()
        # Standing still, as when a large body is being read.
        end = time.monotonic() + 10
        while len(model.batches) < 2 and time.monotonic() < end:
            time.sleep(0.001)
        assert model.sizes == [1, 8] and batcher.waiting == 10
        answers = await asyncio.gather(first, *tasks)
        assert [answer.outputs["y"][0, 0] for answer in answers] == [2 * i for i in range(11)]
        # One that is not full is made up when its turn comes.
        assert model.sizes == [1, 8, 2] and batcher.waiting == 0
        assert all(answer.queued > 0 for answer in answers[1:])
        await batcher.close()

    run(main())


def test_batch_that_lies_ready_sheds_who_has_gone():
    async def main():
        model, seen = Recorder(held=True), []
        batcher = Batcher(model, options(max_rows=4), seen.append)
        first = asyncio.create_task(batcher.submit(rows(0)))
        await until(lambda: model.batches)
        tasks = [asyncio.create_task(batcher.submit(rows(i))) for i in range(1, 5)]
        await until(lambda: batcher.waiting == 4)
        for gone in (1, 2):
            tasks[gone].cancel()
        await until(lambda: batcher.waiting == 2)
        model.gate.set()
        answers = await asyncio.gather(first, tasks[0], tasks[3])
        assert [answer.outputs["y"][0, 0] for answer in answers] == [0, 2, 8]
        assert model.sizes == [1, 2] and [timing.rows for timing in seen] == [1, 2] and batcher.waiting == 0
        await batcher.close()

    run(main())


def test_failing_run_fails_its_own_requests_only():
    async def main():
        def model(inputs):
            if (inputs["x"] < 0).any():
                raise ValueError("negative")
            return {"y": inputs["x"] * 2}

        seen = []
        batcher = Batcher(model, options(), seen.append)
        with pytest.raises(ValueError, match="negative"):
            await batcher.submit(rows(-1))
        assert (await batcher.submit(rows(1))).outputs["y"].tolist() == [[2] * 3]
        assert [timing.rows for timing in seen] == [1]
        await batcher.close()

    run(main())


@pytest.mark.parametrize("how", ["raises", "loses-rows"])
def test_request_that_cannot_run_fails_alone(how):
    """One bad request (or one too many for the memory) fails the run of a batch; the others are run again without it."""

    async def main():
        gate = threading.Event()

        def model(inputs):
            assert gate.wait(10)
            values = inputs["x"]
            if (values < 0).any():
                if how == "raises":
                    raise ValueError(f"negative: {values[values < 0][0]}")
                return {"y": values[:0]}
            return {"y": values * 2}

        seen = []
        batcher = Batcher(model, options(max_rows=8), seen.append)
        first = asyncio.create_task(batcher.submit(rows(0)))
        values = [1, -2, 3, 4, -5, 6]
        tasks = [asyncio.create_task(batcher.submit(rows(value, value))) for value in values[:3]]
        tasks += [asyncio.create_task(batcher.submit(rows(value))) for value in values[3:]]
        await until(lambda: batcher.waiting == 9)
        gate.set()
        await first
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for value, answer in zip(values, answers, strict=True):
            if value < 0:
                # Each is told about its own value, never about a stranger's.
                assert isinstance(answer, ValueError) and (how != "raises" or str(float(value)) in str(answer))
            else:
                assert answer.outputs["y"].tolist() == [[2 * value] * 3] * (2 if value in (1, 3) else 1)
                assert answer.queued > 0 and len(answer.runs) == 1
        assert sorted(timing.rows for timing in seen) == [1, 1, 1, 2, 2]
        assert (await batcher.submit(rows(7))).outputs["y"][0, 0] == 14
        await batcher.close()

    run(main())


def test_output_without_rows_is_refused_instead_of_cut_wrongly():
    async def main():
        batcher = Batcher(lambda inputs: {"y": np.zeros((1, 2))}, options())
        with pytest.raises(ValueError, match=r"output 'y' has shape \[1, 2\] for 2 rows"):
            await batcher.submit(rows(1, 2))
        await batcher.close()

    run(main())


def test_unbatched_requests_run_alone():
    async def main():
        model = Recorder(held=True)
        batcher = Batcher(model, options(), batched=False)
        tasks = [asyncio.create_task(batcher.submit(rows(i, i))) for i in range(3)]
        await until(lambda: model.batches)
        model.gate.set()
        answers = await asyncio.gather(*tasks)
        assert model.sizes == [2, 2, 2] and [a.outputs["y"][0, 0] for a in answers] == [0, 2, 4]
        await batcher.close()

    run(main())


def test_instances_run_at_the_same_time():
    async def main():
        barrier = threading.Barrier(2, timeout=10)

        def model(inputs):
            barrier.wait()
            return {"y": inputs["x"]}

        batcher = Batcher(model, options(max_rows=1, instances=2))
        await asyncio.gather(*(batcher.submit(rows(i)) for i in range(4)))
        await batcher.close()

    run(main())


def test_close_finishes_what_was_submitted():
    async def main():
        model = Recorder(held=True)
        batcher = Batcher(model, options(max_rows=1))
        tasks = [asyncio.create_task(batcher.submit(rows(i))) for i in range(3)]
        await until(lambda: model.batches)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="closed"):
            await batcher.submit(rows(9))
        model.gate.set()
        answers = await asyncio.gather(*tasks)
        await closing
        assert [a.outputs["y"][0, 0] for a in answers] == [0, 2, 4]

    run(main())


def test_random_load_keeps_every_row():
    async def main():
        model = Recorder()
        batcher = Batcher(model, options(max_rows=5, queue_rows=10_000))
        random = np.random.default_rng(0)
        requests = [random.normal(size=(random.integers(1, 13), random.integers(1, 3))).astype("f4") for _ in range(300)]
        answers = await asyncio.gather(*(batcher.submit({"x": request}) for request in requests))
        assert all(np.array_equal(a.outputs["y"], 2 * r) for a, r in zip(answers, requests, strict=True))
        assert max(model.sizes) == 5 and sum(model.sizes) == sum(map(len, requests))
        await batcher.close()

    run(main())


@pytest.mark.parametrize("changes", [{"max_rows": 0}, {"queue_rows": 0}, {"instances": 0}, {"max_delay": -1}, {"max_delay": 61}])
def test_options_are_checked(changes):
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}` must be"):
        BatchOptions(**changes)
