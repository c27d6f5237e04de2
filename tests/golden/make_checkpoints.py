#!/usr/bin/env python3
"""Writes two of the model cases' weights in the other forms that checkpoints come in, and two classifiers. See README.md.

    pip install -r requirements.txt
    python make_checkpoints.py
"""

import argparse
import functools
import re
import shutil
import zlib

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from common import CASES, check_versions, exact_attention, fill, pictures, write_json, write_tensors

check_versions()

import timm.models.vision_transformer as vision_transformer  # noqa: E402
from transformers import ViTConfig, ViTForImageClassification, ViTMAEForPreTraining, ViTMAEModel  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
torch.set_num_threads(1)

# Published name to the original implementation's, which timm's encoder shares.
TO_ORIGINAL = (
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.encoder\.layer\.", "blocks."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^decoder\.decoder_layers\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)


def original_names(state):
    """The same weights as the original implementation names them, with query, key and value in one tensor."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in TO_ORIGINAL:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [renamed.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        renamed[name.replace("query", "qkv")] = torch.cat(parts)
    return renamed


def encoder_only(original):
    return {name: tensor for name, tensor in original.items() if not re.match(r"decoder_|mask_token", name)}


def fresh(name):
    shutil.rmtree(CASES / name, ignore_errors=True)
    (CASES / name).mkdir(parents=True)
    return CASES / name


def note(folder, base, comment):
    write_json(folder / "case.json", {"kind": "checkpoint", "base": base, "comment": comment})


def make_transformers_forms():
    model = ViTMAEForPreTraining.from_pretrained(CASES / "plain")
    folder = fresh("sharded")
    model.save_pretrained(folder, max_shard_size="30KB")
    note(folder, "plain", "In shards, with model.safetensors.index.json.")

    folder = fresh("pytorch_bin")
    model.save_pretrained(folder, safe_serialization=False)
    note(folder, "plain", "pytorch_model.bin: a dictionary of tensors written by torch.save, as older checkpoints are.")

    folder = fresh("encoder_only")
    ViTMAEModel.from_pretrained(CASES / "plain").save_pretrained(folder)
    note(folder, "plain", "ViTMAEModel: no decoder, names without `vit.`. It embeds (`encoded`); it cannot reconstruct.")


def timm_encoder(config, **other):
    return vision_transformer.VisionTransformer(
        img_size=config.image_size, patch_size=config.patch_size, in_chans=config.num_channels,
        embed_dim=config.hidden_size, depth=config.num_hidden_layers, num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        norm_layer=functools.partial(nn.LayerNorm, eps=config.layer_norm_eps), **other)


def make_original_forms():
    """`head_64` under the original's names; timm, which shares the encoder's, must compute the same from them."""
    model = ViTMAEForPreTraining.from_pretrained(CASES / "head_64")
    state = original_names(model.state_dict())
    pixels = load_file(CASES / "head_64" / "input.safetensors")["pixel_values"].double()
    encoded = load_file(CASES / "head_64" / "expected.safetensors")["encoded"]
    encoder = timm_encoder(model.config, num_classes=0, global_pool="token").double().eval()
    encoder.load_state_dict(encoder_only(state))
    with torch.no_grad():
        difference = (encoder.forward_features(pixels) - encoded).abs().max().item()
    if difference > 1e-12:
        raise SystemExit(f"timm's encoder differs from transformers' by {difference}")

    folder = fresh("names_original")
    torch.save({"model": encoder_only(state)}, folder / "encoder.pth")
    # What a training run leaves behind: the reader has to get past all that is not weights.
    arguments = argparse.Namespace(
        model="mae", input_size=16, mask_ratio=0.75, norm_pix_loss=False, blr=1.5e-4, output_dir=None, data_path="data")
    optimizer = {
        "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}],
    }
    torch.save({"model": state, "optimizer": optimizer, "epoch": 7, "scaler": {"scale": 65536.0}, "args": arguments},
               folder / "training.pth")
    note(folder, "head_64",
         "The original implementation's names and files. encoder.pth: {\"model\": encoder}; training.pth: the whole "
         "autoencoder beside optimiser, epoch, scaler and arguments. No config: sizes follow from the shapes, heads "
         "are of 64 in the encoder and of 32 in the decoder, epsilon is 1e-6.")

    folder = fresh("names_timm")
    write_tensors(folder / "model.safetensors", encoder_only(state))
    note(folder, "head_64", "timm's names, encoder only, in safetensors.")


def classifier_expected(logits, labels, module):
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    expected = {"loss": loss.reshape(1), "logits": logits}
    return expected | {f"grad.{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}


def make_classifiers():
    labels = torch.tensor([2, 0, 4])
    for name in ("classifier_cls", "classifier_mean"):
        folder = fresh(name)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        config = ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=36, image_size=12, patch_size=4,
            layer_norm_eps=1e-6, id2label=dict(enumerate(["ant", "bee", "cat", "dog", "eel"])),
            label2id={"ant": 0, "bee": 1, "cat": 2, "dog": 3, "eel": 4})
        pixels = pictures(rng, 3, 3, 12, 12)
        write_tensors(folder / "input.safetensors", {"pixel_values": pixels, "labels": labels})
        if name == "classifier_cls":
            model = ViTForImageClassification(config)
            fill(model, rng)
            model.save_pretrained(folder)
            ALL_ATTENTION_FUNCTIONS["exact"] = exact_attention
            model = model.double().eval()
            model.config._attn_implementation = "exact"
            logits = model(pixels.double()).logits
            comment = "transformers' ViTForImageClassification: the class token after the final LayerNorm."
        else:
            model = timm_encoder(config, num_classes=5, global_pool="avg", fc_norm=True)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    value = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
                    if "norm" in key and key.endswith("weight"):
                        parameter.copy_(1 + 0.1 * value)
                    elif parameter.ndim == 1:
                        parameter.copy_(0.1 * value)
                    else:
                        parameter.copy_(value / np.prod(parameter.shape[1:]) ** 0.5)
            config.save_pretrained(folder)
            write_tensors(folder / "model.safetensors", model.state_dict())
            model = model.double().eval()
            logits = model(pixels.double())
            comment = ("timm's VisionTransformer with global_pool=\"avg\", as the original fine-tunes: the mean over the "
                       "patches' tokens (not the class token's), then fc_norm, then head; no `norm` before. config.json "
                       "is transformers' ViTConfig of the same sizes.")
        write_tensors(folder / "expected.safetensors", classifier_expected(logits, labels, model))
        write_json(folder / "case.json", {"kind": "classifier", "comment": comment})


def main():
    make_transformers_forms()
    make_original_forms()
    make_classifiers()


if __name__ == "__main__":
    main()
