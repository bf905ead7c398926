//! One block request: from a chain of descriptors to numbers that have been checked.
//!
//! Called by the device for each chain. Refuses, as a status, a request that the disk cannot serve;
//! as a [`Rule`], one without room for its fixed parts, because there is nowhere to put a status.

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

use crate::virtio::queue::{copy_from_guest, copy_to_guest, pieces, total_bytes};
use crate::virtio::{Chain, GuestRam, Rule, Segment};

/// Bytes of one sector, in every block request whatever the disk's block size (virtio 1.2, 5.2.4).
pub(super) const SECTOR_BYTES: u64 = 512;
/// Bytes of the header: type, reserved, sector.
const HEADER_BYTES: usize = 16;

/// The last byte of a request (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Disk to guest.
    Read,
    /// Guest to disk.
    Write,
    /// All acknowledged writes to stable storage.
    Flush,
    /// The name of the disk.
    GetId,
}

/// A request that has been checked. Reused, so that one more allocates nothing.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) head: u16,
    pub(super) operation: Operation,
    /// Where on the disk, in bytes.
    pub(super) offset: u64,
    /// The data's place in guest memory.
    segments: Vec<Segment>,
    /// Bytes of data.
    pub(super) total: u64,
    /// Bytes of it already moved.
    pub(super) done: u64,
    status: GuestAddress,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            head: 0,
            operation: Operation::Flush,
            offset: 0,
            segments: Vec::new(),
            total: 0,
            done: 0,
            status: GuestAddress(0),
        }
    }
}

impl Request {
    /// Reads a chain into this request. `Ok(Err(status))` is a request to be refused with it.
    pub(super) fn parse(
        &mut self,
        chain: &Chain,
        memory: &GuestRam,
        disk: &Disk,
    ) -> Result<Result<(), Status>, Rule> {
        let mut header = [0u8; HEADER_BYTES];
        let copied = copy_from_guest(memory, chain.readable(), 0, &mut header)
            .map_err(|_| Rule::BufferOutsideMemory)?;
        let writable = total_bytes(chain.writable());
        if copied < HEADER_BYTES || writable == 0 {
            return Err(Rule::RequestTooShort);
        }
        self.head = chain.head();
        self.done = 0;
        self.segments.clear();
        self.status = last_byte(chain.writable()).ok_or(Rule::RequestTooShort)?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        self.operation = match u32::from_le_bytes([a, b, c, d]) {
            0 => Operation::Read,
            1 => Operation::Write,
            4 => Operation::Flush,
            8 => Operation::GetId,
            _ => return Ok(Err(Status::Unsupported)),
        };
        match self.operation {
            Operation::Read | Operation::GetId => {
                cut(&mut self.segments, chain.writable(), 0, writable - 1);
            }
            Operation::Write => {
                let readable = total_bytes(chain.readable());
                let header = HEADER_BYTES as u64;
                cut(&mut self.segments, chain.readable(), header, readable - header);
            }
            Operation::Flush => {}
        }
        self.total = total_bytes(&self.segments);
        Ok(self.place(sector, disk))
    }

    /// Checks the request's place on the disk.
    fn place(&mut self, sector: u64, disk: &Disk) -> Result<(), Status> {
        self.offset = 0;
        if matches!(self.operation, Operation::Flush | Operation::GetId) {
            return Ok(());
        }
        if self.operation == Operation::Write && disk.read_only {
            return Err(Status::IoError);
        }
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
        let end = offset.checked_add(self.total).ok_or(Status::IoError)?;
        if self.total == 0 || !self.total.is_multiple_of(SECTOR_BYTES) || end > disk.bytes {
            return Err(Status::IoError);
        }
        self.offset = offset;
        Ok(())
    }

    /// Bytes still to move.
    pub(super) fn left(&self) -> u64 {
        self.total.saturating_sub(self.done)
    }

    /// Copies the next bytes of the guest's data into `buffer`.
    pub(super) fn copy_in(
        &self,
        memory: &GuestRam,
        buffer: &mut [u8],
    ) -> Result<usize, GuestMemoryError> {
        copy_from_guest(memory, &self.segments, self.done, buffer)
    }

    /// Copies `data` to the next bytes of the guest's buffers.
    pub(super) fn copy_out(
        &self,
        memory: &GuestRam,
        data: &[u8],
    ) -> Result<usize, GuestMemoryError> {
        copy_to_guest(memory, &self.segments, self.done, data)
    }

    /// Writes the status byte; the count of bytes the device wrote in all, for the used ring.
    pub(super) fn finish(
        &self,
        memory: &GuestRam,
        status: Status,
    ) -> Result<u32, GuestMemoryError> {
        memory.write_obj(status as u8, self.status)?;
        let data = match self.operation {
            Operation::Read | Operation::GetId => self.done,
            Operation::Write | Operation::Flush => 0,
        };
        Ok(u32::try_from(data + 1).unwrap_or(u32::MAX))
    }
}

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Disk {
    pub(super) bytes: u64,
    pub(super) read_only: bool,
}

/// Puts the `length` bytes of `segments` from byte `skip` on into `target`.
fn cut(target: &mut Vec<Segment>, segments: &[Segment], skip: u64, length: u64) {
    let mut left = length;
    for piece in pieces(segments, skip) {
        let bytes = u32::try_from(left).unwrap_or(u32::MAX).min(piece.bytes);
        if bytes == 0 {
            return;
        }
        left -= u64::from(bytes);
        target.push(Segment { bytes, ..piece });
    }
}

fn last_byte(segments: &[Segment]) -> Option<GuestAddress> {
    let last = segments.iter().rev().find(|segment| segment.bytes > 0)?;
    last.address.checked_add(u64::from(last.bytes) - 1)
}
