"""The connection of one forward to the policy, as differentiable communication.

On the plain path two Functions are conjugate at every order. ``ReduceForward`` sends a vector through the policy, and
its derivative is ``ReduceBackward``. ``ReduceBackward`` is the identity, and its derivative sends the cotangent through
the policy, which is ``ReduceForward`` again. Between the two are only values that are equal on all sharing ranks, and
no trainable parameter::

    local sums -> ReduceForward -> shared means -> link -> ReduceBackward -> theta -> local outputs

docs/autograd.md derives why this gives the gradient of the joined batch at first and second order, with one collective
per direction. Kernels, which know their derivative, call ``gather`` and ``scatter``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distnorm.autograd.engine import NO_BACKWARD, backward_may_follow, graph_task, repeating
from distnorm.autograd.normalize import affine_step
from distnorm.autograd.recompute import Record
from distnorm.autograd.share import divisor, payload_of
from distnorm.compat.dispatch_state import in_transform
from distnorm.layers.binding import Binding
from distnorm.layers.reductions import MaxForward, ReduceBackward, ReduceForward
from distnorm.layers.site import Site
from distnorm.methods import ChannelAffine, Layer
from distnorm.methods.base import identity
from distnorm.types import Direction, Future, Link, Op, Slot

NOW = -1
"""The step of a compiled graph, which is unknown while tracing."""


# docs/decisions.md#one-line-from-a-layer-to-its-policy
class Line:
    """The connection of one forward to the policy; see ``autograd.share.Exchange``. ``open_line`` makes a bound one."""

    def __init__(
        self,
        site: Site,
        binding: Binding | None,
        step: int,
        *,
        opaque: bool,
        learning: bool | None = None,
        values: int = 0,
    ) -> None:
        """Connect the layer of ``site`` in training step ``step``, with so many ``values`` per channel.

        ``binding``: None in a compiled graph and for fake tensors, which reach ranks through operators only, if at all.
        ``opaque``: the plain path shares through operators. ``learning``: a backward may follow; None asks the engine.
        """
        self.site, self._binding, self._step, self._values = site, binding, step, values
        self.opaque = opaque
        self.learning = backward_may_follow() if learning is None else learning
        self._builds_graph = torch.is_grad_enabled()  # never so inside a Function's forward
        self.shared: dict[str, Tensor] = {}
        self._records: list[Record] = []

    def __call__(
        self, sums: Tensor, weight: Tensor | float, link: Link = identity, *, name: str = "", op: Op = "sum"
    ) -> tuple[Tensor, Tensor]:
        """Return ``(link(shared sums / shared weight), shared weight)``, as ``methods.Share`` says, float64.

        Uses the policy once in the forward pass, and once in the backward pass if ``sums`` or ``weight`` need a
        gradient.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and in_transform():
            raise self.refusal()
        sums = sums.double()
        way = (name, self.number() if self.opaque else None, None if compiling else self)
        payload = payload_of(sums, weight, self._values)
        many = sums.numel()
        if op == "max":
            shared = MaxForward.apply(sums.flatten(), payload[many:].detach(), *way, self.learning)
        else:
            shared = ReduceForward.apply(payload, None, *way, self.learning)
        self.shared[name] = shared.detach()
        total = shared[-1].detach()
        first = shared[:many].view_as(sums)
        if not isinstance(weight, Tensor):
            return ReduceBackward.apply(link(first / divisor(total)), total, *way), total
        if op == "max":
            return ReduceBackward.apply(link(first), total, *way), shared[many:-1].detach().view_as(weight)
        return self._with_weight(first, shared[many:-1].view_as(weight), link, total, way)

    def _with_weight(
        self, sums: Tensor, weight: Tensor, link: Link, total: Tensor, way: tuple[str, Tensor | None, Line | None]
    ) -> tuple[Tensor, Tensor]:
        """Return theta and the weight, whose cotangents are shared together: that of weight / total, as of a mean."""
        theta = link(sums / divisor(weight))
        both = torch.cat((theta.flatten(), weight.flatten() / divisor(total)))
        theta_, weight_ = ReduceBackward.apply(both, total, *way).split((theta.numel(), weight.numel()))
        return theta_.view_as(theta), weight_.view_as(weight) * total

    def affine(self, x_NCL: Tensor, core: ChannelAffine, layer: Layer) -> Tensor:
        """Normalize by ``core``, with the kernels if possible."""
        return affine_step(core, x_NCL, self, layer, plain=not self.opaque)

    def number(self) -> Tensor:
        """Return the number by which operators find the layer."""
        return self.site.number if torch.compiler.is_compiling() else self.site.scalar()

    def refusal(self) -> RuntimeError:
        """Return the error for transforms, which do not reach other ranks."""
        return RuntimeError(
            f"{self.site.name}: statistics that ranks or steps share cannot pass a transform (torch.func.grad, "
            "vmap, jvp, forward-mode derivatives, is_grads_batched=True, vectorize=True) or torch.jit.trace. Use "
            "autograd's backward pass, one gradient at a time, or a recipe that shares nothing, such as local_bn; or "
            "call eval() first."
        )

    def gather(
        self, payload: Tensor, *, in_graph: bool, has_two_values: bool = False, name: str = "", op: Op = "sum"
    ) -> Tensor:
        """Return the shared sums and count. Uses the policy once, or not at all in a recomputation.

        Raises:
            ValueError: 1 value per channel over all sharing ranks.
        """
        binding = self._binding
        assert binding is not None, "operators and kernels run on a line that is bound"
        record = self._recall(payload, name, op) if repeating() else None
        if record is not None:
            record.repeated = True
            # A reentrant checkpoint: its cotangents come in a nested pass, whose end is not the end of the step.
            if not record.in_graph:
                binding.expect_boundary()
        else:
            record = self._share(binding, payload, in_graph and self._builds_graph, has_two_values, name, op)
        # The graph keeps this line and its records alive, as long as a checkpoint may recompute this forward.
        self._records.append(record)
        self.shared[name] = record.shared
        return record.shared

    def _recall(self, payload: Tensor, name: str, op: Op) -> Record | None:
        core = self.site.core
        kinds = core.kinds if core is not None and not name else 1
        return self.site.records[name].recall(_identifying(payload, op), kinds)

    def _share(
        self, binding: Binding, payload: Tensor, in_graph: bool, has_two_values: bool, name: str, op: Op
    ) -> Record:
        site = self.site
        slot = self._slot = self._slot_of(binding, "forward", learning=self.learning, name=name, op=op)
        if self.learning:
            binding.note_use(site.name, name)
        else:
            binding.forget_in_flight()
        try:
            shared = binding.reducer.reduce(payload, slot)
        except RuntimeError as error:
            raise self._failed(binding, "forward", error) from error
        if not has_two_values and binding.reducer.completeness(slot).is_counted:
            # A policy that shares nothing in this step returns ``payload`` itself.
            site.check_count(shared[-1], 1 if shared is payload else binding.reducer.size)
        record = Record(payload if op == "sum" else _identifying(payload, op), shared, slot.step, in_graph=in_graph)
        site.records[name].note(record)
        return record

    def updates_running(self) -> bool:
        """Return whether the gathered sums are to update the running statistics: global, and not used before."""
        assert self._binding is not None, "it has gathered"
        return not self._records[-1].repeated and self._binding.reducer.completeness(self._slot).is_global

    def step_is_global(self) -> bool:
        """Return whether statistics of this step are global, so that they may update the running statistics."""
        assert self._binding is not None, "operators run on a line that is bound"
        slot = self._slot_of(self._binding, "forward", learning=self.learning)
        return self._binding.reducer.completeness(slot).is_global

    def scatter(self, cotangents: Tensor) -> Future:
        """Start sharing the cotangents, and return a future of the result. Uses the policy once."""
        return self.start_cotangents(cotangents, self.shared[""][-1], learning=True)

    def start_cotangents(self, payload: Tensor, count: Tensor, *, learning: bool, name: str = "") -> Future:
        """Start sharing the cotangents of a forward that got ``count``, and return a future of the result.

        ``learning``: false while a graph is built (``create_graph=True``), since that pass ends no step.

        Raises:
            RuntimeError: second derivatives of a policy whose cotangents outlive their step.
        """
        conversion = self.site.conversion
        binding, keeps = conversion.bound(), conversion.facts.keeps_cotangents
        if keeps and not learning:
            raise RuntimeError(
                f"{self.site.name}: {conversion.recipe.policy} averages cotangents over steps, so there is no second "
                "derivative (create_graph=True). Use an exact recipe such as sync_bn for this layer."
            )
        if learning and graph_task() != NO_BACKWARD:
            binding.expect_boundary()
        scale = binding.loss_scale_of_pass() if keeps else 1.0
        slot = self._slot_of(binding, "backward", learning=learning, count=count, scale=scale, name=name)
        try:
            answer = binding.reducer.start(payload, slot)
        except RuntimeError as error:
            raise self._failed(binding, "backward", error) from error

        def wait() -> Tensor:
            try:
                return answer.wait()
            except RuntimeError as error:
                raise self._failed(binding, "backward", error) from error

        return Future(wait)

    def for_recomputation(self, *, opaque: bool = False) -> Line:
        """Return a line for a repetition inside a backward pass, which gets its sums from the layer's records."""
        return Line(self.site, self._binding, self._step, opaque=opaque, values=self._values)

    def _slot_of(
        self,
        binding: Binding,
        direction: Direction,
        *,
        learning: bool,
        count: Tensor | None = None,
        scale: Tensor | float = 1.0,
        name: str = "",
        op: Op = "sum",
    ) -> Slot:
        site, model = self.site, binding.topology.model
        observers = tuple(site.conversion.observers)
        return Slot(site.name, direction, self._step, learning, count, scale, observers, 0, model, name, op)

    def _failed(self, binding: Binding, direction: Direction, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"{self.site.name}: sharing {direction} statistics ({self.site.conversion.recipe.policy}) among ranks "
            f"{list(binding.topology.ranks)} failed. Another rank has probably stopped, ran out of data, or runs "
            f"other layers; its own message says more. Cause: {error}"
        )


def open_line(site: Site, *, opaque: bool, learning: bool | None = None) -> Line:
    """Start a forward in the current step, and return its line. Binds the layer first if necessary."""
    binding = site.conversion.bound()
    binding.forward_begins(site.name)
    return Line(site, binding, binding.step, opaque=opaque, learning=learning)


def _identifying(payload: Tensor, op: Op) -> Tensor:
    """Return what tells forwards apart: not how often maxima occur, which lossy storage of activations changes."""
    return payload if op == "sum" else torch.cat((payload[: len(payload) // 2], payload[-1:]))
