use criterion::Criterion;
use vitmae::cpu::Cpu;
use vitmae::ops::{AdamW, AdamWSettings, AdamWState, Cost, Memory};

use crate::{measure, random};

pub fn benches(criterion: &mut Criterion) {
    let cpu = Cpu::<f32>::new();
    // As many as ViT-B/16 with its decoder has; in test mode, a few.
    let testing = !std::env::args().any(|argument| argument == "--bench");
    let length = if testing { 1 << 16 } else { 111_907_840 };
    let settings = AdamWSettings {
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.05,
        clip_norm: None,
        length,
        decayed: length,
    };
    let (mut master, mut first, gradient) = (random(length), random(length), random(length));
    let (mut working, mut second) = (random(1), random(length));
    second.iter_mut().for_each(|moment| *moment = moment.abs());
    let mut state = cpu.buffer::<AdamWState>(1).expect("there is enough memory");
    let mut learning_rate = cpu.buffer(1).expect("there is enough memory");
    learning_rate.fill(1.5e-4);
    let mut norm = random(1);
    measure(criterion, "adamw", "step", "vit_b", settings.cost(4), || {
        cpu.adamw_step(
            settings,
            &mut state,
            &mut master,
            &mut working,
            &mut first,
            &mut second,
            &gradient,
            &norm,
            None,
            &learning_rate,
        )
    });
    let cost = Cost { bytes: 4 * length as u64, flops: 2 * length as u64 };
    measure(criterion, "adamw", "gradient_norm", "vit_b", cost, || cpu.gradient_norm(length, &mut norm, &gradient));
}
