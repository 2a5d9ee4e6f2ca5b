"""Batches to verify on: inputs that the model can take, found by asking the Keras model itself."""

from __future__ import annotations

import itertools
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifact import existing_file, first_line
from ..conversion.signature import InputSpec, Signature
from ..conversion.trace import concrete_function
from ..errors import UsageError
from ..runtime import images

if TYPE_CHECKING:
    import keras

    from .reference import Reference, Values

# Sizes for dynamic axes: odd ones find faults of padding; networks that halve and concatenate need multiples; some a minimum.
SIZES = {
    "pixels": ((96, 96), (96, 128), (128, 160), (224, 224), (256, 320), (299, 331), (512, 512)),
    "noise": ((107, 131), (64, 96), (96, 64), (160, 128), (224, 256), (256, 224), (320, 256), (331, 299), (512, 576)),
}
# Sizes that are tried first where every pixel may be a step of a loop or be compared with every other: on a map of 107×131 one
# tensor of such a model has 200 million numbers per image and head.
SMALL_SIZES = {"pixels": ((32, 32), (32, 48)), "noise": ((29, 37), (48, 32))}
# Distribution and scale of float inputs, first what images have; a network that overflows gets smaller ones, one that takes
# logarithms or roots positive ones.
VALUES = {
    "pixels": (("pixels", 255), ("pixels", 1), ("pixels", 0.1), ("pixels", 0.01)),
    "noise": (("normal", 1), ("normal", 0.1), ("normal", 0.01), ("uniform", 1), ("uniform", 255)),
}
BATCHES = {"pixels": 1, "noise": 3}
# Functions of `keras.ops` that multiply all pixels with each other or loop, by the names of their classes; and the number of
# elements above which a tensor (256 MB) is too large for a first attempt.
PIXEL_FUNCTIONS = frozenset(
    "AssociativeScan Dot DotProductAttention Einsum ForiLoop Inner Map Matmul Outer Scan Tensordot Vdot VectorizedMap"
    " WhileLoop".split()
)
LARGEST_TENSOR = 1 << 26
MOST_SAMPLES = 64


@dataclass(frozen=True)
class Case:
    """One batch to compare on: what it is, `{input name: array}`, and what Keras computes for it."""

    data: str
    feeds: dict[str, np.ndarray]
    values: Values


def find_cases(reference: Reference, samples: object = None, seed: int = 0) -> list[Case]:
    """Make a batch of one row (random pixels), one of three rows (normal random numbers, another size), and the samples.

    Where Keras itself fails on a batch, or computes numbers that are not finite, other sizes and smaller values are tried:
    embeddings take indices up to their size, U-Nets sizes that can be halved, detectors inputs that do not overflow `exp`.

    Args:
        reference: The model.
        samples: What `read_samples` takes, or None.
        seed: Seed of the random batches.

    Raises:
        UsageError: Keras fails on everything that was tried, or the samples do not fit.
    """
    rng = np.random.default_rng(seed)
    compares_pixels = _is_dynamic(reference.signature) and _compares_pixels(reference.signature)
    found = [_first_possible(reference, data, rng, compares_pixels) for data in ("pixels", "noise")]
    if samples is not None:
        feeds = read_samples(samples, reference.signature)
        found.append(Case("samples", feeds, reference.values(feeds)))
    return found


def _first_possible(reference: Reference, data: str, rng: np.random.Generator, compares_pixels: bool) -> Case:
    signature, bounds, failure = reference.signature, index_bounds(reference.signature.model), None
    # Sizes that Keras' shape inference accepts; for a layer without one, sizes that run.
    for checked, size, (distribution, scale) in itertools.product(
        (True, False) if _is_dynamic(signature) else (False,), _sizes(signature, data, compares_pixels), VALUES[data]
    ):
        feeds = {}
        for index, spec in enumerate(signature.inputs):
            shape = full_shape(spec.shape, BATCHES[data], size)
            feeds[spec.name] = random_array(rng, spec.dtype, shape, distribution, scale, bounds.get(index))
        if checked and not reference.accepts(feeds):
            continue
        try:
            values = reference.values(feeds)
        except Exception as error:  # whatever the model raises is about this input
            failure = failure or error
            continue
        if values.finite:
            return Case(data, feeds, values)
    reason = "its outputs are not finite" if failure is None else first_line(failure)
    raise UsageError(
        f"model {signature.model.name!r} cannot be verified, because Keras itself fails on every random input that was tried "
        f"({reason}); give real images with `samples` (--samples), or a model with a fixed input size"
    )


def scaled_cases(reference: Reference, case: Case) -> Iterator[Case]:
    """Yield the batch scaled down step by step to zero, because a saturated softmax or sigmoid hides its input."""
    for factor in (0.1, 0.01, 1e-3, 1e-4, 0):
        feeds = {
            name: array if array.dtype.kind in "iub" and factor else (array * factor).astype(array.dtype)
            for name, array in case.feeds.items()
        }
        values = reference.values(feeds)
        if values.finite:
            yield Case(f"{case.data} × {factor:g}", feeds, values)


def _sizes(signature: Signature, data: str, compares_pixels: bool) -> tuple:
    if signature.fit:
        height, width = signature.fit["size"]  # images that the graph makes smaller, and larger
        bigger, smaller = (2 * height + 1, 3 * width - 2), (max(height * 3 // 4, 2), max(width - 3, 2))
        return (bigger if data == "pixels" else smaller,)
    return sizes(data, _is_dynamic(signature), compares_pixels)


def _is_dynamic(signature: Signature) -> bool:
    return any(None in spec.shape[1:] for spec in signature.inputs)


def sizes(data: str, dynamic: bool, compares_pixels: bool) -> tuple[tuple[int, int], ...]:
    """Return the sizes `(height, width)` to try for the dynamic axes of a model, in this order.

    Args:
        data: `"pixels"` or `"noise"`.
        dynamic: Whether there are such axes; if not, one size is enough, as none is used.
        compares_pixels: Whether time and memory grow with the square of the number of pixels.
    """
    return (*(SMALL_SIZES[data] if compares_pixels else ()), *SIZES[data]) if dynamic else SIZES[data][:1]


def _compares_pixels(signature: Signature) -> bool:
    """Whether a model may compare all pixels or loop over them.

    Layers and functions of Keras that can do so are known. Of code of the user's, the largest tensor is found by tracing.
    """
    from keras import layers

    from keras_resnet.graphs import graph_of, is_of_keras, layers_in, nodes

    kinds = (
        layers.RNN,
        layers.MultiHeadAttention,
        layers.GroupQueryAttention,
        layers.Attention,
        layers.AdditiveAttention,
        layers.Dot,
    )
    found = list(layers_in(signature.model))
    graphs = [graph for layer in found if (graph := graph_of(layer)) is not None]
    functions = {type(node.operation).__name__ for graph in graphs for node in nodes(graph)}
    if functions & PIXEL_FUNCTIONS or any(isinstance(layer, kinds) for layer in found):
        return True
    return not all(is_of_keras(layer) for layer in found) and _largest_tensor(signature) > LARGEST_TENSOR


def _largest_tensor(signature: Signature) -> int:
    """The number of elements of the largest tensor in a model's TensorFlow graph, for the first batch of noise."""
    import tensorflow as tf

    batch, size = BATCHES["noise"], SIZES["noise"][0]
    specs = [tf.TensorSpec(full_shape(spec.shape, batch, size), spec.dtype) for spec in signature.inputs]
    try:
        operations = concrete_function(signature, specs)[0].graph.get_operations()
    except UsageError:  # this size is none for the model, or it cannot be traced
        return 0
    return max(output.shape.num_elements() or 0 for operation in operations for output in operation.outputs)


def full_shape(shape: Sequence[object], batch: int, size: tuple[int, int]) -> list[int]:
    """Fill the dynamic axes of a shape: the first is the batch, the next dynamic one the height, further ones the width."""
    edges = iter(size)
    return [known if isinstance(known, int) else batch if axis == 0 else next(edges, size[1]) for axis, known in enumerate(shape)]


def random_array(
    rng: np.random.Generator, dtype: str | np.dtype, shape: list[int], distribution: str, scale: float, bound: int | None
) -> np.ndarray:
    """Return random numbers for an input.

    Args:
        rng: Where the numbers come from.
        dtype: Dtype of the input.
        shape: Shape of the input.
        distribution: `"pixels"` (from 0 to `scale` in 255 steps), `"normal"` or `"uniform"` (above 0); for float inputs.
        scale: Factor on them.
        bound: Exclusive upper bound of the integers for an input of indices, or None.
    """
    dtype = np.dtype(dtype)
    if bound is not None:
        return rng.integers(0, bound, shape).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        return rng.integers(0, max(int(256 * min(scale, 1)), 2), shape).astype(dtype)
    if distribution == "pixels":
        return (rng.integers(0, 256, shape) * (scale / 255)).astype(dtype)
    values = rng.normal(size=shape) if distribution == "normal" else rng.uniform(0.05, 1, shape)
    return (scale * values).astype(dtype)


def index_bounds(model: keras.Model) -> dict[int, int]:
    """Return `{position of an input: size}` of the inputs that an `Embedding` takes its indices from."""
    from keras_resnet.graphs import graph_of

    graph = graph_of(model)
    if graph is None:
        return {}
    bounds = _bounds_of_tensors(graph)
    return {index: bounds[id(tensor)] for index, tensor in enumerate(graph.inputs) if id(tensor) in bounds}


def _bounds_of_tensors(graph: keras.Function) -> dict[int, int]:
    """`{id of a symbolic tensor: bound}` for every tensor of a graph that indices are computed from."""
    import keras

    from keras_resnet.graphs import graph_of, nodes

    bounds: dict[int, int] = {}

    def limit(tensor: object, bound: int) -> None:
        bounds[id(tensor)] = min(bound, bounds.get(id(tensor), bound))

    for node in reversed(nodes(graph)):
        operation = node.operation
        if isinstance(operation, keras.layers.Embedding):
            limit(node.input_tensors[0], operation.input_dim)
        elif isinstance(operation, keras.layers.CategoryEncoding) and operation.num_tokens:
            limit(node.input_tensors[0], operation.num_tokens)
        elif isinstance(operation, keras.Model) and (inner := graph_of(operation)) is not None:
            inside = _bounds_of_tensors(inner)
            for outer, tensor in zip(node.input_tensors, inner.inputs, strict=False):
                if id(tensor) in inside:
                    limit(outer, inside[id(tensor)])
        elif len(node.input_tensors) == 1 and not getattr(operation, "weights", None):
            for output in node.outputs:
                if id(output) in bounds:
                    limit(node.input_tensors[0], bounds[id(output)])
    return bounds


# ---------------------------------------------------------------- samples


def load_samples(source: Any) -> Any:
    """Load an `.npz` or `.npy` file as an array or a dict of arrays; anything else (an array, a dict, a folder) is returned.

    Raises:
        UsageError: There is no such file, no image in the folder, or no array in the file.
    """
    if not isinstance(source, str | os.PathLike):
        return source
    if not Path(source).is_dir():
        return _read_arrays(existing_file(source))
    images.find(source)
    return source


def _read_arrays(path: Path) -> Any:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not hasattr(loaded, "files"):
            return loaded
        arrays = {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} is neither a folder of images nor an .npz or .npy file: {first_line(error)}") from error
    if not arrays:
        raise UsageError(f"{path} holds no arrays")
    return arrays


def read_samples(samples: object, signature: Signature, most: int = MOST_SAMPLES) -> dict[str, np.ndarray]:
    """Return samples for a comparison as `{input name: array}`, in the file's layout and dtype.

    Args:
        samples: Folder of images (at most `most` of them are read, evenly by path, fitted as the model's card says), `.npy` or
            `.npz` file, array, or `{input name: array}`.
        signature: The file's inputs.
        most: Maximum number of images from a folder.

    Raises:
        UsageError: No such folder, no image in it, or an array of another shape than the input.
    """
    samples = load_samples(samples)
    if isinstance(samples, str | os.PathLike):
        samples = _read_folder(samples, signature, most)
    names = [spec.name for spec in signature.inputs]
    if isinstance(samples, Mapping) and not set(names) <= set(samples) and len(names) == len(samples) == 1:
        samples = next(iter(samples.values()))
    if not isinstance(samples, Mapping):
        if len(names) != 1:
            raise UsageError(f"samples must be an array for each of the inputs {', '.join(names)}, as a dict or an .npz file")
        samples = {names[0]: samples}
    if missing := [name for name in names if name not in samples]:
        raise UsageError(f"samples must name the inputs {', '.join(names)}; {missing[0]} is missing")
    return {spec.name: _fitting(np.asarray(samples[spec.name]), spec) for spec in signature.inputs}


def _fitting(array: np.ndarray, spec: InputSpec) -> np.ndarray:
    fits = array.ndim == len(spec.shape) and all(
        want is None or want == have for want, have in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or not len(array):
        raise UsageError(f"samples must have the shape {list(spec.shape)} of `{spec.name}`, got {list(array.shape)}")
    return array.astype(spec.dtype)


def _read_folder(folder: str | os.PathLike[str], signature: Signature, most: int) -> np.ndarray:
    from keras_resnet.modelcard import card

    shape = signature.inputs[0].shape
    if len(signature.inputs) != 1 or len(shape) != 4:
        raise UsageError("a folder of samples needs a model with one image input")
    known = card(signature.model)
    height, width, channels = (*shape[2:], shape[1]) if signature.layout == "nchw" else shape[1:]
    size = (height or SIZES["pixels"][0][0], width or SIZES["pixels"][0][1])
    files = images.find(folder)
    files = files[:: -(-len(files) // most)]
    pixels = np.stack([images.load(file, known.preprocessing if known else {}, size, channels) for file in files])
    return pixels.transpose(0, 3, 1, 2) if signature.layout == "nchw" else pixels
