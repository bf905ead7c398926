//! What the native KVM tests share: finding KVM, and starting one tiny guest.
//!
//! Called by `tests/kvm_*.rs`. Refuses to skip silently.

mod kvm;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mica_lab::one_vm::{Boot, OneVm, find_mica_vm};
use mica_wire::vm::Event;

pub use kvm::have_kvm;

/// Long enough for a busy two-core machine; every wait in the tests is for an event.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A user id that no other VM of this test process has.
pub fn fresh_id() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let own = 100_000 + (std::process::id() % 20_000) * 64;
    own + NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Starts a VM up to [`Event::Started`].
pub fn start(boot: &Boot) -> OneVm {
    let mut vm = OneVm::spawn(&find_mica_vm().unwrap(), fresh_id()).unwrap();
    vm.expect(&Event::Jailed, PATIENCE).unwrap();
    vm.boot(boot, PATIENCE).unwrap();
    vm.expect(&Event::Started, PATIENCE).unwrap();
    vm
}
