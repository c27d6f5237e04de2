#!/usr/bin/env python3
"""Checks and measures vitmae on a GPU, out of a bundle (bundle.sh) or a checkout with the same programs under bin/.

    python3 run.py PART... [--out FOLDER] [--budget 460] [--only REGEX] [--dry]
    python3 run.py tables --out FOLDER         writes FOLDER/README.md from the JSON that is there

Parts, each within the budget of seconds by itself; what did not fit is listed and can be run with --only:

    correctness   every kernel test on the GPU, the goldens, and a short training run
    sanitizer     the kernel tests under compute-sanitizer: memcheck, racecheck, initcheck, synccheck
    kernels       every op's time, family by family, matrix products last
    peers         the machine's ceilings and PyTorch's kernels at the same shapes, in the same order
    step          a training step of ViT-B, L and H beside PyTorch, eager and compiled
    profile       counters of each kernel in a training step, by ncu

Each writes FOLDER/PART.json; the default folder is benches/runs/DATE-GPU. --dry runs the same on a machine without a GPU: tests
on the emulator, small peers on the CPU; its default folder is target/gpu-dry.
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
import site
import subprocess
import sys
import tempfile
import time

import tables

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BIN = ROOT / "bin"
PEERS = ROOT / "benches" / "peers"
# Tests of the build and of the emulator, which have nothing to do with a GPU: whole modules, what belongs to no module, and
# what is named after the emulator.
NOT_ABOUT_A_GPU = {"test-kernels": r"^(build_script|report|emulated)::|^[^:]*$|(^|::)the_emulators?_", "test-emulated_model": r"^$"}
# Families of ops as the benches name them; matrix products have by far the most shapes.
FAMILIES = ("attention", "layernorm", "loss", "adamw", "masking", "patchify", "tokens", "cross_entropy", "linear")
# Libraries that the driver does not bring, and where PyTorch's packages put them.
LIBRARIES = ("libcublasLt.so.1[23]", "libnvrtc.so.1[23]")
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


def library_folders(roots):
    """Folders of site-packages in which NVIDIA's libraries lie, as PyTorch installs them."""
    found = []
    for root in map(pathlib.Path, roots):
        for name in LIBRARIES:
            for place in ("nvidia/*/lib", "torch/lib"):
                for path in sorted(root.glob(f"{place}/{name}"), reverse=True):
                    if str(path.parent) not in found:
                        found.append(str(path.parent))
    return found


def nccl_of(roots):
    """NCCL as PyTorch's packages bring it, if they do."""
    found = [path for root in roots for path in sorted(pathlib.Path(root).glob("nvidia/nccl/lib/libnccl.so.2"))]
    return str(found[0]) if found else None


def packages():
    """Where Python's packages are: those of this Python, in the order in which it looks."""
    roots = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    return list(dict.fromkeys(roots + site.getsitepackages() + [site.getusersitepackages()]))


def with_libraries(roots, environ):
    """The search path of our programs: what there is, then the folders beside PyTorch. Not for PyTorch, which finds its own."""
    given = [path for path in environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    folders = given + [folder for folder in library_folders(roots) if folder not in given]
    return {"LD_LIBRARY_PATH": ":".join(folders)} if folders else {}


def ours(arguments, timeout, env=None, cwd=None):
    """Runs one of our programs, which may need NVIDIA's libraries."""
    return command(arguments, timeout, {**with_libraries(packages(), os.environ), **(env or {})}, cwd)


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
    about["libraries"] = library_folders(packages())
    return about


def default_folder(dry):
    """benches/runs/DATE-GPU, such as 2026-11-24-h200."""
    if dry:
        return ROOT / "target" / "gpu-dry"
    query = command(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], 20)
    return ROOT / "benches" / "runs" / folder_name(time.strftime("%Y-%m-%d"), query["output"] if query["status"] == "ok" else "")


def folder_name(date, gpus):
    """A folder's name, from a date and nvidia-smi's names of the GPUs, of which the first runs everything."""
    name = (gpus.strip().splitlines() or ["unknown"])[0].lower()
    words = [word for word in re.findall("[a-z0-9]+", name) if word not in ("nvidia", "geforce", "tesla")]
    return "-".join([date, *words])


def tests(program, only):
    """A test program's tests, as pairs of program and name."""
    names = listed(ours([BIN / program, "--list"], 60)["output"], "test")
    return [(program, name) for name in about_a_gpu(program, names) if re.search(only, name)]


def listed(text, kind):
    """The names in what `--list` prints, of tests or benchmarks."""
    return [line.removesuffix(f": {kind}") for line in text.splitlines() if line.endswith(f": {kind}")]


def about_a_gpu(program, names):
    return [name for name in names if not re.search(NOT_ABOUT_A_GPU[program], name)]


def run_test(program, name, device, timeout, wrapper=(), exact=True, more=None):
    """A test, or the short tests of a module, in a process of its own: after a fault on a GPU nothing else of a process counts."""
    env = {**({"VITMAE_TEST_DEVICE": device} if device else {}), **(more or {})}
    which = ["--exact", "--include-ignored"] if exact else ["--skip", "long"]
    arguments = [*wrapper, BIN / program, name, *which, "--nocapture", "--test-threads=1"]
    result = ours(arguments, timeout, env)
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
    return {"tests": results + [compiled_now(options, clock)], "goldens": goldens(options, clock),
            "training": training(options, clock), "own_stream": own_stream(options, clock),
            "automatic": automatic(options, clock)}


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
            reason = not_in(precision, json.loads((folder / "config.json").read_text()))
            if reason:
                results.append({"name": folder.name, "precision": precision, "status": "skipped", "seconds": 0.0, "output": reason})
                continue
            with tempfile.TemporaryDirectory() as work:
                out = pathlib.Path(work) / "out.safetensors"
                arguments = [BIN / "vitmae", "--device", device, "--precision", precision, "forward", "--from", folder,
                             "--input", folder / "input.safetensors", "--output", out]
                if about.get("interpolate_pos_encoding"):
                    arguments += ["--interpolate-pos-encoding", about["interpolate_pos_encoding"]]
                expected = golden.read(folder / "expected.safetensors")
                if any(name.startswith("grad.") for name in expected):
                    arguments.append("--gradients")
                result = ours(arguments, clock.left(60))
                if result["status"] == "ok":
                    result.update(golden.compare(golden.read(out), expected, precision))
            result["output"] = "" if result["status"] == "ok" else tail(result["output"])
            results.append({"name": folder.name, "precision": precision, **result})
    return results


def not_in(precision, config):
    """Why a model cannot run in a precision, if it cannot: attention in bf16 takes heads of a multiple of 8 features."""
    for prefix, part in [("", "encoder"), ("decoder_", "decoder")]:
        width, heads = config.get(f"{prefix}hidden_size"), config.get(f"{prefix}num_attention_heads")
        if precision == "bf16" and width and heads and width // heads % 8:
            return f"the {part}'s heads have {width // heads} features, and attention in bf16 takes multiples of 8"
    return ""


def training(options, clock):
    """Twenty steps of a small model, twice with one seed: the loss falls, and both runs give the same numbers. So does a third, with
    NCCL between one process and itself, sums between the parts of backward and a shared optimiser."""
    device = "cpu" if options.dry else "cuda"
    nccl = None if options.dry else nccl_of(packages())
    ways = [([], {}), ([], {})] + ([(["--shard-optimizer"], {"VITMAE_NCCL": nccl})] if nccl else [])
    losses, said = [], ""
    for flags, env in ways:
        with tempfile.TemporaryDirectory() as work:
            out = pathlib.Path(work) / "run"
            result = ours(
                [BIN / "vitmae", "--device", device, "--precision", "f32" if options.dry else "bf16", "pretrain", "--data",
                 "synthetic:64", "--model", "tiny", "--image-size", "64", "--batch-size", "16", "--steps", "20", "--blr", "1e-2",
                 "--out", out, *flags], clock.left(120), env)
            if result["status"] != "ok":
                return {"name": "pretrain", **result, "output": tail(result["output"])}
            lines = (out / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["loss"] for line in lines])
            said = result["output"]
    falls = sum(losses[0][-5:]) < sum(losses[0][:5])
    same = losses[0] == losses[1]
    through_nccl = "not found" if not nccl else losses[2] == losses[0] and "through NCCL" in said
    good = falls and same and through_nccl is not False
    return {"name": "pretrain", "status": "ok" if good else "failed", "seconds": result["seconds"], "falls": falls,
            "same_twice": same, "same_through_nccl": through_nccl, "first": losses[0][0], "last": losses[0][-1], "output": ""}


def compiled_now(options, clock):
    """A test whose kernels are compiled on the machine, by its NVRTC, instead of taken from the program."""
    if options.dry:
        return {"name": "kernels compiled now", "status": "skipped", "seconds": 0.0, "output": "needs a GPU"}
    ran = run_test("test-kernels", "masking::masking_is_what_the_cpu_does", "cuda", clock.left(120),
                   more={"VITMAE_EMBEDDED_KERNELS": "0"})
    return {**ran, "name": "kernels compiled now"}


def automatic(options, clock):
    """What a user meets first: `info`, and a run whose device nobody names. On a GPU whose peak is known it tells its MFU."""
    info = ours([BIN / "vitmae", "info"], clock.left(60))
    with tempfile.TemporaryDirectory() as work:
        out = pathlib.Path(work) / "run"
        run = ours([BIN / "vitmae", "pretrain", "--data", "synthetic:64", "--model", "tiny", "--image-size", "64", "--batch-size", "16",
                    "--steps", "3", "--out", out], clock.left(120))
        metrics = out / "metrics.jsonl"
        last = json.loads(metrics.read_text().splitlines()[-1]) if metrics.exists() else {}
    good = info["status"] == run["status"] == "ok" and (options.dry or "running on cuda:" in run["output"])
    return {"name": "automatic", "status": "ok" if good else "failed", "seconds": run["seconds"], "info": tail(info["output"], 8),
            "mfu": last.get("mfu"), "output": "" if good else tail(run["output"])}


def own_stream(options, clock):
    """The example that calls kernels on its own cudarc stream and compares with the CPU."""
    result = ours([BIN / "own_stream"], clock.left(60))
    if options.dry and "DriverMissing" in result["output"]:
        result["status"] = "skipped"
    return {"name": "own_stream", **result, "output": tail(result["output"])}


def sanitizer(options, clock):
    """Each module of tests under each tool, without the long ones; starting a tool takes long, so not each test."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    names = sorted(name for _, name in tests("test-kernels", options.only) if "::" in name)
    # Those that --only names, one by one; without it modules.
    modules = names if options.only else sorted({name.split("::")[0] + "::" for name in names})
    # Tool by tool, so that what there is no time for is the rarest kind of fault.
    jobs = [(tool, name) for tool in TOOLS for name in modules]

    def check(job, timeout):
        tool, name = job
        # Guard zones and poison would hide what the tools look for.
        wrapper = [] if options.dry else [found, "--tool", tool, "--error-exitcode", "97", "--print-limit", "5"]
        device = None if options.dry else "cuda-plain"
        return {"tool": tool, **run_test("test-kernels", name, device, timeout, wrapper, exact=bool(options.only))}

    return {"tests": in_parallel(jobs, check, clock, 400)}


def kernels(options, clock):
    """Our benches, one family after the other, so that what there is no time for is known."""
    label = "cpu/f32" if options.dry else "cuda/bf16"
    times, wanted, runs = {}, [], []
    # Dry: two families, for real but briefly, so that there is something to read.
    for family in ("masking", "layernorm") if options.dry else FAMILIES:
        if not re.search(options.bench, f"{family}/"):
            continue
        pattern = f"^{family}/.*{label}$"
        mode = ["--bench", "--quick"] if options.dry else ["--bench"]
        names = listed(ours([BIN / "bench-ops", "--bench", "--list", pattern], clock.left(60))["output"], "benchmark")
        wanted += names or [f"{family}/"]
        with tempfile.TemporaryDirectory() as work:
            run = ours([BIN / "bench-ops", *mode, "--noplot", pattern], clock.left(600), {"CRITERION_HOME": work}, cwd=work)
            found = criterion(pathlib.Path(work))
        times.update(found)
        # Out of time is no failure: what is missing is listed.
        status = "failed" if run["status"] == "ok" and not found else run["status"]
        runs.append({"name": family, "status": status, "seconds": run["seconds"],
                     "output": tail(run["output"]) if status == "failed" else ""})
    return {"ours": times, "families": runs, "left_out": [name for name in wanted if name not in times]}


def peers(options, clock):
    """PyTorch's kernels, under the names of our benches."""
    with tempfile.TemporaryDirectory() as work:
        found = pathlib.Path(work) / "peers.json"
        # What is under way when the budget ends may end, and is then counted.
        budget = max(1, int(clock.left(600)) - 30)
        run = command([sys.executable, PEERS / "kernels.py", "--out", found, "--only", options.bench, "--budget", budget,
                       *(["--dry"] if options.dry else [])], clock.left(600))
        theirs = json.loads(found.read_text()) if found.exists() else {"kernels": {}, "ceilings": {}, "left_out": []}
    return {**theirs, "status": run["status"], "output": "" if run["status"] == "ok" else tail(run["output"])}


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
        mae = ["--mae", options.mae.resolve()] if options.mae else []
        jobs = [("vitmae", [BIN / "measure", "train", model, batch, count, batch, device, precision])]
        for name, extra in [("PyTorch, eager", []), ("PyTorch, compiled", ["--compile"])]:
            if options.dry and extra:
                continue
            jobs.append((name, [sys.executable, PEERS / "train_step.py", "--mode", "train", "--model", model, "--batch", batch,
                                "--steps", count, "--device", device, "--precision", precision, "--adamw", "fused", *mae, *extra]))
        for name, arguments in jobs:
            run = ours if name == "vitmae" else command
            result = run(arguments, clock.left(240))
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
    # The first step, whose kernels are launched one by one, with cuBLASLt's first proposals: no timing runs are among them.
    program = [BIN / "measure", "train", "base", options.batch or 256, 1, options.batch or 256, "cuda", "bf16"]
    arguments = [found, "--clock-control", "none", "--csv", "--metrics", ",".join(COUNTERS), "--launch-count", "1500",
                 "--graph-profiling", "node", *program]
    result = ours(arguments, clock.left(options.budget), {"VITMAE_GEMM_TUNING": "0"})
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


PARTS = {"correctness": correctness, "sanitizer": sanitizer, "kernels": kernels, "peers": peers, "step": step, "profile": profile}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "tables"])
    parser.add_argument("--out", type=pathlib.Path, help="default: benches/runs/DATE-GPU")
    parser.add_argument("--budget", type=float, default=460, help="seconds for each part")
    parser.add_argument("--only", default="", help="names (tests, goldens, models) must match this expression")
    parser.add_argument("--bench", default="", help="families of benches and peers must match this expression, such as attention/")
    parser.add_argument("--mae", type=pathlib.Path, help="a checkout of the original implementation, to be the peer of a step")
    parser.add_argument("--batch", type=int, help="images of a step, instead of the default for each model")
    parser.add_argument("--dry", action="store_true", help="try everything without a GPU, on small sizes")
    options = parser.parse_args()
    if options.out is None:
        if options.parts == ["tables"]:
            parser.error("tables needs --out, the folder with the results")
        options.out = default_folder(options.dry)
        print(f"results go to {options.out}")

    options.out.mkdir(parents=True, exist_ok=True)
    restore_root()
    failed = False
    for part in options.parts:
        if part != "tables":
            # Algorithms that were timed under a sanitizer, or beside other tests, are nobody else's choice.
            os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix=f"vitmae-{part}-")
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
