"""From a conversion to ranks: which layers it has, which groups they use, and whether all ranks agree on both.

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

from distnorm import agreement, running
from distnorm.boundary import NO_BACKWARD, at_end_of_backward, graph_task
from distnorm.ddp import Broadcasts
from distnorm.grid import Recipe
from distnorm.surroundings import transforming, unseen
from distnorm.transport import LostGroup, lost, mpi
from distnorm.transport.rendezvous import group_timeout, tell_and_collect
from distnorm.transport.topology import current_world, mesh_ranks
from distnorm.types import EVERY_LAYER, Feeders, Landed, Observer, Slot, Transport

logger = logging.getLogger("distnorm")


class Binding:
    """A conversion at work among real ranks."""

    def __init__(self, conversion: Conversion, world: dist.ProcessGroup | None, met: agreement.Meeting) -> None:
        """``world`` is the job that the groups belong to, None in a process that is alone."""
        self.conversion = conversion
        self._world = None if world is None else ref(world)  # weakly, as ``TorchGroup`` holds its group
        self.topology, self.reducer = met.topology, met.reducer
        self.agrees = met.agrees
        """Whether running statistics are equal on all data-parallel ranks without further communication."""
        self.step = self._passes = 0
        self._boundary_queued = self._warned = False
        self._first_pass: int | None = None
        self._used: set[str] = set()
        self.loss_scale: Tensor | float = 0.0  # of the last backward pass
        self._scaled_pass = self._judged_pass = NO_BACKWARD
        self._in_flight: dict[str, Landed] | None = None
        self._broadcasts = Broadcasts(conversion.layers, () if conversion.is_bounded else met.topology.ranks)

    def belongs_to(self, world: dist.ProcessGroup | None) -> bool:
        """Whether ``world`` is the job that the groups belong to."""
        return world is None if self._world is None else self._world() is world is not None

    def tell(self, text: str) -> list[str]:
        """What every rank told, in order. Collective over the ranks; no tensors move.

        Raises:
            RuntimeError: some ranks told nothing within the timeout; the message names them.
        """
        timeout = self.topology.timeout
        return [text] if timeout is None else tell_and_collect(self.topology.ranks, text, timeout)

    def forward_begins(self, layer: str) -> None:
        """Outside of a backward pass nothing can be queued; a queue left by a pass that raised is forgotten.

        Training goes on, so stock running statistics that were loaded must now mean what the method tracks.
        """
        self._boundary_queued = False
        if layer in self._used:
            self._end_skipped_step()
        self._broadcasts.forward_begins(layer)
        if self.conversion.means_to_fold:
            with unseen():  # by modes: no part of the forward
                self.conversion.training_goes_on()

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
        with unseen():
            if scale() < self.loss_scale:
                self.end_step()

    def note_use(self, layer: str) -> None:
        """Watch for a second forward of ``layer`` in one step, which a window cannot tell from a missed step."""
        if layer in self._used and not self._warned and self.conversion.ends_with_backward:
            self._warned = True
            if self.conversion.facts.keeps_cotangents:
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
        slot = Slot(EVERY_LAYER, "forward", self.step, observers=observers, passes=passes)
        with torch.inference_mode(False):
            landed = self.reducer.end_step(slot)
        self.step += 1
        self._in_flight = None
        running.absorb_all(dict(self.conversion.layers()), landed, self.conversion.recipe.method)

    def in_flight(self) -> dict[str, Landed]:
        """By layer, what the last step sent and the running statistics have not absorbed yet; waits for it once.

        No collective: every rank that ends the same steps has sent its part.
        """
        if self._in_flight is None:
            self._in_flight = {each.layer: each for each in self.reducer.in_flight()}
        return self._in_flight

    def forget_in_flight(self) -> None:
        """Running statistics are estimated anew, without gradients: what the last step sent is no part of them."""
        self._in_flight = {}

    def load(self, state: dict[str, Any], *, own: bool) -> None:
        """Go on from a ``Conversion.state_dict``, this rank's ``own`` or another's."""
        self.reducer.load_state_dict(state["reducer"], own=own)
        self.step = state["step"]
        self._in_flight = None


class Conversion:
    """One call of ``convert``: its recipe and its layers, and their binding once there is one."""

    process_group: dist.ProcessGroup | LostGroup | None = None
    """The group that the layers themselves name, as torch's SyncBatchNorm may: nothing is shared beyond it."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: DeviceMesh | None,
        transport: Transport = "torch",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """No layers yet, and no ranks."""
        self.recipe = recipe
        self.transport = transport
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
        self.means_to_fold = False
        running.restore(self.layers(), self._live)
        self._live = {}
        if not self.recipe.method.centred:
            running.fold_means(layer for _, layer in self.layers())

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
            running.take_over((layer for _, layer in self.layers()), met.topology.everyone())
        self._binding = Binding(self, world, met)
        if self._resumed is not None:
            self._resume(self._binding, self._resumed)
        elif self.facts.keeps_cotangents:
            logger.info("distnorm: moving statistics start cold")

    def state_dict(self) -> dict[str, Any]:
        """What the policy needs to go on as if nothing had happened, of this rank. Waits for what is in flight."""
        binding = self.bound()
        place = {"rank": binding.topology.rank, "world_size": len(binding.topology.ranks)}
        kept: dict[str, Any] = {}
        if self.feeders.left or self.feeders.feeds:
            kept["feeders"] = [sorted(self.feeders.left), self.feeders.feeds]
        if not self.facts.always_lands:
            # A model's state_dict may have absorbed what a run that goes on from here has yet to absorb.
            kept["running"] = running.snapshot(self.layers())
        return {**place, **kept, "step": binding.step, "reducer": binding.reducer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, now or when the layers are bound."""
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
