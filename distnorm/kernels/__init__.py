"""The loops over big tensors; everything else in the package is of the size of the channels."""
