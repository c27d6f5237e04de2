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

/// Of the picture, in pixels.
const SIZE: (u32, u32) = (960, 540);
/// Lines are drawn to so many parts of a pixel: plotters has whole coordinates only.
const FINE: u32 = 4;
const RAW: RGBColor = RGBColor(158, 188, 218);
const SMOOTH: RGBColor = RGBColor(31, 84, 140);
/// Points of a line in the file; more cannot be told apart.
const POINTS: usize = 1500;

/// A value against steps: a light line for what was measured, a dark one for its running mean.
///
/// ```
/// use vitmae::figures::Curve;
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
        let last = self.points.last().map_or(1, |point| point.0).max(first.saturating_add(1));
        let steps = first..last;
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (SIZE.0 * FINE, SIZE.1 * FINE)).into_drawing_area();
            root.fill(&WHITE).map_err(|error| error.to_string())?;
            if logarithmic {
                let margin = (high / low).powf(0.05).max(1.02);
                self.draw(&root, steps, (low / margin..high * margin).log_scale(), true)?;
            } else {
                let margin = if high > low { (high - low) * 0.05 } else { (high.abs() * 0.1).max(0.01) };
                // A loss is not negative: do not show room below zero that it cannot take.
                let bottom = if low >= 0.0 { (low - margin).max(0.0) } else { low - margin };
                self.draw(&root, steps, bottom..high + margin, false)?;
            }
            root.present().map_err(|error| error.to_string())?;
        }
        let large = format!(r#"width="{}" height="{}""#, SIZE.0 * FINE, SIZE.1 * FINE);
        Ok(svg.replacen(&large, &format!(r#"width="{}" height="{}""#, SIZE.0, SIZE.1), 1))
    }

    fn draw<Y>(
        &self,
        root: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
        steps: std::ops::Range<u64>,
        values: Y,
        logarithmic: bool,
    ) -> std::result::Result<(), String>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let failed = |error: DrawingAreaErrorKind<std::io::Error>| error.to_string();
        let text = |size: u32, ink: u8| ("sans-serif", size * FINE).into_font().color(&RGBColor(ink, ink, ink));
        let mut chart = ChartBuilder::on(root)
            .margin(16 * FINE)
            .caption(self.title, text(22, 40))
            .x_label_area_size(48 * FINE)
            .y_label_area_size(76 * FINE)
            .build_cartesian_2d(steps, values)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc(self.quantity)
            .y_label_formatter(&|value| number(*value))
            .label_style(text(14, 70))
            .axis_desc_style(text(16, 40))
            .axis_style(RGBColor(120, 120, 120).stroke_width(FINE))
            .bold_line_style(RGBColor(222, 222, 222).stroke_width(FINE))
            .light_line_style(RGBColor(243, 243, 243).stroke_width(FINE))
            .max_light_lines(if logarithmic { 10 } else { 1 })
            .set_all_tick_mark_size(6 * FINE)
            .x_labels(10)
            .y_labels(8)
            .draw()
            .map_err(failed)?;
        let smooth = smoothed(self.points);
        let runs = runs(self.points);
        let thin = RAW.stroke_width(FINE);
        let thick = SMOOTH.stroke_width(2 * FINE);
        for run in &runs {
            chart.draw_series(LineSeries::new(thinned(&self.points[run.clone()]), thin)).map_err(failed)?;
        }
        for run in &runs {
            let points = thinned(&smooth[run.clone()]);
            if let [point] = points[..] {
                chart.draw_series([Circle::new(point, 3 * FINE, SMOOTH.filled())]).map_err(failed)?;
            }
            chart.draw_series(LineSeries::new(points, thick)).map_err(failed)?;
        }
        if self.points.len() >= 100 {
            let sample = |style| {
                let length = (20 * FINE) as i32;
                move |(x, y): (i32, i32)| PathElement::new([(x, y), (x + length, y)], style)
            };
            for (label, style) in [("each step", RAW.stroke_width(2 * FINE)), ("smoothed", thick)] {
                let nothing = std::iter::empty::<(u64, f64)>();
                let series = chart.draw_series(LineSeries::new(nothing, style)).map_err(failed)?;
                series.label(label).legend(sample(style));
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .margin(10 * FINE)
                .legend_area_size(24 * FINE)
                .label_font(text(14, 70))
                .background_style(WHITE.mix(0.8))
                .draw()
                .map_err(failed)?;
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

/// An exponential mean to both sides, over about a fiftieth of the curve, so that it does not lag; gaps do not count.
fn smoothed(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let decay = 1.0 - 1.0 / (points.len() as f64 / 100.0).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mut add = |value: f64| {
        (sum, weight) = (decay * sum, decay * weight);
        if value.is_finite() {
            (sum, weight) = (sum + value, weight + 1.0);
        }
        (sum, weight)
    };
    let mut out: Vec<(f64, f64)> = points.iter().map(|point| add(point.1)).collect();
    (sum, weight) = (0.0, 0.0);
    for (both, &(_, value)) in out.iter_mut().zip(points).rev() {
        // What comes after, without the point itself.
        *both = (both.0 + decay * sum, both.1 + decay * weight);
        (sum, weight) = (decay * sum, decay * weight);
        if value.is_finite() {
            (sum, weight) = (sum + value, weight + 1.0);
        }
    }
    let mean = |(sum, weight): (f64, f64)| if weight > 0.0 { sum / weight } else { f64::NAN };
    points.iter().zip(out).map(|(point, both)| (point.0, mean(both))).collect()
}

/// At most about [`POINTS`] points: of each stretch the least and the greatest, in their order, so that peaks stay.
fn thinned(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    if points.len() <= POINTS {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(POINTS / 2);
    let mut out = Vec::with_capacity(POINTS + 2);
    for part in points.chunks(stretch) {
        let by = |a: &&(u64, f64), b: &&(u64, f64)| a.1.total_cmp(&b.1);
        let (Some(least), Some(greatest)) = (part.iter().min_by(by), part.iter().max_by(by)) else { continue };
        let (before, after) = if least.0 <= greatest.0 { (least, greatest) } else { (greatest, least) };
        out.push(*before);
        if before.0 != after.0 {
            out.push(*after);
        }
    }
    out
}
