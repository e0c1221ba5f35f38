"""Whose vector a message carries, and what is said where ranks mix those of different layers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distnorm.transport.rendezvous import tell_and_collect


class Sender(NamedTuple):
    """Layer and direction, in words and as the number that travels with the vector."""

    words: str
    number: int


# docs/decisions.md#messages-name-their-layer
@lru_cache(maxsize=16 * 1024)
def sender(layer: str, direction: str, model: int) -> Sender:
    """Of a layer in the ``model`` that ranks count alike."""
    words = f"the {direction} statistics of {layer}" + (f" in model {model}" if model > 1 else "")
    digest = hashlib.blake2b(repr((layer, direction, model)).encode(), digest_size=8).digest()
    return Sender(words, int.from_bytes(digest, "little", signed=True))


@lru_cache(maxsize=16 * 1024)
def signature(who: Sender, dtype: torch.dtype) -> Tensor:
    """The number of ``who`` as the bits of a few values on the CPU, to be sent along with others."""
    return torch.tensor([who.number], device="cpu").view(dtype)


def mixed(ranks: tuple[int, ...], mine: str, timeout: timedelta) -> RuntimeError:
    """The error where ranks have seen that they share different things, this one ``mine``. Collective over ranks."""
    return differing(ranks, tell_and_collect(ranks, mine, timeout, doing="say which layer they share"))


def differing(ranks: tuple[int, ...], told: Sequence[str]) -> RuntimeError:
    """The same on all ranks: what each of them shares, by what it ``told``."""
    sides: dict[str, list[int]] = {}
    for rank, words in zip(ranks, told, strict=True):
        sides.setdefault(words, []).append(rank)
    who = "; ".join(f"rank{'s' * (len(at) > 1)} {', '.join(map(str, at))}: {words}" for words, at in sides.items())
    return RuntimeError(
        f"ranks share different layers at the same time ({who}). Every rank must run the same layers in the same "
        "order; where ranks take branches of their own, let only those share that take the same one."
    )
