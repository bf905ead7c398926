//! What `--cpu-latency-us` of `mica serve` means, and who holds it.
//!
//! Called by the command line and by `serve`. Refuses a number that the kernel cannot hold, and to fail where
//! nobody asked for one: a daemon that may not keep cores awake serves all the same.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use mica_numa::latency::{CpuLatency, DenseLatency, limit_when_dense, takes_effect};
use mica_shards::HostConfig;

/// How long a core may take to leave its idle state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoreLatency {
    /// What suits the machine, while shards hand much over.
    Auto,
    /// What the machine is set to.
    Off,
    /// So many microseconds, always.
    Always(u32),
}

impl FromStr for CoreLatency {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            number => number
                .parse()
                .map(Self::Always)
                .map_err(|_| "give auto, off, or a number of microseconds".to_owned()),
        }
    }
}

impl fmt::Display for CoreLatency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Always(limit_us) => write!(f, "{limit_us}"),
        }
    }
}

impl CoreLatency {
    /// Holds what is to be held always, for as long as what it gives lives, and tells the shards what they
    /// are to hold now and then.
    ///
    /// # Errors
    /// When what was asked for cannot be held.
    pub fn hold(self, host: &mut HostConfig) -> Result<Option<CpuLatency>> {
        match self {
            Self::Off => Ok(None),
            Self::Auto => {
                host.dense_latency_us = limit_when_dense().filter(|limit_us| may_hold(*limit_us));
                Ok(None)
            }
            Self::Always(limit_us) => always(limit_us).map(Some),
        }
    }
}

/// Whether the kernel lets this daemon keep cores awake.
fn may_hold(limit_us: u32) -> bool {
    DenseLatency::new(limit_us)
        .inspect_err(|error| {
            tracing::warn!(
                %error,
                "cannot keep cores awake while much is handed over: /dev/cpu_dma_latency is root's; what \
                 crosses cores takes longer, and --cpu-latency-us off says that this is meant"
            );
        })
        .is_ok()
}

fn always(limit_us: u32) -> Result<CpuLatency> {
    if !takes_effect() {
        tracing::warn!(
            limit_us,
            "--cpu-latency-us has no effect: this kernel has no driver for idle states, and halts its cores"
        );
    }
    CpuLatency::hold(limit_us).context(
        "cannot hold --cpu-latency-us: the kernel takes it through /dev/cpu_dma_latency, which root may \
         write; give off to go without",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_was_read() {
        for text in ["auto", "off", "0", "250"] {
            assert_eq!(text.parse::<CoreLatency>().unwrap().to_string(), text);
        }
        for text in ["", "on", "-1", "2us", "4294967296"] {
            assert!(text.parse::<CoreLatency>().unwrap_err().contains("microseconds"), "{text}");
        }
    }
}
