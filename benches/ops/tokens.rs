use criterion::Criterion;
use vitmae::ops::{Backend, TokensShape};

use crate::place::{Model, Place};

pub fn benches<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>) {
    for model in place.models {
        encoder(criterion, place, model);
    }
    for model in place.different() {
        decoder(criterion, place, model);
    }
}

fn encoder<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>, model: &Model) {
    let (batch, patches, selected, width) = (place.batch, model.patches(), model.visible(), model.width);
    let shape = TokensShape { batch, patches, selected, width };
    let cost = shape.assemble_cost(place.element_bytes());
    let name = format!("{}_encoder", model.name);
    let make = |place: &Place<B>| {
        let numbers = (place.elements(batch * (1 + selected) * width)?, place.elements(batch * selected * width)?);
        let positions = place.masters((1 + patches) * width)?;
        Ok((numbers, place.masters(width)?, positions, place.ids(patches, selected)?))
    };
    place.measure(
        criterion,
        ["tokens", "assemble_forward", &name],
        cost,
        make,
        |backend, ((x, patches), token, positions, keep)| {
            backend.tokens_assemble_forward(shape, x, patches, token, positions, keep)
        },
    );
    place.measure(
        criterion,
        ["tokens", "assemble_backward", &name],
        cost,
        make,
        |backend, ((x, patches), token, _, _)| backend.tokens_assemble_backward(shape, patches, token, x),
    );
}

fn decoder<B: Backend<Master = f32>>(criterion: &mut Criterion, place: &Place<B>, model: &Model) {
    let (batch, patches, width) = (place.batch, model.patches(), Model::DECODER_WIDTH);
    let name = format!("{}_decoder", model.name);
    let bytes = place.element_bytes();

    let shape = TokensShape { batch, patches, selected: model.visible(), width };
    let make = |place: &Place<B>| {
        let x = place.elements(batch * (1 + shape.selected) * width)?;
        let y = place.elements(batch * (1 + patches) * width)?;
        let positions = place.masters((1 + patches) * width)?;
        Ok((x, y, place.masters(width)?, positions, place.ids(patches, patches)?))
    };
    place.measure(
        criterion,
        ["tokens", "unshuffle_forward", &name],
        shape.unshuffle_cost(bytes),
        make,
        |backend, (x, y, token, positions, restore)| {
            backend.tokens_unshuffle_forward(shape, y, x, token, positions, restore)
        },
    );
    place.measure(
        criterion,
        ["tokens", "unshuffle_backward", &name],
        shape.unshuffle_cost(bytes),
        make,
        |backend, (x, y, token, _, restore)| backend.tokens_unshuffle_backward(shape, x, token, y, restore),
    );

    let shape = TokensShape { selected: patches - model.visible(), ..shape };
    let make = |place: &Place<B>| {
        let some = place.elements(batch * shape.selected * width)?;
        Ok((some, place.elements(batch * (1 + patches) * width)?, place.ids(patches, shape.selected)?))
    };
    place.measure(
        criterion,
        ["tokens", "gather_forward", &name],
        shape.assemble_cost(bytes),
        make,
        |backend, (some, y, ids)| backend.tokens_gather_forward(shape, some, y, ids),
    );
    place.measure(
        criterion,
        ["tokens", "gather_backward", &name],
        shape.unshuffle_cost(bytes),
        make,
        |backend, (some, y, ids)| backend.tokens_gather_backward(shape, y, some, ids),
    );
}
