"""What distnorm needs to know of torch: its version, and the modes that a call runs under."""
