//! Two processes of one: the first, which ends at once, and the VM's, alone in a pid namespace.
//!
//! Called by the jail, while there is one thread. Refuses to let the VM's process run before its
//! number is told: nobody could watch it otherwise.
//!
//! ```text
//!   shard ──exec──▶ first process ──new namespaces, fork──▶ VM process, number 1 in its own
//!     ◀── Spawned {pid} ──┤                                      │ waits
//!                         ├────────── one byte ──────────────────▶ goes on: the jail, Jailed, ...
//!                        exits                       (no byte: the first failed, and it exits too)
//! ```
//! A process cannot see its own number outside of its pid namespace, so the first one says it.

#![expect(unsafe_code, reason = "fork has no safe wrapper")]

use std::io;
use std::os::fd::OwnedFd;

use mica_wire::vm::{ControlSocket, Event};
use rustix::io::{Errno, read, retry_on_intr, write};
use rustix::pipe::{PipeFlags, pipe_with};

/// Which of the two processes this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The first one. The number is told; it has to end.
    First,
    /// The VM's. It goes on into the jail.
    Vm,
    /// The VM's, and the first one failed. It has to end; nobody is to be told.
    Orphan,
}

/// Forks. Namespaces that are for children only take effect in the VM's process.
pub(super) fn split(socket: &ControlSocket) -> io::Result<Side> {
    let (wait, go) = pipe_with(PipeFlags::CLOEXEC)?;
    // SAFETY: `main` calls this while there is one thread, so no lock is held by a thread that the
    // new process lacks, and everything may go on in it as before.
    let child = unsafe { libc::fork() };
    let Ok(pid) = u32::try_from(child) else { return Err(io::Error::last_os_error()) };
    if pid == 0 {
        drop(go);
        return Ok(wait_for_first(&wait));
    }
    socket.send_event(&Event::Spawned { pid }).map_err(io::Error::other)?;
    match retry_on_intr(|| write(&go, &[1])) {
        // Whoever watches the VM's process sees that it is gone already.
        Ok(_) | Err(Errno::PIPE) => Ok(Side::First),
        Err(errno) => Err(errno.into()),
    }
}

fn wait_for_first(wait: &OwnedFd) -> Side {
    match retry_on_intr(|| read(wait, &mut [0u8; 1])) {
        Ok(1) => Side::Vm,
        // Nothing, but the end of the pipe.
        Ok(_) | Err(_) => Side::Orphan,
    }
}
