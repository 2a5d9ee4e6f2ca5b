"""Sessions, provider options, libraries and the doctor, all without a GPU."""

import concurrent.futures
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

import resnet_export as rx
from resnet_export.cli import main
from resnet_export.runtime import doctor, libraries, providers
from resnet_export.runtime import sessions as runtime
from resnet_export.runtime.sessions import TensorInfo

from .conftest import noise, run_onnx


def test_session_tells_what_it_runs(mixed_export):
    opened = rx.session(mixed_export[1], "cpu", threads=1)
    assert opened.device == "cpu" and opened.note == "cpu, as asked for"
    assert opened.inputs == (TensorInfo("images", ("batch", 32, 32, 3), "float32"),)
    assert opened.labels[6] == "class 6" and opened.card["name"] == "mixed"
    x = noise(2)
    got = opened.run(x.astype("float64"), ["probabilities"])
    np.testing.assert_array_equal(got["probabilities"], opened.run({"images": x})["probabilities"])


WRONG = {
    "shape": (lambda s: s.run(noise(2, 32, 32, 4)), r"must have shape \[batch, 32, 32, 3\], got \[2, 32, 32, 4\]"),
    "dtype": (lambda s: s.run(np.full((2, 32, 32, 3), "a")), "must be float32"),
    "name": (lambda s: s.run({"pictures": noise(2)}), "inputs must be images, got pictures"),
    "output": (lambda s: s.run(noise(2), ["scores"]), "has no output 'scores'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_session_refuses_what_does_not_fit(mixed_export, case):
    call, message = WRONG[case]
    with pytest.raises(rx.UsageError, match=message):
        call(rx.session(mixed_export[1]))


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_missing_device_is_an_error_that_names_the_library(mixed_export, device, capfd):
    if doctor.nvidia_driver():
        pytest.skip("there is a GPU")
    with pytest.raises(rx.DeviceError, match=rf"{device} does not start: lib\S+ is missing") as caught:
        rx.session(mixed_export[1], device)
    assert caught.value.exit_code == 4
    assert capfd.readouterr().out == ""


def test_auto_says_what_it_took(mixed_export):
    opened = rx.session(mixed_export[1])
    if opened.device == "cpu":
        assert opened.note.startswith("cpu: ")


def test_auto_says_on_the_command_line_what_it_took(mixed_export, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "choice", lambda: ("cpu", "cpu: there is no GPU"))
    assert main(["bench", str(mixed_export[1]), "--runs", "1"]) == 0
    assert capsys.readouterr().err == "note: cpu: there is no GPU\n"
    assert main(["bench", str(mixed_export[1]), "--runs", "1", "--device", "cpu"]) == 0
    assert capsys.readouterr().err == ""


def test_auto_with_a_gpu_but_no_library(mixed_export, monkeypatch):
    monkeypatch.setattr(runtime, "_has_hardware", lambda provider: True)
    monkeypatch.setattr(runtime, "missing", lambda device: ["libcublasLt.so.13"])
    assert rx.session(mixed_export[1]).note == "cpu: there is a GPU, but libcublasLt.so.13 is missing"


def test_foreign_pad_is_not_fused_wrongly(tmp_path):
    """onnxruntime's defaults give wrong numbers for this file; our sessions do not."""
    nodes = [helper.make_node("Pad", ["x", "p"], ["a"]), helper.make_node("MaxPool", ["a"], ["y"], kernel_shape=[3, 3])]
    values = [helper.make_tensor_value_info("x", 1, ["n", 2, 6, 6]), helper.make_tensor_value_info("y", 1, None)]
    pads = onnx.numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "p")
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], [pads]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, tmp_path / "m.onnx")
    x = -1 - abs(noise(1, 2, 6, 6))
    right = run_onnx(tmp_path / "m.onnx", x, optimise=False)[0]
    np.testing.assert_array_equal(rx.session(tmp_path / "m.onnx").run(x)["y"], right)
    assert right.max() == 0


OPTIONS = {
    "cuda": (
        {"device_id": 1, "conv_search": "heuristic", "tf32": False, "nhwc": True, "graphs": True, "memory_limit": 2**30},
        {
            "device_id": "1",
            "cudnn_conv_algo_search": "HEURISTIC",
            "use_tf32": "0",
            "prefer_nhwc": "1",
            "enable_cuda_graph": "1",
            "gpu_mem_limit": "1073741824",
        },
    ),
    "tensorrt": (
        {"device_id": 0, "fp16": True, "int8": False, "graphs": True, "workspace": 4096},
        {
            "device_id": "0",
            "trt_fp16_enable": "1",
            "trt_int8_enable": "0",
            "trt_cuda_graph_enable": "1",
            "trt_max_workspace_size": "4096",
        },
    ),
    "openvino": (
        {"hardware": "gpu", "precision": "f32", "threads": 2},
        {"device_type": "GPU", "precision": "FP32", "num_of_threads": "2"},
    ),
    "cpu": ({}, {}),
}


@pytest.mark.parametrize("device", OPTIONS)
def test_provider_options(device):
    settings, expected = OPTIONS[device]
    assert providers.provider_options(device, settings) == expected


@pytest.mark.parametrize(
    ("device", "settings", "message"),
    [
        ("cuda", {"fp16": True}, "cuda has no setting 'fp16'; it has device_id"),
        ("cpu", {"tf32": True}, "cpu has no setting 'tf32'; it has none"),
        ("cuda", {"tf32": 1}, "`tf32` must be True or False, got 1"),
        ("cuda", {"conv_search": "fast"}, "must be one of exhaustive"),
        ("cuda", {"device_id": -1}, "at least 0, got -1"),
    ],
)
def test_provider_options_refuse(device, settings, message):
    with pytest.raises(rx.UsageError, match=message):
        providers.provider_options(device, settings)


def test_every_option_name_is_in_the_provider_library():
    for device, settings in providers.SETTINGS.items():
        path = libraries.provider_file(device)
        if path is None:
            continue
        content = path.read_bytes()
        assert all(option.encode() in content for option, _ in settings.values())


def test_shape_profiles():
    inputs = (TensorInfo("images", ("batch", 224, 224, 3), "float32"),)
    assert providers.shape_profiles(inputs, (1, 8, 32)) == {
        "trt_profile_min_shapes": "images:1x224x224x3",
        "trt_profile_opt_shapes": "images:8x224x224x3",
        "trt_profile_max_shapes": "images:32x224x224x3",
    }
    assert set(providers.shape_profiles(inputs, (4,)).values()) == {"images:4x224x224x3"}
    with pytest.raises(rx.UsageError, match="dynamic size"):
        providers.shape_profiles((TensorInfo("images", ("batch", "height", 224, 3), "float32"),), (1, 2, 3))


def test_engine_cache_has_a_folder_of_its_own_for_each_combination():
    def place(model, version, gpu, fp16, versions=("trt", "ort")):
        found = providers.cache_options("/c", model, dict.fromkeys(versions, version), gpu, {"trt_fp16_enable": fp16})
        assert found["trt_engine_cache_enable"] == found["trt_timing_cache_enable"] == "1"
        assert found["trt_engine_cache_path"] == found["trt_timing_cache_path"]
        return found["trt_engine_cache_path"]

    places = {place(*key) for key in itertools.product("ab", ("10.1", "10.2"), "xy", "01")}
    assert len(places) == 16 and all(found.startswith("/c/") for found in places)
    assert place("a", "1", "x", "0") == place("a", "1", "x", "0", versions=("ort", "trt"))


class Recorded:
    """Stands for `onnxruntime.InferenceSession` where every device is there: runs on the CPU and keeps what it was told."""

    made = []

    def __init__(self, path, options, providers):
        self.providers, self.options, self.runs = providers, options, []
        self._real = REAL_SESSION(path, providers=["CPUExecutionProvider"])
        Recorded.made.append(self)

    def __getattr__(self, name):
        return getattr(self._real, name)

    def get_providers(self):
        return [name for name, _ in self.providers] if isinstance(self.providers[0], tuple) else self.providers

    def run_with_iobinding(self, binding, options):
        self.runs.append(options.get_run_config_entry("gpu_graph_id"))
        self._real.run_with_iobinding(binding, options)


REAL_SESSION = ort.InferenceSession


class OnGpu:
    """Stands for `OrtValue`: a buffer on a GPU, which here lies in the machine's own memory."""

    places = []

    @staticmethod
    def ortvalue_from_shape_and_type(shape, dtype, memory, device_id):
        OnGpu.places.append((tuple(shape), memory, device_id))
        return REAL_VALUE.ortvalue_from_shape_and_type(shape, dtype, "cpu", 0)


REAL_VALUE = ort.OrtValue


@pytest.fixture
def any_device(monkeypatch):
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(OnGpu, "places", [])
    monkeypatch.setattr(ort, "InferenceSession", Recorded)
    monkeypatch.setattr(ort, "OrtValue", OnGpu)
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(providers.PROVIDERS.values()))
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)


def test_cuda_session_is_told_everything(mixed_export, any_device):
    rx.session(mixed_export[1], "cuda", conv_search="heuristic", tf32=False, nhwc=True, device_id=1)
    (made,) = Recorded.made
    options = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", "prefer_nhwc": "1", "device_id": "1"}
    assert made.providers == [("CUDAExecutionProvider", options)]
    assert made.options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert made.options.get_session_config_entry("optimization.disable_specified_optimizers") == "Pad_Fusion"


def test_the_cpu_may_fall_back_to_itself(mixed_export, any_device):
    rx.session(mixed_export[1], "cpu")
    with pytest.raises(Exception, match="disable_cpu_ep_fallback"):
        Recorded.made[0].options.get_session_config_entry("session.disable_cpu_ep_fallback")


def test_cuda_graphs_are_captured_per_batch_size_from_fixed_buffers(mixed_export, any_device):
    opened = rx.session(mixed_export[1], "cuda", batches=[4, 1, 8], graphs=True, device_id=1)
    made = Recorded.made[-1]
    assert made.providers == [("CUDAExecutionProvider", {"device_id": "1", "enable_cuda_graph": "1"})]
    x = noise(11)
    for rows in (3, 1, 4, 11, 2):
        np.testing.assert_allclose(opened.run(x[:rows])["logits"], run_onnx(mixed_export[1], x[:rows])[0], rtol=1e-4, atol=1e-5)
    assert made.runs == ["4", "1", "4", "8", "4", "4"], "eleven rows are eight and three"
    shapes = [place for place in OnGpu.places if len(place[0]) == 4]
    assert sorted(shapes) == [((size, 32, 32, 3), "cuda", 1) for size in (1, 4, 8)], "one set of buffers per size"


def test_graphs_need_batches(mixed_export, any_device):
    with pytest.raises(rx.UsageError, match="`graphs` needs `batches`"):
        rx.session(mixed_export[1], "cuda", graphs=True)


def test_tensorrt_session_is_told_everything(mixed_export, any_device, tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "nvidia_driver", lambda: "590.1")
    monkeypatch.setattr(libraries, "tensorrt_version", lambda: 101303)
    settings = {"fp16": True, "int8": True, "batches": [1, 8, 32], "cache": tmp_path / "engines", "device_id": 2}
    rx.session(mixed_export[1], "tensorrt", **settings)
    made = Recorded.made[-1]
    assert made.get_providers() == ["TensorrtExecutionProvider", "CUDAExecutionProvider"], "never the CPU"
    assert made.options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    (_, options), (_, cuda) = made.providers
    assert cuda == {"device_id": "2"} and options["trt_fp16_enable"] == options["trt_int8_enable"] == "1"
    assert options["trt_profile_opt_shapes"] == "images:8x32x32x3" and options["device_id"] == "2"
    assert os.path.isdir(options["trt_engine_cache_path"]) and options["trt_timing_cache_enable"] == "1"
    places = {options["trt_engine_cache_path"]}
    monkeypatch.setattr(libraries, "tensorrt_version", lambda: 101600)
    rx.session(mixed_export[1], "tensorrt", **settings)
    places.add(Recorded.made[-1].providers[0][1]["trt_engine_cache_path"])
    monkeypatch.setattr(libraries, "nvidia_driver", lambda: "600.1")
    rx.session(mixed_export[1], "tensorrt", **settings)
    places.add(Recorded.made[-1].providers[0][1]["trt_engine_cache_path"])
    rx.session(mixed_export[1], "tensorrt", **settings | {"fp16": False})
    places.add(Recorded.made[-1].providers[0][1]["trt_engine_cache_path"])
    assert len(places) == 4
    (tmp_path / "file").write_text("")
    with pytest.raises(rx.UsageError, match="cannot make the folder"):
        rx.session(mixed_export[1], "tensorrt", cache=tmp_path / "file")


def test_openvino_session_is_told_everything(mixed_export, any_device):
    rx.session(mixed_export[1], "openvino", threads=3, hardware="cpu", precision="f32")
    options = {"device_type": "CPU", "precision": "FP32", "num_of_threads": "3"}
    assert Recorded.made[-1].providers == [("OpenVINOExecutionProvider", options)]
    assert Recorded.made[-1].options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


@pytest.mark.skipif("OpenVINOExecutionProvider" not in ort.get_available_providers(), reason="onnxruntime-openvino only")
def test_openvino_gives_the_same_numbers(mixed_export):
    opened = rx.session(mixed_export[1], "openvino", threads=1, precision="f32")
    assert opened.device == "openvino"
    np.testing.assert_allclose(opened.run(noise(3))["logits"], run_onnx(mixed_export[1], noise(3))[0], rtol=1e-4, atol=1e-5)


def test_buckets_on_the_cpu(mixed_export):
    """Really run: rows are filled up, split and cut again, and what a call returned stays as it was."""
    opened = rx.session(mixed_export[1], "cpu", batches=(2, 5))
    plain = rx.session(mixed_export[1], "cpu")
    x = noise(13, seed=3)
    kept = []
    for rows in (1, 2, 3, 5, 13, 7, 1):
        got = opened.run(x[:rows], ["probabilities", "logits"])
        assert list(got) == ["probabilities", "logits"]
        np.testing.assert_allclose(got["logits"], plain.run(x[:rows])["logits"], rtol=1e-5, atol=1e-6)
        kept.append((rows, got["logits"], got["logits"].copy()))
    assert all(np.array_equal(now, then) and len(now) == rows for rows, now, then in kept)
    # The rows that fill up a batch are zeros, whatever ran before.
    np.testing.assert_array_equal(opened.run(x[:1])["logits"], rx.session(mixed_export[1], batches=(2,)).run(x[:1])["logits"])


def test_buckets_serve_many_callers_at_once(mixed_export):
    opened, plain = rx.session(mixed_export[1], "cpu", batches=(1, 4)), rx.session(mixed_export[1], "cpu")
    batches = [noise(1 + index % 5, seed=index) for index in range(24)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: opened.run(batch)["logits"], batches))
    for got, batch in zip(found, batches, strict=True):
        np.testing.assert_allclose(got, plain.run(batch)["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[], [0, 2], [1.5], [True]])
def test_buckets_refuse_sizes(mixed_export, sizes):
    with pytest.raises(rx.UsageError, match="`batches` must be batch sizes"):
        rx.session(mixed_export[1], "cpu", batches=sizes)


def test_buckets_refuse_open_sizes_and_empty_batches(mixed_export, open_export):
    with pytest.raises(rx.UsageError, match="fixed other sizes, `images` has"):
        rx.session(open_export[1], "cpu", batches=(1,))
    with pytest.raises(rx.UsageError, match="at least one"):
        rx.session(mixed_export[1], "cpu", batches=(1,)).run(noise(0))


def test_settings_of_another_device_are_refused(mixed_export):
    with pytest.raises(rx.UsageError, match="needs tensorrt"):
        rx.session(mixed_export[1], "cpu", cache="/c")
    with pytest.raises(rx.UsageError, match="cpu has no setting"):
        rx.session(mixed_export[1], "cpu", tf32=True)


@pytest.mark.skipif(sys.platform != "linux", reason="ELF is Linux's format")
def test_needed_libraries_are_read_from_the_file():
    path = libraries.provider_file("cuda")
    if path is None:
        pytest.skip("this onnxruntime has no CUDA provider")
    names = libraries.needed(path)
    assert any(name.startswith("libcudart.so") for name in names) and "libc.so.6" in names
    with pytest.raises(rx.UsageError, match="not a 64-bit"):
        libraries.needed(__file__)


CLASHES = {
    "two runtimes": (
        {"onnxruntime": "1.31", "onnxruntime-gpu": "1.31.1"},
        "overwrite each other",
        "pip uninstall -y onnxruntime",
    ),
    "none": ({}, "no onnxruntime", "pip install onnxruntime-gpu"),
    "same import name": ({"onnxruntime": "1", "keras-resnet": "0.2"}, "owns the import name", "uninstall -y keras-resnet "),
    "two CUDA sets": (
        {"onnxruntime-gpu": "1.31.1", "nvidia-cudnn-cu12": "9", "nvidia-cudnn-cu13": "9"},
        "write the same files",
        "train-gpu",
    ),
    "1.27": ({"onnxruntime-gpu": "1.27.0"}, "1.27", ">=1.28"),
}


@pytest.mark.parametrize("case", CLASHES)
def test_doctor_finds_clashes(case):
    found, problem, fix = CLASHES[case]
    (finding,) = doctor.clashes(found)
    assert problem in finding.problem and fix in finding.fix


def test_doctor_says_what_starts(capsys):
    assert doctor.clashes({"onnxruntime-gpu": "1.31.1"}) == []
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"]["cpu"] == "starts" and ort.__version__ in found["versions"].values()
    if found["driver"] is None and found["missing"]:
        assert "does not start" in found["devices"]["cuda"] and found["findings"]


def test_library_finding_names_the_fix():
    assert "gpu]" in doctor.library_finding("cuda", ["libcudart.so.13"], "590.1").fix
    assert "tensorrt-cu13" in doctor.library_finding("tensorrt", ["libcublas.so.13", "libnvinfer.so.10"], "590.1").fix
    assert "driver" in doctor.library_finding("cuda", ["libcuda.so.1"], None).problem


def test_bench_runs_every_combination(mixed_export):
    found = rx.bench([mixed_export[1], mixed_export[1]], devices=["cpu"], batches=[1, 4], threads=[1, 2], runs=5)
    assert [(timing.threads, timing.batch) for timing in found] == [(1, 1)] * 2 + [(1, 4)] * 2 + [(2, 1)] * 2 + [(2, 4)] * 2
    assert all(0 < timing.p50 <= timing.p90 <= timing.p99 and timing.runs == 5 for timing in found)
    assert all(timing.throughput == pytest.approx(1000 * timing.batch / timing.p50) for timing in found)


@pytest.mark.parametrize(
    ("options", "message"), [({"batches": [0]}, "`batches`"), ({"runs": 0}, "`runs`"), ({"threads": [-1]}, "`threads`")]
)
def test_bench_refuses(mixed_export, options, message):
    with pytest.raises(rx.UsageError, match=message):
        rx.bench([mixed_export[1]], **options)


def test_bench_command(mixed_export, tmp_path, capsys):
    path = str(mixed_export[1])
    assert main(["bench", path, "--batch", "1,2", "--runs", "3", "--csv", str(tmp_path / "t.csv")]) == 0
    assert "p99" in capsys.readouterr().out
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0].startswith("file,device,batch") and len(lines) == 3
    assert main(["bench", path, "--batch", "none"]) == 2


def test_the_package_of_the_same_import_name_is_announced(tmp_path):
    """A made-up distribution on the path stands for PyPI's `keras-resnet`."""
    folder = tmp_path / "keras_resnet-0.2.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: keras-resnet\nVersion: 0.2.0\n")
    script = "import resnet_export, sys; assert 'tensorflow' not in sys.modules"
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        for path in (os.environ.get("PYTHONPATH", ""), os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    ]
    assert all(run.returncode == 0 for run in runs), runs
    assert "keras-resnet" not in runs[0].stderr
    assert "keras-resnet 0.2.0 owns the import name keras_resnet too; to fix it: pip uninstall -y keras-resnet" in runs[1].stderr
