//! `info`, `forward`, `embed` and `reconstruct` on good input.

use std::fs;

use crate::{Place, run, small_config, tensor};

#[test]
fn info_shows_devices_and_models() {
    let ran = run("info", &[]).succeeded();
    assert!(ran.out.contains("cpu") && ran.out.contains("threads"), "{}", ran.out);
    for word in ["vitmae ", "huge", "111.91", "58.46", "kernels", "--ops"] {
        assert!(ran.out.contains(word), "{word} is not in {}", ran.out);
    }
    assert!(ran.out.lines().count() <= 24, "{}", ran.out);
    let ran = run("info --ops", &[]).succeeded();
    assert!(ran.out.contains("masking_random") && ran.out.contains("cross_entropy_forward_backward"), "{}", ran.out);
    let ran = run("info --kernels", &[]).succeeded();
    assert!(ran.out.contains("kernels"), "{}", ran.out);
    let ran = run("info base", &[]).succeeded();
    for word in ["111.", "19.56", "58.46", "14x14 = 196", "49 visible"] {
        assert!(ran.out.contains(word), "{word} is not in {}", ran.out);
    }
    let place = Place::new();
    let ran = run("info {} --batch-size 3", &[&place.checkpoint()]).succeeded();
    assert!(ran.out.contains("32x32, 3 channels") && ran.out.contains("3 at a time"), "{}", ran.out);
}

/// What a configuration says of a decoder that the weights do not have is not shown.
#[test]
fn info_shows_no_decoder_of_an_encoder() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases/encoder_only");
    let ran = run("info {}", &[&folder]).succeeded();
    for word in ["(encoder only)", "2 blocks, width 24", "encode", "16x16"] {
        assert!(ran.out.contains(word), "{word} is not in {}", ran.out);
    }
    // The path of the model is in the first line.
    let shown = ran.out.lines().skip(1).collect::<Vec<_>>().join("\n");
    for word in ["decoder", "loss", "training", "forward", "width 20", "GFLOP"] {
        assert!(!shown.contains(word), "{word} is in {shown}");
    }
    // Token, patch embedding, two blocks and a norm by hand, and 17 positions: 24 + (48 * 24 + 24) + 2 * (4 * 24 * 24 + 2 * 24
    // * 40 + 4 * 24 + 40 + 24 + 4 * 24) + 48 + 17 * 24 = 10,616.
    assert!(shown.contains("parameters   0.01 M"), "{shown}");
    let whole = Place::new();
    let ran = run("info {}", &[&whole.checkpoint()]).succeeded();
    for word in ["decoder      1 blocks, width 16", "loss", "training", "forward", "GFLOP"] {
        assert!(ran.out.contains(word), "{word} is not in {}", ran.out);
    }
}

#[test]
fn forward_writes_everything_that_was_asked_for() {
    let place = Place::new();
    let pixels: Vec<f32> = (0..2 * 3 * 32 * 32).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
    let noise: Vec<f32> = (0..32).map(|i| ((i * 13) % 32) as f32 / 32.0).collect();
    let input =
        place.tensors("input.safetensors", &[("pixel_values", &[2, 3, 32, 32], &pixels), ("noise", &[2, 16], &noise)]);
    let output = place.path("output.safetensors");
    let checkpoint = place.checkpoint();
    run(
        "forward --from {} --input {} --output {} --gradients --hidden-states --attentions",
        &[&checkpoint, &input, &output],
    )
    .succeeded();
    assert_eq!(tensor(&output, "loss").0, [1]);
    assert_eq!(tensor(&output, "logits").0, [2, 16, 192]);
    assert_eq!(tensor(&output, "last_hidden_state").0, [2, 5, 32]);
    assert_eq!(tensor(&output, "hidden_states.2").0, [2, 5, 32]);
    assert_eq!(tensor(&output, "attentions.1").0, [2, 4, 5, 5]);
    let (shape, mask) = tensor(&output, "mask");
    assert_eq!(shape, [2, 16]);
    let kept: Vec<bool> = noise.iter().map(|&value| value < 4.0 / 32.0).collect();
    assert_eq!(mask[..16].iter().filter(|&&value| value == 0.0).count(), 4);
    assert!(mask[..16].iter().zip(&kept).filter(|(mask, kept)| (**mask == 0.0) == **kept).count() >= 12);
    let (shape, gradient) = tensor(&output, "grad.vit.embeddings.patch_embeddings.projection.weight");
    assert_eq!(shape, [32, 3, 8, 8]);
    assert!(gradient.iter().any(|&value| value != 0.0));

    // The same bytes again, whatever the number of threads.
    let first = fs::read(&output).unwrap();
    run(
        "--threads 1 forward --from {} --input {} --output {} --gradients --hidden-states --attentions",
        &[&checkpoint, &input, &output],
    )
    .succeeded();
    assert_eq!(fs::read(&output).unwrap(), first);
}

#[cfg(feature = "emulator")]
#[test]
fn the_emulator_gives_what_the_cpu_gives() {
    let place = Place::new();
    let pixels: Vec<f32> = (0..3 * 32 * 32).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
    let input = place.tensors("input.safetensors", &[("pixel_values", &[1, 3, 32, 32], &pixels)]);
    let checkpoint = place.checkpoint();
    let forward = |device: &str| {
        let output = place.path("output.safetensors");
        run(&format!("{device} forward --from {{}} --input {{}} --output {{}}"), &[&checkpoint, &input, &output])
            .succeeded();
        ["mask", "loss", "logits"].map(|name| tensor(&output, name).1)
    };
    let expected = forward("--device cpu");
    for (device, bound) in [("--device emulator --precision f32", 1e-4), ("--device emulator", 0.1)] {
        let found = forward(device);
        assert_eq!(found[0], expected[0], "masks do not depend on the device");
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!((found - expected).abs() <= bound, "{device}: {found} instead of {expected}");
        }
    }
}

#[cfg(feature = "emulator")]
#[test]
fn the_emulator_runs_info_embed_and_reconstruct() {
    let place = Place::new();
    let (checkpoint, pictures) = (place.checkpoint(), place.pictures(2));
    run("--device emulator info {}", &[&checkpoint]).succeeded();
    let embed = |device: &str| {
        let out = place.path("features.safetensors");
        run(&format!("{device} embed --from {{}} --data {{}} --out {{}}"), &[&checkpoint, &pictures, &out]).succeeded();
        tensor(&out, "features")
    };
    let (expected, found) = (embed("--device cpu"), embed("--device emulator --precision f32"));
    assert_eq!(found.0, expected.0);
    for (found, expected) in found.1.iter().zip(&expected.1) {
        assert!((found - expected).abs() < 1e-4, "{found} instead of {expected}");
    }
    let grid = place.path("grid.png");
    run("--device emulator reconstruct --from {} {} --out {}", &[&checkpoint, &pictures.join("picture 00.png"), &grid])
        .succeeded();
    assert!(image::open(&grid).unwrap().width() > 4 * 160);
}

#[test]
fn every_trained_parameter_gets_a_gradient() {
    let place = Place::new();
    let pixels: Vec<f32> = (0..3 * 32 * 32).map(|i| ((i * 29) % 97) as f32 / 48.0 - 1.0).collect();
    let input = place.tensors("input.safetensors", &[("pixel_values", &[1, 3, 32, 32], &pixels)]);
    let output = place.path("output.safetensors");
    run("forward --from {} --input {} --output {} --gradients", &[&place.checkpoint(), &input, &output]).succeeded();
    let specs = vitmae::weights::parameters(&small_config(), vitmae::weights::Parts::All);
    let trained = specs.iter().filter(|spec| spec.group != vitmae::weights::Group::Table);
    for spec in trained {
        let (shape, gradient) = tensor(&output, &format!("grad.{}", spec.name));
        assert_eq!(shape, spec.shape);
        assert!(gradient.iter().any(|&value| value != 0.0), "{} has no gradient", spec.name);
    }
}

#[test]
fn a_fresh_model_predicts_differently_at_different_positions() {
    let place = Place::new();
    let pixels = vec![0.0f32; 3 * 32 * 32];
    let input = place.tensors("input.safetensors", &[("pixel_values", &[1, 3, 32, 32], &pixels)]);
    let output = place.path("output.safetensors");
    run("forward --from {} --input {} --output {}", &[&place.checkpoint(), &input, &output]).succeeded();
    let (_, logits) = tensor(&output, "logits");
    let (_, mask) = tensor(&output, "mask");
    let hidden: Vec<&[f32]> =
        logits.chunks_exact(192).zip(&mask).filter(|(_, mask)| **mask == 1.0).map(|(patch, _)| patch).collect();
    assert_eq!(hidden.len(), 12);
    for pair in hidden.windows(2) {
        let difference = pair[0].iter().zip(pair[1]).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
        assert!(difference > 1e-3, "two hidden patches have the same prediction");
    }
}

#[test]
fn embed_writes_features_in_the_order_of_the_pictures() {
    let place = Place::new();
    let (checkpoint, pictures) = (place.checkpoint(), place.pictures(7));
    let all = place.path("all.safetensors");
    run("embed --from {} --data {} --out {} --batch-size 3", &[&checkpoint, &pictures, &all]).succeeded();
    let (shape, features) = tensor(&all, "features");
    assert_eq!(shape, [7, 32]);
    let names = fs::read_to_string(place.path("all.safetensors.names.txt")).unwrap();
    assert_eq!(names.lines().count(), 7);
    assert!(names.lines().nth(3).unwrap().ends_with("picture 03.png"), "{names}");

    // One picture alone has the same features.
    let one = place.path("one.safetensors");
    run("embed --from {} --data {} --out {}", &[&checkpoint, &pictures.join("picture 03.png"), &one]).succeeded();
    let (_, alone) = tensor(&one, "features");
    for (a, b) in alone.iter().zip(&features[3 * 32..4 * 32]) {
        assert!((a - b).abs() < 1e-5);
    }

    run("embed --from {} --data {} --out {} --pool tokens", &[&checkpoint, &pictures, &all]).succeeded();
    let (shape, tokens) = tensor(&all, "features");
    assert_eq!(shape, [7, 17, 32]);
    assert_eq!(tokens[3 * 17 * 32..][..32].len(), 32);
    for (a, b) in tokens[3 * 17 * 32..][..32].iter().zip(&alone) {
        assert!((a - b).abs() < 1e-5, "the class token comes first");
    }
    let npy = place.path("mean.npy");
    run("embed --from {} --data {} --out {} --pool mean", &[&checkpoint, &pictures, &npy]).succeeded();
    let bytes = fs::read(&npy).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let header = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert_eq!((10 + header) % 64, 0);
    assert!(String::from_utf8_lossy(&bytes[10..10 + header]).contains("'shape': (7, 32)"));
    assert_eq!(bytes.len(), 10 + header + 7 * 32 * 4);
    let first = f32::from_le_bytes(bytes[10 + header..][..4].try_into().unwrap());
    let mean = (1..17).map(|token| tokens[token * 32]).sum::<f32>() / 16.0;
    assert!((first - mean).abs() < 1e-5);
}

#[test]
fn reconstruct_draws_a_picture_per_image_and_repeats() {
    let place = Place::new();
    let (checkpoint, pictures) = (place.checkpoint(), place.pictures(2));
    let (a, b) = (pictures.join("picture 00.png"), pictures.join("picture 01.png"));
    let out = place.path("grid.png");
    run("reconstruct --from {} {} {} --out {} --seed 3", &[&checkpoint, &a, &b, &out]).succeeded();
    let first = fs::read(&out).unwrap();
    let grid = image::load_from_memory(&first).unwrap();
    assert!(grid.width() > 4 * 160 && grid.height() > 2 * 160, "{}x{}", grid.width(), grid.height());
    run("reconstruct --from {} {} {} --out {} --seed 3", &[&checkpoint, &a, &b, &out]).succeeded();
    assert_eq!(fs::read(&out).unwrap(), first);
    run("reconstruct --from {} {} {} --out {} --seed 4", &[&checkpoint, &a, &b, &out]).succeeded();
    assert_ne!(fs::read(&out).unwrap(), first);
}
