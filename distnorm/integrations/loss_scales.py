"""Which factor a script multiplies its losses by: the gradient scaler that it made."""

from __future__ import annotations

from weakref import WeakSet

from torch.amp import GradScaler

from distnorm.integrations.patching import after_init
from distnorm.layers.conversion import Conversion


class LossScales:
    """The enabled gradient scalers of this process, and the conversions that want to know the scale."""

    def __init__(self) -> None:
        """None of either."""
        self._scalers: WeakSet[GradScaler] = WeakSet()
        self._told: WeakSet[Conversion] = WeakSet()

    def watch(self) -> None:
        """Take note of every scaler that is made from now on."""
        after_init(GradScaler, self._made)

    def tell(self, conversion: Conversion) -> None:
        """Let ``conversion`` ask for the scale, once there is a scaler: without one, float16 training is refused."""
        self._told.add(conversion)
        if self._scalers:
            conversion.loss_scale = self.scale

    def scale(self) -> float:
        """The scale now; 1 if all scalers are gone.

        Raises:
            RuntimeError: several scalers are alive.
        """
        alive = list(self._scalers)
        if len(alive) > 1:
            raise RuntimeError(
                f"distnorm.run: this script has {len(alive)} gradient scalers, and which of them scales a model's loss "
                "cannot be seen from outside. Train with one, in bfloat16, or convert in the script: "
                "distnorm.convert(model, ...), distnorm.attach(model, optimizer=..., loss_scale=scaler.get_scale)."
            )
        return float(alive[0].get_scale()) if alive else 1.0

    def _made(self, scaler: GradScaler) -> None:
        if scaler.is_enabled():
            self._scalers.add(scaler)
            for conversion in self._told:
                conversion.loss_scale = self.scale
