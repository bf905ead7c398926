//! Shells: VM processes that are made before anyone asks for them.
//!
//! Called by the driver, which takes one, and by the shard's pool task, which makes them. A shell is
//! a jailed `mica-vm` with its KVM VM, its memory range, devices and threads made, and nothing run;
//! a create then is a few mappings and registers. Refuses to be used twice: what a guest touched goes.

pub(crate) mod demand;
mod pins;
mod pool;
mod process;
mod spawn;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use mica_units::{Mebibytes, SandboxId, VcpuCount};
use mica_wire::vm::{self, ControlSocket};

use self::pins::Pinned;
use crate::sandbox::Events;

pub(crate) use pins::{Pins, vcpu_threads};
pub(crate) use pool::{Claim, NoShell, Pool, PoolCounts, now_s};
pub(crate) use process::{OpenError, VmProcess, start_ticks};
pub(crate) use spawn::{Launched, Launcher, empty_network};

/// What a shell is made for; a pool is kept for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Size {
    /// Its vCPUs.
    pub(crate) vcpus: VcpuCount,
    /// Guest memory.
    pub(crate) memory: Mebibytes,
    /// Whether it has a disk.
    pub(crate) disk: bool,
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let disk = if self.disk { "" } else { ", no disk" };
        write!(f, "{} vCPUs, {}{disk}", self.vcpus.get(), self.memory)
    }
}

/// A VM process and everything the shard holds of it, but its events.
#[derive(Debug)]
pub(crate) struct Held {
    /// Names its cgroup.
    pub(crate) name: SandboxId,
    /// Its uid.
    pub(crate) uid: u32,
    /// Its process.
    pub(crate) process: VmProcess,
    /// The shard's end of its control socket.
    pub(crate) control: ControlSocket,
    /// What its guest's serial port writes to.
    pub(crate) console: OwnedFd,
    /// Where plans and states travel.
    pub(crate) exchange: OwnedFd,
    /// What it said of itself.
    pub(crate) layout: vm::Shell,
    /// The hardware threads of its vCPUs, where each has one.
    pub(crate) pinned: RefCell<Option<Pinned>>,
    /// Whether it has ended, and its uid was given back: once.
    pub(crate) taken_back: Cell<bool>,
}

/// A VM process that waits for a guest.
#[derive(Debug)]
pub(crate) struct Shell {
    /// What it is.
    pub(crate) held: Rc<Held>,
    /// What it says.
    pub(crate) events: Events,
    /// Once it was taken out of the pool.
    pub(crate) claim: Option<Claim>,
}
