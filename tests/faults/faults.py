"""The fault table: what is done to a job of two ranks, and what must come of it. ``rank.py`` does it, to rank 1 mostly.

A row is a fault under a transport and a recipe. Ranks end

* ``right``: with the bits of a job to which nothing was done, whose values plain batch norm of the joined batch has;
* ``alike``: with equal running statistics, and finite outputs;
* ``right or error``, where it is not for us to say;
* ``error``: with an exception whose text matches ``says``; ``own``: with the exception that was injected;
* ``interrupt``, ``killed``, ``gone``: by KeyboardInterrupt, by SIGKILL, with exit code 0 and without a result.

Whatever happens, no process and no file of the job is left, and files of checkpoints can be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

TRANSPORTS = ("shm", "sockets", "gloo")
RECIPES = {
    "sync_bn": "sync_bn",
    "mabn": "mabn(window=2, warmup=2)",
    "lazy_bn": "lazy_bn(window=2, warmup=2)",
}
MOVING = ("mabn", "lazy_bn")

Kind = Literal["right", "alike", "right or error", "error", "own", "interrupt", "killed", "gone"]
Ends = tuple[Kind, Kind]
Within = Literal["soon", "timeout"]
Point = Literal["building", "binding", "loading", "forward", "backward", "end of a step", "saving"]

LONG_S = 60.0
"""A timeout that no row may need: it tells who notices from who waits."""


@dataclass(frozen=True, kw_only=True)
class Instead:
    """What comes instead under some transports or recipes, and why."""

    why: str
    ends: Ends
    says: str = ""
    within: Within = "soon"
    transports: tuple[str, ...] = TRANSPORTS
    recipes: tuple[str, ...] = tuple(RECIPES)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """``do``, a function of ``actions.py`` or a difference that ``rank.py`` builds in, ``at`` a point of training."""

    name: str
    at: Point
    do: str
    ends: Ends
    says: str = ""
    within: Within = "soon"
    timeout_s: float = LONG_S
    quick: tuple[str, str] | None = None
    """The transport and recipe with which it is a quick row, if there is such."""
    ddp: bool = False
    apart: bool = False
    """Whether each rank is on a host of its own: see ``apart.py``."""
    transports: tuple[str, ...] = TRANSPORTS
    recipes: tuple[str, ...] = tuple(RECIPES)
    """With which it is tried: others make no difference."""
    but: tuple[Instead, ...] = ()

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Its rows: transports and recipes."""
        return list(product(self.transports, self.recipes))

    def must(self, transport: str, recipe: str) -> tuple[Ends, str, Within, str]:
        """How ranks end, what an error says, within what time; and why, where it is not as in other rows."""
        for each in self.but:
            if transport in each.transports and recipe in each.recipes:
                return each.ends, each.says or self.says, each.within, each.why
        return self.ends, self.says, self.within, ""


SHARING = r"(sharing (forward|backward) statistics|moving statistics of step).*among ranks \[0, 1\].*Cause:"
ABSENT = r"waited \d+ s for ranks \[[01]\] to "
DIFFERENT = r"rank 1 converted another model or recipe than rank 0\. Rank 0 has \["
MIXED = r"share different layers at the same time"
BAD_FILE = r"cannot resume from their file, so no rank has loaded any.*rank 1: .*distnorm_state_1\.pt"
ANOTHER_STATE = r"2 of 2 ranks cannot resume.*the state given is of recipe"
OF_GLOO = "Connection closed|Connection reset|Broken pipe|Cause:"

IN_BUCKETS = "their layers wait for nobody: sums of all layers travel together, by name"
ALIKE = Instead(why=IN_BUCKETS, ends=("alike", "alike"), recipes=MOVING)
APART = {"apart": True, "transports": ("sockets", "gloo"), "recipes": ("sync_bn", "mabn")}
NOT_SHARED = r"transport='shm' is not available among ranks \[0, 1\]: .*host"
CLOCK = "gloo counts the time in which nobody ran"
BACKGROUND = "sums are gloo's, whose connection breaks when the last process that holds it ends"

FAULTS = (
    Fault(name="nothing", at="building", do="nothing", ends=("right", "right"), quick=("gloo", "lazy_bn")),
    # --- deaths ---
    Fault(name="SIGKILL in forward", at="forward", do="kill", ends=("error", "killed"), says=SHARING,
          quick=("shm", "sync_bn")),
    Fault(name="SIGKILL in backward", at="backward", do="kill", ends=("error", "killed"), says=SHARING,
          quick=("sockets", "sync_bn")),
    Fault(name="SIGKILL at a step's end", at="end of a step", do="kill", ends=("error", "killed"), says=SHARING),
    Fault(name="SIGKILL in backward, under DDP", at="backward", do="kill", ends=("error", "killed"), says=OF_GLOO,
          ddp=True),
    Fault(name="SIGKILL while binding", at="binding", do="kill", ends=("error", "killed"), says=ABSENT,
          within="timeout", timeout_s=3.0, quick=("gloo", "sync_bn")),
    Fault(name="SIGKILL while it saves", at="saving", do="kill_at_fsync", ends=("error", "killed"), says=SHARING,
          quick=("gloo", "mabn")),
    Fault(name="SIGKILL, and a forked child lives on", at="forward", do="kill_but_child", ends=("error", "killed"),
          says=SHARING,
          but=(Instead(why=BACKGROUND, ends=("error", "killed"), within="timeout", transports=("gloo",)),)),
    Fault(name="os._exit(0) in forward", at="forward", do="exit_0", ends=("error", "gone"), says=SHARING,
          quick=("sockets", "lazy_bn")),
    # --- stops ---
    Fault(name="SIGSTOP of one rank, longer than the timeout", at="forward", do="stop_one", ends=("error", "error"),
          says=SHARING, within="timeout", timeout_s=3.0),
    Fault(name="SIGSTOP of all ranks, longer than the timeout", at="forward", do="stop_all", ends=("right", "right"),
          timeout_s=3.0, within="timeout", but=(
              Instead(why=CLOCK, ends=("right or error", "right or error"), says="gloo", transports=("gloo",)),
              Instead(why=CLOCK, ends=("right or error", "right or error"), says="gloo", recipes=MOVING))),
    Fault(name="SIGINT while binding", at="binding", do="interrupt_while_other_is_late", ends=("error", "interrupt"),
          says=ABSENT, within="timeout", timeout_s=3.0),
    Fault(name="SIGINT in training", at="forward", do="interrupt_while_other_is_late", ends=("error", "interrupt"),
          says=SHARING),
    # --- ranks that leave ---
    Fault(name="an exception in forward", at="forward", do="fail", ends=("error", "own"), says=SHARING,
          quick=("gloo", "sync_bn")),
    Fault(name="an exception in backward", at="backward", do="fail", ends=("error", "own"), says=SHARING,
          quick=("shm", "mabn")),
    Fault(name="out of data: it ends", at="end of a step", do="leave", ends=("error", "gone"), says=SHARING,
          quick=("shm", "lazy_bn")),
    Fault(name="out of data: it waits in a barrier", at="end of a step", do="leave_for_a_barrier",
          ends=("error", "own"), says=SHARING, within="timeout", timeout_s=3.0),
    # --- ranks that differ ---
    Fault(name="another recipe", at="building", do="another_recipe", ends=("error", "error"), says=DIFFERENT,
          quick=("sockets", "mabn")),
    Fault(name="another transport", at="building", do="another_transport", ends=("error", "error"), says=DIFFERENT),
    Fault(name="one layer more", at="building", do="one_layer_more", ends=("error", "error"), says=DIFFERENT),
    Fault(name="layers of another width", at="building", do="another_width", ends=("error", "error"), says=DIFFERENT),
    Fault(name="layers of another dtype", at="building", do="another_dtype", ends=("error", "error"), says=DIFFERENT,
          quick=("gloo", "sync_bn")),
    Fault(name="layers in another order", at="forward", do="another_order", ends=("error", "error"), says=MIXED,
          quick=("sockets", "sync_bn"), but=(ALIKE,)),
    Fault(name="another branch of equal width", at="forward", do="another_branch", ends=("error", "error"),
          says=MIXED, but=(ALIKE,)),
    # --- state ---
    Fault(name="a truncated checkpoint file", at="loading", do="truncated_file", ends=("error", "error"),
          says=BAD_FILE, quick=("shm", "mabn")),
    Fault(name="an empty checkpoint file", at="loading", do="empty_file", ends=("error", "error"), says=BAD_FILE),
    Fault(name="a checkpoint file of garbage", at="loading", do="garbage_file", ends=("error", "error"), says=BAD_FILE),
    Fault(name="a checkpoint of another recipe", at="loading", do="state_of_another_recipe", ends=("error", "error"),
          says=ANOTHER_STATE),
    # --- data and kernels ---
    Fault(name="NaN in a batch", at="forward", do="poison", ends=("alike", "alike"), quick=("shm", "sync_bn")),
    Fault(name="a truncated kernel in the cache", at="building", do="truncated_kernel", ends=("right", "right")),
    *(Fault(name=name, at="building", do=do, ends=("right", "right"), transports=("shm",), recipes=("sync_bn", "mabn"))
      for name, do in (
          ("an empty kernel in the cache", "empty_kernel"),
          ("a kernel of garbage in the cache", "garbage_kernel"),
          ("somebody else's library in the cache", "foreign_kernel"),
          ("no HOME, and no entry in passwd", "no_home"),
          ("a cache that cannot be written", "no_writing"),
          ('CC="gcc -m64"', "words_in_cc"),
          ("a compile that is killed", "killed_compile"))),
    # --- ranks on hosts of their own ---
    Fault(name="nothing, between hosts", at="building", do="nothing", ends=("right", "right"), **APART),
    Fault(name="memory to share, between hosts", at="building", do="nothing", ends=("error", "error"),
          says=NOT_SHARED, apart=True, transports=("shm",), recipes=("sync_bn",)),
    Fault(name="SIGKILL in forward, between hosts", at="forward", do="kill", ends=("error", "killed"), says=SHARING,
          **APART),
    Fault(name="SIGKILL in backward, between hosts", at="backward", do="kill", ends=("error", "killed"),
          says=SHARING, **APART),
    Fault(name="SIGKILL while binding, between hosts", at="binding", do="kill", ends=("error", "killed"),
          says=ABSENT, within="timeout", timeout_s=3.0, **APART),
    Fault(name="the link of rank 1 goes down", at="forward", do="link_goes_down", ends=("error", "error"),
          says=SHARING, within="timeout", timeout_s=3.0, quick=("sockets", "sync_bn"), **APART),
    Fault(name="the packets of rank 1 are dropped", at="backward", do="packets_are_dropped", ends=("error", "error"),
          says=SHARING, within="timeout", timeout_s=3.0, **APART),
    Fault(name="a stranger connects, and says nothing", at="binding", do="let_stranger_in", ends=("right", "right"),
          **APART),
)  # fmt: skip

BY_NAME = {each.name: each for each in FAULTS}
