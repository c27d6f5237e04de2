//! The fixed table of positions, and its interpolation to other image sizes.

/// The sin-cos table for a grid of `rows x columns` patches: `[1 + rows * columns, width]`, row-major, the first row zero for
/// the class token, each other row `[sin w | cos w | sin h | cos h]` with `width / 4` frequencies `10000^(-4 i / width)`.
/// Computed in f64. (He et al. 2021, appendix; the original's order of w before h.)
#[must_use]
pub fn sin_cos_table(rows: usize, columns: usize, width: usize) -> Vec<f32> {
    let quarter = width / 4;
    let mut table = vec![0.0; width];
    table.reserve(rows * columns * width);
    for row in 0..rows {
        for column in 0..columns {
            for place in [column, row] {
                let angle = |i: usize| place as f64 / 10000f64.powf(i as f64 / quarter as f64);
                table.extend((0..quarter).map(|i| angle(i).sin() as f32));
                table.extend((0..quarter).map(|i| angle(i).cos() as f32));
            }
        }
    }
    table
}

/// How position tables follow an image of another size than the config's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PositionInterpolation {
    /// Bicubic over the grid, in the encoder and in the decoder.
    #[default]
    Grid,
    /// As transformers does: over the grid in the encoder, over the flattened table in the decoder.
    Transformers,
}

/// Bicubic interpolation (a = -0.75, corners not aligned, edges repeated: PyTorch's `interpolate`) of a table
/// `[1 + rows * columns, width]` to another grid; the class token's row stays.
#[must_use]
pub fn interpolate_grid(
    table: &[f32],
    width: usize,
    (rows, columns): (usize, usize),
    (new_rows, new_columns): (usize, usize),
) -> Vec<f32> {
    let vertical = resample(&table[width..], 1, rows, columns * width, new_rows);
    let both = resample(&vertical, new_rows, columns, width, new_columns);
    table[..width].iter().map(|&value| f64::from(value)).chain(both).map(|value| value as f32).collect()
}

/// The same over the flattened table, as if its patches were one row of pixels: `[1 + old, width]` to `[1 + new, width]`.
#[must_use]
pub fn interpolate_flat(table: &[f32], width: usize, old: usize, new: usize) -> Vec<f32> {
    let patches = resample(&table[width..], 1, old, width, new);
    table[..width].iter().map(|&value| f64::from(value)).chain(patches).map(|value| value as f32).collect()
}

/// Resamples the middle axis of `[outer, old, inner]` to `new` places.
fn resample<T: Copy + Into<f64>>(values: &[T], outer: usize, old: usize, inner: usize, new: usize) -> Vec<f64> {
    let mut output = Vec::with_capacity(outer * new * inner);
    let scale = old as f64 / new as f64;
    for block in 0..outer {
        for place in 0..new {
            let source = (place as f64 + 0.5) * scale - 0.5;
            let first = source.floor();
            let weights = cubic_weights(source - first);
            let taps: [usize; 4] =
                std::array::from_fn(|tap| (first as isize + tap as isize - 1).clamp(0, old as isize - 1) as usize);
            for i in 0..inner {
                let at = |tap: usize| values[(block * old + taps[tap]) * inner + i].into();
                output.push((0..4).map(|tap| weights[tap] * at(tap)).sum());
            }
        }
    }
    output
}

/// The weights of the four neighbours of a place `t` in `[0, 1)` behind the second (Keys 1981, a = -0.75).
fn cubic_weights(t: f64) -> [f64; 4] {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_token_has_no_position_and_patches_have_sines_of_their_column_first() {
        let table = sin_cos_table(2, 3, 8);
        assert_eq!(table.len(), 7 * 8);
        assert!(table[..8].iter().all(|&value| value == 0.0));
        // Row 1, column 2 is patch 5: sin w, cos w of w = 2 at frequencies 1 and 1/100, then those of h = 1.
        let expected = [
            2f64.sin(),
            0.02f64.sin(),
            2f64.cos(),
            0.02f64.cos(),
            1f64.sin(),
            0.01f64.sin(),
            1f64.cos(),
            0.01f64.cos(),
        ];
        for (value, expected) in table[6 * 8..].iter().zip(expected) {
            assert!((f64::from(*value) - expected).abs() < 1e-7);
        }
    }

    #[test]
    fn interpolation_to_the_same_grid_changes_nothing() {
        let table = sin_cos_table(4, 3, 16);
        assert_eq!(interpolate_grid(&table, 16, (4, 3), (4, 3)), table);
        assert_eq!(interpolate_flat(&table, 16, 12, 12), table);
    }

    #[test]
    fn weights_of_neighbours_sum_to_one() {
        for t in [0.0, 0.1, 0.5, 0.99] {
            assert!((cubic_weights(t).iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }
}
