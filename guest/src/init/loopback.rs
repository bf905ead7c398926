//! Brings the loopback interface up, over netlink: the disk may have no `ip`.
//!
//! Called by init. Refuses an answer that is not the kernel's acknowledgement.

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

use super::InitError;

/// A netlink header and an `ifinfomsg`.
const REQUEST_BYTES: usize = 32;

/// A netlink header and the error code behind it.
const ANSWER_BYTES_MIN: usize = 20;

const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLMSG_ERROR: u16 = 2;
const LOOPBACK_INDEX: u32 = 1;
const IFF_UP: u32 = 1;

/// Sets `IFF_UP` on the first interface, which is always the loopback; the kernel adds 127.0.0.1
/// and `::1` itself.
pub fn up() -> Result<(), InitError> {
    exchange().map_err(InitError::at("bring the loopback interface up"))
}

fn exchange() -> std::io::Result<()> {
    let kind = SocketType::RAW;
    // Protocol 0 of the family, which is what no protocol means, is NETLINK_ROUTE.
    let socket = socket_with(AddressFamily::NETLINK, kind, SocketFlags::CLOEXEC, None)?;
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&socket, &request(), SendFlags::empty(), &kernel)?;
    let mut answer = [0; 256];
    let (length, _) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
    acknowledged(answer.get(..length).unwrap_or_default())
}

/// ```text
///  0       4      6       8     12    16       17   18    20      24      28       32
///  │length │ type │ flags │ seq │ pid │ family │ pad│ type│ index │ flags │ change │
/// ```
fn request() -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[0..4].copy_from_slice(&32u32.to_ne_bytes());
    bytes[4..6].copy_from_slice(&RTM_NEWLINK.to_ne_bytes());
    bytes[6..8].copy_from_slice(&NLM_F_REQUEST_ACK.to_ne_bytes());
    bytes[20..24].copy_from_slice(&LOOPBACK_INDEX.to_ne_bytes());
    bytes[24..28].copy_from_slice(&IFF_UP.to_ne_bytes());
    bytes[28..32].copy_from_slice(&IFF_UP.to_ne_bytes());
    bytes
}

fn acknowledged(answer: &[u8]) -> std::io::Result<()> {
    let out_of_form = || std::io::Error::from(std::io::ErrorKind::InvalidData);
    let Some((head, _)) = answer.split_first_chunk::<ANSWER_BYTES_MIN>() else {
        return Err(out_of_form());
    };
    if u16::from_ne_bytes([head[4], head[5]]) != NLMSG_ERROR {
        return Err(out_of_form());
    }
    match i32::from_ne_bytes([head[16], head[17], head[18], head[19]]) {
        0 => Ok(()),
        errno => Err(std::io::Error::from_raw_os_error(errno.saturating_neg())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledgement_is_told_from_an_error() {
        let mut answer = [0; 36];
        answer[4] = 2;
        assert!(acknowledged(&answer).is_ok());
        answer[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
        let refused = acknowledged(&answer).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
        answer[4] = 3;
        assert!(acknowledged(&answer).is_err());
        assert!(acknowledged(&answer[..19]).is_err());
    }

    /// The kernel itself reads the request here: without the right it refuses it, with the right
    /// it acknowledges it. A message out of form would be neither.
    #[test]
    fn the_kernel_understands_the_request() {
        match exchange() {
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied),
        }
    }
}
