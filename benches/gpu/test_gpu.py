"""python3 -m unittest discover benches/gpu: tables, counters and the reading of results, without a GPU or PyTorch."""

import json
import pathlib
import tempfile
import unittest

import run
import tables

ENVIRONMENT = {"date": "2026-01-02 03:04 UTC", "gpu": "NVIDIA H200, 580.1, 143771 MiB", "commit": "abc", "torch": "2.15.0"}
KERNELS = {
    "part": "kernels", "dry": False, "environment": ENVIRONMENT, "seconds": 1.0, "status": {"ours": "ok", "peers": "ok"},
    "output": {"ours": "", "peers": ""},
    "ours": {
        "layernorm/forward/vit_b_encoder/cuda/bf16": {"us": 10.0, "bytes": 40_000_000, "flops": 1_000_000},
        "linear/forward/vit_b_encoder_qkv/cuda/bf16": {"us": 100.0, "bytes": 1_000_000, "flops": 40_000_000_000},
    },
    "peers": {"ceilings": {"copy_gbs": 4300.0, "matmul_tflops": 800.0}, "kernels": {
        "layernorm/forward/vit_b_encoder": {"eager": 20.0, "compiled": 12.5, "broken": None},
        "attention/forward/vit_b_encoder": {"flash": 5.0}}},
}


class Tables(unittest.TestCase):
    def test_kernels_stand_beside_ceiling_and_peer(self):
        text = "\n".join(tables.kernel_tables(KERNELS))
        # 40 MB in 10 µs are 4000 GB/s, 93 % of 4300.
        self.assertIn("| forward/vit_b_encoder | cuda/bf16 | 10.0 | 4000 | 0.1 | 93 % | compiled 12.5 | 1.25 | eager 20.0 |", text)
        # 40 GFLOP in 100 µs are 400 TFLOP/s, half of 800.
        self.assertIn("| forward/vit_b_encoder_qkv | cuda/bf16 | 100.0 | 10 | 400.0 | 50 % |  |  |  |", text)
        self.assertIn("Peers without a figure of ours: `attention/forward/vit_b_encoder`.", text)

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
                  "own_stream": training}
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
            text = tables.markdown(folder)
        self.assertIn("## kernels\n\n2026-01-02 03:04 UTC, NVIDIA H200", text)
        self.assertNotIn("## step", text)


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
