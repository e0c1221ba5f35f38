"""From a conversion to ranks: which layers it has, which groups they use, and whether all ranks agree on both.

Converting is local. Binding happens once, at the first training forward or by ``attach``: ranks compare what they
converted through the job's store, make the policy's groups, and take over rank 0's running statistics.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from distnorm import running
from distnorm.boundary import NO_BACKWARD, at_end_of_backward, graph_task
from distnorm.ddp import Broadcasts
from distnorm.grid import Recipe
from distnorm.layout import layout_of
from distnorm.policies import Reducer
from distnorm.transport import LostGroup, Topology, mpi
from distnorm.transport.rendezvous import group_timeout, tell_and_collect
from distnorm.transport.topology import current_world, mesh_ranks, node_id
from distnorm.types import EVERY_LAYER, Observer, Slot, Transport

logger = logging.getLogger("distnorm")


class Binding:
    """A conversion at work among real ranks."""

    def __init__(
        self, conversion: Conversion, world: dist.ProcessGroup | None, topology: Topology, reducer: Reducer
    ) -> None:
        """``world`` is the job that the groups belong to, None in a process that is alone."""
        self.conversion = conversion
        self._world = None if world is None else ref(world)  # weakly, as ``TorchGroup`` holds its group
        self.topology = topology
        self.reducer = reducer
        self.step = self._passes = 0
        self._boundary_queued = self._warned = False
        self._first_pass: int | None = None
        self._used: set[str] = set()
        self.loss_scale: Tensor | float = 0.0  # of the last backward pass
        self._scaled_pass = self._judged_pass = NO_BACKWARD
        implied = conversion.mesh is None and conversion.recipe.policy.scope is None
        self._broadcasts = Broadcasts(conversion.layers, topology.ranks if implied else ())

    def belongs_to(self, world: dist.ProcessGroup | None) -> bool:
        """Whether ``world`` is the job that the groups belong to."""
        return world is None if self._world is None else self._world() is world is not None

    @property
    def agrees(self) -> bool:
        """Whether running statistics are equal on all data-parallel ranks without further communication."""
        return self.reducer.size == len(self.topology.ranks)

    def forward_begins(self, layer: str) -> None:
        """Outside of a backward pass nothing can be queued; a queue left by a pass that raised is forgotten.

        Training goes on, so stock running statistics that were loaded must now mean what the method tracks.
        """
        self._boundary_queued = False
        if layer in self._used:
            self._end_skipped_step()
        self._broadcasts.forward_begins(layer)
        if self.conversion.means_to_fold:
            self.conversion.means_to_fold = False
            if not self.conversion.recipe.method.centred:
                running.fold_means(layer for _, layer in self.conversion.layers())

    def loss_scale_of_pass(self) -> Tensor | float:
        """The factor of the loss; asked for once per backward pass, as a GradScaler makes the host wait for a GPU."""
        ask = self.conversion.loss_scale
        if ask is None:
            return 1.0
        if graph_task() == NO_BACKWARD or graph_task() != self._scaled_pass:
            scale = ask()
            self.loss_scale = scale.clone() if isinstance(scale, Tensor) else scale  # scalers change theirs in place
            self._scaled_pass = graph_task()
        return self.loss_scale

    def _end_skipped_step(self) -> None:
        """A loss scale that fell says that the optimizer skipped a step: end it, or its NaN would enter the next.

        Asked once after every backward pass, as in ``loss_scale_of_pass``.
        """
        scale, judged = self.conversion.loss_scale, self._judged_pass
        self._judged_pass = self._scaled_pass
        if scale is None or self.conversion.ends_with_backward or judged == self._scaled_pass:
            return
        if scale() < self.loss_scale:
            self.end_step()

    def note_use(self, layer: str) -> None:
        """Watch for a second forward of ``layer`` in one step, which a window cannot tell from a missed step."""
        if layer in self._used and not self._warned and self.conversion.ends_with_backward:
            self._warned = True
            if self.conversion.recipe.policy.keeps_cotangents:
                logger.warning(
                    "distnorm: %s ran twice in one step; its calls share one window. If these were separate steps, or "
                    "one optimizer step over several backward passes, say so: distnorm.attach(model, optimizer=...).",
                    layer,
                )
        self._used.add(layer)

    def expect_boundary(self) -> None:
        """End the step when the outermost backward pass of this thread ends.

        Called inside a backward pass. The reentrant checkpoint's nested pass comes after its recomputation, which
        has queued the boundary at the outer pass already.
        """
        if self.conversion.ends_with_backward and not self._boundary_queued:
            self._boundary_queued = True
            self._first_pass = graph_task() if self._first_pass is None else self._first_pass
            self._passes = graph_task() - self._first_pass
            at_end_of_backward(self.end_step)

    def end_step(self) -> None:
        """Let the policy send and receive, and the running statistics absorb what landed.

        Raises:
            RuntimeError: another rank did not take part within the timeout.
        """
        self._boundary_queued = False
        self._used.clear()
        passes = self._passes if self.conversion.ends_with_backward else 0
        observers = tuple(self.conversion.observers)
        landed = self.reducer.end_step(Slot(EVERY_LAYER, "forward", self.step, observers=observers, passes=passes))
        self.step += 1
        running.absorb_landed(dict(self.conversion.layers()), landed, self.conversion.recipe.method)


class Conversion:
    """One call of ``convert``: its recipe and its layers, and their binding once there is one."""

    def __init__(self, recipe: Recipe, mesh: DeviceMesh | None, transport: Transport = "torch") -> None:
        """No layers yet, and no ranks."""
        self.recipe = recipe
        self.transport = transport
        self.mesh: DeviceMesh | LostGroup | None = mesh
        self._start()

    def _start(self) -> None:
        self.observers: list[Observer] = []
        self.means_to_fold = True
        self.loss_scale: Callable[[], Tensor | float] | None = None
        self.ends_with_backward = True
        self.optimizers: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()
        self._layers: dict[int, tuple[str, ReferenceType[_BatchNorm]]] = {}
        self._binding: Binding | None = None
        self._resumed: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies are unbound; a mesh belongs to its process."""
        mesh = LostGroup(f"its device mesh {self.mesh}") if isinstance(self.mesh, DeviceMesh) else self.mesh
        return {"recipe": self.recipe, "mesh": mesh, "transport": self.transport}

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversion:
        """Within a process the mesh stays valid."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__({**self.__getstate__(), "mesh": self.mesh})
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's layers register themselves."""
        self.__dict__.update(state)
        self._start()

    def add(self, index: int, name: str, layer: _BatchNorm) -> None:
        """Register ``layer`` without keeping it alive."""
        if index not in self._layers or self._layers[index][1]() is None:
            self._layers[index] = name, ref(layer)

    def layers(self) -> Iterator[tuple[str, _BatchNorm]]:
        """Names and layers, those still alive, in the order of conversion."""
        for _, (name, reference) in sorted(self._layers.items()):
            layer = reference()
            if layer is not None:
                yield name, layer

    def bound(self) -> Binding:
        """The binding to this process's job; made now if there is none.

        Raises:
            RuntimeError: the job that the layers were bound to is gone; ranks differ, do not answer, or are no MPI job.
            ValueError: the policy does not fit the ranks.
        """
        world = current_world()
        if self._binding is None or (world is not None and not self._binding.belongs_to(world)):
            self.bind(None)
        assert self._binding is not None
        if not self._binding.belongs_to(world):
            raise RuntimeError(
                "distnorm: the process group that these layers were bound to has been destroyed. Evaluation works; to "
                "go on training, initialize torch.distributed again, or call distnorm.revert(model)."
            )
        return self._binding

    def bind(self, process_group: dist.ProcessGroup | None) -> None:
        """Bind to the ranks of ``process_group``; None means those that recipe and mesh imply, else all.

        Collective over these ranks: an exchange of texts through the store, the making of groups, and one broadcast
        of running statistics per dtype. Nothing happens if it is bound to them already: windows go on.
        """
        if isinstance(self.mesh, LostGroup):
            raise self.mesh.refuse()
        world = current_world()
        if world is None and self.transport == "mpi":
            mpi.check_alone()
        ranks = (0,) if world is None else self._ranks(process_group)
        standing = self._binding
        if standing is not None and standing.belongs_to(world) and standing.topology.ranks == ranks:
            return
        layout = layout_of(self.layers(), self.recipe.method)
        topology = Topology(ranks) if world is None else self._agree(world, ranks, layout.device)
        reducer = self.recipe.policy.bind(topology, layout)
        running.take_over((layer for _, layer in self.layers()), topology.everyone())
        self._binding = Binding(self, world, topology, reducer)
        if self._resumed is not None:
            self._resume(self._binding, self._resumed)
        elif self.recipe.policy.keeps_cotangents:
            logger.info("distnorm: moving statistics start cold")

    def state_dict(self) -> dict[str, Any]:
        """What the policy needs to go on as if nothing had happened, of this rank. Waits for what is in flight."""
        binding = self.bound()
        place = {"rank": binding.topology.rank, "world_size": len(binding.topology.ranks)}
        return {**place, "step": binding.step, "reducer": binding.reducer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, now or when the layers are bound."""
        self._resumed = state
        if self._binding is not None:
            self._resume(self._binding, state)

    def _resume(self, binding: Binding, state: dict[str, Any]) -> None:
        here = binding.topology.rank, len(binding.topology.ranks)
        own = here == (state["rank"], state["world_size"])
        binding.reducer.load_state_dict(state["reducer"], own=own)
        binding.step = state["step"]
        self._resumed = None
        if not own and self.recipe.policy.keeps_cotangents:
            logger.info(
                "distnorm: rank %d of %d starts warm from the state of rank %d of %d: the shared window is kept, that "
                "rank's own part of it is not",
                *here,
                state["rank"],
                state["world_size"],
            )

    def _ranks(self, process_group: dist.ProcessGroup | None) -> tuple[int, ...]:
        scope = process_group if process_group is not None else self.recipe.policy.scope
        if isinstance(self.mesh, DeviceMesh) and process_group is None:
            return mesh_ranks(self.mesh, self.mesh.mesh_dim_names or ())
        if isinstance(scope, LostGroup):
            raise scope.refuse()
        return tuple(range(dist.get_world_size()) if scope is None else dist.get_process_group_ranks(scope))

    def _agree(self, world: dist.ProcessGroup, ranks: tuple[int, ...], device: torch.device) -> Topology:
        timeout = group_timeout(world)
        place = mpi.place(device) if self.transport == "mpi" else None
        mine = {"node": node_id(), "converted": self._fingerprint(), "device": device.type, "mpi": place}
        told = [json.loads(text) for text in tell_and_collect(ranks, json.dumps(mine), timeout)]
        for rank, other in zip(ranks, told, strict=True):
            _compare(ranks[0], told[0]["converted"], rank, other["converted"])
        mesh = self.mesh if isinstance(self.mesh, DeviceMesh) else None
        nodes = tuple(other["node"] for other in told)
        places = mpi.check_places(ranks, [other["mpi"] for other in told]) if self.transport == "mpi" else None
        on_cpu = all(other["device"] in ("cpu", "meta") for other in told)
        return Topology(ranks, mesh=mesh, nodes=nodes, timeout=timeout, mpi=places, on_cpu=on_cpu)

    def _fingerprint(self) -> list[str]:
        lines = [repr(self.recipe), f"transport={self.transport!r}"]
        for name, layer in self.layers():
            lines.append(f"{name}: {layer.num_features} features, eps={layer.eps}, momentum={layer.momentum}")
        return lines


def _compare(first: int, expected: list[str], rank: int, given: list[str]) -> None:
    if given == expected:
        return
    for line, other in zip_longest(expected, given, fillvalue="nothing"):
        if line != other:
            raise RuntimeError(
                f"distnorm: rank {rank} converted another model or recipe than rank {first}. Rank {first} has "
                f"[{line}] where rank {rank} has [{other}]. Build and convert the model alike on every rank that "
                "shares statistics, or bind each set of ranks with distnorm.attach(model, process_group=...)."
            )
