//! What the daemon itself takes, whatever its sandboxes do: processor time of a request at one shard and at
//! two, the time that a second shard adds to a request, and what a daemon takes that nobody asks anything.
//!
//! Called by `mica bench scale`. The stand-in takes the place of VMs. What is compared is measured in turns.
//! Refuses every answer but the one expected, and to judge.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mica_units::{SandboxId, ShardCount, ShardId};
use serde_json::json;

use super::client::Client;
use super::handover;
use super::series::percentile;
use super::standin::{Daemon, create};

/// Connections to each shard. All of them ask at once, so a shard has as much to do when it wakes whether it has
/// another beside it or not: what a wake-up costs is shared by as many requests.
const OF_SHARD: usize = 16;
/// Connections that are made until each shard has its share: the kernel deals them out.
const CONNECTIONS_MAX: usize = 400;
/// Requests that show which shard serves a connection.
const TELLING_REQUESTS: usize = 100;
/// Connections of which each asks for both shards' sandboxes.
const CROSSING_CONNECTIONS: usize = 8;
/// Sandboxes that are made until each shard has one. That one has none is less likely than a broken
/// machine.
const DRAWS_MAX: usize = 64;
/// How long a daemon is left alone before it counts as idle.
const REST: Duration = Duration::from_secs(2);

/// How much is measured, and of what.
#[derive(Clone, Debug)]
pub struct Config {
    /// The daemon.
    pub mica: PathBuf,
    /// The stand-in for `mica-vm`.
    pub standin: PathBuf,
    /// Turns of each daemon.
    pub rounds: usize,
    /// Requests of one turn.
    pub requests: usize,
    /// Sandboxes made in one turn.
    pub creates: usize,
    /// Requests to each of two shards, of one connection.
    pub pairs: usize,
    /// How long an idle daemon is watched.
    pub idle: Duration,
    /// The daemons' `--cpu-latency-us`.
    pub cpu_latency: Option<String>,
}

/// One figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Its name in the results.
    pub name: &'static str,
    /// How much.
    pub value: f64,
    /// Of what.
    pub unit: &'static str,
    /// The most that is wanted, where something is.
    pub wanted_max: Option<f64>,
}

/// Measures everything.
///
/// # Errors
/// When a daemon does not come up, or answers anything but success.
pub fn measure(config: &Config) -> Result<Vec<Figure>> {
    let start = |shards| {
        Daemon::start_with(&config.mica, &config.standin, shards, config.cpu_latency.as_deref())
    };
    let (one, two) = (start(1)?, start(2)?);
    let handed_over = handover::p50()?.map(|took| figure("hand_over_p50", us(took), "us", None));
    let mut found: Vec<Figure> = handed_over.into_iter().collect();
    idle(&two, config.idle, &mut found)?;
    let mut pair = [Side::of(&one, 1)?, Side::of(&two, 2)?];
    let health = in_turns(&mut pair, config, |side| side.ask_health(config.requests))?;
    ratio(["health_cpu_1_shard", "health_cpu_2_shards", "health_cpu_ratio"], health, &mut found);
    let creates = in_turns(&mut pair, config, |side| side.make(config.creates))?;
    ratio(["create_cpu_1_shard", "create_cpu_2_shards", "create_cpu_ratio"], creates, &mut found);
    drop(pair);
    crossing(&two, config.pairs, &mut found)?;
    Ok(found)
}

/// The figures, as a person reads them.
///
/// # Errors
/// None that can happen: text takes all that is written.
pub fn table(figures: &[Figure]) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "{:<24}{:>12} {:<8}{:>8}", "figure", "measured", "", "wanted")?;
    for Figure { name, value, unit, wanted_max } in figures {
        let wanted = wanted_max.map_or_else(String::new, |most| format!("<= {most}"));
        writeln!(text, "{name:<24}{value:>12.2} {unit:<8}{wanted:>8}")?;
    }
    Ok(text)
}

/// The same for programs.
#[must_use]
pub fn rows(figures: &[Figure]) -> serde_json::Value {
    let row = |figure: &Figure| {
        json!({
            "figure": figure.name,
            "value": figure.value,
            "unit": figure.unit,
            "wanted_max": figure.wanted_max,
        })
    };
    figures.iter().map(row).collect()
}

fn figure(name: &'static str, value: f64, unit: &'static str, wanted_max: Option<f64>) -> Figure {
    Figure { name, value, unit, wanted_max }
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// A daemon and who asks it.
struct Side<'d> {
    daemon: &'d Daemon,
    clients: Vec<Client>,
    made: Vec<String>,
}

impl<'d> Side<'d> {
    fn of(daemon: &'d Daemon, shards: usize) -> Result<Self> {
        let mut clients: Vec<Client> = Vec::new();
        let mut of_shard = vec![0; shards];
        for _ in 0..CONNECTIONS_MAX {
            let mut client = daemon.client()?;
            let home = if shards > 1 { home_of(daemon, &mut client)? } else { 0 };
            if of_shard[home] < OF_SHARD {
                of_shard[home] += 1;
                clients.push(client);
            }
            if clients.len() == OF_SHARD * shards {
                return Ok(Self { daemon, clients, made: Vec::new() });
            }
        }
        bail!("the kernel gave the shards {of_shard:?} connections")
    }

    /// About so many requests, all connections at once; how many they were.
    fn ask_health(&mut self, requests: usize) -> Result<usize> {
        let rounds = requests.div_ceil(self.clients.len());
        for _ in 0..rounds {
            for client in &mut self.clients {
                client.send("GET", "/health", b"")?;
            }
            for client in &mut self.clients {
                let (status, _) = client.receive()?;
                ensure!(status == 200, "GET /health gave {status}");
            }
        }
        Ok(rounds * self.clients.len())
    }

    /// So many sandboxes, one after the other, of one connection after the other.
    fn make(&mut self, sandboxes: usize) -> Result<usize> {
        for number in 0..sandboxes {
            let at = number % self.clients.len();
            self.made.push(create(&mut self.clients[at])?);
        }
        Ok(sandboxes)
    }

    /// Ends what was made: that is no part of any turn.
    fn clear(&mut self) -> Result<()> {
        for id in std::mem::take(&mut self.made) {
            self.clients[0].call("DELETE", &format!("/sandboxes/{id}"), b"", 204)?;
        }
        Ok(())
    }

    /// The processor time that the daemon takes for each of what is done.
    fn turn(&mut self, act: impl Fn(&mut Self) -> Result<usize>) -> Result<Duration> {
        let before = self.daemon.ran()?;
        let count = act(self)?;
        let took = self.daemon.ran()?.saturating_sub(before);
        self.clear()?;
        Ok(took / u32::try_from(count.max(1)).context("too many of one turn")?)
    }
}

/// The median of each side's turns. One turn more warms up.
fn in_turns(
    sides: &mut [Side<'_>; 2],
    config: &Config,
    act: impl Fn(&mut Side<'_>) -> Result<usize>,
) -> Result<[Duration; 2]> {
    let mut turns = [Vec::new(), Vec::new()];
    for round in 0..=config.rounds {
        // Each goes first as often as the other.
        for at in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
            let took = sides[at].turn(&act)?;
            if round > 0 {
                turns[at].push(took);
            }
        }
    }
    Ok(turns.map(|times| percentile(&times, 50)))
}

fn ratio(
    [first, second, ratio]: [&'static str; 3],
    [one, two]: [Duration; 2],
    found: &mut Vec<Figure>,
) {
    found.push(figure(first, us(one), "us", None));
    found.push(figure(second, us(two), "us", None));
    found.push(figure(ratio, us(two) / us(one), "times", Some(1.1)));
}

/// What one shard's sandboxes cost a client whose connection is another's.
fn crossing(daemon: &Daemon, pairs: usize, found: &mut Vec<Figure>) -> Result<()> {
    let shards = ShardCount::new(2).context("two is not zero")?;
    let mut clients =
        (0..CROSSING_CONNECTIONS).map(|_| daemon.client()).collect::<Result<Vec<_>>>()?;
    let mut of_shard: [Option<String>; 2] = [None, None];
    for _ in 0..DRAWS_MAX {
        let id = create(&mut clients[0])?;
        let parsed: SandboxId = id.parse().context("an id")?;
        let owner = usize::from(parsed.shard(shards) == ShardId::new(1));
        of_shard[owner].get_or_insert(id);
        if of_shard.iter().all(Option::is_some) {
            break;
        }
    }
    let [Some(first), Some(second)] = of_shard else { bail!("a shard got no sandbox") };
    let paths = [format!("/sandboxes/{first}"), format!("/sandboxes/{second}")];
    let (mut local, mut crossed) = (Vec::new(), Vec::new());
    for client in &mut clients {
        let home = home_of(daemon, client)?;
        for pair in 0..pairs {
            for is_local in if pair % 2 == 0 { [true, false] } else { [false, true] } {
                let path = &paths[if is_local { home } else { 1 - home }];
                let began = Instant::now();
                client.call("GET", path, b"", 200)?;
                if is_local { &mut local } else { &mut crossed }.push(began.elapsed());
            }
        }
    }
    let (local, crossed) = (us(percentile(&local, 50)), us(percentile(&crossed, 50)));
    found.push(figure("get_local_p50", local, "us", None));
    found.push(figure("get_crossed_p50", crossed, "us", None));
    found.push(figure("crossing_adds_p50", crossed - local, "us", Some(20.0)));
    Ok(())
}

/// The shard that serves a connection: the one whose threads run when something is asked on it.
fn home_of(daemon: &Daemon, client: &mut Client) -> Result<usize> {
    let ran = || -> Result<[Duration; 2]> {
        let threads = daemon.threads()?;
        let of = |name: &str| {
            threads.iter().filter(|(thread, _)| thread == name).map(|(_, ran)| *ran).sum()
        };
        Ok([of("shard-0"), of("shard-1")])
    };
    let before = ran()?;
    for _ in 0..TELLING_REQUESTS {
        client.call("GET", "/health", b"", 200)?;
    }
    let after = ran()?;
    let took = [0, 1].map(|shard| after[shard].saturating_sub(before[shard]));
    Ok(usize::from(took[1] > took[0]))
}

/// What a daemon takes that has no sandbox and no client.
fn idle(daemon: &Daemon, watched: Duration, found: &mut Vec<Figure>) -> Result<()> {
    thread::sleep(REST);
    let before = daemon.ran()?;
    thread::sleep(watched);
    let took = daemon.ran()?.saturating_sub(before);
    let share = took.as_secs_f64() / watched.as_secs_f64();
    found.push(figure("idle_share_of_a_core", share * 100.0, "%", Some(1.0)));
    let (all, own) = daemon.resident_bytes()?;
    // Two to the twentieth, and never above two to the fiftieth: no precision is lost.
    let mib = |bytes: u64| Duration::from_micros(bytes >> 10).as_secs_f64() * 1e6 / 1024.0;
    found.push(figure("idle_resident", mib(all), "MiB", Some(60.0)));
    found.push(figure("idle_resident_anonymous", mib(own), "MiB", None));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_stands_beside_what_it_is_of() {
        let mut found = Vec::new();
        ratio(["a", "b", "c"], [Duration::from_micros(20), Duration::from_micros(25)], &mut found);
        let values: Vec<_> = found.iter().map(|figure| figure.value).collect();
        assert_eq!(values, [20.0, 25.0, 1.25]);
        let text = table(&found).unwrap();
        let row = text.lines().last().unwrap_or_default();
        assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["c", "1.25", "times", "<=", "1.1"]);
        assert_eq!(rows(&found)[2]["wanted_max"], 1.1);
    }
}
