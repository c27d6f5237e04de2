//! Grids and curves.

use std::fs;

use vitmae::Error;
use vitmae::figures::{Curve, Grid, PictureRef, Scale};

use crate::common::gradient;

fn saved(grid: &Grid) -> image::RgbImage {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("grid.png");
    grid.save(&path).unwrap();
    // Nothing else is left behind.
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    image::open(path).unwrap().into_rgb8()
}

#[test]
fn a_grid_shows_pictures_large_enough_with_hidden_patches_grey() {
    let picture = gradient(32, 32);
    let original = PictureRef::bytes(&picture.pixels, 32, 32, 3);
    let mask = [1.0, 0.0, 0.0, 1.0];
    let mut grid = Grid::new(&["original", "masked"]);
    grid.row("", &[original, original.masked(&mask, 16, 16)]).unwrap();
    let sheet = saved(&grid);
    assert!(sheet.width() >= 2 * 160 && sheet.height() >= 160);
    // Without labels the first picture begins at the margin; a pixel is a square of five.
    let find = |wanted: [u8; 3]| sheet.pixels().filter(|pixel| pixel.0 == wanted).count();
    assert_eq!(find([168, 168, 168]), 2 * 16 * 16 * 25);
    let top = sheet.height() - 12 - 8 - 160;
    for (x, y) in [(0, 0), (31, 0), (5, 30), (31, 31)] {
        let expected = &picture.pixels[(y * 32 + x) * 3..][..3];
        for (dx, dy) in [(0, 0), (4, 4)] {
            assert_eq!(sheet.get_pixel(12 + x as u32 * 5 + dx, top + y as u32 * 5 + dy).0, expected);
        }
    }
}

#[test]
fn bytes_floats_and_planes_show_the_same() {
    let picture = gradient(16, 8);
    let floats: Vec<f32> = picture.pixels.iter().map(|v| f32::from(*v) / 255.0).collect();
    let planes: Vec<f32> = (0..3).flat_map(|c| floats.iter().skip(c).step_by(3).copied()).collect();
    let show = |picture: PictureRef<'_>| {
        let mut grid = Grid::new(&["x"]);
        grid.row("label", &[picture]).unwrap();
        saved(&grid)
    };
    let expected = show(PictureRef::bytes(&picture.pixels, 8, 16, 3));
    assert_eq!(show(PictureRef::floats(&floats, 8, 16, 3)), expected);
    assert_eq!(show(PictureRef::planes(&planes, 8, 16, 3)), expected);
}

#[test]
fn pasting_shows_the_original_where_it_was_visible() {
    let (original, predicted) = (vec![10_u8; 32 * 32], vec![200_u8; 32 * 32]);
    let mask = [0.0, 1.0, 1.0, 1.0];
    let mut grid = Grid::new(&["x"]);
    let predicted = PictureRef::bytes(&predicted, 32, 32, 1);
    grid.row("", &[predicted.pasted_on(PictureRef::bytes(&original, 32, 32, 1), &mask, 16, 16)]).unwrap();
    let sheet = saved(&grid);
    let count = |wanted: u8| sheet.pixels().filter(|pixel| pixel.0 == [wanted; 3]).count();
    assert_eq!((count(10), count(200)), (16 * 16 * 25, 3 * 16 * 16 * 25));
}

#[test]
fn every_channel_count_and_odd_values_are_shown() {
    for channels in 1..6 {
        let values = [f32::NAN, f32::INFINITY, -1.0, 0.5].repeat(6 * 7 * channels / 4 + 1);
        let mut grid =
            Grid::new(&["a caption that is much too long for a single narrow picture of this size", "b", "c"]);
        let picture = PictureRef::floats(&values[..6 * 7 * channels], 6, 7, channels);
        grid.row("a long label with ünïcode and 文字 in it, which goes on and on for ever", &[picture]).unwrap();
        grid.row("", &[]).unwrap();
        grid.footer(&"how it was made; ".repeat(40));
        saved(&grid);
    }
}

#[test]
fn pictures_that_do_not_fit_their_size_are_errors() {
    let values = [0_u8; 12];
    let picture = PictureRef::bytes(&values, 2, 2, 3);
    let mut grid = Grid::new(&["x"]);
    for wrong in [
        PictureRef::bytes(&values, 2, 3, 3),
        PictureRef::bytes(&[], 0, 0, 3),
        PictureRef::bytes(&values, usize::MAX, 2, 3),
        picture.masked(&[0.0], 1, 1),
        picture.masked(&[0.0], 0, 1),
        picture.pasted_on(PictureRef::bytes(&values[..3], 1, 1, 3), &[0.0; 4], 1, 1),
    ] {
        assert!(matches!(grid.row("", &[wrong]), Err(Error::Shape { .. })), "{wrong:?}");
    }
    assert!(matches!(grid.row("", &[picture, picture]), Err(Error::Shape { .. })));
    assert!(grid.save("/no/such/folder/x.png").is_err());
    grid.row("", &[picture]).unwrap();
    assert!(matches!(grid.save("/no/such/folder/x.png"), Err(Error::Io { .. })));
}

fn svg(points: &[(u64, f64)], scale: Scale) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("loss.svg");
    Curve::new("Training <loss> & more", "loss", points).scale(scale).save(&path).unwrap();
    fs::read_to_string(path).unwrap()
}

#[test]
fn curves_of_any_points_are_drawn() {
    let nan = f64::NAN;
    let cases: [&[(u64, f64)]; 9] = [
        &[],
        &[(0, nan)],
        &[(7, 0.5)],
        &[(0, 0.0), (1, 0.0)],
        &[(5, 1.0), (5, 2.0)],
        &[(0, 1.0), (1, nan), (2, 3.0), (3, f64::INFINITY), (4, 0.1)],
        &[(0, -1.0), (1, 1.0)],
        &[(0, 1e-30), (u64::MAX, 1e30)],
        &[(3, 1.0), (2, 2.0), (1, 3.0)],
    ];
    for points in cases {
        for scale in [Scale::Automatic, Scale::Linear, Scale::Logarithmic] {
            let text = svg(points, scale);
            assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"), "{points:?}");
            assert!(!text.contains("NaN") && !text.contains("inf"), "{points:?} {scale:?}");
            assert!(text.contains("&lt;loss&gt;") && text.contains("step"));
        }
    }
}

#[test]
fn long_curves_stay_small_and_keep_their_peaks() {
    let points: Vec<(u64, f64)> =
        (0..200_000).map(|i| (i, if i == 123_456 { 9.0 } else { 1.0 + 1e-6 * i as f64 })).collect();
    let text = svg(&points, Scale::Linear);
    assert!(text.len() < 200_000, "{} bytes", text.len());
    let flat: Vec<(u64, f64)> = points.iter().map(|(step, _)| (*step, 1.0)).collect();
    assert_ne!(svg(&flat, Scale::Linear), text);
}
