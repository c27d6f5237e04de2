use vitmae::cpu::{Cpu, Float};
use vitmae::ops::{AdamW, AdamWSettings, Memory};

use crate::support::{buffer, close, random, read, same_on_any_threads, tolerance};

fn settings(length: usize, decayed: usize) -> AdamWSettings {
    AdamWSettings {
        learning_rate: 1.5e-2,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.05,
        step: 1,
        gradient_scale: 1.0,
        length,
        decayed,
    }
}

/// `torch.optim.AdamW`, parameter by parameter.
fn naive(settings: &AdamWSettings, p: &mut [f64], m: &mut [f64], v: &mut [f64], g: &[f64]) {
    let s = settings;
    for i in 0..s.length {
        let g = g[i] * s.gradient_scale;
        if i < s.decayed {
            p[i] -= s.learning_rate * s.weight_decay * p[i];
        }
        m[i] = s.beta1 * m[i] + (1.0 - s.beta1) * g;
        v[i] = s.beta2 * v[i] + (1.0 - s.beta2) * g * g;
        let m_hat = m[i] / (1.0 - s.beta1.powi(s.step as i32));
        let v_hat = v[i] / (1.0 - s.beta2.powi(s.step as i32));
        p[i] -= s.learning_rate * m_hat / (v_hat.sqrt() + s.epsilon);
    }
}

fn check<F: Float>(length: usize, decayed: usize) {
    let start = random(1, length);
    let steps = 5;
    let all = same_on_any_threads(|| {
        let cpu = Cpu::<F>::new();
        let mut master = buffer::<F>(&start);
        // SAFETY: the op does not use the alias.
        let mut working = unsafe { cpu.working_copy(&master, decayed).unwrap() };
        let (mut first, mut second) = (buffer(&vec![0.0; length]), buffer(&vec![0.0; length]));
        for step in 1..=steps {
            let settings = AdamWSettings { step, gradient_scale: 0.75, ..settings(length, decayed) };
            let gradient = buffer(&random(1 + step, length));
            cpu.adamw_step(settings, &mut master, &mut working, &mut first, &mut second, &gradient).unwrap();
        }
        [read(&master), read(&first), read(&second)]
    });
    let (mut p, mut m, mut v) = (start, vec![0.0; length], vec![0.0; length]);
    for step in 1..=steps {
        let settings = AdamWSettings { step, gradient_scale: 0.75, ..settings(length, decayed) };
        naive(&settings, &mut p, &mut m, &mut v, &random(1 + step, length));
    }
    close("parameters", &all[0], &p, tolerance::<F>(4));
    close("first moment", &all[1], &m, tolerance::<F>(4));
    close("second moment", &all[2], &v, tolerance::<F>(4));
}

#[test]
fn adamw_agrees_with_its_definition() {
    for (length, decayed) in [(1, 0), (1, 1), (37, 20), (16_384, 16_384), (50_001, 17_003), (20_000, 0)] {
        check::<f32>(length, decayed);
        check::<f64>(length, decayed);
    }
}

/// Made with torch 2.x: `torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)` in f64, two steps.
#[test]
fn adamw_agrees_with_pytorch() {
    let cpu = Cpu::<f64>::new();
    let mut master = buffer(&[1.0, -2.0, 0.5]);
    // SAFETY: the op does not use the alias.
    let mut working = unsafe { cpu.working_copy(&master, 3).unwrap() };
    let (mut first, mut second) = (buffer(&[0.0; 3]), buffer(&[0.0; 3]));
    for (step, gradient) in [(1, [0.1, -0.2, 3.0]), (2, [0.5, 0.4, -1.0])] {
        let settings = AdamWSettings { learning_rate: 0.1, step, ..settings(3, 3) };
        cpu.adamw_step(settings, &mut master, &mut working, &mut first, &mut second, &buffer(&gradient)).unwrap();
    }
    close("parameters", &read(&master), &PYTORCH, 1e-14);
}

const PYTORCH: [f64; 3] = [0.80540198990663, -1.9168873988823822, 0.35508183033034457];

#[test]
fn gradient_norm_agrees_with_loops_and_shows_what_is_not_finite() {
    for length in [0, 1, 31, 16_384, 40_001] {
        let mut gradient = random(9, length);
        let expected = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        let norm = |gradient: &[f64]| {
            let gradient = buffer::<f32>(gradient);
            same_on_any_threads(|| Cpu::new().gradient_norm(length, &gradient).unwrap().to_bits())
        };
        close("norm", &[f64::from_bits(norm(&gradient))], &[expected], 1e-12);
        if length > 0 {
            gradient[length / 2] = f64::INFINITY;
            assert_eq!(f64::from_bits(norm(&gradient)), f64::INFINITY);
            gradient[length / 2] = f64::NAN;
            assert!(f64::from_bits(norm(&gradient)).is_nan());
            gradient[length / 2] = 1e30;
            assert!(f64::from_bits(norm(&gradient)).is_finite());
        }
    }
}

#[test]
fn adamw_refuses_short_buffers() {
    let cpu = Cpu::<f32>::new();
    let (short, long) = (|| buffer::<f32>(&[1.0]), || buffer::<f32>(&[1.0; 100]));
    let run = |mut master: vitmae::cpu::CpuBuffer<f32>, gradient| {
        let mut working = long();
        cpu.adamw_step(settings(100, 50), &mut master, &mut working, &mut long(), &mut long(), &gradient)
    };
    assert!(run(long(), long()).is_ok());
    assert!(run(short(), long()).is_err());
    assert!(run(long(), short()).is_err());
    assert!(cpu.gradient_norm(1000, &long()).is_err());
}
