"""Reads safetensors files with NumPy alone, and compares outputs with golden values."""

import json
import struct

import numpy as np

TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8}

# The largest difference over the largest expected value, of outputs and of gradients. bf16 keeps eight bits.
BOUNDS = {"f32": (3e-5, 3e-4), "bf16": (4e-2, 1.5e-1)}
# Masks and orders do not depend on the precision.
EXACT = ("mask", "ids_restore")


def read(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    tensors = {}
    for name, about in header.items():
        if name != "__metadata__":
            start, end = about["data_offsets"]
            tensors[name] = np.frombuffer(data[start:end], TYPES[about["dtype"]]).reshape(about["shape"])
    return tensors


def difference(found, expected):
    """Relative to the largest expected value; infinite where shapes differ or anything is not a number."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(found).all():
        return float("inf")
    largest = np.abs(expected).max(initial=0.0)
    error = np.abs(found - expected).max(initial=0.0)
    return float(error / largest) if largest > 0 else float(error)


def compare(found, expected, precision):
    """Status, and the worst output and gradient with their errors."""
    worst = {"output": ("", 0.0), "gradient": ("", 0.0)}
    status = "ok"
    output_bound, gradient_bound = BOUNDS[precision]
    # A key's bias changes no softmax: its gradient is rounding and nothing else, so it is held to the others' size.
    gradients = [np.abs(value).max(initial=0.0) for name, value in expected.items() if name.startswith("grad.")]
    largest_gradient = float(max(gradients, default=0.0))
    for name, value in found.items():
        if name not in expected:
            continue
        kind = "gradient" if name.startswith("grad.") else "output"
        if name.endswith("key.bias") and kind == "gradient":
            error = float(np.abs(value).max(initial=0.0)) / max(largest_gradient, 1e-30)
        else:
            error = difference(value, expected[name])
        if error > worst[kind][1]:
            worst[kind] = (name, error)
        bound = 0.0 if name in EXACT else gradient_bound if kind == "gradient" else output_bound
        if not error <= bound:
            status = "failed"
    missing = [name for name in ("loss", "logits", "mask") if name in expected and name not in found]
    missing += [name for name in expected if name.startswith("grad.") and name not in found]
    return {"status": "failed" if missing else status, "missing": missing[:5], "worst_output": worst["output"],
            "worst_gradient": worst["gradient"]}
