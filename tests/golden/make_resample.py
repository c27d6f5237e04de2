#!/usr/bin/env python3
"""Makes `cases/resample`: what Pillow makes of boxes of a grey, an RGB and an RGBA picture, in many sizes. See README.md.

Needs only `numpy`, `pillow` and `safetensors` of requirements.txt.
"""

import importlib.metadata
import pathlib
import shutil
import sys

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
FOLDER = HERE / "cases" / "resample"
FILTERS = {name.lower(): Image.Resampling[name]
           for name in ("NEAREST", "LANCZOS", "BILINEAR", "BICUBIC", "BOX", "HAMMING")}
# Boxes are left, top, right, bottom of a picture of 83 x 59; sizes are width, height.
RGB = [
    ((0, 0, 83, 59), (32, 32)),
    ((0, 0, 83, 59), (17, 41)),
    ((0, 0, 83, 59), (97, 64)),
    ((0, 0, 83, 59), (83, 20)),
    ((0, 0, 83, 59), (20, 59)),
    ((0, 0, 83, 59), (3, 1)),
    ((13, 7, 64, 48), (24, 24)),
    ((80, 55, 83, 59), (31, 33)),
    ((5, 0, 6, 59), (11, 13)),
    ((1, 30, 82, 31), (40, 7)),
    ((40, 20, 64, 44), (24, 24)),
    ((33, 21, 34, 22), (5, 6)),
]
OTHERS = [((0, 0, 83, 59), (23, 29)), ((11, 3, 70, 40), (48, 50)), ((79, 51, 83, 59), (9, 8))]


def main():
    for line in (HERE / "requirements.txt").read_text().split():
        name, wanted = line.split("==")
        if name in ("numpy", "pillow", "safetensors") and importlib.metadata.version(name) != wanted:
            sys.exit(f"{name}: expected {wanted}, found {importlib.metadata.version(name)}")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    # Hard edges in every channel, where filters overshoot, on slow gradients with noise.
    generator = np.random.default_rng(7)
    y, x = np.mgrid[0:59, 0:83]
    planes = []
    for channel in range(4):
        plane = 127 + 90 * np.sin(x / (5 + channel) + y / 9) + generator.normal(0, 12, x.shape)
        plane[(x // (7 + channel) + y // 6) % 5 == 0] = (0, 255)[channel % 2]
        planes.append(np.clip(np.round(plane), 0, 255).astype(np.uint8))
    rgba = Image.fromarray(np.stack(planes, axis=2), "RGBA")
    pictures = {"rgb": rgba.convert("RGB"), "grey": Image.fromarray(planes[0]), "rgba": rgba}
    tensors = {}
    for mode, picture in pictures.items():
        picture.save(FOLDER / f"{mode}.png", optimize=True)
        for name, filter in FILTERS.items():
            wanted = RGB if mode == "rgb" and name in ("bilinear", "bicubic") else OTHERS
            for box, size in wanted:
                result = np.asarray(picture.crop(box).resize(size, filter))
                key = f"{mode} {name} {' '.join(map(str, box))} {size[0]} {size[1]}"
                tensors[key] = np.ascontiguousarray(result.reshape(size[1], size[0], -1))
    save_file(tensors, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
