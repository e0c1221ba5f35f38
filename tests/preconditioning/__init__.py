"""BNP: gradients preconditioned by the statistics of layer inputs."""
