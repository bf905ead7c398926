//! Frames to bytes and back.
//!
//! Called by [`super::ControlSocket`] and by a shard that reads packets through its ring. Refuses a
//! packet that is too long, of another version, or not valid in every field (rkyv's bytecheck).
//!
//! ```text
//!  0      4         6          8
//!  ┌──────┬─────────┬──────────┬───────────────────┐
//!  │ MVM2 │ version │ reserved │ rkyv archive      │   integers little endian
//!  └──────┴─────────┴──────────┴───────────────────┘
//! ```

use rkyv::rancor;
use rkyv::util::AlignedVec;

use super::{Command, Event};

/// Longest frame, header included. A receive buffer of this size never truncates a packet.
pub const FRAME_BYTES_MAX: usize = 16 * 1024;

const MAGIC: [u8; 4] = *b"MVM2";
const VERSION: u16 = 3;
const HEADER_BYTES: usize = 8;

/// Why bytes are not a frame, or a value does not become one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`FRAME_BYTES_MAX`].
    #[error("a frame of {0} bytes is longer than {FRAME_BYTES_MAX}")]
    TooLong(usize),
    /// No header, or another program's.
    #[error("the packet does not start with a frame header of version {VERSION}")]
    Header,
    /// The archive failed validation.
    #[error("the frame's contents are not valid")]
    Contents,
}

/// Encodes a command.
///
/// # Errors
/// When it is longer than [`FRAME_BYTES_MAX`].
pub fn encode_command(command: &Command) -> Result<Vec<u8>, FrameError> {
    rkyv::to_bytes::<rancor::Error>(command)
        .map_err(|_| FrameError::Contents)
        .and_then(|archive| with_header(&archive))
}

/// Encodes an event.
///
/// # Errors
/// When it is longer than [`FRAME_BYTES_MAX`].
pub fn encode_event(event: &Event) -> Result<Vec<u8>, FrameError> {
    rkyv::to_bytes::<rancor::Error>(event)
        .map_err(|_| FrameError::Contents)
        .and_then(|archive| with_header(&archive))
}

/// Decodes a command.
///
/// # Errors
/// When the packet is not a valid frame.
pub fn decode_command(packet: &[u8]) -> Result<Command, FrameError> {
    let archive = without_header(packet)?;
    rkyv::from_bytes::<Command, rancor::Error>(&archive).map_err(|_| FrameError::Contents)
}

/// Decodes an event.
///
/// # Errors
/// When the packet is not a valid frame.
pub fn decode_event(packet: &[u8]) -> Result<Event, FrameError> {
    let archive = without_header(packet)?;
    rkyv::from_bytes::<Event, rancor::Error>(&archive).map_err(|_| FrameError::Contents)
}

fn with_header(archive: &[u8]) -> Result<Vec<u8>, FrameError> {
    let frame_bytes = HEADER_BYTES + archive.len();
    if frame_bytes > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong(frame_bytes));
    }
    let mut frame = Vec::with_capacity(frame_bytes);
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&VERSION.to_le_bytes());
    frame.extend_from_slice(&[0; 2]);
    frame.extend_from_slice(archive);
    Ok(frame)
}

/// Copies the archive out: rkyv wants it aligned, and a packet lies anywhere.
fn without_header(packet: &[u8]) -> Result<AlignedVec, FrameError> {
    if packet.len() > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong(packet.len()));
    }
    let (header, archive) = packet.split_at_checked(HEADER_BYTES).ok_or(FrameError::Header)?;
    if header[..4] != MAGIC || header[4..6] != VERSION.to_le_bytes() || header[6..] != [0; 2] {
        return Err(FrameError::Header);
    }
    let mut aligned = AlignedVec::with_capacity(archive.len());
    aligned.extend_from_slice(archive);
    Ok(aligned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::{BootConfig, Ending, FdRole};

    fn boot() -> Command {
        Command::Boot(BootConfig {
            cmdline: "console=ttyS0".to_owned(),
            disk_read_only: false,
            fds: vec![FdRole::Kernel, FdRole::Disk],
        })
    }

    #[test]
    fn frames_round_trip() {
        for command in [boot(), Command::OpenStream { vsock_port: 1024 }, Command::Stop] {
            let packet = encode_command(&command).unwrap();
            assert_eq!(decode_command(&packet), Ok(command));
        }
        for event in [Event::Jailed, Event::Ended(Ending::GuestFault("queue 1".to_owned()))] {
            let packet = encode_event(&event).unwrap();
            assert_eq!(decode_event(&packet), Ok(event));
        }
    }

    #[test]
    fn every_truncation_and_every_changed_byte_is_an_error_or_a_frame_but_never_a_panic() {
        let packet = encode_command(&boot()).unwrap();
        for length in 0..packet.len() {
            assert!(decode_command(&packet[..length]).is_err(), "{length} bytes");
        }
        for at in 0..packet.len() {
            for value in [0u8, 1, 0x7f, 0x80, 0xff] {
                let mut changed = packet.clone();
                changed[at] = value;
                let outcome = decode_command(&changed);
                assert!(at >= HEADER_BYTES || changed == packet || outcome.is_err());
            }
        }
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_on_both_sides() {
        let Command::Boot(mut config) = boot() else { unreachable!() };
        config.cmdline = "x".repeat(FRAME_BYTES_MAX);
        assert!(matches!(encode_command(&Command::Boot(config)), Err(FrameError::TooLong(_))));
        assert!(matches!(decode_event(&vec![0; FRAME_BYTES_MAX + 1]), Err(FrameError::TooLong(_))));
    }
}
