"""DriftLogger: what it writes is what `drift` measures, once per epoch, also after a resume."""

import csv

import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.training import DriftLogger, drift_figure
from tests.growth.test_grow import noise, small


def grown():
    deep = kr.grow(small(), "act_*", blocks=2, gate="zero_gamma", seed=1)
    deep.compile("sgd", "sparse_categorical_crossentropy", jit_compile=False)
    return deep


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_log_holds_what_drift_measures(tmp_path):
    deep = grown()
    x, y = noise(deep, 8), np.arange(8) % 5
    logger = DriftLogger(x, tmp_path / "drift.csv")
    deep.fit(x, y, epochs=3, verbose=0, callbacks=[logger])
    rows = read(tmp_path / "drift.csv")
    blocks = [b.path for b in kr.find_blocks(deep)]
    assert [(int(r["epoch"]), r["block"]) for r in rows] == [(e, b) for e in range(4) for b in blocks]
    assert all(float(r["mean"]) == 0 for r in rows[:4]) and all(float(r["mean"]) > 0 for r in rows[4:])
    assert [epoch for epoch, _ in logger.history] == [0, 1, 2, 3]
    final = kr.drift(deep, x)
    assert [float(r["mean"]) for r in rows[-4:]] == [d.mean for d in final]
    assert [float(r["gate_value"]) for r in rows[-4:]] == [d.gate_value for d in final]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    deep = grown()
    x, y = noise(deep, 8), np.arange(8) % 5
    logger = DriftLogger(x, tensorboard=tmp_path)
    deep.fit(x, y, epochs=2, verbose=0, callbacks=[logger])
    board = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    board.Reload()
    name = kr.find_blocks(deep)[1].path
    logged = [float(np.frombuffer(e.tensor_proto.tensor_content, "float32")[0]) if e.tensor_proto.tensor_content
              else e.tensor_proto.float_val[0] for e in board.Tensors(f"drift/{name}")]  # fmt: skip
    np.testing.assert_allclose(logged, [report.blocks[1].mean for _, report in logger.history], rtol=1e-6)
    assert f"gate/{name}" in board.Tags()["tensors"]


def test_missing_tensorboard_is_said_at_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'keras-resnet-export\[tensorboard\]'"):
        DriftLogger(None, tensorboard="x")


def test_resumed_run_writes_no_epoch_twice(tmp_path):
    deep = grown()
    x, y = noise(deep, 8), np.arange(8) % 5
    path = tmp_path / "drift.csv"
    deep.fit(x, y, epochs=2, verbose=0, callbacks=[DriftLogger(x, path)])
    first = read(path)
    resumed = DriftLogger(x, path, every=2)
    deep.fit(x, y, initial_epoch=1, epochs=4, verbose=0, callbacks=[resumed])
    assert [epoch for epoch, _ in resumed.history] == [1, 2, 4]
    rows = read(path)
    assert rows[: len(first)] == first and [int(r["epoch"]) for r in rows[:: len(kr.find_blocks(deep))]] == [0, 1, 2, 4]


def test_figure_shows_every_block_and_epoch(tmp_path):
    pytest.importorskip("matplotlib")
    deep = grown()
    x, y = noise(deep, 8), np.arange(8) % 5
    logger = DriftLogger(x, tmp_path / "d.csv")
    deep.fit(x, y, epochs=2, verbose=0, callbacks=[logger])
    figures = [drift_figure(logger), drift_figure(tmp_path / "d.csv", tmp_path / "d.png")]
    images = [np.asarray(figure.axes[0].images[0].get_array()) for figure in figures]
    np.testing.assert_array_equal(images[0], images[1])
    assert images[0].shape == (4, 3) and (images[0][:, 0] == 0).all() and (images[0][:, 1:] > 0).all()
    assert [t.get_text() for t in figures[0].axes[0].get_yticklabels()] == [b.path for b in kr.find_blocks(deep)]
    assert (tmp_path / "d.png").stat().st_size > 1000


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        DriftLogger(None, every=0)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not a drift log"):
        DriftLogger(None, tmp_path / "other.csv")
    with pytest.raises(ValueError, match="nothing was measured"):
        drift_figure(DriftLogger(None))
