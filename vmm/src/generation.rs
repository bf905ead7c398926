//! The generation id: how a guest learns that it is a copy.
//!
//! Called by `control` when a guest goes on from a saved state, while no vCPU runs; `boot::acpi`
//! tells the guest where it is. Refuses to choose an id: the shard draws each from the kernel's
//! randomness, and two copies of one guest never get the same.

use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::GENERATION_ID;
use crate::memory::GuestMemory;
use crate::virtio::Event;

/// The id in guest memory, and the line that says it changed.
#[derive(Debug)]
pub struct Generation {
    line: Event,
}

impl Generation {
    /// `line` is the event behind [`crate::layout::GENERATION_GSI`]: one write, one interrupt.
    #[must_use]
    pub fn new(line: Event) -> Self {
        Self { line }
    }

    /// Writes a new id. The guest does not look before [`Generation::notify`], unless it polls.
    ///
    /// # Errors
    /// When guest memory ends below it, which no accepted size does.
    pub fn set(&self, memory: &GuestMemory, id: [u8; 16]) -> Result<(), GuestMemoryError> {
        memory.write_slice(&id, GuestAddress(GENERATION_ID.raw()))
    }

    /// Interrupts the guest. To be called once the interrupt chips have their state, which would
    /// overwrite it, and before the first vCPU runs, so that no guest code runs on old randomness
    /// for longer than its kernel keeps interrupts off.
    ///
    /// # Errors
    /// Only when the line is not an event.
    pub fn notify(&self) -> io::Result<()> {
        self.line.signal()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_lies_where_the_tables_say_and_the_line_is_raised_once_asked() {
        let memory = crate::memory::Memory::reserve(crate::layout::MEMORY_MIN).unwrap();
        let memory = memory.guest();
        let line = Event::new().unwrap();
        let generation = Generation::new(line.try_clone().unwrap());
        let id = [7, 6, 5, 4, 3, 2, 1, 0, 8, 9, 10, 11, 12, 13, 14, 15];
        generation.set(memory, id).unwrap();
        assert!(!line.clear().unwrap(), "setting interrupts nobody");
        let read: [u8; 16] = memory.read_obj(GuestAddress(0xe_f000)).unwrap();
        assert_eq!(read, id);
        generation.notify().unwrap();
        assert!(line.clear().unwrap());
    }
}
