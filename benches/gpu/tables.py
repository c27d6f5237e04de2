"""What run.py measured, as Markdown."""

import json
import pathlib

# A reference for MFU: the datasheet's bf16 matrix products of an H100 or H200, as kernels/notes use it.
PEAK_TFLOPS = 989.0


def read(folder, part):
    path = pathlib.Path(folder) / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else None


def counted(results):
    """"12 ok, 1 failed" and whether all is well."""
    counts = {}
    for result in results:
        counts[result["status"]] = counts.get(result["status"], 0) + 1
    order = ["ok", "failed", "timeout", "skipped", "not run"]
    text = ", ".join(f"{counts[status]} {status}" for status in order if status in counts)
    return text or "none", not any(counts.get(status) for status in ["failed", "timeout"]) and bool(counts)


def checks(result):
    if result["part"] == "correctness":
        return [("kernel tests", result["tests"]), ("goldens", result["goldens"]), ("training run", [result["training"]]),
                ("kernels on a caller's stream", [result["own_stream"]]), ("a device that nobody names", [result["automatic"]])]
    tools = {}
    for test in result["tests"]:
        tools.setdefault(test["tool"], []).append(test)
    return list(tools.items())


def summary(result):
    """A few lines for the terminal, and whether nothing failed."""
    part = result["part"]
    lines, good = [f"{part} ({result['seconds']} s)"], True
    if part in ("correctness", "sanitizer"):
        for name, results in checks(result):
            text, well = counted(results)
            good &= well
            lines.append(f"  {name}: {text}")
            for one in results:
                if one["status"] in ("failed", "timeout"):
                    lines.append(f"    {one['status']}: {one['name']}")
                    lines += [f"      {line}" for line in one["output"].splitlines()[-12:]]
    elif part == "kernels":
        text, _ = counted(result["families"])
        lines.append(f"  {len(result['ours'])} benches; families: {text}")
        for one in result["families"]:
            good &= one["status"] != "failed"
            lines += [f"    {one['name']}: {line}" for line in one["output"].splitlines()]
        good &= bool(result["ours"])
    elif part == "peers":
        lines.append(f"  {len(result['kernels'])} with peers; {result['status']}")
        good = result["status"] in ("ok", "timeout") and bool(result["kernels"])
        lines += [f"    {line}" for line in result["output"].splitlines()]
    elif part == "step":
        for run in result["runs"]:
            rate = run["figures"]["train"]["images_per_second"] if run["figures"] else run["status"]
            lines.append(f"  {run['model']}, {run['name']}: {rate}")
            lines += [f"    {line}" for line in run["output"].splitlines()[-12:]]
            good &= run["status"] in ("ok", "not run")
    else:
        lines.append(f"  {len(result['kernels'])} kernels; {result['status']}")
        lines += [f"    {line}" for line in result["output"].splitlines()] if result["status"] != "ok" else []
        good = result["status"] == "ok"
    missing = left_out(result)
    if missing:
        lines.append(f"  left out for lack of time: {', '.join(missing)}")
    return "\n".join(lines), good


def left_out(result):
    """What a part had no time for."""
    if result["part"] in ("correctness", "sanitizer"):
        runs = [(one["tool"] + " " if "tool" in one else "") + one["name"] + (f" {one['precision']}" if "precision" in one else "")
                for _, results in checks(result) for one in results if one["status"] == "not run"]
    elif result["part"] == "step":
        runs = [f"{run['model']}, {run['name']}" for run in result["runs"] if run["status"] == "not run"]
    else:
        runs = result.get("left_out", [])
    return runs


def row(cells):
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(heads, rows):
    return [row(heads), row(["---"] * len(heads)), *[row(cells) for cells in rows], ""]


def number(value, digits=2):
    return "" if value is None else f"{value:.{digits}f}"


def about(result):
    known = result["environment"]
    dry = "; a dry run without a GPU, whose times mean nothing" if result["dry"] else ""
    torch = f", PyTorch {known['torch']}" if known.get("torch", "none") != "none" else ""
    return f"{known['date']}, {known['gpu']}, commit {known.get('commit', 'unknown')}{torch}{dry}"


def check_tables(result):
    rows, details = [], []
    for name, results in checks(result):
        rows.append([name, counted(results)[0]])
        details += [f"- {name}: {one['name']}: {one['status']}" for one in results if one["status"] in ("failed", "timeout")]
        details += [f"- {name}: {one['name']} in {one['precision']}: skipped, because {one['output']}"
                    for one in results if one["status"] == "skipped" and "precision" in one]
    lines = table(["what", "outcome"], rows) + details + ([""] if details else [])
    if result["part"] == "correctness" and result["goldens"]:
        worst = {}
        for one in result["goldens"]:
            for kind in ("output", "gradient"):
                name, error = one.get(f"worst_{kind}", ("", 0.0))
                if error >= worst.get((one["precision"], kind), ("", "", -1.0))[2]:
                    worst[one["precision"], kind] = (one["name"], name, error)
        rows = [[precision, kind, case, f"`{name}`", f"{error:.1e}"] for (precision, kind), (case, name, error) in worst.items()]
        lines += ["Goldens: the largest difference over the largest expected value.", ""]
        lines += table(["precision", "of", "case", "tensor", "error"], rows)
    return lines


def kernel_tables(result, measured_peers=None):
    """Our times; with the part `peers`, beside the machine's ceilings and PyTorch's times."""
    measured_peers = measured_peers or {"kernels": {}, "ceilings": {}}
    ours, peers, ceilings = result["ours"], measured_peers["kernels"], measured_peers.get("ceilings", {})
    copy, matmul = ceilings.get("copy_gbs"), ceilings.get("matmul_tflops")
    lines = ["The part `peers` was not run: no ceilings, no peers.", ""]
    if peers:
        lines = [f"Ceilings ({about(measured_peers)}): copy {number(copy, 0)} GB/s (bytes read and written), bf16 matrix product "
                 f"{number(matmul, 0)} TFLOP/s. *Share* is of the ceiling that bounds the op by its own bytes and operations; "
                 "*peer* is the fastest of PyTorch's.", ""]
        if measured_peers["environment"]["gpu"] != result["environment"]["gpu"]:
            lines += ["**The peers were measured on another GPU: the ratios say nothing.**", ""]
    families = {}
    for name, figures in sorted(ours.items()):
        key, device = "/".join(name.split("/")[:3]), "/".join(name.split("/")[3:])
        families.setdefault(key.split("/")[0], []).append((key, device, figures))
    for family, benches in families.items():
        rows = []
        for key, device, figures in benches:
            microseconds = figures["us"]
            gbs = figures["bytes"] / microseconds / 1e3 if figures["bytes"] else None
            tflops = figures["flops"] / microseconds / 1e6 if figures["flops"] else None
            floor = max((figures["bytes"] or 0) / copy / 1e3 if copy else 0, matrix_floor(key, figures, matmul))
            named = {name: time for name, time in peers.get(key, {}).items() if time is not None}
            best = min(named, key=named.get) if named else None
            rows.append([
                key.split("/", 1)[1], device, number(microseconds, 1), number(gbs, 0), number(tflops, 1),
                f"{100 * floor / microseconds:.0f} %" if floor else "",
                f"{best} {named[best]:.1f}" if best else "", number(named[best] / microseconds) if best else "",
                ", ".join(f"{name} {time:.1f}" for name, time in named.items() if name != best)])
        lines += [f"### {family}", ""]
        lines += table(["op", "device", "µs", "GB/s", "TFLOP/s", "share", "peer, µs", "peer / ours", "other peers, µs"], rows)
    missing = left_out(measured_peers) if peers else []
    if missing:
        lines += ["Peers left out for lack of time: " + ", ".join(f"`{name}`" for name in missing) + ".", ""]
    lone = sorted(set(peers) - {"/".join(name.split("/")[:3]) for name in ours})
    if lone:
        lines += ["Peers without a figure of ours: " + ", ".join(f"`{name}`" for name in lone) + ".", ""]
    return lines


def matrix_floor(key, figures, matmul):
    """Only products run on the matrix unit."""
    if not matmul or not key.startswith(("attention/", "linear/")) or "gelu" in key or "silu" in key:
        return 0.0
    return (figures["flops"] or 0) / matmul / 1e6


def step_tables(result):
    rows = []
    best = {}
    for run in result["runs"]:
        if run["figures"] and run["name"] != "vitmae":
            rate = run["figures"]["train"]["images_per_second"]
            best[run["model"]] = max(best.get(run["model"], 0.0), rate)
    for run in result["runs"]:
        figures = run["figures"]
        if not figures:
            rows.append([run["model"], run["batch"], run["name"], run["status"], "", "", ""])
            continue
        train = figures["train"]
        mfu = train.get("tflops_per_second")
        ratio = train["images_per_second"] / best[run["model"]] if run["name"] == "vitmae" and best.get(run["model"]) else None
        rows.append([run["model"], run["batch"], run["name"], number(train["images_per_second"], 1),
                     f"{100 * mfu / PEAK_TFLOPS:.1f} %" if mfu else "", number(train.get("gpu_gb"), 1), number(ratio)])
    lines = [f"MFU: operations of the reference implementation (work that is skipped still counts) over {PEAK_TFLOPS:.0f} TFLOP/s. "
             "*Ratio*: to the faster of the peers.", ""]
    return lines + table(["model", "batch", "what", "images/s", "MFU", "GPU memory, GB", "ratio"], rows)


def profile_tables(result):
    names = sorted({name for counters in result["kernels"].values() for name in counters})
    rows = [[f"`{kernel}`", *[counters.get(name, "") for name in names]] for kernel, counters in sorted(result["kernels"].items())]
    return table(["kernel", *names], rows)


WRITERS = {"correctness": check_tables, "sanitizer": check_tables, "kernels": kernel_tables, "step": step_tables,
           "profile": profile_tables}


def markdown(folder):
    lines = ["# A run of benches/gpu/run.py", ""]
    for part, writer in WRITERS.items():
        result = read(folder, part)
        if not result:
            continue
        lines += [f"## {part}", "", about(result), ""]
        lines += writer(result, read(folder, "peers")) if part == "kernels" else writer(result)
        missing = left_out(result)
        if missing:
            lines += ["Left out for lack of time: " + ", ".join(f"`{name}`" for name in missing) + ".", ""]
    return "\n".join(lines).rstrip() + "\n"
