"""What the subcommands of ``distnorm`` do."""
