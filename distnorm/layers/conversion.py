"""One call of ``convert``: its recipe and its layers, and their binding to ranks once there is one.

Converting is local. Binding happens once, at the first training forward or by ``attach``: ranks compare what they
converted through the job's store, make the policy's groups, and take over rank 0's running statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from distnorm.compat.dispatch_state import transforming, unseen
from distnorm.layers import agreement, running_statistics, saved_state
from distnorm.layers.binding import Binding
from distnorm.recipe import Recipe
from distnorm.transport import LostGroup, choice, lost, mpi
from distnorm.transport.rendezvous import group_timeout
from distnorm.transport.topology import current_world, mesh_ranks
from distnorm.types import Feeders, Landed, Observer, Transport

logger = logging.getLogger("distnorm")


class Conversion:
    """One call of ``convert``: its recipe and its layers, and their binding once there is one."""

    process_group: dist.ProcessGroup | LostGroup | None = None
    """The group that the layers themselves name, as torch's SyncBatchNorm may: nothing is shared beyond it."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: DeviceMesh | None,
        transport: Transport | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """No layers yet, and no ranks."""
        self.recipe = recipe
        self.transport = choice.chosen(transport)
        self.mesh: DeviceMesh | LostGroup | None = mesh
        self.process_group = process_group
        self.feeders = Feeders()
        self._start()

    @property
    def is_bounded(self) -> bool:
        """Whether mesh, layers or recipe say which ranks this concerns: fewer than the job's, maybe."""
        return not (self.mesh is None and self.process_group is None and not self.facts.scope)

    def _start(self) -> None:
        self.facts = self.recipe.policy.facts
        self.guards = self.recipe.method.follows or self.facts.keeps_cotangents
        """Whether running statistics never absorb what is not finite: others do, as stock batch norm does."""
        self.observers: list[Observer] = []
        self.means_to_fold = True
        self.loss_scale: Callable[[], Tensor | float] | None = None
        self.ends_with_backward = True
        self.optimizers: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()
        self._layers: dict[int, tuple[str, ReferenceType[_BatchNorm]]] = {}
        self._binding: Binding | None = None
        self._connected: tuple[ReferenceType[dist.ProcessGroup], tuple[int, ...]] | None = None
        """The ranks that the recipe's groups connect, and the job in which that was asked."""
        self._resumed: dict[str, Any] | None = None
        self._live: dict[str, list[Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies are unbound; a mesh and a group belong to their process."""
        mesh = LostGroup(f"its device mesh {self.mesh}") if isinstance(self.mesh, DeviceMesh) else self.mesh
        kept = {"recipe": self.recipe, "mesh": mesh, "transport": self.transport, "feeders": self.feeders}
        return {**kept, "process_group": lost(self.process_group)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversion:
        """Within a process mesh and group stay valid."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__({**self.__getstate__(), "mesh": self.mesh, "process_group": self.process_group})
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's layers register themselves."""
        self.__dict__.update(state)
        self._start()

    def add(self, index: int, name: str, layer: _BatchNorm) -> None:
        """Register ``layer`` without keeping it alive."""
        if index not in self._layers or self._layers[index][1]() is None:
            self._layers[index] = name, ref(layer)

    def layer(self, index: int) -> _BatchNorm | None:
        """Layer number ``index``, if it is alive."""
        return self._layers[index][1]() if index in self._layers else None

    def layers(self) -> Iterator[tuple[str, _BatchNorm]]:
        """Names and layers, those still alive, in the order of conversion."""
        for _, (name, reference) in sorted(self._layers.items()):
            layer = reference()
            if layer is not None:
                yield name, layer

    @property
    def binding(self) -> Binding | None:
        """The binding, if there is one."""
        return self._binding

    def training_goes_on(self) -> None:
        """Running statistics that were loaded must now be what this process had, and mean what the method tracks."""
        running_statistics.restore(self.layers(), self._live)
        self._live = {}
        if not self.recipe.method.centred:
            running_statistics.fold_means(layer for _, layer in self.layers())
        self.means_to_fold = False

    def ahead(self, name: str) -> Landed | None:
        """What running statistics of layer ``name`` have yet to absorb of the steps that ended, if training goes on."""
        return None if self._binding is None or self.means_to_fold else self._binding.in_flight().get(name)

    def bound(self) -> Binding:
        """The binding to this process's job; made now if there is none.

        Raises:
            RuntimeError: the job that the layers were bound to is gone; ranks differ, do not answer, or are no MPI job.
            ValueError: the policy does not fit the ranks.
        """
        world = current_world()
        if self._binding is None or (world is not None and not self._binding.belongs_to(world)):
            if world is not None and transforming():
                raise RuntimeError(
                    "distnorm: ranks cannot meet inside of a transform (torch.func, forward-mode derivatives). Call "
                    "distnorm.attach(model), or run a training forward, before it."
                )
            self.bind(None)
        assert self._binding is not None
        if not self._binding.belongs_to(world):
            raise RuntimeError(
                "distnorm: the process group that these layers were bound to has been destroyed. Evaluation works; to "
                "go on training, initialize torch.distributed again, or call distnorm.revert(model)."
            )
        return self._binding

    def bind(self, process_group: dist.ProcessGroup | None) -> None:
        """Bind to the ranks of the layers' own group, else of ``process_group``, else those of the mesh or the recipe.

        Collective over these ranks, which are all by default: exchanges of texts through the store, the making of
        groups, and one broadcast of running statistics per dtype. Nothing happens if it is bound to them already:
        windows go on.
        """
        for named in (self.mesh, self.process_group):
            if isinstance(named, LostGroup):
                raise named.refuse()
        world = current_world()
        if world is None and self.transport == "mpi":
            mpi.check_alone()
        ranks = (0,) if world is None else self._ranks(world, process_group)
        standing = self._binding
        if standing is not None and standing.belongs_to(world) and standing.topology.ranks == ranks:
            return
        # What is made here outlives a forward, its modes and its inference mode.
        with unseen(), torch.no_grad():
            mesh = self.mesh if isinstance(self.mesh, DeviceMesh) else None
            met = agreement.meet(world, ranks, self.recipe, list(self.layers()), mesh, self.transport)
            running_statistics.take_over((layer for _, layer in self.layers()), met.topology.everyone())
        binding = Binding(self, world, met)
        if self._resumed is not None:
            self._resume(binding, self._resumed)
        elif self.facts.keeps_cotangents:
            logger.info("distnorm: moving statistics start cold")
        self._binding = binding

    def state_dict(self) -> dict[str, Any]:
        """What the policy needs to go on as if nothing had happened, of this rank. Waits for what is in flight."""
        binding = self.bound()
        place = {"rank": binding.topology.rank, "world_size": len(binding.topology.ranks)}
        kept: dict[str, Any] = {}
        if self.feeders.left or self.feeders.feeds:
            kept["feeders"] = [sorted(self.feeders.left), self.feeders.feeds]
        if not self.facts.always_global:
            # A model's state_dict may have absorbed what a run that goes on from here has yet to absorb.
            kept["running"] = running_statistics.snapshot(self.layers())
        belonging = saved_state.belonging(self.recipe, list(self.layers()))
        return {**belonging, **place, **kept, "step": binding.step, "reducer": binding.reducer.state_dict()}

    def check_state(self, state: object) -> None:
        """Raise a ValueError that says where ``state`` does not fit, unless ``load_state_dict`` can take it."""
        saved_state.check(state, self.recipe, list(self.layers()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, which ``check_state`` has passed, now or when the layers are bound."""
        self._resumed = state
        if "feeders" in state:
            left, feeds = state["feeders"]
            self.feeders.known, self.feeders.left, self.feeders.feeds = True, frozenset(left), feeds
        self._live, self.means_to_fold = state.get("running", {}), True
        if self._binding is not None:
            self._resume(self._binding, state)

    def _resume(self, binding: Binding, state: dict[str, Any]) -> None:
        here = binding.topology.rank, len(binding.topology.ranks)
        own = here == (state["rank"], state["world_size"])
        with torch.inference_mode(False):
            binding.load(state, own=own)
        self._resumed = None
        if not own and self.facts.keeps_cotangents:
            logger.info(
                "distnorm: rank %d of %d starts warm from the state of rank %d of %d: the shared window is kept, that "
                "rank's own part of it is not",
                *here,
                state["rank"],
                state["world_size"],
            )

    def _ranks(self, world: dist.ProcessGroup, process_group: dist.ProcessGroup | None) -> tuple[int, ...]:
        if self.process_group is not None:
            return agreement.ranks_of([self.process_group])[0]
        if process_group is not None:
            return tuple(dist.get_process_group_ranks(process_group))
        if isinstance(self.mesh, DeviceMesh):
            return mesh_ranks(self.mesh, self.mesh.mesh_dim_names or ())
        groups = agreement.ranks_of(self.facts.scope)
        if not groups:
            return tuple(range(dist.get_world_size()))
        if self._connected is None or self._connected[0]() is not world:
            self._connected = ref(world), agreement.ranks_within(groups, group_timeout(world))
        return self._connected[1]
