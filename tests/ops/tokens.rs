use vitmae::cpu::{Cpu, Float};
use vitmae::ops::{Tokens, TokensShape};

use crate::patchify::some_ids;
use crate::support::{
    buffer, check_gradient, close, dot, plain, poisoned, random, read, same_on_any_threads, shuffles,
};

fn shapes() -> Vec<TokensShape> {
    let mut shapes = Vec::new();
    for (batch, patches, selected, width) in
        [(1, 1, 1, 8), (2, 16, 4, 10), (3, 49, 12, 17), (1, 196, 49, 40), (2, 64, 64, 33), (3, 9, 0, 8), (2, 10, 3, 1)]
    {
        shapes.push(TokensShape { batch, patches, selected, width });
    }
    shapes
}

/// `<a(x), y> = <x, aᵀ(y)>` ties backward to forward, which are linear: no differences needed.
#[track_caller]
fn adjoint(what: &str, left: f64, right: f64) {
    assert!((left - right).abs() < 1e-10 * (1.0 + left.abs()), "{what}: {left} but {right}");
}

fn assemble<F: Float>(shape: TokensShape, patches: &[f64], class: &[f64], positions: &[f64], ids: &[u32]) -> Vec<f64> {
    let (patches, class, positions) = (buffer(patches), buffer(class), buffer(positions));
    let ids = plain(ids, u32::MAX);
    same_on_any_threads(|| {
        let mut x = poisoned::<F>(shape.batch * (1 + shape.selected) * shape.width);
        Cpu::new().tokens_assemble_forward(shape, &mut x, &patches, &class, &positions, &ids).unwrap();
        read(&x)
    })
}

fn unshuffle<F: Float>(shape: TokensShape, x: &[f64], mask: &[f64], positions: &[f64], restore: &[u32]) -> Vec<f64> {
    let (x, mask, positions, restore) = (buffer(x), buffer(mask), buffer(positions), plain(restore, u32::MAX));
    same_on_any_threads(|| {
        let mut y = poisoned::<F>(shape.batch * (1 + shape.patches) * shape.width);
        Cpu::new().tokens_unshuffle_forward(shape, &mut y, &x, &mask, &positions, &restore).unwrap();
        read(&y)
    })
}

fn gather<F: Float>(shape: TokensShape, x: &[f64], ids: &[u32]) -> Vec<f64> {
    let (x, ids) = (buffer(x), plain(ids, u32::MAX));
    same_on_any_threads(|| {
        let mut y = poisoned::<F>(shape.batch * shape.selected * shape.width);
        Cpu::new().tokens_gather_forward(shape, &mut y, &x, &ids).unwrap();
        read(&y)
    })
}

#[test]
fn tokens_assemble_agrees_with_its_definition() {
    fn check<F: Float>(shape: TokensShape) {
        let TokensShape { batch, patches, selected, width } = shape;
        let embedded = random(1, batch * selected * width);
        let (class, positions) = (random(2, width), random(3, (1 + patches) * width));
        let ids = some_ids(4, batch, patches, selected);
        let mut expected = Vec::new();
        for sample in 0..batch {
            expected.extend((0..width).map(|d| class[d] + positions[d]));
            for j in sample * selected..(sample + 1) * selected {
                expected
                    .extend((0..width).map(|d| embedded[j * width + d] + positions[(1 + ids[j] as usize) * width + d]));
            }
        }
        close("x", &assemble::<F>(shape, &embedded, &class, &positions, &ids), &expected, 1e-7);
    }
    for shape in shapes() {
        check::<f32>(shape);
        check::<f64>(shape);
    }
}

#[test]
fn tokens_assemble_backward_is_the_transpose_of_forward() {
    for shape in shapes() {
        let TokensShape { batch, patches, selected, width } = shape;
        let (embedded, class) = (random(1, batch * selected * width), random(2, width));
        let zeros = vec![0.0; (1 + patches) * width];
        let dx = random(5, batch * (1 + selected) * width);
        let ids = some_ids(4, batch, patches, selected);
        let old = random(6, width);
        let (dpatches, dclass) = same_on_any_threads(|| {
            let (mut dpatches, mut dclass) = (poisoned::<f64>(batch * selected * width), buffer(&old));
            Cpu::new().tokens_assemble_backward(shape, &mut dpatches, &mut dclass, &buffer(&dx)).unwrap();
            (read(&dpatches), read(&dclass))
        });
        let x = assemble::<f64>(shape, &embedded, &class, &zeros, &ids);
        let dclass: Vec<f64> = dclass.iter().zip(&old).map(|(new, old)| new - old).collect();
        adjoint("assemble", dot(&x, &dx), dot(&embedded, &dpatches) + dot(&class, &dclass));
    }
}

#[test]
fn tokens_unshuffle_agrees_with_its_definition() {
    fn check<F: Float>(shape: TokensShape) {
        let TokensShape { batch, patches, selected, width } = shape;
        let x = random(1, batch * (1 + selected) * width);
        let (mask, positions) = (random(2, width), random(3, (1 + patches) * width));
        let restore = shuffles(4, batch, patches);
        let mut expected = Vec::new();
        for sample in 0..batch {
            for token in 0..=patches {
                for d in 0..width {
                    let rank = if token == 0 { 0 } else { 1 + restore[sample * patches + token - 1] as usize };
                    let own = if rank <= selected { x[(sample * (1 + selected) + rank) * width + d] } else { mask[d] };
                    expected.push(own + positions[token * width + d]);
                }
            }
        }
        close("y", &unshuffle::<F>(shape, &x, &mask, &positions, &restore), &expected, 1e-7);
    }
    for shape in shapes() {
        check::<f32>(shape);
        check::<f64>(shape);
    }
}

#[test]
fn tokens_unshuffle_backward_is_the_transpose_of_forward() {
    for shape in shapes() {
        let TokensShape { batch, patches, selected, width } = shape;
        let (x, mask) = (random(1, batch * (1 + selected) * width), random(2, width));
        let dy = random(5, batch * (1 + patches) * width);
        let (restore, old) = (shuffles(4, batch, patches), random(6, width));
        let (dx, dmask) = same_on_any_threads(|| {
            let (mut dx, mut dmask) = (poisoned::<f64>(x.len()), buffer(&old));
            Cpu::new()
                .tokens_unshuffle_backward(shape, &mut dx, &mut dmask, &buffer(&dy), &plain(&restore, 0))
                .unwrap();
            (read(&dx), read(&dmask))
        });
        let y = unshuffle::<f64>(shape, &x, &mask, &vec![0.0; (1 + patches) * width], &restore);
        let dmask: Vec<f64> = dmask.iter().zip(&old).map(|(new, old)| new - old).collect();
        adjoint("unshuffle", dot(&y, &dy), dot(&x, &dx) + dot(&mask, &dmask));
    }
}

#[test]
fn tokens_gather_and_its_transpose() {
    for shape in shapes() {
        let TokensShape { batch, patches, selected, width } = shape;
        let x = random(1, batch * (1 + patches) * width);
        let ids = some_ids(4, batch, patches, selected);
        let mut expected = Vec::new();
        for (row, &id) in ids.iter().enumerate() {
            let token = row / selected * (1 + patches) + 1 + id as usize;
            expected.extend_from_slice(&x[token * width..][..width]);
        }
        assert_eq!(gather::<f64>(shape, &x, &ids), expected);
        assert_eq!(gather::<f32>(shape, &x, &ids), expected);
        let dy = random(5, batch * selected * width);
        let dx = same_on_any_threads(|| {
            let mut dx = poisoned::<f64>(x.len());
            Cpu::new().tokens_gather_backward(shape, &mut dx, &buffer(&dy), &plain(&ids, 0)).unwrap();
            read(&dx)
        });
        adjoint("gather", dot(&expected, &dy), dot(&x, &dx));
        assert_eq!(dx.iter().filter(|&&x| x != 0.0).count(), dy.len());
    }
}

#[test]
fn tokens_gradients_are_those_of_the_forward_pass() {
    let shape = TokensShape { batch: 2, patches: 10, selected: 3, width: 5 };
    let TokensShape { batch, patches, selected, width } = shape;
    let (visible, whole) = (batch * (1 + selected) * width, batch * (1 + patches) * width);
    let (ids, restore) = (some_ids(4, batch, patches, selected), shuffles(5, batch, patches));
    let (embedded, token) = (random(1, batch * selected * width), random(2, width));
    let positions = random(3, (1 + patches) * width);
    let cpu = Cpu::<f64>::new();

    let dx = random(6, visible);
    let (mut dpatches, mut dclass) = (poisoned(embedded.len()), buffer(&vec![0.0; width]));
    cpu.tokens_assemble_backward(shape, &mut dpatches, &mut dclass, &buffer(&dx)).unwrap();
    let assembled =
        |patches: &[f64], class: &[f64]| dot(&assemble::<f64>(shape, patches, class, &positions, &ids), &dx);
    check_gradient("dpatches", &embedded, &read(&dpatches), |patches| assembled(patches, &token));
    check_gradient("dclass_token", &token, &read(&dclass), |class| assembled(&embedded, class));

    let (x, dy) = (random(7, visible), random(8, whole));
    let (mut dx, mut dmask) = (poisoned(visible), buffer(&vec![0.0; width]));
    cpu.tokens_unshuffle_backward(shape, &mut dx, &mut dmask, &buffer(&dy), &plain(&restore, 0)).unwrap();
    let unshuffled = |x: &[f64], mask: &[f64]| dot(&unshuffle::<f64>(shape, x, mask, &positions, &restore), &dy);
    check_gradient("dx of unshuffle", &x, &read(&dx), |x| unshuffled(x, &token));
    check_gradient("dmask_token", &token, &read(&dmask), |mask| unshuffled(&x, mask));

    let (x, dy) = (random(9, whole), random(10, batch * selected * width));
    let mut dx = poisoned(whole);
    cpu.tokens_gather_backward(shape, &mut dx, &buffer(&dy), &plain(&ids, 0)).unwrap();
    check_gradient("dx of gather", &x, &read(&dx), |x| dot(&gather::<f64>(shape, x, &ids), &dy));
}

#[test]
fn tokens_refuse_short_buffers_and_unknown_ids() {
    let shape = TokensShape { batch: 2, patches: 30, selected: 4, width: 8 };
    let (short, long) = (|| buffer::<f32>(&[1.0]), || buffer::<f32>(&[1.0; 496]));
    let cpu = Cpu::<f32>::new();
    let good = plain(&[0_u32; 60], 0);
    let bad = plain(&[30_u32; 60], 0);
    assert!(cpu.tokens_assemble_forward(shape, &mut long(), &long(), &long(), &long(), &good).is_ok());
    assert!(cpu.tokens_assemble_forward(shape, &mut long(), &long(), &long(), &long(), &bad).is_err());
    assert!(cpu.tokens_assemble_forward(shape, &mut long(), &short(), &long(), &long(), &good).is_err());
    assert!(cpu.tokens_unshuffle_forward(shape, &mut short(), &long(), &long(), &long(), &good).is_err());
    assert!(cpu.tokens_unshuffle_backward(shape, &mut long(), &mut long(), &short(), &good).is_err());
    assert!(cpu.tokens_gather_forward(shape, &mut long(), &long(), &bad).is_err());
    assert!(cpu.tokens_gather_backward(shape, &mut short(), &long(), &good).is_err());
}
