"""Named weights, downloads from a local server, and variants that other packages declare."""

import hashlib
import http.server
import importlib
import re
import sys
import threading

import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.models import registry
from keras_resnet.weights import sources
from keras_resnet.weights.download import fetch
from keras_resnet.weights.families import akamaster, torchvision
from keras_resnet.weights.formats import safetensors
from keras_resnet.weights.synthetic import state_for
from tests.helpers import grown26, randomise

CONTENT = bytes(range(256)) * 40


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`; `faults` holds what goes wrong with the next requests."""

    files, faults, seen = {}, [], []

    def do_GET(self):
        self.seen.append((self.path, self.headers.get("Range")))
        content = self.files.get(self.path)
        fault = self.faults.pop(0) if self.faults else None
        if content is None or isinstance(fault, int):
            return self.send_error(fault or 404)
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if fault == "no ranges":
            start = 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + (len(content) - start) // 2 if fault == "break" else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.files, Server.faults, Server.seen = {"/w.bin": CONTENT}, [], []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
    thread.join()


def read(path):
    with open(path, "rb") as file:
        return file.read()


DIGESTS = [hashlib.sha256(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()[:8], hashlib.md5(CONTENT).hexdigest(), None]


@pytest.mark.parametrize("digest", DIGESTS, ids=["sha256", "leading digits", "md5", "none"])
def test_a_file_is_fetched_once(server, tmp_path, digest):
    path = fetch(f"{server}/w.bin", digest, tmp_path)
    assert read(path) == CONTENT
    assert fetch(f"{server}/w.bin", digest, tmp_path) == path
    assert len(Server.seen) == 1


def test_a_broken_transfer_is_resumed(server, tmp_path):
    Server.faults[:] = ["break", 503, "break"]
    assert read(fetch(f"{server}/w.bin", DIGESTS[0], tmp_path, pause=0)) == CONTENT
    ranges = [asked for _, asked in Server.seen]
    assert ranges == [None, f"bytes={len(CONTENT) // 2}-", f"bytes={len(CONTENT) // 2}-", f"bytes={len(CONTENT) * 3 // 4}-"]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    Server.faults[:] = ["break", "no ranges"]
    assert read(fetch(f"{server}/w.bin", DIGESTS[0], tmp_path, pause=0)) == CONTENT


def test_a_complete_partial_file_is_taken_over(server, tmp_path):
    path = fetch(f"{server}/w.bin", None, tmp_path)
    (tmp_path / path).rename(f"{path}.part")
    assert fetch(f"{server}/w.bin", DIGESTS[0], tmp_path, pause=0) == path


def test_a_partial_file_of_something_else_is_dropped(server, tmp_path):
    path = fetch(f"{server}/w.bin", None, tmp_path)
    (tmp_path / path).rename(f"{path}.part")
    Server.files["/w.bin"] = CONTENT[:-5]
    assert read(fetch(f"{server}/w.bin", None, tmp_path, pause=0)) == CONTENT[:-5]


def test_a_wrong_digest_leaves_nothing(server, tmp_path):
    with pytest.raises(ValueError, match="published is 00000000; the file was not kept"):
        fetch(f"{server}/w.bin", "00000000", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_not_asked_for_again(server, tmp_path):
    with pytest.raises(ConnectionError, match=r"answers 404 \(Not Found\); the weights may have moved"):
        fetch(f"{server}/none.bin", None, tmp_path, pause=0)
    assert len(Server.seen) == 1


def test_no_network_is_one_sentence_with_the_way_out(tmp_path):
    with pytest.raises(ConnectionError, match="in 4 attempts .* put the file at .*w.bin"):
        fetch("http://127.0.0.1:9/w.bin", None, tmp_path, pause=0)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Installs a package with an entry point; the body of its module is the argument."""

    def install(body, name="acme"):
        folder = tmp_path / name
        information = folder / f"{name}_zoo-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-zoo\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[keras_resnet.models]\nzoo = {name}_zoo:PLUGIN\n")
        (folder / f"{name}_zoo.py").write_text(f"import keras_resnet as kr\n{body}\n")
        monkeypatch.syspath_prepend(str(folder))
        forget()

    yield install
    monkeypatch.undo()
    sys.modules.pop("acme_zoo", None)
    forget()


def forget():
    importlib.invalidate_caches()
    for cached in (registry.catalogue, registry.plugins, registry.weight_sources):
        cached.cache_clear()


ROW = "kr.ResNetConfig.cifar(20, shortcut='pad')"


def test_declared_variants_and_weights_are_like_built_in_ones(plugin, server, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    source = f"kr.WeightSource('acme_net', '{server}/acme.safetensors', num_classes=10, accuracy=12.5, size=32)"
    plugin(f"PLUGIN = kr.Plugin({{'acme_net': {ROW}}}, {{'acme/acme_net.v1': {source}}})")
    assert kr.list_models("acme*") == ["acme_net"] and kr.list_weights("acme/*") == ["acme/acme_net.v1"]
    model = kr.acme_net()
    state = state_for(model, kr.config_from_dict(kr.card(model).config), akamaster.FORMAT, 5)
    safetensors.write(tmp_path / "acme.safetensors", state)
    Server.files["/acme.safetensors"] = read(tmp_path / "acme.safetensors")
    loaded = kr.create_model("acme_net", weights="acme/acme_net.v1")
    np.testing.assert_array_equal(loaded.get_layer("predictions").bias, state["linear.bias"])
    known = kr.card(loaded)
    assert known.weights["accuracy"] == 12.5 and known.preprocessing["size"] == [32, 32]
    assert kr.model_info("acme_net").owner == "acme-zoo"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"PLUGIN = kr.Plugin({{'resnet50': {ROW}}})", "'resnet50' is declared by keras_resnet and by acme-zoo"),
        ("PLUGIN = 3", "must be a keras_resnet.Plugin, got int"),
    ],
)
def test_clashes_and_nonsense_are_refused(plugin, body, message):
    plugin(body)
    with pytest.raises(ValueError, match=message):
        kr.list_models()


def test_duplicate_weights_name_both_owners(plugin):
    name = kr.list_weights()[0]
    plugin(f"PLUGIN = kr.Plugin(sources={{{name!r}: kr.WeightSource('resnet20', 'http://127.0.0.1:9/x')}})")
    with pytest.raises(ValueError, match="are declared by keras_resnet and by acme-zoo"):
        kr.list_weights()


def test_a_broken_plugin_costs_only_itself(plugin):
    plugin("import a_module_that_is_not_there")
    with pytest.warns(UserWarning, match="models of acme-zoo are left out"):
        assert "resnet50" in kr.list_models()


def test_every_source_belongs_to_a_variant_and_has_a_card():
    for name, source in sources.built_in_sources().items():
        _, rest = name.split("/")
        assert source.model in kr.list_models() and rest.startswith(source.model + ".")
        assert source.url.startswith("https://") and source.licence and source.page.startswith("https://")
        assert source.digest is None or re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{32}|[0-9a-f]{64}", source.digest)
        assert source.resize is None or source.resize >= source.size
        kr.Preprocessing.of(source.preprocessing)


def test_unknown_weights_list_what_there_is():
    with pytest.raises(ValueError, match="did you mean 'torchvision/resnet34.IMAGENET1K_V1'.*resnet34 has: "):
        kr.create_model("resnet34", weights="torchvision/resnet34.IMAGENET1K_V3")
    with pytest.raises(ValueError, match="belong to resnet50, got the model 'resnet34'"):
        kr.create_model("resnet34", weights="torchvision/resnet50.IMAGENET1K_V2")


def packaged_file(folder, model, name, **card):
    """Weights as they lie in the package: float16 kernels, and a card that says what they are."""
    known = {"source": f"keras_resnet/{name}", "dataset": "CIFAR-10", "accuracy": 91.5, "licence": "Apache-2.0", **card}
    kr.set_card(model, labels=akamaster.CLASSES, weights=known)
    kr.save_weights(model, folder / f"{name}.safetensors", dtype="float16")
    return known


@pytest.fixture
def package(tmp_path, monkeypatch):
    sources.built_in_sources()  # is read once, from the real folder
    monkeypatch.setattr(sources, "PACKAGED", tmp_path)
    return tmp_path


def test_packaged_weights_come_with_their_card(package):
    model = randomise(kr.create_model("resnet20", preprocessing="cifar10"))
    known = packaged_file(package, model, "resnet20.cifar10", recipe="300 epochs")
    assert kr.list_weights("keras_resnet/*") == ["keras_resnet/resnet20.cifar10"]
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    for name in ("cifar10", "keras_resnet/resnet20.cifar10"):
        again = kr.create_model("resnet20", weights=name)
        card = kr.card(again)
        assert card.weights == known and card.labels == list(akamaster.CLASSES)
        assert card.preprocessing == {"mode": "cifar10", "size": [32, 32], "resize": None, "interpolation": "bilinear"}
        expected = np.asarray(model(x))
        np.testing.assert_allclose(again(x), expected, atol=5e-3 * np.abs(expected).max())
        assert again.get_layer("predictions").kernel.dtype == "float32"
        np.testing.assert_array_equal(again.get_layer("stem_norm").moving_variance, model.get_layer("stem_norm").moving_variance)
    arrays, _ = safetensors.read(package / "resnet20.cifar10.safetensors")
    assert {str(array.dtype) for array in arrays.values()} == {"float16", "float32"}
    with pytest.raises(ValueError, match="'cifar100' of resnet20 are neither a file nor a known name; did you mean 'cifar10'"):
        kr.create_model("resnet20", weights="cifar100")
    with pytest.raises(ValueError, match="weights 'cifar10' of resnet32 are neither a file nor a known name"):
        kr.create_model("resnet32", weights="cifar10")


@pytest.mark.slow
def test_packaged_weights_of_a_grown_model(package):
    """Trained as `grow` made it; loaded by the row that says where its blocks are."""
    trunk = randomise(kr.create_model("vgg16_w16", preprocessing="cifar10"))
    grown = grown26(trunk, seed=1)
    for layer in grown.layers:
        if layer.name.endswith("norm3") and "grow" in layer.name:
            layer.gamma.assign(np.random.default_rng(2).normal(0, 0.5, layer.gamma.shape))
    packaged_file(package, grown, "vgg16_w16_grown26.cifar10")
    again = kr.create_model("vgg16_w16_grown26", weights="cifar10")
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    expected = np.asarray(grown(x))
    assert np.abs(expected - trunk(x)).max() > 0.01 * np.abs(expected).max()
    np.testing.assert_allclose(again(x), expected, atol=5e-3 * np.abs(expected).max())
    assert len(kr.find_blocks(again)) == 13 and kr.card(again).config["growth"]["block"] == "preact"
    kr.save_weights(again, package / "again.safetensors")
    np.testing.assert_array_equal(kr.create_model("vgg16_w16_grown26", weights=package / "again.safetensors")(x), again(x))
    with pytest.raises(ValueError, match="left over: block1_pool_grow1"):
        kr.create_model("vgg16_w16", weights=package / "again.safetensors")
    stage = kr.create_model("vgg16_w16_grown26", weights="cifar10", features_only="stage2")
    assert len(kr.find_blocks(stage)) == 8


def test_float16_that_would_overflow_is_refused(tmp_path):
    model = kr.create_model("resnet20", depths=(1, 1, 1))
    model.get_layer("stem_conv").kernel.assign(np.full((3, 3, 3, 16), 1e5))
    with pytest.raises(ValueError, match='"float16" cannot hold stem_conv/kernel, whose largest number is 1e.05'):
        kr.save_weights(model, tmp_path / "x.safetensors", dtype="float16")
    with pytest.raises(ValueError, match='`dtype` must be None or "float16"'):
        kr.save_weights(model, tmp_path / "x.safetensors", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_a_known_file_of_another_variant_is_refused(plugin, tmp_path):
    model = kr.create_model("resnet50", depths=(1, 1, 1, 1), input_shape=(32, 32, 3))
    state = state_for(model, kr.config_from_dict(kr.card(model).config), torchvision.RESNET, 0)
    safetensors.write(tmp_path / "w.safetensors", state)
    digest = hashlib.sha256(read(tmp_path / "w.safetensors")).hexdigest()
    plugin(f"PLUGIN = kr.Plugin(sources={{'acme/resnet50.v1': kr.WeightSource('resnet50', 'http://127.0.0.1:9/x', {digest!r})}})")
    with pytest.raises(ValueError, match="is acme/resnet50.v1 and belongs to resnet50, got the model 'resnetblur50'"):
        kr.create_model("resnetblur50", weights=tmp_path / "w.safetensors", depths=(1, 1, 1, 1))
