"""What the tests run on: threaded ranks, a pool of gloo processes, a fake world, and an fp64 reference."""
