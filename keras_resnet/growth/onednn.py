"""Networks that crash in oneDNN's backward pass, found before they do.

The gradient of a strided 1 × 1 convolution with respect to its input writes past the end of a buffer in the oneDNN that
TensorFlow 2.21 contains, where the input has fewer than 16 channels and the stride divides its sides: the process dies of signal
6, 7 or 11, at once or later. Measured on a CPU with AVX-512 over 75 convolutions: strides 2 and 3, kernels of 1 to 3, 1 to 72
channels, rank 1 to 3, four dtypes. With `TF_ENABLE_ONEDNN_OPTS=0` all of them work.
"""

import keras

from ..graphs import walk

SAFE_CHANNELS = 16


def is_enabled() -> bool:
    """Return whether TensorFlow computes on the CPU with oneDNN."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    if tf.config.list_logical_devices("GPU"):
        return False
    try:
        from tensorflow.python.util import _pywrap_util_port
    except ImportError:
        return False
    return bool(_pywrap_util_port.IsMklEnabled())


def crashing_convolutions(model: keras.Model) -> list[str]:
    """Return the paths of the convolutions whose backward pass can crash the process in oneDNN.

    Args:
        model: Functional or Sequential model.

    Returns:
        Paths in order of execution; empty where oneDNN is off.
    """
    found = [path for path, _, node in walk(model) if _can_crash(node)]
    return found if found and is_enabled() else []


def check_backward(model: keras.Model) -> None:
    """Refuse a model whose backward pass can crash the process.

    Raises:
        ValueError: The message names the layers and says how to avoid the crash.
    """
    if problem := backward_problem(model):
        raise ValueError(problem)


def backward_problem(model: keras.Model) -> str | None:
    """Return a message about the layers whose backward pass can crash the process, or None."""
    if not (paths := crashing_convolutions(model)):
        return None
    layers = f"layer {paths[0]!r}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    return (
        f"the backward pass of {layers} can crash the process: oneDNN mishandles 1 × 1 convolutions with a stride and fewer than "
        f"{SAFE_CHANNELS} input channels. Set the environment variable TF_ENABLE_ONEDNN_OPTS=0 before TensorFlow is imported"
    )


def _can_crash(node):
    layer = node.operation
    if not isinstance(layer, keras.layers.Conv2D) or isinstance(layer, keras.layers.Conv2DTranspose):
        return False
    shape = tuple(node.input_tensors[0].shape)
    first = layer.data_format == "channels_first"
    channels, sides = (shape[1], shape[2:]) if first else (shape[-1], shape[1:-1])
    fits = all(side is None or side % stride == 0 for side, stride in zip(sides, layer.strides, strict=True))
    return (
        set(layer.kernel_size) == {1}
        and max(layer.strides) > 1
        and fits
        and channels < SAFE_CHANNELS
        and layer.compute_dtype in ("float32", "bfloat16")
    )
