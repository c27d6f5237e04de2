//! Writing checkpoints: what is in them, and that nothing is lost when writing fails.

use std::fs;
use std::path::Path;

use vitmae::Error;
use vitmae::config::MaeConfig;
use vitmae::weights::{Checkpoint, Parts, Tensor, TensorFile, Values, parameters, save_pretrained, write_tensors};

use crate::{checkpoint, names_in, numbers, refused, save, small_config, split, weights};

#[test]
fn files_are_as_transformers_writes_them() {
    let folder = tempfile::tempdir().unwrap();
    let deep = folder.path().join("a/b");
    let specs = save(&deep, &small_config(), Parts::All);
    assert_eq!(names_in(&deep), ["config.json", "model.safetensors"]);
    let bytes = fs::read(deep.join("model.safetensors")).unwrap();
    let (length, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(length % 8, 0);
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), specs.len());
    for (index, spec) in specs.iter().enumerate() {
        let tensor = file.tensor(&spec.name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (safetensors::Dtype::F32, spec.shape.as_slice()));
        let expected: Vec<u8> = numbers(index, spec).iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(tensor.data(), expected);
    }
}

#[test]
fn the_configuration_says_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = small_config();
    config.other.insert("torch_dtype".into(), "bfloat16".into());
    config.other.insert("transformers_version".into(), "4.57.6".into());
    for (parts, architecture) in [(Parts::All, "ViTMAEForPreTraining"), (Parts::EncoderOnly, "ViTMAEModel")] {
        save(folder.path(), &config, parts);
        let written = MaeConfig::from_file(folder.path().join("config.json")).unwrap();
        assert_eq!(written.other["architectures"], serde_json::json!([architecture]));
        assert_eq!(written.other["torch_dtype"], "float32");
        assert_eq!(written.other["transformers_version"], "4.57.6");
    }
}

/// Every file of a folder with its bytes.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    names_in(folder).into_iter().map(|name| (name.clone(), fs::read(folder.join(&name)).unwrap())).collect()
}

#[test]
fn a_save_that_fails_leaves_the_checkpoint_before() {
    let folder = checkpoint(Parts::All);
    let before = contents(folder.path());
    let specs = parameters(&small_config(), Parts::All);
    for fails in [0, 5, specs.len() - 1] {
        let result = save_pretrained(folder.path(), &small_config(), &specs, |index| {
            if index == fails { Err(Error::Device("gone".into())) } else { Ok(vec![0.0; specs[index].length()]) }
        });
        assert!(matches!(result, Err(Error::Device(_))), "{result:?}");
        assert_eq!(contents(folder.path()), before);
    }
    let result = save_pretrained(folder.path(), &small_config(), &specs, |index| Ok(vec![0.0; 3 + index]));
    let message = result.unwrap_err().to_string();
    assert!(message.contains("projection.weight") && message.contains("[8, 3, 4, 4]"), "{message}");
    assert_eq!(contents(folder.path()), before);
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let specs = parameters(&small_config(), Parts::All);
    let save_into =
        |folder: &Path| save_pretrained(folder, &small_config(), &specs, |index| Ok(numbers(index, &specs[index])));
    let folder = checkpoint(Parts::All);
    // A file where a folder should be, and a file system that nobody writes to.
    refused(save_into(&weights(&folder)), &["creating", "model.safetensors"]);
    refused(save_into(&weights(&folder).join("deeper")), &["creating", "deeper"]);
    #[cfg(target_os = "linux")]
    {
        refused(save_into(Path::new("/proc/vitmae")), &["creating", "/proc/vitmae"]);
        refused(save_into(Path::new("/proc")), &["writing", "/proc/model.safetensors"]);
    }
    // A folder in the weights' place cannot be replaced, and the temporary file does not stay.
    fs::remove_file(weights(&folder)).unwrap();
    fs::create_dir(weights(&folder)).unwrap();
    refused(save_into(folder.path()), &["writing", "model.safetensors"]);
    assert_eq!(names_in(folder.path()), ["config.json", "model.safetensors"]);
}

/// Permissions do not bind root, as whom containers often run tests.
#[cfg(unix)]
#[test]
fn a_read_only_folder_keeps_its_checkpoint() {
    use std::os::unix::fs::PermissionsExt;
    let folder = checkpoint(Parts::All);
    let before = contents(folder.path());
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o555)).unwrap();
    let bound = fs::File::create_new(folder.path().join("probe")).is_err();
    if bound {
        let specs = parameters(&small_config(), Parts::All);
        let result = save_pretrained(folder.path(), &small_config(), &specs, |index| Ok(numbers(index, &specs[index])));
        refused(result, &["writing", "model.safetensors"]);
        assert_eq!(contents(folder.path()), before);
    } else {
        eprintln!("skipped: this user may write into a read-only folder");
    }
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn tensors_of_every_type_survive_being_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let tensors = [
        ("bytes", Tensor::new([3], Values::U8(vec![0, 127, 255])).unwrap()),
        ("größe", Tensor::new([2, 2], Values::F32(vec![1.5, -0.0, f32::MIN_POSITIVE, f32::INFINITY])).unwrap()),
        ("wide", Tensor::new([1], Values::F64(vec![std::f64::consts::PI])).unwrap()),
        ("ids", Tensor::new([2], Values::I64(vec![i64::MIN, i64::MAX])).unwrap()),
        ("scalar", Tensor::new([], Values::I64(vec![7])).unwrap()),
        ("empty", Tensor::new([0, 4], Values::F32(vec![])).unwrap()),
    ];
    let named: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    write_tensors(&path, &named).unwrap();
    let mut file = TensorFile::open(&path).unwrap();
    assert_eq!(file.names().count(), tensors.len());
    for (name, tensor) in &tensors {
        assert_eq!(file.read(name).unwrap(), *tensor, "{name}");
        assert_eq!(file.shape(name), Some(tensor.shape.as_slice()));
    }
    assert_eq!(file.read_as_f32("wide").unwrap(), [std::f32::consts::PI]);
    refused(file.read("other"), &["no tensor other", "bytes, empty, größe, ids, scalar, wide"]);
    refused(file.read_as_f32("ids"), &["ids", "I64", "F32, F16, BF16 and F64"]);
    // Every tensor starts at a multiple of its element's size, and other readers agree.
    let (header, _) = split(&path);
    assert_eq!(header.len() % 8, 0);
    let bytes = fs::read(&path).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.tensor("ids").unwrap().data(), [i64::MIN.to_le_bytes(), i64::MAX.to_le_bytes()].concat());
    for name in read.names() {
        let tensor = read.tensor(name).unwrap();
        let offset = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(offset % (tensor.dtype().bitsize() / 8), 0, "{name}");
    }
    refused(write_tensors(&path, &[named[0], named[0]]), &["bytes", "twice"]);
    refused(write_tensors(&path, &[("__metadata__", named[0].1)]), &["reserved"]);
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert!(Tensor::new([2, usize::MAX], Values::U8(vec![1, 2])).is_err());
    assert!(Tensor::new([2], Values::U8(vec![1])).is_err());
}

#[test]
fn a_checkpoint_is_read_while_it_is_replaced() {
    let folder = checkpoint(Parts::All);
    let specs = parameters(&small_config(), Parts::All);
    let mut old = Checkpoint::open(folder.path()).unwrap();
    save_pretrained(folder.path(), &small_config(), &specs, |index| Ok(vec![-1.0; specs[index].length()])).unwrap();
    old.read_into(&specs, |index, values| {
        assert_eq!(values, numbers(index, &specs[index]));
        Ok(())
    })
    .unwrap();
}
