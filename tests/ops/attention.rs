use vitmae::cpu::{Cpu, Float};
use vitmae::ops::{Attention, AttentionShape};

use crate::support::{buffer, check_gradient, close, dot, poisoned, random, read, same_on_any_threads};

fn shape(batch: usize, tokens: usize, heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { batch, tokens, heads, head_dim }
}

/// All numbers of tokens and widths of heads that matter, each at least once with each of its neighbours.
fn shapes() -> Vec<AttentionShape> {
    let mut shapes = Vec::new();
    for (index, tokens) in [1, 2, 17, 50, 65, 197, 300].into_iter().enumerate() {
        for head_dim in [8, 10, 16, 32, 40, 64, 80, 128] {
            if tokens < 100 || [16, 40, 64].contains(&head_dim) {
                shapes.push(shape(1 + index % 3, tokens, 1 + index % 2, head_dim));
            }
        }
    }
    shapes
}

fn numbers(shape: AttentionShape) -> usize {
    shape.batch * shape.tokens * shape.width()
}

/// Queries, keys or values of a head as rows.
fn part(shape: AttentionShape, qkv: &[f64], sample: usize, which: usize, head: usize) -> Vec<Vec<f64>> {
    let d = shape.head_dim;
    (0..shape.tokens)
        .map(|token| {
            let start = (((sample * shape.tokens + token) * 3 + which) * shape.heads + head) * d;
            qkv[start..start + d].to_vec()
        })
        .collect()
}

/// Output, log-sum-exp and probabilities.
fn naive_forward(shape: AttentionShape, qkv: &[f64]) -> [Vec<f64>; 3] {
    let AttentionShape { batch, tokens, heads, head_dim } = shape;
    let mut out = vec![0.0; numbers(shape)];
    let (mut log_sum_exp, mut probabilities) = (vec![], vec![]);
    for sample in 0..batch {
        for head in 0..heads {
            let [q, k, v] = [0, 1, 2].map(|which| part(shape, qkv, sample, which, head));
            for (token, q) in q.iter().enumerate() {
                let scores: Vec<f64> = k.iter().map(|k| dot(q, k) * shape.scale()).collect();
                let largest = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
                let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
                log_sum_exp.push(largest + sum.ln());
                for (score, v) in scores.iter().zip(&v) {
                    let p = (score - largest).exp() / sum;
                    probabilities.push(p);
                    for d in 0..head_dim {
                        out[((sample * tokens + token) * heads + head) * head_dim + d] += p * v[d];
                    }
                }
            }
        }
    }
    [out, log_sum_exp, probabilities]
}

fn naive_backward(shape: AttentionShape, dout: &[f64], qkv: &[f64]) -> Vec<f64> {
    let AttentionShape { batch, tokens, heads, head_dim } = shape;
    let [_, _, p] = naive_forward(shape, qkv);
    let mut dqkv = vec![0.0; 3 * numbers(shape)];
    for sample in 0..batch {
        for head in 0..heads {
            let [q, k, v] = [0, 1, 2].map(|which| part(shape, qkv, sample, which, head));
            for i in 0..tokens {
                let dout = &dout[((sample * tokens + i) * heads + head) * head_dim..][..head_dim];
                let p = &p[((sample * heads + head) * tokens + i) * tokens..][..tokens];
                let dp: Vec<f64> = v.iter().map(|v| dot(dout, v)).collect();
                let delta = dot(p, &dp);
                for j in 0..tokens {
                    let ds = p[j] * (dp[j] - delta) * shape.scale();
                    let at = |token, which| (((sample * tokens + token) * 3 + which) * heads + head) * head_dim;
                    for d in 0..head_dim {
                        dqkv[at(i, 0) + d] += ds * k[j][d];
                        dqkv[at(j, 1) + d] += ds * q[i][d];
                        dqkv[at(j, 2) + d] += p[j] * dout[d];
                    }
                }
            }
        }
    }
    dqkv
}

fn forward<F: Float>(shape: AttentionShape, qkv: &[f64]) -> [Vec<f64>; 2] {
    let qkv = buffer(qkv);
    same_on_any_threads(|| {
        let (mut out, mut log_sum_exp) =
            (poisoned::<F>(numbers(shape)), poisoned(shape.batch * shape.heads * shape.tokens));
        Cpu::new().attention_forward(shape, &mut out, &mut log_sum_exp, &qkv).unwrap();
        [read(&out), read(&log_sum_exp)]
    })
}

fn backward<F: Float>(shape: AttentionShape, dout: &[f64], qkv: &[f64]) -> Vec<f64> {
    let [_, log_sum_exp] = forward::<F>(shape, qkv);
    let (dout, qkv, log_sum_exp) = (buffer(dout), buffer(qkv), buffer(&log_sum_exp));
    same_on_any_threads(|| {
        let mut dqkv = poisoned::<F>(3 * numbers(shape));
        Cpu::new().attention_backward(shape, &mut dqkv, &dout, &qkv, &log_sum_exp).unwrap();
        read(&dqkv)
    })
}

fn inputs(shape: AttentionShape) -> (Vec<f64>, Vec<f64>) {
    let qkv = random(1, 3 * numbers(shape)).iter().map(|x| f64::from((1.5 * x) as f32)).collect();
    (qkv, random(2, numbers(shape)))
}

#[test]
fn attention_forward_agrees_with_loops() {
    for shape in shapes() {
        let (qkv, _) = inputs(shape);
        let [out, log_sum_exp, probabilities] = naive_forward(shape, &qkv);
        let [single_out, single_lse] = forward::<f32>(shape, &qkv);
        close("out in f32", &single_out, &out, 4e-6);
        close("log-sum-exp in f32", &single_lse, &log_sum_exp, 4e-6);
        let [double_out, double_lse] = forward::<f64>(shape, &qkv);
        close("out", &double_out, &out, 1e-13);
        close("log-sum-exp", &double_lse, &log_sum_exp, 1e-13);
        let found = same_on_any_threads(|| {
            let mut found = poisoned::<f32>(probabilities.len());
            Cpu::new().attention_probabilities(shape, &mut found, &buffer(&qkv), &buffer(&log_sum_exp)).unwrap();
            read(&found)
        });
        close("probabilities", &found, &probabilities, 4e-6);
    }
}

#[test]
fn attention_backward_agrees_with_loops() {
    for shape in shapes() {
        let (qkv, dout) = inputs(shape);
        let expected = naive_backward(shape, &dout, &qkv);
        close("dqkv in f32", &backward::<f32>(shape, &dout, &qkv), &expected, 2e-5);
        close("dqkv", &backward::<f64>(shape, &dout, &qkv), &expected, 1e-13);
    }
}

#[test]
fn attention_gradients_are_those_of_the_forward_pass() {
    for shape in [shape(2, 5, 2, 8), shape(1, 70, 1, 10), shape(1, 1, 3, 4)] {
        let (qkv, dout) = inputs(shape);
        let dqkv = backward::<f64>(shape, &dout, &qkv);
        check_gradient("dqkv", &qkv, &dqkv, |qkv| dot(&forward::<f64>(shape, qkv)[0], &dout));
    }
}

#[test]
fn attention_survives_extreme_scores() {
    for tokens in [2, 17, 65] {
        let shape = shape(1, tokens, 2, 16);
        let (mut qkv, dout) = inputs(shape);
        // Scores up to 1e4 of both signs: the softmax is all but a choice.
        for (token, row) in qkv.chunks_mut(3 * 32).enumerate() {
            let factor = if token % 2 == 0 { 160.0 } else { -90.0 };
            row[..64].iter_mut().for_each(|x| *x = f64::from((*x * factor).round() as f32));
        }
        let [out, log_sum_exp, _] = naive_forward(shape, &qkv);
        assert!(log_sum_exp.iter().any(|&lse| lse > 1e4));
        let [single_out, single_lse] = forward::<f32>(shape, &qkv);
        close("log-sum-exp", &single_lse, &log_sum_exp, 1e-6);
        close("out", &single_out, &out, 1e-3);
        let single = backward::<f32>(shape, &dout, &qkv);
        assert!(single.iter().all(|x| x.is_finite()));
        close("dqkv in f64", &backward::<f64>(shape, &dout, &qkv), &naive_backward(shape, &dout, &qkv), 1e-9);
    }
}

#[test]
fn attention_of_equal_scores_is_the_mean() {
    let shape = shape(1, 50, 1, 8);
    let mut qkv = inputs(shape).0;
    for row in qkv.chunks_mut(24) {
        row[..16].fill(0.0);
        row[0] = -1e4;
        row[8] = 1e4;
    }
    let [out, _] = forward::<f32>(shape, &qkv);
    let mean: Vec<f64> = (0..8).map(|d| qkv.chunks(24).map(|row| row[16 + d]).sum::<f64>() / 50.0).collect();
    close("out", &out, &mean.repeat(50), 1e-6);
}

#[test]
fn attention_refuses_short_buffers() {
    let shape = shape(2, 5, 2, 8);
    let (short, long) = (|| buffer::<f32>(&[1.0]), || buffer::<f32>(&[1.0; 480]));
    let cpu = Cpu::<f32>::new();
    assert!(cpu.attention_forward(shape, &mut long(), &mut long(), &long()).is_ok());
    assert!(cpu.attention_forward(shape, &mut short(), &mut long(), &long()).is_err());
    assert!(cpu.attention_forward(shape, &mut long(), &mut long(), &short()).is_err());
    assert!(cpu.attention_backward(shape, &mut short(), &long(), &long(), &long()).is_err());
    assert!(cpu.attention_backward(shape, &mut long(), &short(), &long(), &long()).is_err());
    assert!(cpu.attention_probabilities(shape, &mut short(), &long(), &long()).is_err());
}
