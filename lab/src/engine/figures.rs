//! Figures that are taken again in every round: what each came to, and between what its rounds lie.
//!
//! Filled by `scale`, printed and written by `mica bench scale`. What is wanted of a figure is in
//! `bench::promises`. Refuses to judge.

use std::fmt::Write as _;

use anyhow::Result;
use serde_json::{Value, json};

use crate::bench::bootstrap::median;
use crate::bench::document::Document;
use crate::bench::promises::{OF_ROUNDS, most};

/// The command whose report has them.
const REPORT: &str = "scale";

/// One figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Its name in the results.
    pub name: &'static str,
    /// Of what.
    pub unit: &'static str,
    /// What it was in each round.
    pub of_rounds: Vec<f64>,
}

impl Figure {
    /// The median of the rounds; of none it is zero.
    #[must_use]
    pub fn value(&self) -> f64 {
        median(self.of_rounds.clone()).unwrap_or_default()
    }
}

/// The figures of one run, in the order in which they began.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures(Vec<Figure>);

impl Figures {
    /// Takes what a figure was in one round more.
    pub fn add(&mut self, name: &'static str, value: f64, unit: &'static str) {
        match self.0.iter_mut().find(|figure| figure.name == name) {
            Some(figure) => figure.of_rounds.push(value),
            None => self.0.push(Figure { name, unit, of_rounds: vec![value] }),
        }
    }

    /// Every one.
    #[must_use]
    pub fn all(&self) -> &[Figure] {
        &self.0
    }

    /// As a person reads them.
    ///
    /// # Errors
    /// None that can happen: text takes all that is written.
    pub fn table(&self) -> Result<String> {
        let mut text = String::new();
        let head = ("figure", "measured", "wanted");
        writeln!(text, "{:<24}{:>12} {:<8}{:>8}  rounds", head.0, head.1, "", head.2)?;
        for figure in &self.0 {
            let Figure { name, unit, of_rounds } = figure;
            let wanted = most(REPORT, name).map_or_else(String::new, |most| format!("<= {most}"));
            let low = of_rounds.iter().copied().fold(f64::INFINITY, f64::min);
            let high = of_rounds.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let (value, rounds) = (figure.value(), of_rounds.len());
            writeln!(
                text,
                "{name:<24}{value:>12.3} {unit:<8}{wanted:>8}  {rounds}: {low:.3} to {high:.3}"
            )?;
        }
        Ok(text)
    }

    /// For programs. `host` is the machine.
    #[must_use]
    pub fn document(&self, options: &Value, host: Value) -> Document {
        let row = |figure: &Figure| {
            json!({
                "op": figure.name,
                "case": "",
                "n": figure.of_rounds.len(),
                "figure": figure.name,
                "value": figure.value(),
                "unit": figure.unit,
                "wanted_max": most(REPORT, figure.name),
                OF_ROUNDS: figure.of_rounds,
            })
        };
        let mut document = Document::new(REPORT, options, &[]);
        document.0["host"] = host;
        document.0["results"] = self.0.iter().map(row).collect();
        document
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::promises::judge;

    #[test]
    fn a_figure_is_the_median_of_its_rounds_and_has_them_beside_it() {
        let mut figures = Figures::default();
        for (ratio, us) in [(1.0, 3.0), (9.0, 4.0), (1.05, 5.0)] {
            figures.add("health_cpu_ratio", ratio, "times");
            figures.add("hand_over_p50", us, "us");
        }
        let text = figures.table().unwrap();
        let words =
            |at: usize| -> Vec<&str> { text.lines().nth(at).unwrap().split_whitespace().collect() };
        assert_eq!(
            words(1),
            ["health_cpu_ratio", "1.050", "times", "<=", "1.1", "3:", "1.000", "to", "9.000"]
        );
        assert_eq!(words(2), ["hand_over_p50", "4.000", "us", "3:", "3.000", "to", "5.000"]);
        let document = figures.document(&json!({}), json!({ "cores": 2 }));
        let rows: Vec<&Value> = document.rows().collect();
        assert_eq!((&rows[0]["value"], &rows[0]["wanted_max"]), (&json!(1.05), &json!(1.1)));
        assert_eq!((&rows[1]["wanted_max"], &rows[1]["n"]), (&Value::Null, &json!(3)));
        let judged = judge(&[Document::of(document.0).unwrap()]).unwrap();
        let kept: Vec<_> =
            judged.iter().filter(|one| one.is_kept()).map(|one| one.promise.op).collect();
        assert_eq!(kept, ["health_cpu_ratio"]);
    }
}
