//! `languages`: what code waits for, by language: the first cell of a fresh sandbox, and cells of a warm kernel.
//!
//! `cold_hello` is a create and a first "Hello World", `first_hello` is that cell alone, `hello` the same in a kernel that
//! ran it before, `fibonacci` a small computation. `memory` is what such a sandbox takes beyond one that ran nothing, where
//! the host shows it. A row that cannot be measured is there all the same, and says why: so are all rows of a language that
//! the template has no kernel for. Refuses a cell that does not say what it must.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::super::guest::{Cell, cell, cell_that_says, interpreter, says};
use super::super::host::{Host, Sandbox, Timed};
use super::super::load::{Failures, Round};
use super::super::row::Row;
use super::super::table::Table;
use super::Measure;
use crate::engine::client::Client;

/// What a first cell must write.
const HELLO: &str = "Hello World";
/// `fibonacci(10)`.
const FIBONACCI: &str = "55";
/// What a language has rows of, in their order.
const ROWS: [&str; 5] = ["cold_hello", "first_hello", "hello", "fibonacci", MEMORY];
const MEMORY: &str = "memory";
/// Why a row has no figures.
const MISSING: &str = "missing";

/// A language that SoulBox's report measures, or that a template may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Language {
    /// CPython.
    Python,
    /// Deno's kernel.
    Javascript,
    /// The same.
    Typescript,
    /// The bash kernel.
    Bash,
    /// IRkernel.
    R,
    /// The kernel whose cells are programs in Go.
    Go,
    /// A Java kernel.
    Java,
}

impl Language {
    fn name(self) -> &'static str {
        match self {
            Self::Python => "python",
            Self::Javascript => "javascript",
            Self::Typescript => "typescript",
            Self::Bash => "bash",
            Self::R => "r",
            Self::Go => "go",
            Self::Java => "java",
        }
    }

    fn hello(self) -> &'static str {
        match self {
            Self::Python => "print('Hello World')",
            Self::Javascript | Self::Typescript => "console.log('Hello World')",
            Self::Bash => "echo 'Hello World'",
            Self::R => "cat('Hello World\\n')",
            Self::Go => {
                "package main\n\nimport \"fmt\"\n\nfunc main() { fmt.Println(\"Hello World\") }"
            }
            Self::Java => "System.out.println(\"Hello World\");",
        }
    }

    fn fibonacci(self) -> &'static str {
        match self {
            Self::Python => {
                "def fibonacci(n):\n    return n if n <= 1 else fibonacci(n - 1) + fibonacci(n - 2)\n\
                 print(fibonacci(10))"
            }
            Self::Javascript => {
                "{ const f = (n) => n <= 1 ? n : f(n - 1) + f(n - 2); console.log(f(10)) }"
            }
            Self::Typescript => {
                "{ const f = (n: number): number => n <= 1 ? n : f(n - 1) + f(n - 2); console.log(f(10)) }"
            }
            Self::Bash => {
                "f() { local n=$1 a=0 b=1; while ((n-- > 0)); do ((b += a, a = b - a)); done; echo $a; }; f 10"
            }
            Self::R => "f <- function(n) if (n <= 1) n else f(n - 1) + f(n - 2); cat(f(10), '\\n')",
            Self::Go => {
                "package main\n\nimport \"fmt\"\n\nfunc f(n int) int { if n <= 1 { return n }; return f(n-1) + f(n-2) }\n\n\
                 func main() { fmt.Println(f(10)) }"
            }
            Self::Java => {
                "int f(int n) { return n <= 1 ? n : f(n - 1) + f(n - 2); }\nSystem.out.println(f(10));"
            }
        }
    }
}

/// Code, by language.
#[derive(Args, Debug)]
pub struct Languages {
    /// Which; several, separated by commas.
    #[arg(short, long, value_name = "NAME", value_delimiter = ',', value_enum,
        default_values_t = Language::value_variants().iter().copied())]
    languages: Vec<Language>,
    /// Fresh sandboxes of each.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,
    /// Warm cells of each kind in each sandbox, after one that is discarded.
    #[arg(long, value_name = "N", default_value_t = 20,
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    cells: u32,
}

/// The rows of one language.
struct Rows {
    cold: Row,
    first: Row,
    hello: Row,
    fibonacci: Row,
    memory: Memory,
}

/// Bytes of sandboxes, where the host shows them.
#[derive(Debug, Default)]
struct Memory {
    /// Of one that has run nothing.
    before: Option<u64>,
    /// Of those whose cells have run.
    after: Vec<u64>,
    /// Why one was not to be seen.
    unseen: Option<String>,
}

impl Measure for Languages {
    fn name(&self) -> &'static str {
        "languages"
    }

    fn options(&self) -> Value {
        let names: Vec<&str> = self.languages.iter().map(|language| language.name()).collect();
        json!({ "languages": names, "rounds": self.rounds, "cells": self.cells })
    }

    fn measure(&self, host: &Host, table: &mut Table) -> Result<()> {
        for language in &self.languages {
            self.language(host, table, *language)?;
        }
        Ok(())
    }
}

impl Languages {
    fn language(&self, host: &Host, table: &mut Table, language: Language) -> Result<()> {
        let row = |what| row_of(what, language);
        let [cold, first, hello, fibonacci, memory] = ROWS.map(row);
        let mut rows = Rows { cold, first, hello, fibonacci, memory: Memory::default() };
        for number in 0..=self.rounds {
            host.go_on()?;
            let mut client = host.client()?;
            let made = host.create(&mut client, &host.address.template);
            let (begun, created) = (made.begun, made.took);
            let sandbox = made.value?;
            if number == 0 {
                rows.memory.before = rows.memory.look(host, &sandbox);
            }
            let first = first_cell(host, &sandbox, language)?;
            if let Ok(Cell::NoKernel(said)) = &first.value {
                missing(language, said.trim()).into_iter().for_each(|row| table.push(row));
                host.kill(&mut client, &sandbox.id).value?;
                host.give_back(client);
                return Ok(());
            }
            let took = first.took;
            let ran = first.and_then(|cell| says(&cell, HELLO));
            if number > 0 {
                let cold = Timed { begun, took: created + took, value: same(&ran.value) };
                rows.cold.add(one(cold));
                rows.first.add(one(ran));
                self.warm(host, &sandbox, language, &mut rows)?;
                let seen = rows.memory.look(host, &sandbox);
                rows.memory.after.extend(seen);
            } else if let Err(error) = ran.value {
                bail!("warm up: {error:#}");
            }
            host.kill(&mut client, &sandbox.id).value?;
            host.give_back(client);
        }
        let Rows { cold, first, hello, fibonacci, memory: seen } = rows;
        [cold, first, hello, fibonacci].into_iter().for_each(|row| table.push(row));
        table.push(seen.row(memory));
        Ok(())
    }

    /// Cells of a kernel that ran one.
    fn warm(
        &self,
        host: &Host,
        sandbox: &Sandbox,
        language: Language,
        rows: &mut Rows,
    ) -> Result<()> {
        let mut client = interpreter(host, sandbox)?;
        for (row, code, wanted) in [
            (&mut rows.hello, language.hello(), HELLO),
            (&mut rows.fibonacci, language.fibonacci(), FIBONACCI),
        ] {
            for number in 0..=self.cells {
                host.go_on()?;
                let ran = again(&mut client, host, sandbox, language, code, wanted)?;
                if number > 0 {
                    row.add(one(ran));
                }
            }
        }
        Ok(())
    }
}

impl Memory {
    /// What a sandbox takes, where that can be seen.
    fn look(&mut self, host: &Host, sandbox: &Sandbox) -> Option<u64> {
        let seen = host.memory_of(sandbox);
        seen.inspect_err(|error| self.unseen = Some(format!("not to be seen: {error:#}"))).ok()
    }

    /// As a row, which has bytes and no times.
    fn row(&self, mut row: Row) -> Row {
        let Some((count, mean, before)) = self.figures() else {
            let why = self.unseen.as_deref().unwrap_or("no sandbox was looked at before and after");
            row.seed = None;
            row.set(MISSING, why);
            return row;
        };
        row.set("sandboxes", count);
        row.set("bytes", mean);
        row.set("bytes_before", before);
        row.set("bytes_overhead", mean - before);
        row
    }

    /// How many there were, what they took in the mean, and what one took before.
    fn figures(&self) -> Option<(u64, i64, i64)> {
        let count = u64::try_from(self.after.len()).ok().filter(|count| *count > 0)?;
        let mean = i64::try_from(self.after.iter().sum::<u64>() / count).ok()?;
        Some((count, mean, i64::try_from(self.before?).ok()?))
    }
}

fn row_of(what: &str, language: Language) -> Row {
    Row::new(&format!("{what}_{}", language.name()), String::new(), 1).beside(0, 0)
}

/// Every row of a language that there is no kernel for.
fn missing(language: Language, why: &str) -> [Row; 5] {
    ROWS.map(|what| {
        let mut row = row_of(what, language);
        // What another has of it is beside nothing.
        row.seed = None;
        row.set(MISSING, why);
        row
    })
}

/// A cell; one that fails is counted, and the next has a connection of its own if it broke.
fn again(
    client: &mut Client,
    host: &Host,
    sandbox: &Sandbox,
    language: Language,
    code: &str,
    wanted: &str,
) -> Result<Timed<()>> {
    if !client.is_open() {
        *client = interpreter(host, sandbox)?;
    }
    Ok(cell_that_says(client, language.name(), code, wanted))
}

/// The first cell of a sandbox, its connection included: that is what a client waits for.
fn first_cell(host: &Host, sandbox: &Sandbox, language: Language) -> Result<Timed<Cell>> {
    let begun = std::time::Instant::now();
    let mut client = interpreter(host, sandbox)?;
    let ran = cell(&mut client, language.name(), language.hello());
    Ok(Timed { begun, took: begun.elapsed(), value: ran.value })
}

fn same(value: &Result<()>) -> Result<()> {
    value.as_ref().copied().map_err(|error| anyhow::anyhow!("{error:#}"))
}

/// A round of one.
fn one(timed: Timed<()>) -> Round<()> {
    let mut failures = Failures::default();
    let wall: Duration = timed.took;
    match timed.value {
        Ok(()) => Round { wall, times: vec![wall], values: vec![()], failures },
        Err(error) => {
            failures.add(&error);
            Round { wall, times: Vec::new(), values: Vec::new(), failures }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        languages: Languages,
    }

    #[test]
    fn memory_of_a_language_is_what_its_cells_made_it_more() {
        let of = |before, after, unseen: Option<&str>| {
            Memory { before, after, unseen: unseen.map(str::to_owned) }.row(Row::default()).more
        };
        let more = of(Some(100), vec![120, 160], None);
        let fields = ["sandboxes", "bytes", "bytes_before", "bytes_overhead"];
        assert_eq!(fields.map(|name| more[name].clone()), [2, 140, 100, 40].map(|n| json!(n)));
        assert_eq!(of(None, vec![1], Some("no"))[MISSING], "no");
        let none = of(Some(1), Vec::new(), None);
        assert_eq!(none[MISSING], "no sandbox was looked at before and after");
    }

    #[test]
    fn a_language_without_a_kernel_has_every_row_with_the_reason() {
        let rows = missing(Language::Java, "no kernel java");
        let ops = rows.each_ref().map(|row| row.op.as_str());
        let wanted =
            ["cold_hello_java", "first_hello_java", "hello_java", "fibonacci_java", "memory_java"];
        assert_eq!(ops, wanted);
        assert!(rows.iter().all(|row| row.more[MISSING] == "no kernel java" && row.seed.is_none()));
        assert!(missing(Language::Python, "x").iter().all(|row| row.seed.is_none()));
        assert!(row_of("hello", Language::R).more.is_empty());
    }

    #[test]
    fn every_language_that_there_are_kernels_of_is_measured() {
        let usual = Cli::try_parse_from(["languages"]).unwrap().languages;
        let names = ["python", "javascript", "typescript", "bash", "r", "go", "java"];
        assert_eq!(usual.options()["languages"], json!(names));
    }
}
