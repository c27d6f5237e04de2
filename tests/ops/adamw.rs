use vitmae::cpu::{Cpu, CpuBuffer, Float};
use vitmae::ops::{AdamW, AdamWSettings, AdamWState, Memory};

use crate::support::{buffer, close, plain, random, read, same_on_any_threads, tolerance};

const LEARNING_RATE: f64 = 1.5e-2;

fn settings(length: usize, decayed: usize) -> AdamWSettings {
    AdamWSettings { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.05, clip_norm: None, length, decayed }
}

/// Parameters and what an update keeps besides them.
struct Arenas<F: Float> {
    state: CpuBuffer<AdamWState>,
    master: CpuBuffer<F>,
    first: CpuBuffer<F>,
    second: CpuBuffer<F>,
}

impl<F: Float> Arenas<F> {
    fn new(start: &[f64]) -> Self {
        let zeros = vec![0.0; start.len()];
        let state = plain(&[AdamWState::default()], AdamWState::default());
        Self { state, master: buffer(start), first: buffer(&zeros), second: buffer(&zeros) }
    }

    fn update(
        &mut self,
        settings: AdamWSettings,
        gradient: &[f64],
        norm: f64,
        loss: Option<f64>,
        learning_rate: f64,
    ) -> vitmae::Result<AdamWState> {
        let cpu = Cpu::<F>::new();
        // SAFETY: the op does not use the alias.
        let mut working = unsafe { cpu.working_copy(&self.master, settings.decayed).unwrap() };
        let (gradient, norm, loss) = (buffer(gradient), buffer(&[norm]), loss.map(|loss| buffer(&[loss])));
        let Self { state, master, first, second } = self;
        let rate = plain(&[learning_rate], 0.0);
        let loss = loss.as_ref();
        cpu.adamw_step(settings, state, master, &mut working, first, second, &gradient, &norm, loss, &rate)?;
        Ok(state[0])
    }

    fn read(&self) -> [Vec<f64>; 3] {
        [read(&self.master), read(&self.first), read(&self.second)]
    }
}

/// `torch.optim.AdamW`, parameter by parameter, with gradients that are multiplied by `scale`.
#[expect(clippy::too_many_arguments, reason = "a row of everything")]
fn naive(s: &AdamWSettings, step: i32, rate: f64, scale: f64, p: &mut [f64], m: &mut [f64], v: &mut [f64], g: &[f64]) {
    for i in 0..s.length {
        let g = g[i] * scale;
        if i < s.decayed {
            p[i] -= rate * s.weight_decay * p[i];
        }
        m[i] = s.beta1 * m[i] + (1.0 - s.beta1) * g;
        v[i] = s.beta2 * v[i] + (1.0 - s.beta2) * g * g;
        let m_hat = m[i] / (1.0 - s.beta1.powi(step));
        let v_hat = v[i] / (1.0 - s.beta2.powi(step));
        p[i] -= rate * m_hat / (v_hat.sqrt() + s.epsilon);
    }
}

fn check<F: Float>(length: usize, decayed: usize) {
    let start = random(1, length);
    let steps = 5;
    // The gradients' norm is 4 and may be 3; the learning rate falls.
    let settings = AdamWSettings { clip_norm: Some(3.0), ..settings(length, decayed) };
    let rate = |step: u64| LEARNING_RATE / step as f64;
    let all = same_on_any_threads(|| {
        let mut arenas = Arenas::<F>::new(&start);
        for step in 1..=steps {
            let state = arenas.update(settings, &random(1 + step, length), 4.0, Some(0.5), rate(step)).unwrap();
            assert_eq!(state, AdamWState { updates: step, gradient_norm: 4.0, loss: 0.5, ..AdamWState::default() });
        }
        arenas.read()
    });
    let (mut p, mut m, mut v) = (start, vec![0.0; length], vec![0.0; length]);
    for step in 1..=steps {
        naive(&settings, step as i32, rate(step), 0.75, &mut p, &mut m, &mut v, &random(1 + step, length));
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

#[test]
fn gradients_are_scaled_down_and_never_up() {
    let gradient = random(3, 100);
    let run = |clip_norm, norm, gradient: &[f64]| {
        let mut arenas = Arenas::<f64>::new(&random(4, 100));
        let settings = AdamWSettings { clip_norm, ..settings(100, 50) };
        arenas.update(settings, gradient, norm, None, LEARNING_RATE).unwrap();
        arenas.read()
    };
    let plain = run(None, 8.0, &gradient);
    assert_eq!(run(Some(8.0), 8.0, &gradient), plain);
    assert_eq!(run(Some(9.0), 8.0, &gradient), plain);
    assert_eq!(run(Some(9.0), 0.0, &gradient), plain);
    let half: Vec<f64> = gradient.iter().map(|g| 0.5 * g).collect();
    assert_eq!(run(Some(4.0), 8.0, &gradient), run(None, 4.0, &half));
    assert_ne!(run(Some(4.0), 8.0, &gradient)[1], plain[1]);
}

#[test]
fn a_step_that_is_not_finite_is_skipped_and_counted() {
    let (length, decayed) = (300, 100);
    let settings = settings(length, decayed);
    let gradients = [random(5, length), random(6, length)];
    let mut undisturbed = Arenas::<f32>::new(&random(7, length));
    let mut arenas = Arenas::<f32>::new(&random(7, length));
    let nan = vec![f64::NAN; length];
    let bad = [(f64::NAN, Some(1.0)), (f64::INFINITY, None), (2.0, Some(f64::NAN)), (2.0, Some(f64::NEG_INFINITY))];
    for (step, gradient) in (1..).zip(&gradients) {
        undisturbed.update(settings, gradient, 2.0, Some(1.0), LEARNING_RATE).unwrap();
        for (in_a_row, (norm, loss)) in (1..).zip(bad) {
            let before = arenas.read();
            let state = arenas.update(settings, &nan, norm, loss, LEARNING_RATE).unwrap();
            assert!(arenas.read() == before, "norm {norm}, loss {loss:?}");
            assert_eq!(state.updates, step - 1);
            assert_eq!((state.skipped, state.skipped_in_a_row), (4 * (step - 1) + in_a_row, in_a_row));
            let same = |a: f64, b: f64| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            assert!(same(state.gradient_norm, norm) && same(state.loss, loss.unwrap_or(0.0)), "{state:?}");
        }
        let state = arenas.update(settings, gradient, 2.0, Some(1.0), LEARNING_RATE).unwrap();
        assert_eq!((state.updates, state.skipped, state.skipped_in_a_row), (step, 4 * step, 0));
    }
    assert!(arenas.read() == undisturbed.read());
}

/// Made with torch 2.x: `torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)` in f64, two steps.
#[test]
fn adamw_agrees_with_pytorch() {
    let mut arenas = Arenas::<f64>::new(&[1.0, -2.0, 0.5]);
    for gradient in [[0.1, -0.2, 3.0], [0.5, 0.4, -1.0]] {
        arenas.update(settings(3, 3), &gradient, 1.0, None, 0.1).unwrap();
    }
    close("parameters", &arenas.read()[0], &PYTORCH, 1e-14);
}

const PYTORCH: [f64; 3] = [0.80540198990663, -1.9168873988823822, 0.35508183033034457];

#[test]
fn gradient_norm_agrees_with_loops_and_shows_what_is_not_finite() {
    for length in [0, 1, 31, 16_384, 40_001] {
        let mut gradient = random(9, length);
        let expected = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        fn norm<F: Float>(gradient: &[f64]) -> f64 {
            let gradient_buffer = buffer::<F>(gradient);
            let bits = same_on_any_threads(|| {
                let mut norm = buffer::<F>(&[-1.0]);
                Cpu::new().gradient_norm(gradient.len(), &mut norm, &gradient_buffer).unwrap();
                norm[0].to_f64().to_bits()
            });
            f64::from_bits(bits)
        }
        close("norm", &[norm::<f64>(&gradient)], &[expected], 1e-12);
        close("norm", &[norm::<f32>(&gradient)], &[expected], 1e-7);
        if length > 0 {
            gradient[length / 2] = f64::INFINITY;
            assert_eq!(norm::<f32>(&gradient), f64::INFINITY);
            gradient[length / 2] = f64::NAN;
            assert!(norm::<f32>(&gradient).is_nan());
            gradient[length / 2] = 1e30;
            assert!(norm::<f32>(&gradient).is_finite());
        }
    }
}

#[test]
fn weights_average_agrees_with_its_definition() {
    fn check<F: Float>(length: usize, decay: f64) {
        let (start, masters) = (random(10, length), [random(11, length), random(12, length)]);
        let found = same_on_any_threads(|| {
            let mut average = buffer::<F>(&start);
            for master in &masters {
                Cpu::<F>::new().weights_average(length, decay, &mut average, &buffer(master)).unwrap();
            }
            read(&average)
        });
        let weights = [decay * decay, decay * (1.0 - decay), 1.0 - decay];
        let expected: Vec<f64> = (0..length)
            .map(|i| weights[0] * start[i] + weights[1] * masters[0][i] + weights[2] * masters[1][i])
            .collect();
        close("average", &found, &expected, tolerance::<F>(2));
    }
    for (length, decay) in [(1, 0.5), (37, 0.9999), (40_001, 0.9), (100, 0.0)] {
        check::<f32>(length, decay);
        check::<f64>(length, decay);
    }
    // From nothing, without memory: the weights themselves, bitwise.
    let (master, mut average) = (buffer::<f32>(&random(13, 100)), buffer::<f32>(&[0.0; 100]));
    Cpu::new().weights_average(100, 0.0, &mut average, &master).unwrap();
    assert_eq!(read(&average), read(&master));
    assert!(Cpu::new().weights_average(1001, 0.0, &mut average, &master).is_err());
}

#[test]
fn adamw_refuses_short_buffers() {
    let run = |parameters: usize, gradients: usize| {
        let mut arenas = Arenas::<f32>::new(&vec![1.0; parameters]);
        arenas.update(settings(100, 1), &vec![1.0; gradients], 1.0, None, LEARNING_RATE)
    };
    assert!(run(100, 100).is_ok());
    assert!(run(10, 100).is_err());
    assert!(run(100, 10).is_err());
    let (long, mut norm) = (buffer::<f32>(&[1.0; 100]), buffer::<f32>(&[1.0]));
    assert!(Cpu::new().gradient_norm(1000, &mut norm, &long).is_err());
}
