"""What the benchmarks print: `bench` with its figure, and the table of the GPU script on a machine that has every device."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

import resnet_export as rx
from resnet_export.cli import main
from resnet_export.runtime import doctor, providers

ROOT = Path(__file__).resolve().parents[2]


def test_gpu_benchmark_says_in_one_sentence_that_there_is_none():
    if doctor.nvidia_driver():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, ROOT / "scripts/benchmark.py", "gpu"], capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "benchmark gpu" in line]
    assert done.returncode == 4 and done.stdout == "" and len(lines) == 1
    assert "there is no GPU to measure: cuda does not start: lib" in lines[0] and "Traceback" not in done.stderr


def test_gpu_benchmark_prints_its_table(mixed, mixed_export, tmp_path, monkeypatch):
    """Sessions are opened on the CPU and keep what they were asked for."""
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "scripts/benchmarks/gpu.py")
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    real, asked = rx.session, []

    def anywhere(path, device="auto", *, batches=None, cache=None, **settings):
        asked.append((Path(path).name, device, settings))
        providers.provider_options(device, settings)
        if device == "tensorrt" and settings.get("int8"):
            raise rx.DeviceError("tensorrt does not start: libnvinfer.so.10 is missing")
        return real(path, "cpu", batches=batches)

    rx.to_float16(mixed_export[1], tmp_path / "half.onnx")
    files = {"float32": mixed_export[1], "float16": tmp_path / "half.onnx", "int8": mixed_export[1]}
    monkeypatch.setattr(rx, "session", anywhere, raising=False)
    lines = list(gpu.table(files, [1, 4], 3, tmp_path / "engines"))
    assert lines[0].split()[:2] == ["way", "batch"] and len(lines) == 1 + 2 + 2 * (len(gpu.WAYS) - 1) + 1
    assert [device for _, device, _ in asked] == ["cpu", "cpu", *(way[1] for way in gpu.WAYS.values())]
    row = next(line for line in lines if line.startswith("cuda, float16, NHWC, graphs"))
    batch, p50, p99, rate, _, error = (float(cell.replace(",", "")) for cell in row[32:].split())
    assert batch == 1 and 0 < p50 <= p99 and rate == pytest.approx(1000 / p50, rel=0.05, abs=1) and 0 < error < 1e-2
    assert lines[-1].endswith("libnvinfer.so.10 is missing")


@pytest.mark.slow
def test_gpu_benchmark_makes_its_files_without_tensorflow(tmp_path):
    """On a machine whose probe says that CUDA starts; the export runs elsewhere, since the two CUDAs do not share a process."""
    code = (
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "from benchmarks import gpu\n"
        "from resnet_export import doctor\n"
        "doctor.start = lambda device: 'starts'\n"
        f"files = gpu.prepared('resnet20', pathlib.Path({str(tmp_path)!r}))\n"
        "print(sorted(file.name for file in files.values() if file.is_file()), 'tensorflow' in sys.modules)\n"
        "gpu.exported('nosuch', files['float32'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['float16.onnx', 'float32.onnx', 'int8.onnx'] False"
    assert "cannot export nosuch: resnet-export: unknown model 'nosuch'" in done.stderr


def bars(path):
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


def test_bench_draws_a_figure(mixed_export, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, figure = str(mixed_export[1]), tmp_path / "figure.png"
    arguments = ["bench", path, path, "--device", "cpu", "--batch", "1,2", "--threads", "1,2", "--runs", "3"]
    assert main([*arguments, "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 + 8
    with Image.open(figure) as image:
        assert image.size[0] > 600
    assert len(np.unique(bars(figure), axis=0)) > 20
    assert main([*arguments, "--figure", str(tmp_path / "figure.svg")]) == 0
    text = (tmp_path / "figure.svg").read_text()
    assert "latency" in text and "throughput" in text and "mixed.onnx" in text
    assert main([*arguments, "--figure", str(tmp_path / "no" / "figure.png")]) == 2
    assert main([*arguments, "--figure", str(tmp_path / "figure.doc")]) == 2


def test_a_figure_without_matplotlib_is_refused_before_anything_runs(mixed_export, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", str(mixed_export[1]), "--figure", str(tmp_path / "f.png")]) == 4
    assert "matplotlib" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_onnxruntime_is_the_one_that_is_installed():
    assert ort.__version__ in rx.diagnose().versions.values()


def test_the_timed_export_writes_what_an_export_writes(mixed, tmp_path):
    export = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location("benchmark_export", ROOT / "scripts/benchmarks/export.py")
    )
    spec.loader.exec_module(export)
    export._ours(mixed, str(tmp_path / "timed.onnx"))
    rx.to_onnx(mixed, tmp_path / "full.onnx")
    feeds = {"images": np.random.default_rng(0).normal(size=(2, *mixed.inputs[0].shape[1:])).astype("float32")}
    timed, full = (ort.InferenceSession(str(path)).run(None, feeds) for path in tmp_path.glob("*.onnx"))
    assert all(np.array_equal(a, b) for a, b in zip(timed, full, strict=True))
