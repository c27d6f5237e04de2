"""python3 -m unittest discover benches/gpu: tables, counters and the reading of results, without a GPU or PyTorch."""

import json
import pathlib
import tempfile
import unittest

import run
import tables

ENVIRONMENT = {"date": "2026-01-02 03:04 UTC", "gpu": "NVIDIA H200, 580.1, 143771 MiB", "commit": "abc", "torch": "2.15.0"}
KERNELS = {
    "part": "kernels", "dry": False, "environment": ENVIRONMENT, "seconds": 1.0, "left_out": ["linear/forward/late/cuda/bf16"],
    "families": [{"name": "layernorm", "status": "ok", "output": ""}, {"name": "linear", "status": "timeout", "output": ""}],
    "ours": {
        "layernorm/forward/vit_b_encoder/cuda/bf16": {"us": 10.0, "bytes": 40_000_000, "flops": 1_000_000},
        "linear/forward/vit_b_encoder_qkv/cuda/bf16": {"us": 100.0, "bytes": 1_000_000, "flops": 40_000_000_000},
    },
}
PEERS = {
    "part": "peers", "dry": False, "environment": ENVIRONMENT, "seconds": 1.0, "status": "ok", "output": "", "left_out": [],
    "ceilings": {"copy_gbs": 4300.0, "matmul_tflops": 800.0}, "kernels": {
        "layernorm/forward/vit_b_encoder": {"eager": 20.0, "compiled": 12.5, "broken": None},
        "attention/forward/vit_b_encoder": {"flash": 5.0}},
}


class Libraries(unittest.TestCase):
    def test_nccl_is_found_beside_pytorch(self):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            self.assertIsNone(run.nccl_of([one, other]))
            library = pathlib.Path(other) / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
            library.parent.mkdir(parents=True)
            library.touch()
            self.assertEqual(run.nccl_of([one, other]), str(library))


class Tables(unittest.TestCase):
    def test_kernels_stand_beside_ceiling_and_peer(self):
        text = "\n".join(tables.kernel_tables(KERNELS, PEERS))
        # 40 MB in 10 µs are 4000 GB/s, 93 % of 4300.
        self.assertIn("| forward/vit_b_encoder | cuda/bf16 | 10.0 | 4000 | 0.1 | 93 % | compiled 12.5 | 1.25 | eager 20.0 |", text)
        # 40 GFLOP in 100 µs are 400 TFLOP/s, half of 800.
        self.assertIn("| forward/vit_b_encoder_qkv | cuda/bf16 | 100.0 | 10 | 400.0 | 50 % |  |  |  |", text)
        self.assertIn("Peers without a figure of ours: `attention/forward/vit_b_encoder`.", text)
        self.assertNotIn("another GPU", text)
        other = {**PEERS, "environment": {**ENVIRONMENT, "gpu": "NVIDIA A100"}}
        self.assertIn("another GPU", "\n".join(tables.kernel_tables(KERNELS, other)))
        self.assertIn("was not run", "\n".join(tables.kernel_tables(KERNELS)))

    def test_what_there_was_no_time_for_is_listed(self):
        summary, good = tables.summary(KERNELS)
        self.assertTrue(good)
        self.assertIn("left out for lack of time: linear/forward/late/cuda/bf16", summary)
        run_of = lambda status: {"name": "vitmae", "model": "huge", "status": status, "figures": None, "output": ""}
        step = {"part": "step", "seconds": 1.0, "runs": [run_of("not run")]}
        self.assertEqual(tables.left_out(step), ["huge, vitmae"])
        tests = [{"name": "linear::", "tool": "synccheck", "status": "not run"}]
        self.assertEqual(tables.left_out({"part": "sanitizer", "tests": tests}), ["synccheck linear::"])

    def test_a_step_stands_beside_the_faster_peer(self):
        figures = lambda rate: {"train": {"images_per_second": rate, "tflops_per_second": rate * 0.0584556}}
        runs = [{"name": name, "model": "base", "batch": 8, "status": "ok", "figures": figures(rate), "output": ""}
                for name, rate in [("vitmae", 9000.0), ("PyTorch, eager", 3000.0), ("PyTorch, compiled", 4500.0)]]
        runs.append({"name": "vitmae", "model": "huge", "batch": 8, "status": "failed", "figures": None, "output": "why"})
        result = {"part": "step", "dry": False, "environment": ENVIRONMENT, "seconds": 1.0, "runs": runs}
        text = "\n".join(tables.step_tables(result))
        self.assertIn("| base | 8 | vitmae | 9000.0 | 53.2 % |  | 2.00 |", text)
        self.assertIn("| huge | 8 | vitmae | failed |", text)
        summary, good = tables.summary(result)
        self.assertFalse(good)
        self.assertIn("why", summary)

    def test_a_failed_test_fails_the_part_and_a_skipped_one_does_not(self):
        test = lambda status: {"name": "a", "status": status, "seconds": 1.0, "output": "it broke"}
        training = {"name": "pretrain", "status": "ok", "output": ""}
        result = {"part": "correctness", "dry": False, "environment": ENVIRONMENT, "seconds": 1.0,
                  "tests": [test("ok"), test("skipped")], "goldens": [], "training": training,
                  "own_stream": training, "automatic": training}
        # No goldens at all is a failure, not a success.
        self.assertFalse(tables.summary(result)[1])
        golden = {"name": "plain", "precision": "f32", "status": "ok", "worst_output": ["loss", 1e-6], "worst_gradient": ["", 0.0]}
        result["goldens"] = [golden]
        self.assertTrue(tables.summary(result)[1])
        result["tests"].append(test("failed"))
        summary, good = tables.summary(result)
        self.assertFalse(good)
        self.assertIn("it broke", summary)
        self.assertIn("| kernel tests | 1 ok, 1 failed, 1 skipped |", "\n".join(tables.check_tables(result)))

    def test_a_folder_of_results_becomes_one_page(self):
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "kernels.json").write_text(json.dumps(KERNELS))
            pathlib.Path(folder, "peers.json").write_text(json.dumps(PEERS))
            text = tables.markdown(folder)
        self.assertIn("## kernels\n\n2026-01-02 03:04 UTC, NVIDIA H200", text)
        self.assertNotIn("## step", text)
        self.assertIn("compiled 12.5", text)
        self.assertIn("Left out for lack of time: `linear/forward/late/cuda/bf16`.", text)


class Choosing(unittest.TestCase):
    def test_bf16_skips_models_whose_heads_it_cannot_take(self):
        config = {"hidden_size": 24, "num_attention_heads": 3, "decoder_hidden_size": 20, "decoder_num_attention_heads": 5}
        self.assertEqual(run.not_in("f32", config), "")
        self.assertIn("the decoder's heads have 4 features", run.not_in("bf16", config))
        self.assertIn("the encoder's heads have 10 features", run.not_in("bf16", {**config, "hidden_size": 30}))
        self.assertEqual(run.not_in("bf16", {**config, "decoder_hidden_size": 40}), "")
        self.assertEqual(run.not_in("bf16", {"hidden_size": 24, "num_attention_heads": 3}), "")

    def test_a_skipped_golden_says_why_and_fails_nothing(self):
        ok = {"name": "pretrain", "status": "ok", "output": ""}
        golden = lambda precision, status: {"name": "plain", "precision": precision, "status": status, "output": "of its heads"}
        result = {"part": "correctness", "dry": False, "environment": ENVIRONMENT, "seconds": 1.0, "tests": [ok],
                  "goldens": [golden("f32", "ok"), golden("bf16", "skipped")], "training": ok, "own_stream": ok, "automatic": ok}
        self.assertTrue(tables.summary(result)[1])
        self.assertIn("- goldens: plain in bf16: skipped, because of its heads", "\n".join(tables.check_tables(result)))

    def test_every_golden_config_is_known_to_run_or_not(self):
        configs = [json.loads(path.read_text()) for path in (run.ROOT / "tests" / "golden" / "cases").glob("*/config.json")]
        taken = [config for config in configs if not run.not_in("bf16", config)]
        self.assertTrue(0 < len(taken) < len(configs))

    def test_tests_of_the_emulator_and_of_the_build_are_left_to_other_machines(self):
        names = ["linear::the_emulators_products_check_their_memory", "the_emulator_catches_every_planted_fault",
                 "linear::products_are_those_of_the_cpu", "report::kernels_do_not_spill", "build_script::it_runs",
                 "every_kernel_compiles_for_every_architecture", "emulated::guarded::a_guard_is_seen", "recording::a"]
        wanted = ["linear::products_are_those_of_the_cpu", "recording::a"]
        self.assertEqual(run.about_a_gpu("test-kernels", names), wanted)
        # Its tests belong to no module.
        self.assertEqual(run.about_a_gpu("test-emulated_model", ["bf16_trains"]), ["bf16_trains"])

    def test_libraries_are_found_beside_pytorch(self):
        with tempfile.TemporaryDirectory() as folder:
            for name in ["nvidia/cublas/lib/libcublasLt.so.12", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "nvidia/nccl/lib/libnccl.so.2",
                         "nvidia/cu13/lib/libcublasLt.so.13", "nvidia/cu13/lib/libnvrtc.so.13"]:
                path = pathlib.Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            folders = [f"{folder}/nvidia/{part}/lib" for part in ("cu13", "cublas", "cuda_nvrtc")]
            self.assertEqual(sorted(run.library_folders([folder])), folders)
            given = {"LD_LIBRARY_PATH": f"/usr/lib/own:{folders[0]}"}
            path = run.with_libraries([folder], given)["LD_LIBRARY_PATH"].split(":")
            # What the user gave comes first, and nothing twice.
            self.assertEqual((path[:2], len(path)), (["/usr/lib/own", folders[0]], 4))
            self.assertEqual(run.with_libraries([f"{folder}/none"], {}), {})

    def test_a_run_has_a_folder_of_its_own(self):
        self.assertEqual(run.folder_name("2026-01-02", "NVIDIA H200\nNVIDIA H200\n"), "2026-01-02-h200")
        self.assertEqual(run.folder_name("2026-01-02", "NVIDIA GeForce RTX 4090\n"), "2026-01-02-rtx-4090")
        self.assertEqual(run.folder_name("2026-01-02", ""), "2026-01-02-unknown")

    def test_lists_are_read(self):
        self.assertEqual(run.listed("skipped on a GPU\nlinear/a/b: benchmark\nx: test\n", "benchmark"), ["linear/a/b"])


class Reading(unittest.TestCase):
    def test_counters_are_averaged_per_kernel(self):
        text = ("==PROF== Connected\n"
                '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
                '"0","layernorm_forward_bf16(float *)","gpu__time_duration.sum","nsecond","1,500"\n'
                '"1","layernorm_forward_bf16(float *)","gpu__time_duration.sum","usecond","2.5"\n'
                '"1","layernorm_forward_bf16(float *)","launch__registers_per_thread","register/thread","40"\n')
        self.assertEqual(run.counters(text), {"layernorm_forward_bf16": {"µs": 2.0, "registers": 40.0, "launches": 2}})
        self.assertEqual(run.counters("==ERROR=="), {})

    def test_criterions_files_are_read(self):
        with tempfile.TemporaryDirectory() as folder:
            new = pathlib.Path(folder, "layernorm", "forward", "new")
            new.mkdir(parents=True)
            new.joinpath("benchmark.json").write_text(json.dumps(
                {"full_id": "layernorm/forward", "throughput": {"ElementsAndBytes": {"elements": 8, "bytes": 2}}}))
            new.joinpath("estimates.json").write_text(json.dumps({"median": {"point_estimate": 2500.0}}))
            self.assertEqual(run.criterion(pathlib.Path(folder)), {"layernorm/forward": {"us": 2.5, "bytes": 2, "flops": 8}})

    def test_a_program_that_hangs_or_is_missing_is_reported(self):
        self.assertEqual(run.command(["sleep", "30"], 1)["status"], "timeout")
        self.assertEqual(run.command(["/no/such/program"], 5)["status"], "failed")
        self.assertEqual(run.command(["true"], 0)["status"], "not run")


if __name__ == "__main__":
    unittest.main()
