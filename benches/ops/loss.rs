use criterion::Criterion;
use vitmae::cpu::Cpu;
use vitmae::ops::{Loss, LossShape, Memory, Pixels};

use crate::patchify::bytes;
use crate::{BATCH, IMAGE, PATCHES, VISIBLE, ids, measure, random};

pub fn benches(criterion: &mut Criterion) {
    let cpu = Cpu::<f32>::new();
    let predicted = PATCHES - VISIBLE;
    let shape = LossShape { image: IMAGE, batch: BATCH, predicted, norm_pix_loss: true, scale: 1e-3 };
    let rows = BATCH * predicted;
    let (mut loss, mut patch_loss) = (random(1), random(rows));
    let (mut gradient, prediction) = (random(rows * IMAGE.patch_length()), random(rows * IMAGE.patch_length()));
    let (bytes, mean, deviation, ids) = (bytes(), random(3), random(3), ids(predicted));
    let mut mask = cpu.buffer(BATCH * PATCHES).expect("there is enough memory");
    mask.fill(1.0);
    let pixels = Pixels::Bytes { values: &bytes, mean: &mean, deviation: &deviation };
    measure(criterion, "loss", "forward_backward_u8", "vit_b", shape.cost(1, 4), || {
        loss.fill(0.0);
        cpu.loss_forward_backward(shape, &mut loss, &mut patch_loss, &mut gradient, &prediction, pixels, &ids, &mask)
    });
}
