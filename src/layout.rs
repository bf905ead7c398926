//! The options that say where shards and guests sit, parsed into the planner's wishes.
//!
//! Called by `config` for `mica serve` and by `mica topology`, which have the same. Refuses what is
//! no number and no list; whether the machine can do it is the planner's to say.

use clap::{Args, ValueEnum};
use mica_numa::{CpuList, MemoryPolicy, PlanConfig, Reserved, Shards, Smt, VcpuPin};

const LAYOUT: &str = "Layout: see docs/tuning.md";

/// Where shards and guests sit.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = LAYOUT)]
pub struct PlanArgs {
    /// Number of shards on the whole machine. Default: a quarter of the cores of each node.
    #[arg(long, value_name = "N", conflicts_with_all = ["shards_per_node", "shard_fraction", "shard_cpus"])]
    shards: Option<u16>,
    /// Number of shards on each memory node.
    #[arg(long, value_name = "N", conflicts_with_all = ["shard_fraction", "shard_cpus"])]
    shards_per_node: Option<u16>,
    /// Part of each node's cores that carry shards, such as 0.25; at least one core.
    #[arg(long, value_name = "PART", value_parser = thousandths, conflicts_with = "shard_cpus")]
    shard_fraction: Option<u16>,
    /// Hardware threads that carry one shard each, such as 0-3,24-27.
    #[arg(long, value_name = "LIST")]
    shard_cpus: Option<CpuList>,
    /// What the other hardware threads of a shard's core do.
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = SmtArg::Avoid)]
    smt: SmtArg,
    /// Cores of each memory node that get no role and are left to the system.
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "reserved_cpus")]
    reserved_per_node: u16,
    /// Hardware threads that get no role and are left to the system, such as 0,24.
    #[arg(long, value_name = "LIST")]
    reserved_cpus: Option<CpuList>,
    /// Hardware threads that run vCPUs. Default: all that are not reserved and not a shard's.
    #[arg(long, value_name = "LIST")]
    vcpu_cpus: Option<CpuList>,
    /// Where the threads of a sandbox may run.
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = PinArg::Node)]
    vcpu_pin: PinArg,
    /// Where the memory of a sandbox may lie.
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = MemoryArg::Preferred)]
    memory: MemoryArg,
}

#[derive(ValueEnum, Clone, Copy, Debug, Default)]
enum SmtArg {
    /// Nothing: the core is the shard's alone.
    #[default]
    Avoid,
    /// They run the shard's blocking threads.
    Pair,
    /// Each hardware thread is a place of its own, for a shard or for vCPUs.
    Use,
}

#[derive(ValueEnum, Clone, Copy, Debug, Default)]
enum PinArg {
    /// On the vCPUs' hardware threads of its node.
    #[default]
    Node,
    /// Each vCPU on one hardware thread of its node.
    Core,
    /// On the vCPUs' hardware threads of every node.
    None,
}

#[derive(ValueEnum, Clone, Copy, Debug, Default)]
enum MemoryArg {
    /// On its node only; where that is full, the sandbox that asks for more ends.
    Bind,
    /// On its node while there is room, then on others.
    #[default]
    Preferred,
}

impl PlanArgs {
    /// The wishes, as the planner takes them.
    #[must_use]
    pub fn config(&self) -> PlanConfig {
        let shards = match (self.shards, self.shards_per_node, self.shard_fraction) {
            (Some(total), ..) => Shards::Total(total),
            (None, Some(each), _) => Shards::PerNode(each),
            (None, None, Some(part)) => Shards::Thousandths(part),
            (None, None, None) => self.shard_cpus.clone().map_or(Shards::Auto, Shards::On),
        };
        let reserved = self.reserved_cpus.clone();
        PlanConfig {
            shards,
            smt: match self.smt {
                SmtArg::Avoid => Smt::Avoid,
                SmtArg::Pair => Smt::Pair,
                SmtArg::Use => Smt::Use,
            },
            reserved: reserved.map_or(Reserved::PerNode(self.reserved_per_node), Reserved::On),
            vcpus: self.vcpu_cpus.clone(),
            pin: match self.vcpu_pin {
                PinArg::Node => VcpuPin::Node,
                PinArg::Core => VcpuPin::Core,
                PinArg::None => VcpuPin::None,
            },
            memory: match self.memory {
                MemoryArg::Bind => MemoryPolicy::Bind,
                MemoryArg::Preferred => MemoryPolicy::Preferred,
            },
        }
    }
}

/// `0.25` as 250. Through digits and not through a float, so that what is meant is what is taken.
fn thousandths(text: &str) -> Result<u16, String> {
    let error = || format!("{text:?} is not a part such as 0.25: above 0, at most 1");
    let (whole, digits) = text.split_once('.').unwrap_or((text, ""));
    if digits.len() > 3 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("{}, with three decimals at most", error()));
    }
    let whole: u16 = match whole {
        "" | "0" => 0,
        "1" => 1000,
        _ => return Err(error()),
    };
    let part: u16 = format!("{digits:0<3}").parse().map_err(|_| error())?;
    let sum = whole + part;
    if (1..=1000).contains(&sum) { Ok(sum) } else { Err(error()) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        plan: PlanArgs,
    }

    fn parsed(line: &str) -> Result<PlanConfig, String> {
        let words = std::iter::once("mica").chain(line.split_whitespace());
        Line::try_parse_from(words).map(|l| l.plan.config()).map_err(|error| error.to_string())
    }

    #[test]
    fn options_become_wishes() {
        assert_eq!(parsed("").unwrap(), PlanConfig::default());
        let all = parsed(
            "--shard-cpus 1,49 --smt use --reserved-cpus 0 --vcpu-cpus 2-9 --vcpu-pin core --memory bind",
        );
        let list = |text: &str| text.parse::<CpuList>().unwrap();
        let expected = PlanConfig {
            shards: Shards::On(list("1,49")),
            smt: Smt::Use,
            reserved: Reserved::On(list("0")),
            vcpus: Some(list("2-9")),
            pin: VcpuPin::Core,
            memory: MemoryPolicy::Bind,
        };
        assert_eq!(all.unwrap(), expected);
        assert_eq!(parsed("--shard-fraction 0.125").unwrap().shards, Shards::Thousandths(125));
        assert_eq!(parsed("--shards-per-node 2").unwrap().shards, Shards::PerNode(2));
        assert_eq!(parsed("--reserved-per-node 2").unwrap().reserved, Reserved::PerNode(2));
    }

    #[test]
    fn options_that_exclude_each_other_are_refused() {
        for line in [
            "--shards 1 --shards-per-node 1",
            "--shards 1 --shard-fraction 0.5",
            "--shards-per-node 1 --shard-cpus 0",
            "--shard-fraction 0.5 --shard-cpus 0",
            "--reserved-per-node 1 --reserved-cpus 0",
        ] {
            let said = parsed(line).unwrap_err();
            assert!(said.contains("cannot be used with"), "{line}: {said}");
        }
        assert!(parsed("--shard-cpus 0-x").unwrap_err().contains("such as 0-3"));
        assert!(parsed("--vcpu-pin socket").unwrap_err().contains("possible values"));
    }

    #[test]
    fn parts_are_above_0_and_at_most_1() {
        let good = [("0.25", 250), (".5", 500), ("1", 1000), ("1.0", 1000), ("0.001", 1)];
        for (text, expected) in good {
            assert_eq!(thousandths(text), Ok(expected), "{text}");
        }
        for text in ["", "0", "0.0", "1.001", "2", "-0.5", "0.1234", "0.2x", "1e-1", "NaN", "25%"] {
            assert!(thousandths(text).is_err(), "{text}");
        }
    }
}
