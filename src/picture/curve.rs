//! Loss curves as SVG.

use std::path::Path;

use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;

use crate::files::write_atomically;
use crate::{Error, Result};

/// The vertical axis of a curve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Logarithmic when all values are positive and the largest is at least ten times the smallest.
    #[default]
    Automatic,
    /// Linear.
    Linear,
    /// Logarithmic; falls back to linear when a value is not positive.
    Logarithmic,
}

const SIZE: (u32, u32) = (960, 540);
const RAW: RGBColor = RGBColor(158, 188, 218);
const SMOOTH: RGBColor = RGBColor(31, 84, 140);
/// Points of a line in the file; more cannot be told apart.
const POINTS: usize = 1500;

/// A value against steps: a light line for what was measured, a dark one for its running mean.
///
/// ```
/// use vitmae::picture::Curve;
///
/// let losses: Vec<(u64, f64)> = (0..100).map(|step| (step, 1.0 / (step + 1) as f64)).collect();
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("loss.svg");
/// Curve::new("Training loss", "loss", &losses).save(&path)?;
/// # Ok::<(), vitmae::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Curve<'a> {
    title: &'a str,
    quantity: &'a str,
    points: &'a [(u64, f64)],
    scale: Scale,
}

impl<'a> Curve<'a> {
    /// `points` are (step, value) with rising steps. Values that are not finite leave a gap.
    #[must_use]
    pub fn new(title: &'a str, quantity: &'a str, points: &'a [(u64, f64)]) -> Self {
        Self { title, quantity, points, scale: Scale::default() }
    }

    /// With another vertical axis.
    #[must_use]
    pub fn scale(mut self, scale: Scale) -> Self {
        self.scale = scale;
        self
    }

    /// Writes an SVG; an existing file is replaced in one step.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let svg = self.to_svg().map_err(|problem| Error::Picture {
            path: path.to_path_buf(),
            problem: format!("cannot be drawn: {problem}"),
        })?;
        write_atomically(path, |file| file.bytes(svg.as_bytes()))
    }

    fn to_svg(&self) -> std::result::Result<String, String> {
        let finite = || self.points.iter().filter(|point| point.1.is_finite());
        let (mut low, mut high) = finite()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), point| (low.min(point.1), high.max(point.1)));
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        let logarithmic = match self.scale {
            Scale::Automatic => low > 0.0 && high / low >= 10.0,
            Scale::Linear => false,
            Scale::Logarithmic => low > 0.0 && finite().next().is_some(),
        };
        let first = self.points.first().map_or(0, |point| point.0);
        let last = self.points.last().map_or(1, |point| point.0).max(first + 1);
        let steps = first as f64..last as f64;
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            root.fill(&WHITE).map_err(|error| error.to_string())?;
            if logarithmic {
                let margin = (high / low).powf(0.05).max(1.02);
                self.draw(&root, steps, (low / margin..high * margin).log_scale())?;
            } else {
                let margin = if high > low { (high - low) * 0.05 } else { (high.abs() * 0.1).max(0.01) };
                // A loss is not negative: do not show room below zero that it cannot take.
                let bottom = if low >= 0.0 { (low - margin).max(0.0) } else { low - margin };
                self.draw(&root, steps, bottom..high + margin)?;
            }
            root.present().map_err(|error| error.to_string())?;
        }
        Ok(svg)
    }

    fn draw<Y>(
        &self,
        root: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
        steps: std::ops::Range<f64>,
        values: Y,
    ) -> std::result::Result<(), String>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let failed = |error: DrawingAreaErrorKind<std::io::Error>| error.to_string();
        let mut chart = ChartBuilder::on(root)
            .margin(16)
            .caption(self.title, ("sans-serif", 22).into_font().color(&RGBColor(40, 40, 40)))
            .x_label_area_size(48)
            .y_label_area_size(76)
            .build_cartesian_2d(steps, values)
            .map_err(failed)?;
        let label = || ("sans-serif", 14).into_font().color(&RGBColor(70, 70, 70));
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc(self.quantity)
            .x_label_formatter(&|step| format!("{step:.0}"))
            .y_label_formatter(&|value| number(*value))
            .label_style(label())
            .axis_desc_style(("sans-serif", 16).into_font().color(&RGBColor(40, 40, 40)))
            .axis_style(RGBColor(120, 120, 120))
            .bold_line_style(RGBColor(225, 225, 225))
            .light_line_style(RGBColor(243, 243, 243))
            .x_labels(10)
            .y_labels(8)
            .draw()
            .map_err(failed)?;
        let runs = runs(self.points);
        let smooth = smoothed(self.points);
        for run in &runs {
            let points = thinned(&self.points[run.clone()]);
            chart.draw_series(LineSeries::new(points.clone(), RAW.stroke_width(1))).map_err(failed)?;
            if points.len() == 1 {
                chart.draw_series(points.iter().map(|at| Circle::new(*at, 3, SMOOTH.filled()))).map_err(failed)?;
            }
        }
        for run in &runs {
            let points = thinned(&smooth[run.clone()]);
            chart.draw_series(LineSeries::new(points, SMOOTH.stroke_width(2))).map_err(failed)?;
        }
        Ok(())
    }
}

/// A label of few digits.
fn number(value: f64) -> String {
    let size = value.abs();
    if size == 0.0 {
        "0".to_owned()
    } else if (1e-3..1e5).contains(&size) {
        let text = format!("{value:.4}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        format!("{value:.0e}")
    }
}

/// The stretches between values that are not finite.
fn runs(points: &[(u64, f64)]) -> Vec<std::ops::Range<usize>> {
    let mut runs = Vec::new();
    let mut start = None;
    for (at, point) in points.iter().enumerate() {
        match (point.1.is_finite(), start) {
            (true, None) => start = Some(at),
            (false, Some(first)) => {
                runs.push(first..at);
                start = None;
            }
            _ => {}
        }
    }
    if let Some(first) = start {
        runs.push(first..points.len());
    }
    runs
}

/// An exponential mean over about a fiftieth of the curve, corrected for its start; gaps do not count.
fn smoothed(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let decay = 1.0 - 1.0 / (points.len() as f64 / 50.0).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    points
        .iter()
        .map(|&(step, value)| {
            if value.is_finite() {
                sum = decay * sum + (1.0 - decay) * value;
                weight = decay * weight + (1.0 - decay);
            }
            (step, if weight > 0.0 { sum / weight } else { f64::NAN })
        })
        .collect()
}

/// At most about [`POINTS`] points: of each stretch the least and the greatest, in their order, so that peaks stay.
fn thinned(points: &[(u64, f64)]) -> Vec<(f64, f64)> {
    let convert = |&(step, value): &(u64, f64)| (step as f64, value);
    if points.len() <= POINTS {
        return points.iter().map(convert).collect();
    }
    let stretch = points.len().div_ceil(POINTS / 2);
    let mut out = Vec::with_capacity(POINTS + 2);
    for part in points.chunks(stretch) {
        let by = |a: &&(u64, f64), b: &&(u64, f64)| a.1.total_cmp(&b.1);
        let (Some(least), Some(greatest)) = (part.iter().min_by(by), part.iter().max_by(by)) else { continue };
        let (before, after) = if least.0 <= greatest.0 { (least, greatest) } else { (greatest, least) };
        out.push(convert(before));
        if before.0 != after.0 {
            out.push(convert(after));
        }
    }
    out
}
