//! Bad input gets a clear error, and nothing is lost.

use std::fs;
use std::path::Path;

use vitmae::config::MaeConfig;

use crate::{Place, Ran, files, run, small_config, tensor};

/// What is in a checkpoint of a run.
pub(crate) const CHECKPOINT: [&str; 5] =
    ["config.json", "model.safetensors", "optimizer.safetensors", "preprocessor_config.json", "trainer_state.json"];

pub(crate) const TRAIN: &str = "--model {} --batch-size 4 --steps 2 --threads 2";

pub(crate) fn config_file(place: &Place, change: impl FnOnce(&mut MaeConfig)) -> std::path::PathBuf {
    let mut config = small_config();
    change(&mut config);
    let path = place.path("model.json");
    fs::write(&path, config.to_json()).unwrap();
    path
}

pub(crate) fn pretrain(place: &Place, data: &Path, more: &str) -> Ran {
    let model = config_file(place, |_| ());
    run(&format!("pretrain --data {{}} --out {{}} {TRAIN} {more}"), &[data, &place.path("run"), &model])
}

#[test]
fn data_that_is_not_there_is_named() {
    let place = Place::new();
    pretrain(&place, Path::new("/no/such/folder"), "").failed(1, &["/no/such/folder"]);
    assert!(!place.path("run").exists());
}

#[test]
fn a_checkpoint_that_is_not_there_is_named() {
    let place = Place::new();
    let pictures = place.pictures(1);
    let missing = Path::new("/no/such/checkpoint");
    run("embed --from {} --data {} --out {}", &[missing, &pictures, &place.path("x.npy")])
        .failed(1, &["/no/such/checkpoint"]);
    run("info {}", &[missing]).failed(1, &["/no/such/checkpoint"]);
    run("info facebook/vit-mae-base", &[]).failed(1, &["no such file", "hf download facebook/vit-mae-base"]);
    // The same of what a model is to be shown.
    let (checkpoint, missing, out) = (place.checkpoint(), Path::new("/no/such/file"), place.path("out.safetensors"));
    run("forward --from {} --input {} --output {}", &[&checkpoint, missing, &out]).failed(1, &["/no/such/file"]);
    assert!(!out.exists());
    let out = place.path("out.png");
    run("reconstruct --from {} {} --out {}", &[&checkpoint, missing, &out]).failed(1, &["/no/such/file"]);
    assert!(!out.exists());
}

#[test]
fn a_folder_without_pictures_says_what_was_looked_for() {
    let place = Place::new();
    let folder = place.path("empty");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("notes.txt"), "no picture").unwrap();
    pretrain(&place, &folder, "").failed(1, &["empty", "jp"]);
    assert!(!place.path("run").exists());
}

#[test]
fn a_few_bad_pictures_are_skipped_counted_and_named() {
    let place = Place::new();
    let pictures = place.pictures(30);
    fs::write(pictures.join("zero.png"), []).unwrap();
    let whole = fs::read(pictures.join("picture 00.png")).unwrap();
    fs::write(pictures.join("cut.png"), &whole[..whole.len() / 2]).unwrap();
    let model = config_file(&place, |_| ());
    let ran = run(
        "pretrain --data {} --out {} --model {} --batch-size 8 --steps 8 --threads 2",
        &[&pictures, &place.path("run"), &model],
    )
    .succeeded();
    for word in ["zero.png", "cut.png", "2 pictures could not be decoded"] {
        assert!(ran.err.contains(word), "{word} is not in {}", ran.err);
    }
    let ran =
        run("embed --from {} --data {} --out {}", &[&place.checkpoint(), &pictures, &place.path("f.safetensors")]);
    let ran = ran.succeeded();
    assert!(ran.err.contains("2 pictures could not be decoded"), "{}", ran.err);
    assert_eq!(tensor(&place.path("f.safetensors"), "features").0, [30, 32]);
}

#[test]
fn more_than_a_tenth_of_bad_pictures_stops_the_run() {
    let place = Place::new();
    let pictures = place.pictures(12);
    for index in 0..8 {
        fs::write(pictures.join(format!("bad {index}.png")), b"not a picture").unwrap();
    }
    let model = config_file(&place, |_| ());
    run(
        "pretrain --data {} --out {} --model {} --batch-size 8 --steps 20 --threads 2",
        &[&pictures, &place.path("run"), &model],
    )
    .failed(1, &["bad ", "10 %"]);
    // No half-written file; and steps that were done before the bad ones came up are saved as a whole checkpoint.
    let left = place.list("run");
    assert!(left.contains(&"recipe.json".to_owned()), "{left:?}");
    for name in &left {
        assert!(!name.contains("tmp"), "{left:?}");
        if name.starts_with("checkpoint-") {
            let names: Vec<String> = files(&place.path("run").join(name)).into_keys().collect();
            assert_eq!(names, CHECKPOINT, "{name}");
        }
    }
}

#[test]
fn sizes_that_patches_do_not_fit_are_explained() {
    let place = Place::new();
    let pictures = place.pictures(2);
    pretrain(&place, &pictures, "--image-size 4").failed(1, &["4x4", "8x8"]);
    pretrain(&place, &pictures, "--image-size 30").failed(1, &["30x30", "8x8"]);
    pretrain(&place, &pictures, "--image-size 32x30").failed(1, &["32x30"]);
    pretrain(&place, &pictures, "--image-size 0").failed(2, &["--image-size"]);
    assert!(!place.path("run").exists());
    let (checkpoint, out) = (place.checkpoint(), place.path("out.safetensors"));
    let input = place.tensors("input.safetensors", &[("pixel_values", &[1, 3, 30, 32], &[0.5; 3 * 30 * 32])]);
    run("forward --from {} --input {} --output {}", &[&checkpoint, &input, &out]).failed(1, &["30x32"]);
    let input = place.tensors("input.safetensors", &[("pixel_values", &[1, 3, 40, 32], &[0.5; 3 * 40 * 32])]);
    run("forward --from {} --input {} --output {}", &[&checkpoint, &input, &out]).failed(1, &["40x32", "interpolat"]);
    let input = place.tensors("input.safetensors", &[("pixel_values", &[1, 3, 4, 4], &[0.5; 3 * 4 * 4])]);
    run("forward --from {} --input {} --output {}", &[&checkpoint, &input, &out])
        .failed(1, &["4x4", "smaller than a patch of 8x8"]);
    assert!(!out.exists());
    let (picture, out) = (pictures.join("picture 00.png"), place.path("out.png"));
    run("reconstruct --from {} {} --out {} --image-size 4", &[&checkpoint, &picture, &out])
        .failed(1, &["4x4", "smaller than a patch of 8x8"]);
    assert!(!out.exists());
}

#[test]
fn tensors_that_do_not_fit_the_model_are_explained() {
    let place = Place::new();
    let (checkpoint, out) = (place.checkpoint(), place.path("out.safetensors"));
    let pixels = vec![0.5f32; 2 * 3 * 32 * 32];
    let good: (&str, &[usize], &[f32]) = ("pixel_values", &[2, 3, 32, 32], &pixels);
    let forward = |input: &Path, more: &str| {
        run(&format!("forward --from {{}} --input {{}} --output {{}} {more}"), &[&checkpoint, input, &out])
    };
    let grey = place.tensors("grey.safetensors", &[("pixel_values", &[6, 1, 32, 32], &pixels)]);
    forward(&grey, "").failed(1, &["channels", "3", "1"]);
    let flat = place.tensors("flat.safetensors", &[("pixel_values", &[2, 3 * 32 * 32], &pixels)]);
    forward(&flat, "").failed(1, &["pixel_values", "[B, C, H, W]"]);
    let other = place.tensors("other.safetensors", &[("pixels", &[2, 3, 32, 32], &pixels)]);
    forward(&other, "").failed(1, &["pixel_values"]);
    let empty = place.tensors("empty.safetensors", &[("pixel_values", &[0, 3, 32, 32], &[])]);
    forward(&empty, "").failed(1, &["batch"]);
    let short = place.tensors("short.safetensors", &[good, ("noise", &[2, 15], &[0.5; 30])]);
    forward(&short, "").failed(1, &["noise", "[2, 16]"]);
    let mut noise = [0.25f32; 32];
    noise[7] = f32::NAN;
    let nan = place.tensors("nan.safetensors", &[good, ("noise", &[2, 16], &noise)]);
    forward(&nan, "").failed(1, &["noise", "NaN"]);
    let mut bad = pixels.clone();
    bad[100] = f32::NAN;
    let nan = place.tensors("nan.safetensors", &[("pixel_values", &[2, 3, 32, 32], &bad)]);
    forward(&nan, "").failed(1, &["pixel_values", "NaN"]);
    bad[100] = f32::INFINITY;
    let infinite = place.tensors("inf.safetensors", &[("pixel_values", &[2, 3, 32, 32], &bad)]);
    forward(&infinite, "").failed(1, &["pixel_values", "inf"]);
    let fine = place.tensors("fine.safetensors", &[good]);
    forward(&fine, "--mask-ratio 1").failed(2, &["--mask-ratio"]);
    forward(&fine, "--mask-ratio -0.5").failed(2, &["mask-ratio"]);
    assert!(!out.exists());
    forward(&fine, "").succeeded();
}

#[test]
fn wrong_numbers_are_wrong_usage() {
    let place = Place::new();
    let pictures = place.pictures(1);
    for more in ["--blr nan", "--mask-ratio 1.0", "--mask-ratio=-0.1", "--accumulate 0", "--epochs 0", "--no-such-flag"]
    {
        pretrain(&place, &pictures, more).failed(2, &["error"]);
    }
    run("pretrain --data {} --out {} --batch-size 0", &[&pictures, &place.path("run")]).failed(2, &["--batch-size"]);
    run("pretrain --data {} --out {} --accumulate 18446744073709551615", &[&pictures, &place.path("run")])
        .failed(1, &["accumulation", "pictures in a step"]);
    run("pretrain --data synthetic:99999999999 --out {}", &[&place.path("run")]).failed(1, &["COUNT from 1 to"]);
    run("pretrain --data {} --out {} --model enormous", &[&pictures, &place.path("run")])
        .failed(1, &["enormous", "tiny"]);
    run("--device gpu info", &[]).failed(2, &["--device"]);
    run("info base --batch-size 10000000000000", &[]).failed(2, &["at most 1048576"]);
    run("--threads 3000 info", &[]).failed(2, &["--threads", "at most 1024"]);
    run("reconstruct --from {} {} --out {}", &[&pictures, &pictures, &place.path("out.jpg")]).failed(2, &["PNG"]);
    for name in ["features.bin", "features", "features.NPY"] {
        run("embed --from {} --data {} --out {}", &[&pictures, &pictures, &place.path(name)])
            .failed(2, &["--out", ".npy or .safetensors"]);
    }
    run("", &[]).failed(2, &["Usage"]);
    assert!(!place.path("run").exists());
}

#[test]
fn a_device_that_is_not_there_says_what_to_do() {
    let place = Place::new();
    let (checkpoint, pictures, out) = (place.checkpoint(), place.pictures(1), place.path("f.npy"));
    let embed = |device: &str| {
        run(&format!("{device} embed --from {{}} --data {{}} --out {{}}"), &[&checkpoint, &pictures, &out])
    };
    let ran = embed("--device cuda:4096");
    let words = ["--device cpu", "CUDA_VISIBLE_DEVICES", "--features cuda"];
    assert!(words.iter().any(|word| ran.err.contains(word)), "{}", ran.err);
    ran.failed(1, &["error"]);
    embed("--device cpu --precision bf16").failed(1, &["bf16", "--precision f32"]);
    embed("--precision f16").failed(2, &["--precision", "bf16"]);
    if cfg!(not(feature = "emulator")) {
        embed("--device emulator").failed(1, &["--features emulator"]);
        let ran = run("--device emulator info", &[]).succeeded();
        assert!(ran.out.contains("--features emulator"), "{}", ran.out);
    }
    assert!(!out.exists());
    embed("--device auto").succeeded();
}

#[test]
fn files_that_lie_are_refused() {
    let place = Place::new();
    let pictures = place.pictures(1);
    let checkpoint = place.checkpoint();
    let weights = checkpoint.join("model.safetensors");
    let good = fs::read(&weights).unwrap();
    let header_length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(good[8..8 + header_length].to_vec()).unwrap();
    let with_header = |header: &[u8]| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header);
        bytes.extend_from_slice(&good[8 + header_length..]);
        bytes
    };
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut longer = good.clone();
    longer[..8].copy_from_slice(&(good.len() as u64 * 2).to_le_bytes());
    let mut not_text = good.clone();
    not_text[20] = 0xff;
    // Two matrices of one size are said to lie in the same place.
    let mut entries: serde_json::Value = serde_json::from_str(&header).unwrap();
    let layer = "vit.encoder.layer.0.attention.attention";
    entries[format!("{layer}.key.weight")] = entries[format!("{layer}.query.weight")].clone();
    let lies: [(&str, Vec<u8>); 10] = [
        ("empty", Vec::new()),
        ("cut header", good[..header_length / 2].to_vec()),
        ("cut data", good[..good.len() - 5].to_vec()),
        ("huge header", huge),
        ("header longer than the file", longer),
        ("not UTF-8", not_text),
        ("not JSON", with_header(b"{\"a\": [1, 2")),
        ("integers for weights", with_header(header.replace("\"F32\"", "\"I32\"").as_bytes())),
        ("overlap", with_header(entries.to_string().as_bytes())),
        ("wrong places", with_header(header.replacen("\"data_offsets\":[", "\"data_offsets\":[1", 3).as_bytes())),
    ];
    for (what, bytes) in lies {
        assert_ne!(bytes, good, "{what}");
        fs::write(&weights, bytes).unwrap();
        let ran = run("embed --from {} --data {} --out {}", &[&checkpoint, &pictures, &place.path("f.npy")]);
        assert_eq!(ran.status, 1, "{what}: {}", ran.err);
        assert!(ran.err.contains("model.safetensors") && !ran.err.contains("panicked"), "{what}: {}", ran.err);
        assert!(what != "overlap" || ran.err.contains("overlap"), "{}", ran.err);
    }
    assert!(!place.path("f.npy").exists());
    fs::write(&weights, &good).unwrap();
    run("embed --from {} --data {} --out {}", &[&checkpoint, &pictures, &place.path("f.npy")]).succeeded();
}

#[test]
fn inputs_that_lie_are_refused() {
    let place = Place::new();
    let (checkpoint, out) = (place.checkpoint(), place.path("out.safetensors"));
    let pixels = vec![0.5f32; 3 * 32 * 32];
    let input = place.tensors("input.safetensors", &[("pixel_values", &[1, 3, 32, 32], &pixels)]);
    let good = fs::read(&input).unwrap();
    let changed = |place: usize, bytes: &[u8]| {
        let mut changed = good.clone();
        changed[place..place + bytes.len()].copy_from_slice(bytes);
        changed
    };
    for (what, bytes, word) in [
        ("empty", Vec::new(), "truncated"),
        ("cut header", good[..20].to_vec(), "truncated"),
        ("cut data", good[..good.len() - 5].to_vec(), "truncated"),
        ("huge header", changed(0, &u64::MAX.to_le_bytes()), "header claims 18446744073709551615 bytes"),
        ("not UTF-8", changed(12, &[0xff]), "UTF-8"),
    ] {
        fs::write(&input, bytes).unwrap();
        let ran = run("forward --from {} --input {} --output {}", &[&checkpoint, &input, &out]);
        assert_eq!(ran.status, 1, "{what}: {}", ran.err);
        let ran = ran.failed(1, &["input.safetensors", word]);
        assert!(!ran.err.contains("checkpoint "), "{what}: {}", ran.err);
        assert!(!out.exists(), "{what}");
    }
    let left = place.list(".");
    assert_eq!(left, ["checkpoint", "input.safetensors"]);
    fs::write(&input, &good).unwrap();
    run("forward --from {} --input {} --output {}", &[&checkpoint, &input, &out]).succeeded();
}

#[test]
fn config_and_weights_that_disagree_are_named() {
    let place = Place::new();
    let pictures = place.pictures(1);
    let checkpoint = place.checkpoint();
    let mut config = small_config();
    config.hidden_size = 64;
    fs::write(checkpoint.join("config.json"), config.to_json()).unwrap();
    let embed = || run("embed --from {} --data {} --out {}", &[&checkpoint, &pictures, &place.path("f.npy")]);
    embed().failed(1, &["vit.embeddings.cls_token", "64", "32"]);
    config = small_config();
    config.num_hidden_layers = 3;
    fs::write(checkpoint.join("config.json"), config.to_json()).unwrap();
    embed().failed(1, &["vit.encoder.layer.2"]);
    fs::write(checkpoint.join("config.json"), small_config().to_json().replace("\"gelu\"", "\"swoosh\"")).unwrap();
    embed().failed(1, &["swoosh", "gelu"]);
    fs::write(checkpoint.join("config.json"), "{").unwrap();
    embed().failed(1, &["config.json"]);
    fs::remove_file(checkpoint.join("config.json")).unwrap();
    embed().failed(1, &["config.json"]);
}

/// What a configuration says of weights that are not there is not shown as theirs.
#[test]
fn info_holds_the_configuration_against_the_tensors() {
    let place = Place::new();
    let checkpoint = place.checkpoint();
    run("info {}", &[&checkpoint]).succeeded();
    let other = place.path("other");
    fs::create_dir(&other).unwrap();
    fs::copy(checkpoint.join("model.safetensors"), other.join("model.safetensors")).unwrap();
    fs::write(other.join("config.json"), MaeConfig::tiny().to_json()).unwrap();
    run("info {}", &[&other]).failed(1, &["missing", "of another shape", "vit.embeddings.cls_token"]);
}

/// A terminal obeys what it is sent, and anybody can name a file.
#[cfg(unix)]
#[test]
fn names_with_control_characters_are_spelt_out() {
    let place = Place::new();
    let pictures = place.pictures(20);
    fs::write(pictures.join("bad\x1b[2Jname.png"), "no picture").unwrap();
    let ran =
        run("embed --from {} --data {} --out {}", &[&place.checkpoint(), &pictures, &place.path("f.npy")]).succeeded();
    assert!(ran.err.contains("bad\\u{1b}[2Jname.png") && !ran.err.contains('\x1b'), "{}", ran.err);
    let missing = place.path("\x1b[31mred");
    let ran = run("info {}", &[&missing]).failed(1, &["\\u{1b}[31mred"]);
    assert!(!ran.err.contains('\x1b'), "{}", ran.err);
}

#[test]
fn dropout_cannot_be_trained_with() {
    let place = Place::new();
    let pictures = place.pictures(1);
    let model = config_file(&place, |config| config.hidden_dropout_prob = 0.1);
    run(&format!("pretrain --data {{}} --out {{}} {TRAIN}"), &[&pictures, &place.path("run"), &model])
        .failed(1, &["dropout"]);
}

#[test]
fn an_encoder_alone_cannot_reconstruct() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases/encoder_only");
    let place = Place::new();
    let picture = place.pictures(1).join("picture 00.png");
    run("reconstruct --from {} {} --out {}", &[&folder, &picture, &place.path("x.png")])
        .failed(1, &["decoder", "embed"]);
    assert!(!place.path("x.png").exists());
    run("embed --from {} --data {} --out {}", &[&folder, &picture, &place.path("x.npy")]).succeeded();
}

#[test]
fn other_json_files_are_no_configurations() {
    let place = Place::new();
    let pictures = place.pictures(4);
    pretrain(&place, &pictures, "").succeeded();
    for file in ["recipe.json", "checkpoint-2/trainer_state.json", "checkpoint-2/preprocessor_config.json"] {
        run("info {}", &[&place.path("run").join(file)]).failed(1, &["not the configuration of a model", file]);
    }
}

/// A recipe is held to what flags are held to.
#[test]
fn recipes_with_impossible_numbers_are_refused() {
    let place = Place::new();
    let (pictures, again) = (place.pictures(4), place.path("again"));
    pretrain(&place, &pictures, "--device cpu").succeeded();
    let recipe = fs::read_to_string(place.path("run/recipe.json")).unwrap();
    let changed = place.path("changed.json");
    for (key, value, words) in [
        ("base_learning_rate", "-1.0", "base learning rate"),
        ("learning_rate", "0", "learning rate"),
        ("weight_decay", "-3", "weight decay"),
        ("clip_norm", "-3", "clip norm (--clip-grad) must be a number above 0, and is -3"),
        ("warmup_epochs", "-4", "warmup epochs (--warmup-epochs) must be a number of at least 0"),
        ("betas", "[2, 2]", "betas"),
        ("length", "{\"steps\": 0}", "at least one step"),
        ("checkpoint_every", "0", "at least 1"),
        ("batch_size", "0", "at least 1"),
        ("unheard_of", "1", "unheard_of"),
    ] {
        let mut edited: serde_json::Value = serde_json::from_str(&recipe).unwrap();
        edited[key] = serde_json::from_str(value).unwrap();
        fs::write(&changed, edited.to_string()).unwrap();
        run("pretrain --recipe {} --out {}", &[&changed, &again]).failed(1, &[words]);
        assert!(!again.exists(), "{key}");
    }
    let edited = recipe
        .replace("\"device\": \"the CPU", "\"device\": \"cuda:7 and not the CPU")
        .replace("\"0.1.0\"", "\"9.9.9\"")
        .replace("\"jpeg_decoder\": \"", "\"jpeg_decoder\": \"not ");
    fs::write(&changed, edited).unwrap();
    let ran = run("pretrain --device cpu --recipe {} --out {}", &[&changed, &again]).succeeded();
    assert!(
        ran.err.contains("cuda:7 and not") && ran.err.contains("version 9.9.9") && ran.err.contains("unpacked by not "),
        "{}",
        ran.err
    );
}

#[test]
fn pictures_of_any_size_need_one_for_a_batch() {
    let place = Place::new();
    let (checkpoint, pictures, out) = (place.checkpoint(), place.pictures(2), place.path("f.npy"));
    fs::write(checkpoint.join("preprocessor_config.json"), "{\"do_resize\": false}").unwrap();
    run("embed --from {} --data {} --out {}", &[&checkpoint, &pictures, &out]).failed(1, &["--image-size"]);
    run("embed --from {} --data {} --out {} --image-size 32", &[&checkpoint, &pictures, &out]).succeeded();
}
