//! Sets with planted damage: what is bad is skipped, counted and named; what is good is used; memory stays bounded.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Place, Ran, run, small_config, tensor};

fn embed(place: &Place, data: &Path) -> Ran {
    run("embed --from {} --data {} --out {}", &[&place.checkpoint(), data, &place.path("features.safetensors")])
}

/// How many pictures an embedding covers.
fn embedded(place: &Place) -> usize {
    tensor(&place.path("features.safetensors"), "features").0[0]
}

fn pretrain(place: &Place, data: &Path, out: &Path, steps: usize) -> Command {
    let model = place.path("model.json");
    fs::write(&model, small_config().to_json()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vitmae"));
    command.args(["pretrain", "--batch-size", "8", "--threads", "2", "--picture-every", "1000000", "--steps"]);
    command.arg(steps.to_string()).arg("--data").arg(data).arg("--out").arg(out).arg("--model").arg(model);
    command
}

/// A PNG whose header promises this many pixels.
pub(crate) fn promising(place: &Place, width: u32, height: u32) -> Vec<u8> {
    let path = place.path("small.png");
    image::RgbImage::new(4, 4).save(&path).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[16..20].copy_from_slice(&width.to_be_bytes());
    bytes[20..24].copy_from_slice(&height.to_be_bytes());
    let mut checksum = !0_u32;
    for byte in &bytes[12..29] {
        checksum ^= u32::from(*byte);
        for _ in 0..8 {
            checksum = if checksum & 1 == 1 { checksum >> 1 ^ 0xedb8_8320 } else { checksum >> 1 };
        }
    }
    bytes[29..33].copy_from_slice(&(!checksum).to_be_bytes());
    bytes
}

/// Everything at once, in folders and files with awkward names.
#[test]
fn a_folder_with_every_kind_of_damage_is_used_as_far_as_it_is_good() {
    let place = Place::new();
    let pictures = place.pictures(60);
    let good = fs::read(pictures.join("picture 00.png")).unwrap();
    // Good, but not as it seems: a PNG by content, a very wide picture, names with spaces and with bytes that are no text.
    fs::write(pictures.join("a png.jpg"), &good).unwrap();
    image::RgbImage::from_fn(20_000, 9, |x, _| image::Rgb([x as u8, (x / 79) as u8, 7]))
        .save(pictures.join("wide.jpg"))
        .unwrap();
    let mut count = 62;
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let folder = pictures.join(std::ffi::OsStr::from_bytes(b"inner \xff folder"));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(std::ffi::OsStr::from_bytes(b"\xfe\x80 picture.png")), &good).unwrap();
        count += 1;
    }
    // Bad.
    fs::write(pictures.join("zero.png"), []).unwrap();
    fs::write(pictures.join("cut.png"), &good[..good.len() / 2]).unwrap();
    let mut jpeg = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_fn(40, 40, |x, y| image::Rgb([x as u8, y as u8, 9]))
        .write_to(&mut jpeg, image::ImageFormat::Jpeg)
        .unwrap();
    fs::write(pictures.join("cut.jpg"), &jpeg.get_ref()[..jpeg.get_ref().len() - 60]).unwrap();
    fs::write(pictures.join("bomb.png"), promising(&place, 60_000, 60_000)).unwrap();
    // Of no known kind.
    fs::write(pictures.join("moving.gif"), b"GIF89a").unwrap();
    fs::write(pictures.join("notes"), b"x").unwrap();

    let ran = embed(&place, &pictures).succeeded();
    assert_eq!(embedded(&place), count);
    let words = [
        "zero.png",
        "cut.png",
        "cut.jpg",
        "bomb.png",
        "60000x60000",
        "4 pictures could not be decoded",
        "2 files are left out",
        "1 .gif",
        "1 without an extension",
    ];
    for word in words {
        assert!(ran.err.contains(word), "{word} is not in {}", ran.err);
    }
    let ran: Ran = pretrain(&place, &pictures, &place.path("run"), 20).output().unwrap().into();
    let ran = ran.succeeded();
    assert!(ran.err.contains("4 pictures could not be decoded"), "{}", ran.err);
}

/// A picture that promises 3.6 thousand million pixels costs no more memory than a small one, nor does one just too large.
#[test]
#[cfg(target_os = "linux")]
fn decompression_bombs_take_no_memory() {
    let place = Place::new();
    let pictures = place.pictures(40);
    let checkpoint = place.checkpoint();
    for (number, (width, height)) in [(60_000, 60_000), (20_000, 20_000), (1 << 30, 1 << 30)].into_iter().enumerate() {
        fs::write(pictures.join(format!("bomb {number}.png")), promising(&place, width, height)).unwrap();
    }
    // Address space for the program and its threads, but not for 400 million pixels.
    let ran: Ran = Command::new("bash")
        .args(["-c", "ulimit -v 1200000; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_vitmae"), "--threads", "1"])
        .arg("embed")
        .arg("--from")
        .arg(checkpoint)
        .arg("--data")
        .arg(&pictures)
        .arg("--out")
        .arg(place.path("features.safetensors"))
        .output()
        .unwrap()
        .into();
    let ran = ran.succeeded();
    assert_eq!(embedded(&place), 40);
    assert!(ran.err.contains("3 pictures could not be decoded"), "{}", ran.err);
}

/// Files that go while a run reads them are skipped, counted and named, and the run goes on.
#[test]
fn a_file_that_vanishes_in_the_middle_of_a_run_is_skipped() {
    let place = Place::new();
    let pictures = place.pictures(64);
    let out = place.path("run");
    let mut child = pretrain(&place, &pictures, &out, 60).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    // The metrics say when it is under way.
    let metrics = out.join("metrics.jsonl");
    while !fs::read_to_string(&metrics).is_ok_and(|text| text.lines().count() > 1) {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it began");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    fs::remove_file(pictures.join("picture 07.png")).unwrap();
    let lines: Vec<String> = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap).collect();
    assert!(child.wait().unwrap().success(), "{lines:?}");
    let log = lines.join("\n");
    // Seven epochs are left, in each of which it would have been read.
    assert!(log.contains("picture 07.png") && log.contains("1 pictures could not be decoded"), "{log}");
    assert!(out.join("checkpoint-60").join("model.safetensors").is_file());
}

/// A shard that ends in the middle of a picture.
#[test]
fn a_tar_file_that_was_cut_gives_what_is_whole() {
    let place = Place::new();
    let pictures = place.pictures(20);
    let path = place.path("cut.tar");
    let mut archive = tar::Builder::new(Vec::new());
    for index in 0..20 {
        let name = format!("picture {index:02}.png");
        archive.append_path_with_name(pictures.join(&name), &name).unwrap();
    }
    let bytes = archive.into_inner().unwrap();
    let at = bytes.windows(14).position(|window| window == b"picture 13.png").unwrap();
    fs::write(&path, &bytes[..at + 700]).unwrap();
    let ran = embed(&place, &path).succeeded();
    assert_eq!(embedded(&place), 13);
    assert!(ran.err.contains("cut.tar: damaged after 13 pictures"), "{}", ran.err);
}

/// A folder that only others may write to is named, and nothing is trained.
#[test]
#[cfg(unix)]
fn a_folder_that_is_read_only_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    let pictures = place.pictures(8);
    let locked = place.path("locked");
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(locked.join("probe"), b"").is_ok() {
        println!("skipped: this user may write anywhere");
        return;
    }
    let ran: Ran = pretrain(&place, &pictures, &locked.join("run"), 5).output().unwrap().into();
    ran.failed(1, &["locked", "ermission denied"]);
    let features = locked.join("f.npy");
    run("embed --from {} --data {} --out {}", &[&place.checkpoint(), &pictures, &features])
        .failed(1, &["f.npy", "ermission denied"]);
    assert_eq!(fs::read_dir(&locked).unwrap().count(), 0);
}

/// The same for everybody: a file system that takes no files.
#[test]
#[cfg(target_os = "linux")]
fn a_place_that_takes_no_files_is_named() {
    let place = Place::new();
    let pictures = place.pictures(8);
    let out = PathBuf::from("/sys/run");
    let ran: Ran = pretrain(&place, &pictures, &out, 5).output().unwrap().into();
    ran.failed(1, &["/sys/run"]);
}

#[cfg(feature = "parquet")]
mod parquet {
    use super::*;

    fn file(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases/parquet").join(name)
    }

    #[test]
    fn parquet_files_are_embedded_and_trained_on() {
        let place = Place::new();
        let ran = embed(&place, &file("holes.parquet")).succeeded();
        assert_eq!(embedded(&place), 29);
        assert!(ran.err.contains("000004") && ran.err.contains("1 pictures could not be decoded"), "{}", ran.err);
        let out = place.path("run");
        let ran: Ran = pretrain(&place, &file("usual.parquet"), &out, 4).output().unwrap().into();
        ran.succeeded();
        let recipe: serde_json::Value = serde_json::from_slice(&fs::read(out.join("recipe.json")).unwrap()).unwrap();
        assert_eq!(
            (recipe["pictures"].as_u64(), recipe["data_fingerprint"].as_str().map(str::len)),
            (Some(40), Some(16))
        );
    }

    #[test]
    fn wrong_columns_and_cut_files_are_explained() {
        let place = Place::new();
        embed(&place, &file("usual.parquet#photo"))
            .failed(1, &["photo", "image (group of bytes, path), label (INT64)"]);
        embed(&place, &file("text.parquet")).failed(1, &["no column looks like pictures", "caption (BYTE_ARRAY)"]);
        let cut = place.path("cut.parquet");
        let bytes = fs::read(file("usual.parquet")).unwrap();
        fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
        embed(&place, &cut).failed(1, &["cut.parquet", "not a whole parquet file"]);
        // A record of rubbish among good ones.
        let mut broken = fs::read(file("second_version.parquet")).unwrap();
        // A value is its length and its bytes; statistics hold some once more.
        let is_value =
            |at: &usize| broken[*at..].starts_with(b"IHDR") && matches!(broken[at - 16..at - 12], [60..=127, 0, 0, 0]);
        let at = (16..broken.len()).find(is_value).unwrap();
        broken[at..at + 4].copy_from_slice(b"JUNK");
        fs::write(&cut, broken).unwrap();
        let ran = embed(&place, &cut).succeeded();
        assert_eq!(embedded(&place), 39);
        assert!(ran.err.contains("cut.parquet/000000"), "{}", ran.err);
    }
}

#[test]
#[cfg(not(feature = "parquet"))]
fn parquet_files_need_a_build_that_reads_them() {
    let place = Place::new();
    embed(&place, Path::new("train.parquet")).failed(1, &["train.parquet", "--features parquet"]);
}
