//! Files that are damaged or made to do harm: errors that name the file, no panic, no memory for what is only claimed.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use vitmae::weights::{Checkpoint, Parts, TensorFile, parameters};

use crate::{checkpoint, join, refused, small_config, split, weights};

fn open(path: &Path, bytes: &[u8]) -> vitmae::Result<TensorFile> {
    fs::write(path, bytes).unwrap();
    TensorFile::open(path)
}

#[test]
fn lengths_that_lie_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let length = |length: u64, rest: &[u8]| [&length.to_le_bytes()[..], rest].concat();
    for (bytes, parts) in [
        (vec![], ["0 bytes", "empty"]),
        (vec![1, 2, 3], ["3 bytes", "truncated"]),
        (length(0, b""), ["header", "EOF"]),
        (length(3, b"{}"), ["claims 3 bytes, and 2 follow", "truncated"]),
        (length(1 << 20, b"{}"), ["claims 1048576 bytes", "truncated"]),
        (length(100_000_001, b"{}"), ["claims 100000001 bytes", "100000000 are allowed"]),
        (length(u64::MAX, b"{}"), ["claims 18446744073709551615", "not a safetensors file"]),
        (length(i64::MAX as u64 - 7, b"{}"), ["claims 9223372036854775800", "not a safetensors file"]),
    ] {
        refused(open(&path, &bytes), &["x.safetensors", parts[0], parts[1]]);
    }
    // A sparse file of 1 TB whose header claims 90 MB of zeros, and one that is nothing but zeros.
    for claimed in [90_000_000_u64, 0] {
        fs::write(&path, claimed.to_le_bytes()).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        refused(TensorFile::open(&path), &["header cannot be read"]);
    }
    fs::remove_file(&path).unwrap();
    refused(TensorFile::open(&path), &["reading", "x.safetensors"]);
    refused(TensorFile::open(folder.path()), &["not a regular file"]);
    #[cfg(unix)]
    refused(TensorFile::open("/dev/zero"), &["not a regular file"]);
}

#[test]
fn headers_that_lie_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let tensor = |dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let a = tensor("F32", "[2]", 0, 8);
    let b = |from, to| tensor("F32", "[2]", from, to);
    let data = [0_u8; 16];
    let good = format!(r#"{{"a":{a},"b":{}}}"#, b(8, 16));
    open(&path, &join(good.as_bytes(), &data)).unwrap();
    let zeros = vec!["0"; 100_000].join(",");
    for (header, expected) in [
        ("", "EOF"),
        ("{", "EOF"),
        ("[]", "entry per tensor"),
        ("null", "entry per tensor"),
        ("{} x", "trailing"),
        (r#"{"a": 1}"#, "tensor a"),
        (r#"{"a": {"dtype":"F32","shape":[2]}}"#, "data_offsets"),
        (&format!(r#"{{"a":{a},"a":{}}}"#, b(8, 16)), "a is there twice"),
        (&format!(r#"{{"a":{a},"\u0061":{}}}"#, b(8, 16)), "a is there twice"),
        (&format!(r#"{{"a":{a},"a":{a},"b":{}}}"#, b(8, 16)), "a is there twice"),
        (r#"{"__metadata__":{},"__metadata__":{}}"#, "there twice"),
        (r#"{"__metadata__":{"a":1}}"#, "__metadata__"),
        (&format!(r#"{{"a":{}}}"#, tensor("F31", "[2]", 0, 16)), "tensor a"),
        (&format!(r#"{{"a":{}}}"#, tensor("F32", "[5]", 0, 16)), "tensor a"),
        (&format!(r#"{{"a":{}}}"#, tensor("F32", "[-4]", 0, 16)), "tensor a"),
        (&format!(r#"{{"a":{}}}"#, tensor("F32", "[4.5]", 0, 16)), "tensor a"),
        (&format!(r#"{{"a":{}}}"#, tensor("F64", "[4]", 0, 16)), "does not fit its bytes 0..16"),
        (&format!(r#"{{"a":{}}}"#, tensor("F4", "[3]", 0, 1)), "overlap or leave holes"),
        (&format!(r#"{{"a":{}}}"#, tensor("F32", "[4611686018427387905,4]", 0, 16)), "does not fit its bytes"),
        (&format!(r#"{{"a":{}}}"#, tensor("U8", "[18446744073709551615,18446744073709551615]", 0, 1)), "does not fit"),
        (&format!(r#"{{"a":{}}}"#, tensor("U8", "[18446744073709551615,2,0]", 0, 0)), "does not fit"),
        (&format!(r#"{{"a":{}}}"#, tensor("F32", "[4]", 16, 0)), "does not fit its bytes 16..0"),
        (
            &format!(r#"{{"a":{}}}"#, tensor("U8", "[17]", 0, 17)),
            "take 17 bytes, and 16 follow the header: the file is trunc",
        ),
        (&format!(r#"{{"a":{}}}"#, tensor("U8", "[15]", 0, 15)), "take 15 bytes, and 16 follow"),
        (&format!(r#"{{"a":{}}}"#, tensor("U8", "[15]", 1, 16)), "overlap or leave holes"),
        (&format!(r#"{{"a":{a},"b":{}}}"#, b(4, 12)), "overlap or leave holes"),
        (&format!(r#"{{"a":{a},"b":{}}}"#, b(12, 20)), "overlap or leave holes"),
        (&format!(r#"{{"a":{a},"b":{a}}}"#), "overlap or leave holes"),
        (&format!(r#"{{"a":{}}}"#, tensor("F32", &format!("[{zeros}]"), 0, 0)), "at most 32 sizes"),
        (&format!(r#"{{"a":{}"#, "[".repeat(100_000)), "tensor a"),
        ("{}", "take 0 bytes, and 16 follow"),
    ] {
        let message = refused(open(&path, &join(header.as_bytes(), &data)), &["x.safetensors", expected]);
        assert!(message.len() < 500, "{message}");
    }
    refused(open(&path, &join(b"{\"\xff\":1}", &data)), &["not UTF-8"]);
}

#[test]
fn every_truncation_is_refused() {
    let folder = checkpoint(Parts::EncoderOnly);
    let whole = fs::read(weights(&folder)).unwrap();
    let header = split(&weights(&folder)).0.len();
    let cuts = (0..16).chain((16..whole.len()).step_by(97)).chain([7 + header, 8 + header, whole.len() - 1]);
    for cut in cuts {
        fs::write(weights(&folder), &whole[..cut]).unwrap();
        refused(Checkpoint::open(folder.path()), &["model.safetensors"]);
    }
    let mut longer = whole.clone();
    longer.push(0);
    fs::write(weights(&folder), longer).unwrap();
    refused(Checkpoint::open(folder.path()), &["damaged"]);
}

/// A file that shrinks between the check of its header and the reading of its tensors.
#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error() {
    let folder = checkpoint(Parts::All);
    let mut checkpoint = Checkpoint::open(folder.path()).unwrap();
    fs::File::options().write(true).open(weights(&folder)).unwrap().set_len(2000).unwrap();
    let specs = parameters(&small_config(), Parts::All);
    refused(checkpoint.read_into(&specs, |_, _| Ok(())), &["reading", "model.safetensors"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever happens to the bytes of a header: an error, or tensors that can be read.
    #[test]
    fn no_damage_panics(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        insert in prop::collection::vec((any::<prop::sample::Index>(), "[0-9\\[\\]{}\":,a-z]{1,4}"), 0..3),
        in_header in any::<bool>(),
    ) {
        let header = br#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},"c":{"dtype":"I64","shape":[],"data_offsets":[14,22]}}"#;
        let mut header = header.to_vec();
        for (place, text) in insert {
            let place = place.index(header.len());
            header.splice(place..place, text.bytes());
        }
        let mut bytes = if in_header { Vec::new() } else { join(&header, &[1; 22]) };
        for (place, byte) in edits {
            let target = if in_header { &mut header } else { &mut bytes };
            let place = place.index(target.len());
            target[place] = byte;
        }
        if in_header {
            bytes = join(&header, &[1; 22]);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        match open(&path, &bytes) {
            Ok(mut file) => {
                let names: Vec<String> = file.names().map(str::to_owned).collect();
                for name in names {
                    let _ = file.read(&name);
                    let _ = file.read_as_f32(&name);
                }
            }
            Err(error) => prop_assert!(error.to_string().contains("x.safetensors")),
        }
    }
}
