//! The connections of one device, found by their host-side port.
//!
//! Called by the device. Refuses more than [`CONNECTIONS_MAX`] connections.
//!
//! A host-side port is `generation * 1024 + slot`: finding a connection is indexing, and a packet
//! for a connection that is over finds none, because its slot's next user has another generation.

use super::connection::Connection;

/// Most connections at a time. With a descriptor each; and with the buffer of each full (see
/// `connection::BUFFER_BYTES`) they hold 32 MiB.
pub(super) const CONNECTIONS_MAX: usize = 512;
/// Ports per generation: slots, rounded up. Ports below it are never used; services have those.
const STRIDE: u32 = 1024;
/// Generations before they start again; the last of them stays clear of port 2^32 - 1, "any".
const GENERATIONS: u32 = u32::MAX / STRIDE - 1;

const _: () = assert!(CONNECTIONS_MAX <= STRIDE as usize);

/// The connections.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Option<(u32, Connection)>>,
    live: usize,
    generation: u32,
}

impl Table {
    /// A port for one more connection, to be used with [`Table::insert`]. A connection that only
    /// waits for its goodbye makes room when there is none. `None` when the table is full.
    pub(super) fn free_port(&mut self) -> Option<u32> {
        let slot = if self.live < self.slots.len() {
            self.slots.iter().position(Option::is_none)
        } else if self.slots.len() < CONNECTIONS_MAX {
            Some(self.slots.len())
        } else {
            self.slots.iter().position(|slot| {
                slot.as_ref().is_some_and(|(_, connection)| connection.is_finished())
            })
        }?;
        self.generation = self.generation % GENERATIONS + 1;
        Some(self.generation * STRIDE + u32::try_from(slot).ok()?)
    }

    /// Puts a connection at a port of [`Table::free_port`].
    pub(super) fn insert(&mut self, port: u32, connection: Connection) {
        let slot = slot_of(port);
        while self.slots.len() <= slot {
            self.slots.push(None);
        }
        if self.slots[slot].replace((port, connection)).is_none() {
            self.live += 1;
        }
    }

    /// The connection at a port.
    pub(super) fn get(&mut self, port: u32) -> Option<&mut Connection> {
        match self.slots.get_mut(slot_of(port)) {
            Some(Some((at, connection))) if *at == port => Some(connection),
            _ => None,
        }
    }

    /// All connections.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Connection> {
        self.slots.iter().flatten().map(|(_, connection)| connection)
    }

    /// Which generation the last port was of.
    pub(super) fn generation(&self) -> u32 {
        self.generation
    }

    /// Makes the next port be of a generation that came neither here nor before `generation`, so that
    /// it names nothing a guest may still know. `false` when there is no such generation.
    pub(super) fn go_on_from(&mut self, generation: u32) -> bool {
        self.generation = self.generation.max(generation);
        generation <= GENERATIONS
    }

    /// Removes a connection.
    pub(super) fn remove(&mut self, port: u32) {
        if self.get(port).is_some() {
            self.slots[slot_of(port)] = None;
            self.live -= 1;
        }
    }

    /// Removes every connection that `keep` does not want.
    pub(super) fn retain(&mut self, keep: impl Fn(&Connection) -> bool) {
        for slot in &mut self.slots {
            if slot.as_ref().is_some_and(|(_, connection)| !keep(connection)) {
                *slot = None;
                self.live -= 1;
            }
        }
    }
}

fn slot_of(port: u32) -> usize {
    usize::try_from(port % STRIDE).unwrap_or(usize::MAX)
}
