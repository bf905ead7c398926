//! Gives memory back before the guest's state is saved.
//!
//! Called when the services are warm, in a guest only. Refuses to drop the page cache: what is in
//! it is shared by all sandboxes that are restored from the state, whereas what each of them had to
//! read again from its disk would be memory of its own.

use std::path::Path;

/// Makes the kernel move what is in use together, so that free memory is in pieces large enough to
/// be reported to the host.
const COMPACT: &str = "/proc/sys/vm/compact_memory";

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot compact the memory")]
pub struct MemoryError(#[source] std::io::Error);

/// Writes what is dirty, and compacts. A dirty page would be written once more by each sandbox that
/// is restored, to a disk of its own; what follows frees no memory that is still dirty.
pub fn give_back() -> Result<(), MemoryError> {
    rustix::fs::sync();
    let path = Path::new(COMPACT);
    // A kernel without compaction has no such file, and nothing to do here.
    if path.exists() { std::fs::write(path, b"1").map_err(MemoryError) } else { Ok(()) }
}
