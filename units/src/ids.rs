//! Names of things: sandboxes, templates, shards, guest ports.
//!
//! Called at every boundary where such a name arrives as text. Refuses anything that is not
//! exactly in form, so that an id can be put in a path, a cgroup name or a log line as it is.

use std::fmt;
use std::ops::{Index, IndexMut};
use std::str::FromStr;

/// Characters after the leading `i` of a sandbox id.
pub const SANDBOX_ID_CHARS: usize = 20;

const BASE36: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not a sandbox id.
    #[error("a sandbox id is `i` followed by 20 characters of 0-9 and a-z")]
    SandboxId,
    /// Not a template name.
    #[error(
        "a template name is 1 to 63 characters of a-z, 0-9, `-` and `_`, and starts with a \
         letter or a digit"
    )]
    TemplateName,
    /// Port 0.
    #[error("a guest port is 1 to 65535")]
    GuestPort,
    /// Not the name of a tenant.
    #[error(
        "a tenant is 1 to 32 characters of a-z, 0-9 and `-`, and starts with a letter or a digit"
    )]
    TenantId,
}

/// The id of one sandbox: `i` and 20 characters of base 36 (103 bits).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SandboxId([u8; 1 + SANDBOX_ID_CHARS]);

impl SandboxId {
    /// Makes an id from random bytes. The modulo bias (256 mod 36) costs under 0.1 bit a
    /// character, and ids are names here, not secrets.
    #[must_use]
    pub fn from_random(random: [u8; SANDBOX_ID_CHARS]) -> Self {
        let mut id = [b'i'; 1 + SANDBOX_ID_CHARS];
        for (slot, byte) in id[1..].iter_mut().zip(random) {
            *slot = BASE36[usize::from(byte) % BASE36.len()];
        }
        Self(id)
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    /// A 64-bit FNV-1a hash of the id: the only input of shard routing, so it must not change
    /// between versions of the program.
    #[must_use]
    pub fn stable_hash(&self) -> u64 {
        self.0.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }

    /// The shard that owns this sandbox among `shards` of them.
    ///
    /// The high half of the product picks the shard (Lemire's reduction): FNV's low bits are
    /// the weak ones.
    #[must_use]
    pub fn shard(&self, shards: ShardCount) -> ShardId {
        let wide = u128::from(self.stable_hash()) * u128::from(shards.get());
        ShardId(u16::try_from(wide >> 64).unwrap_or(0))
    }
}

impl FromStr for SandboxId {
    type Err = IdError;

    /// Accepts the id alone. Old clients append `-CLIENT`; stripping that is the front end's work.
    fn from_str(text: &str) -> Result<Self, IdError> {
        let bytes: [u8; 1 + SANDBOX_ID_CHARS] =
            text.as_bytes().try_into().map_err(|_| IdError::SandboxId)?;
        let in_form = bytes[0] == b'i' && bytes[1..].iter().all(|b| BASE36.contains(b));
        if in_form { Ok(Self(bytes)) } else { Err(IdError::SandboxId) }
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name of a template, safe as one path component.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TemplateName(String);

impl TemplateName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TemplateName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let body = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
        let head = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = text.as_bytes();
        let in_form = matches!(bytes.len(), 1..=63)
            && bytes.first().copied().is_some_and(head)
            && bytes.iter().copied().all(body);
        if in_form { Ok(Self(text.to_owned())) } else { Err(IdError::TemplateName) }
    }
}

impl fmt::Display for TemplateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whom sandboxes, snapshots and templates belong to. Every API key is one tenant's.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TenantId(String);

impl TenantId {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The tenant of a host that nobody has divided.
impl Default for TenantId {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl FromStr for TenantId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let head = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = text.as_bytes();
        let in_form = matches!(bytes.len(), 1..=32)
            && bytes.first().copied().is_some_and(head)
            && bytes.iter().all(|b| head(*b) || *b == b'-');
        if in_form { Ok(Self(text.to_owned())) } else { Err(IdError::TenantId) }
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One shard of this host: 0 to the shard count, exclusive.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ShardId(u16);

impl ShardId {
    /// The shard at `index`.
    #[must_use]
    pub const fn new(index: u16) -> Self {
        Self(index)
    }

    /// Its index.
    #[must_use]
    pub const fn index(self) -> u16 {
        self.0
    }
}

/// How many shards this host runs: at least one.
pub type ShardCount = std::num::NonZeroU16;

/// One `T` for each shard, indexed by [`ShardId`] and by nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PerShard<T>(Vec<T>);

impl<T> PerShard<T> {
    /// Makes the table by calling `make` for each shard in order.
    pub fn from_fn(shards: ShardCount, make: impl FnMut(ShardId) -> T) -> Self {
        Self((0..shards.get()).map(ShardId).map(make).collect())
    }

    /// Every shard with its entry, in order.
    pub fn iter(&self) -> impl Iterator<Item = (ShardId, &T)> {
        (0..).map(ShardId).zip(&self.0)
    }

    /// The entries, in shard order.
    pub fn into_entries(self) -> Vec<T> {
        self.0
    }
}

impl<T> Index<ShardId> for PerShard<T> {
    type Output = T;
    fn index(&self, shard: ShardId) -> &T {
        &self.0[usize::from(shard.0)]
    }
}

impl<T> IndexMut<ShardId> for PerShard<T> {
    fn index_mut(&mut self, shard: ShardId) -> &mut T {
        &mut self.0[usize::from(shard.0)]
    }
}

/// A TCP port inside a guest: 1 to 65535.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GuestPort(std::num::NonZeroU16);

impl GuestPort {
    /// envd: processes and files of a sandbox.
    pub const ENVD: Self = Self(std::num::NonZeroU16::new(49983).expect("not zero"));
    /// The code interpreter of a sandbox.
    pub const CODE_INTERPRETER: Self = Self(std::num::NonZeroU16::new(49999).expect("not zero"));

    /// Checks that the port is not 0.
    ///
    /// # Errors
    /// When `port` is 0.
    pub fn new(port: u16) -> Result<Self, IdError> {
        std::num::NonZeroU16::new(port).map(Self).ok_or(IdError::GuestPort)
    }

    /// The port number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

impl FromStr for GuestPort {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        // `u16::from_str` takes a leading `+`; a port in a host name never has one.
        if !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(IdError::GuestPort);
        }
        text.parse().map_err(|_| IdError::GuestPort).and_then(Self::new)
    }
}

impl fmt::Display for GuestPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sandbox_ids_round_trip_and_refuse_everything_else() {
        let id = SandboxId::from_random([7; SANDBOX_ID_CHARS]);
        assert_eq!(id.as_str().len(), 21);
        assert_eq!(id.as_str().parse(), Ok(id));
        for bad in [
            "",
            "i",
            "i0123456789abcdefghi",
            "i0123456789abcdefghijk",
            "j0123456789abcdefghij",
            "iABCDEFGHIJ0123456789",
            "i../../../../etc/pass",
            "i0123456789abcdefgh\u{e9}",
        ] {
            assert_eq!(bad.parse::<SandboxId>(), Err(IdError::SandboxId), "{bad:?}");
        }
    }

    #[test]
    fn routing_is_stable_and_even() {
        // Golden: a changed hash would send every stored id to another shard.
        let id: SandboxId = "i0123456789abcdefghij".parse().unwrap();
        assert_eq!(id.stable_hash(), 0xd898_68e1_c585_c8c0);
        let shards = ShardCount::new(7).unwrap();
        let mut hits = PerShard::from_fn(shards, |_| 0u32);
        for n in 0u32..7000 {
            let mut random = [0; SANDBOX_ID_CHARS];
            random[..4].copy_from_slice(&n.to_le_bytes());
            hits[SandboxId::from_random(random).shard(shards)] += 1;
        }
        assert!(hits.iter().all(|(_, n)| (700..1300).contains(n)), "{hits:?}");
    }

    #[test]
    fn template_names_are_path_safe() {
        for good in ["base", "code-interpreter-v1", "a", "0_x"] {
            assert!(good.parse::<TemplateName>().is_ok(), "{good}");
        }
        for bad in ["", "..", "a/..", "-a", "_a", "A", "a b", "a\0", "a.b", &"a".repeat(64)] {
            assert_eq!(bad.parse::<TemplateName>(), Err(IdError::TemplateName), "{bad:?}");
        }
    }

    #[test]
    fn tenants_are_plain_words() {
        for good in ["default", "a", "0-x", &"a".repeat(32)] {
            assert_eq!(good.parse::<TenantId>().unwrap().as_str(), good);
        }
        assert_eq!("default".parse(), Ok(TenantId::default()));
        for bad in ["", "-a", "A", "a b", "a_b", "../x", &"a".repeat(33)] {
            assert_eq!(bad.parse::<TenantId>(), Err(IdError::TenantId), "{bad:?}");
        }
    }

    #[test]
    fn guest_ports_are_plain_numbers() {
        assert_eq!("49983".parse(), Ok(GuestPort::ENVD));
        for bad in ["", "0", "65536", "+80", "-1", "8 0"] {
            assert_eq!(bad.parse::<GuestPort>(), Err(IdError::GuestPort), "{bad:?}");
        }
    }
}
