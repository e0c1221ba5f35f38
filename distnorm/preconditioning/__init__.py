"""BNP: gradients of convolutions and linear layers, preconditioned by the statistics of these layers' inputs."""

from distnorm.preconditioning.handle import Preconditioner
from distnorm.preconditioning.precondition import precondition

__all__ = ["Preconditioner", "precondition"]
