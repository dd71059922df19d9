//! Ratios from interleaved pairs.

use serde::Serialize;

/// A target, measured.
#[derive(Debug, Serialize)]
pub(crate) struct Measured {
    id: &'static str,
    what: String,
    /// Median of ours and of the twin, in `unit`.
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
        println!(
            "{id}  {ratio:.2} ({low:.2} to {high:.2}), target {target:.2}: {verdict}\n    {what}\n    ours {ours:.1}, twin {twin:.1} {unit}"
        );
        Ok(())
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> f64 {
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
    }
}
