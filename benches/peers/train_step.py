#!/usr/bin/env python3
"""Times a PyTorch masked autoencoder: the yardstick for `vitmae`'s own benchmarks.

Two figures, on the CPU at f32 on every core (or `--threads N`), or on a GPU (`--device cuda`), there also in bf16 by autocast
with f32 weights (`--precision bf16`), and through `torch.compile` (`--compile`); attention is PyTorch's fused one:

- `train`: one whole optimiser step at mask ratio 0.75: forward, backward, AdamW, zero_grad. Images per second from the
  median step; the fastest and the slowest step are printed too, so that noise shows.
- `encode`: the encoder alone over every patch, without gradients.

`cpu_seconds_per_step` is the time all threads together ran, which tells a busy machine from a slow program, and
`imported_rss_mb` is the part of `peak_rss_mb` that was there before the model was.

With `--mae PATH` the model comes from a checkout of the original implementation, which you supply (its licence is not
ours, so none of it is in this repository); it was written for timm 0.3.2 and NumPy < 1.24, and `original_model` bridges
what has changed since. Without it, `TimmMae` below is measured: the same architecture out of timm's blocks, or where timm is
missing out of blocks of PyTorch's own layers. The line
printed says which (`implementation`). Data loading is no part of either figure: the batch is in memory.

    pip install -r requirements.txt
    python train_step.py [--mae PATH] [--model base] [--batch 16] [--steps 10] [--mode both]

Prints one line of JSON.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time

import numpy as np
import torch
from torch import nn

try:
    import timm
    import timm.models.vision_transformer as vision_transformer
except ImportError:
    # A machine that has PyTorch alone.
    timm, vision_transformer = None, None

IMAGE_SIZE = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Encoder width, depth and heads, patch size; decoder width, depth and heads.
MODELS = {
    "tiny": dict(width=192, depth=12, heads=3, patch=16, decoder_width=128, decoder_depth=4, decoder_heads=4),
    "base": dict(width=768, depth=12, heads=12, patch=16, decoder_width=512, decoder_depth=8, decoder_heads=16),
    "large": dict(width=1024, depth=24, heads=16, patch=16, decoder_width=512, decoder_depth=8, decoder_heads=16),
    "huge": dict(width=1280, depth=32, heads=16, patch=14, decoder_width=512, decoder_depth=8, decoder_heads=16),
}


def sincos_table(width, side):
    """`[1, 1 + side * side, width]`: a zero row for the class token, then `[sin w | cos w | sin h | cos h]` per patch."""
    quarter = width // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    parts = []
    for place in (column, row):
        angle = place.reshape(-1, 1) * frequency
        parts += [angle.sin(), angle.cos()]
    table = torch.cat(parts, dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table]).float().unsqueeze(0)


class PlainPatchEmbed(nn.Module):
    """timm's `PatchEmbed`, where timm is missing."""

    def __init__(self, image_size, patch, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class PlainBlock(nn.Module):
    """timm's `Block`, where timm is missing: the same layers and PyTorch's fused attention."""

    def __init__(self, width, heads, mlp_ratio, qkv_bias, norm_layer):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm_layer(width), norm_layer(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=qkv_bias), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, int(mlp_ratio * width)), nn.Linear(int(mlp_ratio * width), width)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(attended)
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class TimmMae(nn.Module):
    """The masked autoencoder of arXiv 2111.06377 out of timm's patch embedding and transformer blocks."""

    def __init__(self, width, depth, heads, patch, decoder_width, decoder_depth, decoder_heads):
        super().__init__()
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        side = IMAGE_SIZE // patch
        self.patch = patch
        embed = vision_transformer.PatchEmbed if timm else PlainPatchEmbed
        self.patch_embed = embed(IMAGE_SIZE, patch, 3, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(sincos_table(width, side), requires_grad=False)
        block = functools.partial(vision_transformer.Block if timm else PlainBlock, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm)
        self.blocks = nn.ModuleList(block(width, heads) for _ in range(depth))
        self.norm = norm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_width) * 0.02)
        self.decoder_pos_embed = nn.Parameter(sincos_table(decoder_width, side), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(block(decoder_width, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = norm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, 3 * patch * patch)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def targets(self, images):
        """Pixels per patch, `[B, L, P * P * 3]` in the order row, column, channel."""
        patches = nn.functional.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        batch, length, _ = patches.shape
        return patches.reshape(batch, length, 3, -1).transpose(2, 3).flatten(2)

    def forward(self, images, mask_ratio):
        tokens = self.patch_embed(images) + self.pos_embed[:, 1:]
        batch, length, width = tokens.shape
        keep = int(length * (1 - mask_ratio))
        order = torch.rand(batch, length, device=images.device).argsort(dim=1)
        restore = order.argsort(dim=1)
        visible = tokens.gather(1, order[:, :keep, None].expand(-1, -1, width))
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        latent = torch.cat([first, visible], dim=1)
        for block in self.blocks:
            latent = block(latent)
        latent = self.decoder_embed(self.norm(latent))

        hidden = self.mask_token.expand(batch, length - keep, -1)
        tokens = torch.cat([latent[:, 1:], hidden], dim=1)
        tokens = tokens.gather(1, restore[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([latent[:, :1], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        prediction = self.decoder_pred(self.decoder_norm(tokens))[:, 1:]

        mask = (restore >= keep).to(prediction.dtype)
        error = (prediction - self.targets(images)).square().mean(dim=2)
        return (error * mask).sum() / mask.sum(), prediction, mask


def original_model(checkout, shape):
    """The original implementation from a checkout, with today's timm and NumPy."""
    # NumPy 1.24 removed the alias of the built-in type.
    if not hasattr(np, "float"):
        np.float = float

    # timm's blocks no longer take `qk_scale`; the original only ever passes None, which is today's behaviour.
    block = vision_transformer.Block

    class BlockWithoutScale(block):
        def __init__(self, *args, qk_scale=None, **kwargs):
            if qk_scale is not None:
                raise ValueError(f"qk_scale: expected None, found {qk_scale}")
            super().__init__(*args, **kwargs)

    vision_transformer.Block = BlockWithoutScale
    sys.path.insert(0, checkout)
    try:
        import models_mae
    finally:
        sys.path.remove(checkout)
        vision_transformer.Block = block
    return models_mae.MaskedAutoencoderViT(
        img_size=IMAGE_SIZE, patch_size=shape["patch"], embed_dim=shape["width"], depth=shape["depth"],
        num_heads=shape["heads"], decoder_embed_dim=shape["decoder_width"], decoder_depth=shape["decoder_depth"],
        decoder_num_heads=shape["decoder_heads"], norm_layer=functools.partial(nn.LayerNorm, eps=1e-6))


def random_batch(batch, seed):
    """Random 8-bit pictures, normalised as ImageNet's are."""
    pictures = np.random.default_rng(seed).integers(0, 256, (batch, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (torch.from_numpy(pictures).float() / 255 - mean) / std


def encode(model, images):
    """Every patch and the class token through the encoder and its final norm."""
    tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
    first = (model.cls_token + model.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
    tokens = torch.cat([first, tokens], dim=1)
    for block in model.blocks:
        tokens = block(tokens)
    return model.norm(tokens)


def peak_rss_mb():
    """The process's peak resident memory in MB (10^6 bytes), or None where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return round(int(line.split()[1]) * 1024 / 1e6)
    except OSError:
        pass
    return None


def step_flops(shape):
    """Operations of a step per image: the products of linear layers and attention of the reference implementation at mask ratio
    0.75, a multiply-add counted as two, backward twice forward but for the patch embedding, which has no input gradient."""
    patches = (IMAGE_SIZE // shape["patch"]) ** 2
    visible, everything = 1 + patches // 4, 1 + patches
    pixels = 3 * shape["patch"] ** 2
    forward = 0
    for width, depth, tokens in [(shape["width"], shape["depth"], visible),
                                 (shape["decoder_width"], shape["decoder_depth"], everything)]:
        forward += depth * (2 * 12 * tokens * width ** 2 + 4 * tokens ** 2 * width)
    forward += 2 * visible * shape["width"] * shape["decoder_width"] + 2 * everything * shape["decoder_width"] * pixels
    return 3 * forward + 2 * 2 * patches * pixels * shape["width"]


def measure(step, batch, steps, warm_up, device, group=1):
    """Times `steps` steps, waiting for a GPU after each `group` of them."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(warm_up):
        step()
    wait()
    seconds, cpu_seconds = [], []
    for _ in range(max(1, steps // group)):
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(group):
            step()
        wait()
        seconds.append((time.perf_counter() - start) / group)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "images_per_second": round(batch / statistics.median(seconds), 3),
        "fastest": round(batch / min(seconds), 3),
        "slowest": round(batch / max(seconds), 3),
        "cpu_seconds_per_step": round(statistics.median(cpu_seconds), 3),
        "steps": steps,
        "peak_rss_mb": peak_rss_mb(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mae", metavar="PATH", help="a checkout of the original implementation")
    parser.add_argument("--model", choices=sorted(MODELS), default="base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=2, help="untimed steps before them")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--mode", choices=("train", "encode", "both"), default="both")
    parser.add_argument("--adamw", choices=("default", "fused"), default="default",
                        help="torch's default AdamW, or its fused one")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = MODELS[arguments.model]
    device, low = arguments.device, arguments.precision == "bf16"
    imported_rss_mb = peak_rss_mb()
    if arguments.mae and not timm:
        parser.error("--mae needs timm: the original takes its blocks from there")
    model = original_model(arguments.mae, shape) if arguments.mae else TimmMae(**shape)
    model.to(device)
    images = random_batch(arguments.batch, seed=0).to(device)
    result = {
        "implementation": "original with timm's blocks" if arguments.mae else f"clean-room with {'timm' if timm else 'PyTorch'}'s blocks",
        "model": arguments.model,
        "image_size": IMAGE_SIZE,
        "batch": arguments.batch,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "precision": arguments.precision,
        "compiled": arguments.compile,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__ if timm else None,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "imported_rss_mb": imported_rss_mb,
    }
    # A GPU is waited for only now and then, so that launching runs ahead as it does in training.
    group = min(5, arguments.steps) if device == "cuda" else 1
    autocast = functools.partial(torch.autocast, device, dtype=torch.bfloat16, enabled=low)

    # Encoding comes first: its peak memory would be hidden by training's.
    if arguments.mode in ("encode", "both"):
        model.eval()
        encoder = torch.compile(encode) if arguments.compile else encode
        with torch.no_grad(), autocast():
            result["encode"] = measure(lambda: encoder(model, images), arguments.batch, arguments.steps, arguments.warm_up,
                                       device, group)

    if arguments.mode in ("train", "both"):
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1.5e-4, betas=(0.9, 0.95), fused=arguments.adamw == "fused" or None)
        forward = torch.compile(model) if arguments.compile else model

        def step():
            with autocast():
                loss, _, _ = forward(images, mask_ratio=0.75)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step.loss = loss.detach()
            if device == "cpu":
                step.loss.item()

        result["train"] = measure(step, arguments.batch, arguments.steps, arguments.warm_up, device, group)
        result["train"]["mask_ratio"] = 0.75
        result["train"]["adamw"] = arguments.adamw
        result["train"]["last_loss"] = round(step.loss.item(), 4)
        result["train"]["tflops_per_second"] = round(result["train"]["images_per_second"] * step_flops(shape) / 1e12, 3)
        if device == "cuda":
            result["train"]["gpu_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)

    print(json.dumps(result))


if __name__ == "__main__":
    main()
