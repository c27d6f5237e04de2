"""What the golden scripts share: the pinned versions, random checkpoints, and transformers' model made exact."""

import contextlib
import copy
import importlib.metadata
import json
import pathlib
import re
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

HERE = pathlib.Path(__file__).parent
CASES = HERE / "cases"

# The fixed sin-cos tables: parameters by type, but never trained.
TABLES = ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")


def check_versions(requirements="requirements.txt"):
    """Stops unless exactly the pinned packages are installed."""
    wrong = []
    for line in (HERE / requirements).read_text().split():
        name, expected = line.split("==")
        try:
            # The part after + says which build it is (a CPU or a CUDA one), not which version.
            found = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "nothing"
        if found != expected:
            wrong.append(f"{name}: expected {expected}, found {found}")
    if wrong:
        sys.exit("\n".join(wrong) + f"\nInstall the pinned versions: pip install -r {requirements}")


def pair(size):
    """`(height, width)` of a size that is a number or a pair."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def sincos_table(width, rows, columns):
    """`[1, 1 + rows * columns, width]`: a zero row, then `[sin w | cos w | sin h | cos h]` per patch, in f64."""
    quarter = width // 4
    frequency = 10000.0 ** -(np.arange(quarter) / quarter)
    table = np.zeros((1 + rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            across, down = column * frequency, row * frequency
            table[1 + row * columns + column] = np.concatenate(
                [np.sin(across), np.cos(across), np.sin(down), np.cos(down)])
    return torch.from_numpy(table).unsqueeze(0)


def build(config):
    """transformers' `ViTMAEForPreTraining`, also for a rectangular image size.

    For those, transformers 4.57 makes its tables from int(sqrt(patches)), which fails to build where the number of
    patches is not a square, and builds a wrong table where it is (4 x 9 patches). So while a rectangular model is
    built, that function gives zeros of the right shape; `fill` sets the values.
    """
    from transformers import ViTMAEForPreTraining
    from transformers.models.vit_mae import modeling_vit_mae

    height, width = pair(config.image_size)
    stock = modeling_vit_mae.get_2d_sincos_pos_embed
    if height != width:
        length = (height // config.patch_size) * (width // config.patch_size)
        modeling_vit_mae.get_2d_sincos_pos_embed = lambda dim, _, add_cls_token: np.zeros((1 + length, dim))
    try:
        return ViTMAEForPreTraining(config)
    finally:
        modeling_vit_mae.get_2d_sincos_pos_embed = stock


def fill(model, rng):
    """Gives every parameter random values that keep activations lively, and the tables the sin-cos formula."""
    config = model.config
    rows, columns = (side // config.patch_size for side in pair(config.image_size))
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name in TABLES:
            value = sincos_table(shape[-1], rows, columns)
        else:
            value = rng.standard_normal(shape)
            if name.endswith("_token"):
                value *= 0.5
            elif re.search(r"(layernorm\w*|decoder_norm)\.weight$", name):
                value = 1 + 0.1 * value
            elif name.endswith(".bias"):
                value *= 0.1
            else:
                value /= np.sqrt(np.prod(shape[1:]))
            value = torch.from_numpy(value)
        with torch.no_grad():
            parameter.copy_(value)


def exact_attention(module, query, key, value, attention_mask, scaling, **_):
    """softmax(q k^T * scaling) v at the precision of its inputs; transformers' own eager path rounds to f32."""
    probabilities = torch.softmax(query @ key.transpose(-1, -2) * scaling, dim=-1)
    return (probabilities @ value).transpose(1, 2), probabilities


def patchify(pixels, patch):
    """`[B, C, H, W]` to `[B, L, P * P * C]`, pixels of a patch in the order row, column, channel."""
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    grid = pixels.reshape(batch, channels, rows, patch, columns, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch * patch * channels)


def interpolate_2d(table, old, new):
    """A table `[1, 1 + rows * columns, D]` from one grid to another; the class token's row stays as it is."""
    grid = table[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def in_f64(model, picture_size, interpolation=None):
    """A copy of the model that computes in f64 throughout.

    `interpolation` is None, "transformers" or "2d". The last replaces both of transformers' interpolations by
    `interpolate_2d`: its encoder's assumes a square table, and its decoder's works on the flattened table.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["exact"] = exact_attention
    exact = copy.deepcopy(model).double()
    config = exact.config
    for part in (config, exact.decoder.config):
        part._attn_implementation = "exact"
    patch = config.patch_size
    # transformers refuses a picture that is not square unless positions are interpolated; this is what it would do.
    exact.patchify = lambda pixels, interpolate_pos_encoding=False: patchify(pixels, patch)
    if interpolation == "2d":
        old = tuple(side // patch for side in pair(config.image_size))
        new = tuple(side // patch for side in picture_size)
        embeddings, decoder = exact.vit.embeddings, exact.decoder
        embeddings.interpolate_pos_encoding = lambda *_: interpolate_2d(embeddings.position_embeddings, old, new)
        decoder.interpolate_pos_encoding = lambda *_: interpolate_2d(decoder.decoder_pos_embed, old, new)
    return exact.eval()


def stable_ranks(noise):
    """Each value's place in a stable ascending sort: noise without ties that sorts as `noise` does, stably."""
    return noise.argsort(dim=1, stable=True).argsort(dim=1).double()


@contextlib.contextmanager
def mask_ratio(model, ratio):
    """The model with another mask ratio for a while."""
    before, model.config.mask_ratio = model.config.mask_ratio, ratio
    try:
        yield
    finally:
        model.config.mask_ratio = before


def pictures(rng, batch, channels, height, width):
    """Smooth waves plus noise, of about unit variance, as f32."""
    y, x = np.mgrid[0:height, 0:width]
    waves = rng.standard_normal((batch, channels, 3, 1, 1)) * 0.3
    phase = rng.uniform(0, 6, (batch, channels, 2, 1, 1))
    smooth = np.sin(waves[:, :, 0] * x + phase[:, :, 0]) + np.cos(waves[:, :, 1] * y + phase[:, :, 1]) + waves[:, :, 2]
    return torch.from_numpy(smooth + 0.3 * rng.standard_normal(smooth.shape)).float()


def write_tensors(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path)


def write_json(path, value):
    """An object spread over lines, or a list with one entry a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, list):
        text = "[\n" + ",\n".join("  " + json.dumps(entry) for entry in value) + "\n]"
    else:
        text = json.dumps(value, indent=2)
    path.write_text(text + "\n")
