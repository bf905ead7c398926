//! Descriptors and page tables for entry in 64-bit mode.
//!
//! Written by `boot`, and read back into registers by `kvm`: both take them from here, so memory
//! and registers cannot disagree. An identity map of the first 4 GiB in 2 MiB pages.

use mica_units::{Gpa, PAGE_BYTES};

use super::BootError;
use crate::layout;
use crate::memory::GuestMemory;

/// One segment: from 0, over everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The type field.
    pub kind: u8,
    /// The S bit: code or data, not a system segment.
    pub code_or_data: bool,
    /// 64-bit code.
    pub long: bool,
    /// The limit counts pages, and is the highest.
    pub pages: bool,
}

/// 64-bit code, execute and read.
pub const CODE: Descriptor = Descriptor { kind: 0xb, code_or_data: true, long: true, pages: true };
/// Data, read and write.
pub const DATA: Descriptor = Descriptor { kind: 0x3, code_or_data: true, long: false, pages: true };
/// A busy 64-bit task state segment: the processor wants one, nothing uses it.
pub const TSS: Descriptor =
    Descriptor { kind: 0xb, code_or_data: false, long: false, pages: false };

/// `__BOOT_CS` of the boot protocol.
pub const CODE_SELECTOR: u16 = 0x10;
/// `__BOOT_DS`.
pub const DATA_SELECTOR: u16 = 0x18;
/// The task state segment takes two slots.
pub const TSS_SELECTOR: u16 = 0x20;
/// Bytes of the GDT.
pub const GDT_BYTES: u16 = 6 * 8;
/// Bytes of the IDT: one null gate, so that any exception is a triple fault.
pub const IDT_BYTES: u16 = 16;

const PRESENT_WRITABLE: u64 = 0x3;
const HUGE_PAGE: u64 = 1 << 7;
const HUGE_PAGE_BYTES: u64 = 2 << 20;
const ENTRIES: u64 = 512;

const _: () = assert!(layout::GDT.raw() + GDT_BYTES as u64 <= layout::IDT.raw());
// One PML4, one PDPT, and a directory for each GiB of 4.
const _: () = assert!(layout::PAGE_TABLE_PAGES == 2 + 4);

impl Descriptor {
    const fn encode(self) -> u64 {
        let limit: u64 = if self.pages { 0xf_ffff } else { 0xffff };
        let db = self.pages && !self.long;
        (limit & 0xffff)
            | (self.kind as u64) << 40
            | (self.code_or_data as u64) << 44
            | 1 << 47
            | (limit >> 16) << 48
            | (self.long as u64) << 53
            | (db as u64) << 54
            | (self.pages as u64) << 55
    }
}

/// Writes the GDT, an empty IDT and the page tables.
pub fn write(memory: &GuestMemory) -> Result<(), BootError> {
    let gdt = [0, 0, CODE.encode(), DATA.encode(), TSS.encode(), 0];
    write_words(memory, "GDT", layout::GDT, &gdt)?;
    write_words(memory, "IDT", layout::IDT, &[0, 0])?;
    let page = |index: u64| layout::PAGE_TABLES.raw() + index * PAGE_BYTES;
    write_words(memory, "page tables", Gpa::new(page(0)), &[page(1) | PRESENT_WRITABLE])?;
    let directories: Vec<u64> = (2..6).map(|index| page(index) | PRESENT_WRITABLE).collect();
    write_words(memory, "page tables", Gpa::new(page(1)), &directories)?;
    let pages: Vec<u64> = (0..4 * ENTRIES)
        .map(|index| (index * HUGE_PAGE_BYTES) | PRESENT_WRITABLE | HUGE_PAGE)
        .collect();
    write_words(memory, "page tables", Gpa::new(page(2)), &pages)
}

fn write_words(
    memory: &GuestMemory,
    what: &'static str,
    at: Gpa,
    words: &[u64],
) -> Result<(), BootError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    super::write(memory, what, at, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_ones_of_the_manuals() {
        assert_eq!(CODE.encode(), 0x00af_9b00_0000_ffff);
        assert_eq!(DATA.encode(), 0x00cf_9300_0000_ffff);
        assert_eq!(TSS.encode(), 0x0000_8b00_0000_ffff);
    }
}
