"""The subcommands of ``distnorm``."""
