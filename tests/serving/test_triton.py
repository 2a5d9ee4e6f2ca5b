"""What is written for other servers: Triton's repository (parsed with its own protobuf), KServe's YAML, TensorFlow Serving."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from peers import python_with
from tiny_models import LABELS, classifier

from resnet_export.cli import main
from resnet_export.errors import UsageError
from resnet_export.serving import triton
from resnet_export.serving.repository import find_models, parse_sources

CONFIG = """name: "tiny"
platform: "onnxruntime_onnx"
backend: "onnxruntime"
max_batch_size: 8
input {
  name: "images"
  data_type: TYPE_FP32
  dims: [8, 8, 3]
}
output {
  name: "logits"
  data_type: TYPE_FP32
  dims: [5]
  label_filename: "labels.txt"
}
instance_group {
  count: 2
  kind: KIND_GPU
}
dynamic_batching {
  max_queue_delay_microseconds: 250
}
optimization {
  execution_accelerators {
    gpu_execution_accelerator {
      name: "tensorrt"
      parameters {
        key: "precision_mode"
        value: "FP16"
      }
      parameters {
        key: "trt_engine_cache_enable"
        value: "1"
      }
      parameters {
        key: "trt_engine_cache_path"
        value: "/cache"
      }
    }
  }
}
model_warmup {
  name: "batch_1"
  batch_size: 1
  inputs {
    key: "images"
    value {
      data_type: TYPE_FP32
      dims: [8, 8, 3]
      zero_data: true
    }
  }
}
model_warmup {
  name: "batch_8"
  batch_size: 8
  inputs {
    key: "images"
    value {
      data_type: TYPE_FP32
      dims: [8, 8, 3]
      zero_data: true
    }
  }
}
"""
FULL = triton.TritonOptions(max_batch=8, max_delay=0.00025, instances=2, gpu=True, tensorrt="fp16", engine_cache="/cache")


def test_repository_holds_configuration_labels_and_model(models, tmp_path):
    triton.write_repository(parse_sources([str(models["tiny"])]), tmp_path / "repo", FULL)
    folder = tmp_path / "repo" / "tiny"
    assert (folder / "config.pbtxt").read_text() == CONFIG
    assert (folder / "labels.txt").read_text(encoding="utf-8").splitlines() == LABELS
    assert (folder / "1" / "model.onnx").read_bytes() == models["tiny"].read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    assert [(source.name, source.version) for source in find_models(tmp_path / "repo")] == [("tiny", "1")]


def test_versions_are_written_together_and_added_later(tmp_path):
    files = [classifier(tmp_path / f"{n}.onnx", bias=np.full(5, n)) for n in range(3)]
    repository = tmp_path / "repo"
    triton.write_repository(parse_sources([f"net={file}" for file in files[:2]]), repository)
    with pytest.raises(UsageError, match="exists already"):
        triton.write_repository(parse_sources([f"net={files[2]}"]), repository)
    triton.write_repository(parse_sources([f"net={files[2]}"]), repository, add=True)
    assert [(repository / "net" / str(n + 1) / "model.onnx").read_bytes() for n in range(3)] == [f.read_bytes() for f in files]
    with pytest.raises(UsageError, match="another configuration"):
        triton.write_repository(parse_sources([f"net={files[2]}"]), repository, triton.TritonOptions(max_batch=4), add=True)
    triton.write_repository(parse_sources([f"net={files[2]}"]), repository, overwrite=True)
    assert [path.name for path in sorted((repository / "net").iterdir())] == ["1", "config.pbtxt", "labels.txt"]


def test_external_data_becomes_a_folder(models, tmp_path):
    proto = onnx.load(models["tiny"])
    onnx.save(proto, tmp_path / "big.onnx", save_as_external_data=True, location="big.onnx.data", size_threshold=0)
    triton.write_repository(parse_sources([str(tmp_path / "big.onnx")]), tmp_path / "repo")
    inner = tmp_path / "repo" / "big" / "1" / "model.onnx"
    assert sorted(path.name for path in inner.iterdir()) == ["big.onnx.data", "model.onnx"]
    onnx.checker.check_model(onnx.load(inner / "model.onnx"))
    assert [source.path for source in find_models(tmp_path / "repo")] == [inner / "model.onnx"]


def test_models_without_batch_axis_and_of_open_size(models, tmp_path):
    triton.write_repository(parse_sources([str(models["single"]), str(models["open"]), str(models["echo"])]), tmp_path)
    single, free, echo = ((tmp_path / name / "config.pbtxt").read_text() for name in ("single", "open", "echo"))
    assert "max_batch_size: 0\n" in single and "dims: [1, 8, 8, 3]" in single and "dynamic_batching" not in single
    assert "dims: [-1, -1, 3]" in free and "model_warmup" not in free
    assert "data_type: TYPE_STRING" in echo


@pytest.mark.parametrize(
    "files, options, text",
    [
        (
            ["single"],
            {"max_batch": 8},
            "cannot be batched: the first dimension of all inputs and outputs must be dynamic, got images [1, 8, 8, 3]",
        ),
        (["same=tiny", "same=bytes"], {}, "all versions of 'same' must have the same inputs and outputs; bytes.onnx differs"),
        (["a b=tiny"], {}, "a model's name has letters"),
        (["..=tiny"], {}, "a model's name has letters"),
    ],
)
def test_what_triton_would_refuse_is_refused_and_nothing_is_written(models, tmp_path, files, options, text):
    named = [f"{file.partition('=')[0]}={models[file.partition('=')[2] or file]}" for file in files]
    with pytest.raises(UsageError, match=text.replace("[", r"\[")):
        triton.write_repository(parse_sources(named), tmp_path / "repo", triton.TritonOptions(**options))
    assert not (tmp_path / "repo").exists()


def test_tensorrt_needs_a_gpu():
    with pytest.raises(UsageError, match="ask for --gpu"):
        triton.TritonOptions(tensorrt="fp16")


def test_command_writes_repository_and_yaml(models, tmp_path, capsys):
    yaml = tmp_path / "service.yaml"
    arguments = ["triton", f"My_Net={models['tiny']}", str(tmp_path / "repo"), "--gpu", "--json"]
    assert main([*arguments, "--kserve", str(yaml), "--storage-uri", "s3://bucket/repo"]) == 0
    assert len(json.loads(capsys.readouterr().out)["files"]) == 4
    text = yaml.read_text()
    assert 'name: "my-net"' in text and 'storageUri: "s3://bucket/repo"' in text and "nvidia.com/gpu" in text
    assert main([*arguments, "--kserve", str(yaml)]) == 2
    assert "must be given together" in capsys.readouterr().err


def test_tf_serving_command(tmp_path):
    folder = tmp_path / "my model"
    folder.mkdir()
    with pytest.raises(UsageError, match="holds no SavedModel"):
        triton.tf_serving_command(folder)
    (folder / "saved_model.pb").write_bytes(b"")
    command = triton.tf_serving_command(folder, "net", 9000)
    assert "-p 9000:8501" in command and f"'type=bind,source={folder},target=/models/net/1,readonly'" in command


@pytest.mark.slow
def test_tritons_own_protobuf_reads_the_configuration(models, tmp_path):
    python = python_with("tritonclient", "triton")
    triton.write_repository(parse_sources([str(models["tiny"])]), tmp_path, FULL)
    code = (
        "import sys; from google.protobuf import text_format; from tritonclient.grpc import model_config_pb2 as m\n"
        "c = text_format.Parse(open(sys.argv[1]).read(), m.ModelConfig())\n"
        "assert c.max_batch_size == 8 and list(c.input[0].dims) == [8, 8, 3] and c.input[0].data_type == m.TYPE_FP32\n"
        "assert c.instance_group[0].kind == m.ModelInstanceGroup.KIND_GPU and c.instance_group[0].count == 2\n"
        "assert c.dynamic_batching.max_queue_delay_microseconds == 250 and c.output[0].label_filename == 'labels.txt'\n"
        "trt = c.optimization.execution_accelerators.gpu_execution_accelerator[0]\n"
        "assert trt.name == 'tensorrt' and trt.parameters['precision_mode'] == 'FP16'\n"
        "assert [w.batch_size for w in c.model_warmup] == [1, 8] and c.model_warmup[0].inputs['images'].zero_data\n"
    )
    subprocess.run([python, "-c", code, tmp_path / "tiny" / "config.pbtxt"], check=True, timeout=60)


def test_serving_what_was_written_for_triton_needs_no_tensorflow():
    code = "import sys, resnet_export.serving.triton; print({'keras', 'tensorflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
