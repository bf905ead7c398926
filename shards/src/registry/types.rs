//! What callers of the registry give it and get from it.
//!
//! Called by the registry and by its callers. Refuses, in `Ports`, a set that no host could serve.

use std::time::Duration;

use mica_units::ShardId;

use super::bits::{HOSTS_MAX, HostSet};

/// Ports that one sandbox can ask for on its host.
pub const PORTS_MAX: usize = 8;

/// Slots that one host can have.
pub const SLOTS_MAX: u32 = 65_536;

/// Templates that one host can have.
pub const TEMPLATES_PER_HOST_MAX: usize = 1024;

/// One of the hosts to choose from: an index, given out by whoever keeps the list of members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostNumber(pub(super) u16);

impl HostNumber {
    /// Host `number`, where a registry can hold one of that number.
    #[must_use]
    pub fn new(number: u16) -> Option<Self> {
        (number < HOSTS_MAX).then_some(Self(number))
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }

    pub(super) fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A shard is a host to the shards of its machine.
impl TryFrom<ShardId> for HostNumber {
    type Error = RegistryError;

    fn try_from(shard: ShardId) -> Result<Self, RegistryError> {
        Self::new(shard.index()).ok_or(RegistryError::NoSuchNumber(shard.index()))
    }
}

/// The name of a template as a number. One whose name has left the registry matches no host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TemplateKey {
    pub(super) index: u16,
    pub(super) turn: u32,
}

/// Ports of a host that a sandbox is to have for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    count: u8,
    all: [u16; PORTS_MAX],
}

impl Ports {
    /// These ports.
    ///
    /// # Errors
    /// When there are too many, when one is 0, or when one is named twice.
    pub fn new(ports: &[u16]) -> Result<Self, RegistryError> {
        let mut all = [0; PORTS_MAX];
        let count = u8::try_from(ports.len()).ok().filter(|_| ports.len() <= PORTS_MAX);
        let count = count.ok_or(RegistryError::TooManyPorts(ports.len()))?;
        for (at, port) in ports.iter().enumerate() {
            if *port == 0 || ports[..at].contains(port) {
                return Err(RegistryError::BadPort(*port));
            }
            all[at] = *port;
        }
        Ok(Self { count, all })
    }

    /// The ports.
    #[must_use]
    pub fn as_slice(&self) -> &[u16] {
        &self.all[..usize::from(self.count)]
    }
}

/// What a host says of itself, again and again.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// Sandboxes that it can hold.
    pub slots: u32,
    /// How many slots' worth of work it sees itself do. Counts where it is more than what was allocated here:
    /// others may place sandboxes on the same host, and a few may keep all its cores busy.
    pub load: u32,
    /// Whether it wants no more sandboxes.
    pub draining: bool,
    /// What it has at hand.
    pub templates: &'a [TemplateKey],
}

/// What a slot is wanted for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Want<'a> {
    /// A host that has this is preferred to every other, while one has room.
    pub template: Option<TemplateKey>,
    /// How much fuller than all hosts together a host may be that is preferred so, in percent of its slots.
    /// Without it one with a single free slot still is, and templates in demand fill hosts one by one.
    pub lead_percent: Option<u8>,
    /// Ports that must be free on it.
    pub ports: Ports,
    /// Hosts that do not come into question, such as those that refused already.
    pub except: Option<&'a HostSet>,
}

/// A slot of a host, taken. It must be released once; a copy of it is refused afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the slot stays taken until the ticket is released"]
pub struct Ticket {
    pub(super) host: HostNumber,
    pub(super) life: u32,
    pub(super) lease: u32,
    pub(super) turn: u32,
}

impl Ticket {
    /// The host that was chosen.
    #[must_use]
    pub fn host(&self) -> HostNumber {
        self.host
    }
}

/// What the registry knows of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostStatus {
    /// Which.
    pub host: HostNumber,
    /// Whether it wants no more.
    pub draining: bool,
    /// How many templates it has.
    pub templates: u16,
    /// Sandboxes that it can hold.
    pub slots: u32,
    /// Slots taken through this registry.
    pub used: u32,
    /// What it last reported.
    pub load: u32,
    /// When it last reported.
    pub last_seen: Duration,
}

impl HostStatus {
    /// One that has never reported.
    pub(super) fn unknown(host: HostNumber) -> Self {
        let last_seen = Duration::ZERO;
        Self { host, draining: false, templates: 0, slots: 0, used: 0, load: 0, last_seen }
    }

    /// Whether this host is less loaded than the other, each to its own size and by what is known
    /// of it from outside.
    pub(super) fn is_below(&self, outside: u32, other: &Self, other_outside: u32) -> bool {
        let work = |status: &Self, outside: u32| u64::from(status.used.max(outside));
        let (ours, theirs) = (work(self, outside), work(other, other_outside));
        ours * u64::from(other.slots) < theirs * u64::from(self.slots)
    }
}

/// Why the registry does not take what it is told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// More hosts than a registry can hold, or none.
    #[error("a registry holds 1 to {HOSTS_MAX} hosts, not {0}")]
    BadSize(u16),
    /// A number outside of it.
    #[error("there is no host {0} in this registry: numbers start at 0 and stay below its size")]
    NoSuchNumber(u16),
    /// More slots than a host can have.
    #[error("a host has at most {SLOTS_MAX} slots, not {0}")]
    TooManySlots(u32),
    /// More templates than a host can have.
    #[error("a host has at most {TEMPLATES_PER_HOST_MAX} templates, not {0}")]
    TooManyTemplates(usize),
    /// A key whose name has left the registry.
    #[error("a template's key is of a name that has left the registry: intern the name again")]
    OldTemplateKey,
    /// A name that is empty or too long.
    #[error("a template's name has 1 to {max} bytes, not {0}", max = super::templates::NAME_BYTES_MAX)]
    BadTemplateName(usize),
    /// Every key is of a template that some host has.
    #[error("the hosts have {max} different templates, which is all that a registry can tell apart", max = super::templates::TEMPLATES_MAX)]
    TemplatesFull,
    /// More ports than a sandbox can ask for.
    #[error("a sandbox can have at most {PORTS_MAX} ports of its host, not {0}")]
    TooManyPorts(usize),
    /// No port, or one named twice.
    #[error("port {0}: a port is 1 to 65535, and named once")]
    BadPort(u16),
}

/// Why there is no host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// No host has reported, or all have left.
    #[error("no host is registered")]
    NoHosts,
    /// None that comes into question has a free slot.
    #[error("no host has a free slot")]
    Full,
    /// Some have a free slot, none of them all of the ports.
    #[error("no host with a free slot has all of the ports free")]
    PortsTaken,
}

/// Why a ticket is not taken back. Nothing is changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReleaseError {
    /// Released before.
    #[error("the ticket was released before")]
    ReleasedBefore,
    /// The host left, or left and came back, and its slots with it.
    #[error("the ticket's host has left, and its slots with it")]
    HostLeft,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_counts_to_the_size_of_a_host() {
        let host = |slots, used| HostStatus { slots, used, ..HostStatus::unknown(HostNumber(0)) };
        assert!(host(100, 10).is_below(0, &host(10, 2), 0), "a tenth is less than a fifth");
        assert!(!host(100, 20).is_below(0, &host(10, 2), 0), "equal is not below");
        assert!(!host(100, 10).is_below(30, &host(10, 2), 0), "what the host sees counts");
    }
}
