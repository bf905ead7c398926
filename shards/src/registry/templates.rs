//! Names of templates as small numbers, so that nothing compares text while it chooses a host.
//!
//! Called by the registry alone. Refuses more names than it has numbers; the number of a name that no host has
//! any more goes to the next new name.

use std::collections::HashMap;

use super::types::{RegistryError, TemplateKey};

/// Templates that a registry can tell apart.
pub(super) const TEMPLATES_MAX: usize = 4096;

/// Bytes of a name.
pub(super) const NAME_BYTES_MAX: usize = 256;

#[derive(Debug)]
struct Named {
    name: Box<str>,
    /// How many names this number had before.
    turn: u32,
    /// Hosts that have it.
    holders: u32,
}

/// All names.
#[derive(Debug, Default)]
pub(super) struct Templates {
    by_name: HashMap<Box<str>, u16>,
    all: Vec<Named>,
    /// Where the search for a number without holders goes on.
    next: usize,
}

impl Templates {
    pub(super) fn key(&self, name: &str) -> Option<TemplateKey> {
        let index = *self.by_name.get(name)?;
        let turn = self.all.get(usize::from(index))?.turn;
        Some(TemplateKey { index, turn })
    }

    pub(super) fn intern(&mut self, name: &str) -> Result<TemplateKey, RegistryError> {
        if let Some(key) = self.key(name) {
            return Ok(key);
        }
        if !(1..=NAME_BYTES_MAX).contains(&name.len()) {
            return Err(RegistryError::BadTemplateName(name.len()));
        }
        let full = RegistryError::TemplatesFull;
        let (at, turn) = if self.all.len() < TEMPLATES_MAX {
            self.all.push(Named { name: name.into(), turn: 0, holders: 0 });
            (self.all.len() - 1, 0)
        } else {
            let at = self.unheld().ok_or(full.clone())?;
            let named = &mut self.all[at];
            self.by_name.remove(&named.name);
            *named = Named { name: name.into(), turn: named.turn.wrapping_add(1), holders: 0 };
            (at, named.turn)
        };
        let index = u16::try_from(at).map_err(|_| full)?;
        self.by_name.insert(name.into(), index);
        Ok(TemplateKey { index, turn })
    }

    fn unheld(&mut self) -> Option<usize> {
        let start = self.next;
        let order = (start..self.all.len()).chain(0..start);
        let at = order.into_iter().find(|at| self.all[*at].holders == 0)?;
        self.next = (at + 1) % TEMPLATES_MAX;
        Some(at)
    }

    /// The row of a key, and how many hosts have the template; none for a key whose name has left.
    pub(super) fn holders(&self, key: TemplateKey) -> Option<(usize, u32)> {
        let at = usize::from(key.index);
        let named = self.all.get(at).filter(|named| named.turn == key.turn)?;
        Some((at, named.holders))
    }

    pub(super) fn count(&mut self, row: usize, gained: bool) {
        let holders = &mut self.all[row].holders;
        *holders = if gained { *holders + 1 } else { holders.saturating_sub(1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_key_and_bad_names_are_refused() {
        let mut templates = Templates::default();
        let base = templates.intern("base").unwrap();
        let other = templates.intern("other").unwrap();
        assert_ne!(base, other);
        assert_eq!(templates.intern("base"), Ok(base));
        assert_eq!(templates.key("base"), Some(base));
        assert_eq!(templates.key("none"), None);
        assert_eq!(templates.intern(""), Err(RegistryError::BadTemplateName(0)));
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        assert_eq!(templates.intern(&long), Err(RegistryError::BadTemplateName(long.len())));
    }

    #[test]
    fn numbers_of_names_that_no_host_has_are_used_again() {
        let mut templates = Templates::default();
        let keys: Vec<_> =
            (0..TEMPLATES_MAX).map(|n| templates.intern(&format!("t{n}")).unwrap()).collect();
        // All but one have a holder.
        for (row, _) in keys.iter().enumerate().filter(|(row, _)| *row != 7) {
            templates.count(row, true);
        }
        let new = templates.intern("new").unwrap();
        assert_eq!(new.index, keys[7].index);
        assert_eq!(templates.holders(keys[7]), None, "the old key matches nothing");
        assert_eq!(templates.key("t7"), None);
        templates.count(7, true);
        assert_eq!(templates.intern("one more"), Err(RegistryError::TemplatesFull));
        templates.count(9, false);
        assert_eq!(templates.intern("one more").unwrap().index, 9);
    }
}
