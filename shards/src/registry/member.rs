//! What a host of the registry has that callers do not see: its slots and which of them are taken, and its place
//! in the order of reports.
//!
//! Called by the registry alone. Refuses to take a slot back twice.

use super::types::{Ports, ReleaseError, TemplateKey};

/// No lease, and no host.
const NONE: u32 = u32::MAX;

/// One slot that is taken, or was.
#[derive(Clone, Copy, Debug)]
struct Lease {
    /// How often it was taken back: tickets of earlier times have another number.
    turn: u32,
    /// The next of those that are free, where this one is.
    next_free: u32,
    taken: bool,
    ports: Ports,
}

/// The slots of one host.
#[derive(Debug)]
pub(super) struct Leases {
    all: Vec<Lease>,
    free: u32,
}

impl Default for Leases {
    fn default() -> Self {
        Self { all: Vec::new(), free: NONE }
    }
}

impl Leases {
    /// Sees to it that `slots` can be taken without asking for memory.
    pub(super) fn make_room(&mut self, slots: u32) {
        let slots = usize::try_from(slots).unwrap_or(usize::MAX);
        self.all.reserve_exact(slots.saturating_sub(self.all.len()));
    }

    /// Takes one: its place and turn. The caller has seen that one is free.
    pub(super) fn take(&mut self, ports: Ports) -> (u32, u32) {
        let at = usize::try_from(self.free).unwrap_or(usize::MAX);
        if let Some(lease) = self.all.get_mut(at) {
            let place = self.free;
            self.free = lease.next_free;
            *lease = Lease { turn: lease.turn, next_free: NONE, taken: true, ports };
            return (place, lease.turn);
        }
        debug_assert!(self.all.len() < self.all.capacity(), "no room was made for this slot");
        let place = u32::try_from(self.all.len()).unwrap_or(NONE);
        self.all.push(Lease { turn: 0, next_free: NONE, taken: true, ports });
        (place, 0)
    }

    /// Takes one back: the ports that are free again.
    pub(super) fn give_back(&mut self, place: u32, turn: u32) -> Result<Ports, ReleaseError> {
        let at = usize::try_from(place).unwrap_or(usize::MAX);
        let lease = self.all.get_mut(at).filter(|lease| lease.taken && lease.turn == turn);
        let lease = lease.ok_or(ReleaseError::ReleasedBefore)?;
        let ports = lease.ports;
        *lease = Lease {
            turn: turn.wrapping_add(1),
            next_free: self.free,
            taken: false,
            ports: Ports::default(),
        };
        self.free = place;
        Ok(ports)
    }

    /// Every port that is taken.
    pub(super) fn ports(&self) -> impl Iterator<Item = u16> + '_ {
        self.all
            .iter()
            .filter(|lease| lease.taken)
            .flat_map(|lease| lease.ports.as_slice())
            .copied()
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// What callers do not see of a host.
#[derive(Debug, Default)]
pub(super) struct Member {
    /// How often it came: tickets of earlier lives have another number.
    pub(super) life: u32,
    pub(super) templates: Vec<TemplateKey>,
    pub(super) leases: Leases,
}

/// All hosts in the order in which they last reported: a list through their numbers.
#[derive(Debug)]
pub(super) struct BySight {
    links: Vec<Link>,
    oldest: u32,
    newest: u32,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    older: u32,
    newer: u32,
}

impl BySight {
    pub(super) fn new(hosts: u16) -> Self {
        let links = vec![Link { older: NONE, newer: NONE }; usize::from(hosts)];
        Self { links, oldest: NONE, newest: NONE }
    }

    /// The one that reported longest ago.
    pub(super) fn oldest(&self) -> Option<u16> {
        u16::try_from(self.oldest).ok()
    }

    /// The one that reported last.
    pub(super) fn newest(&self) -> Option<u16> {
        u16::try_from(self.newest).ok()
    }

    /// Appends one that is in no list.
    pub(super) fn append(&mut self, host: u16) {
        let older = self.newest;
        self.links[usize::from(host)] = Link { older, newer: NONE };
        self.newest = u32::from(host);
        match u16::try_from(older) {
            Ok(older) => self.links[usize::from(older)].newer = u32::from(host),
            Err(_) => self.oldest = u32::from(host),
        }
    }

    /// Takes one out that is in the list.
    pub(super) fn remove(&mut self, host: u16) {
        let Link { older, newer } = self.links[usize::from(host)];
        match u16::try_from(older) {
            Ok(older) => self.links[usize::from(older)].newer = newer,
            Err(_) => self.oldest = newer,
        }
        match u16::try_from(newer) {
            Ok(newer) => self.links[usize::from(newer)].older = older,
            Err(_) => self.newest = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_goes_back_once() {
        let mut leases = Leases::default();
        leases.make_room(2);
        let ports = Ports::new(&[80, 443]).unwrap();
        let (first, turn) = leases.take(ports);
        leases.take(Ports::default());
        assert_eq!(leases.ports().collect::<Vec<_>>(), [80, 443]);
        assert_eq!(leases.give_back(first, turn), Ok(ports));
        assert_eq!(leases.give_back(first, turn), Err(ReleaseError::ReleasedBefore));
        let (again, later) = leases.take(ports);
        assert_eq!(again, first, "what is free is used first");
        assert_eq!(leases.give_back(first, turn), Err(ReleaseError::ReleasedBefore));
        assert_eq!(leases.give_back(again, later), Ok(ports));
        assert_eq!(leases.give_back(99, 0), Err(ReleaseError::ReleasedBefore));
    }

    #[test]
    fn the_list_keeps_its_order_through_every_removal() {
        let mut list = BySight::new(4);
        for host in [2, 0, 3, 1] {
            list.append(host);
        }
        list.remove(0);
        list.append(0);
        list.remove(2);
        assert_eq!((list.oldest(), list.newest()), (Some(3), Some(0)));
        list.remove(0);
        list.remove(3);
        assert_eq!((list.oldest(), list.newest()), (Some(1), Some(1)));
        list.remove(1);
        assert_eq!((list.oldest(), list.newest()), (None, None));
    }
}
