"""Find the loss scale of an unmodified script: the gradient scaler that it creates."""

from __future__ import annotations

from weakref import WeakSet

from torch.amp import GradScaler

from distnorm.integrations.patching import after_init
from distnorm.layers.conversion import Conversion


class LossScales:
    """The enabled gradient scalers of this process, and the conversions that use their scale."""

    def __init__(self) -> None:
        """Start with no scalers and no conversions."""
        self._scalers: WeakSet[GradScaler] = WeakSet()
        self._conversions: WeakSet[Conversion] = WeakSet()

    def watch(self) -> None:
        """Record every gradient scaler that is created from now on."""
        after_init(GradScaler, self._add_scaler)

    def connect(self, conversion: Conversion) -> None:
        """Set the loss scale of ``conversion`` once there is a scaler; without one, float16 training is refused."""
        self._conversions.add(conversion)
        if self._scalers:
            conversion.loss_scale = self.scale

    def scale(self) -> float:
        """Return the current scale; 1 if no scaler is alive.

        Raises:
            RuntimeError: several scalers are alive.
        """
        alive = list(self._scalers)
        if len(alive) > 1:
            raise RuntimeError(
                f"distnorm.run: this script has {len(alive)} gradient scalers, and distnorm.run cannot tell which of "
                "them scales the loss of a model. Use one scaler, train in bfloat16, or convert in the script: "
                "distnorm.convert(model, ...), distnorm.attach(model, optimizer=..., loss_scale=scaler.get_scale)."
            )
        return float(alive[0].get_scale()) if alive else 1.0

    def _add_scaler(self, scaler: GradScaler) -> None:
        if scaler.is_enabled():
            self._scalers.add(scaler)
            for conversion in self._conversions:
                conversion.loss_scale = self.scale
