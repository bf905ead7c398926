//! The saved state of a VM, as bytes that outlive the process that wrote them.
//!
//! Written by `freeze`, read by `restore`; `virtio`, `console` and `kvm` make and take back the parts.
//! Refuses, when read, another format, another version, changed bytes, and counts beyond their bounds;
//! what is in form but does not fit the VM is refused by whoever takes the part back.
//!
//! ```text
//!  0      8         12      16       24             32
//!  ┌──────┬─────────┬───────┬────────┬──────────────┬──────────────────────┐
//!  │ magic│ version │ crc   │ length │ reserved     │ rkyv archive         │
//!  └──────┴─────────┴───────┴────────┴──────────────┴──────────────────────┘
//!  integers little endian; crc: CRC-32C over length, reserved and the archive
//! ```

mod devices;
#[cfg(test)]
mod tests;
mod vcpu;

use mica_units::{VCPUS_MAX, VcpuCount};
use mica_wire::vm::EXCHANGE_PART_BYTES_MAX;
use rkyv::rancor;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::layout::MMIO_DEVICES_MAX;

pub use devices::{BlkState, DeviceState, PortPair, QueueState, TransportState, Unfit, VsockState};
pub use vcpu::{
    CPUID_LEAVES_MAX, CpuidLeaf, MSRS_MAX, MachineState, MsrState, SerialState, VcpuState,
    XSAVE_BYTES_MAX,
};

const MAGIC: [u8; 8] = *b"MICASTAT";
/// The version of what is archived. A change of any structure below is another version: the tests
/// have a state of this one as bytes.
pub const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
const CRC_AT: usize = 12;
const CHECKED_FROM: usize = 16;

/// Everything of a VM but its memory and its disk.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct VmState {
    /// Guest memory.
    pub memory_mib: u32,
    /// The CPUID table, but for what numbers the vCPUs.
    pub cpuid: Vec<CpuidLeaf>,
    /// The vCPUs, in order.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt chips and clock.
    pub machine: MachineState,
    /// The serial port.
    pub serial: SerialState,
    /// The virtio devices, in their order on the bus.
    pub devices: Vec<TransportState>,
}

/// Why bytes are not a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// No header, another format, or a length that is not the archive's.
    #[error("the saved state is out of form, or cut short")]
    Form,
    /// A state of another version of this program.
    #[error("the saved state has version {0}, this program reads {VERSION}")]
    Version(u32),
    /// The bytes are not the ones that were written.
    #[error("the saved state is damaged: its checksum is wrong")]
    Checksum,
    /// The archive is not valid.
    #[error("the saved state is not valid")]
    Contents,
    /// A count beyond its bound.
    #[error("the saved state has {0} out of bounds")]
    Bound(&'static str),
}

impl VmState {
    /// The bytes.
    ///
    /// # Errors
    /// When there are more than an exchange carries, which the bounds exclude.
    pub fn encode(&self) -> Result<Vec<u8>, StateError> {
        let archive = rkyv::to_bytes::<rancor::Error>(self).map_err(|_| StateError::Contents)?;
        let total = HEADER_BYTES + archive.len();
        if total as u64 > EXCHANGE_PART_BYTES_MAX {
            return Err(StateError::Bound("its length"));
        }
        let mut bytes = Vec::with_capacity(total);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&(archive.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&archive);
        let crc = crc32c::crc32c(&bytes[CHECKED_FROM..]);
        bytes[CRC_AT..CHECKED_FROM].copy_from_slice(&crc.to_le_bytes());
        Ok(bytes)
    }

    /// Reads the bytes back. Nobody is believed: they may come from a damaged or a forged file.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let word = |at: usize| {
            bytes.get(at..at + 4).and_then(|word| Some(u32::from_le_bytes(word.try_into().ok()?)))
        };
        let (header, archive) = bytes.split_at_checked(HEADER_BYTES).ok_or(StateError::Form)?;
        if header[..8] != MAGIC {
            return Err(StateError::Form);
        }
        let version = word(8).ok_or(StateError::Form)?;
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        if header[16..24] != (archive.len() as u64).to_le_bytes() || header[24..] != [0; 8] {
            return Err(StateError::Form);
        }
        if word(CRC_AT) != Some(crc32c::crc32c(&bytes[CHECKED_FROM..])) {
            return Err(StateError::Checksum);
        }
        // rkyv wants it aligned, and these bytes lie anywhere.
        let mut aligned: AlignedVec = AlignedVec::with_capacity(archive.len());
        aligned.extend_from_slice(archive);
        let state =
            rkyv::from_bytes::<Self, rancor::Error>(&aligned).map_err(|_| StateError::Contents)?;
        state.check()?;
        Ok(state)
    }

    /// The checked number of vCPUs.
    ///
    /// # Errors
    /// When it is out of bounds, which decoding excludes.
    pub fn vcpu_count(&self) -> Result<VcpuCount, StateError> {
        u32::try_from(self.vcpus.len())
            .ok()
            .and_then(|count| VcpuCount::new(count).ok())
            .ok_or(StateError::Bound("the number of vCPUs"))
    }

    fn check(&self) -> Result<(), StateError> {
        const QUEUES_MAX: usize = 8;
        let bound = |good: bool, what| if good { Ok(()) } else { Err(StateError::Bound(what)) };
        self.vcpu_count()?;
        bound(self.cpuid.len() <= CPUID_LEAVES_MAX, "the number of CPUID leaves")?;
        for vcpu in &self.vcpus {
            bound(vcpu.msrs.len() <= MSRS_MAX, "the number of MSRs")?;
            bound(vcpu.xsave.len() <= XSAVE_BYTES_MAX, "the extended state")?;
        }
        bound(self.devices.len() <= MMIO_DEVICES_MAX, "the number of devices")?;
        let queues = self.devices.iter().all(|device| device.queues.len() <= QUEUES_MAX);
        bound(queues, "the number of queues")
    }
}

const _: () = assert!(VCPUS_MAX as usize * (XSAVE_BYTES_MAX + MSRS_MAX * 16 + 4096) < 1 << 20);
