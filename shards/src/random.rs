//! What nobody may guess: bytes of the kernel's generator.
//!
//! Called wherever a shard draws an id, a token or a seed. Refuses to go on without: there is no second
//! source.

use crate::ShardError;

/// So many bytes, in hexadecimal.
pub(crate) fn draw_hex<const BYTES: usize>() -> Result<String, ShardError> {
    let mut bytes = [0u8; BYTES];
    random(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Fills `bytes` from the kernel's generator.
pub(crate) fn random(bytes: &mut [u8]) -> Result<(), ShardError> {
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(length) => filled += length,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                let reason = format!("the kernel gives no random bytes: {errno}");
                return Err(ShardError::BootFailed { reason, console_tail: String::new() });
            }
        }
    }
    Ok(())
}
