//! Parquet files, written by pyarrow (`tests/golden/make_parquet.py`): picture N is 6 + N pixels wide, 5 high, and N everywhere.

use std::fs;
use std::path::{Path, PathBuf};

use vitmae::Error;
use vitmae::data::{Image, Loader, LoaderOptions, Shard, Source};

use crate::common::{golden, options, real_data, take, training};

fn file(name: &str) -> PathBuf {
    golden("parquet").join(name)
}

fn picture(number: usize) -> Image {
    Image::new(6 + number, 5, 3, vec![number as u8; (6 + number) * 5 * 3]).unwrap()
}

fn open(path: impl AsRef<Path>) -> Source {
    Source::parse(path.as_ref(), &options(8)).unwrap()
}

fn refused(path: &str) -> String {
    let error = Source::parse(file(path), &options(8)).unwrap_err();
    assert!(matches!(error, Error::Data { .. }), "{error:?}");
    error.to_string()
}

#[test]
fn pictures_and_classes_are_found_however_they_were_written() {
    for name in ["usual", "mixed", "second_version", "plain"] {
        let source = open(file(&format!("{name}.parquet")));
        assert_eq!(source.len(), 40);
        assert_eq!(source.classes().unwrap(), ["ant", "bee", "cat"]);
        // There and back, so that what is kept is used and dropped.
        for index in (0..40).chain((0..40).rev()).chain([39, 0, 20]) {
            assert_eq!(source.read(index).unwrap(), picture(index), "{name} {index}");
            assert_eq!(source.label(index), Some(index as u32 % 3));
        }
        assert!(source.read(40).is_err());
        assert_eq!(source.name(7), file(&format!("{name}.parquet")).join("000007"));
    }
}

#[test]
fn several_files_are_one_set() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["part-0.parquet", "part-1.parquet"] {
        fs::copy(file(name), folder.path().join(name)).unwrap();
    }
    let whole = open(folder.path());
    let sources = ["part-{0..1}.parquet", "part-*.parquet", "part-?.parquet#image", "part-*.parquet#image,label"];
    for source in sources.map(|pattern| open(folder.path().join(pattern))).iter().chain([&whole]) {
        assert_eq!((source.len(), source.fingerprint()), (40, whole.fingerprint()));
        for index in 0..40 {
            assert_eq!(source.read(index).unwrap(), picture(index));
        }
        assert_eq!(source.name(14), folder.path().join("part-1.parquet/000001"));
    }
    // An epoch is shuffled as a whole, and each process reads its own share of it.
    let load = |rank, world, batch_size| {
        let settings = LoaderOptions { batch_size, seed: 3, shard: Shard { rank, world }, ..Default::default() };
        take(&mut Loader::new(whole.clone(), training(8), &settings).unwrap(), 5)
    };
    let (all, parts) = (load(0, 1, 8), [load(0, 2, 4), load(1, 2, 4)]);
    for (at, batch) in all.iter().enumerate() {
        assert_eq!(batch.1, [parts[0][at].1.clone(), parts[1][at].1.clone()].concat());
        assert_eq!(batch.0, [parts[0][at].0.clone(), parts[1][at].0.clone()].concat());
    }
    let first: Vec<u64> = all[0].1.clone();
    assert!(first.iter().any(|sample| *sample < 13) && first.iter().any(|sample| *sample >= 13), "{first:?}");
    // A cut file is left out; the others stay.
    let path = folder.path().join("part-0.parquet");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let rest = open(folder.path());
    assert_eq!((rest.len(), rest.read(0).unwrap()), (27, picture(13)));
    let error = Source::parse(&path, &options(8)).unwrap_err().to_string();
    assert!(error.contains("part-0.parquet") && error.contains("not a whole parquet file"), "{error}");
}

#[test]
fn rows_without_a_picture_are_skipped_and_counted() {
    let source = open(file("holes.parquet"));
    assert_eq!((source.len(), source.classes().unwrap().len(), source.label(5)), (30, 3, Some(2)));
    assert!(matches!(source.read(4), Err(Error::Picture { .. })));
    assert_eq!(source.read(5).unwrap(), picture(5));
    let settings = LoaderOptions { batch_size: 10, seed: 5, ..Default::default() };
    let mut loader = Loader::new(source, training(8), &settings).unwrap();
    take(&mut loader, 3);
    assert_eq!(loader.bad_pictures(), 1);
}

#[test]
fn columns_can_be_named() {
    let source = open(file("bytes.parquet"));
    assert_eq!((source.len(), source.classes(), source.read(3).unwrap()), (6, None, picture(3)));
    let source = open(file("bytes.parquet#scan,kind"));
    assert_eq!((source.label(4), source.classes().unwrap().len()), (Some(1), 3));
    // A class is missing somewhere: there are none.
    let source = open(file("two.parquet#right"));
    assert_eq!((source.read(2).unwrap(), source.label(0)), (picture(2), None));

    for (path, words) in [
        ("usual.parquet#photo", ["no column photo", "image (group of bytes, path), label (INT64)"]),
        ("usual.parquet#image,kind", ["no column kind", "image (group of bytes, path), label (INT64)"]),
        ("two.parquet", ["no column looks like pictures", "left (BYTE_ARRAY), right (BYTE_ARRAY), label (INT64)"]),
        ("text.parquet", ["no column looks like pictures", "caption (BYTE_ARRAY), label (INT64)"]),
        ("none-*.parquet", ["nothing in", "none-*.parquet"]),
        ("none.parquet", ["none.parquet", "No such file"]),
    ] {
        let error = refused(path);
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn a_validation_set_takes_the_classes_of_training() {
    let classes = |names: &[&str]| {
        let mut options = options(8);
        options.classes = Some(names.iter().map(|name| (*name).to_owned()).collect());
        options
    };
    let source = Source::parse(file("usual.parquet"), &classes(&["cat", "dog", "bee", "ant"])).unwrap();
    assert_eq!((0..3).map(|index| source.label(index).unwrap()).collect::<Vec<_>>(), [3, 2, 0]);
    let error = Source::parse(file("usual.parquet"), &classes(&["ant", "bee"])).unwrap_err().to_string();
    assert!(error.contains("the class cat is not one of the 2 classes"), "{error}");
    let error = Source::parse(file("bytes.parquet"), &classes(&["ant"])).unwrap_err().to_string();
    assert!(error.contains("labels are needed"), "{error}");
}

/// A codec that is not built in is said once, with what to do.
#[test]
fn what_cannot_be_unpacked_is_said() {
    let error = refused("zstd.parquet");
    for word in ["zstd.parquet", "image.bytes", "ZSTD", "SNAPPY or none", "compression=\"none\""] {
        assert!(error.contains(word), "{word}: {error}");
    }
    let error = refused("label_zstd.parquet");
    for word in ["column label with the classes", "ZSTD", "SNAPPY or none", "compression=\"snappy\""] {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert!(!error.contains("picture") && !error.contains("image"), "{error}");
}

#[test]
fn damaged_files_are_errors_or_pictures() {
    let bytes = fs::read(file("mixed.parquet")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let mut random = vitmae::random::RandomStream::new(1, 0, 0, 255);
    for round in 0..300 {
        let mut damaged = bytes.clone();
        for _ in 0..1 + round % 5 {
            let at = random.next_u32() as usize % damaged.len();
            damaged[at] = random.next_u32() as u8;
        }
        if round % 10 == 0 {
            damaged.truncate(random.next_u32() as usize % bytes.len());
        }
        fs::write(&path, damaged).unwrap();
        let Ok(source) = Source::parse(&path, &options(8)) else { continue };
        for index in 0..source.len().min(50) {
            if let Err(error) = source.read(index) {
                assert!(matches!(error, Error::Picture { .. }), "{error:?}");
            }
        }
    }
}

#[test]
fn real_files_of_hugging_face_are_read() {
    let Some(path) = real_data().map(|data| data.join("cifar10/test.parquet")).filter(|path| path.is_file()) else {
        println!("skipped: no real pictures in VITMAE_DATA");
        return;
    };
    let source = open(&path);
    assert_eq!((source.len(), source.classes().unwrap()[9].as_str()), (10_000, "truck"));
    for index in [0, 9_999, 1_000, 999, 5_432] {
        let picture = source.read(index).unwrap();
        assert_eq!((picture.width, picture.height), (32, 32));
    }
}
