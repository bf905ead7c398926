//! Runs file operations with root's reach and in the user's name, as E2B's envd does them.
//!
//! Called by every operation of this module. Each piece of work gets a thread that lives as long
//! as the work does, whose *effective* ids are the user's and whose capabilities stay root's. So
//! nothing is refused to the user, and what is made is the user's from its first moment: there is
//! no file of root's to be handed over, and so no path for a process in the sandbox to swap in
//! between. A thread, not a helper process: it costs tens of microseconds, and Linux keeps ids and
//! capabilities per thread. Effective ids only: the real and the saved uid stay root, so that the
//! user can neither signal nor trace the thread and through it the agent. The thread is never used
//! again, so no identity can leak into other work, not even by a panic. Refuses to act for another
//! user when the agent is not root.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Gid, Uid, geteuid};
use rustix::thread::{
    CapabilitySets, capabilities, set_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
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

/// Why work could not be done for a user.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("cannot work in the name of {user}; the agent must run as root for that")]
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

/// Runs `work` for `user` on a thread of its own and waits for what it returns. Waits for a free
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

/// Gives the current thread the user's name, for good.
fn put_on(user: &User) -> Result<(), IdentityError> {
    let fail = |source| IdentityError::Become { user: user.name.clone(), source };
    let uid = Uid::from_raw(user.uid);
    if geteuid() == uid {
        return Ok(());
    }
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&groups).map_err(fail)?;
    set_thread_res_gid(None, Some(Gid::from_raw(user.gid)), None).map_err(fail)?;
    set_thread_res_uid(None, Some(uid), None).map_err(fail)?;
    // The kernel takes what is effective from whoever stops being root, and leaves what is permitted
    // while another of the three uids is.
    let own = capabilities(None).map_err(fail)?;
    set_capabilities(None, CapabilitySets { effective: own.permitted, ..own }).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::users;

    #[tokio::test]
    async fn work_has_the_users_name_and_others_do_not() {
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
    async fn nothing_is_refused_and_what_is_made_is_the_users() {
        use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
        if !geteuid().is_root() {
            eprintln!("skipped: only root can become somebody else");
            return;
        }
        let nobody = users::find("nobody").unwrap();
        let base = std::env::temp_dir().join(format!("mica-identity-{}", std::process::id()));
        std::fs::create_dir(&base).unwrap();
        std::fs::set_permissions(&base, std::fs::Permissions::from_mode(0o700)).unwrap();
        let at = base.clone();
        let made = run(&nobody, Kind::Operation, move || {
            std::fs::create_dir(at.join("d"))?;
            std::fs::write(at.join("d/f"), "x")?;
            let of = |name: &str| std::fs::metadata(at.join(name)).map(|of| (of.uid(), of.gid()));
            Ok::<_, std::io::Error>([of("d")?, of("d/f")?])
        });
        assert_eq!(made.await.unwrap().unwrap(), [(nobody.uid, nobody.gid); 2]);
        assert_eq!(std::fs::metadata(&base).unwrap().uid(), 0);
        std::fs::remove_dir_all(base).unwrap();
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
