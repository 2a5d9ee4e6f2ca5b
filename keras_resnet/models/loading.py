"""Loads model files that Keras wrote: `.keras` archives and legacy HDF5, recognised by their content."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import keras

from ..checks import first_line
from .legacy import as_keras_3

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
LONGEST = 300  # characters of a message of Keras
# How Keras 2 stored calls of TensorFlow functions; Keras 3 has no such layers.
KERAS_2_CALLS = ("TFOpLambda", "SlicingOpLambda", "ClassMethod", "InstanceProperty", "InstanceMethod")
# The options of the commands for the kinds of `ModelFileError`.
COMMAND_REMEDIES = {
    "lambda": "if you trust the file, allow it with --unsafe-lambda, or replace the layer by one with a class",
    "unknown class": "name the module that registers it with --import",
}


def import_modules(names: Iterable[str]) -> None:
    """Import modules, of the current folder too, that register the layers of a model file.

    Raises:
        ModelFileError: A module cannot be imported.
    """
    sys.path.insert(0, os.getcwd())
    try:
        for name in names:
            try:
                importlib.import_module(name)
            except Exception as error:  # the module is the user's; whatever it raises is about it
                raise ModelFileError(f"cannot import {name}: {first_line(error)}") from error
    finally:
        sys.path.remove(os.getcwd())


class ModelFileError(ValueError):
    """A file from which no model can be loaded; the message says why and what to do.

    Args:
        problem: What is wrong, with the name of the file.
        remedy: What to do, if it is not part of `problem`. Commands have options for it, and replace it by their names.
        kind: `"lambda"` or `"unknown class"`, for those commands; else `""`.
    """

    def __init__(self, problem: str, remedy: str = "", kind: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem, self.kind = problem, kind

    def for_commands(self) -> str:
        """Return the message with the options `--unsafe-lambda` and `--import` in place of Python calls."""
        remedy = COMMAND_REMEDIES.get(self.kind)
        return f"{self.problem}; {remedy}" if remedy else str(self)


@dataclass(frozen=True)
class ModelFile:
    """What a model file is, read without loading it.

    Attributes:
        path: The file.
        suffix: The ending that Keras expects for its content: `".keras"` or `".h5"`.
        version: Version of Keras that wrote it, or `""` where the file does not say.
    """

    path: Path
    suffix: str
    version: str = ""

    @property
    def is_keras_2(self) -> bool:
        """Whether a version of Keras before 3 wrote the file."""
        return self.version.startswith(("1.", "2.")) or (self.suffix == ".h5" and not self.version)


def load_model_file(path: str | os.PathLike[str], *, unsafe_lambda: bool = False) -> keras.Model:
    """Load a model that Keras saved.

    Differs from `keras.saving.load_model` in three ways: the format is recognised by the file's content instead of its name, HDF5
    files of Keras 2 load that Keras 3 refuses or reads otherwise, and errors are messages of one line.

    Args:
        path: `.keras` file, or legacy `.h5` or `.hdf5` file with the whole model.
        unsafe_lambda: Whether Python code that `Lambda` layers hold may run. Only for files that you trust.

    Returns:
        The model, uncompiled.

    Raises:
        FileNotFoundError: There is no such file.
        ModelFileError: The file holds no model that this version of Keras can build.
    """
    file = recognise_model_file(path)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            for advice in ("Do not pass an `input_shape`", "Argument `input_length`"):  # for the model's author
                warnings.filterwarnings("ignore", advice)
            return keras.saving.load_model(_readable(file, folder), compile=False, safe_mode=not unsafe_lambda)
    except Exception as error:  # Keras raises all kinds of errors for what it cannot rebuild.
        raise _explained(file, error) from error


def recognise_model_file(path: str | os.PathLike[str]) -> ModelFile:
    """Find out what a model file is.

    Args:
        path: The file.

    Returns:
        `ModelFile`.

    Raises:
        FileNotFoundError: There is no such file.
        ModelFileError: It holds something other than a Keras model.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "saved_model.pb").exists():
            raise ModelFileError(
                f"{path} is a SavedModel, from which Keras cannot rebuild a model; save the model as .keras where it was made"
            )
        raise ModelFileError(f"{path} is a folder, not a model file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    with open(path, "rb") as file:
        beginning = file.read(64)
    if zipfile.is_zipfile(path):
        return ModelFile(path, ".keras", _archive_version(path))
    if beginning.startswith(HDF5_SIGNATURE):
        return ModelFile(path, ".h5", _hdf5_version(path))
    if beginning.startswith(b"version https://git-lfs"):
        raise ModelFileError(f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull`")
    kind = f"valid {path.suffix} file" if path.suffix in (".keras", ".h5", ".hdf5") else "Keras model file"
    raise ModelFileError(f"{path} is damaged or is not a {kind}; save the model again")


def _archive_version(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            if "config.json" not in archive.namelist():
                raise ModelFileError(f"{path} is an archive without a Keras model in it")
            if "metadata.json" not in archive.namelist():
                return ""
            metadata = json.loads(archive.read("metadata.json"))
        return str(metadata.get("keras_version", "")) if isinstance(metadata, dict) else ""
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} is damaged ({first_line(error)}); save the model again") from error


def _hdf5_version(path: Path) -> str:
    try:
        with h5py.File(path, "r") as file:
            if "model_config" not in file.attrs:
                raise ModelFileError(
                    f"{path} holds weights without a model; load them into the model they belong to (for a model of the zoo: "
                    "`weights`)"
                )
            version = file.attrs.get("keras_version", "")
    except OSError as error:
        raise ModelFileError(f"{path} is damaged or cut off; save the model again") from error
    return version.decode() if isinstance(version, bytes) else str(version)


def _readable(file: ModelFile, folder: str) -> Path:
    """The file in a form, and under a name with the ending, that Keras reads: itself, a link or a copy in the folder."""
    copy = Path(folder) / f"model{file.suffix}"
    if file.suffix == ".h5":
        with h5py.File(file.path, "r") as opened:
            config = json.loads(opened.attrs["model_config"])
        if (readable := as_keras_3(config, file.is_keras_2)) != config:
            shutil.copyfile(file.path, copy)
            with h5py.File(copy, "r+") as opened:
                opened.attrs["model_config"] = json.dumps(readable)
            return copy
    if file.path.suffix == file.suffix or (file.suffix == ".h5" and file.path.suffix == ".hdf5"):
        return file.path
    copy.symlink_to(file.path.resolve())
    return copy


def _explained(file: ModelFile, error: Exception) -> ModelFileError:
    """Why a file cannot be loaded, and what to do."""
    text, path = str(error), file.path
    if "Lambda" in text and "safe_mode" in text:
        return ModelFileError(
            f"{path} has a Lambda layer, which is Python code in the file that would run here",
            "if you trust the file, load it with `keras_resnet.load_model_file(path, unsafe_lambda=True)`",
            "lambda",
        )
    if "allow_pickle" in text:
        return ModelFileError(
            f"{path} holds pickled Python objects where weights belong, and reading them could run any code; save the model again"
        )
    unknown = re.search(r"(?:Could not locate \w+|Unknown \w+:) '(.+?)'", text)
    if file.is_keras_2 and unknown and unknown[1] in KERAS_2_CALLS:
        return ModelFileError(
            f"{path} was saved by Keras {file.version} and calls TensorFlow functions as layers ({unknown[1]}), which Keras 3 "
            "cannot rebuild; build the model with layers or `keras.ops` in their place, and save it again"
        )
    if file.is_keras_2 and file.suffix == ".keras":
        return ModelFileError(
            f"{path} was saved by Keras {file.version}, whose .keras files Keras {keras.__version__} cannot read; load it there "
            "and save it as .h5"
        )
    if unknown:
        name = unknown[1].rsplit(">", 1)[-1]
        remedy = "import the module that registers it before loading the file"
        return ModelFileError(f"{path} uses {name}, which is not known here", remedy, "unknown class")
    wrote = f" (saved by Keras {file.version}; {keras.__version__} is installed)" if file.version else ""
    return ModelFileError(f"{path} cannot be loaded{wrote}: {_summary(error)}")


def _summary(error: Exception) -> str:
    """The cause that an error of Keras names, without the configs it prints before."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).rsplit("Exception encountered: ", 1)[-1]
    line = first_line(ValueError(text)) if text.strip() else type(error).__name__
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} …"
