//! A full disk is an answer, 507, and harms nothing.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::daemon::{Daemon, patiently};
use crate::template::TEMPLATE;

/// A small file system, for as long as this lives.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> Self {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"])
            .arg(at)
            .status()
            .expect("mount");
        assert!(mounted.success(), "no small file system at {}", at.display());
        Self(at.to_owned())
    }

    /// Takes all the room there is, until the file goes.
    fn fill(&self) -> PathBuf {
        let filler = self.0.join("filler");
        let mut file = std::fs::File::create(&filler).expect("a file");
        for size in [1 << 20, 4096] {
            let zeros = vec![0; size];
            while file.write_all(&zeros).is_ok() {}
        }
        filler
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // At once for every path, and whole once the last file in it is closed.
        drop(Command::new("umount").arg("--lazy").arg(&self.0).status());
    }
}

#[test]
fn a_full_disk_is_told_and_harms_nothing() {
    let mut disk = None;
    let daemon = Daemon::start_in(&[], |directory| {
        let store = directory.join("store");
        std::fs::create_dir(&store).expect("a directory");
        disk = Some(SmallDisk::mount(&store));
    });
    let disk = disk.expect("a disk");
    let (id, other) = (daemon.create(), daemon.create());
    let snapshot = daemon.snapshot(&id);
    daemon.pause(&other);
    let filler = disk.fill();
    let create = || {
        let body = json!({ "templateID": TEMPLATE, "timeout": 60 });
        daemon.ask("POST", "/v2/sandboxes", Some(&body))
    };
    for (what, reply) in [
        ("snapshot", patiently(|| daemon.act(&id, "snapshots"))),
        ("pause", patiently(|| daemon.act(&id, "pause"))),
        ("clone", patiently(|| daemon.act(&id, "clone"))),
        ("fork", patiently(|| daemon.act(&id, "fork"))),
        ("create", create()),
    ] {
        assert!(reply.error(507).contains("disk is full"), "{what}: {reply:?}");
        assert_eq!(reply.headers["should-retry"], "false", "{what}");
        assert_eq!(daemon.state(&id), "running", "{what}");
        assert_eq!(daemon.state(&other), "paused", "{what}");
        daemon.to_sandbox(&id, 1, "GET /").send("\r\n").reply().error(502);
    }
    let listed = daemon.ask("GET", "/snapshots", None).json();
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    std::fs::remove_file(filler).expect("the filler");
    daemon.snapshot(&id);
    let back = json!({ "snapshotID": snapshot });
    let back = patiently(|| daemon.act_with(&id, "rollback", &back));
    assert_eq!(back.status, 200, "{back:?}");
    assert_eq!(daemon.act(&other, "resume").status, 201);
    assert_eq!(create().status, 201);
    assert_eq!(patiently(|| daemon.act(&id, "clone")).status, 201);
}
