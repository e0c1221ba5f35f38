"""Generate a folder of small pictures: ``FOLDER/class_0/0.png`` and so on, each class with a colour of its own."""

import random
from pathlib import Path

from PIL import Image

CLASSES, EACH, SIDE = 4, 16, 32


def write(folder: Path) -> None:
    """Write the pictures, equal for equal seeds."""
    draw = random.Random(0)
    for label in range(CLASSES):
        (folder / f"class_{label}").mkdir(parents=True, exist_ok=True)
        for number in range(EACH):
            shade = [40 * label + 20 * channel for channel in range(3)]
            values = [draw.randrange(256) // 2 + shade[i % 3] // 2 for i in range(3 * SIDE * SIDE)]
            picture = Image.frombytes("RGB", (SIDE, SIDE), bytes(values))
            picture.save(folder / f"class_{label}" / f"{number:02}.png")
