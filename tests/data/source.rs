//! Folders, files and generated scenes.

use std::collections::BTreeSet;
use std::fs;

use vitmae::Error;
use vitmae::data::{Decoder, SYNTHETIC_CLASSES, SYNTHETIC_COUNT, Source, SourceOptions};

use crate::common::{gradient, options, real_data, save_png};

fn names(source: &Source) -> Vec<String> {
    (0..source.len()).map(|index| source.name(index).file_name().unwrap().to_string_lossy().into_owned()).collect()
}

#[test]
fn a_folder_is_read_sorted_with_sub_folders_as_classes() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["cat/2.png", "cat/1.PNG", "ant/deep/er/x.png", "ant/a.png", "bee/b.Png", "empty/readme.txt"] {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        if name.ends_with("txt") {
            fs::write(path, "x").unwrap()
        } else {
            save_png(&gradient(4, 4), &path.with_extension("png"))
        }
        let path = folder.path().join(name);
        if !path.exists() {
            fs::rename(path.with_extension("png"), path).unwrap();
        }
    }
    fs::write(folder.path().join("notes.txt"), "x").unwrap();
    fs::create_dir(folder.path().join(".hidden")).unwrap();
    save_png(&gradient(4, 4), &folder.path().join(".hidden/x.png"));
    save_png(&gradient(4, 4), &folder.path().join("cat/._1.png"));
    let source = Source::parse(folder.path(), &options(8)).unwrap();
    assert_eq!(names(&source), ["a.png", "x.png", "b.Png", "1.PNG", "2.png"]);
    assert_eq!(source.classes().unwrap(), ["ant", "bee", "cat"]);
    let labels: Vec<_> = (0..5).map(|index| source.label(index).unwrap()).collect();
    assert_eq!(labels, [0, 0, 1, 2, 2]);
    assert_eq!(source.read(0).unwrap(), gradient(4, 4));
    assert!(source.read(5).is_err());
}

#[test]
fn pictures_beside_sub_folders_have_no_classes() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("more")).unwrap();
    save_png(&gradient(4, 4), &folder.path().join("a.png"));
    save_png(&gradient(4, 4), &folder.path().join("more/b.png"));
    let source = Source::parse(folder.path(), &options(8)).unwrap();
    assert_eq!((source.len(), source.classes(), source.label(0)), (2, None, None));
}

#[test]
fn a_validation_folder_takes_the_classes_of_training() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("cat")).unwrap();
    save_png(&gradient(4, 4), &folder.path().join("cat/b.png"));
    let mut options = options(8);
    options.classes = Some(vec!["ant".into(), "bee".into(), "cat".into()]);
    let source = Source::parse(folder.path(), &options).unwrap();
    assert_eq!(source.label(0), Some(2));
    assert_eq!(source.classes().unwrap().len(), 3);
    options.classes = Some(vec!["ant".into()]);
    let error = Source::parse(folder.path(), &options).unwrap_err();
    assert!(error.to_string().contains("cat"), "{error}");
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_loops_end() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("a/b");
    fs::create_dir_all(&inner).unwrap();
    save_png(&gradient(4, 4), &inner.join("x.png"));
    symlink(folder.path(), inner.join("up")).unwrap();
    symlink(&inner, folder.path().join("again")).unwrap();
    symlink(inner.join("x.png"), folder.path().join("a/link.png")).unwrap();
    symlink("/no/such/file.png", folder.path().join("a/dangling.png")).unwrap();
    let source = Source::parse(folder.path(), &options(8)).unwrap();
    assert_eq!(names(&source), ["dangling.png", "link.png", "x.png", "x.png"]);
    assert!(matches!(source.read(0).unwrap_err(), Error::Picture { .. }));
    assert!(source.read(1).is_ok());
}

#[cfg(unix)]
#[test]
fn names_that_are_not_utf_8_work() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let class = folder.path().join(OsStr::from_bytes(b"cl\xffss"));
    fs::create_dir(&class).unwrap();
    save_png(&gradient(4, 4), &folder.path().join("x.png"));
    fs::rename(folder.path().join("x.png"), class.join(OsStr::from_bytes(b"\xfe\xff.png"))).unwrap();
    let source = Source::parse(folder.path(), &options(8)).unwrap();
    assert_eq!(source.read(0).unwrap(), gradient(4, 4));
    assert_eq!(source.classes().unwrap().len(), 1);
}

#[test]
fn an_empty_folder_is_an_error_that_says_what_was_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.gif"), "x").unwrap();
    let error = Source::parse(folder.path(), &options(8)).unwrap_err();
    assert!(matches!(error, Error::Data { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(".jpeg") && text.contains(".webp") && text.contains("1 .gif"), "{text}");
}

#[test]
fn one_file_is_a_source_whatever_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture");
    save_png(&gradient(5, 4), &path);
    let source = Source::parse(&path, &options(8)).unwrap();
    assert_eq!((source.len(), source.classes()), (1, None));
    assert_eq!(source.name(0), path);
    assert_eq!(source.read(0).unwrap(), gradient(5, 4));
}

#[test]
fn what_is_not_read_is_said() {
    for (spec, wanted) in [
        ("train.tar.gz", "decompress it first (gunzip)"),
        ("train-{00..12}.TGZ", "decompress it first (gunzip)"),
        ("train.tar.zst", "decompress it first (unzstd)"),
        #[cfg(not(feature = "parquet"))]
        ("/data/train.parquet", "--features parquet"),
        #[cfg(feature = "parquet")]
        ("/data/train.parquet", "No such file"),
        ("/no/such/folder", "synthetic[:COUNT]"),
        ("synthetic:", "COUNT"),
        ("synthetic:0", "COUNT"),
        ("synthetic:-1", "COUNT"),
        ("synthetic:5:6:7", "COUNT"),
    ] {
        let error = Source::parse(spec, &options(8)).unwrap_err();
        assert!(matches!(error, Error::Data { .. }), "{error:?}");
        assert!(error.to_string().contains(wanted) && error.to_string().contains(spec), "{error}");
    }
}

#[test]
fn a_fingerprint_follows_names_and_not_the_place() {
    let make = |names: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            save_png(&gradient(4, 4), &folder.path().join(name));
        }
        Source::parse(folder.path(), &options(8)).unwrap().fingerprint()
    };
    assert_eq!(make(&["a.png", "b.png"]), make(&["a.png", "b.png"]));
    assert_ne!(make(&["a.png", "b.png"]), make(&["a.png", "c.png"]));
}

/// Names may stay where pictures change.
#[test]
fn a_fingerprint_sees_sizes() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a.png", "b.png", "c.png"].map(|name| folder.path().join(name));
    for path in &paths {
        save_png(&gradient(4, 4), path);
    }
    let fingerprint = || Source::parse(folder.path(), &options(8)).unwrap().fingerprint();
    let before = fingerprint();
    assert_eq!(before.len(), 16);
    let bytes = fs::read(&paths[1]).unwrap();
    let mut seen = vec![before.clone()];
    // Longer, empty, and the lengths of two files exchanged.
    for (second, third) in [(bytes.len() + 1, bytes.len()), (0, bytes.len()), (bytes.len(), bytes.len() + 1)] {
        for (path, length) in [(&paths[1], second), (&paths[2], third)] {
            let mut changed = bytes.clone();
            changed.resize(length, 0);
            fs::write(path, changed).unwrap();
        }
        let found = fingerprint();
        assert!(!seen.contains(&found), "{second} and {third} bytes");
        seen.push(found);
    }
    // What is in them is not read, and where the folder is does not matter.
    fs::write(&paths[2], &bytes).unwrap();
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    fs::write(&paths[1], other).unwrap();
    assert_eq!(fingerprint(), before);
    #[cfg(unix)]
    {
        // A link that leads nowhere now.
        fs::rename(&paths[0], folder.path().join("kept")).unwrap();
        std::os::unix::fs::symlink(folder.path().join("kept"), &paths[0]).unwrap();
        assert_eq!(fingerprint(), before);
        fs::remove_file(folder.path().join("kept")).unwrap();
        assert_ne!(fingerprint(), before);
    }
}

#[test]
fn generated_scenes_are_a_function_of_seed_and_number() {
    let parse = |spec: &str| Source::parse(spec, &options(48)).unwrap();
    let (a, b, other) = (parse("synthetic:30"), parse("synthetic:30"), parse("synthetic:30:7"));
    assert_eq!(parse("synthetic").len(), SYNTHETIC_COUNT);
    let mut unique = BTreeSet::new();
    for index in 0..30 {
        assert_eq!(a.read(index).unwrap(), b.read(index).unwrap());
        assert_ne!(a.read(index).unwrap(), other.read(index).unwrap());
        assert_eq!(a.label(index), Some(index as u32 % 10));
        unique.insert(a.read(index).unwrap().pixels);
    }
    assert_eq!(unique.len(), 30);
    assert_eq!(a.classes().unwrap(), SYNTHETIC_CLASSES);
    // A larger set begins with the smaller one.
    assert_eq!(parse("synthetic:5000").read(29).unwrap(), a.read(29).unwrap());
}

#[test]
fn generated_scenes_come_in_any_size_and_number_of_channels() {
    for (channels, height, width) in [(1, 32, 32), (3, 1, 1), (3, 7, 50), (4, 40, 24), (3, 96, 160)] {
        let options = SourceOptions::new(channels, height, width).unwrap();
        let source = Source::parse("synthetic:20", &options).unwrap();
        for index in 0..20 {
            let picture = source.read(index).unwrap();
            assert_eq!((picture.channels, picture.height, picture.width), (channels, height, width));
        }
    }
    assert!(SourceOptions::new(2, 8, 8).is_err());
    assert!(SourceOptions::new(3, 0, 8).is_err());
}

#[test]
fn generated_scenes_of_one_and_three_channels_are_the_same_scenes() {
    let read = |channels| {
        let options = SourceOptions::new(channels, 40, 40).unwrap();
        Source::parse("synthetic:10", &options).unwrap().read(3).unwrap()
    };
    let (grey, colour, alpha) = (read(1), read(3), read(4));
    for ((l, rgb), rgba) in grey.pixels.iter().zip(colour.pixels.chunks(3)).zip(alpha.pixels.chunks(4)) {
        let luma = 0.299 * f64::from(rgb[0]) + 0.587 * f64::from(rgb[1]) + 0.114 * f64::from(rgb[2]);
        assert!((luma - f64::from(*l)).abs() <= 0.6);
        assert_eq!((&rgba[..3], rgba[3]), (rgb, 255));
    }
}

#[test]
fn real_photographs_are_found() {
    let Some(folder) = real_data().map(|data| data.join("imagenet-samples")).filter(|folder| folder.is_dir()) else {
        println!("skipped: no real pictures in VITMAE_DATA");
        return;
    };
    let mut options = options(8);
    options.decoder = Decoder::new(1).unwrap();
    let source = Source::parse(folder, &options).unwrap();
    assert_eq!(source.len(), 100);
    assert_eq!(source.read(0).unwrap().channels, 1);
}
