//! Files to pixels.

use std::fs;
use std::io::Cursor;

use proptest::prelude::*;
use vitmae::Error;
use vitmae::data::{Decoder, Image};

use crate::common::{difference, golden, gradient, manifest, real_data, text};

fn rgb() -> Decoder {
    Decoder::new(3).unwrap()
}

/// `picture` as a file in some format.
fn encoded(picture: &Image, format: image::ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    let color = image::ExtendedColorType::Rgb8;
    let (width, height) = (picture.width as u32, picture.height as u32);
    image::write_buffer_with_format(&mut bytes, &picture.pixels, width, height, color, format).unwrap();
    bytes.into_inner()
}

#[test]
fn files_of_every_kind_decode_as_the_reference_does() {
    for entry in manifest("formats") {
        let file = text(&entry, "file").unwrap();
        let found = rgb().open(golden("formats").join(file));
        let Some(expected) = text(&entry, "expected") else {
            let error = found.expect_err(file);
            assert!(matches!(error, Error::Picture { .. }), "{file}: {error:?}");
            assert!(error.to_string().contains(file), "{error}");
            continue;
        };
        let found = found.unwrap();
        let expected = image::open(golden("formats").join(expected)).unwrap().into_rgb8();
        assert_eq!((found.width as u32, found.height as u32), expected.dimensions(), "{file}");
        let difference = difference(&found.pixels, expected.as_raw());
        println!("{file}: {difference}");
        assert!(u64::from(difference) <= entry["tolerance"].as_u64().unwrap(), "{file}: {difference}");
    }
}

/// With libjpeg-turbo, which Pillow uses; the pure-Rust decoder rounds and upsamples chroma in its own way.
#[test]
fn jpeg_files_decode_as_in_pillow() {
    let bytes = fs::read(golden("jpeg").join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut count = 0;
    for (name, expected) in file.iter() {
        let channels = expected.shape()[2];
        let found = Decoder::new(channels).unwrap().open(golden("jpeg").join(format!("{name}.jpg"))).unwrap();
        assert_eq!([found.height, found.width, channels], *expected.shape(), "{name}");
        let difference = difference(&found.pixels, expected.data());
        println!("{name}: {difference}");
        let most = if cfg!(feature = "turbojpeg") { 0 } else { 8 };
        assert!(difference <= most, "{name}: {difference}");
        count += 1;
    }
    assert_eq!(count, 30);
}

#[test]
fn grey_is_the_luma_of_pillow() {
    // Image.convert("L") of these colours.
    let colours = [
        ([255, 0, 0], 76),
        ([0, 255, 0], 150),
        ([0, 0, 255], 29),
        ([255, 255, 255], 255),
        ([10, 200, 30], 124),
        ([1, 2, 3], 2),
        ([77, 78, 79], 78),
    ];
    let pixels = colours.iter().flat_map(|colour| colour.0).collect();
    let png = encoded(&Image::new(colours.len(), 1, 3, pixels).unwrap(), image::ImageFormat::Png);
    let grey = Decoder::new(1).unwrap().decode(&png, "colours.png").unwrap();
    assert_eq!(grey.channels, 1);
    assert_eq!(grey.pixels, colours.map(|colour| colour.1));
}

#[test]
fn alpha_is_dropped_kept_or_added() {
    let mut bytes = Cursor::new(Vec::new());
    let pixels = [10, 20, 30, 0, 40, 50, 60, 128];
    let color = image::ExtendedColorType::Rgba8;
    image::write_buffer_with_format(&mut bytes, &pixels, 2, 1, color, image::ImageFormat::Png).unwrap();
    let decode = |channels| Decoder::new(channels).unwrap().decode(bytes.get_ref(), "x.png").unwrap().pixels;
    assert_eq!(decode(3), [10, 20, 30, 40, 50, 60]);
    assert_eq!(decode(4), pixels);
    let opaque = encoded(&gradient(2, 1), image::ImageFormat::Png);
    let found = Decoder::new(4).unwrap().decode(&opaque, "x.png").unwrap().pixels;
    assert_eq!([found[3], found[7]], [255, 255]);
}

#[test]
fn other_numbers_of_channels_are_an_error_that_says_which_work() {
    for channels in [0, 2, 5, 12] {
        let error = Decoder::new(channels).unwrap_err();
        assert!(matches!(error, Error::Config(_)) && error.to_string().contains("RGB"), "{error}");
    }
}

#[test]
fn too_many_pixels_are_refused_before_they_are_decoded() {
    let png = encoded(&gradient(40, 30), image::ImageFormat::Png);
    assert!(rgb().max_pixels(1200).decode(&png, "x.png").is_ok());
    let error = rgb().max_pixels(1199).decode(&png, "x.png").unwrap_err();
    assert!(error.to_string().contains("40x30") && error.to_string().contains("1199"), "{error}");

    // A header that promises 60000 x 60000 pixels.
    let mut bomb = png;
    bomb[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]);
    let mut checksum = !0_u32;
    for byte in &bomb[12..29] {
        checksum ^= u32::from(*byte);
        for _ in 0..8 {
            checksum = if checksum & 1 == 1 { checksum >> 1 ^ 0xedb8_8320 } else { checksum >> 1 };
        }
    }
    bomb[29..33].copy_from_slice(&(!checksum).to_be_bytes());
    let error = rgb().decode(&bomb, "x.png").unwrap_err();
    assert!(error.to_string().contains("60000x60000"), "{error}");
}

#[test]
fn files_cut_anywhere_are_errors() {
    let picture = gradient(40, 30);
    for format in [image::ImageFormat::Jpeg, image::ImageFormat::Png, image::ImageFormat::WebP] {
        let bytes = encoded(&picture, format);
        assert!(rgb().decode(&bytes, "x").is_ok());
        // A PNG's last chunk is empty: its twelve bytes are not missed by all decoders.
        let spare = if format == image::ImageFormat::Png { 16 } else { 1 };
        for length in 0..=bytes.len() - spare {
            let found = rgb().decode(&bytes[..length], "x");
            assert!(matches!(found, Err(Error::Picture { .. })), "{format:?} of {} cut to {length}", bytes.len());
        }
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let error = rgb().decode(b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "x.gif").unwrap_err();
    assert!(error.to_string().contains("Gif"), "{error}");
    // Neither of which is read for ever.
    for path in ["/no/such/file.png", "/dev/zero", "/"] {
        let error = rgb().open(path).unwrap_err();
        assert!(matches!(error, Error::Picture { .. }), "{error:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn damaged_files_are_errors_or_pictures(
        format in 0..5_usize,
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..12),
    ) {
        use image::ImageFormat::{Bmp, Jpeg, Png, Tiff, WebP};
        let mut bytes = encoded(&gradient(24, 18), [Jpeg, Png, WebP, Bmp, Tiff][format]);
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        // Small enough that a size with a flipped bit does not take the machine's memory.
        match rgb().max_pixels(1 << 20).decode(&bytes, "damaged") {
            Ok(picture) => prop_assert_eq!(picture.pixels.len(), picture.width * picture.height * 3),
            Err(error) => prop_assert!(matches!(error, Error::Picture { .. }), "{error:?}"),
        }
    }
}

#[test]
fn real_photographs_decode() {
    let Some(folder) = real_data().map(|data| data.join("imagenet-samples")).filter(|folder| folder.is_dir()) else {
        println!("skipped: no real pictures in VITMAE_DATA");
        return;
    };
    for entry in fs::read_dir(folder).unwrap() {
        let picture = rgb().open(entry.unwrap().path()).unwrap();
        assert!(picture.width >= 68 && picture.channels == 3);
    }
}
