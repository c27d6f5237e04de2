#!/usr/bin/env python3
"""Writes the `plain` case's weights as transformers 5 names them: on disk and in memory. See README.md.

Needs an environment of its own:

    pip install -r requirements-v5.txt
    python make_checkpoints_v5.py
"""

import shutil

from common import CASES, check_versions, write_json, write_tensors

check_versions("requirements-v5.txt")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import ViTMAEForPreTraining  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()


def main():
    base = CASES / "plain"
    model, report = ViTMAEForPreTraining.from_pretrained(base, output_loading_info=True)
    if any(report.values()):
        raise SystemExit(f"transformers 5 did not load {base.name} completely: {report}")
    given, expected = load_file(base / "input.safetensors"), load_file(base / "expected.safetensors")
    with torch.no_grad():
        output = model.eval()(given["pixel_values"], noise=given["noise"])
    difference = (output.logits.double() - expected["logits"]).abs().max().item()
    if difference > 1e-4:
        raise SystemExit(f"transformers 5 differs from 4.57 by {difference}")

    folder = CASES / "names_v5"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "saved.safetensors")
    write_tensors(folder / "in_memory.safetensors", model.state_dict())
    write_json(folder / "case.json", {
        "kind": "checkpoint",
        "base": "plain",
        "comment": "Written by transformers 5.23.0. saved.safetensors: the names its save_pretrained writes "
                   "(decoder.decoder_encoder.layer.N); in_memory.safetensors: those of its state_dict (vit.layers.N, "
                   "q_proj, mlp.fc1).",
    })
    print(f"names_v5: logits within {difference:.1e} of the f64 ones")


if __name__ == "__main__":
    main()
