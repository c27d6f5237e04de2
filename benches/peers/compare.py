"""Times vitmae and the PyTorch peer in turn on this machine: a training step and encoding of ViT-B/16 at 224 pixels.

    cargo build --release --example measure
    python benches/peers/compare.py [--rounds 3] [--steps 6] [--mae PATH]

Each round runs ours and then the peer's, each in a process of its own; a process's figure is the median of its steps. Printed
are the medians over the rounds, the ratio ours / peer round by round, and the largest resident sets. `--mae` is passed on: a
checkout of the original implementation; without it the same architecture is built from timm's blocks.
"""

import argparse
import pathlib
import statistics
import sys

from runs import run

HERE = pathlib.Path(__file__).parent
OURS = HERE.parent.parent / "target" / "release" / "examples" / "measure"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--model", default="base")
    parser.add_argument("--mae")
    arguments = parser.parse_args()

    peer = [sys.executable, HERE / "train_step.py", "--model", arguments.model, "--batch", arguments.batch,
            "--steps", arguments.steps] + (["--mae", arguments.mae] if arguments.mae else [])
    for mode in ["train", "encode"]:
        ours, theirs = [], []
        for _ in range(arguments.rounds):
            ours.append(run([OURS, mode, arguments.model, arguments.batch, arguments.steps, arguments.micro_batch]))
            theirs.append(run([*peer, "--mode", mode]))
        name = theirs[0]["implementation"]
        theirs = [result[mode] for result in theirs]
        ratios = sorted(a["images_per_second"] / b["images_per_second"] for a, b in zip(ours, theirs))
        memory = [a["peak_rss_mb"] / b["peak_rss_mb"] for a, b in zip(ours, theirs)]
        middle = lambda results, key: statistics.median(result[key] for result in results)
        print(f"{mode}: ours {middle(ours, 'images_per_second'):.2f} images/s, {middle(ours, 'peak_rss_mb'):.0f} MB; "
              f"{name}: {middle(theirs, 'images_per_second'):.2f} images/s, {middle(theirs, 'peak_rss_mb'):.0f} MB; "
              f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), "
              f"memory {statistics.median(memory):.2f}", flush=True)


if __name__ == "__main__":
    main()
