"""A user's Keras callbacks around a whole run: one `on_train_begin` and one `on_train_end`, whatever happens between."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from .run import TrainingError
from .segments import Segment

# A callback, or a function that makes one for a segment.
CallbackLike: TypeAlias = keras.callbacks.Callback | Callable[[Segment, keras.Model], keras.callbacks.Callback | None]


class Callbacks:
    """Calls callbacks as Keras' `fit` does.

    Args:
        given: Keras callbacks, which see the whole run, and functions `(segment, model) -> callback or None`, whose callbacks
            see one segment from its `on_train_begin` to its `on_train_end`.
        params: What callbacks find in `params`: `epochs`, `steps`, `verbose`.
    """

    def __init__(self, given: Iterable[CallbackLike], params: dict[str, Any]) -> None:
        given = list(given)
        self._lasting = [callback for callback in given if isinstance(callback, keras.callbacks.Callback)]
        self._factories = [callback for callback in given if not isinstance(callback, keras.callbacks.Callback)]
        self._params = params
        self._whole = self._list(self._lasting)
        self._segment = self._list([])
        self._test_depth = 0

    def _list(self, callbacks: list) -> keras.callbacks.CallbackList:
        return keras.callbacks.CallbackList(callbacks, add_history=False, add_progbar=False, **self._params)

    def begin(self, model: keras.Model, state: dict | None = None, arrays: dict[str, np.ndarray] | None = None) -> list[str]:
        """`on_train_begin`; afterwards callbacks get the state that a checkpoint holds.

        Args:
            model: The model of the first segment that is trained.
            state: `state()` of the run that is resumed, or None.
            arrays: Its arrays.

        Returns:
            Lines for the log: which callbacks restart.
        """
        if state is not None:
            for callback in self._lasting:
                if isinstance(callback, keras.callbacks.CSVLogger):
                    callback.append = True
        model.stop_training = False
        self._whole.set_model(model)
        self._whole.on_train_begin()
        return [] if state is None else self._restore(state, arrays)

    def enter(self, segment: Segment, model: keras.Model, previous: keras.Model | None = None) -> None:
        """A segment begins; what callbacks keep of the previous model is carried over to the new one.

        Args:
            segment: The segment.
            model: Its model.
            previous: The model of the segment before, where growth replaced it.
        """
        if previous is not None and previous is not model:
            self._carry_weights(previous, model)
            model.stop_training = False
            self._whole.set_model(model)
        made = [factory(segment, model) for factory in self._factories]
        self._segment = self._list([callback for callback in made if callback is not None])
        self._segment.set_model(model)
        self._segment.on_train_begin()

    def leave(self, logs: dict | None) -> None:
        """A segment ends."""
        self._segment.on_train_end(logs)
        self._segment = self._list([])

    def end(self, logs: dict | None) -> None:
        """The run ends."""
        self._whole.on_train_end(logs)

    def notify(self, event: str, *args: Any) -> None:
        """Call a method of all callbacks, e.g. `notify("on_epoch_end", epoch, logs)`."""
        for callbacks in (self._whole, self._segment):
            getattr(callbacks, event)(*args)

    # ------------------------------------------------------------ state

    def _carry_weights(self, previous: keras.Model, model: keras.Model) -> None:
        """Give best weights that a callback holds the layout of a model that has grown; new blocks keep their closed gates."""
        for callback in self._lasting:
            best = getattr(callback, "best_weights", None)
            if not isinstance(best, list) or len(best) != len(previous.weights):
                continue
            kept = {}
            for variable, value in zip(previous.weights, best, strict=True):
                kept.setdefault(variable.path, []).append(value)
            grown = []
            for variable in model.weights:
                found = kept.get(variable.path)
                grown.append(found.pop(0) if found else ops.convert_to_numpy(variable))
            callback.best_weights = grown

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what callbacks remember, as plain JSON values and as arrays."""
        plain, arrays = {}, {}
        for number, callback in enumerate(self._lasting):
            key = f"{number} {type(callback).__name__}"
            if not is_saved(callback):
                continue
            plain[key] = {}
            for name, value in vars(callback).items():
                if name.startswith("_") or name in NOT_STATE:
                    continue
                if isinstance(value, np.generic):
                    value = value.item()
                if value is None or isinstance(value, (bool, int, float, str)):
                    plain[key][name] = value
                elif isinstance(value, list) and value and all(isinstance(part, np.ndarray) for part in value):
                    arrays |= {f"callback/{number}/{name}/{i}": part for i, part in enumerate(value)}
        return plain, arrays

    def _restore(self, state: dict, arrays: dict[str, np.ndarray]) -> list[str]:
        lines = []
        for number, callback in enumerate(self._lasting):
            saved = state.get(f"{number} {type(callback).__name__}")
            if saved is None:
                if not isinstance(callback, STATELESS):
                    lines.append(f"callback {type(callback).__name__} restarts: Keras does not say what it remembers")
                continue
            options = _options(callback)
            for name, value in saved.items():
                if name not in options:
                    setattr(callback, name, value)
            prefix = f"callback/{number}/"
            names = {name[len(prefix) :].split("/")[0] for name in arrays if name.startswith(prefix)}
            for name in names:
                count = sum(key.startswith(f"{prefix}{name}/") for key in arrays)
                setattr(callback, name, [arrays[f"{prefix}{name}/{i}"] for i in range(count)])
        return lines


NOT_STATE = {"model", "params", "validation_data"}
# Callbacks without a memory of their own, or which have it in a file.
STATELESS = (
    keras.callbacks.LambdaCallback,
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.TerminateOnNaN,
    keras.callbacks.CSVLogger,
    keras.callbacks.TensorBoard,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.ProgbarLogger,
)
SAVED = (keras.callbacks.EarlyStopping, keras.callbacks.ModelCheckpoint, keras.callbacks.ReduceLROnPlateau)


def is_saved(callback: keras.callbacks.Callback) -> bool:
    """Return whether a checkpoint keeps what a callback remembers: Keras' own callbacks whose memory is in public attributes."""
    return type(callback) in SAVED


def _options(callback: keras.callbacks.Callback) -> set[str]:
    """Attributes that the caller chose; the saved ones must not replace them."""
    return set(inspect.signature(type(callback).__init__).parameters)


def check_callbacks(given: Iterable[CallbackLike], has_schedule: bool, schedule: str, keeps_averages: bool) -> None:
    """Refuse callbacks that do not work in a run.

    Args:
        given: As the user gave them.
        has_schedule: Whether the learning rate follows a schedule.
        schedule: Name of the schedule.
        keeps_averages: Whether the run keeps moving averages itself.

    Raises:
        TrainingError: A callback cannot be used; the message names it and says what to do.
    """
    for callback in given:
        name = type(callback).__name__
        if isinstance(callback, (keras.callbacks.ReduceLROnPlateau, keras.callbacks.LearningRateScheduler)) and has_schedule:
            raise TrainingError(
                f"{name} sets the learning rate, which the schedule {schedule!r} sets already; "
                'give schedule="constant" (and no warm-up), or leave the callback out'
            )
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            raise TrainingError(
                "BackupAndRestore is not needed: `out` keeps a checkpoint and resumes from it; leave the callback out"
            )
        if isinstance(callback, keras.callbacks.SwapEMAWeights) and keeps_averages:
            raise TrainingError("SwapEMAWeights is not needed with `ema`: validation and saving use the averages; leave it out")
        if not isinstance(callback, keras.callbacks.Callback) and not callable(callback):
            raise TrainingError(
                f"`callbacks` must be Keras callbacks or functions (segment, model) -> callback, got {callback!r:.80}"
            )
