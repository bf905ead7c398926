//! What this process may: whose it is, and its capabilities.
//!
//! Called by [`super::judge`]. Refuses to count limits: those are `machine`'s.

use mica_numa::facts::Facts;

use super::finding::Finding;
use super::machine::MOUNT_PROC;

/// What a daemon does that takes a capability: its bit of linux/capability.h, its name. Without the first the
/// daemon does not start; without the others no sandbox does, or none ends.
const CAPABILITIES: [(u32, &str); 6] = [
    // The empty network, and the namespaces and mounts of jails.
    (21, "SYS_ADMIN"),
    // Each VM process becomes a user and a group of its own, and can never be another.
    (7, "SETUID"),
    (6, "SETGID"),
    (8, "SETPCAP"),
    // The daemon reads guests' memory, and takes descriptors from VM processes.
    (19, "SYS_PTRACE"),
    // They are other users' when they are to end.
    (5, "KILL"),
];

/// The findings of this family.
pub fn judge(facts: &Facts) -> Vec<Finding> {
    vec![user(facts.is_root), capabilities(facts)]
}

fn user(is_root: Option<bool>) -> Finding {
    match is_root {
        Some(true) => Finding::ok("user", "root"),
        Some(false) => Finding::fail("user", "not root")
            .costs("VM processes cannot be jailed: each needs a user id and a control group of its own")
            .mend("sudo mica serve; for this: sudo mica doctor"),
        None => Finding::note("user", "unknown")
            .costs("`mica serve` may find that it is not root, and refuse to start")
            .mend(MOUNT_PROC),
    }
}

fn capabilities(facts: &Facts) -> Finding {
    let check = "capabilities";
    if facts.capabilities.is_none() {
        return Finding::note(check, "unknown")
            .costs("where one is missing, `mica serve` or its sandboxes do not start")
            .mend(MOUNT_PROC);
    }
    let lacks = |(bit, _): &&(u32, &str)| facts.is_capable(*bit) == Some(false);
    let missing: Vec<&str> = CAPABILITIES.iter().filter(lacks).map(|(_, name)| *name).collect();
    if missing.is_empty() {
        return Finding::ok(check, "all that jails take");
    }
    let names: Vec<String> = missing.iter().map(|name| format!("CAP_{name}")).collect();
    let options: Vec<String> = missing.iter().map(|name| format!("--cap-add={name}")).collect();
    Finding::fail(check, format!("without {}", names.join(", ")))
        .costs("VM processes cannot be jailed, looked into or ended")
        .mend(format!(
            "sudo mica serve; CapabilityBoundingSet={} in the unit file, or none of it; in a container: docker run {}",
            names.join(" "),
            options.join(" ")
        ))
}
