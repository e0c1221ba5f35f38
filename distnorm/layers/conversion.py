"""A conversion: the recipe and the layers of one call of ``convert``, and their binding to ranks.

Converting is local. Binding happens once, at the first training forward pass or in ``attach``: ranks compare what they
converted through the job's store, create the policy's groups, and copy rank 0's running statistics.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from distnorm.compat.dispatch_state import in_transform, modes_disabled
from distnorm.layers import agreement, running_statistics, saved_state
from distnorm.layers.binding import Binding
from distnorm.recipe import Recipe
from distnorm.transport import LostGroup, choice, lost, mpi
from distnorm.transport.rendezvous import group_timeout
from distnorm.transport.topology import current_world, mesh_ranks
from distnorm.types import Feeders, GlobalStatistics, Observer, Transport
from distnorm.validation import refuse_unknown_variables, shown

logger = logging.getLogger("distnorm")


class Conversion:
    """The recipe and the layers of one call of ``convert``, and their binding to ranks."""

    process_group: dist.ProcessGroup | LostGroup | None = None
    """The layers' own ``process_group``, which torch's SyncBatchNorm can have; the only ranks they share with."""

    is_provisional = False
    """Whether the constructor of a layer made it, for a norm inside, until the model around it is converted."""

    find_state: ClassVar[Callable[[Conversion], dict[str, Any] | None] | None] = None
    """Finds the saved state of layers that are about to train for the first time, if anybody looks for one."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: DeviceMesh | None,
        transport: Transport | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Start without layers and unbound."""
        self.recipe = recipe
        self.transport = choice.chosen(transport)
        self.mesh: DeviceMesh | LostGroup | None = mesh
        self.process_group = process_group
        self.feeders = Feeders()
        self._start()

    @property
    def is_bounded(self) -> bool:
        """Return whether mesh, layers or recipe name the ranks, which may then be fewer than those of the job."""
        return not (self.mesh is None and self.process_group is None and not self.facts.scope)

    def _start(self) -> None:
        self.facts = self.recipe.policy.facts
        self.guards = self.recipe.method.follows or self.facts.keeps_cotangents
        """Whether updates of running statistics skip values that are not finite. Stock batch norm does not."""
        self.observers: list[Observer] = []
        self.resume_pending = True
        self.told_of_initial_values = False
        self.loss_scale: Callable[[], Tensor | float] | None = None
        self.ends_with_backward = True
        self.optimizers: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()
        self._layers: dict[int, tuple[str, ReferenceType[_BatchNorm]]] = {}
        self._binding: Binding | None = None
        self._connected: tuple[ReferenceType[dist.ProcessGroup], tuple[int, ...]] | None = None
        """The job's group, and the ranks that the recipe's groups connect in it."""
        self._resumed: dict[str, Any] | None = None
        self._live: dict[str, list[Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the binding, and the mesh and group, which are valid in their process only."""
        mesh = LostGroup(f"its device mesh {self.mesh}") if isinstance(self.mesh, DeviceMesh) else self.mesh
        kept = {"recipe": self.recipe, "mesh": mesh, "transport": self.transport, "feeders": self.feeders}
        return {**kept, "process_group": lost(self.process_group), "is_provisional": self.is_provisional}

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversion:
        """Copy unbound, with mesh and group, which are valid in this process."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__({**self.__getstate__(), "mesh": self.mesh, "process_group": self.process_group})
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore without layers; those of the copy call ``add`` themselves."""
        self.__dict__.update(state)
        self._start()

    def add(self, index: int, name: str, layer: _BatchNorm) -> None:
        """Register ``layer`` without keeping it alive."""
        if index not in self._layers or self._layers[index][1]() is None:
            self._layers[index] = name, ref(layer)

    def layer(self, index: int) -> _BatchNorm | None:
        """Return layer number ``index``, if it is alive."""
        return self._layers[index][1]() if index in self._layers else None

    def layers(self) -> Iterator[tuple[str, _BatchNorm]]:
        """Yield names and layers, as far as they are alive, in the order of conversion."""
        for _, (name, reference) in sorted(self._layers.items()):
            layer = reference()
            if layer is not None:
                yield name, layer

    @property
    def binding(self) -> Binding | None:
        """The binding, or None before the layers are bound."""
        return self._binding

    def resume_training(self) -> None:
        """Prepare running statistics for further training after a checkpoint was loaded.

        Those of this rank's state replace the model's, which may include sums that were in flight. For methods without
        a mean, the running mean of the stock model is folded into the running variance.
        """
        running_statistics.restore(self.layers(), self._live)
        self._live = {}
        if not self.recipe.method.centred:
            running_statistics.fold_means(layer for _, layer in self.layers())
        self.resume_pending = False

    def ahead(self, name: str) -> list[GlobalStatistics] | None:
        """Return the sums in flight that have not updated the running statistics of layer ``name`` yet."""
        return None if self._binding is None or self.resume_pending else self._binding.in_flight().get(name)

    def look_for_state(self) -> None:
        """Before the layers train for the first time: load what ``find_state`` finds, unless a state was loaded."""
        find = type(self).find_state
        if find is not None and self._binding is None and self._resumed is None and not in_transform():
            with modes_disabled(), torch.no_grad():
                state = find(self)
            if state is not None:
                self.load_state_dict(state)

    def bound(self) -> Binding:
        """Return the binding to this process's job, and bind first if there is none.

        Raises:
            RuntimeError: the job to which the layers were bound has ended; ranks converted differently, do not answer,
                or are not an MPI job.
            ValueError: the policy does not fit the ranks.
        """
        world, binding = current_world(), self._binding
        if binding is not None and binding.belongs_to(world):
            return binding
        if binding is None or world is not None:
            if world is not None and in_transform():
                raise RuntimeError(
                    "distnorm: layers cannot bind to their ranks inside a transform (torch.func, forward-mode "
                    "derivatives). Call distnorm.attach(model), or run a training forward pass, before the transform."
                )
            self.bind(None)
        assert self._binding is not None
        if not self._binding.belongs_to(world):
            raise RuntimeError(
                "distnorm: the process group that these layers were bound to has been destroyed. Evaluation works. To "
                "continue training, initialize torch.distributed again, or call distnorm.revert(model)."
            )
        return self._binding

    def bind(self, process_group: dist.ProcessGroup | None) -> None:
        """Bind to the ranks of the layers' own group, else of ``process_group``, else of the mesh or the recipe.

        By default these are all ranks. Collective over them: it exchanges texts through the store, creates groups, and
        broadcasts running statistics, once per dtype. Does nothing if the layers are bound to these ranks already, so
        that windows are kept.

        Raises:
            ValueError: the environment has an unknown variable ``DISTNORM_*``.
        """
        refuse_unknown_variables(os.environ)  # layers of distnorm.nn, and copies, were never converted here
        for named in (self.mesh, self.process_group):
            if isinstance(named, LostGroup):
                raise named.refuse()
        world = current_world()
        if world is None and self.transport == "mpi":
            mpi.check_alone()
        ranks = (0,) if world is None else self._ranks(world, process_group)
        current = self._binding
        if current is not None and current.belongs_to(world) and current.topology.ranks == ranks:
            return
        self.look_for_state()
        resumed = None if self._resumed is None else self._resumed["step"]
        # The tensors created here are used after this forward pass, and outside its modes and inference mode.
        with modes_disabled(), torch.no_grad():
            mesh = self.mesh if isinstance(self.mesh, DeviceMesh) else None
            layers = list(self.layers())
            agreed = agreement.bind_policy(world, ranks, self.recipe, layers, mesh, self.transport, resumed)
            running_statistics.take_over((layer for _, layer in self.layers()), agreed.topology.everyone())
        binding = Binding(self, world, agreed)
        if len(set(agreed.resumed)) > 1:
            self._drop_state(dict(zip(ranks, agreed.resumed, strict=True)))
        if self._resumed is not None:
            self._resume(binding, self._resumed)
        elif self.facts.keeps_cotangents:
            logger.info("distnorm: moving statistics start cold")
        self._binding = binding

    def state_dict(self) -> dict[str, Any]:
        """Return the state with which this rank resumes bit for bit. Waits for collectives in flight."""
        binding = self.bound()
        binding.finish_step()
        place = {"rank": binding.topology.rank, "world_size": len(binding.topology.ranks)}
        kept: dict[str, Any] = {}
        if self.feeders.left or self.feeders.feeds:
            kept["feeders"] = [sorted(self.feeders.left), self.feeders.feeds]
        if not self.facts.always_global:
            # Those in the model's state_dict may include sums in flight, with which a resumed run updates them later.
            kept["running"] = running_statistics.snapshot(self.layers())
        header = saved_state.header(self.recipe, list(self.layers()))
        return {**header, **place, **kept, "step": binding.step, "reducer": binding.reducer.state_dict()}

    def check_state(self, state: object) -> None:
        """Raise a ValueError that says where ``state`` does not fit, unless ``load_state_dict`` can load it."""
        saved_state.check(state, self.recipe, list(self.layers()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from ``state``, which ``check_state`` has accepted, now or when the layers are bound."""
        self._resumed = state
        if "feeders" in state:
            left, feeds = state["feeders"]
            self.feeders.known, self.feeders.left, self.feeders.feeds = True, frozenset(left), feeds
        self._live, self.resume_pending = state.get("running", {}), True
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
                "distnorm: rank %d of %d starts warm from the state of rank %d of %d: it has the shared part of the "
                "window, without that rank's local part",
                *here,
                state["rank"],
                state["world_size"],
            )

    # docs/decisions.md#ranks-resume-one-step
    def _drop_state(self, steps: dict[int, int | None]) -> None:
        """Start cold, since ranks resume different ``steps``. What is known of feeders stays: ranks join that later."""
        self._resumed, self._live = None, {}
        ranks_at = {step: [rank for rank in steps if steps[rank] == step] for step in dict.fromkeys(steps.values())}
        told = (f"ranks {shown(ranks)} {_state_of(step)}" for step, ranks in ranks_at.items())
        logger.warning(
            "distnorm: all ranks start without a saved state, since they do not resume from one step: %s. Load the "
            "state on every rank.",
            ", ".join(told),
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


def _state_of(step: int | None) -> str:
    return "have none" if step is None else f"have one of step {step}"
