//! Getting a vCPU thread out of `KVM_RUN` without losing the wake-up.
//!
//! Called by the vCPU threads (to be reachable) and by whoever wants them out. A signal alone has a
//! hole: it can land just before the ioctl and be gone. So its handler also sets `immediate_exit`
//! in the shared page of the vCPU of its own thread, which makes the next `KVM_RUN` return at once.
//! The handler does nothing else, so it is safe at any instant.

use std::cell::Cell;
use std::ptr::null_mut;
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use vmm_sys_util::errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// Why a kick does not work.
#[derive(Debug, thiserror::Error)]
pub enum KickError {
    /// The handler could not be installed.
    #[error("installing the vCPU signal handler failed")]
    Install(#[source] errno::Error),
    /// The signal could not be sent.
    #[error("signalling a vCPU thread failed")]
    Send(#[source] errno::Error),
}

thread_local! {
    /// The shared page of the vCPU that this thread runs, or null.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let page = RUN_PAGE.get();
    if !page.is_null() {
        // SAFETY: `Reachable` set the pointer on this very thread and clears it before the page is
        // unmapped, and a handler runs on the thread it interrupts. The field is one byte, written
        // whole, so neither the interrupted code nor KVM can see half of it.
        unsafe { (&raw mut (*page).immediate_exit).write_volatile(1) };
    }
}

/// Installs the signal handler of this process. Once, before the first vCPU thread.
///
/// # Errors
/// When the kernel refuses.
pub fn install() -> Result<(), KickError> {
    register_signal_handler(SIGRTMIN(), on_signal).map_err(KickError::Install)
}

/// Makes the vCPU thread leave `KVM_RUN`, now or at its next entry.
///
/// # Errors
/// When the signal cannot be sent.
pub fn kick<T>(thread: &JoinHandle<T>) -> Result<(), KickError> {
    thread.kill(SIGRTMIN()).map_err(KickError::Send)
}

/// While this lives, kicks of the current thread reach the vCPU of `page`.
#[derive(Debug)]
pub struct Reachable(());

impl Reachable {
    /// Makes the current thread reachable. Drop it before the vCPU.
    pub fn new(page: *mut kvm_run) -> Self {
        RUN_PAGE.set(page);
        Self(())
    }
}

impl Drop for Reachable {
    fn drop(&mut self) {
        RUN_PAGE.set(null_mut());
    }
}
