#!/usr/bin/env bash
# Makes a bundle that checks and measures vitmae on a GPU machine without Rust: test and bench programs, the release program,
# goldens, and the scripts that run them and the PyTorch peers.
#
#     benches/gpu/bundle.sh [--check] [FOLDER]  default: target/gpu-bundle; beside it a .tar.gz, which must be under 60 MB
#
# --check packs the programs of `cargo test` instead, which are hardly optimised and mostly built already: for CI, to see that a
# bundle can be made and used.
#
# On the GPU machine (Python with PyTorch, NVIDIA's driver; the CUDA toolkit for compute-sanitizer and ncu):
#
#     python3 FOLDER/benches/gpu/run.py correctness
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
check=
if [ "${1:-}" = --check ]; then
    check=1
    shift
fi
folder=${1:-target/gpu-bundle}
limit=60000000

eval "$(.ci/nvrtc)"
rm -rf "$folder"
mkdir -p "$folder/bin"
folder=$(cd "$folder" && pwd)

# The programs that cargo reports for a command, as "kind name path" lines.
programs() {
    cargo "$@" --message-format=json | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message.get("executable"):
        print(message["target"]["kind"][0], message["target"]["name"], message["executable"])'
}

# Copies those programs into the bundle, tests and benches by their kind.
take() {
    while read -r kind name path; do
        case $kind in test | bench) name=$kind-$name ;; esac
        cp "$path" "$folder/bin/$name"
        strip "$folder/bin/$name"
    done
}

tests=(--test kernels --test emulated_model)
examples=(--example measure --example own_stream)
if [ -n "$check" ]; then
    programs test "${tests[@]}" --bench ops --no-run | grep -E "^(test|bench) " | take
    programs build --bin vitmae "${examples[@]}" | take
else
    echo "tests" >&2
    programs test "${tests[@]}" --no-run | grep "^test " | take
    # Without optimisation across crates, which costs minutes. Within a crate it stays ("off" would halve the loader's speed).
    export CARGO_PROFILE_RELEASE_LTO=false CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16
    echo "benches" >&2
    programs bench --bench ops --no-run | grep "^bench " | take
    echo "programs" >&2
    programs build --release --bin vitmae "${examples[@]}" | take
fi
for program in test-kernels test-emulated_model bench-ops vitmae measure own_stream; do
    [ -x "$folder/bin/$program" ] || { echo "cargo built no $program" >&2; exit 1; }
done

cp --parents -r kernels tests/golden/cases benches/gpu benches/peers "$folder"
find "$folder" -name __pycache__ -prune -exec rm -rf {} +
python3 - "$folder" "$root" <<'END'
import json, platform, subprocess, sys
folder, root = sys.argv[1:]
run = lambda *command: subprocess.run(command, capture_output=True, text=True, cwd=root).stdout.strip()
changed = bool(run("git", "status", "--porcelain"))
json.dump({"root": root, "commit": run("git", "rev-parse", "--short=12", "HEAD") + (" and changes" if changed else ""),
           "rustc": run("rustc", "--version"), "machine": platform.machine()}, open(f"{folder}/bundle.json", "w"), indent=1)
END

tar -C "$(dirname "$folder")" -czf "$folder.tar.gz" "$(basename "$folder")"
size=$(stat -c %s "$folder.tar.gz")
unpacked=$(du -sb "$folder" | cut -f1)
printf '%s.tar.gz: %d bytes (%d unpacked)\n' "$folder" "$size" "$unpacked"
if [ "$size" -ge "$limit" ]; then
    echo "the bundle has $size bytes, and at most $limit are wanted" >&2
    exit 1
fi
