use criterion::Criterion;
use vitmae::cpu::Cpu;
use vitmae::ops::{CrossEntropy, CrossEntropyShape, Memory};

use crate::{measure, random};

pub fn benches(criterion: &mut Criterion) {
    let cpu = Cpu::<f32>::new();
    // A step of fine-tuning on ImageNet.
    let shape = CrossEntropyShape { rows: 1024, classes: 1000, smoothing: 0.1, scale: 1.0 / 1024.0 };
    let (mut loss, mut row_loss) = (random(1), random(shape.rows));
    let (mut gradient, logits) = (random(shape.rows * shape.classes), random(shape.rows * shape.classes));
    let mut labels = cpu.buffer(shape.rows).expect("there is enough memory");
    labels.iter_mut().enumerate().for_each(|(row, label)| *label = (row * 37 % shape.classes) as u32);
    measure(criterion, "cross_entropy", "forward_backward", "imagenet", shape.cost(4), || {
        loss.fill(0.0);
        cpu.cross_entropy_forward_backward(shape, &mut loss, &mut row_loss, &mut gradient, &logits, &labels)
    });
}
