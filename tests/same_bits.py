#!/usr/bin/env python3
"""Do two builds of vitmae compute the same bits?

    tests/same_bits.py OLD NEW [CASE...]

OLD and NEW are binaries, both built with the feature `emulator`. Each case runs the same commands with both and compares what
they leave: weights, averages and moments byte for byte, losses and gradient norms digit for digit. Exits with 1 where anything
differs. For a change that must not change results; a change that must says here which case differs, and why.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile

# 32x32 pixels in 16 patches, two blocks and one; heads of 32 features so that the tensor-core kernels run.
SMALL = {
    "architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", "image_size": 32, "patch_size": 8, "num_channels": 3,
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1, "decoder_intermediate_size": 64, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "mask_ratio": 0.75, "norm_pix_loss": False, "qkv_bias": True,
}


class Build:
    def __init__(self, binary, folder):
        self.binary, self.folder = pathlib.Path(binary).resolve(), folder
        folder.mkdir(parents=True)
        (folder / "small.json").write_text(json.dumps(SMALL))

    def start(self, *arguments, **environment):
        clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        return subprocess.Popen([self.binary, "-q", *map(str, arguments)], cwd=self.folder, env=clean | environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *arguments):
        self.end(self.start(*arguments))

    @staticmethod
    def end(process):
        output, _ = process.communicate(timeout=1800)
        if process.returncode != 0:
            sys.exit(f"{' '.join(map(str, process.args))} failed:\n{output}")

    def pretrain(self, out, *arguments):
        self.run("pretrain", "--data", "synthetic:48", "--seed", 7, "--batch-size", 8, "--blr", 1e-2, "--warmup-epochs", 1,
                 "--out", out, *arguments)


def cpu(build):
    build.pretrain("run", "--device", "cpu", "--model", "tiny", "--image-size", 64, "--steps", 20, "--ema", 0.9, "--val", "synthetic:8",
                   "--clip-grad", 1, "--accumulate", 2, "--micro-batch", 3, "--checkpoint-every", 10)


def cpu_normalised_pixels(build):
    build.pretrain("run", "--device", "cpu", "--model", "small.json", "--steps", 20, "--norm-pix-loss", "--recompute")


def emulator_bf16(build):
    build.pretrain("run", "--device", "emulator", "--precision", "bf16", "--model", "small.json", "--steps", 20, "--ema", 0.9,
                   "--micro-batch", 4)


def emulator_f32(build):
    build.pretrain("run", "--device", "emulator", "--precision", "f32", "--model", "small.json", "--steps", 4)


def processes(build, *arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        build.start("pretrain", "--data", "synthetic:48", "--seed", 7, "--batch-size", 8, "--model", "small.json", "--device", "cpu",
                    "--threads", 1, "--steps", 20, "--out", "run", *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(2)
    ]
    for process in started:
        build.end(process)


def two_processes(build):
    processes(build)


def two_processes_sharded(build):
    processes(build, "--shard-optimizer", "--ema", "0.9")


def inference(build):
    # A checkpoint of fresh weights by the same seed, then everything that reads one.
    build.pretrain("run", "--device", "cpu", "--model", "small.json", "--steps", 2)
    checkpoint = "run/checkpoint-2"
    build.run("embed", "--device", "cpu", "--from", checkpoint, "--data", "synthetic:6", "--out", "run/features.safetensors")
    for device in ("cpu", "emulator"):
        build.run("embed", "--device", device, "--precision", "f32", "--from", checkpoint, "--data", "synthetic:3", "--pool", "tokens",
                  "--out", f"run/tokens-{device}.safetensors")


CASES = [cpu, cpu_normalised_pixels, emulator_bf16, emulator_f32, two_processes, two_processes_sharded, inference]


def difference(old, new):
    """How two runs' files differ, in words; None where they agree."""
    names = lambda root: {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    kept = lambda name: name.suffix in (".safetensors", ".npy", ".png") or name.name in ("config.json", "preprocessor_config.json")
    mine, yours = ({name for name in names(root) if kept(name)} for root in (old, new))
    if mine != yours:
        return f"files: {sorted(map(str, mine ^ yours))}"
    for name in sorted(mine):
        if (old / name).read_bytes() != (new / name).read_bytes():
            return f"{name}"
    steps = [[{key: line.get(key) for key in ("step", "loss", "gradient_norm", "learning_rate", "validation_loss")}
              for line in map(json.loads, (root / "metrics.jsonl").read_text().splitlines())] for root in (old, new)]
    if steps[0] != steps[1]:
        return "metrics.jsonl"
    return None


def main():
    old_binary, new_binary, *wanted = sys.argv[1:]
    failed = False
    with tempfile.TemporaryDirectory() as root:
        root = pathlib.Path(root)
        for case in CASES:
            if wanted and case.__name__ not in wanted:
                continue
            builds = [Build(binary, root / case.__name__ / name) for binary, name in ((old_binary, "old"), (new_binary, "new"))]
            for build in builds:
                case(build)
            found = difference(*(build.folder / "run" for build in builds))
            failed |= found is not None
            print(f"{case.__name__}: {'same bits' if found is None else 'DIFFERS in ' + found}", flush=True)
        if not wanted or "resume" in wanted:
            # Both go on from the folder that OLD left half-way.
            half = Build(old_binary, root / "resume" / "half")
            half.pretrain("run", "--device", "cpu", "--model", "small.json", "--steps", 10, "--ema", 0.9)
            folders = []
            for binary, name in ((old_binary, "old"), (new_binary, "new")):
                build = Build(binary, root / "resume" / name)
                shutil.copytree(half.folder / "run", build.folder / "run")
                build.pretrain("run", "--device", "cpu", "--model", "small.json", "--steps", 20, "--ema", 0.9, "--resume")
                folders.append(build.folder / "run")
            found = difference(*folders)
            failed |= found is not None
            print(f"resume: {'same bits' if found is None else 'DIFFERS in ' + found}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
