"""Times the loader beside torchvision and Pillow on this machine, on one thread each and in turn.

    cargo build --release --example load                              # and with --features turbojpeg
    python benches/peers/loader.py FOLDER [--rounds 5] [--pictures 2000] [--ours PROGRAM ...]

FOLDER holds JPEG files. Each does what training does to a picture before the model sees it: read, decode, RandomResizedCrop to
224 x 224 (20 to 100 %, bicubic, antialiased) and a flip, to uint8. torchvision works on tensors (`decode_jpeg`, transforms v2),
Pillow on its pictures (with torchvision's transforms v2). A second torchvision goes on to normalised float32, which is what a model
in PyTorch is given and what ours does on the device. Every round runs each in a process of its own; printed are medians
over the rounds of pictures per second of processor time and by the clock, and the ratios ours / torchvision round by round.
"""

import argparse
import json
import pathlib
import random
import statistics
import sys
import time

from runs import run

HERE = pathlib.Path(__file__).parent
PEERS = ("torchvision", "normalized", "pillow")
OURS = HERE.parent.parent / "target" / "release" / "examples" / "load"


def peer(kind, folder, count):
    import torch
    import torchvision
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    torch.manual_seed(0)
    paths = sorted(str(path) for path in pathlib.Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    transform = v2.Compose([
        v2.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
    ])
    if kind == "torchvision":
        name = f"torchvision {torchvision.__version__}, tensors"
        load = lambda path: transform(decode_jpeg(read_file(path), mode=ImageReadMode.RGB))
    elif kind == "normalized":
        name = f"torchvision {torchvision.__version__}, tensors, to normalised float32"
        normalize = v2.Compose([
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], inplace=True),
        ])
        load = lambda path: normalize(transform(decode_jpeg(read_file(path), mode=ImageReadMode.RGB)))
    else:
        name = f"Pillow {Image.__version__}, torchvision's transforms"
        pil_to_tensor = v2.PILToTensor()
        load = lambda path: pil_to_tensor(transform(Image.open(path).convert("RGB")))
    for path in paths:
        load(path)
    order = random.Random(0)
    started, used, done = time.perf_counter(), time.process_time(), 0
    while done < count:
        order.shuffle(paths)
        for path in paths:
            load(path)
        done += len(paths)
    used, seconds = time.process_time() - used, time.perf_counter() - started
    print(json.dumps({"implementation": name, "pictures": done, "per_processor_second": done / used,
                      "per_second": done / seconds}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--ours", nargs="*", default=[OURS], help="programs, built with different features")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return peer(arguments.peer, arguments.folder, arguments.pictures)

    commands = [[program, arguments.folder, arguments.pictures] for program in arguments.ours]
    commands += [[sys.executable, __file__, arguments.folder, "--pictures", arguments.pictures, "--peer", kind]
                 for kind in PEERS]
    results = [[] for _ in commands]
    for _ in range(arguments.rounds):
        for command, list_of_results in zip(commands, results):
            list_of_results.append(run(command))
    theirs = results[len(arguments.ours)]
    for mine in results:
        normalized = sorted(a["per_processor_second"] / b["per_processor_second"]
                            for a, b in zip(mine, results[len(arguments.ours) + 1]))
        middle = lambda key: statistics.median(result[key] for result in mine)
        ratios = sorted(a["per_processor_second"] / b["per_processor_second"] for a, b in zip(mine, theirs))
        print(f"{mine[0]['implementation']}: {middle('per_processor_second'):.0f} pictures per second of processor time, "
              f"{middle('per_second'):.0f} by the clock; {statistics.median(ratios):.2f} times torchvision "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f}), {statistics.median(normalized):.2f} times with its normalising", flush=True)


if __name__ == "__main__":
    main()
