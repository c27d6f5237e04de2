//! AdamW and the norm of gradients against the CPU in f64.

use half::bf16;
use vitmae::cpu::Cpu;
use vitmae::ops::{AdamW, AdamWSettings, AdamWState, Memory, Real};

use super::emulated::adamw::{ADAMW_FACTORS, AdamWArenas, AdamWInput, adamw_step, gradient_norm};
use super::emulated::adamw::{gradient_norm_partials, masters_to_bf16, weights_average};
use super::emulated::{Cuda, CudaElement, CudaError, SEEDS, device};
use super::reference::{Bench, close_masters, random};

fn settings(length: usize, decayed: usize) -> AdamWSettings {
    let clip_norm = Some(3.0);
    AdamWSettings { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.05, clip_norm, length, decayed }
}

/// What a step is made with besides gradients.
#[derive(Clone, Copy)]
struct Step {
    norm: f64,
    loss: Option<f64>,
    learning_rate: f64,
}

/// Arenas after some steps.
#[derive(Debug, PartialEq)]
struct Arenas {
    state: AdamWState,
    master: Vec<f64>,
    working: Vec<f64>,
    first: Vec<f64>,
    second: Vec<f64>,
}

fn run<B: AdamW>(bench: &Bench<'_, B>, settings: AdamWSettings, steps: &[Step]) -> Arenas {
    let AdamWSettings { length, decayed, .. } = settings;
    let mut state = bench.plain(&[AdamWState::default()]);
    let mut master = bench.masters(&random(1, length));
    let mut working = bench.elements(&vec![0.0; decayed]);
    let [mut first, mut second] = [(); 2].map(|()| bench.masters(&vec![0.0; length]));
    for (seed, step) in (2..).zip(steps) {
        let finite = step.norm.is_finite() && step.loss.is_none_or(f64::is_finite);
        let gradient = if finite { random(seed, length) } else { vec![f64::NAN; length] };
        let (gradient, norm) = (bench.masters(&gradient), bench.masters(&[step.norm]));
        let (loss, rate) = (step.loss.map(|loss| bench.masters(&[loss])), bench.plain(&[step.learning_rate]));
        let (state, working) = (&mut state, &mut working);
        bench
            .backend
            .adamw_step(
                settings,
                state,
                &mut master,
                working,
                &mut first,
                &mut second,
                &gradient,
                &norm,
                loss.as_ref(),
                &rate,
            )
            .expect("no fault");
    }
    let mut counters = [AdamWState::default()];
    bench.backend.download(&mut counters, &state).expect("downloaded");
    Arenas {
        state: counters[0],
        master: bench.read_masters(&master),
        working: bench.read(&working),
        first: bench.read_masters(&first),
        second: bench.read_masters(&second),
    }
}

/// Steps with and without clipping, with falling learning rates.
fn steps() -> Vec<Step> {
    let step = |(index, norm)| Step { norm, loss: Some(0.5), learning_rate: 1.5e-2 / f64::from(index) };
    (1..).zip([4.0, 2.0, 6.0]).map(step).collect()
}

fn check<E: CudaElement>(device: &Cuda<E>, length: usize, decayed: usize, shift: usize) {
    let settings = settings(length, decayed);
    let found = run(&Bench { backend: device, shift }, settings, &steps());
    let expected = run(&Bench { backend: &Cpu::<f64>::new(), shift: 0 }, settings, &steps());
    assert_eq!(found.state, expected.state);
    let what = |arena| format!("{arena} of {length}, {decayed} decayed, shift {shift}");
    close_masters(&what("parameters"), &found.master, &expected.master);
    close_masters(&what("first moment"), &found.first, &expected.first);
    close_masters(&what("second moment"), &found.second, &expected.second);
    // The working copy is exactly the rounded masters; where it is the masters themselves, nothing is written.
    let rounded = |&value: &f64| if E::is_master() { 0.0 } else { E::from_f64(value).to_f64() };
    assert_eq!(found.working, found.master[..decayed].iter().map(rounded).collect::<Vec<_>>(), "{}", what("copy"));
}

#[test]
fn adamw_agrees_with_the_cpu() {
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let (single, half) = (Cuda::<f32>::new(device.stream()), Cuda::<bf16>::new(device.stream()));
        // Less than a vector, whole blocks, a block and a bit, boundaries inside a vector.
        for (length, decayed) in [(1, 0), (3, 3), (2048, 2048), (2048, 1022), (4100, 2049), (5003, 4095)] {
            for shift in [0, 1, 4] {
                check(&single, length, decayed, shift);
                check(&half, length, decayed, shift);
            }
        }
    }
}

#[test]
fn bias_corrections_follow_the_count() {
    // A run that goes on at a high count, as after a resume: the first 40 bits are used.
    let Some(device) = device(0) else { return };
    let device = Cuda::<f32>::new(device.stream());
    fn after<B: AdamW>(bench: &Bench<'_, B>, updates: u64) -> Vec<f64> {
        let mut state = bench.plain(&[AdamWState { updates, ..AdamWState::default() }]);
        let mut master = bench.masters(&random(1, 10));
        let mut working = bench.elements(&[0.0; 10]);
        let (mut first, mut second) = (bench.masters(&random(2, 10)), bench.masters(&[0.5; 10]));
        let (gradient, norm) = (bench.masters(&random(3, 10)), bench.masters(&[1.0]));
        let (settings, rate) = (AdamWSettings { beta2: 0.999, ..settings(10, 4) }, bench.plain(&[1e-2]));
        bench
            .backend
            .adamw_step(
                settings,
                &mut state,
                &mut master,
                &mut working,
                &mut first,
                &mut second,
                &gradient,
                &norm,
                None,
                &rate,
            )
            .expect("no fault");
        bench.read_masters(&master)
    }
    for updates in [0, 1, 2, 6, 99, 4095, 1 << 40] {
        let found = after(&Bench { backend: &device, shift: 0 }, updates);
        let expected = after(&Bench { backend: &Cpu::<f64>::new(), shift: 0 }, updates);
        close_masters(&format!("after {updates}"), &found, &expected);
    }
}

#[test]
fn a_step_that_is_not_finite_is_skipped_on_the_device() {
    let good = Step { norm: 4.0, loss: Some(0.5), learning_rate: 1e-2 };
    let bad = [(f64::NAN, Some(1.0)), (f64::INFINITY, None), (2.0, Some(f64::NAN)), (2.0, Some(f64::NEG_INFINITY))];
    let bad: Vec<Step> = bad.map(|(norm, loss)| Step { norm, loss, ..good }).to_vec();
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let device = Cuda::<bf16>::new(device.stream());
        let bench = Bench { backend: &device, shift: 0 };
        let settings = settings(3000, 1001);
        let undisturbed = run(&bench, settings, &[good]);
        let mut disturbed = run(&bench, settings, &[&[good][..], &bad].concat());
        let AdamWState { updates, skipped, skipped_in_a_row, gradient_norm, loss } = disturbed.state;
        assert_eq!((updates, skipped, skipped_in_a_row), (1, 4, 4));
        assert_eq!((gradient_norm, loss), (2.0, f64::NEG_INFINITY));
        disturbed.state = undisturbed.state;
        assert_eq!(disturbed, undisturbed);
        let state = run(&bench, settings, &[&bad[..], &[good]].concat()).state;
        assert_eq!(state, AdamWState { skipped: 4, ..undisturbed.state });
    }
}

fn norm<B: AdamW>(bench: &Bench<'_, B>, gradient: &[f64]) -> f64 {
    let (gradient_buffer, mut norm) = (bench.masters(gradient), bench.masters(&[f64::NAN]));
    bench.backend.gradient_norm(gradient.len(), &mut norm, &gradient_buffer).expect("no fault");
    let mut value = [B::Master::default()];
    bench.backend.download(&mut value, &norm).expect("downloaded");
    value[0].to_f64()
}

#[test]
fn gradient_norm_is_that_of_f64() {
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let device = Cuda::<bf16>::new(device.stream());
        // Nothing, parts of a vector, part of the unrolled loop, several blocks and a bit.
        for length in [0, 1, 3, 1023, 4099, 8192, 30_001] {
            for shift in [0, 1, 4] {
                let bench = Bench { backend: &device, shift };
                let mut gradient = random(seed, length);
                let expected = norm(&Bench { backend: &Cpu::<f64>::new(), shift: 0 }, &gradient);
                // Summed in f64 and rounded once.
                assert_eq!(norm(&bench, &gradient), f64::from(expected as f32), "{length}, shift {shift}");
                if length == 0 {
                    continue;
                }
                let place = length * 2 / 3;
                gradient[place] = 1e30;
                assert!((norm(&bench, &gradient) / 1e30 - 1.0).abs() < 1e-6);
                gradient[place] = f64::NEG_INFINITY;
                assert_eq!(norm(&bench, &gradient), f64::INFINITY);
                gradient[place] = f64::NAN;
                assert!(norm(&bench, &gradient).is_nan());
            }
        }
    }
}

#[test]
fn refresh_rounds_the_first_masters() {
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let device = Cuda::<bf16>::new(device.stream());
        for length in [1, 2047, 2048, 2050, 5003] {
            for shift in [0, 1, 8] {
                let bench = Bench { backend: &device, shift };
                let masters: Vec<f64> = random(3, length + 5).into_iter().map(|value| value / 3.0).collect();
                let (master, whole) = (bench.masters(&masters), bench.poisoned(length));
                // SAFETY: `whole` is read only after the copy was written.
                let mut working = unsafe { device.alias(&whole, 0, length) }.expect("inside");
                device.refresh(&mut working, &master).expect("no fault");
                let expected: Vec<f64> =
                    masters[..length].iter().map(|&value| bf16::from_f32(value as f32).to_f64()).collect();
                assert_eq!(bench.read(&whole), expected, "{length}, shift {shift}");
            }
        }
    }
}

#[test]
fn weights_average_agrees_with_the_cpu() {
    fn average<B: AdamW>(bench: &Bench<'_, B>, seed: u64, length: usize, decay: f64) -> Vec<f64> {
        let mut average = bench.masters(&random(seed, length));
        for step in 1..=3 {
            let master = bench.masters(&random(seed + step, length));
            bench.backend.weights_average(length, decay, &mut average, &master).expect("no fault");
        }
        bench.read_masters(&average)
    }
    for seed in SEEDS {
        let Some(device) = device(seed) else { return };
        let device = Cuda::<f32>::new(device.stream());
        for (length, decay) in [(1, 0.5), (3, 0.999), (2048, 0.99), (2050, 0.0), (5003, 0.9)] {
            for shift in [0, 1, 4] {
                let found = average(&Bench { backend: &device, shift }, seed, length, decay);
                let expected = average(&Bench { backend: &Cpu::<f64>::new(), shift: 0 }, seed, length, decay);
                close_masters(&format!("average of {length}, shift {shift}"), &found, &expected);
            }
        }
    }
}

#[test]
fn adamw_refuses_what_does_not_fit() {
    let Some(device) = device(0) else { return };
    let stream = device.stream();
    let floats = |len| stream.zeros::<f32>(len).expect("reserved");
    let [mut master, mut first, mut second, gradient] = [0; 4].map(|_| floats(100));
    let (mut factors, norm, mut working) = (floats(16), floats(1), stream.zeros::<bf16>(40).expect("reserved"));
    let mut state = stream.zeros::<AdamWState>(1).expect("reserved");
    let learning_rate = stream.zeros::<f64>(1).expect("reserved");
    let mut run = |settings, working_length, factors_from: usize| {
        let (mut factors, mut working) = (factors.as_mut_slice(), working.as_mut_slice());
        let mut arenas = AdamWArenas {
            state: state.as_mut_slice(),
            master: master.as_mut_slice(),
            working: Some(working.range(0..working_length)?),
            first_moment: first.as_mut_slice(),
            second_moment: second.as_mut_slice(),
            factors: factors.range(factors_from..factors_from + ADAMW_FACTORS)?,
        };
        let (gradient, norm) = (gradient.as_slice(), norm.as_slice());
        let input = AdamWInput { gradient, norm, loss: None, learning_rate: learning_rate.as_slice() };
        adamw_step(&stream, &mut arenas, &input, settings)
    };
    run(settings(100, 40), 40, 0).expect("no fault");
    let mut refused = |settings, working_length, factors_from| {
        let error = run(settings, working_length, factors_from).expect_err("refused");
        assert!(matches!(error, CudaError::Shape { .. }), "{error:?}");
        error.to_string()
    };
    assert!(refused(settings(101, 40), 40, 0).contains("length of master is 100, expected 101"));
    assert!(refused(settings(100, 40), 39, 0).contains("length of working is 39, expected 40"));
    assert!(refused(settings(100, 101), 40, 0).contains("decayed parameters is 101"));
    assert!(refused(settings(100, 40), 40, 2).contains("alignment of factors"));

    let (mut norm, mut partials) = (floats(1), floats(gradient_norm_partials(100) + 1));
    let mut partials = partials.as_mut_slice();
    let error = gradient_norm(&stream, &mut norm.as_mut_slice(), &mut partials, &gradient.as_slice());
    assert!(error.expect_err("refused").to_string().contains("length of partials is 3, expected 2"));
    let error = masters_to_bf16(&stream, &mut working.as_mut_slice(), &gradient.as_slice());
    assert!(error.expect_err("refused").to_string().contains("length of master is 100, expected 40"));
    let mut average = floats(99);
    let error = weights_average(&stream, &mut average.as_mut_slice(), &gradient.as_slice(), 0.9);
    assert!(error.expect_err("refused").to_string().contains("length of master is 100, expected 99"));
}
