//! The header of a vsock packet (virtio 1.2, 5.10.6).
//!
//! Called by the device for every packet in either direction. Refuses nothing: every 44 bytes are a
//! header, and what its fields may be is for the device and the connections to say.

/// Bytes of a header on the ring.
pub(super) const HEADER_BYTES: usize = 44;
/// The host's address.
pub(super) const HOST_CID: u64 = 2;
/// The only type of socket here.
pub(super) const TYPE_STREAM: u16 = 1;
/// `SHUTDOWN` flag: the sender of it will receive no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// `SHUTDOWN` flag: the sender of it will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    pub(super) fn from_raw(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A header, as the numbers in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes after the header.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// The sender's receive buffer, in bytes.
    pub(super) buf_alloc: u32,
    /// Bytes the sender has taken out of it so far, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// The 44 bytes, little endian.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The counterpart of [`Header::encode`].
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let u64_at = |at: usize| {
            u64::from_le_bytes(std::array::from_fn(|i| bytes.get(at + i).copied().unwrap_or(0)))
        };
        let u32_at = |at: usize| {
            u32::from_le_bytes(std::array::from_fn(|i| bytes.get(at + i).copied().unwrap_or(0)))
        };
        let u16_at = |at: usize| {
            u16::from_le_bytes(std::array::from_fn(|i| bytes.get(at + i).copied().unwrap_or(0)))
        };
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// The reset that answers this packet, from and to the same places turned round.
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip_and_lie_where_the_specification_says() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 3,
            dst_port: 4,
            len: 5,
            kind: 6,
            op: 7,
            flags: 8,
            buf_alloc: 9,
            fwd_cnt: 10,
        };
        let bytes = header.encode();
        assert_eq!(Header::decode(&bytes), header);
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        let starts: Vec<u8> = [8, 16, 20, 24, 28, 30, 32, 36, 40].map(|at| bytes[at]).into();
        assert_eq!(starts, [2, 3, 4, 5, 6, 7, 8, 9, 10]);
    }
}
