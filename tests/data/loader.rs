//! Batches: order, resume, bad pictures.

use std::fs;
use std::path::Path;

use vitmae::Error;
use vitmae::data::{ImageProcessor, Loader, LoaderOptions, Position, Shard, Source, Transform};

use crate::common::{content, gradient, options, save_png, synthetic, take, training};

fn load(source: Source, batch_size: usize, workers: usize) -> Loader {
    let options = LoaderOptions { batch_size, workers, seed: 5, ..LoaderOptions::default() };
    Loader::new(source, training(16), &options).unwrap()
}

fn folder_of(folder: &Path, good: usize, bad: usize) -> Source {
    for index in 0..good + bad {
        let path = folder.join(format!("{index:03}.png"));
        if index < bad { fs::write(path, b"").unwrap() } else { save_png(&gradient(20 + index, 24), &path) }
    }
    Source::parse(folder, &options(16)).unwrap()
}

#[test]
fn batches_do_not_depend_on_the_number_of_workers() {
    let one = take(&mut load(synthetic(50, 16), 8, 1), 15);
    let four = take(&mut load(synthetic(50, 16), 8, 4), 15);
    assert_eq!(one, four);
}

#[test]
fn a_loader_started_anywhere_goes_on_as_the_one_that_came_there() {
    let all = take(&mut load(synthetic(50, 16), 8, 2), 20);
    for start in [3, 6, 7, 13] {
        let mut first = load(synthetic(50, 16), 8, 2);
        take(&mut first, start);
        let position = first.position();
        assert_eq!(position, Position { epoch: (start / 6) as u32, batch: start % 6 });
        let options = LoaderOptions { batch_size: 8, workers: 3, seed: 5, start: position, ..Default::default() };
        let mut resumed = Loader::new(synthetic(50, 16), training(16), &options).unwrap();
        assert_eq!(take(&mut resumed, 20 - start), all[start..], "from {start}");
    }
}

#[test]
fn an_epoch_shows_every_picture_at_most_once_and_epochs_differ() {
    let mut loader = load(synthetic(50, 16), 8, 2);
    assert_eq!(loader.batches_per_epoch(), 6);
    let mut orders = Vec::new();
    for epoch in 0..3 {
        let batches = take(&mut loader, 6);
        assert!(batches.iter().enumerate().all(|(index, batch)| batch.3 == epoch && batch.4 == index));
        let order: Vec<u64> = batches.iter().flat_map(|batch| batch.1.clone()).collect();
        let mut unique = order.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), 48);
        orders.push(order);
    }
    assert_ne!(orders[0], orders[1]);
    assert_ne!(orders[1], orders[2]);
}

#[test]
fn processes_together_see_what_one_would() {
    let whole = take(&mut load(synthetic(50, 16), 8, 2), 12);
    let part = |rank| {
        let shard = Shard { rank, world: 2 };
        let options = LoaderOptions { batch_size: 4, workers: 1, seed: 5, shard, ..Default::default() };
        take(&mut Loader::new(synthetic(50, 16), training(16), &options).unwrap(), 12)
    };
    let (first, second) = (part(0), part(1));
    for (index, batch) in whole.iter().enumerate() {
        assert_eq!(batch.0, [first[index].0.clone(), second[index].0.clone()].concat());
        assert_eq!(batch.1, [first[index].1.clone(), second[index].1.clone()].concat());
    }
}

#[test]
fn a_set_smaller_than_a_batch_fills_it() {
    let mut loader = load(synthetic(3, 16), 8, 2);
    assert_eq!(loader.batches_per_epoch(), 1);
    let batch = loader.next_batch().unwrap().unwrap();
    assert_eq!(batch.len(), 8);
    assert_eq!(batch.samples[..5], batch.samples[3..]);
    assert_eq!(batch.epoch, 0);
    drop(batch);
    assert_eq!(loader.next_batch().unwrap().unwrap().epoch, 1);
}

#[test]
fn evaluation_passes_once_in_order_with_a_smaller_last_batch() {
    let options = LoaderOptions { batch_size: 4, workers: 2, ..Default::default() };
    let transform = Transform::Inference(ImageProcessor::new(16, 16, 3));
    let mut loader = Loader::evaluation(synthetic(10, 16), transform, &options).unwrap();
    let mut samples = Vec::new();
    let mut sizes = Vec::new();
    while let Some(batch) = loader.next_batch().unwrap() {
        samples.extend(batch.samples.iter().copied());
        sizes.push(batch.len());
        assert_eq!(batch.pixels.len(), batch.len() * 16 * 16 * 3);
    }
    assert_eq!(samples, (0..10).collect::<Vec<_>>());
    assert_eq!(sizes, [4, 4, 2]);
    assert!(loader.next_batch().unwrap().is_none());
}

#[test]
fn evaluation_refuses_random_crops() {
    let error = Loader::evaluation(synthetic(10, 16), training(16), &LoaderOptions::default()).unwrap_err();
    assert!(error.to_string().contains("Inference"), "{error}");
}

#[test]
fn bad_pictures_are_replaced_the_same_way_by_any_number_of_workers() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder_of(folder.path(), 38, 2);
    let mut loader = load(source.clone(), 8, 1);
    let one: Vec<_> = (0..10)
        .map(|_| {
            let batch = loader.next_batch().unwrap().unwrap();
            assert_eq!(batch.len(), 8);
            content(&batch)
        })
        .collect();
    assert_eq!(loader.bad_pictures(), 2);
    assert!(one.iter().flat_map(|batch| &batch.1).all(|sample| *sample >= 2));
    assert_eq!(one, take(&mut load(source, 8, 3), 10));
}

#[test]
fn a_replacement_is_the_next_good_picture_of_the_order() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder_of(folder.path(), 38, 2);
    // The order is that of any set of this size.
    let wanted = take(&mut load(synthetic(40, 16), 8, 1), 5);
    let found = take(&mut load(source, 8, 1), 5);
    let order: Vec<u64> = wanted.iter().flat_map(|batch| batch.1.clone()).collect();
    let found: Vec<u64> = found.iter().flat_map(|batch| batch.1.clone()).collect();
    for (place, sample) in found.iter().enumerate() {
        let good = (0..).map(|step| order[(place + step) % 40]).find(|sample| *sample >= 2).unwrap();
        assert_eq!(*sample, good);
    }
}

#[test]
fn more_than_a_tenth_of_bad_pictures_is_an_error_that_names_some() {
    let folder = tempfile::tempdir().unwrap();
    let mut loader = load(folder_of(folder.path(), 34, 6), 8, 2);
    let error = (0..10).find_map(|_| loader.next_batch().err()).expect("15 % are bad");
    assert!(matches!(error, Error::Data { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains(" pictures seen cannot be used") && text.contains(".png") && text.contains("empty"),
        "{text}"
    );
    // It stays that way.
    assert_eq!(loader.next_batch().unwrap_err().to_string(), text);
}

#[test]
fn a_tenth_of_bad_pictures_is_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let mut loader = load(folder_of(folder.path(), 36, 4), 8, 2);
    take(&mut loader, 20);
    assert_eq!(loader.bad_pictures(), 4);
}

#[test]
fn a_process_that_meets_bad_pictures_by_chance_goes_on() {
    let refused = |bad: usize| -> Vec<bool> {
        let folder = tempfile::tempdir().unwrap();
        let source = folder_of(folder.path(), 100 - bad, bad);
        let refuses = |rank| {
            let shard = Shard { rank, world: 10 };
            let options = LoaderOptions { batch_size: 2, workers: 1, seed: 5, shard, ..Default::default() };
            let mut loader = Loader::new(source.clone(), training(16), &options).unwrap();
            // Ten epochs, of which it sees ten pictures each.
            (0..60).any(|_| loader.next_batch().is_err())
        };
        (0..10).map(refuses).collect()
    };
    assert_eq!(refused(7), [false; 10]);
    assert_eq!(refused(40), [true; 10]);
}

#[test]
fn a_set_of_bad_pictures_stops_at_once() {
    for count in [1, 3, 30, 200] {
        let folder = tempfile::tempdir().unwrap();
        let mut loader = load(folder_of(folder.path(), 0, count), 4, 2);
        let error = loader.next_batch().unwrap_err();
        assert!(matches!(error, Error::Data { .. }), "{error:?}");
        assert!(error.to_string().contains("the file is empty"), "{error}");
    }
}

#[test]
fn evaluation_leaves_bad_pictures_out() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder_of(folder.path(), 20, 2);
    let options = LoaderOptions { batch_size: 2, workers: 2, ..Default::default() };
    let transform = Transform::Inference(ImageProcessor::new(16, 16, 3));
    let mut loader = Loader::evaluation(source.clone(), transform.clone(), &options).unwrap();
    let mut samples = Vec::new();
    while let Some(batch) = loader.next_batch().unwrap() {
        assert!(!batch.is_empty());
        samples.extend(batch.samples.iter().copied());
    }
    assert_eq!(samples, (2..22).collect::<Vec<_>>());
    assert_eq!(loader.bad_pictures(), 2);

    // A gap inside a batch closes without mixing pictures up.
    let options = LoaderOptions { batch_size: 5, ..options };
    let mut loader = Loader::evaluation(source.clone(), transform, &options).unwrap();
    let batch = loader.next_batch().unwrap().unwrap();
    assert_eq!(batch.samples, [2, 3, 4]);
    assert_eq!(batch.skipped, 2);
    for (at, sample) in batch.samples.iter().enumerate() {
        let picture = ImageProcessor::new(16, 16, 3).process(&source.read(*sample as usize).unwrap()).unwrap();
        assert_eq!(batch.picture(at).unwrap(), picture.pixels);
    }
}

#[test]
fn memory_of_a_batch_comes_back() {
    let mut loader = load(synthetic(64, 16), 8, 2);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..100 {
        seen.insert(loader.next_batch().unwrap().unwrap().pixels.as_ptr() as usize);
    }
    assert!(seen.len() <= 8, "{} buffers", seen.len());
}

#[test]
fn a_loader_can_be_dropped_at_any_time() {
    for taken in 0..6 {
        let mut loader = load(synthetic(64, 16), 8, 2);
        let kept = take(&mut loader, taken);
        let batch = loader.next_batch().unwrap();
        drop(loader);
        drop((kept, batch));
    }
    drop(load(synthetic(1_000_000, 16), 4096, 2));
}

#[test]
fn impossible_settings_are_errors() {
    let start = |options: LoaderOptions| Loader::new(synthetic(10, 16), training(16), &options).unwrap_err();
    for options in [
        LoaderOptions { batch_size: 0, ..Default::default() },
        LoaderOptions { shard: Shard { rank: 2, world: 2 }, ..Default::default() },
        LoaderOptions { batch_size: usize::MAX / 8, ..Default::default() },
    ] {
        assert!(matches!(start(options), Error::Config(_)), "{options:?}");
    }
}
