#!/usr/bin/env python3
"""Checks and measures vitmae on a GPU, out of a bundle (bundle.sh) or a checkout with the same programs under bin/.

    python3 run.py PART... --out FOLDER [--budget 460] [--only REGEX] [--dry]
    python3 run.py tables --out FOLDER         writes FOLDER/README.md from the JSON that is there

Parts, each within the budget of seconds by itself; what did not fit is listed and can be run with --only:

    correctness   every kernel test on the GPU, the goldens, and a short training run
    sanitizer     the kernel tests under compute-sanitizer: memcheck, racecheck, initcheck, synccheck
    kernels       every op's time beside the machine's ceilings and PyTorch's kernels
    step          a training step of ViT-B, L and H beside PyTorch, eager and compiled
    profile       counters of each kernel in a training step, by ncu

Each writes FOLDER/PART.json. --dry runs the same on a machine without a GPU: tests on the emulator, small peers on the CPU.
"""

import argparse
import concurrent.futures
import csv
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import tables

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BIN = ROOT / "bin"
PEERS = ROOT / "benches" / "peers"
# Tests of the build and of the emulator, which have nothing to do with a GPU.
NOT_ABOUT_A_GPU = ("build_script::", "report::", "emulated::", "the_emulator_")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Clock:
    """The time that is left of a budget."""

    def __init__(self, budget):
        self.end = time.monotonic() + budget

    def left(self, at_most):
        return max(0.0, min(at_most, self.end - time.monotonic()))


def command(arguments, timeout, env=None, cwd=None):
    """Runs a program; its status is "ok", "failed", "timeout" or "not run"."""
    if timeout < 1:
        return {"status": "not run", "seconds": 0.0, "output": ""}
    started = time.monotonic()
    try:
        done = subprocess.run([str(part) for part in arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, errors="replace", timeout=timeout, env={**os.environ, **(env or {})}, cwd=cwd)
        status, output = ("ok" if done.returncode == 0 else "failed"), done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = "timeout", error.stdout or ""
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
    except OSError as error:
        status, output = "failed", str(error)
    return {"status": status, "seconds": round(time.monotonic() - started, 2), "output": output}


def tail(text, lines=25):
    return "\n".join(text.strip().splitlines()[-lines:])


def restore_root():
    """Makes the path that the tests were built at lead here: they look for goldens and kernel sources there."""
    bundle = ROOT / "bundle.json"
    if not bundle.exists():
        return
    built_at = pathlib.Path(json.loads(bundle.read_text())["root"])
    if built_at.exists():
        return
    try:
        built_at.parent.mkdir(parents=True, exist_ok=True)
        built_at.symlink_to(ROOT)
    except OSError as error:
        print(f"tests that read files will fail: {built_at} cannot be made to lead here ({error})", file=sys.stderr)


def environment():
    about = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    bundle = ROOT / "bundle.json"
    if bundle.exists():
        about.update(json.loads(bundle.read_text()))
        about.pop("root", None)
    query = command(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], 20)
    about["gpu"] = query["output"].strip() if query["status"] == "ok" else "none"
    torch = command([sys.executable, "-c", "import torch; print(torch.__version__)"], 120)
    about["torch"] = tail(torch["output"], 1) if torch["status"] == "ok" else "none"
    return about


def tests(program, only):
    """A test program's tests, as pairs of program and name."""
    listed = command([BIN / program, "--list"], 60)
    names = [line.removesuffix(": test") for line in listed["output"].splitlines() if line.endswith(": test")]
    wanted = [name for name in names if not name.startswith(NOT_ABOUT_A_GPU)]
    return [(program, name) for name in wanted if re.search(only, name)]


def run_test(program, name, device, timeout, wrapper=(), exact=True):
    """A test, or all tests of a module, in a process of its own: after a fault on a GPU nothing else of a process counts."""
    env = {"VITMAE_TEST_DEVICE": device} if device else {}
    arguments = [*wrapper, BIN / program, name, *(["--exact"] if exact else []), "--nocapture", "--test-threads=1"]
    result = command(arguments, timeout, env)
    if result["status"] == "ok" and exact and "skipped:" in result["output"]:
        result["status"] = "skipped"
    result["output"] = "" if result["status"] == "ok" else tail(result["output"])
    return {"name": name, **result}


def in_parallel(jobs, work, clock, at_most):
    """Runs `work(job, timeout)` for all jobs, a few at a time, as long as there is time."""
    workers = max(1, min(4, (os.cpu_count() or 1) // 2))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda job: work(job, clock.left(at_most)), jobs))


def correctness(options, clock):
    device = None if options.dry else "cuda"
    jobs = tests("test-kernels", options.only) + tests("test-emulated_model", options.only)
    results = in_parallel(jobs, lambda job, timeout: run_test(*job, device, timeout), clock, 150)
    return {"tests": results, "goldens": goldens(options, clock), "training": training(options, clock),
            "own_stream": own_stream(options, clock)}


def goldens(options, clock):
    """The command line's outputs and gradients against those of the Python implementation."""
    # NumPy comes with PyTorch; everything else here needs Python alone.
    import golden

    results = []
    device = "cpu" if options.dry else "cuda"
    for folder in sorted((ROOT / "tests" / "golden" / "cases").iterdir()):
        about = json.loads((folder / "case.json").read_text()) if (folder / "case.json").exists() else {}
        if about.get("kind") != "model" or not re.search(options.only, f"golden {folder.name}"):
            continue
        for precision in ["f32"] if options.dry else ["f32", "bf16"]:
            with tempfile.TemporaryDirectory() as work:
                out = pathlib.Path(work) / "out.safetensors"
                arguments = [BIN / "vitmae", "--device", device, "--precision", precision, "forward", "--from", folder,
                             "--input", folder / "input.safetensors", "--output", out]
                if about.get("interpolate_pos_encoding"):
                    arguments += ["--interpolate-pos-encoding", about["interpolate_pos_encoding"]]
                expected = golden.read(folder / "expected.safetensors")
                if any(name.startswith("grad.") for name in expected):
                    arguments.append("--gradients")
                result = command(arguments, clock.left(60))
                if result["status"] == "ok":
                    result.update(golden.compare(golden.read(out), expected, precision))
            result["output"] = "" if result["status"] == "ok" else tail(result["output"])
            results.append({"name": folder.name, "precision": precision, **result})
    return results


def training(options, clock):
    """Twenty steps of a small model, twice with one seed: the loss falls, and both runs give the same numbers."""
    device = "cpu" if options.dry else "cuda"
    losses = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as work:
            out = pathlib.Path(work) / "run"
            result = command(
                [BIN / "vitmae", "--device", device, "--precision", "f32" if options.dry else "bf16", "pretrain", "--data",
                 "synthetic:64", "--model", "tiny", "--image-size", "64", "--batch-size", "16", "--steps", "20", "--blr", "1e-2",
                 "--out", out], clock.left(120))
            if result["status"] != "ok":
                return {"name": "pretrain", **result, "output": tail(result["output"])}
            lines = (out / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["loss"] for line in lines])
    falls = sum(losses[0][-5:]) < sum(losses[0][:5])
    same = losses[0] == losses[1]
    return {"name": "pretrain", "status": "ok" if falls and same else "failed", "seconds": result["seconds"], "falls": falls,
            "same_twice": same, "first": losses[0][0], "last": losses[0][-1], "output": ""}


def own_stream(options, clock):
    """The example that calls kernels on its own cudarc stream and compares with the CPU."""
    result = command([BIN / "own_stream"], clock.left(60))
    if options.dry and "DriverMissing" in result["output"]:
        result["status"] = "skipped"
    return {"name": "own_stream", **result, "output": tail(result["output"])}


def sanitizer(options, clock):
    """Each module of tests under each tool; starting a tool takes long, so not each test."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    modules = sorted({name.split("::")[0] + "::" for _, name in tests("test-kernels", options.only) if "::" in name})
    # Tool by tool, so that what there is no time for is the rarest kind of fault.
    jobs = [(tool, name) for tool in TOOLS for name in modules]

    def check(job, timeout):
        tool, name = job
        # Guard zones and poison would hide what the tools look for.
        wrapper = [] if options.dry else [found, "--tool", tool, "--error-exitcode", "97", "--print-limit", "5"]
        return {"tool": tool, **run_test("test-kernels", name, None if options.dry else "cuda-plain", timeout, wrapper, exact=False)}

    return {"tests": in_parallel(jobs, check, clock, 400)}


def kernels(options, clock):
    """Our benches, and the peers with the same names."""
    label = "cpu/f32" if options.dry else "cuda/bf16"
    with tempfile.TemporaryDirectory() as work:
        peers = command([sys.executable, PEERS / "kernels.py", "--out", f"{work}/peers.json", "--only", options.only,
                         "--budget", str(int(clock.left(220)))] + (["--dry"] if options.dry else []), clock.left(260))
        peer_results = pathlib.Path(f"{work}/peers.json")
        theirs = json.loads(peer_results.read_text()) if peer_results.exists() else {"kernels": {}, "ceilings": {}}
        # Dry: two families, for real but briefly, so that there is something to read.
        bench = "masking|layernorm" if options.dry else options.bench
        pattern = f"^(?:{bench}).*{label}$" if bench else f"{label}$"
        mode = ["--bench", "--quick"] if options.dry else ["--bench"]
        ours = command([BIN / "bench-ops", *mode, "--noplot", pattern], clock.left(600), {"CRITERION_HOME": work}, cwd=work)
        times = criterion(pathlib.Path(work))
    return {"ours": times, "peers": theirs, "status": {"ours": ours["status"], "peers": peers["status"]},
            "output": {"ours": "" if ours["status"] == "ok" else tail(ours["output"]),
                       "peers": "" if peers["status"] == "ok" else tail(peers["output"])}}


def criterion(folder):
    """Criterion's medians in µs, with the ops' bytes and operations."""
    found = {}
    for path in folder.rglob("new/benchmark.json"):
        about = json.loads(path.read_text())
        estimates = json.loads((path.parent / "estimates.json").read_text())
        throughput = about.get("throughput") or {}
        throughput = throughput.get("ElementsAndBytes", throughput)
        found[about["full_id"]] = {"us": estimates["median"]["point_estimate"] / 1e3, "bytes": throughput.get("bytes"),
                                   "flops": throughput.get("elements")}
    return found


# Model, batch: as large as a step of 80 GB takes with all activations kept.
STEPS = {"base": 512, "large": 256, "huge": 128}


def step(options, clock):
    runs = []
    for model, batch in ({"tiny": 2} if options.dry else STEPS).items():
        if not re.search(options.only, model):
            continue
        if options.batch:
            batch = options.batch
        count = 2 if options.dry else 20
        device, precision = ("cpu", "f32") if options.dry else ("cuda", "bf16")
        jobs = [("vitmae", [BIN / "measure", "train", model, batch, count, batch, device, precision])]
        for name, extra in [("PyTorch, eager", []), ("PyTorch, compiled", ["--compile"])]:
            if options.dry and extra:
                continue
            jobs.append((name, [sys.executable, PEERS / "train_step.py", "--mode", "train", "--model", model, "--batch", batch,
                                "--steps", count, "--device", device, "--precision", precision, "--adamw", "fused", *extra]))
        for name, arguments in jobs:
            result = command(arguments, clock.left(240))
            figures = None
            if result["status"] == "ok":
                figures = json.loads(result["output"].strip().splitlines()[-1])
                figures = figures if "train" in figures else {"train": figures}
            runs.append({"name": name, "model": model, "batch": batch, "status": result["status"], "seconds": result["seconds"],
                         "figures": figures, "output": "" if figures else tail(result["output"])})
    return {"runs": runs}


# What ncu reads, and how the table calls it.
COUNTERS = {
    "gpu__time_duration.sum": "µs",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessor %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "matrix %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "launch__registers_per_thread": "registers",
}


def profile(options, clock):
    found = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    # The third of three steps: the first two allocate and record.
    program = [BIN / "measure", "train", "base", options.batch or 256, 1, options.batch or 256, "cuda", "bf16"]
    arguments = [found, "--clock-control", "none", "--csv", "--metrics", ",".join(COUNTERS), "--launch-count", "400",
                 "--graph-profiling", "node", *program]
    result = command(arguments, clock.left(options.budget))
    return {"status": result["status"], "kernels": counters(result["output"]), "output": tail(result["output"], 5)}


def counters(text):
    """Means per kernel of what ncu prints as CSV: one line per launch and counter."""
    start = text.find('"ID"')
    if start < 0:
        return {}
    sums = {}
    for row in csv.DictReader(io.StringIO(text[start:])):
        name, value = row.get("Metric Name"), (row.get("Metric Value") or "").replace(",", "")
        if name not in COUNTERS or not re.fullmatch(r"[\d.e+-]+", value):
            continue
        value = float(value)
        if name == "gpu__time_duration.sum":
            value *= {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3}.get(row.get("Metric Unit"), 1)
        kernel = re.sub(r"[<(].*", "", row["Kernel Name"])
        total = sums.setdefault(kernel, {}).setdefault(COUNTERS[name], [0.0, 0])
        total[0] += value
        total[1] += 1
    return {kernel: {name: round(total / count, 2) for name, (total, count) in values.items()} |
            {"launches": max(count for _, count in values.values())} for kernel, values in sums.items()}


PARTS = {"correctness": correctness, "sanitizer": sanitizer, "kernels": kernels, "step": step, "profile": profile}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "tables"])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--budget", type=float, default=460, help="seconds for each part")
    parser.add_argument("--only", default="", help="names (tests, goldens, peers, models) must match this expression")
    parser.add_argument("--bench", default="", help="our benches must match this expression, such as attention/")
    parser.add_argument("--batch", type=int, help="images of a step, instead of the default for each model")
    parser.add_argument("--dry", action="store_true", help="try everything without a GPU, on small sizes")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    restore_root()
    failed = False
    for part in options.parts:
        if part != "tables":
            started = time.monotonic()
            result = PARTS[part](options, Clock(options.budget))
            result = {"part": part, "dry": options.dry, "environment": environment(), **result,
                      "seconds": round(time.monotonic() - started, 1)}
            (options.out / f"{part}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))
            summary, good = tables.summary(result)
            failed |= not good
            print(summary, flush=True)
    (options.out / "README.md").write_text(tables.markdown(options.out))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
