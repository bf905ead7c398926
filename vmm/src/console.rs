//! The serial console: a 16550 whose output goes to the bounded ring that the shard reads.
//!
//! Written by vCPU threads on port accesses. A guest that floods it overwrites its own older output
//! and pays with its own vCPU time: no allocation, no system call for a byte, no message after the
//! first. Refuses input: there is none.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mica_wire::vm::console::{BYTES_MIN, HEADER_BYTES};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use crate::notices::Notices;
use crate::state::SerialState;
use crate::virtio::Event;

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The memfd is not what the configuration says.
    #[error(
        "the console memfd has {actual} bytes, the configuration says {expected} (at least {BYTES_MIN})"
    )]
    Length {
        /// Length of the file.
        actual: u64,
        /// `console_bytes` of the configuration.
        expected: u64,
    },
    /// Its length could not be read.
    #[error("reading the length of the console memfd failed")]
    Stat(#[source] io::Error),
    /// It could not be mapped.
    #[error("mapping the console memfd failed")]
    Map(#[source] MmapRegionError),
}

/// The ring, which stays while the serial port before it is exchanged for a restored one.
#[derive(Clone, Debug)]
struct Output(Arc<Mutex<Ring>>);

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The ring in the shared memfd (layout: `mica_wire::vm::console`).
#[derive(Debug)]
struct Ring {
    map: MmapRegion<()>,
    capacity: usize,
    /// Kept here, never read back from the shared page.
    total: u64,
    notices: Arc<Notices>,
}

impl Ring {
    fn new(memfd: OwnedFd, bytes: u64, notices: Arc<Notices>) -> Result<Self, ConsoleError> {
        let file = File::from(memfd);
        let actual = file.metadata().map_err(ConsoleError::Stat)?.len();
        let wrong = ConsoleError::Length { actual, expected: bytes };
        if actual != bytes || bytes < BYTES_MIN {
            return Err(wrong);
        }
        let Ok(length) = usize::try_from(bytes) else { return Err(wrong) };
        let map =
            MmapRegion::from_file(FileOffset::new(file, 0), length).map_err(ConsoleError::Map)?;
        // BYTES_MIN is above HEADER_BYTES.
        let capacity = length - HEADER_LENGTH;
        Ok(Self { map, capacity, total: 0, notices })
    }
}

const HEADER_LENGTH: usize = 8;
const _: () = assert!(HEADER_LENGTH as u64 == HEADER_BYTES);
const _: () = assert!(BYTES_MIN > HEADER_BYTES);

impl Write for Ring {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let first = self.total == 0 && !data.is_empty();
        let ring = self.map.as_volatile_slice();
        for byte in data {
            let at = usize::try_from(self.total % self.capacity as u64).unwrap_or(0);
            ring.write_obj(*byte, HEADER_LENGTH + at).map_err(io::Error::other)?;
            self.total += 1;
        }
        // After the bytes, so that a reader who sees the total sees them.
        ring.store(self.total, 0, Ordering::Release).map_err(io::Error::other)?;
        if first {
            self.notices.console_started();
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The interrupt line of the serial port.
#[derive(Clone, Debug)]
struct Line(Arc<Event>);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.signal()
    }
}

/// The serial port of one VM.
pub struct Console {
    port: Mutex<Serial<Line, NoEvents, Output>>,
    output: Output,
    line: Line,
    fd: RawFd,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Console")
    }
}

/// The serial port could not do its work; the words are for an ending.
#[derive(Debug, thiserror::Error)]
#[error("the serial port failed: {0}")]
pub struct SerialError(String);

impl Console {
    /// A serial port that writes to the ring in `memfd` and interrupts through `line`.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn new(
        memfd: OwnedFd,
        bytes: u64,
        line: Event,
        notices: Arc<Notices>,
    ) -> Result<Self, ConsoleError> {
        let fd = memfd.as_raw_fd();
        let ring = Ring::new(memfd, bytes, notices)?;
        let output = Output(Arc::new(Mutex::new(ring)));
        let line = Line(Arc::new(line));
        let port = Mutex::new(Serial::new(line.clone(), output.clone()));
        Ok(Self { port, output, line, fd })
    }

    /// The number of the memfd in this process. It stays open as long as this lives.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.fd
    }

    /// The registers of the port. What was written is in the ring, which is no part of a state.
    #[must_use]
    pub fn save(&self) -> SerialState {
        let state = self.lock().state();
        SerialState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        }
    }

    /// Takes on saved registers, and interrupts again if they say that an interrupt is due.
    ///
    /// # Errors
    /// When the interrupt line failed: the host's fault.
    pub fn restore(&self, state: &SerialState) -> Result<(), SerialError> {
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        let state = vm_superio::serial::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            // There is no input.
            in_buffer: Vec::new(),
        };
        let port = Serial::from_state(&state, self.line.clone(), NoEvents, self.output.clone())
            .map_err(|error| SerialError(format!("{error:?}")))?;
        *self.lock() = port;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Line, NoEvents, Output>> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads register `offset`.
    pub fn read(&self, offset: u8) -> u8 {
        self.lock().read(offset)
    }

    /// The guest writes register `offset`.
    ///
    /// # Errors
    /// When the ring or the interrupt line failed: the host's fault.
    pub fn write(&self, offset: u8, value: u8) -> Result<(), SerialError> {
        self.lock().write(offset, value).map_err(|error| SerialError(format!("{error:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::os::unix::fs::FileExt;

    fn memfd(bytes: u64) -> OwnedFd {
        let fd = memfd_create("console", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fd
    }

    #[test]
    fn output_wraps_and_the_total_counts_on() {
        let fd = memfd(4096);
        let reader = File::from(fd.try_clone().unwrap());
        let notices = Arc::new(Notices::new().unwrap());
        let console = Console::new(fd, 4096, Event::new().unwrap(), notices.clone()).unwrap();
        assert!(!notices.take().unwrap().console_started);
        for n in 0..10_000u32 {
            console.write(0, (n % 251) as u8).unwrap();
        }
        assert!(notices.take().unwrap().console_started);
        let mut total = [0; 8];
        reader.read_exact_at(&mut total, 0).unwrap();
        assert_eq!(u64::from_le_bytes(total), 10_000);
        for n in (10_000 - 4088)..10_000u64 {
            let mut byte = [0];
            reader.read_exact_at(&mut byte, 8 + n % 4088).unwrap();
            assert_eq!(u64::from(byte[0]), n % 251);
        }
    }

    #[test]
    fn a_memfd_of_another_length_is_refused() {
        for (actual, said) in [(4096, 8192), (100, 100), (0, 4096)] {
            let notices = Arc::new(Notices::new().unwrap());
            let console = Console::new(memfd(actual), said, Event::new().unwrap(), notices);
            assert!(matches!(console, Err(ConsoleError::Length { .. })), "{actual} {said}");
        }
    }
}
