#!/usr/bin/env python3
"""Makes `cases/jpeg`: JPEG files of many kinds and the bytes that Pillow decodes them to. See README.md.

Needs only `numpy`, `pillow` and `safetensors` of requirements.txt.
"""

import importlib.metadata
import io
import pathlib
import shutil
import sys

import numpy as np
from PIL import Image, features
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
FOLDER = HERE / "cases" / "jpeg"


def main():
    for line in (HERE / "requirements.txt").read_text().split():
        name, wanted = line.split("==")
        if name in ("numpy", "pillow", "safetensors") and importlib.metadata.version(name) != wanted:
            sys.exit(f"{name}: expected {wanted}, found {importlib.metadata.version(name)}")
    if not features.check_feature("libjpeg_turbo"):
        sys.exit("this Pillow does not decode with libjpeg-turbo")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    generator = np.random.default_rng(3)
    expected = {}

    def add(name, width, height, grey=False, **options):
        y, x = np.mgrid[0:height, 0:width]
        planes = [127 + 110 * np.sin(x / (3 + c) + y / (7 - c)) + generator.normal(0, 15, x.shape) for c in range(3)]
        planes[1][(x // 9 + y // 7) % 4 == 0] = 255
        planes[2][(x // 9 + y // 7) % 4 == 1] = 0
        picture = Image.fromarray(np.clip(np.stack(planes, axis=2), 0, 255).astype(np.uint8))
        picture = picture.convert("L") if grey else picture
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", **options)
        (FOLDER / f"{name}.jpg").write_bytes(buffer.getvalue())
        decoded = np.asarray(Image.open(buffer))
        expected[name] = np.ascontiguousarray(decoded.reshape(height, width, -1))

    # Sampling 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0. Sizes end inside blocks, behind one pixel of a block, and at its end.
    for sampling in range(3):
        add(f"sampling_{sampling}", 75, 53, subsampling=sampling, quality=85)
        add(f"sampling_{sampling}_fine", 33, 49, subsampling=sampling, quality=100, optimize=True)
        add(f"sampling_{sampling}_coarse", 64, 48, subsampling=sampling, quality=8)
        add(f"sampling_{sampling}_restarts", 71, 41, subsampling=sampling, quality=75, restart_marker_blocks=3)
        add(f"sampling_{sampling}_small", 5, 3, subsampling=sampling)
        add(f"sampling_{sampling}_smallest", 1, 1, subsampling=sampling)
        add(f"sampling_{sampling}_column", 6, 40, subsampling=sampling)
        add(f"sampling_{sampling}_row", 40, 2, subsampling=sampling, restart_marker_rows=1)
        add(f"sampling_{sampling}_progressive", 50, 35, subsampling=sampling, quality=85, progressive=True)
    add("grey", 45, 29, grey=True)
    add("grey_restarts", 45, 29, grey=True, quality=95, restart_marker_rows=1)
    add("colours", 43, 31, keep_rgb=True, quality=90)
    save_file(expected, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
