//! Runs file operations as the user that asked for them.
//!
//! Called by every operation of this module. Each piece of work gets a thread that lives as long
//! as the work does and whose *effective* ids are the user's. A thread, not a helper process: it
//! costs tens of microseconds, and Linux keeps ids and capabilities per thread. Effective ids only:
//! they are what file permission checks look at, and setting them drops the effective
//! capabilities, while the real and the saved uid stay root, so that the user can neither signal
//! nor trace the thread and through it the agent. The thread is never used again, so no identity
//! can leak into other work, not even by a panic. Refuses to act for another user when the agent
//! is not root.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Gid, Uid, geteuid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tokio::sync::{Semaphore, oneshot};

use crate::users::User;

/// Most threads that do short work at once.
const OPERATIONS_MAX: usize = 32;

/// Most uploads and downloads at once; apart from the above, so that slow clients that hold all
/// of these do not hold up a `stat`.
const TRANSFERS_MAX: usize = 64;

static OPERATIONS: Semaphore = Semaphore::const_new(OPERATIONS_MAX);
static TRANSFERS: Semaphore = Semaphore::const_new(TRANSFERS_MAX);
static COUNTER: AtomicU64 = AtomicU64::new(0);

/// Which bound the work counts against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Operation,
    Transfer,
}

/// Why work could not be done as a user
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("cannot become the user {user}; the agent must run as root for that")]
    Become {
        user: String,
        #[source]
        source: rustix::io::Errno,
    },
    #[error("cannot start a thread for a file operation")]
    Thread(#[source] std::io::Error),
    #[error("a file operation stopped without an answer")]
    Stopped,
}

/// Runs `work` as `user` on a thread of its own and waits for what it returns. Waits for a free
/// place first. When the caller gives up waiting, the work still runs to its end.
pub async fn run<T, F>(user: &User, kind: Kind, work: F) -> Result<T, IdentityError>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let places = match kind {
        Kind::Operation => &OPERATIONS,
        Kind::Transfer => &TRANSFERS,
    };
    // The semaphores are never closed.
    let place = places.acquire().await.map_err(|_| IdentityError::Stopped)?;
    let (answer, answered) = oneshot::channel();
    let user = user.clone();
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    std::thread::Builder::new()
        .name(format!("file-{number}"))
        .spawn(move || {
            let outcome = put_on(&user).map(|()| work());
            drop(place);
            // Whoever asked may have gone.
            drop(answer.send(outcome));
        })
        .map_err(IdentityError::Thread)?;
    answered.await.map_err(|_| IdentityError::Stopped)?
}

/// Makes the current thread the user's, for good.
fn put_on(user: &User) -> Result<(), IdentityError> {
    let fail = |source| IdentityError::Become { user: user.name.clone(), source };
    let uid = Uid::from_raw(user.uid);
    if geteuid() == uid {
        return Ok(());
    }
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&groups).map_err(fail)?;
    set_thread_res_gid(None, Some(Gid::from_raw(user.gid)), None).map_err(fail)?;
    set_thread_res_uid(None, Some(uid), None).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::users;

    #[tokio::test]
    async fn work_runs_as_the_user_and_others_do_not() {
        if !geteuid().is_root() {
            eprintln!("skipped: only root can become somebody else");
            return;
        }
        let nobody = users::find("nobody").unwrap();
        let (euid, egid, uid) = run(&nobody, Kind::Operation, || {
            (geteuid().as_raw(), rustix::process::getegid().as_raw(), rustix::process::getuid())
        })
        .await
        .unwrap();
        assert_eq!((euid, egid), (nobody.uid, nobody.gid));
        assert!(uid.is_root(), "the real uid stays, so that the user cannot signal the thread");
        assert!(geteuid().is_root());
        let root = users::find("root").unwrap();
        assert!(run(&root, Kind::Operation, geteuid).await.unwrap().is_root());
    }

    #[tokio::test]
    async fn the_user_has_no_capabilities_and_no_way_into_the_agent() {
        if !geteuid().is_root() {
            eprintln!("skipped: only root can become somebody else");
            return;
        }
        let nobody = users::find("nobody").unwrap();
        let seen = run(&nobody, Kind::Operation, || {
            let own = rustix::thread::capabilities(None).unwrap();
            let read = |path: &str| std::fs::read(path).map(drop).map_err(|error| error.kind());
            (own.effective.is_empty(), read("/proc/self/environ"), read("/proc/self/mem"))
        });
        let denied = Err(std::io::ErrorKind::PermissionDenied);
        assert_eq!(seen.await.unwrap(), (true, denied, denied));
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_the_place_is_free_again() {
        let root = users::find("root").unwrap();
        if !geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        for _ in 0..OPERATIONS_MAX + 1 {
            let outcome = run(&root, Kind::Operation, || std::panic::resume_unwind(Box::new(())));
            let outcome: Result<(), _> = outcome.await;
            assert!(matches!(outcome, Err(IdentityError::Stopped)));
        }
    }
}
