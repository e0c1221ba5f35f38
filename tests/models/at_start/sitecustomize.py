"""Python runs this first, where this folder is on its path: scripts of others then import torchvision as it is."""

import tests.models.operators  # noqa: F401
