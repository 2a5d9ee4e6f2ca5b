"""`resnet-export family`: members compute what their networks compute, `family.json` says what is true, faults leave nothing."""

import json
import os

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

import keras_resnet as kr
import resnet_export as rx
from resnet_export import elastic
from resnet_export.artifact import digest
from resnet_export.cli import main
from resnet_export.conversion.prepare import prepare
from resnet_export.runtime import benchmark
from tests.growth.test_depth import labelled, zoo

CLASSES = ["ant", "bee", "cow", "dog"]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A network with labels, the path of its file, images, and the classes that it gives them."""
    model = zoo(labels=CLASSES)
    x, y = labelled(model, 48)
    kr.set_card(model, weights={"source": "made up", "accuracy": 99.9})
    folder = tmp_path_factory.mktemp("network")
    model.save(folder / "net.keras")
    np.savez(folder / "data.npz", x=x, y=y)
    return model, folder / "net.keras", x, y


@pytest.fixture(scope="module")
def family(network, tmp_path_factory):
    """`(Family, folder, JSON that the command prints)` of the network, with int8."""
    _, path, _, _ = network
    folder = tmp_path_factory.mktemp("families") / "net"
    command = [
        "family",
        path,
        folder,
        "--budgets",
        "1.0,0.7,0.7",
        "--data",
        path.parent / "data.npz",
        "--int8",
        "--max-drop",
        "60",
    ]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("resnet_export.console.click.echo", lambda text, **_: printed.append(text))
        assert main([*map(str, command), "--threads", "1", "--json"]) == 0
    return rx.read_family(folder / "family.json"), folder, json.loads(printed[-1])


def run_onnx(path, x):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def test_members_are_the_networks_of_the_curve(network, family):
    model, _, x, y = network
    found, folder, printed = family
    assert [member.name for member in found.members] == ["1", "1-int8", "0.7", "0.7-int8"]
    assert printed == {**json.loads((folder / "family.json").read_text()), "folder": str(folder)}
    assert sorted(os.listdir(folder.parent)) == ["net"]
    assert set(os.listdir(folder)) - {"family.png"} == {"family.json", *(member.file for member in found.members)}
    rows = np.random.default_rng(0).permutation(len(x))
    curve = kr.depth_curve(model, (x[rows], y[rows]), budgets=(1.0, 0.7), compare_drift=False)
    whole = run_onnx(folder / found.members[0].file, x)
    for member in found.members:
        got = run_onnx(folder / member.file, x)
        assert digest(folder / member.file) == member.sha256 and (folder / member.file).stat().st_size == member.size
        assert member.agreement == (got.argmax(-1) == whole.argmax(-1)).mean()
        assert member.accuracy == (got.argmax(-1) == y).mean() and member.latency_ms > 0
        point = curve.point(member.budget)
        assert (member.removed, member.share, member.macs) == (point.removed, point.share, point.macs)
        if member.precision == "float32":
            expected = np.asarray(curve.network(point)(x))
            np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    assert found.members[0].removed == () and found.members[0].accuracy == 1.0 and len(found.members[2].removed) > 0
    assert (found.ranked_by, found.images, found.calibration_images) == ("loss", 48, 12)
    assert found.measured["threads"] == 1 and found.measured["batch"] == 1 and found.notes == tuple(found.notes)
    cards = [rx.session(folder / member.file, "cpu").card for member in found.members]
    assert [card["labels"] for card in cards] == [CLASSES] * 4
    assert "accuracy" in cards[0]["weights"] and cards[2]["weights"] == {"source": "made up", "left_out": list(point.removed)}


def test_figure(family):
    pytest.importorskip("matplotlib")
    with Image.open(family[1] / "family.png") as image:
        assert image.size[0] > 500


def test_a_folder_of_classes_gives_the_same_labels(network, tmp_path):
    model, _, x, y = network
    for number, (image, label) in enumerate(zip(x[:12], y[:12], strict=True)):
        (tmp_path / "photos" / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype("uint8")).save(tmp_path / "photos" / CLASSES[label] / f"{number:02}.png")
    signature = prepare(model).signature
    found = elastic.read_data(tmp_path / "photos", signature, CLASSES)
    order = np.lexsort((np.arange(12), [CLASSES[label] for label in y[:12]]))
    np.testing.assert_array_equal(found.labels, y[:12][order])
    np.testing.assert_array_equal(found.inputs["images"], x[:12][order].astype("uint8"))
    (tmp_path / "photos" / "axolotl").mkdir()
    Image.fromarray(x[0].astype("uint8")).save(tmp_path / "photos" / "axolotl" / "0.png")
    with pytest.raises(rx.UsageError, match="axolotl names no class of the model; choose from ant, bee, cow, dog"):
        elastic.read_data(tmp_path / "photos", signature, CLASSES)
    Image.fromarray(x[0].astype("uint8")).save(tmp_path / "photos" / "0.png")
    with pytest.raises(rx.UsageError, match="images next to folders of classes"):
        elastic.read_data(tmp_path / "photos", signature, CLASSES)
    flat = elastic.read_data(tmp_path / "photos" / "axolotl", signature)
    assert flat.labels is None and len(flat) == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda y: y[:5], "one class number per image"),
        (lambda y: y.astype("float32"), "one class number per image"),
        (lambda y: y + 3, r"labels must be from 0 to 3, the classes of the model, got "),
    ],
)
def test_labels_that_do_not_fit(network, labels, message):
    model, _, x, y = network
    with pytest.raises(rx.UsageError, match=message):
        elastic.read_data((x, labels(y)), prepare(model).signature)
    assert (elastic.read_data((x, np.eye(4)[y]), prepare(model).signature).labels == y).all()


@pytest.mark.slow
def test_the_deepest_member_within_a_latency(network, tmp_path, monkeypatch):
    """Timings are given here: 10 ms for the whole network, in proportion to the blocks that are left."""
    model, _, x, y = network

    def timed(files, **options):
        assert options == {"devices": ("cpu",), "batches": (2,), "threads": (1,)}
        blocks = [sum(node.op_type == "Add" for node in rx.artifact.read_proto(file).graph.node) for file in files]
        return [
            benchmark.Timing(str(file), "cpu", 2, 1, 1, 2.0 * count, 0, 0, 0) for file, count in zip(files, blocks, strict=True)
        ]

    monkeypatch.setattr(elastic, "bench", timed)
    found = rx.to_family(model, tmp_path / "a", latency_ms=8.5, batch=2, threads=1, data=(x, y))
    assert [member.name for member in found.members] == ["1", "8.5ms"] and found.members[1].budget is None
    assert found.members[0].latency_ms == 12.0 and 0 < found.members[1].latency_ms <= 8.5
    assert len([file for file in os.listdir(tmp_path / "a") if file.endswith(".onnx")]) == 2
    # A network with one block less would be in time too, but is not the deepest.
    deeper = [p for p in kr.depth_curve(model, (x, y), compare_drift=False) if p.macs > found.members[1].macs]
    assert all(2.0 * (6 - len(point.removed)) > 8.5 for point in deeper)
    with pytest.raises(
        rx.UsageError, match=r"no member meets 1 ms: the smallest, with 0\.\d+ of the multiply-adds, takes 4.00 ms"
    ):
        rx.to_family(model, tmp_path / "b", latency_ms=1.0, batch=2, threads=1, data=(x, y))
    assert sorted(os.listdir(tmp_path)) == ["a"]


@pytest.mark.slow
def test_without_data_the_family_says_so(network, tmp_path, capsys):
    _, path, _, _ = network
    assert main(["family", str(path), str(tmp_path / "a"), "--budgets", "0.8"]) == 0
    out = capsys.readouterr().out
    assert "note: no data: blocks were ranked by their drift on random inputs" in out and "net-" not in out
    found = rx.read_family(tmp_path / "a" / "family.json")
    (member,) = found.members
    assert (found.ranked_by, found.images, member.agreement, member.accuracy) == ("drift", 0, None, None)
    assert found.notes and not (tmp_path / "a" / "family.png").exists()
    # A second family in the same place needs --force, and a failure leaves the first as it was.
    before = (tmp_path / "a" / "family.json").read_bytes()
    assert main(["family", str(path), str(tmp_path / "a"), "--budgets", "0.9"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["family", str(path), str(tmp_path / "a"), "--budgets", "0.1", "--force"]) == 2
    assert (tmp_path / "a" / "family.json").read_bytes() == before and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "0.75,0.1"], "no network meets the budget 0.1: without all 4 blocks that can be left out, 0."),
        (["--budgets", "half"], "numbers separated by commas, got 'half'"),
        (["--budgets", "1.5"], "budgets must be shares of the multiply-adds, above 0 and at most 1, got 1.5"),
        (["--int8"], "int8 needs images to calibrate on; give `data` (--data)"),
        (["--latency-ms", "0"], "--latency-ms"),
        (["--data", "nowhere.npz"], "nowhere.npz does not exist"),
    ],
)
def test_bad_input_is_one_message(network, tmp_path, capsys, arguments, message):
    assert main(["family", str(network[1]), str(tmp_path / "a"), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and os.listdir(tmp_path) == []


def test_a_model_without_blocks_and_a_wrong_member(network, tmp_path, capsys, monkeypatch):
    model, _, x, y = network
    with pytest.raises(rx.UsageError, match="no residual block that can be left out"):
        rx.to_family(kr.create_model("plain20", num_classes=3), tmp_path / "a")

    # A file that fails verification takes the whole family along, and the message names no temporary folder.
    def failing(network, path, **options):
        raise rx.MismatchError(f"{path} does not match the model: planted")

    monkeypatch.setattr(elastic, "to_onnx", failing)
    with pytest.raises(rx.MismatchError) as caught:
        rx.to_family(model, tmp_path / "a", data=(x, y), budgets=(0.8,))
    assert str(caught.value).startswith(str(tmp_path / "a")) and ".tmp" not in str(caught.value)
    assert os.listdir(tmp_path) == []
