#!/usr/bin/env python3
"""Makes the picture cases: Pillow's resizing, transformers' image processor, and odd files decoded. See README.md.

    pip install -r requirements.txt
    python make_pictures.py
"""

import io
import shutil
import struct
import zlib

import numpy as np
import torch

from common import CASES, check_versions, write_json, write_tensors

check_versions()

from PIL import Image, ImageOps  # noqa: E402
from torchvision import transforms  # noqa: E402
from transformers import ViTImageProcessor  # noqa: E402

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def synthetic(width, height):
    """Slow gradients, one ringing wave and hard edges, different in every corner; RGB f64 in 0..1."""
    y, x = np.mgrid[0:height, 0:width]
    u, v = x / width, y / height
    red = 0.9 * u + 0.1 * v
    green = 0.5 + 0.4 * np.sin(12 * u * u + 5 * v)
    blue = 0.2 + 0.6 * v
    picture = np.stack([red, green, blue], axis=2)
    picture[(u > 0.55) & (u < 0.8) & (v > 0.2) & (v < 0.5)] = (1, 1, 0)
    picture[(u < 0.3) & (v > 0.7)] = (0, 0, 0)
    picture[(u - 0.3) ** 2 + (v - 0.35) ** 2 < 0.02] = (0, 0.1, 1)
    return picture


def to_rgb8(picture):
    return Image.fromarray(np.round(picture * 255).astype(np.uint8))


def save_png(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


def make_resize():
    folder = CASES / "resize"
    shutil.rmtree(folder, ignore_errors=True)
    source = to_rgb8(synthetic(97, 61))
    save_png(source, folder / "source.png")

    # Either the whole picture, a `box` (source rectangle that the filter may reach beyond) or a `crop` (cut out first).
    wanted = [
        {"size": [32, 32]},
        {"size": [20, 48]},
        {"size": [7, 5]},
        {"size": [97, 30]},
        {"size": [128, 96]},
        {"size": [1, 1]},
        {"size": [24, 24], "box": [10, 5, 60, 55]},
        {"size": [40, 30], "box": [3.5, 2.25, 80.75, 50.5]},
        {"size": [24, 24], "crop": [10, 5, 60, 55]},
        {"size": [64, 64], "crop": [70, 40, 97, 61]},
    ]
    manifest = []
    for filter_name, resample in FILTERS.items():
        for entry in wanted:
            size, crop = tuple(entry["size"]), entry.get("crop")
            picture = source.crop(crop) if crop else source
            picture = picture.resize(size, resample, box=entry.get("box"))
            kind = "crop" if crop else "box" if "box" in entry else "whole"
            name = f"{filter_name}_{kind}_{size[0]}x{size[1]}.png"
            save_png(picture, folder / name)
            manifest.append({"source": "source.png", "filter": filter_name, **entry, "output": name})
    save_png(source.resize((224, 224), FILTERS["bilinear"]), folder / "bilinear_whole_224x224.png")
    manifest.append({"source": "source.png", "filter": "bilinear", "size": [224, 224],
                     "output": "bilinear_whole_224x224.png"})
    # As the original evaluates: the shorter side to a size, then the middle. 2.5 rows go above the middle: rounded to even.
    evaluated = transforms.CenterCrop(35)(transforms.Resize(40, transforms.InterpolationMode.BICUBIC)(source))
    save_png(evaluated, folder / "bicubic_evaluation.png")
    manifest.append({"source": "source.png", "filter": "bicubic", "shorter_side": 40, "center_crop": 35,
                     "output": "bicubic_evaluation.png"})
    write_json(folder / "manifest.json", manifest)


def make_processor():
    """transformers' ViTImageProcessor, configured as published checkpoints are, today and formerly."""
    folder = CASES / "processor"
    shutil.rmtree(folder, ignore_errors=True)
    source = to_rgb8(synthetic(97, 61))
    save_png(source, folder / "source.png")
    usual = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    former = {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", **usual,
              "resample": 2, "size": 32}
    processors = {
        "imagenet": ViTImageProcessor(size={"height": 32, "width": 48}, **usual),
        "former": ViTImageProcessor.from_dict(dict(former)),
        "half": ViTImageProcessor(size={"height": 24, "width": 24}, resample=Image.Resampling.BICUBIC),
        "unscaled": ViTImageProcessor(size={"height": 8, "width": 8}, do_rescale=False, do_normalize=False),
    }
    manifest = []
    for name, processor in processors.items():
        if name == "former":
            write_json(folder / "former.json", former)
        else:
            processor.save_pretrained(folder)
            (folder / "preprocessor_config.json").rename(folder / f"{name}.json")
        pixels = processor(source, return_tensors="pt")["pixel_values"].float()
        write_tensors(folder / f"{name}.safetensors", {"pixel_values": pixels})
        manifest.append({"source": "source.png", "config": f"{name}.json", "output": f"{name}.safetensors"})
    write_json(folder / "manifest.json", manifest)


def png(samples, colour_type):
    """A 16-bit PNG of `[H, W, channels]`; Pillow cannot write these with more than one channel."""
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def make_formats():
    folder = CASES / "formats"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "expected").mkdir(parents=True)
    exact = synthetic(24, 16)
    rgb = to_rgb8(exact)
    alpha = Image.fromarray(np.mgrid[0:16, 0:24][1].astype(np.uint8) * 11)
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    grey_alpha = Image.merge("LA", (rgb.convert("L"), alpha))
    palette = rgb.quantize(16, dither=Image.Dither.NONE)
    fine = {"quality": 95, "subsampling": 0}
    manifest = []

    def add(name, data, tolerance, comment, expected="pillow"):
        (folder / name).write_bytes(data)
        entry = {"file": name, "expected": None, "tolerance": tolerance, "comment": comment}
        if expected is not None:
            if isinstance(expected, str):
                opened = Image.open(io.BytesIO(data))
                expected = ImageOps.exif_transpose(opened).convert("RGB")
            entry["expected"] = f"expected/{name}.png"
            save_png(expected, folder / entry["expected"])
        manifest.append(entry)

    add("rgb.png", encoded(rgb, "PNG"), 0, "8-bit RGB.")
    add("rgba.png", encoded(rgba, "PNG"), 0, "Alpha is dropped, not blended.")
    add("grey.png", encoded(rgb.convert("L"), "PNG"), 0, "8-bit grey.")
    add("grey_alpha.png", encoded(grey_alpha, "PNG"), 0, "Grey with alpha, which is dropped.")
    add("bilevel.png", encoded(rgb.convert("1"), "PNG"), 0, "1 bit a pixel.")
    add("palette.png", encoded(palette, "PNG"), 0, "16 colours.")
    add("palette_transparent.png", encoded(palette, "PNG", transparency=3), 0,
        "16 colours, one of them transparent: it keeps its colour.")
    add("one_pixel.png", encoded(rgb.crop((3, 3, 4, 4)), "PNG"), 0, "1 x 1.")
    # Pillow clips or cuts 16-bit samples, depending on the mode; the PNG specification's scaling is the rule here.
    rule = "16 bits a sample: the nearest 8-bit value, round(value / 257). Pillow does otherwise; this follows the PNG " \
           "specification."
    deep = np.round(exact * 65535)
    eight = np.round(deep / 257).astype(np.uint8)
    add("rgb_16.png", png(deep, 2), 0, rule, Image.fromarray(eight))
    grey = eight[:, :, 1]
    add("grey_16.png", png(deep[:, :, 1:2], 0), 0, rule, Image.fromarray(np.stack([grey] * 3, axis=2)))

    add("rgb.jpg", encoded(rgb, "JPEG", **fine), 2, "Baseline, 4:4:4.")
    add("subsampled.jpg", encoded(rgb, "JPEG", quality=90, subsampling=2), 16,
        "4:2:0; decoders differ in upsampling, most in the last column.")
    add("progressive.jpg", encoded(rgb, "JPEG", progressive=True, **fine), 2, "Progressive.")
    add("grey.jpg", encoded(rgb.convert("L"), "JPEG", quality=95), 2, "One component.")
    add("cmyk_adobe.jpg", encoded(rgb.convert("CMYK"), "JPEG", **fine), 3,
        "Four components, inverted as Adobe's marker says; RGB is (1 - C) * (1 - K), no colour profile.")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        add(f"orientation_{orientation}.jpg", encoded(rgb, "JPEG", exif=exif, **fine), 2,
            f"EXIF orientation {orientation}: the expected picture is upright.")
    add("lossless.webp", encoded(rgb, "WEBP", lossless=True), 0, "Lossless.")
    add("lossy.webp", encoded(rgb, "WEBP", quality=90), 8, "Lossy; decoders differ in upsampling.")
    add("alpha.webp", encoded(rgba, "WEBP", lossless=True, exact=True), 0, "Lossless with alpha, which is dropped.")
    add("rgb.bmp", encoded(rgb, "BMP"), 0, "24-bit.")
    add("rgb.tiff", encoded(rgb, "TIFF"), 0, "Not compressed.")
    add("lzw.tiff", encoded(rgb, "TIFF", compression="tiff_lzw"), 0, "LZW.")
    add("png_inside.jpg", encoded(rgb, "PNG"), 0, "A PNG by content: the name does not decide.")
    whole = encoded(rgb, "JPEG", **fine)
    add("truncated.jpg", whole[:len(whole) // 2], None, "Half a file: an error that names it, or skipped and counted.", None)
    add("truncated.png", encoded(rgb, "PNG")[:200], None, "The beginning of a file: the same.", None)
    add("empty.png", b"", None, "No bytes: the same.", None)
    add("text.jpg", b"not a picture\n", None, "Not a picture: the same.", None)
    write_json(folder / "manifest.json", manifest)


def main():
    torch.set_num_threads(1)
    make_resize()
    make_processor()
    make_formats()


if __name__ == "__main__":
    main()
