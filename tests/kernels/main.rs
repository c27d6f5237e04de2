//! The kernels as a whole: what is declared, embedded and compiled, and whether the emulator catches what it claims to catch.
#![cfg(feature = "cuda")]

mod adamw;
mod attention;
mod build_script;
#[path = "../common/mod.rs"]
mod common;
mod cross_entropy;
mod emulated;
mod gemm;
mod layernorm;
mod linear;
mod listing;
mod loss;
mod masking;
mod patchify;
mod recording;
mod reference;
mod report;
mod scratch;
mod tokens;

use std::collections::BTreeSet;

use emulated::embedded::Target;
use emulated::launch::{Argument, Grid};
use emulated::nvrtc::{Nvrtc, NvrtcError, Source};
use emulated::{SEEDS, Slice, embedded_kernels, emulator_itself, kernel_files, units};
use vitmae::ops::{KERNELS, OPS};

/// NVRTC, or nothing after saying that the test is skipped. CI sets VITMAE_REQUIRE_NVRTC=1: there its absence is a failure.
fn nvrtc() -> Option<Nvrtc> {
    match Nvrtc::find() {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) if emulated::required("VITMAE_REQUIRE_NVRTC") => panic!("{error}"),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn headers() -> Vec<Source<'static>> {
    embedded_kernels().headers.iter().map(|header| Source { name: header.name, text: header.text }).collect()
}

#[test]
fn every_kernel_belongs_to_an_op() {
    for (file, text) in kernel_files() {
        // Every `extern "C"` goes through KERNEL at the start of a line, which the build script and the emulator read.
        assert!(!text.contains("extern \"C\"") && !text.contains("__global__"), "{file}: use KERNEL(threads)");
        assert_eq!(text.matches("KERNEL(").count(), units::definitions(&text).len(), "{file}");
    }
    let of_ops: BTreeSet<&str> = OPS.iter().flat_map(|op| op.symbols()).collect();
    for kernel in KERNELS {
        assert!(of_ops.contains(kernel.symbol), "{} in {} belongs to no op", kernel.symbol, kernel.file);
        for named in kernel.named_ops {
            assert!(OPS.iter().any(|op| op.name == *named), "{}: there is no op {named}", kernel.file);
        }
    }
}

#[test]
fn every_kernel_says_what_it_does() {
    for (file, text) in kernel_files() {
        let header: String = text.lines().take_while(|line| line.starts_with("//")).collect();
        for word in ["Preconditions", "Launch", "Bytes", "Bound by", "liasing"] {
            assert!(header.contains(word), "{file}: its header comment has no \"{word}\"");
        }
        for definition in units::definitions(&text) {
            let family = definition.symbol.trim_end_matches("_f32").trim_end_matches("_bf16").trim_end_matches("_f32");
            assert!(header.contains(family.trim_end_matches("_u8")), "{file}: {} is not in it", definition.symbol);
        }
    }
}

#[test]
fn the_manifest_has_every_file_for_every_target() {
    let manifest = embedded_kernels();
    let names: Vec<_> = manifest.files.iter().map(|file| file.name.to_string()).collect();
    assert_eq!(names, kernel_files().into_iter().map(|(name, _)| name).collect::<Vec<_>>());
    let targets = |index: usize| manifest.files[index].images.iter().map(|image| image.target).collect::<Vec<_>>();
    for (index, file) in manifest.files.iter().enumerate() {
        assert_eq!(targets(index), targets(0), "{}", file.name);
        assert_eq!(file.images.is_empty(), manifest.nvrtc.is_none(), "{}", file.name);
        for image in file.images {
            let start: &[u8] = if image.target.ptx { b"//\n" } else { b"\x7fELF" };
            let code = image.code().unwrap_or_else(|error| panic!("{}: {error}", file.name));
            assert!(code.starts_with(start), "{} for {}", file.name, image.target);
            assert!(!image.target.ptx || code.ends_with(b"\0"), "{} for {}", file.name, image.target);
            for symbol in file.symbols() {
                let found = code.windows(symbol.len()).any(|bytes| bytes == symbol.as_bytes());
                assert!(found, "{symbol} in {} for {}", file.name, image.target);
            }
        }
    }
}

#[test]
fn every_kernel_compiles_for_every_architecture() {
    let Some(nvrtc) = nvrtc() else { return };
    for target in ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_80"] {
        let target = Target::parse(target).expect("a good name");
        for file in embedded_kernels().files {
            let compiled = report::contents::compile(&nvrtc, file, target).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(compiled.1, "", "{} for {target}", file.name);
        }
    }
}

#[test]
fn a_broken_kernel_is_an_error_with_the_compilers_log() {
    let Some(nvrtc) = nvrtc() else { return };
    let text = "#include \"device.cuh\"\nKERNEL(128)\nbroken(float* out) { out[0] = not_declared; }\n";
    let source = Source { name: "broken.cu", text };
    let target = Target::parse("sm_80").expect("a good name");
    let error = nvrtc.compile(source, &headers(), target).expect_err("it is broken");
    let NvrtcError::Compile { file, target, log } = &error else { panic!("{error:?}") };
    assert_eq!((file.as_str(), target.as_str()), ("broken.cu", "sm_80"));
    assert!(log.contains("not_declared") && log.contains("broken.cu(3)"), "{log}");
    let unknown = nvrtc.compile(source, &headers(), Target::parse("sm_55").expect("a good name"));
    assert!(matches!(unknown, Err(NvrtcError::Compile { .. })), "{unknown:?}");
}

#[test]
fn a_missing_nvrtc_is_an_error_that_says_what_to_do() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let error = Nvrtc::find_in(&[folder.path().to_path_buf()], &["libthere-is-no-nvrtc.so"]).expect_err("none");
    assert!(matches!(error, NvrtcError::NotFound { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("VITMAE_NVRTC") && text.contains(&folder.path().display().to_string()), "{text}");

    let fake = folder.path().join("libnvrtc.so.13");
    std::fs::write(&fake, "not a library").expect("written");
    let error = Nvrtc::find_in(&[folder.path().to_path_buf()], &[]).expect_err("no library");
    assert!(matches!(error, NvrtcError::Unusable { .. }), "{error:?}");
}

/// What a planted kernel wrote and was given, or the fault.
type Planted = Result<(Vec<u32>, Vec<u32>), String>;

/// Launches a planted kernel with `out` and `in` of one element per thread.
fn run_planted(symbol: &str, seed: u64, words_per_thread: usize) -> Option<Planted> {
    let emulator = emulator_itself(seed)?;
    let stream = emulator.stream();
    let grid = Grid { blocks: 3, threads: 64, shared_bytes: 64 * 4 * words_per_thread as u32 };
    let input: Vec<u32> = (0..3 * 64 * words_per_thread as u32).map(|i| i * i + 7).collect();
    let source = if symbol == "fault_uninitialised_global_memory" {
        stream.uninitialised(input.len()).expect("reserved")
    } else {
        stream.upload(&input).expect("uploaded")
    };
    let mut out = stream.zeros::<u32>(input.len()).expect("reserved");
    let result = {
        let (to, from) = (out.as_mut_slice(), source.as_slice());
        // SAFETY: both addresses are of this emulator.
        let ran = unsafe { emulator.launch_named(symbol, grid, &[to.argument(), from.argument()]) };
        ran.map_err(|error| error.to_string())
    };
    Some(result.map(|()| (stream.download(&out.as_slice()).expect("downloaded"), input)))
}

#[test]
fn the_emulator_catches_every_planted_fault() {
    // A thread that runs too early reads what another one has not written yet: either word for that fault is right.
    let unordered: &[&str] = &[
        "with no barrier between",
        "shared memory, which nothing wrote",
        "shared memory, where an asynchronous copy has not landed",
    ];
    let faults: [(&str, usize, &[&str]); 38] = [
        ("fault_race_in_shared_memory", 1, &["wrote with no barrier between"]),
        ("fault_missing_barrier", 1, unordered),
        ("fault_missing_second_barrier", 1, unordered),
        ("fault_warp_barrier_for_a_block", 1, unordered),
        ("fault_read_past_the_end", 1, &["byte 768 of buffer 0 (768 bytes, argument 1)"]),
        ("fault_write_before_the_start", 1, &["byte -4 of buffer 1 (768 bytes, argument 0)"]),
        ("fault_past_the_end_of_shared_memory", 1, &["at byte 256 of shared memory, which has 256 bytes"]),
        ("fault_null_pointer", 1, &["a null pointer"]),
        ("fault_divergent_shuffle", 1, &["lane 7 never arrives: it has returned"]),
        ("fault_shuffle_against_ballot", 1, &["warp_ballot"]),
        ("fault_barrier_against_shuffle", 1, &["lane 0 never arrives: it waits at a block barrier"]),
        ("fault_uninitialised_shared_memory", 1, &["byte 20 of shared memory, which nothing wrote"]),
        ("fault_uninitialised_global_memory", 1, &["memory that nothing wrote"]),
        ("fault_copy_without_wait", 4, &["asynchronous copy has not landed"]),
        ("fault_copy_without_barrier", 4, unordered),
        ("fault_copy_group_too_new", 4, &["asynchronous copy has not landed"]),
        ("fault_divergent_multiply", 4, &["waits at mma_m16n8k16, and lane 3 never arrives: it has returned"]),
        ("fault_divergent_matrices", 4, &["waits at ldmatrix_x4, and lane 8 never arrives: it has returned"]),
        ("fault_multiply_against_matrices", 4, &["mma_m16n8k16 while", "ldmatrix_x4 while"]),
        ("fault_matrices_without_barrier", 4, &["wrote with no barrier between"]),
        ("fault_matrices_overwritten", 4, &["read with no barrier between"]),
        ("fault_uninitialised_matrices", 4, &["byte 144 of shared memory, which nothing wrote"]),
        ("fault_misaligned_matrices", 4, &["a matrix row at an address that is not a multiple of 16"]),
        ("fault_misaligned_vector", 1, &["read of 16 bytes at an address that is not a multiple of 16"]),
        ("fault_misaligned_pair", 1, &["read of 2 bytes at an address that is not a multiple of 2"]),
        ("fault_misaligned_word", 1, &["read of 4 bytes at an address that is not a multiple of 4"]),
        ("fault_misaligned_double_word", 1, &["read of 8 bytes at an address that is not a multiple of 8"]),
        ("fault_misaligned_write", 1, &["write of 2 bytes at an address that is not a multiple of 2"]),
        ("fault_shuffles_in_two_places", 1, &["at another one in faults.cu:"]),
        ("fault_products_in_two_places", 4, &["at another one in faults.cu:"]),
        ("fault_barriers_in_two_places", 1, &["waits at the block barrier in faults.cu:"]),
        ("fault_global_load_of_shared_memory", 4, &["load_16 of an address outside global memory"]),
        ("fault_own_load_of_shared_memory", 4, &["load_own_16 of an address outside global memory"]),
        ("fault_shared_load_of_global_memory", 4, &["load_shared_16 of an address outside shared memory"]),
        ("fault_read_only_load_of_a_result", 4, &["load_16 of what the same launch wrote: byte"]),
        ("fault_write_after_a_read_only_load", 4, &["write of what load_16 read in the same launch: byte"]),
        ("fault_two_blocks_write", 1, &["in the same launch"]),
        ("fault_block_reads_another", 1, &["in the same launch"]),
    ];
    let planted = std::fs::read_to_string(emulated::kernels_folder().join("emulator/faults.cu")).expect("readable");
    let planted = units::definitions(&planted);
    let tested = |symbol: &str| symbol.starts_with("fault_none_") || faults.iter().any(|fault| fault.0 == symbol);
    assert!(planted.iter().all(|definition| tested(&definition.symbol)), "a planted fault has no test");
    for (symbol, words_per_thread, expected) in faults {
        for seed in SEEDS {
            let Some(result) = run_planted(symbol, seed, words_per_thread) else { return };
            let message = result.map(drop).expect_err(symbol);
            assert!(expected.iter().any(|text| message.contains(text)), "{symbol}, seed {seed}: {message}");
            assert!(message.contains(&format!("kernel {symbol}, block ")), "{message}");
        }
    }
}

#[test]
fn the_emulator_runs_right_kernels_right() {
    for seed in SEEDS {
        let Some(exchange) = run_planted("fault_none_exchange", seed, 1) else { return };
        let (out, input) = exchange.expect("no fault");
        for (index, &value) in out.iter().enumerate() {
            let (block, thread) = (index / 64, index % 64);
            let lanes = thread / 32 * 32..thread / 32 * 32 + 32;
            let sum: u32 = lanes.map(|lane| input[64 * block + (lane + 1) % 64]).sum();
            assert_eq!(value, sum.wrapping_add(0xaaaa_aaaa), "seed {seed}, {index}");
        }
        let (out, input) = run_planted("fault_none_warp", seed, 1).expect("as before").expect("no fault");
        assert!((0..out.len()).all(|index| out[index] == input[index ^ 1]));
        let (out, input) = run_planted("fault_none_copy", seed, 4).expect("as before").expect("no fault");
        for (index, &value) in out.iter().enumerate() {
            let (block, word, part) = (index / 256, index % 256 / 4, index % 4);
            assert_eq!(value, input[256 * block + 4 * (63 - word) + part]);
        }
        let (out, input) = run_planted("fault_none_copy_groups", seed, 4).expect("as before").expect("no fault");
        for (index, &value) in out.iter().enumerate() {
            let (block, word, part) = (index / 256, (index % 256 / 4 + 32) % 64, index % 4);
            assert_eq!(value, if word % 2 == 0 { input[256 * block + 4 * word + part] } else { 0 });
        }
    }
}

#[test]
fn the_emulator_spreads_matrices_over_lanes_as_a_gpu_does() {
    for (symbol, transposed) in [("fault_none_matrices", false), ("fault_none_matrices_transposed", true)] {
        let Some(planted) = run_planted(symbol, 2, 4) else { return };
        let (out, input) = planted.expect("no fault");
        // 32 rows of 8 elements per warp, 8 rows to a matrix.
        let element = |warp: usize, matrix: usize, row: usize, column: usize| {
            let (row, column) = if transposed { (column, row) } else { (row, column) };
            let word = input[128 * warp + 4 * (8 * matrix + row) + column / 2];
            word >> (16 * (column % 2)) & 0xffff
        };
        for (index, &value) in out.iter().enumerate() {
            let (warp, lane, matrix) = (index / 128, index / 4 % 32, index % 4);
            let (row, column) = (lane / 4, 2 * (lane % 4));
            let expected = element(warp, matrix, row, column) | element(warp, matrix, row, column + 1) << 16;
            assert_eq!(value, expected, "{symbol}, {index}");
        }
    }
}

#[test]
fn the_emulator_multiplies_matrices() {
    let Some(emulator) = emulator_itself(3) else { return };
    let stream = emulator.stream();
    // Small whole numbers: exact in bf16 and in every order of the sum.
    let (a, b) =
        (|row: usize, k: usize| ((row * 7 + k * 3) % 11) as f32 - 5.0, |k: usize, j: usize| ((k * 5 + j) % 9) as f32);
    let bits = |value: f32| u32::from(half::bf16::from_f32(value).to_bits());
    let pair = |low: f32, high: f32| bits(low) | bits(high) << 16;
    let (mut left, mut right, mut sums, mut expected) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for lane in 0..32 {
        let (row, column) = (lane / 4, 2 * (lane % 4));
        for (down, on) in [(0, 0), (8, 0), (0, 8), (8, 8)] {
            left.push(pair(a(row + down, column + on), a(row + down, column + on + 1)));
        }
        for on in [0, 8] {
            right.push(pair(b(column + on, row), b(column + on + 1, row)));
        }
        for (i, j) in [(row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1)] {
            let start = (i * 8 + j) as f32;
            sums.push(start);
            expected.push(start + (0..16).map(|k| a(i, k) * b(k, j)).sum::<f32>());
        }
    }
    let (left, right) = (stream.upload(&left).expect("uploaded"), stream.upload(&right).expect("uploaded"));
    let mut sums = stream.upload(&sums).expect("uploaded");
    let grid = Grid { blocks: 1, threads: 32, shared_bytes: 0 };
    {
        let (sums, left, right) = (sums.as_mut_slice(), left.as_slice(), right.as_slice());
        let arguments = [sums.argument(), left.argument(), right.argument()];
        // SAFETY: the addresses are of this emulator.
        unsafe { emulator.launch_named("fault_none_multiply", grid, &arguments) }.expect("no fault");
    }
    assert_eq!(stream.download(&sums.as_slice()).expect("downloaded"), expected);
}

#[test]
fn the_emulator_refuses_wrong_launches() {
    let Some(emulator) = emulator_itself(0) else { return };
    let stream = emulator.stream();
    let buffer = stream.zeros::<u32>(64).expect("reserved");
    let slice: Slice<'_, u32> = buffer.as_slice();
    let launch = |symbol, threads, arguments: &[Argument<'_>]| {
        let grid = Grid { blocks: 1, threads, shared_bytes: 256 };
        // SAFETY: the addresses are of this emulator.
        unsafe { emulator.launch_named(symbol, grid, arguments) }.expect_err("refused").to_string()
    };
    let two = [slice.argument(), slice.argument()];
    assert!(launch("no_such_kernel", 64, &two).contains("no such kernel"));
    assert!(launch("fault_none_warp", 64, &two[..1]).contains("1 arguments for 2 parameters"));
    assert!(
        launch("fault_none_warp", 64, &[slice.argument(), Argument::value(&1u32)]).contains("argument 1 has 4 bytes")
    );
    assert!(launch("fault_none_warp", 48, &two).contains("48 threads"));
    assert!(launch("fault_none_warp", 256, &two).contains("up to 128"));
}

#[test]
fn philox_gives_the_known_answers() {
    // Random123's kat_vectors for philox 4x32 10: counter, key, expected.
    let known: [([u32; 4], [u32; 2], [u32; 4]); 3] = [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, expected) in known {
        assert_eq!(rand_philox::philox4x32_10(counter, key), expected, "the CPU's Philox");
    }
    let Some(emulator) = emulator_itself(0) else { return };
    let stream = emulator.stream();
    let counters = stream.upload(&known.map(|(counter, _, _)| counter)).expect("uploaded");
    let keys = stream.upload(&known.map(|(_, key, _)| key)).expect("uploaded");
    let mut words = stream.zeros::<[u32; 4]>(known.len()).expect("reserved");
    let grid = Grid { blocks: 1, threads: 32, shared_bytes: 0 };
    let count = known.len() as u32;
    {
        let (words, counters, keys) = (words.as_mut_slice(), counters.as_slice(), keys.as_slice());
        let arguments = [words.argument(), counters.argument(), keys.argument(), Argument::value(&count)];
        // SAFETY: the addresses are of this emulator.
        unsafe { emulator.launch_named("fault_none_philox", grid, &arguments) }.expect("no fault");
    }
    assert_eq!(stream.download(&words.as_slice()).expect("downloaded"), known.map(|(_, _, expected)| expected));
}
