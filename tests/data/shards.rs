//! Tar shards in WebDataset's layout.

use std::fs;
use std::path::Path;

use vitmae::Error;
use vitmae::data::{Loader, LoaderOptions, Source};

use crate::common::{gradient, options, save_png, take, training};

/// Writes a tar file of these names and contents.
fn shard(path: &Path, files: &[(&str, &[u8])]) {
    let mut archive = tar::Builder::new(fs::File::create(path).unwrap());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, *content).unwrap();
    }
    archive.finish().unwrap();
}

/// The bytes of a picture that no other number has.
fn png(number: usize) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.png");
    save_png(&gradient(6 + number, 5), &path);
    fs::read(path).unwrap()
}

#[test]
fn shards_give_pictures_and_their_classes_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let pictures: Vec<Vec<u8>> = (0..5).map(png).collect();
    let long = format!("{}/c.png", "deep".repeat(40));
    let long_class = long.replace(".png", ".cls");
    shard(
        &folder.path().join("t-00.tar"),
        &[
            ("a.png", &pictures[0]),
            ("a.cls", b"3\n"),
            ("a.json", b"{}"),
            // The class before the picture, and a second picture of the same sample, which is not one of its own.
            ("some.where/b.cls", b" 1"),
            ("some.where/b.rgb.png", &pictures[1]),
            ("some.where/b.depth.png", &pictures[4]),
            (&long, &pictures[2]),
            (&long_class, b"0"),
            (".hidden.png", &pictures[4]),
            ("notes.txt", b"x"),
        ],
    );
    shard(&folder.path().join("t-01.tar"), &[("a.png", &pictures[3]), ("a.cls", b"0")]);
    let pattern = folder.path().join("t-{00..01}.tar");
    let source = Source::parse(&pattern, &options(8)).unwrap();
    assert_eq!(source.len(), 4);
    assert_eq!(source.classes().unwrap(), ["0", "1", "2", "3"]);
    assert_eq!((0..4).map(|index| source.label(index).unwrap()).collect::<Vec<_>>(), [3, 1, 0, 0]);
    for index in 0..4 {
        assert_eq!(source.read(index).unwrap(), gradient(6 + index, 5), "picture {index}");
    }
    assert_eq!(source.name(0), folder.path().join("t-00.tar/a.png"));
    // The same shards in other words.
    let chosen = Source::parse(folder.path().join("t-0{0,1}.tar"), &options(8)).unwrap();
    let whole = Source::parse(folder.path(), &options(8)).unwrap();
    assert_eq!((chosen.fingerprint(), whole.fingerprint()), (source.fingerprint(), source.fingerprint()));
    assert_eq!(Source::parse(folder.path().join("t-01.tar"), &options(8)).unwrap().len(), 1);
}

/// Compressed shards say so by their names or by how they begin.
#[test]
fn compressed_shards_say_what_to_do() {
    // What `gzip -n` makes of an empty file, and how the others begin.
    let gzip = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let refused = |path: &Path, words: &[&str]| {
        let error = Source::parse(path, &options(8)).unwrap_err();
        assert!(matches!(error, Error::Data { .. }), "{error:?}");
        words.iter().for_each(|word| assert!(error.to_string().contains(word), "{word}: {error}"));
    };
    for (start, tool) in [
        (&gzip[..], "gunzip"),
        (b"\x28\xb5\x2f\xfd rest", "unzstd"),
        (b"BZh91AY&SY", "bunzip2"),
        (b"\xfd7zXZ\x00\x00\x04", "unxz"),
        (b"\x04\x22\x4d\x18\x64\x40\xa7", "unlz4"),
        (b"PK\x03\x04\x14\x00", "unzip"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.tar");
        fs::write(&path, start).unwrap();
        refused(&path, &["b.tar", "decompress it first", tool]);
        // Beside a good one, and as all that a folder has.
        shard(&folder.path().join("a.tar"), &[("a.png", &png(0))]);
        refused(folder.path(), &["b.tar", tool]);
        let name = match tool {
            "gunzip" => "b.tar.gz",
            "unzstd" => "b.tar.zst",
            "bunzip2" => "b.tar.bz2",
            "unlz4" => "b.tar.lz4",
            "unzip" => "b.zip",
            _ => "b.tar.xz",
        };
        fs::rename(&path, folder.path().join(name)).unwrap();
        assert_eq!(Source::parse(folder.path(), &options(8)).unwrap().len(), 1);
        fs::remove_file(folder.path().join("a.tar")).unwrap();
        refused(folder.path(), &[name, tool]);
        refused(&folder.path().join(name), &[name, tool]);
    }
}

/// As in a folder: another size under the same name is another set.
#[test]
fn a_shards_fingerprint_sees_sizes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tar");
    let fingerprint = |second: &[u8]| {
        shard(&path, &[("a.png", &png(0)), ("b.png", second)]);
        Source::parse(&path, &options(8)).unwrap().fingerprint()
    };
    let (png, mut longer) = (png(1), png(1));
    let before = fingerprint(&png);
    assert_eq!(fingerprint(&png), before);
    longer.push(0);
    assert_ne!(fingerprint(&longer), before);
}

#[test]
fn a_class_that_is_missing_somewhere_is_missing_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tar");
    shard(&path, &[("a.png", &png(0)), ("a.cls", b"3"), ("b.png", &png(1)), ("b.cls", b"three")]);
    let source = Source::parse(&path, &options(8)).unwrap();
    assert_eq!((source.len(), source.classes(), source.label(0)), (2, None, None));
    let mut options = options(8);
    options.classes = Some(vec!["x".into()]);
    assert!(Source::parse(&path, &options).unwrap_err().to_string().contains("labels are needed"));
    shard(&path, &[("a.png", &png(0)), ("a.cls", b"3")]);
    assert!(Source::parse(&path, &options).unwrap_err().to_string().contains("class 3 is not one of the 1 classes"));
}

#[test]
fn a_shard_that_was_cut_keeps_what_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tar");
    // Several blocks of it.
    let large = vec![7_u8; 5000];
    shard(&path, &[("a.png", &png(0)), ("b.png", &png(1)), ("c.png", &large)]);
    let whole = fs::read(&path).unwrap();
    // In the middle of the last file, in the middle of its header, and garbage where the second header was.
    let header = 512 * 4;
    assert_eq!(&whole[header..header + 5], b"c.png");
    let mut broken = whole.clone();
    broken[header / 2..header / 2 + 512].fill(0xaa);
    for (bytes, count) in [(&whole[..header + 1000], 2), (&whole[..header + 100], 2), (&broken[..], 1)] {
        fs::write(&path, bytes).unwrap();
        let source = Source::parse(&path, &options(8)).unwrap();
        assert_eq!(source.len(), count);
        assert_eq!(source.read(0).unwrap(), gradient(6, 5));
    }
    for nothing in [&whole[..100], &[]] {
        fs::write(&path, nothing).unwrap();
        let error = Source::parse(&path, &options(8)).unwrap_err();
        assert!(matches!(error, Error::Data { .. }) && error.to_string().contains("no pictures"), "{error}");
    }
}

#[test]
fn bad_pictures_in_a_shard_are_skipped_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tar");
    let pictures: Vec<Vec<u8>> = (0..30).map(png).collect();
    let names: Vec<String> = (0..30).map(|number| format!("{number}.png")).collect();
    let mut files: Vec<(&str, &[u8])> = names.iter().zip(&pictures).map(|(name, bytes)| (&**name, &**bytes)).collect();
    files[4].1 = &[];
    files[9].1 = &pictures[9][..60];
    shard(&path, &files);
    let source = Source::parse(&path, &options(8)).unwrap();
    assert_eq!(source.len(), 30);
    let settings = LoaderOptions { batch_size: 10, seed: 5, ..Default::default() };
    let mut loader = Loader::new(source.clone(), training(8), &settings).unwrap();
    let mut skipped = 0;
    for _ in 0..3 {
        skipped += loader.next_batch().unwrap().unwrap().skipped;
    }
    assert_eq!(skipped, 2);
    // The same pictures whoever decodes them.
    let batches = |workers| {
        take(&mut Loader::new(source.clone(), training(8), &LoaderOptions { workers, ..settings }).unwrap(), 4)
    };
    assert_eq!(batches(1), batches(3));
    // A shard that has gone is a bad picture, not a crash.
    fs::remove_file(&path).unwrap();
    assert!(matches!(source.read(0), Err(Error::Picture { .. })));
}

#[test]
fn patterns_that_mean_nothing_are_explained() {
    let folder = tempfile::tempdir().unwrap();
    for (pattern, wanted) in [
        ("a-{0..2}.tar", "a-0.tar"),
        ("a-{0..2.tar", "a { without its }"),
        ("a-{0..b}.tar", "expected numbers"),
        ("a-{5..2}.tar", "from low to high"),
        ("{0..99999}{0..9}.tar", "more than 100000 shards"),
    ] {
        let error = Source::parse(folder.path().join(pattern), &options(8)).unwrap_err();
        assert!(matches!(error, Error::Data { .. }) && error.to_string().contains(wanted), "{error}");
    }
}
