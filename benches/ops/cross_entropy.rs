use criterion::Criterion;
use vitmae::ops::{Backend, CrossEntropyShape};

use crate::place::Place;

pub fn benches<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>) {
    // A step of fine-tuning on ImageNet.
    let shape = CrossEntropyShape { rows: 1024, classes: 1000, smoothing: 0.1, scale: 1.0 / 1024.0 };
    let numbers = shape.rows * shape.classes;
    place.measure(
        criterion,
        ["cross_entropy", "forward_backward", "imagenet"],
        shape.cost(place.element_bytes()),
        |place| {
            let labels = place.filled(shape.rows, |bits| bits % shape.classes as u32)?;
            let losses = (place.masters(1)?, place.masters(shape.rows)?);
            Ok((losses, place.elements(numbers)?, place.elements(numbers)?, labels))
        },
        |backend, ((loss, row_loss), gradient, logits, labels)| {
            backend.cross_entropy_forward_backward(shape, loss, row_loss, gradient, logits, labels)
        },
    );
}
