#!/usr/bin/env python3
"""Times PyTorch's kernels on a GPU at the shapes of vitmae's benches, under the benches' names, in bf16.

    python kernels.py --out FILE.json [--only REGEX] [--budget SECONDS] [--dry]

Attention: scaled_dot_product_attention with each of its backends; LayerNorm, GELU and the loss eager and through torch.compile;
linear layers by cuBLAS; AdamW fused. Two ceilings come first: a device copy and a large matrix product. CUDA events around
a row of calls, each on other memory than the call before (past three times the second-level cache), random data, medians.
Where PyTorch's kernel does less than ours (no residual added, no packing of gradients), the peer is the faster for it.
--dry runs small shapes on the CPU to try the script.
"""

import argparse
import json
import re
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Encoder width and heads, patch size.
MODELS = {"vit_b": (768, 12, 16), "vit_l": (1024, 16, 16), "vit_h": (1280, 16, 14)}
# Its decoder and its patches are ViT-B's.
REPEATS = "vit_l"
DECODER_WIDTH, DECODER_HEADS = 512, 16
PARAMETERS = 111_907_840
ROTATE_BYTES = 400_000_000
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
            "memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


class Timer:
    def __init__(self, options):
        self.dry = options.dry
        self.device = "cpu" if options.dry else "cuda"
        self.type = torch.float32 if options.dry else torch.bfloat16
        self.batch = 2 if options.dry else 256
        self.end = time.monotonic() + options.budget
        self.only = options.only
        self.results = {}
        self.left_out = []

    def random(self, *shape, dtype=None, grad=False):
        return torch.randn(*shape, device=self.device, dtype=dtype or self.type).requires_grad_(grad)

    def wants(self, name):
        if not re.search(self.only, name):
            return False
        if time.monotonic() < self.end:
            return True
        if name not in self.left_out:
            self.left_out.append(name)
        return False

    def measure(self, name, peer, bytes_moved, make, call):
        """Median µs of `call(*state)`, with states made by `make()`; None where this PyTorch cannot do it."""
        if not self.wants(name):
            return
        into = self.results.setdefault(name, {})
        try:
            count = 1 if self.dry else max(1, min(32, -(-ROTATE_BYTES // max(1, bytes_moved))))
            states = [make() for _ in range(count)]
            for state in states[:2] * 3:
                call(*state)
            into[peer] = round(self.time(states, call), 3)
        except (RuntimeError, NotImplementedError, torch._dynamo.exc.TorchDynamoException) as error:
            print(f"{name}, {peer}: {str(error).splitlines()[0]}", file=sys.stderr)
            into[peer] = None

    def time(self, states, call):
        if self.dry:
            start = time.perf_counter()
            call(*states[0])
            return 1e6 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        # As many calls in a row as take about 10 ms, 15 rows.
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def row(calls):
            start.record()
            for index in range(calls):
                call(*states[index % len(states)])
            end.record()
            end.synchronize()
            return 1e3 * start.elapsed_time(end) / calls

        calls = max(len(states), min(2000, int(1e4 / max(1.0, row(5)))))
        return statistics.median(row(calls) for _ in range(15))

    def compiled(self, function):
        return None if self.dry else torch.compile(function, dynamic=False)


def models(timer):
    for name, (width, heads, patch) in list(MODELS.items())[: 1 if timer.dry else None]:
        patches = (224 // patch) ** 2
        yield name, width, heads, patch, patches, patches // 4


def parts(model, width, patches, visible):
    """Name, tokens of an image and features of the encoder and, where it is the model's own, the decoder."""
    both = [("encoder", 1 + visible, width), ("decoder", 1 + patches, DECODER_WIDTH)]
    return both[:1] if model == REPEATS else both


def ceilings(timer):
    if timer.dry:
        return {}
    a, b = (torch.empty(1 << 30, device="cuda", dtype=torch.uint8).random_() for _ in range(2))
    copy = timer.time([(a, b)], lambda a, b: a.copy_(b))
    del a, b
    a, b = timer.random(8192, 8192), timer.random(8192, 8192)
    product = timer.time([(a, b)], torch.mm)
    return {"copy_gbs": round(2 * (1 << 30) / copy / 1e3, 1), "matmul_tflops": round(2 * 8192 ** 3 / product / 1e6, 1)}


def attention(timer):
    for model, width, heads, _, patches, visible in models(timer):
        decoder = DECODER_WIDTH // DECODER_HEADS
        for part, tokens, h, d in [("encoder", 1 + visible, heads, width // heads), ("decoder", 1 + patches, DECODER_HEADS, decoder),
                                   ("unmasked", 1 + patches, heads, width // heads)]:
            if model == REPEATS and part == "decoder":
                continue
            name = f"{model}_{part}"
            numbers = timer.batch * tokens * h * d * 2

            def packed():
                qkv = timer.random(timer.batch, tokens, 3, h, d)
                return [part.transpose(1, 2).detach().requires_grad_() for part in qkv.unbind(2)]

            for peer, backend in BACKENDS.items():
                with sdpa_kernel(backend):
                    with torch.no_grad():
                        timer.measure(f"attention/forward/{name}", peer, 4 * numbers, packed, F.scaled_dot_product_attention)

                    def for_backward():
                        qkv = packed()
                        out = F.scaled_dot_product_attention(*qkv)
                        return out, qkv, torch.randn_like(out)

                    timer.measure(f"attention/backward/{name}", peer, 7 * numbers, for_backward,
                                  lambda out, qkv, dout: torch.autograd.grad(out, qkv, dout, retain_graph=True))


def layernorm(timer):
    def norm(x, gamma, beta):
        return F.layer_norm(x, (x.shape[-1],), gamma, beta, 1e-6)

    for model, width, _, _, patches, visible in models(timer):
        for part, tokens, d in parts(model, width, patches, visible):
            rows = timer.batch * tokens
            make = lambda: (timer.random(rows, d, grad=True), timer.random(d, grad=True), timer.random(d, grad=True))
            for peer, function in [("eager", norm), ("compiled", timer.compiled(norm))]:
                if function is None:
                    continue
                with torch.no_grad():
                    timer.measure(f"layernorm/forward/{model}_{part}", peer, 4 * rows * d, make, function)

                def for_backward():
                    inputs = make()
                    out = function(*inputs)
                    return out, inputs, torch.randn_like(out)

                timer.measure(f"layernorm/backward/{model}_{part}", peer, 6 * rows * d, for_backward,
                              lambda out, inputs, dout: torch.autograd.grad(out, inputs, dout, retain_graph=True))


def linear(timer):
    gelu = lambda x: F.gelu(x)
    linear_gelu = lambda x, weight, bias: F.gelu(F.linear(x, weight, bias))
    compiled_gelu, compiled_linear_gelu = timer.compiled(gelu), timer.compiled(linear_gelu)
    for model, width, _, _, patches, visible in models(timer):
        for part, tokens, d in parts(model, width, patches, visible):
            rows = timer.batch * tokens
            for layer, inputs, outputs in [("qkv", d, 3 * d), ("projection", d, d), ("mlp_in", d, 4 * d), ("mlp_out", 4 * d, d)]:
                name = f"{model}_{part}_{layer}"
                moved = 2 * (rows * inputs + rows * outputs + inputs * outputs)
                with torch.no_grad():
                    timer.measure(f"linear/forward/{name}", "cuBLAS", moved,
                                  lambda: (timer.random(rows, inputs), timer.random(outputs, inputs), timer.random(outputs)), F.linear)
                    timer.measure(f"linear/backward_input/{name}", "cuBLAS", moved,
                                  lambda: (timer.random(rows, outputs), timer.random(outputs, inputs)), torch.mm)
                    timer.measure(f"linear/backward_weight/{name}", "cuBLAS", moved,
                                  lambda: (timer.random(rows, outputs), timer.random(rows, inputs)),
                                  lambda dy, x: (dy.t() @ x, dy.sum(0)))
                    if layer == "mlp_in":
                        timer.measure(f"linear/activation_forward/{name}", "eager", moved,
                                      lambda: (timer.random(rows, inputs), timer.random(outputs, inputs), timer.random(outputs)),
                                      linear_gelu)
                        if compiled_linear_gelu:
                            timer.measure(f"linear/activation_forward/{name}", "compiled", moved,
                                          lambda: (timer.random(rows, inputs), timer.random(outputs, inputs), timer.random(outputs)),
                                          compiled_linear_gelu)
            for peer, function in [("eager", gelu), ("compiled", compiled_gelu)]:
                if function is not None:
                    # As ours: the gradient of the layer behind, times the slope of GELU at what it was given.
                    def for_backward():
                        pre = timer.random(rows, 4 * d, grad=True)
                        return function(pre), pre, timer.random(rows, d), timer.random(d, 4 * d)

                    timer.measure(f"linear/activation_backward_input/{model}_{part}_mlp_out", peer,
                                  2 * (rows * d + 2 * rows * 4 * d + 4 * d * d), for_backward,
                                  lambda out, pre, dy, weight: torch.autograd.grad(out, pre, dy @ weight, retain_graph=True))
                    with torch.no_grad():
                        timer.measure(f"linear/gelu_forward/{model}_{part}_mlp", peer, 4 * rows * 4 * d,
                                      lambda: (timer.random(rows, 4 * d),), function)


def pixel_loss(prediction, pictures, mask, patch):
    """The masked loss over all patches, with the target normalised per patch, from bytes `[B, H, W, C]`."""
    batch, height, width, channels = pictures.shape
    mean = torch.tensor([0.485, 0.456, 0.406], device=pictures.device)
    deviation = torch.tensor([0.229, 0.224, 0.225], device=pictures.device)
    pixels = (pictures.float() / 255 - mean) / deviation
    pixels = pixels.reshape(batch, height // patch, patch, width // patch, patch, channels)
    target = pixels.permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (prediction.float() - target).square().mean(-1)
    return (error * mask).sum() / mask.sum()


def loss(timer):
    def both(prediction, pictures, mask, patch):
        value = pixel_loss(prediction, pictures, mask, patch)
        return torch.autograd.grad(value, prediction)

    compiled = timer.compiled(pixel_loss)

    def both_compiled(prediction, pictures, mask, patch):
        return torch.autograd.grad(compiled(prediction, pictures, mask, patch), prediction)

    for model, _, _, patch, patches, visible in models(timer):
        if model == REPEATS:
            continue

        def make():
            pictures = torch.randint(0, 256, (timer.batch, 224, 224, 3), device=timer.device, dtype=torch.uint8)
            mask = (torch.arange(patches, device=timer.device) >= visible).float().expand(timer.batch, -1).contiguous()
            return timer.random(timer.batch, patches, 3 * patch * patch, grad=True), pictures, mask, patch

        moved = timer.batch * patches * 3 * patch * patch * 5
        for peer, function in [("eager", both), ("compiled", both_compiled if compiled else None)]:
            if function is not None:
                timer.measure(f"loss/forward_backward_u8/{model}", peer, moved, make, function)


def adamw(timer):
    length = 1 << 16 if timer.dry else PARAMETERS

    def make():
        parameter = timer.random(length, dtype=torch.float32, grad=True)
        parameter.grad = timer.random(length, dtype=torch.float32)
        return (torch.optim.AdamW([parameter], lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True),)

    timer.measure("adamw/step/vit_b", "fused", 28 * length, make, lambda optimizer: optimizer.step())
    with torch.no_grad():
        timer.measure("adamw/gradient_norm/vit_b", "eager", 4 * length, lambda: (timer.random(length, dtype=torch.float32),),
                      torch.linalg.vector_norm)


def masking(timer):
    def mask(noise, keep):
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        return order[:, :keep], order[:, keep:], restore, (restore >= keep).float()

    for model, _, _, _, patches, visible in models(timer):
        if model == REPEATS:
            continue
        timer.measure(f"masking/from_noise/{model}", "eager", 16 * timer.batch * patches,
                      lambda: (timer.random(timer.batch, patches, dtype=torch.float32), visible), mask)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--budget", type=float, default=240)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    timer = Timer(options)
    result = {"torch": torch.__version__, "device": "cpu" if options.dry else torch.cuda.get_device_name(),
              "batch": timer.batch, "ceilings": ceilings(timer), "kernels": timer.results, "left_out": timer.left_out}
    for family in (attention, layernorm, loss, adamw, masking, linear):
        family(timer)
        # After each family, so that what was measured is there whatever happens next.
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
