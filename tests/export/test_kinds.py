"""The kind of outputs, read by everything that ranks or shows classes: six kinds of model, own and foreign files."""

import csv
import json
import sys
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from PIL import Image

import resnet_export as rx
from resnet_export.cli import main

layers = keras.layers
SIZE, TOP = 12, 3
# Name of the output and its kind, then the head and the labels that are given.
HEADS = {
    "softmax": ("probabilities", "probabilities", lambda x: layers.Dense(3, "softmax")(x), ["ant", "bee", "cat"]),
    "logits": ("output", "logits", lambda x: layers.Dense(3)(x), ["ant", "bee", "cat"]),
    "multilabel": ("probabilities", "multilabel", lambda x: layers.Dense(3, "sigmoid")(x), ["ant", "bee", "cat"]),
    "binary": ("probabilities", "binary", lambda x: layers.Dense(1, "sigmoid")(x), ["no", "yes"]),
    "regression": ("output", "other", lambda x: layers.Dense(2)(x), None),
    "several": ("mean", "other", lambda x: {"mean": layers.Dense(2)(x), "spread": layers.Dense(2)(x)}, None),
}


def expected(kind, y, labels):
    """The classes of one row of the Keras model's output, best first, as `(class, label, probability)`."""
    shares = {"logits": lambda: np.exp(y) / np.exp(y).sum(), "binary": lambda: np.concatenate([1 - y, y])}.get(kind, lambda: y)()
    order = np.argsort(-shares, kind="stable")[:TOP]
    return [(int(index), labels[index], float(shares[index])) for index in order]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def pixels_in(folder):
    return np.stack([np.asarray(Image.open(path), "float32") for path in sorted(folder.iterdir())])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`{name: (exported file, the same without metadata, the Keras model)}`."""
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    for name, (_, _, head, labels) in HEADS.items():
        keras.utils.set_random_seed(len(name))
        inputs = keras.Input((SIZE, SIZE, 3))
        x = layers.Rescaling(1 / 255)(inputs)
        x = layers.Conv2D(6, 3, activation="relu")(x)
        outputs = head(layers.GlobalAveragePooling2D()(x))
        model = keras.Model(inputs, outputs)
        declared = {"labels": labels} if labels else {}
        rx.to_onnx(model, folder / f"{name}.onnx", **declared)
        foreign = onnx.load(folder / f"{name}.onnx")
        del foreign.metadata_props[:]
        onnx.save(foreign, folder / f"{name}-foreign.onnx")
        found[name] = folder / f"{name}.onnx", folder / f"{name}-foreign.onnx", model
    return found


def declaration(name):
    """The options that declare what the output of a file of others means."""
    output, kind, *_ = HEADS[name]
    return ["--scores", output, "--output-kind", kind] if kind != "other" else []


def assert_rows(name, model, photos, rows, labels=True):
    """Rows `{"classes", "labels", "probabilities"}` or `{"values"}` say what the Keras model computes."""
    output, kind, _, names = HEADS[name]
    truth = model(pixels_in(photos), training=False)
    names = names if labels and names else [None] * 3
    for index, row in enumerate(rows):
        if kind == "other":
            values = truth if isinstance(truth, dict) else {output: truth}
            assert row["classes"] == [] and set(row["values"]) == set(values)
            for key, value in values.items():
                np.testing.assert_allclose(row["values"][key], value[index], rtol=1e-4, atol=1e-5)
            continue
        want = expected(kind, np.asarray(truth[index], "float64"), names)
        assert list(row["classes"]) == [entry[0] for entry in want], (name, row, want)
        assert list(row["labels"]) == [entry[1] for entry in want]
        np.testing.assert_allclose(row["probabilities"], [entry[2] for entry in want], rtol=1e-4, atol=1e-5)
    assert index == 2


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("origin", ["ours", "foreign"])
def test_predict_and_batch_prediction(name, origin, files, photos, tmp_path, capsys):
    ours, foreign, model = files[name]
    file, declared = (ours, []) if origin == "ours" else (foreign, declaration(name))
    images = [str(path) for path in sorted(photos.iterdir())]
    for given in (images, [str(photos)]):
        assert main(["predict", str(file), *given, "--top", str(TOP), "--json", *declared]) == 0
        out = capsys.readouterr().out
        rows = json.loads(out) if given is images else [json.loads(line) for line in out.splitlines()]
        assert_rows(name, model, photos, rows, labels=origin == "ours")
    for suffix in (".jsonl", ".csv", ".parquet"):
        target = tmp_path / f"found{suffix}"
        assert main(["predict", str(file), str(photos), "--top", str(TOP), "-o", str(target), *declared]) == 0
        assert_rows(name, model, photos, read_rows(target), labels=origin == "ours")


def read_rows(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".parquet":
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
        return [row | {"values": json.loads(row["values"])} if row.get("values") else row for row in rows]
    found = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            numbers = [key[len("class") :] for key, value in row.items() if key.startswith("class") and value]
            found.append(
                {
                    "classes": [int(row[f"class{number}"]) for number in numbers],
                    "labels": [row[f"label{number}"] or None for number in numbers],
                    "probabilities": [float(row[f"probability{number}"]) for number in numbers],
                }
                | ({"values": json.loads(row["values"])} if "values" in row else {})
            )
    return found


@pytest.mark.parametrize("name", ["regression", "several"])
def test_values_come_with_the_way_to_declare_them(name, files, photos, capsys):
    for given in ([str(photos / "0.png")], [str(photos)]):
        assert main(["predict", str(files[name][0]), *given]) == 0
        captured = capsys.readouterr()
        assert (captured.out + captured.err).count("--scores NAME --output-kind KIND") == 1


def test_two_heads_that_score_classes_are_chosen_between(files, photos, tmp_path, capsys):
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(inputs))
    model = keras.Model(inputs, {"kind": layers.Dense(3, "softmax")(x), "marks": layers.Dense(2, "sigmoid")(x)})
    rx.to_onnx(model, tmp_path / "m.onnx")
    for given in ([str(photos / "0.png")], [str(photos)]):
        assert main(["predict", str(tmp_path / "m.onnx"), *given]) == 2
        assert "name one with --scores NAME" in capsys.readouterr().err
        assert main(["predict", str(tmp_path / "m.onnx"), *given, "--scores", "marks", "--json"]) == 0
        out = capsys.readouterr().out
        row = json.loads(out)[0] if out.startswith("[") else json.loads(out.splitlines()[0])
        marks = model(pixels_in(photos), training=False)["marks"][0]
        np.testing.assert_allclose(sorted(row["probabilities"]), sorted(marks), rtol=1e-4)


def test_served_models(files, photos, tmp_path, capsys):
    """`POST …/classify` and `predict --url`, of exported files and of a file from elsewhere that the server was told about."""
    for module in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(module, reason="needs the extra `serve`")
    httpx = pytest.importorskip("httpx", reason="needs the extra `client`")
    sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
    from running import serving

    given = [f"{name}={ours}" for name, (ours, _, _) in files.items()] + [f"foreign={files['multilabel'][1]}"]
    with serving(*given, "--scores", "probabilities", "--output-kind", "multilabel") as server:
        for name in [*files, "foreign"]:
            head = "multilabel" if name == "foreign" else name
            _, kind, _, _ = HEADS[head]
            model, has_labels = files[head][2], name != "foreign"
            assert main(["predict", "--url", server.url, "--model", name, str(photos), "--top", str(TOP), "--json"]) == 0
            rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            assert_rows(head, model, photos, rows, labels=has_labels)
            card = httpx.get(f"{server.url}/v2/models/{name}/card").json()
            assert card["classifies_images"] == (kind != "other") and kind in card["outputs"].values()
            rows = []
            for path in sorted(photos.iterdir()):
                answer = httpx.post(f"{server.url}/v2/models/{name}/classify?top={TOP}", content=path.read_bytes())
                if kind == "other":
                    assert answer.status_code == 400 and "--output-kind" in answer.json()["error"]
                    continue
                assert answer.json()["output_kind"] == kind
                entries = answer.json()["predictions"]
                columns = {"classes": "class", "labels": "label", "probabilities": "probability"}
                rows.append({key: [entry[column] for entry in entries] for key, column in columns.items()})
            if rows:
                assert_rows(head, model, photos, rows, labels=has_labels)


def test_triton_gets_labels_for_what_scores_classes(files, tmp_path):
    pytest.importorskip("starlette", reason="needs the extra `serve`")
    for name, (ours, _, _) in files.items():
        assert main(["triton", f"{name}={ours}", str(tmp_path / name)]) == 0
        config = (tmp_path / name / name / "config.pbtxt").read_text()
        # One label for one number: a binary classifier has two labels for its single number.
        assert ("label_filename" in config) == (name in ("softmax", "logits", "multilabel")), name


def test_an_output_with_as_many_numbers_as_there_are_labels_is_not_labelled_for_that(tmp_path):
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(inputs))
    model = keras.Model(inputs, {"kind": layers.Dense(3, "softmax")(x), "box": layers.Dense(3)(x)})
    rx.to_onnx(model, tmp_path / "m.onnx", labels=["a", "b", "c"])
    assert main(["triton", str(tmp_path / "m.onnx"), str(tmp_path / "r")]) == 0
    config = (tmp_path / "r" / "m" / "config.pbtxt").read_text()
    assert config.count("label_filename") == 1 and config.index("label_filename") > config.index('"kind"')


def test_a_name_that_no_served_model_has_is_refused_at_the_start(files, capsys):
    pytest.importorskip("starlette", reason="needs the extra `serve`")
    arguments = ["serve", str(files["multilabel"][1]), "--scores", "probabilties", "--output-kind", "multilabel", "--port", "0"]
    assert main([*arguments, "--device", "cpu"]) == 2
    assert "no model has an output 'probabilties'; their outputs are probabilities" in capsys.readouterr().err


def test_a_model_that_ranks_nothing_says_so_without_keeping_requests(files):
    """An error that is raised again and again collects the frames, and with them the images, of all requests."""
    pytest.importorskip("starlette", reason="needs the extra `serve`")
    from resnet_export.serving.models import ModelOptions, ServedModel, Source

    model = ServedModel(Source("m", "1", files["regression"][0]), ModelOptions(device="cpu"))
    for _ in range(2):
        with pytest.raises(Exception, match="--output-kind"):
            model.read_image(b"image")
    assert model.scores.__traceback__ is None


def test_no_kind_follows_from_a_name_over_the_network_either(files, photos, tmp_path, capsys):
    """A foreign output called `logits` is not ranked by `predict FILE`, nor by `predict --url`."""
    pytest.importorskip("starlette", reason="needs the extra `serve`")
    pytest.importorskip("httpx", reason="needs the extra `client`")
    from running import serving

    foreign = onnx.load(files["logits"][1])
    foreign.graph.output[0].name = "logits"
    for node in foreign.graph.node:
        node.output[:] = ["logits" if name == "output" else name for name in node.output]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    rows = []
    with serving(tmp_path / "foreign.onnx") as server:
        for where in ([str(tmp_path / "foreign.onnx")], ["--url", server.url, "--model", "foreign"]):
            assert main(["predict", *where, str(photos), "--json"]) == 0
            rows.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for here, there in zip(*rows, strict=True):
        assert here["classes"] == there["classes"] == []
        np.testing.assert_allclose(here["values"]["logits"], there["values"]["logits"], rtol=1e-5)


def test_samples_are_neither_overwritten_nor_an_internal_error(files, tmp_path, capsys):
    ours, _, model = files["softmax"]
    model.save(tmp_path / "m.keras")
    np.savez(tmp_path / "s.npz", np.zeros((4, SIZE, SIZE, 3), "float32"))
    content = (tmp_path / "s.npz").read_bytes()
    arguments = ["verify", str(ours), str(tmp_path / "m.keras"), "--samples", str(tmp_path / "s.npz")]
    assert main([*arguments, "--report", str(tmp_path / "s.npz")]) == 2
    assert (tmp_path / "s.npz").read_bytes() == content
    (tmp_path / "s.npz").write_bytes(content[:300])
    assert main(arguments) == 2
    assert "neither a folder of images nor an .npz or .npy file" in capsys.readouterr().err
