//! Crops, resizing and the preparation for a checkpoint.

use std::fs;

use proptest::prelude::*;
use safetensors::SafeTensors;
use vitmae::Error;
use vitmae::data::{CropBox, Decoder, Image, ImageProcessor, Resample, Resizer, Training, Transform};

use crate::common::{difference, golden, gradient, manifest, text};

fn open(folder: &str, file: &str) -> Image {
    Decoder::new(3).unwrap().open(golden(folder).join(file)).unwrap()
}

fn resized(image: &Image, height: usize, width: usize, crop: CropBox, resample: Resample) -> Image {
    let mut pixels = vec![0; height * width * image.channels];
    Resizer::new().resize(&mut pixels, (height, width), image, crop, resample).unwrap();
    Image::new(width, height, image.channels, pixels).unwrap()
}

#[test]
fn resizing_is_that_of_pillow() {
    for entry in manifest("resize") {
        let image = open("resize", text(&entry, "source").unwrap());
        let output = text(&entry, "output").unwrap();
        let resample = match text(&entry, "filter").unwrap() {
            "bilinear" => Resample::Bilinear,
            _ => Resample::Bicubic,
        };
        // A box with fractions is not something that is done here.
        if entry.get("box").is_some() {
            continue;
        }
        let numbers = |field: &str| -> Option<Vec<usize>> {
            entry.get(field)?.as_array()?.iter().map(|n| n.as_u64().map(|n| n as usize)).collect()
        };
        let found = if let Some(edge) = entry.get("shorter_side").and_then(serde_json::Value::as_u64) {
            let crop = entry["center_crop"].as_u64().unwrap() as usize;
            ImageProcessor::new(1, 1, 3)
                .resample(resample)
                .shortest_edge_and_crop(edge as usize, crop, crop)
                .process(&image)
                .unwrap()
        } else {
            let size = numbers("size").unwrap();
            let crop = match numbers("crop").as_deref() {
                Some([left, top, right, bottom]) => {
                    CropBox { top: *top, left: *left, height: bottom - top, width: right - left }
                }
                _ => CropBox::whole(&image),
            };
            resized(&image, size[1], size[0], crop, resample)
        };
        let expected = open("resize", output);
        assert_eq!((found.width, found.height), (expected.width, expected.height), "{output}");
        let difference = difference(&found.pixels, &expected.pixels);
        assert_eq!(difference, 0, "{output}");
    }
}

/// Every filter, grey, RGB and RGBA, larger and smaller, boxes of a pixel and at the edges.
#[test]
fn boxes_resized_are_those_of_pillow_byte_for_byte() {
    let bytes = fs::read(golden("resample").join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut count = 0;
    for (name, expected) in file.iter() {
        let words: Vec<&str> = name.split(' ').collect();
        let channels = ["grey", "", "rgb", "rgba"].iter().position(|mode| *mode == words[0]).unwrap() + 1;
        let path = golden("resample").join(format!("{}.png", words[0]));
        let image = Decoder::new(channels).unwrap().open(path).unwrap();
        let filters = ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"];
        let filter = filters.iter().position(|filter| *filter == words[1]).unwrap();
        let numbers: Vec<usize> = words[2..].iter().map(|word| word.parse().unwrap()).collect();
        let [left, top, right, bottom, width, height] = numbers[..] else { panic!("{name}") };
        let crop = CropBox { top, left, height: bottom - top, width: right - left };
        let found = resized(&image, height, width, crop, Resample::from_pillow(filter as u64).unwrap());
        assert_eq!(difference(&found.pixels, expected.data()), 0, "{name}");
        count += 1;
    }
    assert!(count >= 60, "{count} cases");
}

#[test]
fn the_processor_is_that_of_transformers() {
    for entry in manifest("processor") {
        let image = open("processor", text(&entry, "source").unwrap());
        let config = text(&entry, "config").unwrap();
        let processor = ImageProcessor::open(golden("processor").join(config)).unwrap();
        let bytes = fs::read(golden("processor").join(text(&entry, "output").unwrap())).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let expected = file.tensor("pixel_values").unwrap();
        let [_, channels, height, width] = expected.shape() else { panic!("{:?}", expected.shape()) };
        let found = processor.process(&image).unwrap();
        assert_eq!((found.height, found.width, found.channels), (*height, *width, *channels), "{config}");
        let (mean, std) = processor.normalization();
        let mut largest = 0.0_f32;
        for (at, value) in expected.data().chunks_exact(4).enumerate() {
            let expected = f32::from_le_bytes(value.try_into().unwrap());
            let (channel, place) = (at / (height * width), at % (height * width));
            let byte = f32::from(found.pixels[place * channels + channel]);
            let value = (byte / 255.0 - mean[channel]) / std[channel];
            // In levels of the picture.
            largest = largest.max((value - expected).abs() * std[channel] * 255.0);
        }
        println!("{config}: {largest} levels");
        assert!(largest < 1.01, "{config}: {largest} levels");
    }
}

#[test]
fn a_processor_is_written_and_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let processors = [
        ImageProcessor::default(),
        ImageProcessor::new(32, 48, 1).resample(Resample::Bicubic),
        ImageProcessor::new(1, 1, 3).shortest_edge_and_crop(256, 224, 200),
        ImageProcessor::new(8, 8, 3).normalized_with(&[0.1, 0.2, 0.3], &[0.4, 0.5, 0.6]),
        ImageProcessor::open(golden("processor").join("unscaled.json")).unwrap(),
    ];
    for processor in processors {
        processor.save(folder.path()).unwrap();
        assert_eq!(ImageProcessor::open(folder.path()).unwrap(), processor);
    }
    let text = ImageProcessor::default().to_json();
    assert_eq!(text["image_mean"], serde_json::json!([0.485, 0.456, 0.406]));
    assert_eq!(text["size"], serde_json::json!({ "height": 224, "width": 224 }));
}

#[test]
fn fields_that_are_left_out_are_those_of_transformers() {
    let processor = ImageProcessor::from_json("{}").unwrap();
    assert_eq!(processor.output_size(), (224, 224));
    assert_eq!(processor.normalization(), (vec![0.5; 3], vec![0.5; 3]));
    let plain = ImageProcessor::from_json(r#"{"do_normalize": false, "do_resize": false}"#).unwrap();
    assert_eq!(plain.normalization(), (vec![0.0; 3], vec![1.0; 3]));
    let image = gradient(9, 7);
    assert_eq!(plain.process(&image).unwrap(), image);
}

#[test]
fn shortest_edges_round_down_and_crops_pad() {
    let processor = |text: &str| ImageProcessor::from_json(text).unwrap();
    let found = processor(r#"{"size": {"shortest_edge": 10}}"#).process(&gradient(33, 20)).unwrap();
    assert_eq!((found.width, found.height), (16, 10));
    let found = processor(r#"{"size": {"shortest_edge": 10}}"#).process(&gradient(20, 33)).unwrap();
    assert_eq!((found.width, found.height), (10, 16));

    let image = Image::new(2, 2, 3, vec![200; 12]).unwrap();
    let crop = processor(r#"{"do_resize": false, "do_center_crop": true, "crop_size": 5}"#).process(&image).unwrap();
    let bright = |y: usize, x: usize| crop.pixels[(y * 5 + x) * 3] == 200;
    let found: Vec<_> = (0..25).filter(|at| bright(at / 5, at % 5)).collect();
    // transformers pads the odd pixel above and to the left.
    assert_eq!(found, [12, 13, 17, 18]);
}

#[test]
fn the_processor_of_a_checkpoint_lies_in_its_folder_or_beside_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let weights = folder.path().join("model.safetensors");
    for checkpoint in [folder.path(), &weights] {
        assert_eq!(ImageProcessor::of_checkpoint(checkpoint).unwrap(), None);
    }
    let processor = ImageProcessor::new(32, 48, 3).normalized_with(&[0.1, 0.2, 0.3], &[0.5; 3]);
    processor.save(folder.path()).unwrap();
    for checkpoint in [folder.path(), &weights] {
        assert_eq!(ImageProcessor::of_checkpoint(checkpoint).unwrap().as_ref(), Some(&processor));
    }
    std::fs::write(folder.path().join("preprocessor_config.json"), "{").unwrap();
    assert!(ImageProcessor::of_checkpoint(&weights).is_err());
}

#[test]
fn processors_that_make_no_sense_are_errors() {
    for text in [
        "",
        "[]",
        r#"{"size": "large"}"#,
        r#"{"size": {"longest_edge": 10}}"#,
        r#"{"size": 0}"#,
        r#"{"size": {"height": 1000000000000, "width": 1}}"#,
        r#"{"image_std": [0.5, 0, 0.5]}"#,
        r#"{"image_mean": [0.5]}"#,
        r#"{"image_mean": "x"}"#,
        r#"{"resample": 9}"#,
        r#"{"resample": "bicubic"}"#,
        r#"{"do_resize": 1}"#,
        r#"{"rescale_factor": 0}"#,
    ] {
        let found = ImageProcessor::from_json(text);
        // One mean for three deviations.
        assert!(matches!(found, Err(Error::Config(_))) || text.contains("[0.5]"), "{text}: {found:?}");
    }
    assert!(matches!(ImageProcessor::open("/no/such/folder"), Err(Error::Io { .. })));
}

#[test]
fn crops_are_a_function_of_seed_epoch_and_sample() {
    let training = Training::new(32, 32);
    let draw = |seed, epoch, sample| training.draw(375, 500, seed, epoch, sample);
    assert_eq!(draw(1, 2, 3), draw(1, 2, 3));
    let others = [draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(1, 2, 3 + (1 << 40))];
    for (at, draw) in others.iter().enumerate() {
        assert!(others[..at].iter().all(|earlier| earlier != draw));
    }
}

#[test]
fn crops_cover_what_the_settings_say() {
    let training = Training::new(32, 32);
    let (mut areas, mut flips, mut corners) = (0.0, 0, 0.0);
    let count = 4000;
    for sample in 0..count {
        let (crop, flip) = training.draw(400, 500, 7, 0, sample);
        let area = (crop.width * crop.height) as f64 / 200_000.0;
        let ratio = crop.width as f64 / crop.height as f64;
        assert!((0.195..=1.0).contains(&area) && (0.74..1.35).contains(&ratio), "{crop:?}");
        areas += area;
        flips += usize::from(flip);
        if crop.width < 500 {
            corners += crop.left as f64 / (500 - crop.width) as f64;
        }
    }
    let count = count as f64;
    // torchvision's mean over 20,000 draws; large crops fit less often.
    assert!((areas / count - 0.5157).abs() < 0.015, "mean area {}", areas / count);
    assert!((flips as f64 / count - 0.5).abs() < 0.03);
    assert!((corners / count - 0.5).abs() < 0.03);
}

#[test]
fn pictures_too_long_for_any_crop_get_the_largest_centred_one() {
    let training = Training { scale: (0.9, 1.0), ..Training::new(32, 32) };
    let (crop, _) = training.draw(10, 1000, 1, 0, 0);
    // torchvision: width = round(10 * 4 / 3).
    assert_eq!(crop, CropBox { top: 0, left: 493, height: 10, width: 13 });
    let (crop, _) = training.draw(1000, 10, 1, 0, 0);
    assert_eq!(crop, CropBox { top: 493, left: 0, height: 13, width: 10 });
    let (crop, _) = training.draw(1, 1, 1, 0, 0);
    assert_eq!(crop, CropBox { top: 0, left: 0, height: 1, width: 1 });
}

#[test]
fn a_flip_mirrors_rows() {
    let image = gradient(7, 5);
    let apply = |flip| {
        let training = Training { scale: (1.0, 1.0), ratio: (1.4, 1.4), flip, ..Training::new(5, 7) };
        let mut out = vec![0; 7 * 5 * 3];
        Transform::Training(training).apply(&mut out, &image, (0, 0, 0), &mut Resizer::new()).unwrap();
        out
    };
    let (plain, mirrored) = (apply(0.0), apply(1.0));
    assert_eq!(plain, image.pixels);
    for y in 0..5 {
        for x in 0..7 {
            let at = |x: usize| (y * 7 + x) * 3;
            assert_eq!(plain[at(x)..at(x) + 3], mirrored[at(6 - x)..at(6 - x) + 3]);
        }
    }
}

#[test]
fn settings_that_make_no_sense_are_errors() {
    for training in [
        Training::new(0, 8),
        Training { scale: (0.0, 1.0), ..Training::new(8, 8) },
        Training { scale: (0.5, 1.5), ..Training::new(8, 8) },
        Training { ratio: (2.0, 1.0), ..Training::new(8, 8) },
        Training { ratio: (f64::NAN, 1.0), ..Training::new(8, 8) },
        Training { flip: 2.0, ..Training::new(8, 8) },
    ] {
        assert!(matches!(training.check(), Err(Error::Config(_))), "{training:?}");
    }
    let image = gradient(4, 4);
    let mut out = vec![0; 12];
    let outside = CropBox { top: 0, left: 3, height: 1, width: 2 };
    let error = Resizer::new().resize(&mut out, (2, 2), &image, outside, Resample::Bilinear).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    let error =
        Resizer::new().resize(&mut out, (3, 2), &image, CropBox::whole(&image), Resample::Bilinear).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
}

proptest! {
    #[test]
    fn every_crop_lies_in_its_picture(
        height in 1..600_usize, width in 1..600_usize, seed: u64, epoch: u32, sample: u64,
    ) {
        let (crop, _) = Training::new(8, 8).draw(height, width, seed, epoch, sample);
        prop_assert!(crop.height >= 1 && crop.width >= 1);
        prop_assert!(crop.top + crop.height <= height && crop.left + crop.width <= width);
    }

    #[test]
    fn any_size_becomes_any_other(
        height in 1..40_usize, width in 1..40_usize, to_height in 1..40_usize, to_width in 1..40_usize,
        channels in 1..5_usize, filter in 0..6_u64,
    ) {
        let image = Image::new(width, height, channels, vec![77; height * width * channels]).unwrap();
        let resample = Resample::from_pillow(filter).unwrap();
        prop_assert_eq!(resample.pillow(), filter);
        let found = resized(&image, to_height, to_width, CropBox::whole(&image), resample);
        // A flat picture stays flat.
        prop_assert!(found.pixels.iter().all(|v| v.abs_diff(77) <= 2), "{:?}", found.pixels);
    }
}
