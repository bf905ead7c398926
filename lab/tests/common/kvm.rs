//! Whether a test that needs KVM can run.
//!
//! Called by `tests/kvm_*.rs`. Refuses to skip silently.

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
