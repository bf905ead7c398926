//! What the daemon itself takes, whatever its sandboxes do: processor time of a request at one shard and at
//! two, without metrics and with them, the time that a second shard adds to a request, and what a daemon takes that
//! nobody asks anything.
//!
//! Called by `mica bench scale`. The stand-in takes the place of VMs. What is compared is measured in turns, and all of it
//! once in each round, so that what the machine does for a while falls on one round of every figure. Refuses every answer
//! but the one expected, and to judge.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mica_units::{SandboxId, ShardCount, ShardId};

use super::client::Client;
use super::figures::Figures;
use super::handover::{self, pin};
use super::series::percentile;
use super::standin::{Daemon, create};
use crate::bench::bootstrap::median;

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
    /// Rounds: every figure is taken once in each.
    pub rounds: usize,
    /// Turns of each of two daemons, in a round, where requests are cheap.
    pub turns: usize,
    /// Requests of one turn.
    pub requests: usize,
    /// The same where sandboxes are made.
    pub create_turns: usize,
    /// Sandboxes made in one turn.
    pub creates: usize,
    /// Requests to each of two shards, of one connection, in a round.
    pub pairs: usize,
    /// How long an idle daemon is watched in a round.
    pub idle: Duration,
    /// The daemons' `--cpu-latency-us`.
    pub cpu_latency: Option<String>,
}

/// Measures everything.
///
/// # Errors
/// When a daemon does not come up, or answers anything but success.
pub fn measure(config: &Config) -> Result<Figures> {
    let start = |shards, more: &[&str]| {
        let latency = config.cpu_latency.as_deref().map(|said| format!("--cpu-latency-us={said}"));
        let more: Vec<&str> = latency.as_deref().into_iter().chain(more.iter().copied()).collect();
        Daemon::start_more(&config.mica, &config.standin, shards, &more)
    };
    // Nobody ever asks this one anything.
    let idle_one = start(2, &[])?;
    let (one, two) = (start(1, &[])?, start(2, &[])?);
    let (off, on) = (start(1, &["--metrics=off"])?, start(1, &["--metrics=on"])?);
    let mut shards = [Side::of(&one, 1)?, Side::of(&two, 2)?];
    let mut metrics = [Side::of(&off, 1)?, Side::of(&on, 1)?];
    let mut found = Figures::default();
    thread::sleep(REST);
    for _ in 0..config.rounds {
        if let Some(took) = handover::p50()? {
            found.add("hand_over_p50", us(took), "us");
        }
        idle(&idle_one, config.idle, &mut found)?;
        let ask = |side: &mut Side<'_>| side.ask_health(config.requests);
        let health = in_turns(&mut shards, config.turns, ask)?;
        let names = ["health_cpu_1_shard", "health_cpu_2_shards", "health_cpu_ratio"];
        compare(names, &health, &mut found);
        let make = |side: &mut Side<'_>| side.make(config.creates);
        let creates = in_turns(&mut shards, config.create_turns, make)?;
        let names = ["create_cpu_1_shard", "create_cpu_2_shards", "create_cpu_ratio"];
        compare(names, &creates, &mut found);
        let counted = in_turns(&mut metrics, config.turns, ask)?;
        compare(["metrics_off_cpu", "metrics_on_cpu", "metrics_cpu_ratio"], &counted, &mut found);
        crossing(&two, config.pairs, &mut found)?;
    }
    Ok(found)
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

/// What each side took, in each of so many turns. One turn more warms up.
fn in_turns(
    sides: &mut [Side<'_>; 2],
    count: usize,
    act: impl Fn(&mut Side<'_>) -> Result<usize>,
) -> Result<Vec<[Duration; 2]>> {
    let mut turns = Vec::with_capacity(count);
    for turn in 0..=count {
        let mut took = [Duration::ZERO; 2];
        // Each goes first as often as the other.
        for at in if turn % 2 == 0 { [0, 1] } else { [1, 0] } {
            took[at] = sides[at].turn(&act)?;
        }
        if turn > 0 {
            turns.push(took);
        }
    }
    Ok(turns)
}

/// The medians of both sides, and that of the ratios: the two of one turn were taken right after each other, so that
/// most of what the machine did is in both.
fn compare(names: [&'static str; 3], turns: &[[Duration; 2]], found: &mut Figures) {
    for (at, name) in [names[0], names[1]].into_iter().enumerate() {
        let times: Vec<Duration> = turns.iter().map(|turn| turn[at]).collect();
        found.add(name, us(percentile(&times, 50)), "us");
    }
    let ratios = turns.iter().map(|[first, second]| us(*second) / us(*first)).collect();
    if let Some(ratio) = median(ratios) {
        found.add(names[2], ratio, "times");
    }
}

/// How long a client waited for the sandbox of its connection's shard, and for the other's, in turns.
fn waits(client: &mut Client, [own, other]: [&str; 2], pairs: usize) -> Result<[Vec<Duration>; 2]> {
    let mut times = [Vec::with_capacity(pairs), Vec::with_capacity(pairs)];
    for pair in 0..pairs {
        for is_own in if pair % 2 == 0 { [true, false] } else { [false, true] } {
            let began = Instant::now();
            client.call("GET", if is_own { own } else { other }, b"", 200)?;
            times[usize::from(!is_own)].push(began.elapsed());
        }
    }
    Ok(times)
}

/// What one shard's sandboxes cost a client whose connection is another's. The client is on the core of its
/// connection's shard, which waits for nobody while the client works: left to the scheduler it would be on the other
/// shard's, where there are but two, in some rounds and not in others, and keep that shard waiting.
fn crossing(daemon: &Daemon, pairs: usize, found: &mut Figures) -> Result<()> {
    let shards = ShardCount::new(2).context("two is not zero")?;
    let mut clients =
        (0..CROSSING_CONNECTIONS).map(|_| daemon.client()).collect::<Result<Vec<_>>>()?;
    let mut made = Vec::new();
    let mut of_shard: [Option<String>; 2] = [None, None];
    for _ in 0..DRAWS_MAX {
        let id = create(&mut clients[0])?;
        made.push(id.clone());
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
        let core = daemon.core_of_shard(home)?;
        let asked = thread::scope(|scope| {
            let asking = scope.spawn(|| {
                pin(core)?;
                waits(client, [&paths[home], &paths[1 - home]], pairs)
            });
            asking.join().ok().context("a client panicked")?
        });
        let [own, other] = asked?;
        local.extend(own);
        crossed.extend(other);
    }
    // The next round's other figures are of a daemon without sandboxes.
    for id in made {
        clients[0].call("DELETE", &format!("/sandboxes/{id}"), b"", 204)?;
    }
    let (local, crossed) = (us(percentile(&local, 50)), us(percentile(&crossed, 50)));
    found.add("get_local_p50", local, "us");
    found.add("get_crossed_p50", crossed, "us");
    found.add("crossing_adds_p50", crossed - local, "us");
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
fn idle(daemon: &Daemon, watched: Duration, found: &mut Figures) -> Result<()> {
    let (before, begun) = (daemon.ran()?, Instant::now());
    thread::sleep(watched);
    let took = daemon.ran()?.saturating_sub(before);
    let share = took.as_secs_f64() / begun.elapsed().as_secs_f64();
    found.add("idle_share_of_a_core", share * 100.0, "%");
    let (all, own) = daemon.resident_bytes()?;
    found.add("idle_resident", megabytes(all), "MB");
    found.add("idle_resident_anonymous", megabytes(own), "MB");
    Ok(())
}

/// Millions of bytes, to a kilobyte.
fn megabytes(bytes: u64) -> f64 {
    Duration::from_millis(bytes / 1000).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_of_turns_and_not_of_medians() {
        let us = Duration::from_micros;
        let mut found = Figures::default();
        // The machine is twice as slow in every other turn; the second side takes a quarter more in all but one.
        compare(
            ["a", "b", "c"],
            &[
                [us(20), us(25)],
                [us(40), us(50)],
                [us(20), us(80)],
                [us(40), us(50)],
                [us(40), us(50)],
            ],
            &mut found,
        );
        let values: Vec<_> = found.all().iter().map(|figure| figure.value()).collect();
        assert_eq!(values, [40.0, 50.0, 1.25]);
        assert!((megabytes(60_000_000) - 60.0).abs() < 1e-9);
    }
}
