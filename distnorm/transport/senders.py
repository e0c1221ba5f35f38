"""The sender of a message, and the error if ranks mix the vectors of different layers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distnorm.transport.rendezvous import all_gather_text
from distnorm.types import label


class Sender(NamedTuple):
    """Layer and direction, in words and as the number that is sent with the vector."""

    words: str
    number: int


# docs/decisions.md#messages-name-their-layer
@lru_cache(maxsize=16 * 1024)
def sender(layer: str, share: str, direction: str, model: int) -> Sender:
    """Return the sender for a share of a layer of ``model``, a number that is the same on all ranks."""
    words = f"the {direction} statistics of {label(layer, share)}" + (f" in model {model}" if model > 1 else "")
    digest = hashlib.blake2b(repr((layer, share, direction, model)).encode(), digest_size=8).digest()
    return Sender(words, int.from_bytes(digest, "little", signed=True))


@lru_cache(maxsize=16 * 1024)
def signature(who: Sender, dtype: torch.dtype) -> Tensor:
    """Return the number of ``who`` as the bits of a few values on the CPU, to be sent with other values."""
    return torch.tensor([who.number], device="cpu").view(dtype)


def mixed(ranks: tuple[int, ...], mine: str, timeout: timedelta) -> RuntimeError:
    """Return the error that ranks share different things, this one ``mine``. Collective over ``ranks``."""
    return differing(ranks, all_gather_text(ranks, mine, timeout, doing="say which layer they share"))


def differing(ranks: tuple[int, ...], told: Sequence[str]) -> RuntimeError:
    """Return an error that is the same on all ranks and lists what each of them shares, as it ``told``."""
    sides: dict[str, list[int]] = {}
    for rank, words in zip(ranks, told, strict=True):
        sides.setdefault(words, []).append(rank)
    who = "; ".join(f"rank{'s' * (len(at) > 1)} {', '.join(map(str, at))}: {words}" for words, at in sides.items())
    return RuntimeError(
        f"ranks share different layers at the same time ({who}). Every rank must run the same layers in the same "
        "order; if ranks take different branches, share only among ranks that take the same one."
    )
