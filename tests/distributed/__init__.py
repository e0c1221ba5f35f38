"""The package on real gloo processes, against one process that holds the joined batch."""
