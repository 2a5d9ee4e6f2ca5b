"""What travels inside an ONNX file, and how a file or a folder gets onto the disk whole or not at all.

Metadata keys of an ONNX file (all values are JSON; `read_metadata` decodes them):

- `keras_resnet.card`: the model card, `{"name", "config", "preprocessing", "labels", "weights"}`; see
  `keras_resnet.modelcard.ModelCard`. `preprocessing` is `{"mode", "size", "resize", "interpolation"}`: `mode` names what
  the graph itself does to pixels 0–255, the rest how an image file becomes the graph's input (no size: it goes in as it is).
- `keras_resnet.outputs`: `{output name: kind}`, the kind being one of `options.KINDS`; see `find_scores`.
- `keras_resnet.options`: the export options that are not the default, so that `verify` can repeat the conversion.
- `keras_resnet.tolerances`: `{"relative": bound of max |difference| / max |reference|, "precision": "float32" | …}`.
- `keras_resnet.versions`: `{"keras_resnet_export", "keras", "tensorflow", "tf2onnx", "onnx"}`.
- `keras_resnet.sha256`: hexadecimal digest over the model's config and its weights in order.

Everything in the file depends on the model and on the options alone: no date, no path, no measured figure.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import NotRanked, UsageError
from .options import KINDS

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir

PREFIX = "keras_resnet."
FOLDER_FILE = "keras_resnet.json"  # the same keys, without prefix, in a SavedModel folder
KEYS = ("card", "options", "outputs", "sha256", "tolerances", "versions")


@dataclass(frozen=True)
class Scores:
    """The output of a file that scores classes, and the kind of its numbers (one of `options.KINDS`, not `"other"`)."""

    output: str
    kind: str

    def classes(self, units: int) -> int:
        """Return the number of classes that an output with this number of units scores."""
        return 2 if self.kind == "binary" else units

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Turn an output `[batch, units]` into probabilities `[batch, classes]`, float64.

        Logits go through a softmax; one sigmoid unit p becomes the two classes (1 − p, p); the other kinds stay as they are.
        """
        import numpy as np

        scores = np.asarray(scores, "float64")
        if self.kind == "logits":
            shifted = np.exp(scores - scores.max(-1, keepdims=True))
            return shifted / shifted.sum(-1, keepdims=True)
        return np.concatenate([1 - scores, scores], axis=-1) if self.kind == "binary" else scores

    def agreement(self, reference: np.ndarray, got: np.ndarray) -> float | None:
        """Share of decisions that are the same: the best class of each row, or for independent classes the side of 0.5.

        Returns:
            A share from 0 to 1; None where there are no rows or the scores are not finite.
        """
        import numpy as np

        if not len(reference) or not (np.isfinite(reference).all() and np.isfinite(got).all()):
            return None
        if self.kind in ("multilabel", "binary"):
            return float(((reference >= 0.5) == (got >= 0.5)).mean())
        return float((reference.argmax(-1) == got.argmax(-1)).mean())


def find_scores(
    metadata: dict, outputs: dict[str, list], *, scores: str | None = None, kind: str | None = None, file: str = "the file"
) -> Scores:
    """Find the output that scores classes: the one that the metadata or the caller declare, never one guessed by its name.

    Args:
        metadata: What `read_metadata` returned. Files of version 0.1 have no kinds; their `logits` and `probabilities` belong to
            a softmax classifier.
        outputs: `{output name: shape}` of the file, in order.
        scores: Name of the output to take; needed where several could be meant.
        kind: One of `KINDS`; declares the kind of a file that does not state it, or overrides it.
        file: How messages name the file.

    Raises:
        NotRanked: No output is known to score classes, or the declared one is not `[batch, classes]`.
        UsageError: Several outputs score classes, or the declared one does not exist.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"the output kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if scores is not None and scores not in outputs:
        raise UsageError(f"{file} has no output {scores!r}; its outputs are {_listed(outputs)}")
    kinds = output_kinds(metadata, outputs)
    if kind is not None:
        name = scores or (next(iter(outputs)) if len(outputs) == 1 else None)
        if name is None:
            raise UsageError(f"{file} has several outputs ({_listed(outputs)}); name one with --scores NAME")
        kinds = kinds | {name: kind}
    ranked = [name for name, have in kinds.items() if have != "other" and len(outputs[name]) == 2 and scores in (None, name)]
    if set(ranked) == {"logits", "probabilities"}:  # one classifier, before and after its softmax
        ranked = ["logits"]
    if len(ranked) == 1:
        return Scores(ranked[0], kinds[ranked[0]])
    if ranked:
        raise UsageError(f"{file} has several outputs that score classes ({', '.join(ranked)}); name one with --scores NAME")
    if scores is not None and len(outputs[scores]) != 2:
        raise NotRanked(f"output {scores!r} of {file} has the shape {list(outputs[scores])}; only [batch, classes] can be ranked")
    raise NotRanked(
        f"{file} does not say that one of its outputs ({_listed(outputs)}) scores classes; declare it with --scores NAME "
        f"--output-kind KIND, where KIND is one of {', '.join(KINDS[:-1])}"
    )


def find_scores_or_values(
    metadata: dict, outputs: dict[str, list], *, scores: str | None = None, kind: str | None = None, file: str = "the file"
) -> Scores | None:
    """Find the output that scores classes as `find_scores` does, or None for a file whose outputs are shown as they are.

    Raises:
        UsageError: Several outputs score classes, or what the caller declares does not fit.
    """
    try:
        return find_scores(metadata, outputs, scores=scores, kind=kind, file=file)
    except NotRanked:
        if scores is not None or kind not in (None, "other"):
            raise
        return None


def output_kinds(metadata: dict, outputs: dict[str, list]) -> dict[str, str]:
    """Return `{output name: kind}` of the outputs whose kind is known."""
    if isinstance(stated := metadata.get("outputs"), dict):
        return {name: kind for name, kind in stated.items() if name in outputs and kind in KINDS}
    return {name: name for name in ("logits", "probabilities") if name in outputs and metadata}


def _listed(outputs: dict[str, list]) -> str:
    return ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in outputs.items())


def encode_metadata(metadata: dict[str, Any]) -> dict[str, str]:
    """Return `{"card": …, …}` as the string pairs that an ONNX file holds, in a fixed order.

    Raises:
        ValueError: A key that `KEYS` does not list.
    """
    if unknown := set(metadata) - set(KEYS):
        raise ValueError(f"metadata keys must be among {KEYS}, got {sorted(unknown)}")
    return {PREFIX + key: json.dumps(metadata[key], sort_keys=True, ensure_ascii=False) for key in KEYS if key in metadata}


def decode_metadata(pairs: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata among the string pairs of an ONNX file; keys of other makers are left out, broken JSON too."""
    found = {}
    for key in KEYS:
        with contextlib.suppress(KeyError, ValueError):
            found[key] = json.loads(pairs[PREFIX + key])
    return found


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of an ONNX file, without its external data, or of a SavedModel folder.

    Args:
        path: ONNX file or folder.

    Returns:
        Dict with those of `KEYS` that the file holds.

    Raises:
        UsageError: The file is missing or no ONNX file.
    """
    if Path(path).is_dir():
        with contextlib.suppress(OSError, ValueError):
            return json.loads((Path(path) / FOLDER_FILE).read_text("utf-8"))
        return {}
    return decode_metadata({entry.key: entry.value for entry in read_proto(path, external_data=False).metadata_props})


def write_folder_metadata(folder: Path, metadata: dict) -> None:
    """Write the metadata of a SavedModel folder."""
    if unknown := set(metadata) - set(KEYS):
        raise ValueError(f"metadata keys must be among {KEYS}, got {sorted(unknown)}")
    (folder / FOLDER_FILE).write_text(json.dumps(metadata, ensure_ascii=False, indent=1, sort_keys=True), "utf-8")


def read_proto(path: str | os.PathLike[str], external_data: bool = True) -> onnx.ModelProto:
    """Return the `ModelProto` of an ONNX file.

    Raises:
        UsageError: The file, or its external data, is missing or damaged.
    """
    import onnx

    path = existing_file(path)
    try:
        proto = onnx.load(path, load_external_data=external_data)
        if not proto.graph.output:
            raise ValueError("it has no outputs")
    except Exception as error:
        raise UsageError(f"{path} is not a readable ONNX file: {first_line(error)}") from error
    return proto


def external_files(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the files next to an ONNX file that hold its external data.

    Raises:
        UsageError: The file is no ONNX file, or its data is not next to it.
    """
    tensors = read_proto(path, external_data=False).graph.initializer
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    if outside := [name for name in names if Path(name).name != name]:
        raise UsageError(f"{path} keeps its data in {outside[0]!r}; it must be next to the file")
    return sorted(names)


def existing_file(path: str | os.PathLike[str]) -> Path:
    """`Path(path)`, or a `UsageError` if there is no such file."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file")
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    return path


MOST_CHARACTERS = 300


def first_line(error: object, most: int = MOST_CHARACTERS) -> str:
    """Return the line of an exception's text that says what is wrong, for messages.

    Left out are terminal colours, the frame that Keras puts around a layer's error, and TensorFlow's node names.

    Args:
        error: The exception.
        most: Maximum number of characters.
    """
    text = re.sub(r"\x1b\[[0-9;]*m|\{\{function_node [^}]*\}\} ?", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Exception encountered")]
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= most else line[: most - 1] + "…"


def check_target(path: str | os.PathLike[str], overwrite: bool, mark: str | None = None) -> Path:
    """Check that a file or folder can be written, before any work is done, and return its absolute path.

    Args:
        path: File or folder to write.
        overwrite: Whether an existing one may be replaced.
        mark: Name of a file that a folder must contain to be replaced; None if `path` is a file.

    Raises:
        UsageError: `path` exists and may not be replaced, it is a file instead of a folder or the reverse, or the folder that it
            is in does not exist or is read-only.
    """
    if not str(path):
        raise UsageError("the output needs a name, got an empty one")
    target = Path(os.path.abspath(path))
    if target.exists() and not overwrite:
        raise UsageError(f"{path} exists already; choose another name or allow overwriting (--force)")
    if target.is_dir() and mark is None:
        raise UsageError(f"cannot write {path}: it is a folder")
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise UsageError(f"cannot write {path}: it is a device or a pipe, not a file")
    if target.exists() and mark is not None and not _replaceable(target, mark):
        raise UsageError(f"{path} is not replaced, because it is not an earlier export (it has no {mark})")
    if not target.parent.is_dir():
        raise UsageError(f"cannot write {path}: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write {path}: the folder {target.parent} is not writable")
    return target


def _replaceable(target, mark):
    return target.is_dir() and ((target / mark).is_file() or not any(target.iterdir()))


NO_ROOM = 2**20


@contextlib.contextmanager
def publishing(
    path: str | os.PathLike[str], overwrite: bool = True, keep_failed: bool = False, mark: str | None = None
) -> Iterator[Path]:
    """A folder next to `path` to write into; its content is moved into place if the block ends well.

    Everything is written under its final name (an ONNX file names the file of its external data) and verified there;
    then companions (`path.name + ".data"` …) move first and the file or folder itself last, so that a reader never sees a
    half-written one; the data of the old file go with it. If the block raises, the folder goes and what was at `path` stays.

    Args:
        path: The final file or folder.
        overwrite, mark: As in `check_target`.
        keep_failed: Keep what a failed block has written, as `path.name + ".failed"`.

    Yields:
        The path inside the folder under which to write.

    Raises:
        UsageError: `path` cannot be written, or the disk is full.
    """
    target = check_target(path, overwrite, mark)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    try:
        with _removed_if_killed(work):
            yield work / target.name
        entries = sorted(work.iterdir(), key=lambda entry: entry.name == target.name)
        stale = set(companions(target)) - {target.parent / entry.name for entry in entries} if target.is_file() else ()
        for entry in entries:
            _move(entry, target.parent / entry.name, work)
        for file in stale:
            file.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None and shutil.disk_usage(work).free < NO_ROOM:  # numpy tells no number
            raise UsageError(f"cannot write {path}: {os.strerror(errno.ENOSPC)}") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG, errno.EIO):
            raise UsageError(f"cannot write {path}: {error.strerror}") from error
        raise
    except Exception:
        if keep_failed and (work / target.name).exists():
            _move(work / target.name, target.parent / f"{target.name}.failed", work)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(prefix: str, parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A folder that is gone when the block ends, or when this process is killed or crashes while the block runs.

    Args:
        prefix: What its name begins with.
        parent: Folder to make it in; by default the system's for temporary files.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=parent))
    try:
        with _removed_if_killed(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _removed_if_killed(folder: Path) -> Iterator[None]:
    """Remove a folder even if this process is killed, or a native library crashes it, while the block runs.

    A shell waits at the other end of a pipe: a line says that all is well, and the end of the pipe without one that we are gone.
    """
    if os.name != "posix":
        yield
        return
    command = ["/bin/sh", "-c", 'read -r ended || rm -rf -- "$0"', str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as waiting:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                waiting.stdin.write(b"ended\n")
                waiting.stdin.flush()


def _move(source, target, work):
    """Rename `source` to `target`; a folder that is in the way is set aside first and put back if the move fails."""
    if not (target.is_dir() and not target.is_symlink()):
        os.replace(source, target)
        return
    aside = work / f"{target.name}.old"
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(aside, target)
        raise


def is_written_through(path: str | os.PathLike[str]) -> bool:
    """Return whether a path names something else (a link, /dev/stdout, a pipe) that renaming a new file over it would break."""
    return os.path.islink(path) or os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


@contextlib.contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """Yield the path to write a file to: a new file, renamed when it is complete, or what a link or pipe leads to.

    Raises:
        UsageError: It cannot be written; what was there stays (unless it is the target of a link).
    """
    try:
        with contextlib.nullcontext(path) if is_written_through(path) else publishing(path) as opened:
            yield opened
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


LARGEST_FILE = 2**31 - 2**24  # protobuf messages end at 2 GiB
EXTERNAL_FROM = 1024


def write_onnx(model: ir.Model, path: str | os.PathLike[str], external_data: bool | None = None) -> None:
    """Write an onnx-ir model without a copy of its weights in memory.

    protobuf would build the message, then its bytes: three times the weights. Here the graph is serialised without them, and
    each weight follows as a field of its own; the fields of a message may stand in any order.

    Args:
        model: `onnx_ir.Model`.
        path: File to write.
        external_data: Whether weights go to `path.name + ".data"`; None does so where one file would pass 2 GB.
    """
    import onnx_ir as ir

    path = Path(path)
    weights = list(model.graph.initializers.values())
    total = sum(value.const_value.nbytes for value in weights)
    if external_data or (external_data is None and total > LARGEST_FILE):
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=EXTERNAL_FROM)
        return
    proto = _without_weights(model, weights)
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    tensors = [(_tensor_header(value), value.const_value.nbytes) for value in weights]
    sizes = [len(header) + 1 + len(_varint(size)) + size for header, size in tensors]
    body = len(graph) + sum(1 + len(_varint(size)) + size for size in sizes)
    with open(path, "wb") as file:
        file.write(proto.SerializeToString(deterministic=True) + b"\x3a" + _varint(body) + graph)
        for value, (header, size), whole in zip(weights, tensors, sizes, strict=True):
            file.write(b"\x2a" + _varint(whole) + header + b"\x4a" + _varint(size))
            content = value.const_value.tobytes()
            if len(content) != size:
                raise AssertionError(f"weight {value.name!r} has {len(content)} bytes instead of {size}")
            file.write(content)


def write_with_weights(source: str | os.PathLike[str], path: str | os.PathLike[str], weights: Mapping[str, Any]) -> None:
    """Write the graph of an ONNX file with other weights, where it has ones of those names; for a throw-away file.

    Args:
        source: ONNX file.
        path: File to write; the weights go to `path.name + ".data"`.
        weights: `{initialiser name: array or tensor}`.
    """
    import numpy as np
    import onnx

    proto = read_proto(source)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(weights[tensor.name]), tensor.name))
    location = f"{Path(path).name}.data"
    onnx.save(proto, path, save_as_external_data=True, location=location, size_threshold=EXTERNAL_FROM)


def _without_weights(model, weights):
    import onnx_ir as ir

    initializers = dict(model.graph.initializers)
    model.graph.initializers.clear()
    try:
        return ir.to_proto(model)
    finally:
        for name, value in initializers.items():
            model.graph.initializers[name] = value


def _tensor_header(value):
    import onnx

    tensor = value.const_value
    header = onnx.TensorProto(dims=[int(size) for size in tensor.shape], data_type=int(tensor.dtype), name=value.name)
    return header.SerializeToString(deterministic=True)


def _varint(number):
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def digest(path: str | os.PathLike[str]) -> str:
    """sha256 of a file, or of all files of a folder with their relative paths, in order; hexadecimal."""
    path, total = Path(path), hashlib.sha256()
    files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else companions(path)
    for file in files:
        if path.is_dir():
            total.update(file.relative_to(path).as_posix().encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def companions(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files an ONNX file consists of: itself, and its external data if it has any."""
    path = Path(path)
    data = path.with_name(f"{path.name}.data")
    return [path, data] if data.is_file() and _refers_to(path, data.name) else [path]


def _refers_to(path, name):
    """Whether an ONNX file keeps weights in the file of that name; false for a file that is none."""
    with contextlib.suppress(UsageError):
        return name in external_files(path)
    return False


def disk_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a file with its external data, or of a folder."""
    path = Path(path)
    files = [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else companions(path)
    return sum(file.stat().st_size for file in files)
