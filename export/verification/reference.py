"""What Keras computes: the one thing that every file is compared with."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..conversion.rebuild import copied, in_float64
from ..conversion.signature import OutputSpec, Signature, call_in_inference
from ..errors import UsageError
from .metrics import UNIT_ROUNDOFF, input_off_by_rounding, largest_difference, off_by_rounding

if TYPE_CHECKING:
    import keras

PERTURBATIONS = 3
# How far a runtime's approximation of a sigmoid may be off, absolutely.
APPROXIMATION = 2 * UNIT_ROUNDOFF["float32"]
# Below this a probability has lost digits to underflow; above 1 - this a sigmoid has.
SATURATED_LOW, SATURATED_HIGH = 1e-30, 0.01


@dataclass(frozen=True)
class Values:
    """What a Keras model computes for one batch: its own outputs, and the inner tensors that the file also returns."""

    own: list[np.ndarray]
    inner: list[np.ndarray]

    @property
    def finite(self) -> bool:
        """Whether all numbers are."""
        return all(np.isfinite(array).all() for array in (*self.own, *self.inner) if array.dtype.kind == "f")


class Reference:
    """A Keras model as the reference: called eagerly, in inference mode, as it is; its state is put back after each call.

    Args:
        signature: Inputs and outputs of the file; its model is the reference.
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    def values(self, feeds: dict[str, np.ndarray], but: Iterable[keras.Variable] = ()) -> Values:
        """Return what the model computes for `{input name: array}`, arrays in the file's layout and dtype.

        Args:
            feeds: The batch.
            but: Variables that are not put back to what they were before the call.
        """
        return _values(self.signature, feeds, but)

    def accepts(self, feeds: dict[str, np.ndarray]) -> bool:
        """Return whether Keras' own shape inference accepts the sizes of a batch.

        TensorFlow computes something even for an image of which a convolution leaves nothing; another runtime refuses it.
        """
        import keras

        tensors = [
            keras.KerasTensor(self.signature.model_shape(feeds[spec.name].shape), dtype=tensor.dtype)
            for spec, tensor in zip(self.signature.inputs, self.signature.model.inputs, strict=True)
        ]
        try:
            call_in_inference(self.signature.model, tensors)
        except Exception:  # whatever the model raises is about these shapes
            return False
        return True

    @functools.cached_property
    def _exact(self) -> tuple[Signature, ActivationNoise] | None:
        """The same signature on a float64 copy of the model, or None if the model cannot be rebuilt from its config."""
        return self._on_copy(in_float64)

    @functools.cached_property
    def _single(self) -> tuple[Signature, ActivationNoise] | None:
        """The same signature on a float32 copy, for models that a layer keeps from computing in float64."""
        return self._on_copy(copied)

    def _on_copy(self, make: Callable[[keras.Model], keras.Model]) -> tuple[Signature, ActivationNoise] | None:
        try:
            copy = make(self.signature.model)
            return self.signature.of(copy), ActivationNoise(copy)
        except UsageError:
            return None

    def _exact_values(self, feeds: dict[str, np.ndarray]) -> Values | None:
        """What the float64 copy computes; None without one, or where TensorFlow or a layer has no float64 form."""
        try:
            return _values(self._exact[0], feeds) if self._exact else None
        except Exception:  # whatever a layer raises is about its dtype: in float32 the batch is known to work
            return None

    def rounding(self, feeds: dict[str, np.ndarray], values: Values) -> Rounding:
        """Measure how much float32 rounds every output of the model on one batch. No file is involved.

        Keras in float32 is compared with Keras in float64, once with the weights and inputs as they are, and once with weights
        and inputs that are changed by a unit roundoff of float32. In the second case, functions such as the sigmoid are changed
        by as much as runtimes approximate them. A model that cannot compute in float64 is changed in float32, and of one that
        cannot be rebuilt, only the inputs are.

        Args:
            feeds: The batch.
            values: What the model computes for it in float32.
        """
        rng = np.random.default_rng(1)
        exact = self._exact_values(feeds)
        with contextlib.closing(self._perturbed(feeds, rng, exact is not None)) as changed:
            pairs = list(itertools.islice(changed, PERTURBATIONS))
        alike, approximated = [values for values, _ in pairs], [values for _, values in pairs]
        return Rounding(exact or values, [values, *alike], approximated)

    def reachable(self, feeds: dict[str, np.ndarray], times: float) -> Generator[Values, None, None]:
        """Yield what the model computes if float32 rounds `times` as much as it does; each time another result, without end."""
        rng = np.random.default_rng(2)
        with contextlib.closing(self._perturbed(feeds, rng, self._exact_values(feeds) is not None, times)) as changed:
            for pair in changed:
                yield from pair

    def _perturbed(
        self, feeds: dict[str, np.ndarray], rng: np.random.Generator, exact: bool, times: float = 1
    ) -> Generator[tuple[Values, Values], None, None]:
        """Yield results with weights and inputs that are off by rounding, without and with approximated functions; without end.

        Args:
            feeds: The batch.
            rng: Source of the changes.
            exact: Whether the float64 copy computes.
            times: How many times as large the changes are as the rounding of float32.
        """
        copy = self._exact if exact else self._single
        if copy is None:
            while True:
                values = _values(self.signature, _off_by_roundoff(rng, feeds, times))
                yield values, values
        signature, noise = copy
        with weights_kept(signature.model) as weights:
            while True:
                for variable, value in weights:
                    variable.assign(off_by_rounding(rng, value, times=times))
                off = _off_by_roundoff(rng, feeds, times)
                alike = _values(signature, off)
                with noise.of(rng, times * APPROXIMATION):
                    approximated = _values(signature, off)
                yield alike, approximated


@contextlib.contextmanager
def weights_kept(model: keras.Model) -> Iterator[list[tuple[keras.Variable, np.ndarray]]]:
    """Put the weights of a copy back afterwards; in the context, they are given with what they were."""
    weights = [(variable, np.asarray(variable)) for variable in model.weights if "float" in str(variable.dtype)]
    try:
        yield weights
    finally:
        for variable, value in weights:
            variable.assign(value)


class ActivationNoise:
    """Random errors of the functions that runtimes approximate, for a copy of a model that nobody else uses.

    onnxruntime computes the sigmoid, tanh and erf to an absolute error of about one unit roundoff, so small values lose digits.

    Args:
        model: The copy. Its activation functions are replaced by ones that add the noise while there is some.
    """

    APPROXIMATED = ("sigmoid", "tanh", "silu", "gelu", "softplus", "mish", "hard_sigmoid", "log_sigmoid", "softmax")

    def __init__(self, model: keras.Model) -> None:
        from keras_resnet.graphs import layers_in

        self._rng: np.random.Generator | None = None
        self._size = 0.0
        for layer in layers_in(model):
            for name in ("activation", "recurrent_activation"):
                if getattr(getattr(layer, name, None), "__name__", "") in self.APPROXIMATED:
                    with contextlib.suppress(AttributeError):  # of a recurrent layer it belongs to its cell, which is a layer too
                        setattr(layer, name, self._noisy(getattr(layer, name)))
            for operation in getattr(layer, "operations", None) or []:  # functions of `keras.ops` in a Functional model
                if type(operation).__name__.lower() in self.APPROXIMATED and not hasattr(operation, "built"):
                    operation.call = self._noisy(operation.call)

    def _noisy(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def noisy(x: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(x, *args, **kwargs)
            if self._rng is None:
                return result
            factor = np.maximum(1, np.abs(np.asarray(x))) if function.__name__ in ("silu", "gelu", "mish") else 1.0
            added = self._size * self._rng.uniform(-1, 1, tuple(result.shape)) * factor
            return result + added.astype(result.dtype.as_numpy_dtype)

        return noisy

    @contextlib.contextmanager
    def of(self, rng: np.random.Generator, size: float) -> Iterator[None]:
        """Add noise of that size while the block runs."""
        self._rng, self._size = rng, size
        try:
            yield
        finally:
            self._rng = None


@dataclass(frozen=True)
class Rounding:
    """Results that differ by the rounding of float32 alone.

    Attributes:
        exact: In float64 where that is possible.
        alike: As far from it as float32 rounds.
        approximated: As far from it as float32 rounds and runtimes approximate functions.
    """

    exact: Values
    alike: list[Values]
    approximated: list[Values]

    def largest(self, output: OutputSpec, top: int | None) -> float:
        """Return how far an output, in the form in which it is compared, is from its exact value in the worst case.

        What goes into a final activation is compared through the activation of Keras, so no approximation of it counts.
        """
        results = self.alike if output.source == "logits" else [*self.alike, *self.approximated]
        exact = expected(output, self.exact, top)
        return max(largest_difference(exact, expected(output, values, top)) for values in results)


def _values(signature: Signature, feeds: dict[str, np.ndarray], but: Iterable[keras.Variable] = ()) -> Values:
    import tensorflow as tf

    from keras_resnet.graphs import state_kept

    tensors = [tf.convert_to_tensor(feeds[spec.name]) for spec in signature.inputs]
    wanted = [tensor.dtype for tensor in signature.model.inputs]
    if "float64" in wanted:
        tensors = [tf.cast(tensor, tf.float64) if tensor.dtype.is_floating else tensor for tensor in tensors]
    with state_kept(signature.model, but=but):
        own, inner = signature.run(*tensors)
    return Values([np.asarray(value) for value in own], [np.asarray(value) for value in inner])


def _off_by_roundoff(rng: np.random.Generator, feeds: dict[str, np.ndarray], times: float) -> dict[str, np.ndarray]:
    return {name: input_off_by_rounding(rng, array, times=times) for name, array in feeds.items()}


# ---------------------------------------------------------------- pairs of arrays to compare


def expected(output: OutputSpec, values: Values, top: int | None) -> np.ndarray:
    """Return what an output of a file must hold, in the form in which it is compared; `seen` gives the file's in the same form.

    A softmax and the best classes are worked out from the model's own output in float64. What goes into a final activation is
    compared through the activation's inverse, since Keras does not return it: as log p relative to the most probable class, or
    as log p/(1 − p), where p is not saturated.
    """
    if output.source == "layer":
        return values.inner[output.index]
    own = values.own[output.index]
    if output.source == "model":
        return own
    if output.source == "softmax":
        return softmax(own)
    if output.source == "logits":
        return _inverted(own, output.activation)[0]
    return -np.sort(-_probabilities(output, own), axis=-1)[..., :top]


def seen(output: OutputSpec, values: Values, got: np.ndarray) -> np.ndarray:
    """Return an output of a file in the form in which it is compared; see `expected`."""
    got = np.asarray(got)
    if output.source == "top_classes":
        p = _probabilities(output, values.own[0])
        ordered = np.sort(got, axis=-1)
        if got.shape[:-1] != p.shape[:-1] or (got < 0).any() or (got >= p.shape[-1]).any() or (np.diff(ordered) == 0).any():
            return np.full(got.shape, np.nan)
        return np.take_along_axis(p, got.astype("int64"), axis=-1)
    if output.source != "logits":
        return got
    p = values.own[output.index]
    if got.shape != p.shape:
        return got
    usable = _inverted(p, output.activation)[1]
    got = got.astype("float64")
    if output.activation == "softmax":
        got = got - np.take_along_axis(got, p.argmax(-1)[..., None], axis=-1)
    return np.where(usable, got, 0.0)


def saturated(output: OutputSpec, values: Values) -> np.ndarray:
    """Return which classes of a `"logits"` output the batch does not compare, as booleans `[classes]`."""
    usable = _inverted(values.own[output.index], output.activation)[1]
    return np.asarray(~usable.reshape(-1, usable.shape[-1]).any(0))


def _inverted(p: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """The input of an activation as far as its output determines it, and where it does."""
    p = p.astype("float64")
    with np.errstate(divide="ignore", invalid="ignore"):
        if activation == "softmax":
            usable = p > SATURATED_LOW
            found = np.log(p) - np.log(p.max(-1, keepdims=True))
        else:
            usable = (p > SATURATED_LOW) & (p < 1 - SATURATED_HIGH)
            found = np.log(p) - np.log1p(-p)
    return np.where(usable, found, 0.0), usable


def _probabilities(output: OutputSpec, own: np.ndarray) -> np.ndarray:
    return softmax(own) if output.ranked == "logits" else own.astype("float64")


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities along the last axis, in float64."""
    logits = logits.astype("float64")
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
