//! Ratios from interleaved pairs, and figures beside what is allowed.

use serde::Serialize;

/// A target, measured.
#[derive(Debug, Serialize)]
pub(crate) struct Measured {
    id: &'static str,
    what: String,
    /// Median of ours and of the twin, or of what is allowed, in `unit`.
    ours: f64,
    twin: f64,
    unit: &'static str,
    /// Median of the pairs' ratios, and their lowest and highest.
    ratio: f64,
    spread: [f64; 2],
    target: f64,
    met: bool,
}

/// What was measured, pair by pair: ours and the twin.
#[derive(Debug, Default)]
pub(crate) struct Pairs(Vec<(f64, f64)>);

impl Pairs {
    pub(crate) fn push(&mut self, ours: f64, twin: f64) {
        self.0.push((ours, twin));
    }

    /// Figures that should be at most `allowed`, which stands in the twin's place.
    pub(crate) fn limit(allowed: f64, figures: impl IntoIterator<Item = f64>) -> Self {
        Self(figures.into_iter().map(|figure| (figure, allowed)).collect())
    }

    /// The ratio of rates, which should be at least `target`.
    pub(crate) fn at_least(&self, id: &'static str, what: String, unit: &'static str, target: f64) -> Measured {
        self.measure(id, what, unit, target, |ratio| ratio >= target)
    }

    /// The ratio of costs, which should be at most `target`.
    pub(crate) fn at_most(&self, id: &'static str, what: String, unit: &'static str, target: f64) -> Measured {
        self.measure(id, what, unit, target, |ratio| ratio <= target)
    }

    fn measure(
        &self,
        id: &'static str,
        what: String,
        unit: &'static str,
        target: f64,
        meets: impl Fn(f64) -> bool,
    ) -> Measured {
        let ratios = sorted(self.0.iter().map(|(ours, twin)| ours / twin));
        let ratio = median(&ratios);
        Measured {
            id,
            what,
            ours: median(&sorted(self.0.iter().map(|(ours, _)| *ours))),
            twin: median(&sorted(self.0.iter().map(|(_, twin)| *twin))),
            unit,
            ratio,
            spread: [ratios.first().copied().unwrap_or(ratio), ratios.last().copied().unwrap_or(ratio)],
            target,
            met: meets(ratio),
        }
    }
}

impl Measured {
    pub(crate) fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            println!("{}", serde_json::to_string(self)?);
            return Ok(());
        }
        let Self { id, what, ours, twin, unit, ratio, spread: [low, high], target, met } = self;
        let verdict = if *met { "met" } else { "MISSED" };
        let (ours, twin) = (figure(*ours), figure(*twin));
        println!(
            "{id}  {ratio:.2} ({low:.2} to {high:.2}), target {target:.2}: {verdict}\n    {what}\n    ours {ours}, twin {twin} {unit}"
        );
        Ok(())
    }
}

/// With as many digits as say something.
fn figure(value: f64) -> String {
    if value.abs() < 10.0 { format!("{value:.3}") } else { format!("{value:.1}") }
}

pub(crate) fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Of values that are sorted.
pub(crate) fn median(sorted: &[f64]) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => sorted[len / 2],
        len => f64::midpoint(sorted[len / 2 - 1], sorted[len / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_the_ratios_decides() {
        let mut pairs = Pairs::default();
        for (ours, twin) in [(80.0, 100.0), (10.0, 100.0), (90.0, 100.0)] {
            pairs.push(ours, twin);
        }
        let measured = pairs.at_least("R0", String::new(), "events/s", 0.75);
        assert_eq!((measured.ratio, measured.spread, measured.met), (0.8, [0.1, 0.9], true));
        assert_eq!(median(&[1.0, 3.0]), 2.0);
        let measured = Pairs::limit(5.0, [4.0, 6.0, 2.0]).at_most("R0", String::new(), "s", 1.0);
        assert_eq!((measured.ours, measured.ratio, measured.met), (4.0, 0.8, true));
    }
}
