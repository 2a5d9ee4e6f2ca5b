"""A model as NVIDIA's Triton wants it: its configuration, and a repository folder with everything in place."""


def model_config(name, inputs, outputs, *, max_batch_size, max_delay=0.0, instances=1, gpu=False):
    """A Triton `ModelConfig` in its JSON form.

    Args:
        name: model name.
        inputs, outputs: sequences of `protocol.TensorSpec`, batch axis included.
        max_batch_size: rows per batch; 0 for models without a batch axis.
        max_delay: seconds that a request may wait for others.
        instances: copies that run side by side.
        gpu: whether they run on GPUs.

    Returns:
        dict
    """
    config = {
        "name": name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": max_batch_size,
        "input": [_tensor(spec, max_batch_size) for spec in inputs],
        "output": [_tensor(spec, max_batch_size) for spec in outputs],
        "instance_group": [{"count": instances, "kind": "KIND_GPU" if gpu else "KIND_CPU"}],
    }
    if max_batch_size:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": round(max_delay * 1e6)}
    return config


def _tensor(spec, max_batch_size):
    datatype = {"BYTES": "STRING"}.get(spec.datatype, spec.datatype)
    return {"name": spec.name, "data_type": f"TYPE_{datatype}", "dims": list(spec.shape[1:] if max_batch_size else spec.shape)}
