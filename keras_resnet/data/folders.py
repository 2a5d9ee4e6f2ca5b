"""Reads the layout of a folder of images: which subfolders are splits, which are classes, and which files are images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .formats import IMAGE_ENDINGS

# What people call the folders of a split, in any case and with endings such as `_set` or `_images`.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
SUFFIX = r"[\s_.-]*(?:set|sets|data|dataset|images?|imgs?|photos?|pictures?|split)"
# Folders and files that archivers and file managers create.
LEFTOVERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini")
SHOWN = 6


@dataclass(frozen=True)
class FolderLayout:
    """How a folder of images was understood.

    Attributes:
        splits: Folder of each split: `"train"`, and perhaps `"validation"` and `"test"`. The class folders are in it.
        classes: Names of the class folders of the training split, sorted.
        unused: A message for each folder that is not read.
    """

    splits: dict[str, Path]
    classes: tuple[str, ...]
    unused: tuple[str, ...] = ()


def read_layout(folder: Path) -> FolderLayout:
    """Find the splits and classes of a folder.

    A folder with a split's name is taken for a split if it holds folders, and for a class if it holds images: `train` next to
    `bus` and `car` is a class.

    Args:
        folder: One folder of images per class, or folders such as `train`, `val` and `test` that hold those.

    Returns:
        `FolderLayout`.

    Raises:
        ValueError: No two classes, no training split, or a layout that can be read in two ways. The message says what was
            found and which folder was probably meant.
    """
    splits, unused = _splits(folder)
    train = splits.get("train", folder)
    return FolderLayout(splits or {"train": folder}, _classes(train), unused)


def split_of(name: str, prefixed: bool = False) -> str | None:
    """Return the split that a folder's name stands for, or None.

    Args:
        name: Name of a folder, such as `"Train"`, `"training_set"` or `"val"`.
        prefixed: Whether a word may come first, as in `"seg_train"`.
    """
    prefix = r"(?:[a-z0-9]+[\s_.-]+)*" if prefixed else ""
    match = re.fullmatch(rf"{prefix}({'|'.join(SPLIT_NAMES)})(?:{SUFFIX})*", name.casefold())
    return SPLIT_NAMES[match[1]] if match else None


def visible_folders(folder: Path) -> list[Path]:
    """Subfolders, sorted, without hidden ones and those that archivers and file managers create."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and not is_hidden(child.name))


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or was left by an archiver or file manager."""
    return name.startswith(".") or name.casefold() in LEFTOVERS


def list_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return all visible files below a folder: `(images, others)`, each sorted. Links to folders are not followed."""
    images, others = [], []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for path in (Path(place) / name for name in files if not is_hidden(name)):
            (images if path.suffix.lower() in IMAGE_ENDINGS else others).append(path)
    return sorted(images), sorted(others)


def has_images(folder: Path, deep: bool = False) -> bool:
    """Return whether there is an image in a folder itself or, with `deep`, anywhere below it."""
    if deep:
        return bool(list_files(folder)[0])
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(IMAGE_ENDINGS) and not is_hidden(entry.name) for entry in entries)


def _splits(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """`(folder of each split, messages about what is not read)`; no splits where all folders are classes."""
    children = visible_folders(folder)
    named = {child: split_of(child.name) for child in children}
    if children and not any(named.values()):
        prefixed = {child: split_of(child.name, prefixed=True) for child in children}
        named = prefixed if len(set(prefixed.values()) - {None}) > 1 else named
    holding = {child: split for child, split in named.items() if split and visible_folders(child)}
    if not holding:
        if len(children) > 1 and all(named.values()) and any(has_images(child) for child in children):
            example = f"{children[0]}/CLASS/"
            raise ValueError(
                f"{folder} has the folders {_listed(children)}, but their images are not sorted into classes; put the images of "
                f"each class into a folder of its own, as in {example}"
            )
        return {}, ()
    splits: dict[str, Path] = {}
    for child, split in named.items():
        if split is None:
            continue
        if split in splits:
            raise ValueError(
                f"{folder} has two folders for the {split} split, {splits[split].name!r} and {child.name!r}; rename or move one"
            )
        splits[split] = child
    others = [child for child in children if named[child] is None and has_images(child, deep=True)]
    if "train" not in splits or (others and len(splits) == 1):
        _refuse_mixture(folder, splits, others)
    unused = [f"{child} is not read: it is neither a split nor a class" for child in others]
    for split in ("validation", "test"):
        if split in splits and splits[split] not in holding and has_images(splits[split]):
            unused.append(f"{splits.pop(split)} is not read: its images are not sorted into class folders")
    return {split: _inner(place) for split, place in splits.items()}, tuple(unused)


def _refuse_mixture(folder: Path, splits: dict[str, Path], others: list[Path]) -> None:
    own = _listed(list(splits.values()))
    if others:
        raise ValueError(
            f"{folder} has {own} next to {_listed(others)}, so it is unclear which are splits and which are classes; move the "
            f"class folders of the training images into {folder / 'train'}, or rename {own} if it is a class"
        )
    raise ValueError(f"{folder} has {own}, but no folder of training images; name that one {str(folder / 'train')!r}")


def _inner(folder: Path) -> Path:
    """The folder itself, or the one of the same name within it, as archives of archives have them (`train/train/`)."""
    children = visible_folders(folder)
    if len(children) == 1 and children[0].name.casefold() == folder.name.casefold() and not has_images(folder):
        return _inner(children[0])
    return folder


def _classes(folder: Path) -> tuple[str, ...]:
    children = visible_folders(folder)
    if not children:
        _refuse_no_classes(folder)
    if len(children) == 1:
        _refuse_one_class(folder, children[0])
    inner = [{child.name for child in visible_folders(child)} for child in children]
    shared = set.intersection(*inner)
    if len(shared) > 1 and not any(has_images(child) for child in children):
        raise ValueError(
            f"every folder in {folder} ({_listed(children)}) holds the same folders ({_listed(shared)}), so it is unclear which "
            "are the classes; name them train, val and test if they are splits, or put the images of each class into one folder"
        )
    return tuple(child.name for child in children)


def _refuse_no_classes(folder: Path) -> None:
    if not has_images(folder):
        raise ValueError(f"{folder} has no folders of images; put the images of each class into a folder of its own")
    siblings = [child for child in visible_folders(folder.resolve().parent) if has_images(child)]
    hint = f"; did you mean the folder above it, {folder.parent}?" if len(siblings) > 1 else ""
    raise ValueError(
        f"{folder} has images, but no folders of images: put the images of each class into a folder of its own{hint}"
    )


def _refuse_one_class(folder: Path, child: Path) -> None:
    inner = [grandchild for grandchild in visible_folders(child) if has_images(grandchild, deep=True)]
    if inner:
        raise ValueError(
            f"{folder} has a single folder, {child.name!r}, which itself holds folders of images ({_listed(inner)}); "
            f"did you mean {child}?"
        )
    count = len(list_files(child)[0])
    raise ValueError(
        f"{folder} has a single class, {child.name!r} ({count:,} images); a classifier needs two or more: put the images of each "
        "class into a folder of its own"
    )


def _listed(places: Iterable[Any]) -> str:
    names = sorted(place.name if isinstance(place, Path) else place for place in places)
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
