"""Pictures to train on: the user's own, from arrays in a file or from a folder with one folder per class."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
SUFFIXES = (".png", ".jpg", ".jpeg")

Array = npt.NDArray[np.uint8] | npt.NDArray[np.int64]


class Labelled(NamedTuple):
    """Images ``[N, C, H, W]``, standardized, and their labels ``[N]``."""

    images: Tensor
    labels: Tensor


class Pictures(NamedTuple):
    """What a study trains on and is judged by; ``name`` tells data apart by what they hold."""

    name: str
    train: Labelled
    validation: Labelled


def load_pictures(path: Path, size: int, held_out: float) -> Pictures:
    """Read an ``.npz`` with ``train_images``, ``train_labels``, ``test_images``, ``test_labels``, or a folder.

    Args:
        path: arrays of uint8 images ``[N, H, W, C]`` and integer labels; or a folder of PNG or JPEG files by class.
        size: files of a folder are cropped and resized to squares of so many pixels.
        held_out: the part of each class of a folder that validates, the same in every run.

    Raises:
        ValueError: not of this form; the message says what is missing.
    """
    arrays = _from_folder(path, size, held_out) if path.is_dir() else _from_file(path)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in ARRAYS)).hexdigest()
    train, validation = (torch.from_numpy(arrays[name]).movedim(3, 1).float() for name in ARRAYS[::2])
    std, mean = torch.std_mean(train, (0, 2, 3), keepdim=True)
    labels = [torch.from_numpy(arrays[name].astype(np.int64)) for name in ARRAYS[1::2]]
    parts = [
        Labelled(((images - mean) / std.clamp_min(1)).contiguous(), each)
        for images, each in zip((train, validation), labels, strict=True)
    ]
    return Pictures(f"{path.stem}-{digest[:8]}", *parts)


def _from_file(path: Path) -> dict[str, Array]:
    with np.load(path) as file:
        missing = [name for name in ARRAYS if name not in file]
        if missing:
            raise ValueError(f"{path} holds {', '.join(file)}; it lacks {', '.join(missing)}.")
        arrays = {name: file[name] for name in ARRAYS}
    for name in ARRAYS[::2]:
        if arrays[name].dtype != np.uint8 or arrays[name].ndim != 4:
            found = f"{arrays[name].dtype} of shape {arrays[name].shape}"
            raise ValueError(f"{path}: {name} is {found}; need uint8 of shape [N, H, W, C].")
    return arrays


def _from_folder(path: Path, size: int, held_out: float) -> dict[str, Array]:
    classes = sorted(each for each in path.iterdir() if each.is_dir())
    chosen: tuple[list[tuple[Path, int]], list[tuple[Path, int]]] = ([], [])
    for label, folder in enumerate(classes):
        files = sorted(_pictures_of(folder))
        random.Random(label).shuffle(files)
        cut = round(len(files) * held_out)
        for part, names in zip(chosen, (files[cut:], files[:cut]), strict=True):
            part.extend((name, label) for name in names)
    if len(classes) < 2 or not all(chosen):
        raise ValueError(
            f"{path} has {len(classes)} folders, with {len(chosen[0])} pictures to train on and {len(chosen[1])} to "
            f"validate; need a folder per class with {' or '.join(SUFFIXES)} files, enough to hold some out."
        )
    arrays: dict[str, Array] = {}
    for part, (images, labels) in zip(chosen, (ARRAYS[:2], ARRAYS[2:]), strict=True):
        arrays[images] = np.stack([_read(name, size) for name, _ in part])
        arrays[labels] = np.array([label for _, label in part])
    return arrays


def _pictures_of(folder: Path) -> Iterator[Path]:
    return (each for each in folder.rglob("*") if each.suffix.lower() in SUFFIXES)


def _read(path: Path, size: int) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))
