//! Computing activations again in backward gives the same bits for less memory.

use vitmae::config::MaeConfig;
use vitmae::cpu::Cpu;
use vitmae::model::{ImageValues, Images, MaeForPreTraining, Masking, MemoryUse, Purpose, WorkspaceShape};
use vitmae::ops::MaskingShape;
use vitmae::train::{OptimizerSettings, Trainer};

fn config() -> MaeConfig {
    let mut config = MaeConfig::tiny();
    config.image_size = (24, 32).into();
    config.patch_size = (8, 8).into();
    config.hidden_size = 32;
    config.intermediate_size = 48;
    config.num_hidden_layers = 3;
    config.num_attention_heads = 4;
    config.decoder_hidden_size = 16;
    config.decoder_intermediate_size = 40;
    config.decoder_num_hidden_layers = 2;
    config.decoder_num_attention_heads = 2;
    config
}

#[test]
fn recomputed_activations_give_bitwise_the_same_training() {
    let config = config();
    let image = config.image();
    let pixels: Vec<u8> = (0..5 * image.length()).map(|i| (i * 73 % 251) as u8).collect();
    let images = Images {
        batch: 5,
        channels: image.channels,
        height: image.height,
        width: image.width,
        values: ImageValues::Bytes { values: &pixels, mean: &[0.5; 3], deviation: &[0.25; 3] },
    };
    let train = |recompute: bool| {
        let model = MaeForPreTraining::new(config.clone(), Cpu::<f32>::new(), 3).unwrap();
        let mut trainer = Trainer::new(model, OptimizerSettings::default(), 2).unwrap();
        trainer.set_recompute(recompute);
        let reports: Vec<_> =
            (0..3).map(|step| trainer.step(&images, &Masking::random(0.6, step), 1e-3).unwrap()).collect();
        let model = trainer.into_model();
        let names: Vec<String> = model.parameters().layout().specs().iter().map(|spec| spec.name.clone()).collect();
        let weights: Vec<Vec<f32>> = names.iter().map(|name| model.parameter(name).unwrap()).collect();
        (reports, weights)
    };
    let (kept, again) = (train(false), train(true));
    assert!(kept.0.iter().all(|report| report.updated && report.gradient_norm > 0.0));
    assert_eq!(kept, again);
}

#[test]
fn recomputing_takes_less_memory() {
    for config in [config(), MaeConfig::base()] {
        let image = config.image();
        let keep = MaskingShape::new(1, image.patches(), config.mask_ratio).unwrap().keep;
        let activations = |recompute: bool| {
            let purpose = Purpose::Train;
            let shape = WorkspaceShape { batch: 8, image, keep, purpose, interpolation: None, recompute };
            MemoryUse::of(&config, &shape).unwrap().activations as f64
        };
        let share = activations(true) / activations(false);
        assert!(share < 0.8, "{share}");
    }
}
