//! What the native KVM tests share: finding KVM, and starting one tiny guest.
//!
//! Called by `tests/kvm_*.rs`. Refuses to skip silently.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mica_lab::one_vm::{Boot, OneVm, find_mica_vm};
use mica_wire::vm::Event;

/// Long enough for a busy two-core machine; every wait in the tests is for an event.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Whether the tests can run. Says so when they cannot.
pub fn have_kvm() -> bool {
    let usable = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    match usable {
        Ok(_) => true,
        Err(error) if std::env::var_os("REQUIRE_KVM").is_some_and(|value| value == "1") => {
            panic!("REQUIRE_KVM=1, but /dev/kvm cannot be opened: {error}")
        }
        Err(error) => {
            eprintln!("SKIPPED: /dev/kvm cannot be opened: {error}");
            false
        }
    }
}

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
