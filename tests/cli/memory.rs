//! Memory stays bounded whatever pictures promise: in `pretrain`, from a folder and from a tar file.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::damage::promising;
use crate::pretraining::{losses, model};
use crate::{Place, Ran};

/// Columns of a picture that is much wider than any camera's.
const WIDE: u32 = 20_000;
const HIGH: u32 = 1_000;

/// A JPEG whose header promises this many pixels.
fn promising_jpeg(width: u16, height: u16) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::RgbImage::new(16, 16).write_to(&mut bytes, image::ImageFormat::Jpeg).unwrap();
    let mut bytes = bytes.into_inner();
    // SOF0: marker, length, bits per sample, height, width.
    let at = bytes.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    bytes[at + 5..at + 7].copy_from_slice(&height.to_be_bytes());
    bytes[at + 7..at + 9].copy_from_slice(&width.to_be_bytes());
    bytes
}

/// A run over `data` with one worker, under a limit of address space that has no room for any of the bombs; what it said, and
/// the most memory that it had, in bytes.
fn train(place: &Place, name: &str, data: &Path) -> (Ran, u64) {
    let mut command = Command::new("bash");
    command.args(["-c", "ulimit -v 1000000; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_vitmae"), "--threads", "1"]);
    command.args(["pretrain", "--batch-size", "8", "--steps", "18", "--picture-every", "1000", "--data"]).arg(data);
    command.arg("--out").arg(place.path(name)).arg("--model").arg(model(place));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let kilobytes =
            text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        peak = peak.max(kilobytes.unwrap_or(0_u64) * 1024);
        std::thread::sleep(Duration::from_millis(1));
    }
    (child.wait_with_output().unwrap().into(), peak)
}

fn tar_of(place: &Place, folder: &Path) -> PathBuf {
    let path = place.path("set.tar");
    let mut archive = tar::Builder::new(fs::File::create(&path).unwrap());
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in files {
        archive.append_path_with_name(&file, file.file_name().unwrap()).unwrap();
    }
    archive.finish().unwrap();
    path
}

#[test]
fn wide_pictures_and_bombs_take_no_memory_in_pretrain() {
    let place = Place::new();
    let pictures = place.pictures(56);
    let (plain, before) = train(&place, "plain", &pictures);
    plain.succeeded();
    let wide = image::RgbImage::from_fn(WIDE, HIGH, |x, y| image::Rgb([x as u8, (x / 79) as u8, y as u8]));
    wide.save(pictures.join("wide.jpg")).unwrap();
    wide.save(pictures.join("wide.png")).unwrap();
    for (name, bytes) in [
        ("bomb a.png", promising(&place, 60_000, 60_000)),
        ("bomb b.png", promising(&place, 20_000, 20_000)),
        ("bomb c.jpg", promising_jpeg(65_500, 65_500)),
        ("bomb d.jpg", promising_jpeg(20_000, 20_000)),
    ] {
        fs::write(pictures.join(name), bytes).unwrap();
    }
    for (name, data) in [("folder", pictures.clone()), ("tar", tar_of(&place, &pictures))] {
        let (ran, peak) = train(&place, name, &data);
        let ran = ran.succeeded();
        assert_eq!(losses(&place.path(name)).len(), 18);
        for words in ["bomb a.png", "bomb b.png", "bomb c.jpg", "bomb d.jpg", "4 pictures could not be decoded"] {
            assert!(ran.err.contains(words), "{name}: {words} is not in {}", ran.err);
        }
        assert_eq!(ran.err.matches("(a decompression bomb?)").count(), 4, "{name}: {}", ran.err);
        assert!(!ran.err.contains("wide."), "{name}: {}", ran.err);
        let (more, picture) = (peak.saturating_sub(before), u64::from(WIDE * HIGH * 3));
        println!("{name}: {} MB more than the {} MB without", more / 1_000_000, before / 1_000_000);
        // One decoded picture at a time, and none twice.
        assert!(more < 2 * picture, "{name}: {more} bytes more, and the wide picture has {picture}");
    }
}
