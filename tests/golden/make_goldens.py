#!/usr/bin/env python3
"""Makes the model cases: transformers' ViTMAE, computed in f64, on small random checkpoints. See README.md.

    pip install -r requirements.txt
    python make_goldens.py [NAME...]
"""

import shutil
import sys
import warnings
import zlib

import numpy as np
import torch

from common import (CASES, TABLES, build, check_versions, fill, in_f64, mask_ratio, pair, pictures, stable_ranks,
                    write_json, write_tensors)

check_versions()

from transformers import ViTMAEConfig, ViTMAEForPreTraining  # noqa: E402
from transformers.models.vit_mae.modeling_vit_mae import get_2d_sincos_pos_embed  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
torch.set_num_threads(1)
# transformers does not know that `exact_attention` gives its probabilities; it does.
warnings.filterwarnings("ignore", message="`output_attentions=True` is not supported")


def shape(encoder, decoder, image, patch, channels, ratio, **other):
    """Keyword arguments of a config; encoder and decoder are (width, layers, heads, MLP width)."""
    return dict(
        hidden_size=encoder[0], num_hidden_layers=encoder[1], num_attention_heads=encoder[2],
        intermediate_size=encoder[3], decoder_hidden_size=decoder[0], decoder_num_hidden_layers=decoder[1],
        decoder_num_attention_heads=decoder[2], decoder_intermediate_size=decoder[3], image_size=image,
        patch_size=patch, num_channels=channels, mask_ratio=ratio, **other)


SMALL = ((16, 1, 2, 24), (12, 1, 3, 20), 12, 4, 3, 0.75)

# name: (config, batch, options, comment). Options: picture (height, width), interpolation, ties, constant_patch.
MODELS = {
    "plain": (
        shape((24, 2, 3, 40), (20, 1, 5, 36), 16, 4, 3, 0.75), 2, {},
        "3 heads of 8; decoder of another width with 5 heads of 4; 16 patches, 4 kept."),
    "norm_pix": (
        shape((48, 1, 3, 64), (32, 2, 2, 48), 12, 4, 3, 0.75, layer_norm_eps=1e-6, norm_pix_loss=True), 2,
        dict(constant_patch=True),
        "norm_pix_loss; heads of 16; 9 patches, int(2.25) = 2 kept; a hidden patch of picture 0 has zero variance."),
    "grey_100": (
        shape((40, 1, 5, 56), (24, 1, 3, 32), 20, 2, 1, 0.9, layer_norm_eps=1e-6), 1, {},
        "1 channel, 5 heads of 8; 100 patches at 0.9 keep 9, not 10: int(100 * (1 - 0.9)) in f64."),
    "four_channels": (
        shape((20, 3, 2, 30), (28, 1, 1, 44), 15, 3, 4, 0.5, layer_norm_eps=1e-2), 3, {},
        "4 channels, patches of 3 x 3, heads of 10, 3 layers, batch 3, int(12.5) = 12 kept; a large layer_norm_eps."),
    "patch_16": (
        shape((24, 1, 3, 28), (8, 1, 2, 20), 48, 16, 3, 0.75, layer_norm_eps=1e-6), 1, {},
        "The published models' patch size, batch 1."),
    "head_64": (
        shape((64, 1, 1, 40), (32, 1, 1, 36), 16, 4, 1, 0.75, layer_norm_eps=1e-6), 2, {},
        "Heads of 64 and 32 and the epsilon of the published models."),
    "head_80": (
        shape((80, 1, 1, 16), (40, 1, 1, 16), 12, 4, 1, 0.75, layer_norm_eps=1e-6), 2, {},
        "A head of 80, the huge model's, and one of 40."),
    "mask_ratio_zero": (
        shape((24, 1, 3, 32), (16, 1, 2, 24), 12, 4, 3, 0.0), 2, {},
        "Nothing is hidden. transformers' loss is 0 / 0 here; the loss stored is 0 by this project's contract, and "
        "there are no gradients. The rest is transformers'."),
    "keep_none": (
        shape((16, 1, 2, 24), (12, 1, 3, 20), 12, 4, 3, 0.9), 2, {},
        "9 patches at 0.9 keep int(0.9) = 0: the encoder sees the class token only. The patch embedding's gradients "
        "are zero."),
    "no_qkv_bias": (
        shape((24, 2, 3, 32), (16, 1, 2, 24), 12, 4, 3, 0.75, qkv_bias=False), 2, {},
        "qkv_bias false: neither half has biases on queries, keys and values."),
    "gelu_new": (shape(*SMALL, hidden_act="gelu_new"), 1, {}, "hidden_act gelu_new: the tanh form."),
    "gelu_pytorch_tanh": (
        shape(*SMALL, hidden_act="gelu_pytorch_tanh"), 1, {},
        "hidden_act gelu_pytorch_tanh: the tanh form under PyTorch's name."),
    "relu": (shape(*SMALL, hidden_act="relu"), 1, {}, "hidden_act relu."),
    "silu": (shape(*SMALL, hidden_act="silu"), 1, {}, "hidden_act silu."),
    "quick_gelu": (shape(*SMALL, hidden_act="quick_gelu"), 1, {}, "hidden_act quick_gelu: x * sigmoid(1.702 x)."),
    "rectangular_tall": (
        shape((24, 1, 3, 32), (16, 1, 2, 24), [20, 12], 4, 3, 0.75), 2, {},
        "image_size [height, width] = [20, 12], 5 x 3 patches. transformers 4.57 cannot build this (it takes the square "
        "root of the number of patches); the tables and the loss's patches follow the definition."),
    "rectangular_wide": (
        shape((24, 1, 3, 32), (16, 1, 2, 24), [16, 36], 4, 1, 0.75, norm_pix_loss=True), 2, {},
        "image_size [16, 36], 4 x 9 patches: a square number, so transformers 4.57 builds this with the table of 6 x 6 "
        "and then refuses the picture; the tables here are those of 4 x 9, and the loss's patches follow the definition."),
    "ties": (
        shape((16, 1, 2, 24), (12, 1, 3, 20), 16, 4, 1, 0.75), 3, dict(ties=True),
        "Noise with ties (in picture 2 all values are equal), sorted stably: transformers was given each value's rank "
        "in torch.argsort(stable=True) instead of the noise, because its own argsort promises no order."),
    "interpolate_larger": (
        shape((24, 1, 3, 32), (16, 1, 2, 24), 12, 4, 3, 0.75), 2, dict(picture=(20, 20), interpolation="transformers"),
        "A model of 3 x 3 patches on 5 x 5."),
    "interpolate_smaller": (
        shape((24, 1, 3, 32), (16, 1, 2, 24), 20, 4, 3, 0.75), 2, dict(picture=(12, 12), interpolation="transformers"),
        "A model of 5 x 5 patches on 3 x 3: without antialiasing."),
    "interpolate_rectangular": (
        shape((24, 1, 3, 32), (16, 1, 2, 24), 12, 4, 3, 0.75), 2, dict(picture=(16, 28), interpolation="transformers"),
        "A model of 3 x 3 patches on 4 x 7."),
    "interpolate_2d": (
        shape((24, 1, 3, 32), (16, 1, 2, 24), 12, 4, 3, 0.75), 2, dict(picture=(16, 28), interpolation="2d"),
        "A model of 3 x 3 patches on 4 x 7, the decoder's table interpolated in 2-D as the encoder's is. transformers "
        "cannot do that; torch's bicubic was applied to its table as the encoder does."),
    "interpolate_2d_from_rectangular": (
        shape((24, 1, 3, 32), (16, 1, 2, 24), [20, 12], 4, 3, 0.75), 1, dict(picture=(12, 24), interpolation="2d"),
        "A model of 5 x 3 patches on 3 x 6, both tables in 2-D. transformers assumes a square table; torch's bicubic "
        "was applied to the table on its own grid."),
}


def make_noise(rng, batch, length, ties):
    noise = torch.from_numpy(rng.permuted(np.tile(np.arange(length), (batch, 1)), axis=1) / length).float()
    if ties:
        noise = (noise * 4).floor() / 4
        noise[2] = 0.5
    return noise


def compute(exact, pixels, ranks, interpolation):
    """What the `forward` and `encode` of the exact model give, and the gradients of its loss."""
    interpolate = interpolation is not None
    hides = ranks.shape[1] > int(ranks.shape[1] * (1 - exact.config.mask_ratio))
    output = exact(pixels, noise=ranks, interpolate_pos_encoding=interpolate, output_hidden_states=True,
                   output_attentions=True)
    latent = exact.vit(pixels, noise=ranks, interpolate_pos_encoding=interpolate).last_hidden_state
    expected = {
        "loss": output.loss.reshape(1) if hides else torch.zeros(1, dtype=torch.float64),
        "logits": output.logits,
        "mask": output.mask.float(),
        "ids_restore": output.ids_restore,
        "last_hidden_state": latent,
    }
    expected |= {f"hidden_states.{n}": value for n, value in enumerate(output.hidden_states)}
    expected |= {f"attentions.{n}": value for n, value in enumerate(output.attentions)}
    # Keeping everything in ascending order of noise leaves the patches where they were.
    with mask_ratio(exact, 0.0):
        ordered = torch.arange(ranks.shape[1], dtype=torch.float64).expand_as(ranks)
        expected["encoded"] = exact.vit(
            pixels, noise=ordered, interpolate_pos_encoding=interpolate).last_hidden_state
    if hides:
        exact.zero_grad(set_to_none=True)
        output.loss.backward()
        for name, parameter in exact.named_parameters():
            if name not in TABLES:
                expected[f"grad.{name}"] = parameter.grad
    for name, value in expected.items():
        if not torch.isfinite(value).all() or (value.is_floating_point() and value.dtype != torch.float64
                                               and name != "mask"):
            sys.exit(f"{name}: expected finite f64, found {value.dtype} {value}")
    return expected


def compare_with_stock(folder, pixels, noise, expected, interpolation):
    """Holds the files written against transformers as it comes, in f32, and the tables against its formula."""
    model = ViTMAEForPreTraining.from_pretrained(folder, attn_implementation="eager").eval()
    for name in TABLES:
        table = model.get_parameter(name)
        formula = get_2d_sincos_pos_embed(table.shape[2], int((table.shape[1] - 1) ** 0.5), add_cls_token=True)
        if (table[0] - torch.from_numpy(formula)).abs().max() > 1e-7:
            sys.exit(f"{folder.name}: {name} is not transformers' sin-cos table")
    with torch.no_grad():
        output = model(pixels, noise=noise, interpolate_pos_encoding=interpolation is not None,
                       output_hidden_states=True, output_attentions=True)
    found = {"logits": output.logits, "mask": output.mask, "ids_restore": output.ids_restore}
    if model.config.mask_ratio > 0:
        found["loss"] = output.loss.reshape(1)
    found |= {f"hidden_states.{n}": value for n, value in enumerate(output.hidden_states)}
    found |= {f"attentions.{n}": value for n, value in enumerate(output.attentions)}
    for name, value in found.items():
        difference = (value.double() - expected[name].double()).abs().max().item()
        if difference > 1e-4:
            sys.exit(f"{folder.name}: {name} differs from transformers in f32 by {difference}")


def make_model_case(name):
    arguments, batch, options, comment = MODELS[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    folder = CASES / name
    shutil.rmtree(folder, ignore_errors=True)
    model = build(ViTMAEConfig(**arguments))
    fill(model, rng)
    model.save_pretrained(folder)

    config = model.config
    picture = options.get("picture", pair(config.image_size))
    interpolation = options.get("interpolation")
    pixels = pictures(rng, batch, config.num_channels, *picture)
    patch = config.patch_size
    length = (picture[0] // patch) * (picture[1] // patch)
    noise = make_noise(rng, batch, length, options.get("ties", False))
    if options.get("constant_patch"):
        column = int(noise[0].argmax()) % (picture[1] // patch)
        row = int(noise[0].argmax()) // (picture[1] // patch)
        pixels[0, :, row * patch:(row + 1) * patch, column * patch:(column + 1) * patch] = 0.5

    ranks = stable_ranks(noise)
    expected = compute(in_f64(model, picture, interpolation), pixels.double(), ranks, interpolation)
    if pair(config.image_size)[0] == pair(config.image_size)[1] and interpolation != "2d":
        compare_with_stock(folder, pixels, ranks.float(), expected, interpolation)
    write_tensors(folder / "input.safetensors", {"pixel_values": pixels, "noise": noise})
    write_tensors(folder / "expected.safetensors", {k: v.detach() for k, v in expected.items()})
    write_json(folder / "case.json", {
        "kind": "model", "interpolate_pos_encoding": interpolation, "comment": comment})
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: loss {expected['loss'].item():.6f}, {len(expected)} tensors, {size // 1000} kB")


def make_adamw():
    """Five steps of torch's AdamW in f64, once as this project groups parameters and once as the original does."""
    folder = CASES / "adamw"
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(zlib.crc32(b"adamw"))
    steps, batch = 5, 2
    model = build(ViTMAEConfig(**shape((16, 1, 2, 24), (12, 1, 3, 20), 12, 4, 3, 0.75, norm_pix_loss=True)))
    fill(model, rng)
    model.save_pretrained(folder)
    inputs = {}
    for step in range(steps):
        inputs[f"pixel_values.{step}"] = pictures(rng, batch, 3, 12, 12)
        inputs[f"noise.{step}"] = make_noise(rng, batch, 9, False)
    write_tensors(folder / "input.safetensors", inputs)

    decayed = {}
    for file, tokens in (("expected", False), ("expected_tokens_decayed", True)):
        exact = in_f64(model, (12, 12))
        trained = {name: p for name, p in exact.named_parameters() if name not in TABLES}
        decayed[file] = [n for n, p in trained.items() if p.ndim >= 2 and (tokens or not n.endswith("_token"))]
        groups = [
            {"params": [p for n, p in trained.items() if n in decayed[file]], "weight_decay": 0.05},
            {"params": [p for n, p in trained.items() if n not in decayed[file]], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
        losses = []
        for step in range(steps):
            ranks = stable_ranks(inputs[f"noise.{step}"])
            loss = exact(inputs[f"pixel_values.{step}"].double(), noise=ranks).loss
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        result = {"losses": torch.stack(losses)}
        result |= {f"param.{name}": parameter for name, parameter in trained.items()}
        write_tensors(folder / f"{file}.safetensors", result)
        print(f"adamw, {file}: losses {[round(value.item(), 4) for value in losses]}")
    write_json(folder / "case.json", {
        "kind": "adamw",
        "interpolate_pos_encoding": None,
        "comment": "Five AdamW steps. expected.safetensors: weight decay on every trained parameter of 2 or more "
                   "dimensions but the class and the mask token; expected_tokens_decayed.safetensors: on those two as "
                   "well, which is what the original recipe's grouping comes to.",
        "steps": steps, "learning_rate": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.05,
        "decayed": decayed["expected"],
        "decayed_with_tokens": decayed["expected_tokens_decayed"],
    })


def main():
    names = sys.argv[1:] or [*MODELS, "adamw"]
    for name in names:
        if name == "adamw":
            make_adamw()
        elif name in MODELS:
            make_model_case(name)
        else:
            sys.exit(f"{name}: no such case; there are {', '.join([*MODELS, 'adamw'])}")


if __name__ == "__main__":
    main()
